"""The paper's tables 2 and 3: rows of runs become Markdown, CSV and a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tsfm.evaluation.tables import markdown

ROW_NAMES = {"pretrained": "TSFM, pretrained", "scratch": "TSFM, from scratch"}


def cells_of(results: Sequence[Mapping[str, Any]], row: str, column: str) -> dict[tuple, list[float]]:
    """(dataset, row, column) -> Dice of all seeds, in the order of the results."""
    cells: dict[tuple, list[float]] = {}
    for result in results:
        if result["dice"] is not None:
            cells.setdefault((result["dataset"], result[row], result[column]), []).append(float(result["dice"]))
    return cells


def _cell(values: Sequence[float] | None) -> str:
    if not values:
        return "-"
    spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"


def table2(results: Sequence[Mapping[str, Any]]) -> str:
    """Transfer, one block per data set: methods down, epochs across, mean ± sd over seeds (the paper's Table 2).

    Results with ``epochs: None`` (a reference of another length, as its name says) stand in a last column.
    """
    cells = cells_of(results, "initialization", "epochs")
    blocks = []
    for dataset in dict.fromkeys(key[0] for key in cells):
        mine = {key[1:]: values for key, values in cells.items() if key[0] == dataset}
        columns = sorted({epoch for _, epoch in mine}, key=lambda epoch: (epoch is None, epoch))
        header = [dataset, *("as named" if epoch is None else f"{epoch} epochs" for epoch in columns)]
        methods = dict.fromkeys(name for name, _ in mine)
        lines = [[ROW_NAMES.get(name, name), *(_cell(mine.get((name, e))) for e in columns)] for name in methods]
        blocks.append(markdown(header, lines))
    return "\n\n".join([*blocks, _seeds(cells.values())])


def table3(results: Sequence[Mapping[str, Any]]) -> str:
    """Ablation of the pool: pretraining down, downstream data sets across, mean ± sd over seeds (Table 3)."""
    cells = {(key[1], key[0]): values for key, values in cells_of(results, "pretraining", "pretraining").items()}
    datasets = list(dict.fromkeys(dataset for _, dataset in cells))
    names = dict.fromkeys(name for name, _ in cells)
    lines = [[name, *(_cell(cells.get((name, dataset))) for dataset in datasets)] for name in names]
    return markdown(["pretrained on", *datasets], lines) + "\n\n" + _seeds(cells.values())


def _seeds(groups: Iterable[Sequence[float]]) -> str:
    counts = sorted({len(values) for values in groups})
    return f"Dice; mean ± standard deviation over seeds (seeds per cell: {', '.join(map(str, counts))})."


def csv_text(results: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The results as CSV, one line per run."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(results)
    return buffer.getvalue()


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
