"""A content hash of an image that survives resampling, cropping, turned or flipped axes and linear intensity changes.

Landmarks are extrema of a difference of Gaussians on a grid of fixed millimetres, each described by the 5 x 5 x 5 samples
around it (mean 0, norm 1), flipped and permuted until their first moments are positive and descending: so a volume
stored with wrong axes has the same descriptors. `duplicates` compares them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch.nn.functional import avg_pool3d

GRIDS_MM = (4.0, 1.5)
"""Sides of the grids on which landmarks are sought: the first where an image has `LEAST` voxels of it along every axis,
the second for images shorter than `SMALL_MM` along some axis (a region around one structure)."""

LEAST = 12

SMALL_MM = 120.0

LANDMARKS = 128
"""Kept per grid, the strongest."""

CT_RANGE_HU = (-200.0, 300.0)

STEP = 2  # grid voxels between two samples of a descriptor

SIDE = 5  # samples along each axis of a descriptor

REACH = STEP * (SIDE // 2)

OFFSETS = np.stack(np.meshgrid(*[np.arange(-REACH, REACH + 1, STEP)] * 3, indexing="ij"), -1)


def describe_image(image: np.ndarray, spacing_mm: Sequence[float], modality: str) -> dict[str, np.ndarray]:
    """Landmarks of one channel (S, P, L).

    Returns:
        places_mm (n, 3) from the center of the first voxel; descriptors (n, 125) int8, a thousandth of the norm each;
        turns (n, 6): the permutation and the signs that made each canonical; grids (n,): index into `GRIDS_MM`.
    """
    extent = np.array(image.shape) * spacing_mm
    image = _clipped(image, modality)
    chosen = [0] * bool((extent >= LEAST * GRIDS_MM[0]).all()) + [1] * bool(
        extent.min() < SMALL_MM and max(spacing_mm) <= 3 * GRIDS_MM[1]
    )
    found = [(index, *_landmarks(on_grid(image, spacing_mm, GRIDS_MM[index]), GRIDS_MM[index])) for index in chosen]
    places = np.concatenate([np.zeros((0, 3)), *(one[1] for one in found)]).astype(np.float32)
    samples = np.concatenate([np.zeros((0, SIDE, SIDE, SIDE)), *(one[2] for one in found)])
    turned = [canonical(one) for one in samples]
    return {
        "places_mm": places,
        "descriptors": np.array([np.round(one.ravel() * 127) for one, _ in turned], np.int8).reshape(-1, SIDE**3),
        "turns": np.array([turn for _, turn in turned], np.int8).reshape(-1, 6),
        "grids": np.concatenate([np.full(len(one[1]), one[0]) for one in found] or [[]]).astype(np.int8),
    }


def _clipped(image: np.ndarray, modality: str) -> np.ndarray:
    if modality == "CT":
        low, high = CT_RANGE_HU
        if image.max() <= low or image.min() >= high:  # no HU
            low, high = float(image.min()), float(image.max())
    else:
        low, high = np.percentile(image[tuple(slice(None, None, max(1, n // 64)) for n in image.shape)], (0.5, 99.5))
    return np.clip(image, low, max(high, low + 1e-6)).astype(np.float32, copy=False)


def on_grid(image: np.ndarray, spacing_mm: Sequence[float], grid_mm: float) -> np.ndarray:
    """The image on a cubic grid whose first voxel lies where the image's does: means of whole blocks, then linear."""
    blocks = [min(n, max(1, int(grid_mm / side))) for n, side in zip(image.shape, spacing_mm, strict=True)]
    means = avg_pool3d(torch.from_numpy(image)[None], blocks)[0].numpy()
    spacing = np.multiply(spacing_mm, blocks)
    first = np.subtract(blocks, 1) / 2 * spacing_mm  # a block's center, from that of the image's first voxel
    size = np.maximum(1, np.floor((np.array(means.shape) - 1) * spacing / grid_mm + 1e-6).astype(int) + 1)
    return ndimage.affine_transform(means, grid_mm / spacing, -first / spacing, tuple(size), order=1, mode="nearest")


def _landmarks(grid: np.ndarray, grid_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """(places in mm, samples around them (n, 5, 5, 5)) of the strongest extrema, refined to a fraction of a voxel."""
    fine, coarse = ndimage.gaussian_filter(grid, 1.2), ndimage.gaussian_filter(grid, 2.0)
    contrast = fine - coarse
    peak = np.abs(contrast)
    is_peak = peak == ndimage.maximum_filter(peak, 3)
    inner = np.zeros(grid.shape, bool)
    inner[(slice(REACH, -REACH),) * 3] = True
    at = np.argwhere(is_peak & inner & (peak > 1e-3 * (float(np.ptp(grid)) or 1.0)))
    order = np.argsort(-peak[tuple(at.T)], kind="stable")[:LANDMARKS]
    at = at[order]
    exact = at + _refinement(contrast, at)
    positions = exact[:, None, None, None, :] + OFFSETS
    samples = ndimage.map_coordinates(fine, np.moveaxis(positions, -1, 0), order=1, mode="nearest")
    samples = samples - samples.mean((1, 2, 3), keepdims=True)
    norm = np.sqrt((samples**2).sum((1, 2, 3), keepdims=True))
    return exact * grid_mm, samples / np.maximum(norm, 1e-9)


def _refinement(contrast: np.ndarray, at: np.ndarray) -> np.ndarray:
    """How far the extremum of a parabola through each landmark and its neighbors lies from it, per axis, in voxels."""
    result = np.zeros(at.shape)
    middle = contrast[tuple(at.T)]
    for axis in range(3):
        step = np.eye(3, dtype=int)[axis]
        before, after = contrast[tuple((at - step).T)], contrast[tuple((at + step).T)]
        curvature = before - 2 * middle + after
        result[:, axis] = np.clip((before - after) / 2 / np.where(curvature == 0, 1, curvature), -0.5, 0.5)
    return result


def canonical(samples: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """Samples turned until the first moments are positive and descending, and the turn: axes in order, then their signs.

    Output axis i runs along input axis ``turn[i]``, with the sign ``turn[3 + i]``.
    """
    moments = np.array([(samples * OFFSETS[..., axis]).sum() for axis in range(3)])
    axes = np.argsort(-np.abs(moments), kind="stable")
    signs = np.where(moments[axes] < 0, -1, 1)
    turned = samples.transpose(axes)[tuple(slice(None, None, int(sign)) for sign in signs)]
    return turned, (*axes.tolist(), *signs.tolist())
