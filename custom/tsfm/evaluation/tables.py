"""Tables: the summary of scored rows, and Markdown in the shape of the paper's Table 1.

Rows are the plain dicts of :mod:`tsfm.evaluation.scores`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..labels import LESION_ENDINGS
from ..names import counted


def load_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows (or results) back from a CSV file; empty cells are None, numbers are numbers."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: _value(key, text) for key, text in row.items()} for row in csv.DictReader(file)]


def _value(key: str, text: str) -> Any:
    if key in ("case", "dataset", "target", "status", "kind", "row"):
        return text
    if text == "":
        return None
    return int(text) if text.lstrip("-").isdigit() else float(text)


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per data set and target: counts, Dice and surface Dice (mean, sd, median, min, max), volumes, lesions.

    Cases without the target are counted under ``empty_truth`` with the volume that was predicted there, and enter no
    mean; ``false_positives`` has the share of them in which the target was painted, and statistics of those volumes. ``mean`` is over the (data set, target) pairs that have a value. Everything is plain JSON, never NaN.
    """
    groups: dict[str, dict[str, list]] = {}
    for row in rows:
        groups.setdefault(row["dataset"], {}).setdefault(row["target"], []).append(row)
    datasets = {name: {target: _summary(part) for target, part in parts.items()} for name, parts in groups.items()}
    entries = [entry for parts in datasets.values() for entry in parts.values()]
    means = {key: [entry[key]["mean"] for entry in entries if entry[key]] for key in ("dice", "nsd")}
    means = {key: float(np.mean(values)) if values else None for key, values in means.items()}
    cases = len({(row["dataset"], row["case"]) for row in rows})
    return {"cases": cases, "mean": means, "datasets": datasets}


def format_scores(summary: dict[str, Any]) -> str:
    """One line per target of an evaluation's ``summary.json``: Dice over all data sets' cases, lesions found."""
    lines = []
    targets = dict.fromkeys(target for part in summary["datasets"].values() for target in part)
    for target in targets:
        entries = [part[target] for part in summary["datasets"].values() if target in part]
        scored = [(entry["dice"]["mean"], entry["cases"]) for entry in entries if entry["dice"]]
        cases = sum(count for _, count in scored)
        dice = f"{sum(mean * count for mean, count in scored) / cases:.2f}" if cases else "-"
        line = f"{target:14} Dice {dice} in {counted(cases, 'case')}"
        counts = [entry["lesions"] for entry in entries if "lesions" in entry]
        if counts:
            found, true, false = (sum(count[key] for count in counts) for key in ("found", "true", "false"))
            line += f"; {found} of {true} found, {false} false"
        lines.append(line)
    return "\n".join(lines)


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    empty = [row for row in rows if row["status"] == "empty_truth"]
    false_ml = [row["volume_predicted_ml"] for row in empty]
    entry: dict[str, Any] = {"cases": len(rows) - len(empty), "empty_truth": len(empty)}
    entry["empty_truth_predicted_ml"] = sum(false_ml)
    entry["empty_truth_clean"] = sum(volume == 0 for volume in false_ml)
    painted = [volume for volume in false_ml if volume > 0]
    share = len(painted) / len(empty) if empty else None
    entry["false_positives"] = {"cases": len(painted), "share": share, "ml": _statistics(painted)}
    entry["tolerance_mm"] = sorted({row["tolerance_mm"] for row in rows})
    for key in ("dice", "nsd", "volume_predicted_ml", "volume_true_ml"):
        entry[key] = _statistics([row[key] for row in rows if row["status"] == "ok" and row[key] is not None])
    if any(row.get("lesions_true") is not None for row in rows):
        counted = [row for row in rows if row.get("lesions_true") is not None]
        true, found, missed, false = (
            sum(int(row[f"lesions_{kind}"]) for row in counted) for kind in ("true", "found", "missed", "false")
        )
        entry["lesions"] = {"true": true, "found": found, "missed": missed, "false": false}
        entry["lesions"]["sensitivity"] = found / true if true else None
        entry["lesions"]["false_per_case"] = false / len(counted)
    return entry


def _statistics(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    array = np.asarray(values, float)
    parts = {"mean": array.mean(), "median": np.median(array), "min": array.min(), "max": array.max()}
    # One case has no spread; a sample's standard deviation divides by n - 1.
    parts["sd"] = array.std(ddof=1) if len(array) > 1 else 0.0
    return {key: float(value) for key, value in parts.items()}


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    clean = lambda cells: "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"  # noqa: E731
    return "\n".join([clean(header), "|---|" + "---:|" * (len(header) - 1), *map(clean, rows)])


def markdown_scores(summary: Mapping[str, Any]) -> str:
    """One line per data set and target: cases, Dice, surface Dice, lesions."""
    lines = []
    for dataset, parts in summary["datasets"].items():
        for target, entry in parts.items():
            lesions = entry.get("lesions")
            tolerance = "/".join(f"{value:g}" for value in entry["tolerance_mm"])
            lines.append([
                f"{dataset}: {target}", entry["cases"], entry["empty_truth"], _with_spread(entry["dice"], entry["cases"]),
                f"{entry['dice']['median']:.4f}" if entry["dice"] else "-", _with_spread(entry["nsd"], entry["cases"]), tolerance,
                f"{lesions['found']}/{lesions['true']}" if lesions else "-",
                f"{lesions['false_per_case']:.2f}" if lesions else "-",
                _false_positives(entry),
            ])  # fmt: skip
    header = [
        "data set: target", "cases", "without it", "Dice, mean ± sd", "median", "surface Dice, mean ± sd",
        "tolerance mm", "lesions found", "false per case", "painted in cases without it (median, largest ml)",
    ]  # fmt: skip
    return markdown(header, lines)


def score_notes(summary: Mapping[str, Any]) -> str:
    """A footnote of `markdown_scores`: what its "-" mean, as far as there are some; else empty."""
    entries = [entry for parts in summary["datasets"].values() for entry in parts.values()]
    lesion = ", ".join(LESION_ENDINGS)
    notes = {
        f'for lesions where a target is none (its name ends in none of {lesion}, and its entry in the pool file has no "lesion": '
        "true)": any("lesions" not in entry for entry in entries),
        "for Dice where no case has the target": any(not entry.get("dice") for entry in entries),
        "for sd where a single case has it": any(entry.get("dice") and entry["cases"] == 1 for entry in entries),
    }  # fmt: skip
    found = [note for note, occurs in notes.items() if occurs]
    return f'"-" stands {"; ".join(found)}.' if found else ""


def _false_positives(entry: Mapping[str, Any]) -> str:
    found = entry["false_positives"]
    if found["share"] is None:
        return "-"
    volumes = f" ({found['ml']['median']:.3g}, {found['ml']['max']:.3g})" if found["ml"] else ""
    return f"{found['cases']}/{entry['empty_truth']} = {found['share']:.0%}{volumes}"


def _with_spread(statistics: Mapping[str, float] | None, cases: int) -> str:
    """Mean and sd; one case has no sd."""
    if not statistics:
        return "-"
    return f"{statistics['mean']:.4f} ± {statistics['sd']:.4f}" if cases > 1 else f"{statistics['mean']:.4f} ± -"


def table1(summary: Mapping[str, Any], lesion_targets: Sequence[str]) -> str:
    """Mean Dice per data set and target, the mean over the `lesion_targets` last: a line of the paper's Table 1.

    As there, only data sets with a lesion target are listed; where there is none, all are.
    """
    dice = {
        (name, target): entry["dice"] for name, part in summary["datasets"].items() for target, entry in part.items()
    }
    with_lesion = {dataset for dataset, target in dice if target in lesion_targets}
    columns = [column for column in dice if not with_lesion or column[0] in with_lesion]
    means = {column: dice[column]["mean"] for column in columns if dice[column]}
    chosen = [value for (_, target), value in means.items() if not with_lesion or target in lesion_targets]
    cells = [f"{means[column]:.4f}" if column in means else "-" for column in columns]
    header = ["", *(f"{dataset}: {target}" for dataset, target in columns)]
    header.append("mean Dice for tumor" if with_lesion else "mean Dice")
    return markdown(header, [["TSFM", *cells, f"{np.mean(chosen):.4f}" if chosen else "-"]])
