"""nnU-Net's post-processing: keep the largest component where cross-validation shows that it helps.

`determine` reads the rule from predictions and truths of cross-validation: first all foreground together, kept if the
mean Dice rises and no target's falls; then target by target, kept if that target's Dice strictly rises. What was kept
so far stays applied. The plan is plain JSON, `apply` needs nothing else, and `PostProcessd` is the step for
inference.json.

    {"targets": [names], "steps": [{"target": "all foreground", "values": [1, 2], "fill": 0, "needs": [names]}],
     "evidence": [...]}

"needs" are the targets without which a step means nothing: tumors alone, of which one is the largest component, are not the
liver around them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from ..cases.volumes import as_label_map
from ..preparation.resampling import boxes_of, enclosing
from ..schema import FileError, read_json
from .notes import CLICKS, COMPUTED


def apply(
    label_map: np.ndarray,
    plan: Mapping[str, Any],
    computed: Collection[str] | None = None,
    clicked: Collection[str] = (),
) -> np.ndarray:
    """A new label map (three axes) with the plan's steps applied one after the other; the input stays as it is.

    Args:
        computed: the targets that the map could hold, None for all of the plan's. A step whose needs are not among them is
            left out, and what a step removes becomes none of the others.
        clicked: targets inside of which somebody clicked: steps that could remove them are left out.
    """
    result, names = np.array(label_map), plan.get("targets", ())
    touched = {names.index(name) + 1 for name in clicked}
    for step in plan["steps"]:
        if (computed is not None and not set(_needs(step, names)) <= set(computed)) or touched & set(step["values"]):
            continue
        around = (step["fill"], *step.get("farther", ()), 0)
        fill = next(value for value in around if not value or computed is None or names[value - 1] in computed)
        _keep_largest(result, step["values"], fill)
    return result


def _checked(plan: Any, path: str | Path) -> Mapping[str, Any]:
    """What a file holds, or FileError where that is no plan."""
    steps = plan.get("steps") if isinstance(plan, Mapping) else None
    parts = {"target", "values", "fill"}
    if not isinstance(steps, list) or not all(isinstance(step, Mapping) and parts <= step.keys() for step in steps):
        raise FileError(
            f'{path} is no post-processing plan; expected "steps", each with {sorted(parts)}: python -m tsfm '
            "postprocessing makes one; give null for none"
        )
    return plan


def _needs(step: Mapping[str, Any], names: Sequence[str]) -> Sequence[str]:
    """The targets that have to be computed for a step; plans that do not say so mean all where they name no target."""
    return step.get("needs") or ([step["target"]] if step["target"] in names else names)


def _keep_largest(label_map: np.ndarray, values: Sequence[int], fill: int) -> None:
    """Set, in place, all but the largest 26-connected component of these values to `fill`; equally large ones stay."""
    boxes = boxes_of(label_map)
    around = enclosing(boxes[value - 1] for value in values if value <= len(boxes))
    if around is None:
        return
    box = tuple(slice(*side) for side in around)
    lookup = np.zeros(max(len(boxes), *values) + 1, np.uint8)  # cc3d refuses some bools, see metrics.lesions
    lookup[list(values)] = 1
    components = cc3d.connected_components(lookup[label_map[box]], connectivity=26)
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    remove = sizes < sizes.max()
    remove[0] = False
    label_map[box][remove[components]] = fill


class PostProcessd(MapTransform):
    """The plan of `determine` as a step of ``postprocessing``: keys hold label maps (1, X, Y, Z).

    Right after the inferer, whose notes say which targets a map could hold and where somebody clicked (`apply`).

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
    ) -> None:
        super().__init__(keys)
        if isinstance(plan, (str, Path)):
            if not Path(plan).is_file():
                raise FileNotFoundError(f"{plan}: no such post-processing plan; give null for none")
            plan = _checked(read_json(plan), plan)
        if plan and targets is not None and list(plan.get("targets", targets)) != list(targets):
            raise ValueError(
                f"the post-processing plan was made for {plan['targets']}, the label map holds {list(targets)}"
            )
        self.plan = {"targets": list(targets or ()), **(plan or {"steps": []})}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            if self.plan["steps"]:
                result[key] = self._process(result[key])
        return result

    def _process(self, label_map: MetaTensor) -> MetaTensor:
        notes = label_map.meta
        clicks, computed = json.loads(notes.get(CLICKS, "[]")), json.loads(notes.get(COMPUTED, "null"))
        clicked = {name for kind, name, _ in clicks if kind != "outside" and name in self.plan["targets"]}
        plain = label_map.detach().as_subclass(torch.Tensor)
        kept = apply(as_label_map(plain[0].cpu().numpy(), 65535), self.plan, computed, clicked)
        kept = torch.from_numpy(kept)[None].to(plain)
        return MetaTensor(kept, meta=notes, applied_operations=label_map.applied_operations)
