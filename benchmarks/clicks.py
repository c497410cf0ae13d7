"""Dice after 0, 1, 3 and 5 simulated clicks on held-out cases, beside the automatic network of the same budget.

    python benchmarks/clicks.py --dataset_dir ../shared/data/Task004_Hippocampus --output_dir /tmp/clicks \
        --splits_file benchmarks/real_data/splits_hippocampus.json

Both networks are trained from nothing, by `train.json` and `small.json`, the promptable one with `clicks.json`. The simulated
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
from monai.bundle import ConfigParser
from monai.transforms import Compose, Invertd
from tsfm.cases.volumes import read_labels
from tsfm.network.clicks import simulated_click
from tsfm.planning.own_data import dataset_pool
from tsfm_tools.paper.grids import run_bundle

BUNDLE = Path(__file__).resolve().parents[1] / "bundles/tsfm_finetune"
SHOWN = (0, 1, 3, 5)


class Requests:
    """A bundle's inference as a server runs it: an image file and a request in, a label map on the file's grid out."""

    def __init__(self, weights: Path, **settings: Any) -> None:
        parser = ConfigParser()
        parser.read_config(str(BUNDLE / "configs/inference.json"))
        parser.config |= {"bundle_root": str(BUNDLE), "checkpoint": str(weights), "device": "cpu", "progress": False}
        parser.config |= settings
        self.prepare, self.inferer, self.network, self.table, load = (
            parser.get_parsed_content(key) for key in ("preprocessing", "inferer", "network", "table", "handlers#0")
        )
        load()
        self.network.eval()
        invert = next(t for t in parser.get_parsed_content("postprocessing").transforms if isinstance(t, Invertd))
        self.finish, self.windows = Compose([invert]), 0
        self.network.register_forward_hook(self._count)

    def _count(self, network: Any, inputs: tuple, output: Any) -> None:
        self.windows += len(inputs[0])

    def __call__(self, image: str, **clicks: Any) -> np.ndarray:
        data = self.prepare({"image": image, **clicks})
        data["pred"] = self.inferer(data["image"][None], self.network)[0]
        return np.asarray(self.finish(data)["pred"])[0]


def dice(truth: np.ndarray, found: np.ndarray) -> float:
    both = np.count_nonzero(truth) + np.count_nonzero(found)
    return 2 * np.count_nonzero(truth & found) / both if both else float("nan")


def corrected(requests: Requests, item: dict[str, Any], most: int) -> list[dict[str, float]]:
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


def main(options: argparse.Namespace) -> None:
    output, table = Path(options.output_dir), {}
    pool = dataset_pool(options.dataset_dir, splits_file=options.splits_file)
    held_out = pool.evaluation_items(0)[: options.cases]
    for seed in options.seeds:
        for kind in ("automatic", "clicks"):
            run, overlays = output / f"{kind}-{seed}", ["train.json", "small.json"]
            started = time.process_time()
            if not (run / "done").exists():
                run_bundle(
                    BUNDLE, overlays + ["clicks.json"] * (kind == "clicks"), dataset_dir=options.dataset_dir,
                    output_dir=str(run), store_dir=str(output / "store"), ckpt_dir=str(run / "published"), seed=seed,
                    splits_file=options.splits_file, step_seconds=options.step_seconds, epochs=options.epochs,
                    iterations_per_epoch=options.iterations, val_interval=options.epochs, num_workers=0, device="cpu",
                    **({"patch_size": options.patch_size} if options.patch_size else {}),
                )  # fmt: skip
                (run / "done").write_text(f"{time.process_time() - started:.0f} s of the processor\n")
            requests = Requests(run / "model.pt")
            found = [corrected(requests, item, max(SHOWN) if kind == "clicks" else 0) for item in held_out]
            for count in SHOWN if kind == "clicks" else (0,):
                values = [list(rows[count].values()) for rows in found]
                table.setdefault(f"{kind}, {count} clicks", []).append(float(np.nanmean(values)))
            print(seed, kind, {key: np.round(value, 4).tolist() for key, value in table.items()}, flush=True)
    rows = {key: [float(np.mean(value)), float(np.std(value))] for key, value in table.items()}
    (output / "clicks.json").write_text(json.dumps({"per seed": table, "mean and sd": rows}, indent=4))
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
    parser.add_argument("--iterations", type=int, default=25)
    parser.add_argument("--step_seconds", type=float, default=0.1)
    parser.add_argument("--patch_size", type=int, nargs=3)
    parser.add_argument("--cases", type=int, help="only the first so many held-out cases")
    main(parser.parse_args())
