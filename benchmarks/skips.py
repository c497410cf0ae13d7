"""TSFM's skips added or concatenated, with the Transformer and without, from nothing at equal processor minutes.

One process and one thread per run (loader, augmentation and validation included). What an epoch costs is measured first, in
processor time; the number of epochs, over which the learning rate falls, follows from it. Then `tsfm_tools.paper.grids` trains
and scores the held-out cases whole. A run that is done is kept, one that was interrupted goes on with the same command.

    python benchmarks/skips.py --work DIR --minutes 15 --seeds 0 1 2
    python benchmarks/skips.py --work DIR --minutes 5 --pool      # the demo's pool of phantoms instead of hippocampus
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from sides import ROOT
from tsfm.files import write_json
from tsfm.training.checkpoint import read_state
from tsfm_tools.demo import POOL_CASES, SIZE
from tsfm_tools.paper.commands import run_grid
from tsfm_tools.paper.grid_files import Grid
from tsfm_tools.paper.grids import GridRunner, run_bundle
from tsfm_tools.phantoms.layouts import write_pool

FINETUNE, PRETRAIN = ROOT / "bundles/tsfm_finetune", ROOT / "bundles/tsfm_pretrain"
DATA = ROOT.parent / "shared/data/Task004_Hippocampus"
VARIANTS = {
    "add": {"network_def#skip": "add"},
    "concat": {"network_def#skip": "concat"},
    "add_cnn": {"network_def#skip": "add", "network_def#bottleneck": False},
    "concat_cnn": {"network_def#skip": "concat", "network_def#bottleneck": False},
}
NAMES = {
    "add": "skips added",
    "concat": "skips concatenated",
    "add_cnn": "skips added, no Transformer",
    "concat_cnn": "skips concatenated, no Transformer",
}
SHORT, LONG = 5, 10  # epochs of the two runs that tell the cost; small.json validates every fifth


def measure(
    work: Path, bundle: Path, overlays: list[str], options: dict[str, Any], variant: str
) -> tuple[float, float]:
    """Processor seconds of a start and of one epoch."""
    kept = work / "cost" / f"{variant}.json"
    if not kept.is_file():
        seconds = []
        for run, epochs in enumerate((1, SHORT, LONG)):  # the first prepares the cases
            folder, began = kept.with_suffix("") / f"{run}_{time.time_ns()}", time.process_time()
            run_bundle(
                bundle, ["train.json", *overlays], output_dir=str(folder), epochs=epochs, ckpt_dir=str(folder / "none"),
                store_dir=str(work / "store"), **options, **VARIANTS[variant],
            )  # fmt: skip
            seconds.append(time.process_time() - began)
        each = (seconds[2] - seconds[1]) / (LONG - SHORT)
        write_json(kept, [max(0.0, seconds[1] - SHORT * each), each])
    start, each = json.loads(kept.read_text())
    return start, each


def main() -> None:
    """Measure, train, score, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=DATA, help="a data set's folder")
    parser.add_argument(
        "--splits", default=str(ROOT / "benchmarks/real_data/splits_hippocampus.json"), help="None: the bundle's"
    )
    parser.add_argument("--pool", action="store_true", help="the demo's pool of phantoms, by its overlays")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["add", "concat", "add_cnn"])
    parser.add_argument("--iterations", type=int, default=25, help="per epoch")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    options = {"iterations_per_epoch": asked.iterations, "num_workers": 0, "device": "cpu"}
    if asked.pool:
        bundle, overlays, data, pool_file = PRETRAIN, ["small.json", "demo.json"], asked.work / "pool", "demo_pool.json"
        if not (data / "done").exists():
            write_pool(str(data), POOL_CASES, SIZE, 0)
            (data / "done").touch()
        options["pool_file"] = str(bundle / "configs" / pool_file)
        datasets = {"data": {"name": "phantoms", "pool_file": f"{bundle.name}/configs/{pool_file}"}}
        names = [entry["name"] for entry in json.loads((bundle / "configs" / pool_file).read_text())["datasets"]]
    else:
        bundle, overlays, data, names = FINETUNE, ["small.json"], asked.data, ["data"]
        options |= {} if asked.splits == "None" else {"splits_file": asked.splits}
        datasets = {"data": {"name": data.name}}
    told = {**options, "dataset_dir": str(data)}
    costs = {name: measure(asked.work, bundle, overlays, told, name) for name in asked.variants}
    epochs = {name: max(1, round((60 * asked.minutes - start) / each)) for name, (start, each) in costs.items()}
    row = {"bundle": bundle.name, "datasets": ["data"], "seeds": asked.seeds}
    columns = [{"name": f"{name}: Dice", "block": "network", "dataset": name} for name in names]
    if len(names) > 1:
        columns.append({"name": "mean", "block": "network", "mean_of": [column["name"] for column in columns]})
    content = {
        "title": f"{datasets['data']['name']}: Dice after {asked.minutes:g} processor minutes from nothing",
        "datasets": datasets,
        "columns": columns,
        "rows": [
            {"id": name, "name": NAMES[name], "epochs": [epochs[name]], "options": VARIANTS[name], **row}
            for name in asked.variants
        ],
    }
    work = asked.work / f"{asked.minutes:g}_minutes"
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "store").exists():
        (work / "store").symlink_to((asked.work / "store").resolve())
    runner = GridRunner(Grid(content, bundle.parent), data, work, overlays=overlays, settings=options)
    print(run_grid(runner, "skips"))
    print(
        "\n| network | million parameters | s per step | steps | minutes by the measured cost |\n|---|---:|---:|---:|---:|"
    )
    for name, (start, each) in costs.items():
        run = next(run for run in runner.runs if run.row["id"] == name)
        tensors, _ = read_state(work / "cells" / run.folder / "model.pt")
        size = sum(tensor.numel() for tensor in tensors.values()) / 1e6
        steps, minutes = epochs[name] * asked.iterations, (start + each * epochs[name]) / 60
        print(f"| {NAMES[name]} | {size:.2f} | {each / asked.iterations:.3f} | {steps} | {minutes:.1f} |")


if __name__ == "__main__":
    main()
