"""Draws two breasts in DCE-MRI with a tumor that takes up contrast."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .canvas import EVERYWHERE, Canvas


def draw_breasts(
    shape: Sequence[int], spacing_mm: Sequence[float], rng: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray]:
    """Two breasts before and twice after contrast: three MR images (S, P, L) and the tumor's mask."""
    low = [-n * d / 2 for n, d in zip(shape, spacing_mm, strict=True)]
    c = Canvas(tuple(shape), tuple(spacing_mm), tuple(low), rng, scale=float(rng.uniform(0.95, 1.1)), modality="MR")
    _, p, lat = c.grid
    chest = p - 32 - (lat / 95) ** 2 * 14
    tissue, texture = np.full(c.shape, -1e3, np.float32), c.noise(16)
    c.paint(EVERYWHERE, chest, 420.0)
    c.paint(EVERYWHERE, chest - 26, 120.0)
    for sign in (-1, 1):
        where, depth = c.ellipsoid((c.rng.uniform(-5, 5), 34, sign * 78), (68, 92, 62))
        depth = np.minimum(depth, -chest[where] + 3)
        c.paint(where, depth, 260.0)
        tissue[where] = np.maximum(tissue[where], depth - 14)
    gland = np.minimum(tissue, 9 * texture + 3)
    c.paint(EVERYWHERE, gland, 480.0)
    voxels = np.argwhere(tissue > 3)
    center = np.array([g[tuple(voxels[c.rng.integers(len(voxels))])] for g in c.grid])
    where, depth = c.ellipsoid(center, c.rng.uniform(9, 19) * c.rng.uniform(0.8, 1.2, 3))
    lesion = np.full(c.shape, -1e3, np.float32)
    lesion[where] = depth + 2.2 * (c.noise(14) + 0.6 * c.noise(7))[where]
    lesion = np.minimum(lesion, tissue + 12)
    if lesion.max() <= 0:
        lesion[lesion == lesion.max()] = 0.1
    uptake = np.clip(lesion / c.blend_mm + 0.5, 0, 1)
    background = np.clip(gland / 8, 0, 1) * 70 + np.clip((chest - 30) / 6, 0, 1) * (texture > 0.3) * 300
    phases, plain = [], c.value.copy()
    for tumor, other in ((60.0, 0.0), (620.0, 0.7), (500.0, 1.0)):
        c.value = plain + uptake * tumor + background * other
        phases.append(c.finish(noise=18.0).image)
    return phases, lesion > 0
