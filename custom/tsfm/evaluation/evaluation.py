"""Label maps scored against their truths: as a handler of an evaluation, and for whole folders."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Events
from monai.data import MetaTensor

from ..cases.folders import PoolError, find_images, output_paths
from ..cases.grids import spacing_of, upright_share
from ..cases.raw_ids import from_raw_ids, raw_values
from ..cases.splits import case_digests
from ..inference.prediction import CaseEvaluator, FailedCases
from ..labels import LabelTable
from ..names import counted, unknown_names
from .label_maps import label_maps_in, load_map, load_truth, match_predictions
from .score_files import ScoreWriter
from .scores import only_dataset, score_case
from .tables import format_scores

logger = logging.getLogger(__name__)


class CaseScores:
    """Handler of a `CaseEvaluator`: scores every label map against its truth and writes the files of `ScoreWriter`.

    Needs, per decollated item, the prediction ``output["pred"]`` (1, X, Y, Z) on the image's own grid (after
    ``Invertd``) and ``batch["label"]``: the label file (a path, or one path per structure), which is read here and
    compared with the prediction's affine.

    Args:
        output_dir: folder of the results.
        table: the label table.
        targets: score these alone, where inference computed no others; None for all.
        trained_cases: digests of the cases that the weights were trained on, whose number is told beside the scores.

    The evaluator is told of a case that could not be scored, and raises for all failed cases together.
    """

    def __init__(
        self,
        output_dir: str,
        table: LabelTable,
        targets: Sequence[str] | None = None,
        trained_cases: Collection[str] = (),
    ) -> None:
        self.output_dir, self.table, self.targets = output_dir, table, targets
        self.trained_cases = set(trained_cases)
        self.summary: dict[str, Any] = {}

    def attach(self, engine: CaseEvaluator) -> None:
        """Connect to an evaluator whose ``decollate`` is true."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._score)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _start(self, engine: CaseEvaluator) -> None:
        self._writer, self._remembered = ScoreWriter(self.output_dir, self.table), 0

    def _score(self, engine: CaseEvaluator) -> None:
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            self._remembered += len(self.trained_cases.intersection(case_digests([item])))
            try:
                self._writer.add(self._score_one(item, output["pred"]))
            except (ValueError, OSError) as error:
                self._writer.fail(item["case"], error)
                engine.mark_failed(f"not scored: {error}")

    def _score_one(self, item: Mapping[str, Any], prediction: MetaTensor) -> list[dict[str, Any]]:
        dataset = item.get("dataset") or only_dataset(self.table)
        grid = np.asarray(prediction.cpu())[0], np.asarray(prediction.affine), item["case"]
        rows = _scored(grid, item["label"], self.table, dataset, item["case"])
        return [row for row in rows if self.targets is None or row["target"] in self.targets]

    def _finish(self, engine: CaseEvaluator) -> None:
        known = {failure["case"] for failure in self._writer.failed}
        rows = [row for row in engine.failed if row["case"] not in known]
        self._writer.failed += [{"case": row["case"], "error": row["error"]} for row in rows]
        protocol = dict(engine.protocol)
        if self._remembered:
            protocol["cases that the weights were trained on"] = str(self._remembered)
        self.summary = self._writer.finish(protocol)
        cases, table = counted(self.summary["cases"], "case"), format_scores(self.summary)
        logger.info("Scores of %s in %s\n%s", cases, self.output_dir, table)


def items_to_score(
    items: Sequence[Mapping[str, Any]],
    output_dir: str,
    existing: str = "overwrite",
    save: str | Sequence[str] = "label_map",
    parts: int = 1,
    clicks: Mapping[str, Any] | None = None,
    trained_cases: Collection[str] = (),
) -> Sequence[Mapping[str, Any]]:
    """The `items` of an evaluation, once it is sure that each of them can be computed, written and scored here.

    Args:
        existing: "overwrite", or "error": nothing of earlier runs is replaced.
        save: what will be written of each case.
        parts, clicks: as for `find_images`: scores are made by one process, of what is found without clicks.
        trained_cases: digests of the cases that the weights were trained on; a warning says which are scored.

    Raises:
        PoolError: no item.
        FileExistsError: what is there would be lost.
        ValueError: another `existing`; several `parts`; clicks; as `find_images`.
    """
    if not items:
        raise PoolError(
            "no case to score: this fold holds none out (with --fold all every case trains); choose another --fold"
        )
    if existing == "skip":
        raise ValueError(
            "existing is 'skip', but an evaluation computes what it scores; expected 'overwrite' or 'error'"
        )
    apart = "segment the folder with inference.json alone and score it with python -m tsfm evaluate"
    if parts > 1:
        raise ValueError(
            f"this is one of {parts} processes, and scores are made by one: start a single one, or {apart}"
        )
    if clicks:
        raise ValueError(f"clicks for {list(clicks)}, and an evaluation scores what is found without: {apart}")
    find_images(items, output_dir, "overwrite", save)
    written = [
        Path(output_dir, "summary.json"),
        *(p for one in items for p in output_paths(output_dir, one["case"], save)),
    ]
    if existing == "error" and (there := [path for path in written if path.exists()]):
        raise FileExistsError(
            f"{there[0]} is already there: choose another --output_dir, or set existing to 'overwrite'"
        )
    known = set(trained_cases)
    if seen := [item["case"] for item, digest in zip(items, case_digests(items), strict=True) if digest in known]:
        logger.warning(
            "the weights were trained on %d of the %d cases to score, for example %s, and will score too well there: give each "
            "fold's weights alone the cases that it holds out (--fold)",
            len(seen), len(items), seen[0],
        )  # fmt: skip
    return items


def evaluate_folder(
    predictions: str | Path,
    labels: str | Path | Sequence[Mapping[str, Any]],
    table: LabelTable,
    output_dir: str | Path,
    dataset: str | None = None,
    tolerances_mm: Mapping[str, float] | float | None = None,
    raw_ids: str | None = None,
) -> dict[str, Any]:
    """Score a folder of label maps against their truths; writes the files of `ScoreWriter`, returns the summary.

    Args:
        predictions: folder of NIfTI label maps (searched with its subfolders), named like the case, image or label
            file, with or without an ending such as ``_seg`` or ``_pred``.
        labels: folder of label files, or pool items with ``label`` and, if they have them, ``case`` and ``dataset``.
        table: the label table.
        dataset: data set of items that name none (default: the table's only one).
        raw_ids: the data set in whose own ids the predictions are; None where they are the table's values.

    Raises:
        FileNotFoundError: predictions that are missing, all named at once, before any case is scored.
        ValueError: grids that differ, all named at once; `raw_ids`, a data set or targets that the table does not know.
        FailedCases: at the end, when cases could not be scored; the others' results are written.
    """
    if raw_ids is not None:
        raw_values(table, raw_ids)  # a data set without ids is refused
    if dataset is not None:
        table.local_ids(dataset)  # an unknown one is refused
    if isinstance(tolerances_mm, Mapping) and (unknown := unknown_names(tolerances_mm, table.names)):
        raise ValueError(f"tolerances_mm for unknown targets {unknown}; the targets are {list(table.names)}")
    pairs = match_predictions(predictions, labels, dataset)
    if others := sorted({*label_maps_in(predictions)} - {pair["prediction"] for pair in pairs}):
        logger.warning("label maps without a truth, which are not scored: %d, for example %s", len(others), others[0])
    writer = ScoreWriter(output_dir, table)
    for pair in pairs:
        try:
            owner = pair["dataset"] or only_dataset(table)
            prediction, affine = load_map(pair["prediction"])
            if raw_ids is not None:
                table.encode(raw_ids, prediction, str(pair["prediction"]))  # refuses ids that mean nothing
                prediction = from_raw_ids(prediction, table, raw_ids)
            grid = prediction, affine, str(pair["prediction"])
            writer.add(_scored(grid, pair["label"], table, owner, pair["case"], tolerances_mm))
        except (ValueError, OSError, EOFError) as error:
            writer.fail(pair["case"], error)
    summary = writer.finish()
    if writer.failed:
        listed = "; ".join(f"{failure['case']}: {failure['error']}" for failure in writer.failed)
        raise FailedCases(f"{counted(len(writer.failed), 'case')} could not be scored: {listed}")
    return summary


def _scored(
    grid: tuple[np.ndarray, np.ndarray, str], label: Any, table: LabelTable, dataset: str, case: str, tolerances_mm=None
) -> list[dict[str, Any]]:
    """The rows of one case; `grid`: prediction, affine and name, as for `load_truth`.

    Voxel sides count to 10 nm: NIfTI keeps affines in 32 bits, and a score must not depend on that.
    """
    prediction, affine, _ = grid
    truth = load_truth(label, table, dataset, grid)
    spacing_mm = tuple(round(side, 5) for side in spacing_of(affine))
    upright = round(upright_share(affine), 5)
    return score_case(prediction, truth, table, dataset, spacing_mm, tolerances_mm, case, upright)
