"""Where voxels lie: affines, voxel sides, and whether two arrays lie on one grid or on the same one turned.

Affines map voxel indices to RAS millimetres. Nothing here touches a file or a voxel's value.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from nibabel.orientations import aff2axcodes, inv_ornt_aff, io_orientation

from ..errors import CaseError, CaseWarning

SAME_GRID = 0.1
"""Two grids count as the same while no corner is further apart than this fraction of the smallest voxel side."""

VOXEL_MM = (0.01, 100.0)
"""Voxel sides that a scan of a body can have: micro-CT of a specimen to the slices of a localizer."""

EXTENT_MM = (2.0, 4000.0)
"""What the longest side of a scan of a body can measure."""

SHEAR = (0.5, 0.9998)
"""Volume of a voxel over the product of its sides: below the first (30 degrees between two axes) no scanner tilts,
from the second (1 degree off) on axes count as upright."""

SPL = np.array([[0.0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
"""Affine whose axes go to superior, posterior, left, as in all arrays that are worked on."""


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """Voxel sides in mm along the array's axes."""
    return tuple(float(side) for side in np.linalg.norm(np.asarray(affine, float)[:3, :3], axis=0))


def grid_distance_mm(affine: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
    """Largest distance between the corners of two grids of this shape, in mm."""
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape[:3]) - 1)
    difference = np.asarray(affine, float) - np.asarray(other, float)
    return float(np.linalg.norm(corners @ difference[:3, :3].T + difference[:3, 3], axis=1).max())


def grid_difference(shape: Sequence[int], affine, other_shape: Sequence[int], other_affine) -> str:
    """What differs between two grids, in words; empty when they are the same by the rule of `SAME_GRID`."""
    if tuple(shape) != tuple(other_shape):
        return f"shape {_shown(shape, affine)} against {_shown(other_shape, other_affine)}"
    apart, allowed = grid_distance_mm(affine, other_affine, shape), SAME_GRID * min(spacing_of(affine))
    return f"affines put a corner {apart:.3g} mm apart (allowed: {allowed:.3g} mm)" if apart > allowed else ""


def _shown(shape: Sequence[int], affine: np.ndarray) -> str:
    """A shape with the directions of its axes: ``(40, 64, 64) along (S, P, L)``."""
    return f"{tuple(map(int, shape))} along ({', '.join(map(str, aff2axcodes(affine)))})"


def turn_to(affine: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """nibabel's orientation transform that gives an array with `affine` the axes of one with the affine `wanted`.

    One axis is matched with another, not each named on its own: at 45 degrees rounding would decide the names.
    """
    return io_orientation(np.linalg.inv(wanted) @ affine)


def turn_array(array: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """A view of (..., I, J, K) with its last three axes flipped and permuted."""
    flips = (slice(None, None, int(flip)) for flip in turn[:, 1])
    lead = array.ndim - 3
    return array[(..., *flips)].transpose([*range(lead), *(lead + np.argsort(turn[:, 0]).astype(int))])


def turn_grid(shape: Sequence[int], affine: np.ndarray, turn: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and affine of such a view."""
    turned = tuple(int(shape[axis]) for axis in np.argsort(turn[:, 0]))
    return turned, np.asarray(affine, float) @ inv_ornt_aff(turn, shape)


def upright_share(affine: np.ndarray) -> float:
    """Volume of a voxel over the product of its sides: 1 where the axes are at right angles."""
    return float(abs(np.linalg.det(affine[:3, :3])) / np.prod(spacing_of(affine)))


def is_upright(affine: np.ndarray) -> bool:
    """Whether the axes are at right angles, to a degree."""
    return upright_share(affine) >= SHEAR[1]


def check_body(shape: Sequence[int], affine: np.ndarray, source: str, unit: str = "") -> None:
    """Raise CaseError for voxel sizes and extents that no scan of a body has; warn of axes that are not upright.

    `unit`: what the header says of its unit, for the message.
    """
    sides = np.array(spacing_of(affine))
    if not np.isfinite(affine).all() or not sides.all() or (share := upright_share(affine)) < 1e-6:
        raise CaseError(f"{source}: its affine is singular or not finite, so voxels have no size; correct the header")
    longest = float((sides * shape).max())
    advice = f"; correct the voxel sizes of the header{f' ({unit})' if unit else ''}, or convert the image again"
    if sides.min() < VOXEL_MM[0] or sides.max() > VOXEL_MM[1]:
        found = " x ".join(f"{side:.4g}" for side in sides)
        raise CaseError(f"{source}: voxels of {found} mm; expected {VOXEL_MM[0]:g} to {VOXEL_MM[1]:g} mm{advice}")
    if not EXTENT_MM[0] <= longest <= EXTENT_MM[1]:
        raise CaseError(
            f"{source}: {'x'.join(map(str, shape))} voxels measure {longest:.4g} mm along the longest side; expected "
            f"{EXTENT_MM[0]:g} to {EXTENT_MM[1]:g} mm{advice}"
        )
    if share < SHEAR[0]:
        raise CaseError(
            f"{source}: its axes are sheared until a voxel has {share:.0%} of its upright volume, which no scanner does; "
            "correct the header's affine"
        )
    if share < SHEAR[1]:
        warn(f"{source}: its axes are not at right angles; it is used as it lies, and results lie on the same grid")


def warn(message: str) -> None:
    """A CaseWarning that points at the caller."""
    warnings.warn(message, CaseWarning, stacklevel=3)
