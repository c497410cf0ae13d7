"""Numbers that judge a segmentation: pooled Dice for validation, surface Dice, and detection of single lesions.

All functions count inside the voxels that the case's data set annotated; none needs a one-hot volume of all targets.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import cc3d
import numpy as np
import torch
from ignite.engine import Engine
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced, sync_all_reduce
from monai.metrics.utils import create_table_neighbour_code_to_surface_area
from scipy.spatial import cKDTree

from .labels import LabelTable

logger = logging.getLogger(__name__)


class PooledDice(Metric):
    """Dice of all validation patches taken together (nnU-Net's pseudo-Dice), over annotated voxels only.

    tp, fp and fn of each target are summed over all patches and processes before the ratio. A voxel counts for the
    targets that its data set annotates. `compute` returns the mean over the targets that are present in the truth, and
    leaves the parts as attributes:

    - ``per_target``: target -> Dice, present targets only;
    - ``per_dataset``: data set -> target -> Dice, the same from that data set's voxels alone;
    - ``absent``: targets that were annotated but never present; they are in no mean.

    Args:
        table: the label table; channel ``i`` of the logits is ``table.names[i]``.
        threshold: sigmoid probability above which a voxel is positive.
        output_transform: turns the engine's output into ``(logits, codes)``, as for any ignite metric; logits
            (B, T, S, P, L) and codes (B, 1, S, P, L), or lists of such without the batch axis.
    """

    def __init__(self, table: LabelTable, threshold: float = 0.5, output_transform: Any = lambda x: x) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"threshold is {threshold}, expected a probability between 0 and 1")
        self.table = table
        self._cut = float(np.log(threshold / (1 - threshold)))
        self._rows = torch.from_numpy(table.targets)
        super().__init__(output_transform, device="cpu")

    @reinit__is_reduced
    def reset(self) -> None:
        """Forget all patches."""
        targets, codes = len(self.table.names), self.table.num_codes
        # Voxels per code, and how many of them each target's output claims: tp, fp and fn follow from these two.
        self._voxels = torch.zeros(codes, dtype=torch.int64)
        self._claimed = torch.zeros(targets, codes, dtype=torch.int64)
        self.per_target: dict[str, float] = {}
        self.per_dataset: dict[str, dict[str, float]] = {}
        self.absent: tuple[str, ...] = ()

    @reinit__is_reduced
    def update(self, output: Sequence[Any]) -> None:
        """Add one batch.

        Raises:
            ValueError: logits whose channels are not the table's targets, or whose grid is not the codes' grid.
        """
        logits, codes = output
        if isinstance(logits, torch.Tensor):
            self._add(logits, codes)
            return
        for one, its_codes in zip(logits, codes, strict=True):
            self._add(one[None], its_codes[None])

    def _add(self, logits: torch.Tensor, codes: torch.Tensor) -> None:
        expected = (codes.shape[0], len(self.table.names), *codes.shape[2:])
        if tuple(logits.shape) != expected or codes.shape[1] != 1:
            raise ValueError(
                f"logits {tuple(logits.shape)} and codes {tuple(codes.shape)} do not fit: expected logits {expected} "
                "(one channel per target of the label table) and codes with one channel"
            )
        logits, number = torch.as_tensor(logits.detach()).as_subclass(torch.Tensor), self.table.num_codes
        codes = codes.as_subclass(torch.Tensor)[:, 0].long()
        voxels = torch.bincount(codes.flatten(), minlength=number).cpu()
        if len(voxels) > number:
            raise ValueError(f"codes go up to {len(voxels) - 1}, the label table has {number} (0 to {number - 1})")
        self._voxels += voxels
        annotated = (self._rows[voxels > 0] >= 0).any(0)
        for target in annotated.nonzero().flatten().tolist():
            claimed = codes[logits[:, target] > self._cut]
            self._claimed[target] += torch.bincount(claimed, minlength=number).cpu()

    @sync_all_reduce("_voxels", "_claimed")
    def compute(self) -> float:
        """Mean Dice over the targets present; 0.0, with a warning, when there is none."""
        everything = np.arange(self.table.num_codes)
        self.per_target, self.absent = self._dice(everything)
        owner = np.array([dataset for dataset, _ in self.table.codes])
        parts = {name: self._dice(everything[owner == name])[0] for name in self.table.datasets}
        self.per_dataset = {name: part for name, part in parts.items() if part}
        if not self.per_target:
            logger.warning("Validation patches hold no annotated target at all: the mean Dice is given as 0.")
            return 0.0
        return float(np.mean(list(self.per_target.values())))

    def _dice(self, codes: np.ndarray) -> tuple[dict[str, float], tuple[str, ...]]:
        """Dice of every target that is present in the voxels with these codes, and the annotated ones that are not."""
        rows, voxels = self.table.targets[codes], self._voxels.numpy()[codes]
        claimed = self._claimed.numpy()[:, codes]
        found, absent = {}, []
        for target, name in enumerate(self.table.names):
            positive, negative = rows[:, target] == 1, rows[:, target] == 0
            size = int(voxels[positive].sum())
            tp, fp = int(claimed[target, positive].sum()), int(claimed[target, negative].sum())
            if size:
                found[name] = 2 * tp / (tp + fp + size)
            elif voxels[negative].any():
                absent.append(name)
        return found, tuple(absent)

    def completed(self, engine: Engine, name: str) -> None:
        """Besides the mean, put the mean of each data set into the engine's metrics, for whoever logs them."""
        super().completed(engine, name)
        for dataset in self.table.datasets:
            key = f"{name}_{dataset}"
            engine.state.metrics.pop(key, None)
            if dataset in self.per_dataset:
                engine.state.metrics[key] = float(np.mean(list(self.per_dataset[dataset].values())))


def surface_dice(
    prediction: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float
) -> float | None:
    """Normalized surface Dice: the share of both surfaces' area that lies within `tolerance_mm` of the other surface.

    Surfaces run between voxels and are weighted by area (surface-distance's surface elements, as MONAI's SurfaceDice
    with ``use_subvoxels``), so thick slices do not distort the share. Memory grows with the surface, not the volume.

    Args:
        prediction, truth: bool, three axes; what lies beyond the array's edge counts as outside.
        spacing_mm: voxel size along the three axes.

    Returns:
        A number from 0 to 1, or None where both masks are empty.
    """
    points_a, area_a = _surface(prediction, spacing_mm)
    points_b, area_b = _surface(truth, spacing_mm)
    if not len(points_a) and not len(points_b):
        return None
    if not len(points_a) or not len(points_b):
        return 0.0
    near_a = area_a[_within(points_a, points_b, tolerance_mm)].sum()
    near_b = area_b[_within(points_b, points_a, tolerance_mm)].sum()
    return float((near_a + near_b) / (area_a.sum() + area_b.sum()))


def _surface(mask: np.ndarray, spacing_mm: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Positions (n, 3) in mm of the surface elements between voxels, and their areas (n,) in mm^2."""
    areas, kernel = _surface_areas(tuple(float(step) for step in spacing_mm))
    padded = np.pad(np.ascontiguousarray(mask, dtype=np.uint8), 1)
    code = np.zeros([side - 1 for side in padded.shape], np.uint8)
    for corner in np.ndindex(2, 2, 2):
        shifted = tuple(slice(at, at + side) for at, side in zip(corner, code.shape, strict=True))
        code += kernel[corner] * padded[shifted]
    where = np.nonzero((code != 0) & (code != 255))
    return np.stack(where, 1) * np.asarray(spacing_mm, float), areas[code[where]]


@lru_cache(maxsize=32)
def _surface_areas(spacing_mm: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Area of the surface through a 2x2x2 neighborhood by its code (256,), and the code's bits per corner."""
    areas, kernel = create_table_neighbour_code_to_surface_area(spacing_mm)
    return areas.double().numpy(), kernel.numpy().reshape(2, 2, 2).astype(np.uint8)


def _within(points: np.ndarray, others: np.ndarray, distance_mm: float) -> np.ndarray:
    """Which `points` have one of `others` within `distance_mm`; a distance equal to it counts, rounding aside."""
    limit = distance_mm * (1 + 1e-6) + 1e-6
    distance, _ = cKDTree(others, balanced_tree=False, compact_nodes=False).query(points, distance_upper_bound=limit)
    return np.isfinite(distance)


def lesions(
    prediction: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float], overlap: float = 0.0
) -> list[dict[str, Any]]:
    """Detection lesion by lesion; a lesion is a component under 26-connectivity.

    A true lesion is *found* where predicted voxels cover more than `overlap` of it, else *missed*; a predicted
    component is *false* where true voxels cover no more than `overlap` of it. At the default of 0 one shared voxel is
    enough (the rule of autoPET's false positive and false negative volumes).

    Returns:
        One ``{"kind": "found" | "missed" | "false", "volume_ml", "covered"}`` per lesion; ``covered`` is the share of
        it that the other side covers. Largest first.
    """
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    rows = []
    for mask, other, is_truth in ((truth, prediction, True), (prediction, truth, False)):
        components = cc3d.connected_components(mask, connectivity=26)
        sizes = np.bincount(components.ravel())[1:]
        shared = np.bincount(components[other], minlength=len(sizes) + 1)[1:]
        for size, covered in zip(sizes.tolist(), shared.tolist(), strict=True):
            hit = covered > overlap * size
            if is_truth or not hit:
                kind = ("found" if hit else "missed") if is_truth else "false"
                rows.append({"kind": kind, "volume_ml": size * voxel_ml, "covered": covered / size})
    return sorted(rows, key=lambda row: -row["volume_ml"])
