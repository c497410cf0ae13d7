"""nnU-Net's post-processing: keep the largest component where cross-validation shows that it helps.

`determine` reads the rule from predictions and truths of cross-validation: first all foreground together, kept if the
mean Dice rises and no target's falls; then target by target, kept if that target's Dice strictly rises. What was kept
so far stays applied. The plan is plain JSON, `apply` needs nothing else, and `PostProcessd` is the step for
inference.json.

    {"targets": [names], "steps": [{"target": "all foreground", "values": [1, 2], "fill": 0}], "evidence": [...]}
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
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
from ..schema import read_json


def apply(label_map: np.ndarray, plan: Mapping[str, Any]) -> np.ndarray:
    """A new label map (three axes) with the plan's steps applied one after the other; the input stays as it is."""
    result = np.array(label_map)
    for step in plan["steps"]:
        _keep_largest(result, step["values"], step["fill"])
    return result


def _keep_largest(label_map: np.ndarray, values: Sequence[int], fill: int) -> None:
    """Set, in place, all but the largest 26-connected component of these values to `fill`; equally large ones stay."""
    boxes = boxes_of(label_map)
    around = enclosing(boxes[value - 1] for value in values if value <= len(boxes))
    if around is None:
        return
    box = tuple(slice(*side) for side in around)
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
            plan = read_json(plan)
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
