"""Overlays of image, truth and prediction, drawn as radiologists hang pictures.

Axial slices seen from the feet: the patient's right on the left, anterior on top, in true proportions, with a scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from scipy import ndimage

from ..cases.grids import SPL, spacing_of, turn_array, turn_grid, turn_to
from ..inference.colors import colors_of, is_warm
from ..labels import LabelTable
from ..preparation.resampling import label_box

CT_WINDOW_HU = (-160.0, 240.0)
"""Soft tissue: level 40, width 400."""

LUNG_WINDOW_HU = (-1350.0, 150.0)
"""Lung: level -600, width 1500; the choice for cases whose only targets are in the lung."""

CT_BELOW_HU = -100.0
"""An image that names no modality is CT where it holds less: its fat and air do, MR does not."""

PANELS = ("image", "truth", "prediction")

ROW_INCHES, TITLE_INCHES = 3.4, 0.3

EDGE = [withStroke(linewidth=1.6, foreground="black")]  # keeps letters readable on bright fat


def truth_map(codes: np.ndarray, table: LabelTable, dataset: str) -> np.ndarray:
    """Local codes of `dataset` painted like a prediction: values 0 to N, the innermost annotated target on top."""
    start, values = table.offset(dataset), []
    for code in range(start, start + len(table.local_ids(dataset))):
        painted = [target + 1 for target in table.paint_order() if table.targets[code, target] == 1]
        values.append(painted[-1] if painted else 0)
    return np.array(values, np.uint8 if len(table.names) < 256 else np.uint16)[codes]


def page_png(path: str | Path, cases: Sequence[Mapping[str, Any]], table: LabelTable) -> Path:
    """A page of cases below each other: image, truth and prediction in the most informative slice of each.

    Args:
        cases: per case ``image``, ``prediction`` and ``truth`` (three axes on one grid, label-map values, see `truth_map`),
            ``affine`` (to RAS+ mm: which slices are axial, their orientation and proportions), and if wanted ``modality``
            (else told by the values), ``title`` and ``annotated`` (targets that the truth's data set annotates; the legend
            marks others that are predicted).

    Raises:
        ValueError: arrays whose shapes differ.
    """
    rows, shown = [], set()
    for case in cases:
        panels = _upright(case)
        index = informative_slice(panels, _weights(table, case))
        rows.append((panels, index, case.get("title", "")))
        shown |= {int(value) for key in PANELS[1:] for value in np.unique(panels[key][index]) if value}
    columns = len(PANELS)
    handles = _legend_entries(table, shown, cases)
    header = 0.34
    footer = 0.26 + 0.25 * -(-max(len(handles), 1) // (columns + 1))
    tall = [TITLE_INCHES * bool(title) + ROW_INCHES * panels["crop"][2] for panels, _, title in rows]
    width, height = ROW_INCHES * columns, header + footer + sum(tall)
    figure = Figure(figsize=(width, height), dpi=110, facecolor="black")
    FigureCanvasAgg(figure)
    top = height - header
    for column, name in enumerate(PANELS):
        figure.text((column + 0.5) / columns, (top + 0.08) / height, name, color="white", ha="center", fontsize=11)
    for (panels, index, title), row_height in zip(rows, tall, strict=True):
        figure.text(
            0.008, (top - 0.06) / height, title, color="white", va="top", fontsize=10, parse_math=False
        )  # a case may be called "a$b"
        picture = row_height - TITLE_INCHES * bool(title)
        _draw_row(figure, panels, index, colors_of(table), ((top - row_height) / height, picture / height))
        top -= row_height
    if handles:
        style = {"loc": "lower center", "frameon": False, "labelcolor": "white", "fontsize": 9}
        figure.legend(handles=handles, ncols=min(columns + 1, len(handles)), **style)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="black")
    return Path(path)


def _weights(table: LabelTable, case: Mapping[str, Any]) -> dict[int, float]:
    """Lesions count twice; what the truth's data set does not annotate is no reason to show a slice."""
    known = case.get("annotated") or table.names
    return {v: (1.0 + is_warm(table, name)) * (name in known) for v, name in enumerate(table.names, start=1)}


def _upright(case: Mapping[str, Any]) -> dict[str, Any]:
    """The case's arrays with axes (superior, posterior, left), their spacing in that order, gray window, and crop."""
    image, affine = np.asarray(case["image"]), np.asarray(case["affine"], float)
    turn = turn_to(affine, SPL)
    panels: dict[str, Any] = {}
    for key in PANELS:
        array = np.asarray(case[key])
        if array.shape != image.shape:
            raise ValueError(f"{case.get('title', 'case')}: {key} has shape {array.shape}, the image {image.shape}")
        panels[key] = turn_array(array, turn)
    panels["spacing"] = np.array(spacing_of(turn_grid(image.shape, affine, turn)[1]))
    panels["window"] = _window(panels["image"], case)
    panels["crop"] = _crop_of(panels)
    return panels


def _window(image: np.ndarray, case: Mapping[str, Any]) -> tuple[float, float]:
    if (case.get("modality") or ("CT" if image.min() < CT_BELOW_HU else "MR")).upper() == "CT":
        known = case.get("annotated") or ()
        return LUNG_WINDOW_HU if known and all("lung" in name for name in known) else CT_WINDOW_HU
    values = image[image > image.min()]
    low, high = np.percentile(values[:: max(1, values.size // 500_000)], (1, 99.5)) if values.size else (0, 1)
    return float(low), float(max(high, low + 1e-6))


def informative_slice(panels: Mapping[str, Any], weights: Mapping[int, float] | None = None) -> int:
    """The axial slice that shows most.

    Each target counts by the share of its largest cross-section in the slice, so small ones count as much as large
    ones; what is only predicted counts half.

    Args:
        weights: label-map value -> weight (default 1).
    """
    size = panels["image"].shape[0]
    worth = np.zeros(size)
    for key, part in (("truth", 1.0), ("prediction", 0.5)):
        for value in np.unique(panels[key]).tolist():
            if value:
                area = (panels[key] == value).sum((1, 2))
                worth += part * (weights or {}).get(value, 1.0) * area / area.max()
    return int(worth.argmax()) if worth.any() else round((size - 1) / 2)


def _crop_of(panels: Mapping[str, Any]) -> tuple[slice, slice, float]:
    """In-plane box of the body (not the couch) with a margin, and its height over its width in mm."""
    image, (_, step_p, step_l) = panels["image"], panels["spacing"]
    dark, bright = panels["window"]
    pieces, _ = ndimage.label((image > dark + 0.1 * (bright - dark)).mean(0) > 0.3)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    body = (sizes >= max(1, 0.2 * sizes.max()))[pieces]
    for key in PANELS[1:]:
        body |= panels[key].any(0)
    around, margins = label_box(body) or ((0, None), (0, None)), (round(6 / step_p), round(6 / step_l))
    box = [slice(max(0, low - m), high and high + m) for (low, high), m in zip(around, margins, strict=True)]
    shape = body[box[0], box[1]].shape
    return box[0], box[1], float(np.clip(shape[0] * step_p / (shape[1] * step_l), 0.4, 1.6))


def _draw_row(figure: Figure, panels: Mapping[str, Any], index: int, colors, place: tuple[float, float]) -> None:
    """Image, truth and prediction of one slice side by side; `place`: bottom and height in the figure."""
    (bottom, tall), columns = place, len(PANELS)
    rows, cols, _ = panels["crop"]
    spacing, gray = panels["spacing"], panels["image"][index][rows, cols]
    shades = {"cmap": "gray", "vmin": panels["window"][0], "vmax": panels["window"][1], "interpolation": "bilinear"}
    for column, name in enumerate(PANELS):
        axes = figure.add_axes((column / columns + 0.003, bottom + 0.02 * tall, 1 / columns - 0.006, 0.96 * tall))
        axes.imshow(gray, aspect=spacing[1] / spacing[2], **shades)
        axes.set_axis_off()
        for text, x, y, ha, va in (
            ("A", 0.5, 0.99, "center", "top"), ("P", 0.5, 0.01, "center", "bottom"),
            ("R", 0.012, 0.5, "left", "center"), ("L", 0.988, 0.5, "right", "center"),
        ):  # fmt: skip
            axes.text(
                x, y, text, transform=axes.transAxes, color="#ffe680", fontsize=8, ha=ha, va=va, path_effects=EDGE
            )
        if name == "image":
            note = f"slice {index + 1}/{len(panels['image'])}, {spacing[0]:.3g} mm"
            style = {"color": "white", "fontsize": 7, "va": "bottom", "path_effects": EDGE}
            axes.text(0.012, 0.012, note, transform=axes.transAxes, **style)
            _scale_bar(axes, gray.shape, spacing)
        else:
            _paint(axes, panels[name][index][rows, cols], colors)


def _paint(axes, values: np.ndarray, colors: Mapping[int, str]) -> None:
    """Faint fill and a crisp outline of every target in the slice."""
    for value in np.unique(values[values > 0]).tolist():
        mask = np.pad(values == value, 1).astype(float)
        grid = np.arange(-1, values.shape[1] + 1), np.arange(-1, values.shape[0] + 1)
        axes.contourf(*grid, mask, levels=(0.5, 1.5), colors=[colors[value]], alpha=0.22)
        axes.contour(*grid, mask, levels=(0.5,), colors=[colors[value]], linewidths=1.1)
    axes.set_xlim(-0.5, values.shape[1] - 0.5)
    axes.set_ylim(values.shape[0] - 0.5, -0.5)


def _scale_bar(axes, shape: tuple[int, int], spacing: np.ndarray) -> None:
    """A bar of 5 mm to 10 cm, at most a quarter of the picture's width."""
    length = max((mm for mm in (5, 10, 20, 50, 100) if mm <= shape[1] * spacing[2] / 4), default=5)
    right, bottom, pixels = 0.96 * shape[1], 0.95 * shape[0], length / spacing[2]
    edge = [withStroke(linewidth=3.5, foreground="black")]
    axes.plot(
        [right - pixels, right], [bottom] * 2, color="white", linewidth=2, solid_capstyle="butt", path_effects=edge
    )
    label = f"{length // 10} cm" if length >= 10 else f"{length} mm"
    style = {"color": "white", "fontsize": 7, "ha": "center", "va": "bottom", "path_effects": EDGE}
    axes.text(right - pixels / 2, bottom - 0.015 * shape[0], label, **style)


def _legend_entries(table: LabelTable, shown: set[int], cases: Sequence[Mapping[str, Any]]) -> list[Patch]:
    """Color and name of every target in the picture; what no truth annotates."""
    known = [case.get("annotated") for case in cases]
    colors, entries = colors_of(table), []
    for value in sorted(shown):
        name = table.names[value - 1]
        unknown = all(names is not None and name not in names for names in known)
        entries.append(Patch(color=colors[value], label=name.replace("_", " ") + " (not annotated)" * unknown))
    return entries
