"""Results of a grid's runs become Markdown in the paper's shape, CSV and a picture.

A result is ``{"row": id, "dataset", "epochs", "seed", "scores": {data set: {target: Dice}}}``.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tsfm.evaluation.tables import markdown
from tsfm.files import write_text

from .grid_files import Column, Grid, Run

FIELDS = ("row", "dataset", "target", "epochs", "seed", "dice")


def figures(
    grid: Grid, row: Mapping[str, Any], column: Column, results: Sequence[Mapping[str, Any]]
) -> dict[int, float]:
    """Seed -> a row's Dice in a column. A mean over columns needs all of them."""
    if column.mean_of:
        parts = [figures(grid, row, other, results) for other in _parts(grid, column)]
        seeds = set.intersection(*map(set, parts)) if parts else ()
        return {seed: float(np.mean([part[seed] for part in parts])) for seed in seeds}
    found = {}
    for seed, part in _scores(grid, row, column, results):
        values = [part.get(target) for target in column.targets or part]
        if values and None not in values:
            found[seed] = float(np.mean(values))
    return found


def _parts(grid: Grid, column: Column) -> list[Column]:
    """The columns that a mean is over, after as many epochs as it; none where one of them has no such epochs."""
    parts = [
        other._replace(epochs=other.epochs or column.epochs)
        for other in grid.columns
        if other.name in column.mean_of and (None in (other.epochs, column.epochs) or other.epochs == column.epochs)
    ]
    return parts if {part.name for part in parts} == set(column.mean_of) else []


def _scores(
    grid: Grid, row: Mapping[str, Any], column: Column, results: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[int, Mapping[str, float]]]:
    """(seed, target -> Dice on the column's data set) of a row's results after the column's epochs.

    What was trained on a folder alone may call that data set otherwise.
    """
    for result in results:
        fits = column.epochs in (None, result["epochs"]) and column.dataset in grid.covers(result["dataset"])
        if result["row"] == row["id"] and fits:
            scores = result["scores"]
            is_alone = len(scores) == 1 and column.dataset == result["dataset"]
            yield result["seed"], scores.get(column.dataset) or (next(iter(scores.values())) if is_alone else {})


def is_asked(grid: Grid, row: Mapping[str, Any], column: Column) -> bool:
    """Whether the runs of a row give a column's figure."""
    if column.mean_of:
        parts = _parts(grid, column)
        return bool(parts) and all(is_asked(grid, row, other) for other in parts)
    epochs = column.epochs is None or column.epochs in row.get("epochs", ())
    return epochs and any(column.dataset in grid.covers(dataset) for dataset in row["datasets"])


def is_scored(grid: Grid, row: Mapping[str, Any], column: Column, results: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the runs that could give a figure were scored: one that is absent all the same is of targets they do not know."""
    if column.mean_of:
        return all(is_scored(grid, row, other, results) for other in _parts(grid, column))
    return any(part for _, part in _scores(grid, row, column, results))


def table(grid: Grid, results: Sequence[Mapping[str, Any]], obstacles: Mapping[str, Sequence[Run]]) -> str:
    """Rows down, columns across in the grid's blocks, the paper's figure beside each of ours; below, what the grid notes,
    and what hinders which runs.

    `obstacles`: reason -> runs that it keeps from running. Nothing is ranked: prompted rows would not compare.
    """
    blocks = []
    for block in dict.fromkeys(column.block for column in grid.columns):
        header, cells = [block], [[row["name"]] for row in grid.rows]
        for column in (column for column in grid.columns if column.block == block):
            printed = [grid.in_print(row, column) for row in grid.rows]
            is_printed = any(figure is not None for figure in printed)
            header += [column.label, "paper"] if is_printed else [column.label]
            for line, row, figure in zip(cells, grid.rows, printed, strict=True):
                values = list(figures(grid, row, column, results).values())
                is_due = is_asked(grid, row, column) and not is_scored(grid, row, column, results)
                line.append(_with_spread(values) if values else "not run" if is_due else "-")
                line += ["-" if figure is None else f"{figure:.4f}"] if is_printed else []
        blocks.append(markdown(header, cells))
    notes = ["Dice; mean ± standard deviation where there are several seeds."]
    if any(row.get("paper") for row in grid.rows):
        notes.append(
            'Figures under "paper" are quoted from it; its splits into training and test cases are not published.'
        )
    notes += grid.notes
    for reason, runs in obstacles.items():
        names = dict.fromkeys(f"{run.row['name']} on {grid.datasets[run.dataset]['name']}" for run in runs)
        notes.append(f"Not run, {reason}: {', '.join(names)}.")
    return "\n\n".join([f"**{grid.title}**", *blocks, "\n".join(f"- {note}" for note in notes)])


def _with_spread(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"


def write_tables(
    grid: Grid,
    results: Sequence[Mapping[str, Any]],
    obstacles: Mapping[str, Sequence[Run]],
    output_dir: str | Path,
    name: str,
) -> str:
    """Markdown and CSV (a line per run and target); returns the Markdown."""
    folder, text = Path(output_dir), table(grid, results, obstacles)
    write_text(folder / f"{name}.md", text + "\n")
    with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        for result in results:
            for dataset, scores in result["scores"].items():
                for target, dice in scores.items():
                    writer.writerow([result["row"], dataset, target, result["epochs"], result["seed"], dice])
    return text


def transfer_png(grid: Grid, results: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Dice over epochs, one panel per block, mean and single seeds; a row of one length is a dashed line.

    Nothing is drawn of a grid whose columns are not numbers of epochs.
    """
    blocks = list(dict.fromkeys(column.block for column in grid.columns if column.epochs))
    if not blocks:
        return
    picture = Figure(figsize=(4.6 * len(blocks), 3.8), dpi=110, layout="constrained")
    FigureCanvasAgg(picture)
    for axes, block in zip(picture.subplots(1, len(blocks), squeeze=False)[0], blocks, strict=True):
        ticks = set()
        for number, row in enumerate(grid.rows):
            columns = [column for column in grid.columns if column.block == block]
            points = {column.epochs: list(figures(grid, row, column, results).values()) for column in columns}
            points = {epochs: values for epochs, values in points.items() if values}
            means, look = [np.mean(values) for values in points.values()], {"color": f"C{number}", "label": row["name"]}
            if len(row.get("epochs", ())) == 1 and len(columns) > 1 and means:
                axes.axhline(means[0], linestyle="--", **look)
            elif means:
                axes.plot(list(points), means, marker="o", **look)
                ticks |= set(points)
                for epochs, values in points.items():
                    axes.scatter([epochs] * len(values), values, color=look["color"], s=12, alpha=0.45)
        axes.set_xscale("log")
        axes.set_xticks(sorted(ticks), [str(tick) for tick in sorted(ticks)])
        axes.minorticks_off()
        axes.set(title=block, xlabel="epochs of transfer training", ylabel="Dice")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, loc="lower right")
    picture.savefig(path)
