"""Clicks: how a network is shown them, and where a simulated user makes them.

A promptable network has two more input channels than its images, the last ones: small Gaussians at the clicks inside and
outside of *one* target. Its output for a target says where that target is *if the clicks are about it*; of a pass with
clicks only that output is looked at. So two channels serve any number of targets, and no clicks mean the automatic network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import cc3d
import numpy as np
import torch
from scipy.ndimage import distance_transform_edt

CLICK_CHANNELS = 2

REACH = 3.0
"""Standard deviations after which a click's Gaussian ends (at 1 % of its height)."""


class ClickError(ValueError):
    """Clicks that cannot be meant: outside of the volume, for no target, for weights that know none."""


class Click(NamedTuple):
    """A voxel (S, P, L), perhaps outside of the grid it is given on, and whether it shows the target or what is not it."""

    voxel: tuple[int, int, int]
    inside: bool


def click_channels(clicks: Sequence[Click], size: Sequence[int], sigma: float) -> torch.Tensor:
    """Float32 (2, S, P, L): inside, outside; the highest of Gaussians of height 1 and `sigma` voxels at the clicks."""
    channels = torch.zeros(CLICK_CHANNELS, *size)
    for click in clicks:
        if not reaches(click, size, sigma):
            continue
        where, curves = [], []
        for center, side in zip(click.voxel, size, strict=True):
            low, high = max(center - _radius(sigma), 0), min(center + _radius(sigma) + 1, side)
            where.append(slice(low, high))
            curves.append(torch.exp(-0.5 * ((torch.arange(low, high) - center) / sigma) ** 2))
        view = channels[(0 if click.inside else 1, *where)]
        torch.maximum(view, torch.einsum("s,p,l->spl", *curves), out=view)
    return channels


def reaches(click: Click, size: Sequence[int], sigma: float) -> bool:
    """Whether any voxel of a window (S, P, L) sees the click."""
    radius = _radius(sigma)
    return all(-radius <= center < side + radius for center, side in zip(click.voxel, size, strict=True))


def _radius(sigma: float) -> int:
    return math.ceil(REACH * sigma)


def simulated_click(
    truth: np.ndarray,
    found: np.ndarray,
    annotated: np.ndarray | None = None,
    rng: np.random.Generator | None = None,
) -> Click | None:
    """The click by which a user would correct `found`: deep in a connected piece of what is wrong; None if nothing is.

    Args:
        truth, found: bool (S, P, L).
        annotated: bool; elsewhere nothing counts as wrong.
        rng: draws the piece by its size and a voxel of its deeper half (training); without it the largest piece and its
            deepest voxel are taken (evaluation).
    """
    wrong = np.where(truth != found, np.where(truth, 1, 2), 0).astype(np.uint8)  # missed, too much
    if annotated is not None:
        wrong[~annotated] = 0
    if not wrong.any():
        return None
    pieces = cc3d.connected_components(wrong)
    statistics = cc3d.statistics(pieces)
    voxels = statistics["voxel_counts"].astype(float)
    voxels[0] = 0
    piece = int(voxels.argmax()) if rng is None else int(rng.choice(len(voxels), p=voxels / voxels.sum()))
    box = statistics["bounding_boxes"][piece]
    inside = pieces[box] == piece
    start = np.array([side.start for side in box])
    voxel = tuple(int(n) for n in start + deep_voxel(inside, rng, 0.5))
    return Click(voxel, bool(truth[voxel]))


def deep_voxel(region: np.ndarray, rng: np.random.Generator | None = None, share: float = 0.0) -> np.ndarray:
    """A voxel (3,) of a bool (S, P, L): drawn among those at least `share` as deep as the deepest, or the deepest one."""
    if rng is not None and share == 0:
        voxels = np.argwhere(region)
        return voxels[rng.integers(len(voxels))]
    depth = distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1, 1:-1]
    if rng is None:
        return np.array(np.unravel_index(depth.argmax(), depth.shape))
    voxels = np.argwhere(depth >= max(share * depth.max(), 1))
    return voxels[rng.integers(len(voxels))]
