"""Draws a skull-stripped head with a glioma as BraTS' four MR sequences see it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .canvas import EVERYWHERE, Canvas


def draw_head(
    shape: Sequence[int], spacing_mm: Sequence[float], rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A skull-stripped head with a glioma: {flair, t1, t1ce, t2}, and BraTS' map (1 necrosis, 2 edema, 4 enhancing).

    Images and map are (S, P, L); outside of the brain the images are exactly 0.
    """
    low = [-n * d / 2 for n, d in zip(shape, spacing_mm, strict=True)]
    scale = float(rng.uniform(0.95, 1.05))
    c = Canvas(tuple(shape), tuple(spacing_mm), tuple(low), rng, scale=scale, deform_mm=5, modality="MR")
    s, p, lat = c.grid
    brain = (1 - np.sqrt((s / 66) ** 2 + (p / 84) ** 2 + (lat / 66) ** 2)) * 66
    folds = c.noise(15)
    sulci = np.minimum(np.abs(folds) * 9 - 2.0, 9 - brain + 4)
    white = brain - 10 + 4 * folds
    fissure = 2.5 - np.abs(lat) + (s < 5) * -9
    ventricles = np.maximum(c.ellipsoid_depth((8, -4, -13), (13, 30, 6)), c.ellipsoid_depth((8, -4, 13), (13, 30, 6)))
    side = float(rng.choice((-1, 1)))
    center = (rng.uniform(-15, 32), rng.uniform(-38, 38), side * rng.uniform(22, 38))
    radius = rng.uniform(13, 19)
    bumps = c.noise(18) + 0.5 * c.noise(9)
    tumor = np.minimum(c.ellipsoid_depth(center, radius * rng.uniform(0.85, 1.2, 3)) + 2 * bumps, brain - 3)
    edema = np.minimum(np.maximum(tumor + rng.uniform(8, 13) + 3 * c.noise(22), tumor), brain - 2)
    necrosis = tumor - rng.uniform(4, 7) + 1.5 * bumps
    label = np.zeros(c.shape, np.uint8)
    for depth, value in ((edema, 2), (tumor, 4), (necrosis, 1)):
        label[(depth > 0) | (depth == depth.max()) & ~np.any(depth > 0)] = value
    signal = {  # gray, white, liquor, edema, enhancing, necrosis
        "flair": (620, 480, 120, 980, 760, 420), "t1": (520, 700, 180, 450, 480, 330),
        "t1ce": (540, 720, 190, 470, 1150, 320), "t2": (620, 470, 1100, 950, 760, 1020),
    }  # fmt: skip
    images = {}
    for name, (gray, pale, liquor, wet, bright, dead) in signal.items():
        c.value = np.zeros(c.shape, np.float32)
        layers = ((brain, liquor), (np.minimum(brain - 1.5, sulci), gray), (np.minimum(white, brain - 9), pale))
        for depth, value in (*layers, (np.minimum(fissure, brain), liquor), (ventricles, liquor)):
            c.paint(EVERYWHERE, depth, float(value))
        for depth, value in ((edema, wet), (tumor, bright), (necrosis, dead)):
            c.paint(EVERYWHERE, depth, float(value))
        image = c.finish(noise=18.0).image
        image[brain < -1] = 0  # skull-stripped: outside there is nothing at all
        images[name] = image
    return images, label
