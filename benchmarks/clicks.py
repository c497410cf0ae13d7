"""Dice after 0, 1, 3 and 5 simulated clicks on held-out cases, beside the automatic network of the same budget.

    python benchmarks/clicks.py --dataset_dir ../shared/data/Task004_Hippocampus --output_dir /tmp/clicks \
        --splits_file benchmarks/real_data/splits_hippocampus.json

Both networks are trained from nothing, by `train.json` and `small.json`, the promptable one with `clicks.json`; with --continued
another one goes on from the automatic network's weights for so many epochs. The simulated
user corrects one target at a time: a click in the middle of the largest piece of what is wrong, on the image's own grid,
then the next on the new result. Requests go the way of a server's: through inference.json, as voxels of the file.
Finished trainings are not repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from sides import ROOT, dice
from tsfm.cases.volumes import read_labels
from tsfm.network.clicks import simulated_click
from tsfm.planning.own_data import dataset_pool
from tsfm_tools.click_server import ClickRequests
from tsfm_tools.paper.grids import run_bundle

BUNDLE = ROOT / "bundles/tsfm_finetune"
SHOWN = (0, 1, 3, 5)


def corrected(requests: ClickRequests, item: dict[str, Any], most: int) -> list[dict[str, float]]:
    """For each number of clicks from 0 to `most`: target -> Dice."""
    truth, rows = read_labels(item["label"]).array[0], [{} for _ in range(most + 1)]
    ids = requests.table.encode(requests.table.bare_dataset, truth)
    is_target = requests.table.targets[requests.table.offset(requests.table.bare_dataset) :]
    holds = requests.table.map_membership()
    first = requests(item["image"])
    for number, name in enumerate(requests.table.names):
        wanted, found = is_target[ids, number] == 1, holds[first, number]
        clicks: dict[str, list] = {"foreground": [], "background": []}
        for count in range(most + 1):
            rows[count][name] = dice(wanted, found)
            click = simulated_click(wanted, found) if count < most else None
            if click is not None:
                clicks["foreground" if click.inside else "background"].append(list(click.voxel))
                found = holds[requests(item["image"], label=name, **clicks), number]
    return rows


def trained(kind: str, seed: int, options: argparse.Namespace) -> Path:
    """The weights of a run; it is made where it is not there yet."""
    output = Path(options.output_dir)
    run, started = output / f"{kind}-{seed}", time.process_time()
    if (run / "done").exists():
        return run / "model.pt"
    more = {key: getattr(options, key) for key in ("patch_size", "spacing_mm") if getattr(options, key)}
    epochs = options.continued if kind == "continued" else options.epochs
    if kind == "continued":
        more["pretrained"] = str(trained("automatic", seed, options))
    run_bundle(
        BUNDLE, ["train.json", "small.json", *(["clicks.json"] if kind != "automatic" else [])],
        dataset_dir=options.dataset_dir, splits_file=options.splits_file, output_dir=str(run), seed=seed, epochs=epochs,
        store_dir=str(output / "store"), ckpt_dir=str(run / "published"), step_seconds=options.step_seconds,
        iterations_per_epoch=options.iterations, val_interval=epochs, num_workers=0, device="cpu", **more,
    )  # fmt: skip
    (run / "done").write_text(f"{time.process_time() - started:.0f} s of the processor\n")
    return run / "model.pt"


def main(options: argparse.Namespace) -> None:
    table: dict[str, list[float]] = {}
    pool = dataset_pool(options.dataset_dir, splits_file=options.splits_file)
    held_out = pool.evaluation_items(0)[: options.cases]
    for seed in options.seeds:
        for kind in ("automatic", "clicks", *(["continued"] if options.continued else [])):
            shown = (0,) if kind == "automatic" else SHOWN
            requests = ClickRequests(BUNDLE, checkpoint=str(trained(kind, seed, options)), device="cpu")
            found = [corrected(requests, item, max(shown)) for item in held_out]
            for count in shown:
                mean = float(np.nanmean([list(rows[count].values()) for rows in found]))
                table.setdefault(f"{kind}, {count} clicks", []).append(mean)
            print(seed, kind, {key: np.round(value, 4).tolist() for key, value in table.items()}, flush=True)
    rows = {key: [float(np.mean(value)), float(np.std(value))] for key, value in table.items()}
    (Path(options.output_dir) / "clicks.json").write_text(
        json.dumps({"per seed": table, "mean and sd": rows}, indent=4)
    )
    print(f"{len(held_out)} held-out cases, {len(options.seeds)} seeds: mean Dice over targets")
    for key, (mean, sd) in rows.items():
        print(f"| {key} | {mean:.4f} ± {sd:.4f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_dir", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--splits_file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--continued", type=int, default=0, help="epochs with clicks after those without")
    parser.add_argument("--iterations", type=int, default=25)
    parser.add_argument("--step_seconds", type=float, default=0.1)
    parser.add_argument("--patch_size", type=int, nargs=3)
    parser.add_argument("--spacing_mm", type=float, nargs=3, help="(S, P, L); default: that of the data's plan")
    parser.add_argument("--cases", type=int, help="only the first so many held-out cases")
    main(parser.parse_args())
