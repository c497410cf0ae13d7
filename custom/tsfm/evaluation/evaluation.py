"""Scores of label maps against the truth: per case, per data set, as a handler and for whole folders.

A *row* is a plain dict about one target of one case: ``case``, ``dataset``, ``target``, ``status`` (``ok``, or
``empty_truth`` where the truth holds nothing of it: no Dice, the predicted volume is all false), ``dice``, ``nsd``,
``tolerance_mm``, ``volume_predicted_ml``, ``volume_true_ml`` and, for lesions, ``lesions_true``, ``lesions_found``,
``lesions_missed``, ``lesions_false`` and ``lesions`` (one entry per lesion). What does not apply is None.
"""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite import distributed as idist
from ignite.engine import Engine, Events
from monai.data import MetaTensor

from ..cases.folders import stem
from ..cases.grids import spacing_of, upright_share
from ..cases.volumes import as_label_map
from ..labels import LabelTable, as_table
from ..preparation.resampling import boxes_of, enclosing
from .label_maps import load_map, load_truth, match_predictions
from .metrics import lesions, surface_dice
from .tables import markdown_scores, summarize, table1

logger = logging.getLogger(__name__)

DEFAULT_TOLERANCE_MM = 2.0
"""Surface tolerance of targets that declare none; no source of the paper fixes one."""

LESION_ENDINGS = ("tumor", "lesion", "cyst", "cancer", "metastasis")

COLUMNS = (
    "case", "dataset", "target", "status", "dice", "nsd", "tolerance_mm", "volume_predicted_ml", "volume_true_ml",
    "lesions_true", "lesions_found", "lesions_missed", "lesions_false",
)  # fmt: skip

LESION_COLUMNS = ("case", "dataset", "target", "kind", "volume_ml", "covered")


def is_lesion(table: LabelTable, target: str) -> bool:
    """Whether a target is counted lesion by lesion: as its entry's ``"lesion"`` says, else by the end of its name."""
    return bool(table.entry(target).get("lesion", target.lower().endswith(LESION_ENDINGS)))


def count_voxels(prediction: np.ndarray, truth: np.ndarray, table: LabelTable, dataset: str) -> dict[str, tuple]:
    """Target -> (tp, fp, fn) in voxels, for every target that `dataset` annotates.

    Args:
        prediction: label map with values 0 to N; a value is positive for its target and for all that contain it.
        truth: local codes of `dataset` on the same grid; voxels with an ignored code count nowhere.
    """
    names, number = table.names, len(table.local_ids(dataset))
    joint = np.zeros((len(names) + 1, number), np.int64)
    axis = int(np.argmax(prediction.strides))
    step = max(1, 2**22 * prediction.shape[axis] // max(1, prediction.size))
    for start in range(0, prediction.shape[axis], step):
        part = (slice(None),) * axis + (slice(start, start + step),)
        pairs = prediction[part].astype(np.int32) * number + truth[part]
        joint += np.bincount(pairs.ravel(), minlength=joint.size).reshape(joint.shape)
    rows, member = _rows_of(table, dataset), table.map_membership()
    counts = {}
    for name in table.annotated(dataset):
        target = names.index(name)
        positive, negative = rows[:, target] == 1, rows[:, target] == 0
        claimed = joint[member[:, target]]
        tp = int(claimed[:, positive].sum())
        counts[name] = (tp, int(claimed[:, negative].sum()), int(joint[:, positive].sum()) - tp)
    return counts


def score_case(
    prediction: np.ndarray,
    truth: np.ndarray,
    table: LabelTable,
    dataset: str,
    spacing_mm: Sequence[float],
    tolerances_mm: Mapping[str, float] | float | None = None,
    lesion_overlap: float = 0.0,
    case: str = "",
    upright: float = 1.0,
) -> list[dict[str, Any]]:
    """Score one label map; one row per target that `dataset` annotates (the fields stand at the top of this module).

    Args:
        prediction: label map (three axes) with values 0 to N on the image's own grid.
        truth: local codes of `dataset` on the same grid (`LabelTable.encode` makes them from raw ids).
        spacing_mm: voxel size along the three axes.
        upright: a voxel's volume over the product of its sides; less than 1 for a tilted gantry.
        tolerances_mm: surface tolerance for all or per target; else the table's ``tolerance_mm``, else 2 mm.
        lesion_overlap: see :func:`tsfm.evaluation.metrics.lesions`.

    Raises:
        ValueError: grids that differ, values that the table does not have, fractions.
    """
    prediction, truth = as_label_map(prediction, len(table.names), case), np.asarray(truth)
    if prediction.shape != truth.shape:
        raise ValueError(f"{case}: the prediction has shape {prediction.shape}, the truth {truth.shape}")
    counts = count_voxels(prediction, truth, table, dataset)
    boxes = boxes_of(prediction), boxes_of(truth)
    voxel_ml = float(np.prod(spacing_mm)) * upright / 1000
    result = []
    for name, (tp, fp, fn) in counts.items():
        row = dict.fromkeys(COLUMNS)
        row |= {"case": case, "dataset": dataset, "target": name, "status": "ok" if tp + fn else "empty_truth"}
        row |= {"volume_predicted_ml": (tp + fp) * voxel_ml, "volume_true_ml": (tp + fn) * voxel_ml, "lesions": []}
        row["tolerance_mm"] = _tolerance(table, name, tolerances_mm)
        pair = _cut_out(prediction, truth, table, dataset, name, boxes) if tp + fp + fn else None
        if tp + fn:
            row["dice"] = 2 * tp / (2 * tp + fp + fn)
            row["nsd"] = surface_dice(*pair, spacing_mm, row["tolerance_mm"])
        if is_lesion(table, name):
            row["lesions"] = lesions(*pair, spacing_mm, lesion_overlap) if pair else []
            kinds = [lesion["kind"] for lesion in row["lesions"]]
            row |= {f"lesions_{kind}": kinds.count(kind) for kind in ("found", "missed", "false")}
            row["lesions_true"] = row["lesions_found"] + row["lesions_missed"]
        result.append(row)
    return result


def _rows_of(table: LabelTable, dataset: str) -> np.ndarray:
    """(local codes, targets): 1 is, 0 is not, -1 not annotated or ignored."""
    start = table.offset(dataset)
    return table.targets[start : start + len(table.local_ids(dataset))]


def _tolerance(table: LabelTable, target: str, given: Mapping[str, float] | float | None) -> float:
    if isinstance(given, (int, float)):
        return float(given)
    declared = table.entry(target).get("tolerance_mm", DEFAULT_TOLERANCE_MM)
    return float((given or {}).get(target, declared))


def _cut_out(prediction, truth, table, dataset, name, boxes) -> tuple[np.ndarray, np.ndarray]:
    """Both masks of one target inside the box that holds them, ignored voxels taken out."""
    target, codes = table.names.index(name), _rows_of(table, dataset)[:, table.names.index(name)]
    member = table.map_membership()[:, target]
    found = [boxes[0][value - 1] for value in np.flatnonzero(member) if value <= len(boxes[0])]
    found += [boxes[1][code - 1] for code in np.flatnonzero(codes == 1) if code <= len(boxes[1])]
    box = tuple(slice(*side) for side in enclosing(found))
    inside = truth[box]
    return member[prediction[box]] & (codes >= 0)[inside], (codes == 1)[inside]


class ScoreWriter:
    """Files of scores in one folder: every case is written as it ends, whole files appear at the end.

    While running, rows are in ``cases.csv.part`` and ``lesions.csv.part``; `finish` turns them into ``cases.csv`` and
    ``lesions.csv`` and adds ``summary.json`` (per data set and target) and ``scores.md`` (the tables).
    """

    def __init__(self, output_dir: str | Path, table: LabelTable, rank: int = 0) -> None:
        self.folder, self.table, self.rank = Path(output_dir), table, rank
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        self.failed: list[dict[str, str]] = []
        self._part = f".part{rank or ''}"
        self._save({"cases.csv": (COLUMNS, []), "lesions.csv": (LESION_COLUMNS, [])}, "w")

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Keep one case's rows and append them to the files."""
        self.rows += rows
        self._save({"cases.csv": (COLUMNS, rows), "lesions.csv": (LESION_COLUMNS, _lesion_rows(rows))}, "a")

    def fail(self, case: str, error: Exception) -> None:
        """Remember a case that could not be scored; the others go on."""
        logger.error("%s could not be scored: %s", case, error)
        self.failed.append({"case": case, "error": str(error)})

    def finish(
        self, others: Iterable[tuple[list, list]] = (), protocol: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Write the final files; `others` are (rows, failed) of other processes. Returns the summary.

        `protocol` says how the label maps were made; it goes into ``summary.json`` and below the tables.
        """
        for rows, failed in others:
            # A sampler that evens out the processes' shares may have given one case to two of them.
            known = {(row["dataset"], row["case"]) for row in self.rows}
            self.rows += [row for row in rows if (row["dataset"], row["case"]) not in known]
            self.failed += failed
        self._save({"cases.csv": (COLUMNS, self.rows), "lesions.csv": (LESION_COLUMNS, _lesion_rows(self.rows))}, "w")
        lesion_targets = [name for name in self.table.names if is_lesion(self.table, name)]
        summary = {**summarize(self.rows), "lesion_targets": lesion_targets, "failed": self.failed}
        text = f"{table1(self.rows, lesion_targets=lesion_targets)}\n\n{markdown_scores(summary)}\n"
        if protocol:
            summary["protocol"] = dict(protocol)
            text += "\n" + "; ".join(f"{key}: {value}" for key, value in protocol.items()) + ".\n"
        for name, content in (("summary.json", json.dumps(summary, indent=4)), ("scores.md", text)):
            (self.folder / f"{name}.part").write_text(content, encoding="utf-8")
        for name in ("cases.csv", "lesions.csv"):
            os.replace(self.folder / f"{name}{self._part}", self.folder / name)
        for name in ("summary.json", "scores.md"):
            os.replace(self.folder / f"{name}.part", self.folder / name)
        return summary

    def discard(self) -> None:
        """Remove this process's running files (another process writes the final ones)."""
        for name in ("cases.csv", "lesions.csv"):
            (self.folder / f"{name}{self._part}").unlink(missing_ok=True)

    def _save(self, files: Mapping[str, tuple[Sequence[str], list]], mode: str) -> None:
        for name, (columns, rows) in files.items():
            with open(self.folder / f"{name}{self._part}", mode, newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns, extrasaction="ignore")
                if mode == "w":
                    writer.writeheader()
                writer.writerows({key: _rounded(row.get(key)) for key in columns} for row in rows)


def _rounded(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _lesion_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per lesion, from rows per target."""
    keys = ("case", "dataset", "target")
    return [{**{key: row[key] for key in keys}, **lesion} for row in rows for lesion in row["lesions"]]


class CaseScores:
    """Handler for evaluate.json: scores every label map against its truth and writes the files of `ScoreWriter`.

    Needs, per decollated item, the prediction ``output[pred_key]`` (1, X, Y, Z) on the image's own grid (after
    ``Invertd``) and ``batch[label_key]``: the label file (a path, or one path per structure), which is read here and
    compared with the prediction's affine; or raw ids as a tensor on that grid.

    Args:
        output_dir: folder of the results.
        table: the label table.
        dataset: data set of items that name none (default: the table's only one).
        tolerances_mm, lesion_overlap: as for :func:`score_case`.
        targets: score these alone, where inference computed no others; None for all.
        raise_on_failure: raise at the end when a case could not be scored, so that the run ends with an error (a
            `tsfm.inference.prediction.CaseEvaluator` is told of it instead, and raises for all failed cases together).
    """

    def __init__(
        self,
        output_dir: str,
        table: LabelTable | Mapping | str,
        pred_key: str = "pred",
        label_key: str = "label",
        dataset: str | None = None,
        tolerances_mm: Mapping[str, float] | float | None = None,
        lesion_overlap: float = 0.0,
        targets: Sequence[str] | str | None = None,
        raise_on_failure: bool = True,
    ) -> None:
        self.output_dir, self.table, self.dataset = output_dir, as_table(table), dataset
        self.pred_key, self.label_key = pred_key, label_key
        self.tolerances_mm, self.lesion_overlap = tolerances_mm, lesion_overlap
        self.targets = (targets,) if isinstance(targets, str) else targets
        self.raise_on_failure = raise_on_failure
        self.summary: dict[str, Any] = {}

    def attach(self, engine: Engine) -> None:
        """Connect to an evaluator whose ``decollate`` is true."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._score)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _start(self, engine: Engine) -> None:
        self._writer = ScoreWriter(self.output_dir, self.table, idist.get_rank())

    def _score(self, engine: Engine) -> None:
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            prediction = output[self.pred_key]
            name = _case_name(item, prediction)
            try:
                self._writer.add(self._score_one(item, prediction, name))
            except (ValueError, OSError) as error:
                self._writer.fail(name, error)
                if getattr(engine, "results", None):  # CaseEvaluator names failed cases itself, after the last one
                    engine.results[-1]["error"] = f"not scored: {error}"

    def _score_one(self, item: Mapping[str, Any], prediction: Any, name: str) -> list[dict[str, Any]]:
        dataset = item.get("dataset") or self.dataset or only_dataset(self.table)
        affine = np.asarray(prediction.affine) if isinstance(prediction, MetaTensor) else np.eye(4)
        array = np.asarray(prediction.cpu())[0]
        truth, _ = load_truth(item[self.label_key], self.table, dataset, (array, affine, name))
        settings = {"tolerances_mm": self.tolerances_mm, "lesion_overlap": self.lesion_overlap, "case": name}
        rows = score_case(array, truth, self.table, dataset, **_voxel(affine), **settings)
        return [row for row in rows if self.targets is None or row["target"] in self.targets]

    def _finish(self, engine: Engine) -> None:
        parts = idist.all_gather((self._writer.rows, self._writer.failed)) if idist.get_world_size() > 1 else []
        if idist.get_rank() != 0:
            self._writer.discard()
            return
        known = {failure["case"] for failure in self._writer.failed}
        results = [row for row in getattr(engine, "results", []) if "error" in row and row["case"] not in known]
        self._writer.failed += [{"case": row["case"], "error": row["error"]} for row in results]
        self.summary = self._writer.finish(parts[1:], getattr(engine, "protocol", None))
        logger.info("Scores of %d cases in %s", self.summary["cases"], self.output_dir)
        if self._writer.failed and self.raise_on_failure and not hasattr(engine, "results"):
            raise RuntimeError(failure_text(self._writer.failed))


def evaluate_folder(
    predictions: str | Path,
    labels: str | Path | Sequence[Mapping[str, Any]],
    table: LabelTable | Mapping | str,
    output_dir: str | Path,
    dataset: str | None = None,
    tolerances_mm: Mapping[str, float] | float | None = None,
    lesion_overlap: float = 0.0,
) -> dict[str, Any]:
    """Score a folder of label maps against their truths; writes the files of `ScoreWriter`, returns the summary.

    Args:
        predictions: folder of NIfTI label maps (searched with its subfolders), named like the case, image or label
            file, with or without an ending such as ``_seg`` or ``_pred``.
        labels: folder of label files, or pool items with ``label`` and, if they have them, ``case`` and ``dataset``.
        table: the label table, its dict, or the path of a pool.json.
        dataset: data set of items that name none (default: the table's only one).

    Raises:
        FileNotFoundError: predictions that are missing, all named at once, before any case is scored.
        ValueError: grids that differ, all named at once.
        RuntimeError: at the end, when cases could not be scored; the others' results are written.
    """
    table = as_table(table)
    pairs = match_predictions(predictions, labels, dataset)
    writer = ScoreWriter(output_dir, table)
    for pair in pairs:
        try:
            owner = pair["dataset"] or only_dataset(table)
            prediction, affine = load_map(pair["prediction"])
            truth, _ = load_truth(pair["label"], table, owner, (prediction, affine, str(pair["prediction"])))
            settings = {"tolerances_mm": tolerances_mm, "lesion_overlap": lesion_overlap, "case": pair["case"]}
            writer.add(score_case(prediction, truth, table, owner, **_voxel(affine), **settings))
        except (ValueError, OSError, EOFError) as error:
            writer.fail(pair["case"], error)
    summary = writer.finish()
    if writer.failed:
        raise RuntimeError(failure_text(writer.failed))
    return summary


def _voxel(affine: np.ndarray) -> dict[str, Any]:
    """Voxel sides (to 10 nm: NIfTI keeps affines in 32 bits, and a score must not depend on that) and uprightness."""
    return {
        "spacing_mm": tuple(round(side, 5) for side in spacing_of(affine)),
        "upright": round(upright_share(affine), 5),
    }


def failure_text(failed: Sequence[Mapping[str, str]]) -> str:
    """One message that names every case that could not be scored."""
    return f"{len(failed)} case(s) could not be scored: " + "; ".join(f"{f['case']}: {f['error']}" for f in failed)


def only_dataset(table: LabelTable) -> str:
    """The table's only data set, for items that name none."""
    if len(table.datasets) != 1:
        raise ValueError(
            f"the item names no data set and the label table has several; give one of {list(table.datasets)}"
        )
    return table.datasets[0]


def _case_name(item: Mapping[str, Any], prediction: Any) -> str:
    source = prediction.meta.get("filename_or_obj") if isinstance(prediction, MetaTensor) else None
    return str(item.get("case") or (stem(source) if source else "case"))
