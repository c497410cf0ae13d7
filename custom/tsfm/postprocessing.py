"""nnU-Net's post-processing: keep the largest component where cross-validation shows that it helps.

`determine` reads the rule from predictions and truths of cross-validation: first all foreground together, kept if the
mean Dice rises and no target's falls; then target by target, kept if that target's Dice strictly rises. What was kept
so far stays applied. The plan is plain JSON, `apply` needs nothing else, and `PostProcessd` is the step for
inference.json.

    {"targets": [names], "steps": [{"target": "all foreground", "values": [1, 2], "fill": 0}], "evidence": [...]}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy.ndimage import find_objects

from .evaluation import count_voxels, only_dataset
from .labelmaps import as_label_map, as_table, load_map, load_truth
from .labels import LabelTable

FOREGROUND = "all foreground"


def determine(
    predictions: Sequence[np.ndarray | str | Path],
    truths: Sequence[Any],
    table: LabelTable | Mapping | str,
    datasets: Sequence[str] | str | None = None,
    fill: str = "parent",
) -> dict[str, Any]:
    """The plan that cross-validation supports.

    Args:
        predictions: label maps with values 0 to N, as arrays or NIfTI files (read one at a time).
        truths: raw ids of the same cases, as arrays, NIfTI files, or one mask file per structure.
        table: the label table, its dict, or the path of a pool.json.
        datasets: data set of each case, or of all (default: the table's only one). Dice counts annotated targets only;
            a case without the target in both prediction and truth counts nowhere, as in nnU-Net.
        fill: what a removed voxel becomes: ``"parent"`` (the target that contains the removed one: a false tumor in the
            liver is liver again) or ``"background"`` (nnU-Net's choice; the same for targets without a parent).

    Raises:
        ValueError: lists of different length, an empty list, maps that do not fit the table.
    """
    table = as_table(table)
    if fill not in ("parent", "background"):
        raise ValueError(f'fill is {fill!r}, expected "parent" or "background"')
    if not predictions or len(predictions) != len(truths):
        raise ValueError(f"{len(predictions)} predictions and {len(truths)} truths: expected one of each per case")
    owners = (
        [datasets or only_dataset(table)] * len(truths) if datasets is None or isinstance(datasets, str) else datasets
    )
    cases = list(zip(predictions, truths, owners, strict=True))
    plan: dict[str, Any] = {"targets": list(table.names), "steps": [], "evidence": []}
    before = _mean_dice(cases, table, plan["steps"])
    for candidate in _candidates(table, fill):
        after = _mean_dice(cases, table, [*plan["steps"], candidate])
        helps = _helps_all if candidate["target"] == FOREGROUND else _helps_one(candidate["target"])
        kept = helps(before, after)
        plan["evidence"].append({"target": candidate["target"], "kept": kept, "before": before, "after": after})
        if kept:
            plan["steps"].append(candidate)
            before = after
    return plan


def _candidates(table: LabelTable, fill: str) -> list[dict[str, Any]]:
    """All foreground, then every target in declared order; a single target is all foreground already."""
    number, member = len(table.names), table.map_membership()
    steps = [{"target": FOREGROUND, "values": list(range(1, number + 1)), "fill": 0}]
    for target, name in enumerate(table.names if number > 1 else ()):
        values = np.flatnonzero(member[:, target]).tolist()
        parent = table.parent(name) if fill == "parent" else None
        steps.append({"target": name, "values": values, "fill": table.names.index(parent) + 1 if parent else 0})
    return steps


def _helps_all(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """The mean rises and no target falls; a target left without any Dice to compare forbids it."""
    means = [float(np.mean(list(dice.values()))) if dice else 0.0 for dice in (before, after)]
    same = before.keys() == after.keys()
    return same and means[1] > means[0] and all(after[name] >= before[name] for name in before)


def _helps_one(target: str) -> Callable[[Mapping[str, float], Mapping[str, float]], bool]:
    """That target strictly rises."""
    return lambda before, after: target in before and target in after and after[target] > before[target]


def _mean_dice(cases: Sequence[tuple], table: LabelTable, steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Target -> mean Dice over the cases where truth or the *processed* prediction holds it."""
    values: dict[str, list[float]] = {}
    for prediction, truth, dataset in cases:
        array = load_map(prediction)[0] if isinstance(prediction, (str, Path)) else prediction
        array = as_label_map(
            array, len(table.names), str(prediction) if isinstance(prediction, (str, Path)) else "case"
        )
        codes, _ = load_truth(truth, table, dataset)
        for name, (tp, fp, fn) in count_voxels(apply(array, {"steps": steps}), codes, table, dataset).items():
            if tp + fp + fn:
                values.setdefault(name, []).append(2 * tp / (2 * tp + fp + fn))
    return {name: float(np.mean(dice)) for name, dice in values.items()}


def apply(label_map: np.ndarray, plan: Mapping[str, Any]) -> np.ndarray:
    """A new label map (three axes) with the plan's steps applied one after the other; the input stays as it is."""
    result = np.array(label_map)
    for step in plan["steps"]:
        _keep_largest(result, step["values"], step["fill"])
    return result


def _keep_largest(label_map: np.ndarray, values: Sequence[int], fill: int) -> None:
    """Set, in place, all but the largest 26-connected component of these values to `fill`; equally large ones stay."""
    boxes = find_objects(label_map)
    found = [boxes[value - 1] for value in values if value <= len(boxes) and boxes[value - 1]]
    if not found:
        return
    box = tuple(slice(min(b[a].start for b in found), max(b[a].stop for b in found)) for a in range(label_map.ndim))
    lookup = np.zeros(max(len(boxes), *values) + 1, bool)
    lookup[list(values)] = True
    components = cc3d.connected_components(lookup[label_map[box]], connectivity=26)
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    remove = sizes < sizes.max()
    remove[0] = False
    label_map[box][remove[components]] = fill


class PostProcessd(MapTransform):
    """The plan of `determine` as a step of ``postprocessing``: keys hold label maps (1, X, Y, Z).

    Args:
        keys: entries to process.
        plan: the plan, the path of its JSON file, or None (nothing is changed).
        targets: names of the label map's values 1 to N; where given, a plan made for other targets is an error.
    """

    def __init__(
        self,
        keys: KeysCollection,
        plan: Mapping[str, Any] | str | Path | None = None,
        targets: Sequence[str] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if isinstance(plan, (str, Path)):
            if not Path(plan).is_file():
                raise FileNotFoundError(f"{plan}: no such post-processing plan; give null for none")
            plan = json.loads(Path(plan).read_text(encoding="utf-8"))
        if plan and targets is not None and list(plan.get("targets", targets)) != list(targets):
            raise ValueError(
                f"the post-processing plan was made for {plan['targets']}, the label map holds {list(targets)}"
            )
        self.plan = plan or {"steps": []}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            if self.plan["steps"]:
                result[key] = self._process(result[key])
        return result

    def _process(self, label_map: torch.Tensor | np.ndarray) -> torch.Tensor | np.ndarray:
        if not isinstance(label_map, torch.Tensor):
            return np.stack([apply(as_label_map(channel, 65535), self.plan) for channel in label_map]).astype(
                label_map.dtype
            )
        array = label_map.detach().cpu().as_subclass(torch.Tensor).numpy()
        kept = torch.from_numpy(self._process(array)).to(label_map.device)
        if not isinstance(label_map, MetaTensor):
            return kept
        return MetaTensor(kept, meta=label_map.meta, applied_operations=label_map.applied_operations)
