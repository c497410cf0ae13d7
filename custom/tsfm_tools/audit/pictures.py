"""The pictures of the page: slices of suspicious cases with their labels, drawn once and kept."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tsfm.cases.grids import spacing_of
from tsfm.cases.volumes import RawVolume
from tsfm.evaluation.overlays import CT_WINDOW_HU, colors_of, truth_map
from tsfm.files import atomic_write
from tsfm.labels import LabelTable

from .measures import read_case

INCHES, DOTS = 2.6, 72


def picture(
    cases: Sequence[tuple[Mapping[str, Any], LabelTable, str]], place: Sequence[int] | None, cache_dir: str
) -> bytes:
    """PNG of up to two cases side by side: an axial and a coronal slice of one, an axial slice of each of two.

    Args:
        cases: (datalist item, label table, key of its measurement) of each.
        place: the voxel (S, P, L) of the first case to show; else the slice with most labels.
        cache_dir: where the picture is kept.
    """
    name = hashlib.sha256(repr([[key for *_, key in cases], place]).encode()).hexdigest()[:24]
    path = os.path.join(cache_dir, f"{name}.png")
    if not os.path.isfile(path):
        png = _draw(cases[:2], place)
        atomic_write(path, lambda temporary: Path(temporary).write_bytes(png))
    return Path(path).read_bytes()


def _draw(cases: Sequence[tuple[Mapping[str, Any], LabelTable, str]], place: Sequence[int] | None) -> bytes:
    figure = Figure(figsize=(2 * INCHES, INCHES + 0.2), dpi=DOTS, facecolor="black")
    FigureCanvasAgg(figure)
    places = [0, 0.5]  # of the panels, from the left
    for number, (item, table, _) in enumerate(cases):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image, codes, *_ = read_case(item, table)
        at = _fullest(codes) if place is None or number else place
        for axis in (0,) if len(cases) > 1 else (0, 1):
            _panel(figure, places.pop(0), image, truth_map(codes, table, item["dataset"]), at, axis, item, table)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="black")
    return buffer.getvalue()


def _fullest(codes: np.ndarray) -> list[int]:
    """A voxel in the axial and the coronal slice that hold most labels; the middle where there are none."""
    foreground = codes > 0
    counts = [foreground.sum(tuple(other for other in range(3) if other != axis)) for axis in range(3)]
    return [int(c.argmax()) if c.any() else len(c) // 2 for c in counts]


def _panel(
    figure: Figure, left: float, image: RawVolume, painted: np.ndarray, at: Sequence[int], axis: int, item: Mapping[str, Any],
    table: LabelTable,
) -> None:  # fmt: skip
    """Half of the figure: the slice of `axis` at the voxel `at`, with the contours of its labels."""
    spacing = spacing_of(image.affine)
    index = min(max(int(at[axis]), 0), painted.shape[axis] - 1)
    shown, labels = image.array[0].take(index, axis), painted.take(index, axis)
    aspect = spacing[1] / spacing[2] if axis == 0 else spacing[0] / spacing[2]
    if axis == 1:  # the head above
        shown, labels = shown[::-1], labels[::-1]
    steps = [max(1, n // 256) for n in shown.shape]
    shown, labels = (array[:: steps[0], :: steps[1]] for array in (shown, labels))
    low, high = CT_WINDOW_HU if item["modality"] == "CT" else np.percentile(shown, (1, 99.5))
    if item["modality"] == "CT" and not low < float(np.median(shown)) < high and np.ptp(shown) > 0:
        low, high = min(low, float(np.median(shown))), max(high, float(np.percentile(shown, 99)))
    axes = figure.add_axes((left, 0, 0.495, 0.92))
    shades = {"cmap": "gray", "vmin": low, "vmax": max(high, low + 1e-6)}
    axes.imshow(shown, aspect=aspect * steps[0] / steps[1], **shades)
    axes.autoscale(False)
    grid = [np.arange(-1, n + 1) for n in reversed(labels.shape)]  # a voxel around: single rows have a contour, too
    for value in np.unique(labels[labels > 0]).tolist():
        mask = np.pad(labels == value, 1)
        axes.contour(*grid, mask, levels=(0.5,), colors=[colors_of(table)[value]], linewidths=1)
    axes.set_axis_off()
    title = f"{item['case']}, {('axial', 'coronal')[axis]} {index + 1}/{painted.shape[axis]}"
    figure.text(left + 0.01, 0.94, title[:46], color="white", fontsize=8, parse_math=False)
