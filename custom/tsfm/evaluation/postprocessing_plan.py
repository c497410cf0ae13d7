"""nnU-Net's choice of post-processing: keep largest components where cross-validation shows that it helps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ..cases.volumes import as_label_map
from ..inference.postprocessing import apply
from ..labels import LabelTable
from .label_maps import load_map, load_truth
from .scores import count_voxels, only_dataset

FOREGROUND = "all foreground"


def determine(pairs: Sequence[Mapping[str, Any]], table: LabelTable) -> dict[str, Any]:
    """The plan that cross-validation supports.

    A removed voxel becomes the target that contains the removed one (a false tumor in the liver is liver again), or
    background where there is none; nnU-Net knows background only.

    Args:
        pairs: what `match_predictions` found; the files are read one at a time. A prediction holds the targets that its
            data set (None: the table's only one) annotates. Dice counts these only; a case without the target in both
            prediction and truth counts nowhere, as in nnU-Net.
        table: the label table.

    Raises:
        ValueError: maps that do not fit the table.
    """
    pairs = [{**pair, "dataset": pair["dataset"] or only_dataset(table)} for pair in pairs]
    plan: dict[str, Any] = {"targets": list(table.names), "steps": [], "evidence": []}
    before = _mean_dice(pairs, table, plan["steps"])
    for candidate in _candidates(table, {name for pair in pairs for name in table.annotated(pair["dataset"])}):
        after = _mean_dice(pairs, table, [*plan["steps"], candidate])
        kept = _helps(candidate["target"], before, after)
        plan["evidence"].append({"target": candidate["target"], "kept": kept, "before": before, "after": after})
        if kept:
            plan["steps"].append(candidate)
            before = after
    return plan


def _candidates(table: LabelTable, annotated: Collection[str]) -> list[dict[str, Any]]:
    """All foreground, then every target in declared order; a single target is all foreground already.

    All foreground needs those of the `annotated` targets that lie in no other of them.
    """
    number, member = len(table.names), table.map_membership()
    around = [[value + 1 for value in table.ancestors(target)] for target in range(number)]
    known = [table.names.index(name) + 1 for name in table.names if name in annotated]
    outer = [table.names[value - 1] for value in known if not set(around[value - 1]) & set(known)]
    steps = [{"target": FOREGROUND, "values": list(range(1, number + 1)), "fill": 0, "needs": outer}]
    for target, name in enumerate(table.names if number > 1 else ()):
        nearest, *farther = around[target] or [0]
        step = {"target": name, "values": np.flatnonzero(member[:, target]).tolist(), "fill": nearest, "needs": [name]}
        steps.append({**step, **({"farther": farther} if farther else {})})
    return steps


def _helps(target: str, before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """Whether that target strictly rises; of all foreground, the mean, and no target falls.

    A target left without any Dice to compare forbids the latter.
    """
    if target != FOREGROUND:
        return target in before and target in after and after[target] > before[target]
    means = [float(np.mean(list(dice.values()))) if dice else 0.0 for dice in (before, after)]
    same = before.keys() == after.keys()
    return same and means[1] > means[0] and all(after[name] >= before[name] for name in before)


def _mean_dice(
    pairs: Sequence[Mapping[str, Any]], table: LabelTable, steps: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Target -> mean Dice over the cases where truth or the *processed* prediction holds it."""
    values: dict[str, list[float]] = {}
    for pair in pairs:
        dataset, name = pair["dataset"], str(pair["prediction"])
        array, affine = load_map(name)
        array = as_label_map(array, len(table.names), name)
        codes = load_truth(pair["label"], table, dataset, (array, affine, name))
        processed = apply(array, {"targets": table.names, "steps": steps}, table.annotated(dataset))
        for name, (tp, fp, fn) in count_voxels(processed, codes, table, dataset).items():
            if tp + fp + fn:
                values.setdefault(name, []).append(2 * tp / (2 * tp + fp + fn))
    return {name: float(np.mean(dice)) for name, dice in values.items()}
