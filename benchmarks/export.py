"""Logits to a label map on the image's own grid: TSFM's painter beside nnU-Net 2.8.1's export.

Both sides load the same float16 logits from a file, resize them from 200x256x256 to 300x512x512, decide, and hold the
label map in memory. "organs" are logits as a network gives them (each class in its own place), "noise" is the worst
case: every class everywhere. Seconds exclude loading; peak memory is the whole process.

    python benchmarks/export.py --peer .venv-bench/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import torch
from sides import PEER, answer, peak_gib

DEPTH = 32
"""Slices that the painter takes at a time, as it does when windows end."""

SHAPE, SOURCE_SHAPE = (200, 256, 256), (300, 512, 512)
SPACING_MM, SOURCE_SPACING_MM = (1.5, 1.0, 1.0), (1.0, 0.5, 0.5)


def write_logits(path, classes, kind):
    """Background and `classes` - 1 others, float16 (classes, S, P, L): ellipsoids with soft borders, or noise."""
    rng = np.random.default_rng(0)
    logits = np.lib.format.open_memmap(path, "w+", np.float16, (classes, *SHAPE))
    grid = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in SHAPE), indexing="ij", sparse=True)
    for channel in range(classes):
        if kind == "noise":
            logits[channel] = rng.standard_normal(SHAPE, dtype=np.float32)
            continue
        if channel == 0:
            continue
        center, radius = rng.uniform(-0.6, 0.6, 3), rng.uniform(0.08, 0.35, 3)
        distance = np.sqrt(sum(((a - c) / r) ** 2 for a, c, r in zip(grid, center, radius, strict=True)))
        logits[channel] = np.clip(12 * (1 - distance), -15, 15) + 0.3 * rng.standard_normal(SHAPE, dtype=np.float32)


def tsfm(path):
    from tsfm.inference.painting import Painter, Slab
    from tsfm.network.cpu import keep_freed_memory

    keep_freed_memory()  # as inference.json does
    logits = torch.from_numpy(np.load(path))
    started = time.perf_counter()
    painter = Painter(logits.shape[1:], SOURCE_SHAPE, [[(c, c) for c in range(1, len(logits))]], [], exclusive=True)
    for start in range(0, logits.shape[1], DEPTH):
        first = max(start - 1, 0)
        painter.add(Slab(logits[:, first : start + DEPTH], first))
    return time.perf_counter() - started, painter.label_map.numpy()


def nnunet(path):
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    logits = torch.from_numpy(np.load(path))
    labels = LabelManager({str(i) if i else "background": i for i in range(len(logits))}, None)
    plans = SimpleNamespace(transpose_forward=[0, 1, 2], transpose_backward=[0, 1, 2])

    def resize(data, *args):
        return resample_data_or_seg_to_shape(data, *args, is_seg=False, order=1, order_z=0, force_separate_z=None)

    configuration = SimpleNamespace(spacing=SPACING_MM, resampling_fn_probabilities=resize)
    properties = {
        "spacing": SOURCE_SPACING_MM,
        "shape_after_cropping_and_before_resampling": SOURCE_SHAPE,
        "shape_before_cropping": SOURCE_SHAPE,
        "bbox_used_for_cropping": [[0, n] for n in SOURCE_SHAPE],
    }
    started = time.perf_counter()
    label_map = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, plans, configuration, labels, properties
    )
    return time.perf_counter() - started, label_map


def measure(python, side, path):
    """Seconds, peak GiB and the label map of one process."""
    out = path + f".{side}.npy"
    return (*answer(python, __file__, "--side", side, path, out), np.load(out))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer", default=PEER, help="python of the nnU-Net environment")
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 32])
    parser.add_argument("--kinds", nargs="+", default=["organs", "noise"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-rounds", type=int, default=1, help="nnU-Net takes minutes at 32 classes")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        seconds, label_map = {"tsfm": tsfm, "nnunet": nnunet}[args.side[0]](args.side[1])
        gib = peak_gib()
        np.save(args.side[2], np.asarray(label_map).astype(np.uint8))
        print(json.dumps([seconds, gib]))
        return
    print(f"{os.cpu_count()} cores; {SHAPE} -> {SOURCE_SHAPE}; medians of {args.rounds} (nnU-Net: {args.peer_rounds})")
    print("classes  logits   TSFM s   GiB | nnU-Net s   GiB | times faster  voxels that differ")
    for classes in args.classes:
        for kind in args.kinds:
            with tempfile.TemporaryDirectory() as folder:
                path = f"{folder}/logits.npy"
                write_logits(path, classes, kind)
                ours = [measure(sys.executable, "tsfm", path) for _ in range(args.rounds)]
                peer = [measure(args.peer, "nnunet", path) for _ in range(args.peer_rounds)]
            (a, b), (c, d) = ([statistics.median(run[i] for run in runs) for i in (0, 1)] for runs in (ours, peer))
            apart = (ours[0][2] != peer[0][2]).mean()
            print(
                f"{classes:7d}  {kind:7s} {a:7.2f} {b:5.2f} | {c:9.1f} {d:5.2f} | {c / a:12.1f}  {apart:.2e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
