"""Numbers that judge a segmentation: pooled Dice for validation, surface Dice, and detection of single lesions.

All functions count inside the voxels that the case's data set annotated; none needs a one-hot volume of all targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import cc3d
import numpy as np
from monai.metrics.utils import create_table_neighbour_code_to_surface_area
from scipy.spatial import cKDTree


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
    prediction: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float], upright: float = 1.0
) -> list[dict[str, Any]]:
    """Detection lesion by lesion; a lesion is a component under 26-connectivity.

    A true lesion is *found* where it shares a voxel with the prediction, else *missed*; a predicted component that
    shares none with the truth is *false* (the rule of autoPET's false positive and false negative volumes).

    Args:
        upright: a voxel's volume over the product of its sides; less than 1 for a tilted gantry.

    Returns:
        One ``{"kind": "found" | "missed" | "false", "volume_ml", "covered"}`` per lesion; ``covered`` is the share of
        it that the other side covers. Largest first.
    """
    voxel_ml = float(np.prod(spacing_mm)) * upright / 1000
    rows = []
    for mask, other, is_truth in ((truth, prediction, True), (prediction, truth, False)):
        # bytes: of bools cc3d 4.1.1 refuses thin boxes in which every second voxel is set ("maximum length exception")
        components = cc3d.connected_components(mask.view(np.uint8), connectivity=26)
        sizes = np.bincount(components.ravel())[1:]
        shared = np.bincount(components[other], minlength=len(sizes) + 1)[1:]
        for size, covered in zip(sizes.tolist(), shared.tolist(), strict=True):
            hit = covered > 0
            if is_truth or not hit:
                kind = ("found" if hit else "missed") if is_truth else "false"
                rows.append({"kind": kind, "volume_ml": size * voxel_ml, "covered": covered / size})
    return sorted(rows, key=lambda row: -row["volume_ml"])
