"""Grids of fine-tuning runs: the paper's Table 2 (pretrained or from scratch x epochs) and Table 3 (which pool).

A cell is one run of the `tsfm_finetune` bundle (train, then segment and score the validation cases whole) in its own
folder. A cell that is done is kept, an interrupted one resumes; the tables are made anew after every cell.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import monai
from tsfm.errors import first_cause
from tsfm.files import atomic_write
from tsfm.schema import read_json
from tsfm.training.weight_files import CheckpointError

logger = logging.getLogger(__name__)

PAPER_EPOCHS = (10, 20, 50, 100)


def run_bundle(bundle_dir: str | os.PathLike, configs: Sequence[str], **overrides: Any) -> None:
    """``python -m monai.bundle run`` in this process: `configs` are names in the bundle's configs folder, or paths.

    An error is raised as what it was before MONAI wrapped it.
    """
    folder = Path(bundle_dir) / "configs"
    files = [str(folder / name) if (folder / name).is_file() else str(name) for name in configs]
    try:
        monai.bundle.run(
            config_file=files,
            meta_file=str(folder / "metadata.json"),
            logging_file=str(folder / "logging.conf"),
            bundle_root=str(bundle_dir),
            **overrides,
        )
    except RuntimeError as error:
        raise first_cause(error) from None


def transfer_table(
    pretrained: str,
    dataset_dir: str,
    output_dir: str,
    bundle_dir: str = "bundles/tsfm_finetune",
    epochs: Sequence[int] = PAPER_EPOCHS,
    seeds: Sequence[int] = (0,),
    overlays: Sequence[str] = (),
    name: str | None = None,
    **settings: Any,
) -> str:
    """Fine-tune from `pretrained` and from scratch for each number of `epochs` and each seed, and tabulate the Dice.

    Args:
        pretrained: weights of the pretraining; "from scratch" uses the same network without them.
        dataset_dir: the downstream data set, as for the bundle.
        output_dir: cells, ``table2.md``, ``table2.csv`` and a plot of Dice over epochs.
        bundle_dir: the fine-tuning bundle.
        epochs, seeds: the grid. One split (``--fold`` or ``--splits_file``) serves all cells.
        overlays: further configs that describe the data (``brats2020.json``), over train.json and evaluate.json.
        name: the data set's name in the table.
        settings: any other id of the bundle's train.json, for all cells.

    Returns:
        the table as Markdown.
    """
    from .tables import write_table2

    arms = {"pretrained": {"from_scratch": False}, "scratch": {"from_scratch": True}}
    cells = [
        (
            f"{arm}-{epoch}epochs-seed{seed}",
            {"initialization": arm, "epochs": int(epoch), "seed": int(seed)},
            {**choice, "epochs": int(epoch), "seed": int(seed), "pretrained": os.path.abspath(pretrained)},
        )
        for epoch in sorted(epochs)
        for arm, choice in arms.items()
        for seed in seeds
    ]
    return _grid(cells, bundle_dir, dataset_dir, output_dir, overlays, name, settings, write_table2)


def ablation_table(
    checkpoints: Mapping[str, str],
    dataset_dir: str,
    output_dir: str,
    bundle_dir: str = "bundles/tsfm_finetune",
    epochs: int = 100,
    seeds: Sequence[int] = (0,),
    overlays: Sequence[str] = (),
    name: str | None = None,
    **settings: Any,
) -> str:
    """Fine-tune from several pretrainings (``{"pool": a.pt, "amos22": b.pt}``) and tabulate the Dice (Table 3).

    The other arguments are those of `transfer_table`.
    """
    from .tables import write_table3

    cells = [
        (
            f"{label}-{epochs}epochs-seed{seed}",
            {"pretraining": label, "seed": int(seed)},
            {"epochs": int(epochs), "seed": int(seed), "pretrained": os.path.abspath(path)},
        )
        for label, path in checkpoints.items()
        for seed in seeds
    ]
    return _grid(cells, bundle_dir, dataset_dir, output_dir, overlays, name, settings, write_table3)


def _grid(
    cells: Sequence[tuple[str, dict[str, Any], dict[str, Any]]],
    bundle_dir: str,
    dataset_dir: str,
    output_dir: str,
    overlays: Sequence[str],
    name: str | None,
    settings: Mapping[str, Any],
    write: Callable[[list[dict[str, Any]], str], Path],
) -> str:
    """Run the cells (folder, the table's columns, the run's options) one after the other; the table as Markdown."""
    results, table = [], ""
    for folder, columns, options in cells:
        run, store = {**settings, **options}, Path(output_dir, "store")
        score = _cell(Path(output_dir, "cells", folder), bundle_dir, dataset_dir, overlays, run, store)
        results.append({"dataset": name or Path(dataset_dir).resolve().name, **columns, **score})
        table = write(results, output_dir).read_text(encoding="utf-8").strip()
    return table


def _cell(
    folder: Path, bundle_dir: str, dataset_dir: str, overlays: Sequence[str], run: Mapping[str, Any], store_dir: Path
) -> dict[str, Any]:
    """Train and score one cell unless it is done; its mean Dice over targets, and the Dice per target."""
    settings = json.loads(
        json.dumps({"run": dict(run), "dataset_dir": os.path.abspath(dataset_dir), "overlays": list(overlays)})
    )
    if os.path.isfile(str(run.get("pretrained"))):  # a pretraining that ran again left other weights under this name
        state = os.stat(run["pretrained"])
        settings["pretrained"] = [state.st_size, state.st_mtime_ns]
    done = folder / "cell.json"
    if done.is_file():
        kept = read_json(done)
        if kept["settings"] != settings:
            raise CheckpointError(f"{folder} holds a cell with other settings; give this grid its own --output_dir")
        logger.info("%s is done already", folder.name)
        return kept["score"]
    shared = {"dataset_dir": os.path.abspath(dataset_dir), "output_dir": str(folder)}
    run_bundle(
        bundle_dir,
        ["train.json", *overlays],
        **shared,
        **run,
        store_dir=str(store_dir),
        ckpt_dir=str(folder / "published"),
    )
    kept_ids = ("pool_file", "images", "labels", "label_ids", "regions", "modality", "splits_file", "fold")
    data = {key: run[key] for key in kept_ids if key in run}
    evaluated = folder / "evaluation"
    run_bundle(
        bundle_dir, ["inference.json", "evaluate.json", *overlays],
        dataset_dir=shared["dataset_dir"], checkpoint=str(folder / "model.pt"), output_dir=str(evaluated), progress=False, **data,
    )  # fmt: skip
    summary = read_json(evaluated / "summary.json")
    targets = {
        target: entry["dice"]["mean"]
        for part in summary["datasets"].values()
        for target, entry in part.items()
        if entry["dice"]
    }
    score = {"dice": summary["mean"]["dice"], **{f"dice_{target}": dice for target, dice in targets.items()}}
    content = json.dumps({"settings": settings, "score": score}, indent=4)
    atomic_write(str(done), lambda temporary: Path(temporary).write_text(content, encoding="utf-8"))
    return score
