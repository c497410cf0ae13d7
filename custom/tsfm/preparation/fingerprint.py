"""The fingerprint of a data set: what nnU-Net's planning needs to know of its cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from ..cases.cases import Preparation, load_case
from ..errors import CaseError
from ..labels import LabelTable
from .parallel import WorkerDied, run_all
from .preprocessing import MASKED_BELOW, _extents_mm, crop_box
from .resampling import (
    ANISOTROPY,
    new_shape,
)

FINGERPRINT_VOXELS = 10**7
"""Foreground voxels that a fingerprint draws over all cases (nnU-Net draws 1e8; the percentiles agree to 1e-3)."""


@dataclass
class Fingerprint:
    """What nnU-Net's planning needs to know of some cases.

    intensity: modality -> mean, median, sd, min, max, lower (0.5 percentile), upper (99.5 percentile) over foreground
    voxels, an equal number per case. shapes and spacings_mm: per case after cropping, (S, P, L). masked: modality ->
    whether its median crop kept less than three quarters. failed: (item, message) of cases that could not be read.
    extents_mm: data set -> raw id -> how large its structure is, (S, P, L): per axis the smallest over the cases of the
    largest connected piece; an id that is in no case is absent.
    """

    intensity: dict[str, dict[str, float]]
    shapes: list[tuple[int, int, int]]
    spacings_mm: list[tuple[float, float, float]]
    masked: dict[str, bool]
    failed: list[tuple[Mapping[str, Any], str]]
    extents_mm: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    @property
    def median_spacing_mm(self) -> tuple[float, ...]:
        return tuple(np.median(self.spacings_mm, axis=0).tolist())

    def median_prepared_shape(self, spacing_mm: Sequence[float]) -> tuple[float, ...]:
        """Median shape of the cases once they are resampled to this spacing."""
        shapes = [new_shape(n, s, spacing_mm) for n, s in zip(self.shapes, self.spacings_mm, strict=True)]
        return tuple(np.median(shapes, axis=0).tolist())


def fingerprint(
    items: Sequence[Mapping[str, Any]],
    table: LabelTable,
    preparation: Preparation | None = None,
    num_workers: int = 0,
    progress: bool = True,
) -> Fingerprint:
    """Read all items once and gather nnU-Net 2's fingerprint. `preparation` gives in_channels and default modality.

    Raises:
        CaseError: no item could be read (all messages are listed).
    """
    preparation = preparation or Preparation((1.0, 1.0, 1.0))
    voxels = max(1, FINGERPRINT_VOXELS // max(1, len(items)))
    found, failed = [], []
    jobs = [(item, table, preparation, voxels) for item in items]
    with tqdm(total=len(jobs), desc="fingerprint", disable=not progress) as bar:
        for index, outcome in run_all(_look_at_case, jobs, num_workers):
            bar.update()
            if isinstance(outcome, (CaseError, WorkerDied)):
                failed.append((items[index], str(outcome)))
            else:
                found.append((index, *outcome))
    if not found:
        listed = "\n".join(message for _, message in failed)
        raise CaseError(f"no case could be read for the fingerprint; found {len(items)} items:\n{listed}")
    found.sort(key=lambda row: row[0])
    _, modality, values, shapes, spacings, kept, extents = zip(*found, strict=True)
    intensity, masked = {}, {}
    for name in dict.fromkeys(modality):
        of_modality = [i for i, m in enumerate(modality) if m == name]
        masked[name] = bool(np.median([kept[i] for i in of_modality]) < MASKED_BELOW)
        pooled = np.concatenate([values[i] for i in of_modality])
        if pooled.size:
            intensity[name] = _statistics(pooled)
    smallest: dict[str, dict[str, list[float]]] = {}
    for (index, *_), of_case in zip(found, extents, strict=True):
        known = smallest.setdefault(items[index].get("dataset", ""), {})
        for raw, extent in of_case.items():
            known[raw] = [min(pair) for pair in zip(known.get(raw, extent), extent, strict=True)]
    return Fingerprint(intensity, list(shapes), list(spacings), masked, failed, smallest)


def _look_at_case(item, table: LabelTable, preparation: Preparation, voxels: int):
    """(modality, foreground intensities, cropped shape, spacing, share kept by the crop, extents in mm) of one item."""
    case = load_case(item, table, preparation)
    crop = tuple(slice(*span) for span in crop_box(case.image))
    image, codes = case.image[(slice(None), *crop)], case.codes
    values, extents = np.empty(0, np.float32), {}
    if codes is not None:
        extents = _extents_mm(codes, table.local_ids(case.dataset), case.spacing_mm)
        foreground = (codes[crop] != 0) & ~np.isin(codes[crop], table.ignored(case.dataset))
        values = image[:, foreground].ravel()
    if values.size:
        values = np.random.RandomState(1234).choice(values, voxels, replace=True)
    return case.modality, values, image.shape[1:], case.spacing_mm, image[0].size / case.image[0].size, extents


def _statistics(values: np.ndarray) -> dict[str, float]:
    lower, median, upper = np.percentile(values, (0.5, 50.0, 99.5))
    numbers = {"lower": lower, "upper": upper, "mean": values.mean(dtype=float), "sd": values.std(dtype=float)}
    numbers |= {"median": median, "min": values.min(), "max": values.max()}
    return {name: float(value) for name, value in numbers.items()}


def plan_spacing(spacings_mm: Sequence[Sequence[float]], shapes: Sequence[Sequence[int]]) -> tuple[float, float, float]:
    """nnU-Net's target spacing: the median per axis, finer along one axis that is far thicker than the others.

    Where the worst axis' median spacing is more than 3 times the others' and its median size less than a third of
    theirs, that axis takes its 10th percentile, but stays coarser than the others.
    """
    spacings_mm = np.asarray(spacings_mm, float)
    target, size = np.median(spacings_mm, axis=0), np.median(np.asarray(shapes, float), axis=0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    coarsest = max(target[others])
    if target[worst] > ANISOTROPY * coarsest and size[worst] * ANISOTROPY < min(size[others]):
        finer = np.percentile(spacings_mm[:, worst], 10)
        target[worst] = finer if finer >= coarsest else coarsest + 1e-5
    return tuple(target.tolist())


def fit_patch(
    shape: Sequence[float], strides: Sequence[Sequence[int]], patch_size: Sequence[int] = (112, 160, 192)
) -> tuple[int, int, int]:
    """Patch that fits the network: per axis `patch_size`, but no larger than the (median) image shape needs.

    Every side is a multiple of the product of the axis' strides, rounded up; and the lowest level keeps more than one
    voxel, which instance normalisation cannot do without.
    """
    divisors = [int(np.prod([stride[axis] for stride in strides])) if len(strides) else 1 for axis in range(3)]
    patch = [
        -(-max(1, min(int(np.ceil(size)), int(limit))) // divisor) * divisor
        for size, limit, divisor in zip(shape, patch_size, divisors, strict=True)
    ]
    if patch == divisors:
        patch[int(np.argmax(shape))] *= 2
    return tuple(patch)
