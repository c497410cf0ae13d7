"""What people look at after a run: the page of best, median and worst case, and training curves."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..cases.folders import paths_of, saved_outputs
from ..cases.raw_ids import from_raw_ids
from ..cases.volumes import RawVolume, as_label_map, on_grid_of, read_volume
from ..labels import LabelTable
from .label_maps import load_map, load_truth, match_predictions
from .overlays import page_png, truth_map
from .tables import load_rows

logger = logging.getLogger(__name__)


def choose_cases(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Best, median and worst case by the mean Dice over their targets.

    Returns:
        ``{"best" | "median" | "worst": {"dataset", "case", "dice"}}``; fewer entries where there are fewer cases.
    """
    scores: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["dice"] is not None:
            scores.setdefault((row["dataset"], row["case"]), []).append(row["dice"])
    ranked = sorted(scores, key=lambda key: (np.mean(scores[key]), key))
    entries = [{"dataset": d, "case": c, "dice": float(np.mean(scores[d, c]))} for d, c in ranked]
    if not entries:
        return {}
    places = {"best": len(entries) - 1, "median": len(entries) // 2, "worst": 0}
    distinct = {place: name for name, place in reversed(places.items())}
    return {name: entries[place] for name, place in places.items() if distinct[place] == name}


def worst_cases(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The worst case of each target that has a Dice somewhere: ``{target: {"dataset", "case", "dice", "target"}}``."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["dice"] is not None and row["dice"] < found.get(row["target"], {"dice": 2})["dice"]:
            found[row["target"]] = {key: row[key] for key in ("dataset", "case", "dice", "target")}
    return found


def folder_page(
    path: str | Path,
    scores: str | Path,
    predictions: str | Path,
    items: Sequence[Mapping[str, Any]],
    table: LabelTable,
    dataset: str | None = None,
    per_target: bool = False,
    raw_ids: str | None = None,
) -> Path:
    """The page of best, median and worst case of an evaluated folder, or of each target's worst case.

    Args:
        scores: the ``cases.csv`` that the evaluation wrote.
        predictions, dataset: as for :func:`tsfm.evaluation.evaluation.evaluate_folder`.
        items: the cases' pool items with ``case``, ``image`` (the first channel is shown), ``label`` and, if known, ``modality``.
        per_target: a row for each target, in the slice that shows most of it; nothing else is painted there.
        raw_ids: the data set in whose ids the predictions are; None where they are the table's values.
    """
    rows = load_rows(scores)
    chosen = worst_cases(rows) if per_target else choose_cases(rows)
    wanted = {(entry["dataset"], entry["case"]) for entry in chosen.values()}
    owner = dataset or table.datasets[0]
    items = [item for item in items if (item.get("dataset") or owner, str(item["case"])) in wanted]
    if not wanted:
        raise ValueError("no case has a Dice to rank by: the truths hold nothing of these targets")
    pairs = match_predictions(predictions, items, dataset)
    found = {(pair["dataset"] or owner, pair["case"]): (pair, item) for pair, item in zip(pairs, items, strict=True)}
    cases = []
    for name, entry in chosen.items():
        pair, item = found[entry["dataset"], entry["case"]]
        prediction, affine = load_map(pair["prediction"])
        if raw_ids is not None:
            prediction = from_raw_ids(prediction, table, raw_ids)
        prediction = as_label_map(prediction, len(table.names), str(pair["prediction"]))
        grid = RawVolume(prediction[None], affine, str(pair["prediction"]))
        image = on_grid_of(grid, read_volume(paths_of(item["image"])[0]), "image and prediction")
        truth = load_truth(pair["label"], table, entry["dataset"], (prediction, affine, grid.source))
        maps = {"truth": truth_map(truth, table, entry["dataset"]), "prediction": prediction}
        if per_target:
            value = table.names.index(name) + 1
            inside = table.map_membership()[:, value - 1]
            maps = {key: (inside[array] * value).astype(array.dtype) for key, array in maps.items()}
        cases.append({
            **maps, "image": np.asarray(image.array[0], np.float32), "affine": affine,
            "annotated": table.annotated(entry["dataset"]), "modality": item.get("modality"),
            "title": f"{name}: {entry['dataset']} {entry['case']}, {'' if per_target else 'mean '}Dice {entry['dice']:.3f}",
        })  # fmt: skip
    return page_png(path, cases, table)


class CasePage:
    """Handler for evaluate.json: ``page.png`` with best, median and worst case, ``targets.png`` with each target's worst;
    declare it after `CaseScores`.

    Args:
        output_dir: folder of ``cases.csv`` and of the saved label maps; the pictures go there too.
        items: the evaluated pool items.
        table, raw_ids: as for :func:`folder_page`.
        save: what is written of each case; without label maps there are no pictures.
    """

    def __init__(
        self,
        output_dir: str,
        items: Sequence[Mapping[str, Any]],
        table: LabelTable,
        raw_ids: str | None = None,
        save: str | Sequence[str] = "label_map",
    ) -> None:
        self.output_dir, self.items, self.table, self.raw_ids = Path(output_dir), items, table, raw_ids
        self.has_maps = "label_map" in saved_outputs(save)  # those that lie there may be an earlier run's

    def attach(self, engine: Engine) -> None:
        """Draw when the last case is done."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Draw the page; a page that cannot be drawn is reported and spoils nothing."""
        names = ("page.png", "targets.png")
        for name in names:  # an earlier run's would be taken for this one's
            (self.output_dir / name).unlink(missing_ok=True)
        try:
            for name in names if self.has_maps else ():
                files = self.output_dir / name, self.output_dir / "cases.csv", self.output_dir
                per_target = name == "targets.png"
                folder_page(*files, self.items, self.table, per_target=per_target, raw_ids=self.raw_ids)
        except (ValueError, OSError) as error:
            logger.warning("No page of pictures in %s: %s", self.output_dir, error)


def curve_png(csv_path: str | Path, path: str | Path) -> Path:
    """Loss (left) and Dice (right) over epochs from the ``curve.csv`` of a run.

    Columns with "loss" in their name go left; the validation Dice and its moving average ("ema") right, with the single
    targets ("dice_NAME") as thin lines.
    """
    rows = load_rows(csv_path)
    names = list(dict.fromkeys(name for row in rows for name in row if name != "epoch"))
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
            points = [(row["epoch"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
            label = {"ema": "moving average"}.get(name, name.removeprefix("dice_").replace("_", " "))
            if points:
                axes.plot(
                    *zip(*points, strict=True), label=label, linewidth=width, marker="." if len(points) < 40 else None
                )
    for axes, label in ((left, "loss"), (right, "Dice")):
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(alpha=0.3)
        if 0 < len(axes.lines) <= 12:
            axes.legend(fontsize=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return Path(path)
