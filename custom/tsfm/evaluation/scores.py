"""The scores of one label map against its truth, a row per target.

A *row* is a plain dict about one target of one case: ``case``, ``dataset``, ``target``, ``status`` (``ok``, or
``empty_truth`` where the truth holds nothing of it: no Dice, the predicted volume is all false), ``dice``, ``nsd``,
``tolerance_mm``, ``volume_predicted_ml``, ``volume_true_ml`` and, for lesions, ``lesions_true``, ``lesions_found``,
``lesions_missed``, ``lesions_false`` and ``lesions`` (one entry per lesion). What does not apply is None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..cases.volumes import as_label_map
from ..labels import LabelTable, is_lesion
from ..preparation.resampling import boxes_of, enclosing
from .metrics import lesions, surface_dice

DEFAULT_TOLERANCE_MM = 2.0
"""Surface tolerance of targets that declare none; no source of the paper fixes one."""

COLUMNS = (
    "case", "dataset", "target", "status", "dice", "nsd", "tolerance_mm", "volume_predicted_ml", "volume_true_ml",
    "lesions_true", "lesions_found", "lesions_missed", "lesions_false",
)  # fmt: skip


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
    rows, member = table.rows(dataset), table.map_membership()
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

    Raises:
        ValueError: grids that differ, values that the table does not have, fractions.
    """
    prediction, truth = as_label_map(prediction, len(table.names), case), np.asarray(truth)
    if prediction.shape != truth.shape:
        raise ValueError(
            f"{case}: the prediction has shape {prediction.shape}, the truth {truth.shape} (axes as they are stored)"
        )
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
            row["lesions"] = lesions(*pair, spacing_mm, upright) if pair else []
            kinds = [lesion["kind"] for lesion in row["lesions"]]
            row |= {f"lesions_{kind}": kinds.count(kind) for kind in ("found", "missed", "false")}
            row["lesions_true"] = row["lesions_found"] + row["lesions_missed"]
        result.append(row)
    return result


def _tolerance(table: LabelTable, target: str, given: Mapping[str, float] | float | None) -> float:
    if isinstance(given, (int, float)):
        return float(given)
    declared = table.entry(target).get("tolerance_mm", DEFAULT_TOLERANCE_MM)
    return float((given or {}).get(target, declared))


def _cut_out(prediction, truth, table, dataset, name, boxes) -> tuple[np.ndarray, np.ndarray]:
    """Both masks of one target inside the box that holds them, ignored voxels taken out."""
    target, codes = table.names.index(name), table.rows(dataset)[:, table.names.index(name)]
    member = table.map_membership()[:, target]
    found = [boxes[0][value - 1] for value in np.flatnonzero(member) if value <= len(boxes[0])]
    found += [boxes[1][code - 1] for code in np.flatnonzero(codes == 1) if code <= len(boxes[1])]
    box = tuple(slice(*side) for side in enclosing(found))
    inside = truth[box]
    return member[prediction[box]] & (codes >= 0)[inside], (codes == 1)[inside]


def only_dataset(table: LabelTable) -> str:
    """The table's only data set, for items that name none."""
    if len(table.datasets) != 1:
        raise ValueError(
            f"the item names no data set and the label table has several; give one of {list(table.datasets)}"
        )
    return table.datasets[0]
