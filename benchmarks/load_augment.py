"""Load and augment patches: TSFM's PatchDataset beside nnU-Net 2.8.1's loader, one process and one thread each.

Both sides read the same synthetic CT (already on the target grid) from their own store and apply their own training
augmentation. They run in turn, round by round, in one run; the table gives medians over the rounds.

    python benchmarks/load_augment.py --peer .venv-bench/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SPACING_MM = (1.5, 1.0, 1.0)
CASES = 2
BATCH = 2


def synthetic_ct(shape, seed):
    """Normalised CT-like image (S, P, L) float32 with noise, and labels 1..4 as balls, uint8."""
    import numpy as np

    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)
    image = rng.standard_normal(shape, dtype=np.float32) * 0.1 - 1
    codes = np.zeros(shape, np.uint8)
    image[(grid[1] / 0.8) ** 2 + (grid[2] / 0.9) ** 2 + 0 * grid[0] < 1] += 1.2
    for label in range(1, 5):
        center, radius = rng.uniform(-0.4, 0.4, 3), rng.uniform(0.1, 0.3)
        ball = sum((axis - c) ** 2 for axis, c in zip(grid, center, strict=True)) < radius**2
        image[ball] += 0.2 * label
        codes[ball] = label
    return image, codes


# ---- this project -----------------------------------------------------------------------------------------------


def prepare_tsfm(folder, shape):
    """Two NIfTI cases, prepared into the store by a process of its own: preparing is not what is measured here."""
    import nibabel as nib
    import numpy as np

    store, items = _tsfm_store(folder)
    affine = np.diag([-SPACING_MM[2], -SPACING_MM[1], SPACING_MM[0], 1.0])  # L, P, S
    for number, item in enumerate(items):
        image, codes = synthetic_ct(shape, number)
        nib.save(nib.Nifti1Image((image * 200).round().astype(np.int16).T, affine), item["image"])
        nib.save(nib.Nifti1Image(codes.T, affine), item["label"])
    store.prepare(items, num_workers=0, progress=False)


def batches_tsfm(folder, patch):
    from monai.bundle import ConfigParser
    from torch.utils.data import DataLoader
    from tsfm.patches.augmentation import RandRotateScale
    from tsfm.patches.dataset import PatchDataset, PoolSampler

    store, items = _tsfm_store(folder)
    transforms = json.loads((ROOT / "tests/fixtures/augmentation.json").read_text())
    transforms = ConfigParser({"transforms": transforms, "mirror_axes": "SPL"}).get_parsed_content("transforms")
    dataset = PatchDataset(items, store, store.table, patch, transforms, RandRotateScale())
    epoch = 0
    while True:
        sampler = PoolSampler(items, BATCH, iterations=1000)
        sampler.set_epoch(epoch)
        yield from DataLoader(dataset, BATCH, sampler=sampler)
        epoch += 1


def _tsfm_store(folder):
    from tsfm.cases.cases import Preparation
    from tsfm.labels import LabelTable
    from tsfm.patches.store import CaseStore

    names = [f"organ_{i}" for i in range(1, 5)]
    table = LabelTable({name: {} for name in names}, [{"name": "ct", "labels": dict(zip("1234", names, strict=True))}])
    preparation = Preparation(SPACING_MM, {"CT": {"lower": -1000, "upper": 1000, "mean": 0.0, "sd": 200.0}})
    items = [
        {
            "image": f"{folder}/{n}.nii",
            "label": f"{folder}/{n}_label.nii",
            "dataset": "ct",
            "modality": "CT",
            "case": str(n),
        }
        for n in range(CASES)
    ]
    return CaseStore(f"{folder}/store", table, preparation), items


# ---- nnU-Net ----------------------------------------------------------------------------------------------------


def prepare_nnunet(folder, shape, patch):
    import numpy as np
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

    for number in range(CASES):
        image, codes = synthetic_ct(shape, number)
        rng, locations = np.random.default_rng(0), {}
        for label in range(1, 5):
            voxels = np.argwhere(codes[None] == label)
            locations[label] = voxels[rng.choice(len(voxels), min(10000, len(voxels)), replace=False)]
        blocks, chunks = comp_blosc2_params((1, *shape), patch, bytes_per_pixel=4)
        image = ((image * 200).round() / 200).astype(np.float32)[None]
        properties = {"class_locations": locations}
        nnUNetDatasetBlosc2.save_case(
            image, codes[None].astype(np.int8), properties, f"{folder}/case_{number}", chunks, blocks
        )


def batches_nnunet(folder, patch, deep_supervision_scales=None):
    from types import SimpleNamespace

    import numpy as np
    from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    angle = (-np.pi / 6, np.pi / 6)
    transforms = nnUNetTrainer.get_training_transforms(patch, angle, deep_supervision_scales, (0, 1, 2), False, [False])
    labels = SimpleNamespace(all_labels=[0, 1, 2, 3, 4], has_ignore_label=False)
    initial = get_patch_size(patch, angle, angle, angle, (0.85, 1.25))
    loader = nnUNetDataLoader(
        nnUNetDatasetBlosc2(folder),
        BATCH,
        initial,
        patch,
        labels,
        oversample_foreground_percent=0.33,
        transforms=transforms,
    )
    loader.set_thread_id(0)
    while True:
        yield next(loader)


# ---- measuring --------------------------------------------------------------------------------------------------


def serve(side, folder, patch, batches):
    """One side's process: a round of batches for every line on its input; answers with seconds and MiB."""
    import torch

    torch.set_num_threads(1)
    stream = {"tsfm": batches_tsfm, "nnunet": batches_nnunet}[side](folder, patch)
    for _ in range(3):  # nnU-Net times its convolutions on first use
        next(stream)
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(batches):
            next(stream)
        seconds = time.perf_counter() - start
        print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]), flush=True)


def measure(pythons, patch, shape, batches, rounds):
    """patches/s of every round and peak MiB, per side."""
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as scratch:
        processes, results = {}, {side: ([], []) for side in pythons}
        for side, python in pythons.items():
            folder = os.path.join(scratch, side)
            os.mkdir(folder)
            call = [python, __file__, "--folder", folder, "--shape", *map(str, shape), "--patch", *map(str, patch)]
            subprocess.run([*call, "--prepare", side], check=True, env=quiet)
            processes[side] = subprocess.Popen(
                [*call, "--serve", side, "--batches", str(batches)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet,
            )  # fmt: skip
        for _ in range(rounds):
            for side, process in processes.items():
                print("go", file=process.stdin, flush=True)
                seconds, mib = json.loads(process.stdout.readline())
                results[side][0].append(BATCH * batches / seconds)
                results[side][1].append(mib)
        for process in processes.values():
            process.stdin.close()
            process.wait()
    return {
        side: (statistics.median(rates), max(peaks), min(rates), max(rates)) for side, (rates, peaks) in results.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", default=".venv-bench/bin/python", help="Python with nnunetv2 2.8.1")
    parser.add_argument("--shape", type=int, nargs=3, default=(300, 360, 360))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, help="batches per round")
    parser.add_argument("--patch", type=int, nargs=3)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prepare == "tsfm":
        return prepare_tsfm(args.folder, args.shape)
    if args.prepare == "nnunet":
        return prepare_nnunet(args.folder, args.shape, args.patch)
    if args.serve:
        return serve(args.serve, args.folder, args.patch, args.batches)
    print("| patch | side | patches/s (lowest to highest round) | peak RSS, MiB |\n|---|---|---|---|")
    for patch, batches in (((64, 96, 96), 40), ((112, 160, 192), 8)):
        if args.patch and tuple(args.patch) != patch:
            continue
        pythons = {"tsfm": sys.executable, "nnunet": args.peer}
        results = measure(pythons, patch, args.shape, args.batches or batches, args.rounds)
        for side, (rate, peak, lowest, highest) in results.items():
            print(f"| {'x'.join(map(str, patch))} | {side} | {rate:.1f} ({lowest:.1f} to {highest:.1f}) | {peak:.0f} |")
        print(
            f"| | ratio | {results['tsfm'][0] / results['nnunet'][0]:.2f} | {results['tsfm'][1] / results['nnunet'][1]:.2f} |"
        )
    return None


if __name__ == "__main__":
    main()
