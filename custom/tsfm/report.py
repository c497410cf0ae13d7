"""Pictures and tables for people: overlays of image, truth and prediction, training curves, transfer plots.

Pictures are drawn as radiologists hang them: axial slices seen from the feet, the patient's right on the left, anterior
on top, in true proportions. Tables come from :mod:`tsfm.tables` (formats of results are described there).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .labelmaps import as_table, load_map, load_truth, match_predictions, spacing_of
from .labels import LabelTable
from .tables import ROW_NAMES, cells_of, csv_text, load_rows, table1, table2, table3

__all__ = [
    "choose_cases", "curve_png", "folder_page", "overlay_png", "page_png", "table1", "table2", "table3", "truth_map",
    "write_table2", "write_table3",
]  # fmt: skip

CT_WINDOW_HU = (-160.0, 240.0)
"""Soft tissue: level 40, width 400."""
LUNG_WINDOW_HU = (-1350.0, 150.0)
"""Lung: level -600, width 1500."""
# Distinct on gray and for most color-blind readers; lesions take the warm ones (Tol's bright and vibrant schemes).
ORGAN_COLORS = (
    "#66ccee",
    "#228833",
    "#4477aa",
    "#ccbb44",
    "#aa3377",
    "#44bb99",
    "#99ddff",
    "#bbcc33",
    "#8888dd",
    "#77aadd",
)
LESION_COLORS = ("#ff3333", "#ff8c1a", "#ff44cc", "#ffdd33")


def truth_map(codes: np.ndarray, table: LabelTable, dataset: str) -> np.ndarray:
    """Local codes of `dataset` painted like a prediction: values 0 to N, the innermost annotated target on top."""
    start, values = table.offset(dataset), []
    for code in range(start, start + len(table.local_ids(dataset))):
        painted = [target + 1 for target in table.paint_order() if table.targets[code, target] == 1]
        values.append(painted[-1] if painted else 0)
    return np.array(values, np.uint8 if len(table.names) < 256 else np.uint16)[codes]


def colors_of(table: LabelTable) -> dict[int, str]:
    """Label-map value -> color; warm colors belong to what lies inside another target or is declared a lesion."""
    warm = [
        bool(table.entry(name).get("lesion", "inside" in table.entry(name))) or "tumor" in name for name in table.names
    ]
    colors = {}
    for value, is_warm in enumerate(warm, start=1):
        scheme = LESION_COLORS if is_warm else ORGAN_COLORS
        colors[value] = scheme[sum(w == is_warm for w in warm[: value - 1]) % len(scheme)]
    return colors


def overlay_png(
    path: str | Path,
    image: np.ndarray,
    truth: np.ndarray | None,
    prediction: np.ndarray,
    table: LabelTable,
    affine: np.ndarray,
    modality: str = "CT",
    window: tuple[float, float] | None = None,
    slices: int = 3,
    title: str = "",
    dice: Mapping[str, float | None] | None = None,
) -> Path:
    """One case: a row of image, truth and prediction for each of the most informative axial slices.

    Args:
        image, truth, prediction: three axes on one grid; truth and prediction hold label-map values (see `truth_map`);
            no truth gives two columns.
        affine: (4, 4) to RAS+ mm, decides which slices are axial, their orientation and proportions.
        window: gray values shown as black and white; default: soft tissue for a CT, 1st to 99.5th percentile else.
        dice: target -> Dice, added to the legend.

    Raises:
        ValueError: arrays whose shapes differ.
    """
    return page_png(path, [{
        "image": image, "truth": truth, "prediction": prediction, "affine": affine, "modality": modality,
        "window": window, "title": title, "dice": dice or {}, "slices": slices,
    }], table)  # fmt: skip


def page_png(path: str | Path, cases: Sequence[Mapping[str, Any]], table: LabelTable, heading: str = "") -> Path:
    """A page of cases below each other, one row per slice; each case is a dict of `overlay_png`'s arguments."""
    colors, rows, shown = colors_of(table), [], set()
    for case in cases:
        panels = _upright(case)
        for number, index in enumerate(informative_slices(panels, case.get("slices", 1))):
            rows.append((case, panels, index, number == 0))
            shown |= {int(v) for key in ("truth", "prediction") if key in panels for v in np.unique(panels[key][index])}
    columns = max(2 + ("truth" in panels) for _, panels, _, _ in rows)
    heights = [_crop_of(panels)[2] for _, panels, _, _ in rows]
    width = 3.4 * columns
    titles = sum(0.34 for row in rows if row[3] and row[0].get("title"))
    legend_lines = -(-len(shown - {0}) // (columns * 1 + 1)) if shown - {0} else 1
    footer, header = 0.3 + 0.26 * legend_lines, 0.42 + (0.32 if heading else 0)
    height = header + footer + titles + sum(3.4 * h for h in heights)
    figure = Figure(figsize=(width, height), dpi=110, facecolor="black")
    FigureCanvasAgg(figure)
    top = height - header
    if heading:
        figure.text(0.5, 1 - 0.1 / height, heading, color="white", ha="center", va="top", fontsize=12, weight="bold")
    for (case, panels, index, first), tall in zip(rows, heights, strict=True):
        if first and case.get("title"):
            figure.text(0.01, (top - 0.1) / height, case["title"], color="white", va="top", fontsize=10)
            top -= 0.34
        _draw_row(
            figure, case, panels, index, colors, (width, height, top, 3.4 * tall, columns), top == height - header
        )
        top -= 3.4 * tall
    _legend(figure, table, colors, shown, cases, footer / height, columns + 1)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="black")
    return Path(path)


def _upright(case: Mapping[str, Any]) -> dict[str, Any]:
    """The case's arrays with axes (superior, posterior, left), their spacing in that order, and the gray window."""
    image, affine = np.asarray(case["image"]), np.asarray(case["affine"], float)
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(("S", "P", "L"))
    )
    panels: dict[str, Any] = {}
    for key in ("image", "truth", "prediction"):
        if case.get(key) is None:
            continue
        array = np.asarray(case[key])
        if array.shape != image.shape:
            raise ValueError(f"{case.get('title', 'case')}: {key} has shape {array.shape}, the image {image.shape}")
        panels[key] = nib.orientations.apply_orientation(array, turn)
    spacing = np.empty(3)
    spacing[turn[:, 0].astype(int)] = spacing_of(affine)
    panels["spacing"], panels["window"] = spacing, case.get("window") or _window(panels["image"], case)
    return panels


def _window(image: np.ndarray, case: Mapping[str, Any]) -> tuple[float, float]:
    if case.get("modality", "CT").upper() == "CT":
        return CT_WINDOW_HU
    values = image[image > image.min()]
    low, high = np.percentile(values[:: max(1, values.size // 500_000)], (1, 99.5)) if values.size else (0, 1)
    return float(low), float(max(high, low + 1e-6))


def informative_slices(panels: Mapping[str, Any], number: int) -> list[int]:
    """Axial slices that show most: each target counts by the share of its largest cross-section, small ones as much as
    large ones; a slice next to a chosen one counts less, so that the choice spreads out."""
    size = panels["image"].shape[0]
    score = np.zeros(size)
    for key in ("truth", "prediction"):
        for value in np.unique(panels[key])[1:] if key in panels else ():
            area = (panels[key] == value).sum((1, 2))
            score += area / area.max()
    if not score.any():
        return sorted({int(at) for at in np.linspace(0, size - 1, min(number, size) + 2)[1:-1].round()})
    chosen: list[int] = []
    for _ in range(min(number, int((score > 0).sum()))):
        chosen.append(int(score.argmax()))
        apart = np.abs(np.arange(size) - chosen[-1]) * panels["spacing"][0]
        score = score * np.clip(apart / 30, 0, 1)  # 30 mm away a slice is as good as new
        if not score.any():
            break
    return sorted(chosen, reverse=True)


def _crop_of(panels: Mapping[str, Any]) -> tuple[slice, slice, float]:
    """In-plane box of the body with a margin, and its height over its width in mm."""
    image, (_, step_p, step_l) = panels["image"], panels["spacing"]
    low, high = panels["window"]
    body = (image > low + 0.1 * (high - low)).sum(0) > 0.02 * image.shape[0]
    for key in ("truth", "prediction"):
        body |= panels[key].any(0) if key in panels else False
    box = []
    for axis, step in ((1, step_p), (0, step_l)):
        where = np.flatnonzero(body.any(axis))
        margin = round(4 / step)
        box.append(slice(max(0, where[0] - margin), where[-1] + 1 + margin) if where.size else slice(None))
    shape = body[box[0], box[1]].shape
    return box[0], box[1], float(np.clip(shape[0] * step_p / (shape[1] * step_l), 0.4, 1.6))


def _draw_row(figure: Figure, case, panels, index: int, colors, place: tuple, first: bool) -> None:
    """Image, truth and prediction of one slice, side by side."""
    _, height, top, tall, columns = place
    rows, cols, _ = _crop_of(panels)
    aspect = panels["spacing"][1] / panels["spacing"][2]
    gray = panels["image"][index][rows, cols]
    names = [name for name in ("image", "truth", "prediction") if name in panels]
    for column, name in enumerate(names):
        axes = figure.add_axes(
            (column / columns + 0.004, (top - tall) / height + 0.002, 1 / columns - 0.008, tall / height - 0.004)
        )
        axes.imshow(
            gray,
            cmap="gray",
            vmin=panels["window"][0],
            vmax=panels["window"][1],
            aspect=aspect,
            interpolation="bilinear",
        )
        axes.set_axis_off()
        if name != "image":
            _paint(axes, panels[name][index][rows, cols], colors)
        if first:
            axes.set_title(name, color="white", fontsize=11, pad=4)
        for text, (x, y), (ha, va) in (
            ("A", (0.5, 0.985), ("center", "top")), ("P", (0.5, 0.015), ("center", "bottom")),
            ("R", (0.015, 0.5), ("left", "center")), ("L", (0.985, 0.5), ("right", "center")),
        ):  # fmt: skip
            axes.text(x, y, text, transform=axes.transAxes, color="#ffe680", fontsize=8, ha=ha, va=va)
    note = f"slice {index + 1}/{len(panels['image'])}, {panels['spacing'][0]:.3g} mm"
    figure.axes[-len(names)].text(
        0.015, 0.015, note, transform=figure.axes[-len(names)].transAxes, color="white", fontsize=7, va="bottom"
    )
    _scale_bar(figure.axes[-len(names)], gray.shape, panels["spacing"])


def _paint(axes, values: np.ndarray, colors: Mapping[int, str]) -> None:
    """Faint fill and a crisp outline of every target in the slice."""
    for value in np.unique(values[values > 0]).tolist():
        mask = np.pad(values == value, 1).astype(float)
        grid = np.arange(-1, values.shape[1] + 1), np.arange(-1, values.shape[0] + 1)
        axes.contourf(*grid, mask, levels=(0.5, 1.5), colors=[colors[value]], alpha=0.3)
        axes.contour(*grid, mask, levels=(0.5,), colors=[colors[value]], linewidths=1.1)
    axes.set_xlim(-0.5, values.shape[1] - 0.5)
    axes.set_ylim(values.shape[0] - 0.5, -0.5)


def _scale_bar(axes, shape: tuple[int, int], spacing: np.ndarray) -> None:
    """A bar of 1, 2, 5 or 10 cm, about a fifth of the picture."""
    across = shape[1] * spacing[2]
    length = max((mm for mm in (5, 10, 20, 50, 100) if mm <= across / 4), default=5)
    right, bottom = 0.96 * shape[1], 0.95 * shape[0]
    axes.plot([right - length / spacing[2], right], [bottom, bottom], color="white", linewidth=2, solid_capstyle="butt")
    label = f"{length // 10} cm" if length >= 10 else f"{length} mm"
    axes.text(
        right - length / spacing[2] / 2,
        bottom - 0.012 * shape[0],
        label,
        color="white",
        fontsize=7,
        ha="center",
        va="bottom",
    )


def _legend(figure: Figure, table: LabelTable, colors, shown: set[int], cases, bottom: float, columns: int) -> None:
    """Colors and names of what is shown, with the Dice where one case is shown."""
    dice = cases[0].get("dice") or {} if len(cases) == 1 else {}
    handles = []
    for value in sorted(shown - {0}):
        name = table.names[value - 1]
        score = dice.get(name)
        label = name.replace("_", " ") + (f"  Dice {score:.3f}" if score is not None else "")
        handles.append(Patch(facecolor=colors[value], edgecolor=colors[value], label=label))
    if handles:
        figure.legend(
            handles=handles,
            loc="lower center",
            ncols=min(columns, len(handles)),
            frameon=False,
            labelcolor="white",
            fontsize=9,
        )
    else:
        figure.text(0.5, bottom / 2, "no target in the slices shown", color="white", ha="center", fontsize=9)


def choose_cases(rows: Sequence[Mapping[str, Any]], targets: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Best, median and worst case by the mean Dice over their targets (or over `targets` alone, e.g. the lesions).

    Returns:
        ``{"best" | "median" | "worst": {"dataset", "case", "dice"}}``; fewer entries where there are fewer cases.
    """
    scores: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["dice"] is not None and (targets is None or row["target"] in targets):
            scores.setdefault((row["dataset"], row["case"]), []).append(row["dice"])
    ranked = sorted(scores, key=lambda key: (np.mean(scores[key]), key))
    entries = [{"dataset": d, "case": c, "dice": float(np.mean(scores[d, c]))} for d, c in ranked]
    if not entries:
        return {}
    places = {"best": len(entries) - 1, "median": len(entries) // 2, "worst": 0}
    distinct = {place: name for name, place in reversed(places.items())}
    return {name: entries[place] for name, place in places.items() if distinct[place] == name}


def folder_page(
    path: str | Path,
    rows: Sequence[Mapping[str, Any]] | str | Path,
    predictions: str | Path,
    items: Sequence[Mapping[str, Any]],
    table: LabelTable | Mapping | str,
    dataset: str | None = None,
    modality: str = "CT",
    targets: Sequence[str] | None = None,
    slices: int = 1,
) -> Path:
    """The page of best, median and worst case of an evaluated folder.

    Args:
        rows: scored rows, or the ``cases.csv`` that the evaluation wrote.
        predictions, dataset: as for :func:`tsfm.evaluation.evaluate_folder`.
        items: the cases' pool items with ``image`` (the first channel is shown), ``label`` and, if known, ``modality``.
        targets: rank by these targets alone.
    """
    table, rows = as_table(table), load_rows(rows) if isinstance(rows, (str, Path)) else rows
    chosen = choose_cases(rows, targets)
    pairs = match_predictions(predictions, items, dataset)
    found = {
        (pair["dataset"] or table.datasets[0], pair["case"]): (pair, item)
        for pair, item in zip(pairs, items, strict=True)
    }
    cases = []
    for name, entry in chosen.items():
        pair, item = found[entry["dataset"], entry["case"]]
        files = item["image"] if isinstance(item["image"], (list, tuple)) else [item["image"]]
        image = nib.load(files[0])
        array = np.asarray(image.dataobj, np.float32)
        cases.append({
            "image": array[..., 0] if array.ndim == 4 else array, "affine": image.affine, "slices": slices,
            "truth": truth_map(load_truth(pair["label"], table, entry["dataset"])[0], table, entry["dataset"]),
            "prediction": load_map(pair["prediction"])[0], "modality": item.get("modality") or modality,
            "title": f"{name}: {entry['dataset']} {entry['case']}, mean Dice {entry['dice']:.3f}",
        })  # fmt: skip
    return page_png(path, cases, table)


def curve_png(csv_path: str | Path, path: str | Path, x: str = "epoch") -> Path:
    """Loss (left) and Dice (right) over epochs from the ``curve.csv`` of a run.

    Columns with "loss" in their name go left; the validation Dice and its moving average ("ema") right, with the single
    targets ("dice_NAME") as thin lines.
    """
    rows = load_rows(csv_path)
    names = list(dict.fromkeys(name for row in rows for name in row if name != x))
    targets = [name for name in names if name.startswith("dice_")]
    means = [name for name in names if name == "ema" or ("dice" in name and name not in targets)]
    figure = Figure(figsize=(10, 3.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes, columns, width in (
        (left, [n for n in names if "loss" in n], 1.8),
        (right, targets, 0.8),
        (right, means, 2),
    ):
        for name in columns:
            points = [(row[x], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
            label = {"ema": "moving average"}.get(name, name.removeprefix("dice_").replace("_", " "))
            if points:
                axes.plot(
                    *zip(*points, strict=True), label=label, linewidth=width, marker="." if len(points) < 40 else None
                )
    for axes, label in ((left, "loss"), (right, "Dice")):
        axes.set(xlabel=x, ylabel=label)
        axes.grid(alpha=0.3)
        if 0 < len(axes.lines) <= 12:
            axes.legend(fontsize=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return Path(path)


def transfer_png(results: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Dice over epochs, one panel per data set, mean and single seeds; a method with one value is a dashed line."""
    cells = cells_of(results, "initialization", "epochs")
    datasets = list(dict.fromkeys(key[0] for key in cells))
    figure = Figure(figsize=(4.6 * len(datasets), 3.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, dataset in zip(figure.subplots(1, len(datasets), squeeze=False)[0], datasets, strict=True):
        mine = {key[1:]: values for key, values in cells.items() if key[0] == dataset}
        for number, method in enumerate(dict.fromkeys(method for method, _ in mine)):
            color, label = f"C{number}", ROW_NAMES.get(method, method)
            epochs = sorted(epoch for name, epoch in mine if name == method and epoch is not None)
            if (method, None) in mine:
                axes.axhline(np.mean(mine[method, None]), color=color, linestyle="--", label=label)
            if epochs:
                axes.plot(
                    epochs, [np.mean(mine[method, epoch]) for epoch in epochs], color=color, marker="o", label=label
                )
            for epoch in epochs:
                axes.scatter([epoch] * len(mine[method, epoch]), mine[method, epoch], color=color, s=12, alpha=0.45)
        ticks = sorted({epoch for _, epoch in mine if epoch is not None})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set(title=dataset, xlabel="epochs of transfer training", ylabel="Dice")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path)
    return Path(path)


def write_table2(results: Sequence[Mapping[str, Any]], output_dir: str | Path, name: str = "table2") -> Path:
    """Markdown, CSV (one line per run) and plot of the transfer table; returns the Markdown file."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    transfer_png(results, Path(output_dir) / f"{name}.png")
    return _write(
        output_dir, name, table2(results), csv_text(results, ("dataset", "initialization", "epochs", "seed", "dice"))
    )


def write_table3(results: Sequence[Mapping[str, Any]], output_dir: str | Path, name: str = "table3") -> Path:
    """Markdown and CSV (one line per run) of the ablation table; returns the Markdown file."""
    return _write(output_dir, name, table3(results), csv_text(results, ("dataset", "pretraining", "seed", "dice")))


def _write(output_dir: str | Path, name: str, text: str, lines: str) -> Path:
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.csv").write_text(lines, encoding="utf-8")
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    return folder / f"{name}.md"
