"""Real data from nothing at equal processor minutes: TSFM, the baselines' overlays, and nnU-Net 2.8.1 itself.

Every side trains in a process of one thread until its minutes of processor time are used up (start, loader, augmentation and
validation included, preparation not) by its own recipe (STU-Net by that of its pretraining, since it starts from nothing): a first short run tells what a step costs, and the number of steps, over which the
learning rate falls, follows from it. The held-out cases of the data set's split are then segmented whole, without mirrored
windows, and scored. A cell that has its result is not run again. DIR is of one data set.

    python benchmarks/real_data/equal_minutes.py --work DIR --peer .venv-bench/bin/python --minutes 5 15 --seeds 0 1 2
    python benchmarks/real_data/equal_minutes.py --work DIR --dataset sarcoma_mr --spacing_mm "[4.4,2.2,2.2]" --minutes 5 \
        --sides tsfm_s nnunet stunet_s swinunetr_12
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from sides import ONE_THREAD, PEER, ROOT, bundle_run, dice

BUNDLE = ROOT / "bundles/tsfm_finetune"
ITERATIONS = 25
DATASETS = {"hippocampus": ("Task004_Hippocampus", 4), "sarcoma_mr": ("Task902_SarcomaMR", 902)}
"""Name (of the split too) -> folder of the data, nnU-Net's id."""
SIDES = {
    "tsfm_s": (["train.json", "small.json", "tsfm_s.json"], {}),
    "tsfm_auto": (["train.json", "small.json"], {}),
    "tsfm_b": (["train.json", "small.json", "tsfm_b.json"], {"step_seconds": "$None", "learning_rate": 0.001}),
    "stunet_s": (["train.json", "small.json", "stunet.json"], {"network_size": "stunet_s", "spacing_mm": "auto",
                                                               "patch_size": "auto", "step_seconds": "$None",
                                                               "learning_rate": 0.01}),
    "swinunetr_12": (["train.json", "small.json", "swinunetr.json"], {"network_def#feature_size": 12,
                                                                      "patch_size": "[64,64,64]", "step_seconds": "$None"}),
    "nnunet": (["train.json", "small.json", "nnunet.json"], {"step_seconds": "$None"}),
    "nnunet_2.8.1": None,
}  # fmt: skip
NAMES = {"tsfm_s": "TSFM S", "tsfm_auto": "TSFM, the plan's size", "tsfm_b": "TSFM B", "stunet_s": "STU-Net S",
         "swinunetr_12": "SwinUNETR, feature size 12", "nnunet": "nnU-Net, this overlay", "nnunet_2.8.1": "nnU-Net 2.8.1"}  # fmt: skip


def run(command: list[str], log: Path) -> float:
    """Run to the end; returns the processor seconds of the process and of its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with log.open("a") as sink:
        done = subprocess.run(command, stdout=sink, stderr=sink, env={**os.environ, **ONE_THREAD}, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{log}: the command failed: {' '.join(command)}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class Ours:
    """A side that is a bundle run, by SIDES; `settings` go before those there. One unit of work is an epoch."""

    unit, first = ITERATIONS, (2, 8)

    def __init__(self, work: Path, data: Path, splits: Path, side: str, settings: dict[str, object]):
        self.work, self.data, self.splits = work, data, splits
        self.configs, self.settings = SIDES[side][0], SIDES[side][1] | settings

    def train(self, folder: Path, epochs: int, seed: int) -> float:
        settings = {"dataset_dir": self.data, "store_dir": self.work / "store", "output_dir": folder, "epochs": epochs,
                    "ckpt_dir": folder / "published", "iterations_per_epoch": ITERATIONS, "seed": seed, "num_workers": 1,
                    "splits_file": self.splits, "device": "cpu"}  # fmt: skip
        return run(bundle_run(BUNDLE, self.configs, **settings | self.settings), folder / "log")

    def predict(self, folder: Path) -> None:
        settings = {"checkpoint": folder / "model.pt", "output_dir": folder / "maps", "mirror": False, "device": "cpu"}
        command = bundle_run(BUNDLE, ["inference.json"], dataset_dir=self.work / "held_out", **settings)
        run(command, folder / "log")


class Peer:
    """nnU-Net 2.8.1. One unit of work is an iteration."""

    unit, first = 1, (5, 10)

    def __init__(self, work: Path, splits: Path, name: str, number: int, python: str):
        self.work, self.splits, self.number = work, splits, number
        self.folder = f"Dataset{number:03d}_{name}"
        self.command = [python, "-W", "ignore", str(Path(__file__).with_name("equal_minutes_peer.py")), str(work)]

    def prepare(self, data: Path) -> None:
        raw = self.work / "raw" / self.folder
        if not (raw / "dataset.json").exists():
            for source in sorted((data / "imagesTr").glob("*.nii.gz")):
                for part, name in (("imagesTr", source.name.replace(".nii", "_0000.nii")), ("labelsTr", source.name)):
                    (raw / part).mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(data / part / source.name, raw / part / name)
            declared = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, **targets(data)}}
            declared |= {"numTraining": len(list((raw / "imagesTr").iterdir())), "file_ending": ".nii.gz"}
            (raw / "dataset.json").write_text(json.dumps(declared))
        splits = self.work / "preprocessed" / self.folder / "splits_final.json"
        if not splits.exists():
            run([*self.command, self.folder, "prepare"], self.work / "peer.log")
            shutil.copyfile(self.splits, splits)

    def train(self, folder: Path, steps: int, seed: int) -> float:
        command = [*self.command, self.folder, "train", str(folder), str(steps), str(seed)]
        seconds = run(command, folder / "log")
        for name in ("dataset.json", "plans.json", "dataset_fingerprint.json"):
            source = self.work / "preprocessed" / self.folder / name.replace("plans", "nnUNetPlans")
            shutil.copyfile(source, folder / name)
        return seconds

    def predict(self, folder: Path) -> None:
        run([*self.command, self.folder, "predict", str(folder)], folder / "log")


def cell(side: Ours | Peer, folder: Path, minutes: float, seed: int, data: Path, cost: tuple[float, float]) -> None:
    """Train for `minutes`, segment the held-out cases, score; ``cell.json`` in `folder` says what came out."""
    if (folder / "cell.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start, each = cost
    units = max(1, int((minutes * 60 - start) / each))
    seconds = side.train(folder, units, seed)
    side.predict(folder)
    found = {"minutes": seconds / 60, "steps": units * side.unit, "dice": score(folder / "maps", data)}
    (folder / "cell.json").write_text(json.dumps(found, indent=2))


def targets(data: Path) -> dict[str, int]:
    """Target -> value in the label maps, background left out."""
    labels = json.loads((data / "dataset.json").read_text())["labels"]
    return {name: int(value) for value, name in labels.items() if int(value)}


def score(maps: Path, data: Path) -> dict[str, float]:
    """Mean Dice per target over all maps; independent of both sides' own code."""
    found: dict[str, list[float]] = {name: [] for name in targets(data)}
    for path in sorted(maps.glob("*.nii.gz")):
        ours, truth = (np.asarray(nib.load(p).dataobj) for p in (path, data / "labelsTr" / path.name))
        for target, value in targets(data).items():
            found[target].append(dice(ours == value, truth == value))
    return {target: float(np.mean(values)) for target, values in found.items()}


def calibrate(side: Ours | Peer, folder: Path) -> tuple[float, float]:
    """Processor seconds of a start, and of one unit of work."""
    known = folder / "cost.json"
    if not known.exists():
        seconds = []
        for units in side.first:
            part = folder / str(units)
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            seconds.append(side.train(part, units, 0))
        each = (seconds[1] - seconds[0]) / (side.first[1] - side.first[0])
        known.write_text(json.dumps([max(0.0, seconds[0] - side.first[0] * each), each]))
    return tuple(json.loads(known.read_text()))


def report(work: Path) -> None:
    """Print the table and draw Dice over minutes, from all the cells there are."""
    found: dict[tuple[str, float], list[dict]] = {}
    for path in sorted((work / "cells").glob("*/*/*/cell.json")):
        side, minutes = path.parts[-4], float(path.parts[-3])
        found.setdefault((side, minutes), []).append(json.loads(path.read_text()))
    budgets = sorted({minutes for _, minutes in found})
    print("| from nothing | " + " | ".join(f"{m:g} min" for m in budgets) + " | steps |")
    print("|---" * (len(budgets) + 2) + "|")
    curves = {}
    for side, name in NAMES.items():
        if not any(side == key for key, _ in found):
            continue
        cells, steps = [], []
        for minutes in budgets:
            runs = found.get((side, minutes), [])
            means = [statistics.mean(run["dice"].values()) for run in runs]
            if means:
                spread = statistics.stdev(means) if len(means) > 1 else 0.0
                cells.append(
                    f"{statistics.mean(means):.3f}" + (f" ± {spread:.3f}" if spread else "") + f" ({len(means)})"
                )
                steps.append(f"{statistics.mean(run['steps'] for run in runs):.0f}")
                used = statistics.mean(run["minutes"] for run in runs)
                curves.setdefault(name, []).append((used, statistics.mean(means), spread))
            else:
                cells.append("not run")
        print(f"| {name} | " + " | ".join(cells) + " | " + ", ".join(steps) + " |")
    draw(curves, work / "equal_minutes.png")


def draw(curves: dict[str, list[tuple[float, float, float]]], path: Path) -> None:
    """One line per side: (minutes used, mean Dice, standard deviation over its runs)."""
    from matplotlib.figure import Figure

    figure = Figure((6.4, 4), layout="constrained", dpi=130)
    axes = figure.subplots()
    for name, points in curves.items():
        minutes, mean, spread = zip(*points, strict=True)
        axes.errorbar(minutes, mean, spread, marker="o", capsize=3, label=name)
    axes.set(xlabel="processor minutes of training, one thread", ylabel="mean Dice, held-out cases", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--dataset", choices=DATASETS, default="hippocampus")
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared/data", help="where the data sets' folders are"
    )
    parser.add_argument("--spacing_mm", help="for the bundle's sides; default: that of the plan of each")
    parser.add_argument("--peer", default=PEER, help="Python with nnunetv2 2.8.1")
    parser.add_argument("--minutes", type=float, nargs="+", default=[5, 15, 30])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    options = parser.parse_args()
    folder, number = DATASETS[options.dataset]
    work, data = options.work.resolve(), options.data.resolve() / folder
    splits = ROOT / f"benchmarks/real_data/splits_{options.dataset}.json"
    held_out = json.loads(splits.read_text())[0]["val"]
    (work / "held_out").mkdir(parents=True, exist_ok=True)
    for case in held_out:
        shutil.copyfile(data / f"imagesTr/{case}.nii.gz", work / f"held_out/{case}.nii.gz")
    sides = {}
    for name in options.sides:
        if SIDES[name]:
            more = {"spacing_mm": options.spacing_mm} if options.spacing_mm else {}
            sides[name] = Ours(work, data, splits, name, more)
        else:
            sides[name] = Peer(work, splits, options.dataset, number, options.peer)
            sides[name].prepare(data)
    for minutes in options.minutes:
        for seed in options.seeds:
            for name, side in sides.items():
                cost = calibrate(side, work / "calibration" / name)
                cell(side, work / "cells" / name / f"{minutes:g}" / str(seed), minutes, seed, data, cost)
                print(f"{name}, {minutes:g} minutes, seed {seed}: done", file=sys.stderr, flush=True)
    report(work)


if __name__ == "__main__":
    main()
