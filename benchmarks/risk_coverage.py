"""Does the word of doubt mean something? Risk over coverage on scored cases, and the area under it (AURC).

Cases are kept from the surest to the most doubtful; the risk at a coverage is the mean of 1 - Dice over those kept. A useful
order has a small area; "best possible" orders by the Dice itself, "random" is the mean risk of all. Each folder is one of
evaluate.json, which leaves ``cases.csv`` and ``report.json``.

    python benchmarks/risk_coverage.py --evaluations hippocampus=DIR sarcoma=DIR --picture risk_coverage.png
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from tsfm.cases.folders import read_report
from tsfm.inference.quality import doubt


def read(folder: Path) -> dict[str, np.ndarray]:
    """Risk of each case, and its doubt by each estimate."""
    dice: dict[str, list[float]] = {}
    with (folder / "cases.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["dice"]:
                dice.setdefault(row["case"], []).append(float(row["dice"]))
    report = read_report(folder)
    cases = [case for case in dice if "quality" in report.get(case, {})]  # empty: no version paints anything, no doubt
    qualities = [report[case]["quality"] for case in cases]
    return {
        "risk": np.array([1 - np.mean(dice[case]) for case in cases]),
        "disagreement": np.array([doubt(rows) for rows in qualities]),
        "entropy": np.array([np.mean([row["entropy"] for row in rows.values()] or [0.0]) for rows in qualities]),
    }


def curve(risk: np.ndarray, doubts: np.ndarray) -> np.ndarray:
    """Mean risk of the 1, 2, ... surest cases."""
    return np.cumsum(risk[np.argsort(doubts, kind="stable")]) / np.arange(1, len(risk) + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluations", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    print(
        "| data | cases | AURC, disagreement of mirrored versions | entropy | random | best possible | rank correlation |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    curves = {}
    for entry in options.evaluations:
        name, folder = entry.split("=", 1)
        found = read(Path(folder))
        risk = found["risk"]
        lines = {kind: curve(risk, found[kind]) for kind in ("disagreement", "entropy")}
        lines["best possible"] = curve(risk, risk)
        ranks = [np.argsort(np.argsort(values)) for values in (risk, found["disagreement"])]
        areas = [f"{lines['disagreement'].mean():.4f}", f"{lines['entropy'].mean():.4f}", f"{risk.mean():.4f}"]
        areas += [f"{lines['best possible'].mean():.4f}", f"{np.corrcoef(*ranks)[0, 1]:.2f}"]
        print(f"| {name} | {len(risk)} | {' | '.join(areas)} |")
        curves[name] = (risk, lines)
    if options.picture:
        draw(curves, options.picture)


def draw(curves: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((4.8 * len(curves), 3.4), layout="constrained", dpi=130)
    for axes, (name, (risk, lines)) in zip(np.atleast_1d(figure.subplots(1, len(curves))), curves.items(), strict=True):
        coverage = np.arange(1, len(risk) + 1) / len(risk)
        for kind, values in lines.items():
            axes.plot(coverage, values, label=kind, linestyle=":" if kind == "best possible" else "-")
        axes.axhline(risk.mean(), color="gray", linewidth=0.8, label="random")
        axes.set(title=name, xlabel="share of cases kept, surest first", ylabel="mean of 1 - Dice")
        axes.legend(fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
