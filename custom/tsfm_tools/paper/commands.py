"""The paper's tables as commands: what is missing of a grid is run, and the table made anew after each run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .grid_files import Grid, Run, listed
from .grids import GridRunner
from .tables import transfer_png, write_tables

PAPER_EPOCHS = (10, 20, 50, 100)


def run_grid(runner: GridRunner, name: str, run: bool = True) -> str:
    """Run what is missing and can run, write the tables after each run, and return the Markdown.

    With `run` False only what is done already is shown.
    """
    results: list[dict[str, Any]] = []
    obstacles: dict[str, list[Run]] = {}
    for one in runner.runs:
        if reason := runner.obstacle(one):
            obstacles.setdefault(reason, []).append(one)
    hindered = [one for runs in obstacles.values() for one in runs]
    text = write_tables(runner.grid, results, obstacles, runner.output_dir, name)
    for one in runner.runs:
        is_run = run and one not in hindered
        scores = runner.scores(one) if is_run else runner.record(one).get("scores")
        if scores is not None:
            key = {"row": one.row["id"], "dataset": one.dataset, "epochs": one.epochs, "seed": one.seed}
            results.append({**key, "scores": scores})
            text = write_tables(runner.grid, results, obstacles, runner.output_dir, name)
    if results:
        transfer_png(runner.grid, results, runner.output_dir / f"{name}.png")
    return text


def table1(dataset_dir: str, output_dir: str = "tables", **options: Any) -> str:
    """The paper's Table 1: run what is missing and can run, and print our figures beside the paper's.

    Args:
        dataset_dir: folder that holds the data sets' folders.
        output_dir: runs (``cells``) and tables; one folder may serve all three tables.
        options: ``bundles_dir``, the folder of the two bundles (``bundles``); ``grid``, a grid file of your own in place of
            the paper's; ``weights``, files of weights that the grid names, which are else trained first or marked as absent
            (``{'pool': 'model.pt', 'stunet_h': 'huge_ep4k.model', 'sam_med3d': 'sam_med3d_turbo.pth'}``); ``overlays``,
            further configs for every training run, over the grid's; ``run``, False to print the table as far as it has been
            run; and any id of train.json that the grid does not set, for every training run.
    """
    return _paper_table("table1", dataset_dir, output_dir, **options)


def table2(dataset_dir: str, output_dir: str = "tables", **options: Any) -> str:
    """The paper's Table 2, transfer; the arguments are those of `table1`."""
    return _paper_table("table2", dataset_dir, output_dir, **options)


def table3(dataset_dir: str, output_dir: str = "tables", **options: Any) -> str:
    """The paper's Table 3, what it was pretrained on; the arguments are those of `table1`."""
    return _paper_table("table3", dataset_dir, output_dir, **options)


def _paper_table(
    name: str,
    dataset_dir: str,
    output_dir: str,
    bundles_dir: str = "bundles",
    grid: str | None = None,
    weights: Mapping[str, str] | None = None,
    overlays: Sequence[str] | str = (),
    run: bool = True,
    **settings: Any,
) -> str:
    declared = Grid(grid or Path(__file__).parent / f"{name}.json", bundles_dir)
    return run_grid(GridRunner(declared, dataset_dir, output_dir, weights, overlays, settings), name, run)


def transfer_table(
    pretrained: str,
    dataset_dir: str,
    output_dir: str,
    bundle_dir: str = "bundles/tsfm_finetune",
    epochs: Sequence[int] | int = PAPER_EPOCHS,
    seeds: Sequence[int] | int = (0,),
    overlays: Sequence[str] | str = (),
    name: str | None = None,
    **settings: Any,
) -> str:
    """Table 2 on one data set of your own: from `pretrained` and from scratch for each number of `epochs` and each seed.

    Args:
        pretrained: weights of the pretraining; "from scratch" uses the same network without them.
        dataset_dir: the downstream data set, as for the bundle.
        output_dir: cells, ``table2.md``, ``table2.csv`` and a plot of Dice over epochs.
        bundle_dir: the fine-tuning bundle.
        epochs, seeds: the grid, one or several each. One split (``--fold`` or ``--splits_file``) serves all cells.
        overlays: further configs that describe the data (``brats2020.json``), over train.json and evaluate.json.
        name: the data set's name in the table.
        settings: any other id of the bundle's train.json, for all cells.

    Returns:
        the table as Markdown.
    """
    bundle, lengths = Path(os.path.abspath(bundle_dir)), sorted(listed(epochs))
    title = name or Path(dataset_dir).resolve().name
    row = {
        "bundle": bundle.name,
        "weights": "pretrained",
        "datasets": ["data"],
        "epochs": lengths,
        "seeds": listed(seeds),
    }
    content = {
        "title": f"Transfer to {title}",
        "datasets": {"data": {"name": title, "overlays": listed(overlays)}},
        "columns": [{"name": title, "block": title, "dataset": "data", "epochs": lengths}],
        "weights": {"pretrained": {"file": str(pretrained)}},
        "rows": [
            {"id": "pretrained", "name": "TSFM, pretrained", **row},
            {"id": "scratch", "name": "TSFM, from scratch", **row, "options": {"from_scratch": True}},
        ],
    }
    grid = Grid(content, bundle.parent)
    return run_grid(GridRunner(grid, dataset_dir, output_dir, {"pretrained": pretrained}, settings=settings), "table2")
