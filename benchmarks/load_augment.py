"""Load and augment patches: TSFM's PatchDataset beside nnU-Net 2.8.1's loader, one process and one thread each.

Both sides read the same synthetic CT (already on the target grid) from their own store and apply their own training
augmentation. They run in turn, round by round, in one run; the table gives medians over the rounds.

    python benchmarks/load_augment.py --peer .venv-bench/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import torch
from sides import ONE_THREAD, PEER, ROOT, in_turn, organs, peak_gib, serve

SPACING_MM = (1.5, 1.0, 1.0)
CASES = 2
BATCH = 2


def synthetic_ct(shape, seed):
    """Normalised CT-like image (S, P, L) float32 with noise, and labels 1..4 as balls, uint8."""
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

    store, items = tsfm_store(folder)
    affine = np.diag([-SPACING_MM[2], -SPACING_MM[1], SPACING_MM[0], 1.0])  # L, P, S
    for number, item in enumerate(items):
        image, codes = synthetic_ct(shape, number)
        nib.save(nib.Nifti1Image((image * 200).round().astype(np.int16).T, affine), item["image"])
        nib.save(nib.Nifti1Image(codes.T, affine), item["label"])
    store.prepare(items, num_workers=0, progress=False)


def batches_tsfm(folder, patch, size=BATCH):
    from monai.bundle import ConfigParser
    from torch.utils.data import DataLoader
    from tsfm.patches.augmentation import RandRotateScale
    from tsfm.patches.dataset import PatchDataset, PoolSampler

    store, items = tsfm_store(folder)
    transforms = json.loads((ROOT / "tests/fixtures/augmentation.json").read_text())
    transforms = ConfigParser({"transforms": transforms, "mirror_axes": "SPL"}).get_parsed_content("transforms")
    dataset = PatchDataset(items, store, store.table, patch, transforms, RandRotateScale())
    epoch = 0
    while True:
        sampler = PoolSampler(items, size, iterations=1000)
        sampler.set_epoch(epoch)
        yield from DataLoader(dataset, size, sampler=sampler)
        epoch += 1


def tsfm_store(folder):
    from tsfm.cases.cases import Preparation
    from tsfm.patches.store import CaseStore

    preparation = Preparation(SPACING_MM, {"CT": {"lower": -1000, "upper": 1000, "mean": 0.0, "sd": 200.0}})
    known = {"dataset": "ct", "modality": "CT"}
    items = [
        {"image": f"{folder}/{n}.nii", "label": f"{folder}/{n}_label.nii", "case": str(n), **known}
        for n in range(CASES)
    ]
    return CaseStore(f"{folder}/store", organs(4), preparation), items


# ---- nnU-Net ----------------------------------------------------------------------------------------------------


def prepare_nnunet(folder, shape, patch):
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


def batches_nnunet(folder, patch, size=BATCH, deep_supervision_scales=None):
    from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    angle = (-np.pi / 6, np.pi / 6)
    transforms = nnUNetTrainer.get_training_transforms(patch, angle, deep_supervision_scales, (0, 1, 2), False, [False])
    labels = SimpleNamespace(all_labels=[0, 1, 2, 3, 4], has_ignore_label=False)
    initial = get_patch_size(patch, angle, angle, angle, (0.85, 1.25))
    options = {"oversample_foreground_percent": 0.33, "transforms": transforms}
    loader = nnUNetDataLoader(nnUNetDatasetBlosc2(folder), size, initial, patch, labels, **options)
    loader.set_thread_id(0)
    while True:
        yield next(loader)


# ---- measuring --------------------------------------------------------------------------------------------------


def answer_rounds(side, folder, patch, batches):
    """One side's process: seconds of each round of batches, and MiB."""
    torch.set_num_threads(1)
    stream = {"tsfm": batches_tsfm, "nnunet": batches_nnunet}[side](folder, patch)
    for _ in range(3):  # nnU-Net times its convolutions on first use
        next(stream)

    def work():
        start = time.perf_counter()
        for _ in range(batches):
            next(stream)
        return time.perf_counter() - start, peak_gib() * 1024

    serve(work)


def calls(script, folder, pythons, *words):
    """Prepare each side's cases below `folder`; the command of each side's rounds."""
    found = {}
    for side, python in pythons.items():
        call = [python, script, "--folder", f"{folder}/{side}", *map(str, words)]
        os.mkdir(f"{folder}/{side}")
        subprocess.run([*call, "--prepare", side], check=True, env={**os.environ, **ONE_THREAD})
        found[side] = [*call, "--serve", side]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", default=PEER, help="Python with nnunetv2 2.8.1")
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
        return answer_rounds(args.serve, args.folder, args.patch, args.batches)
    print("| patch | side | patches/s (lowest to highest round) | peak RSS, MiB |\n|---|---|---|---|")
    for patch, batches in (((64, 96, 96), 40), ((112, 160, 192), 8)):
        if args.patch and tuple(args.patch) != patch:
            continue
        pythons = {"tsfm": sys.executable, "nnunet": args.peer}
        words = ["--shape", *args.shape, "--patch", *patch, "--batches", args.batches or batches]
        with tempfile.TemporaryDirectory() as folder:
            found = in_turn(calls(__file__, folder, pythons, *words), args.rounds)
        rates = {side: [BATCH * (args.batches or batches) / s for s, _ in rounds] for side, rounds in found.items()}
        peaks = {side: max(mib for _, mib in rounds) for side, rounds in found.items()}
        for side, rate in rates.items():
            said = f"{statistics.median(rate):.1f} ({min(rate):.1f} to {max(rate):.1f})"
            print(f"| {'x'.join(map(str, patch))} | {side} | {said} | {peaks[side]:.0f} |")
        ratio = statistics.median(rates["tsfm"]) / statistics.median(rates["nnunet"])
        print(f"| | ratio | {ratio:.2f} | {peaks['tsfm'] / peaks['nnunet']:.2f} |")
    return None


if __name__ == "__main__":
    main()
