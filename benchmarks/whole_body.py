"""Whole-body CT, 512x512x1500 voxels, 30 targets: time and memory, from the prepared image or from the file.

From the prepared image, the network is one 1x1x1 convolution, so that what is measured is the window loop, the
averaging, the resizing and the painting. "on top" is the peak of the process minus what it held before, which is Python,
the model and the prepared image; the image (S, P, L at 1.5, 1, 1 mm) is listed apart. nnU-Net would hold 30 float64
volumes of the source grid.

With --from_file, a file (int16 NIfTI) goes through a bundle's inference.json to a label map's file, with a small network
of random weights; what a process needs that has only imported torch, MONAI and the package is taken off.

    python benchmarks/whole_body.py
    python benchmarks/whole_body.py --from_file
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from sides import ROOT, bundle_run, forget_peak, organs, peak_gib, peak_gib_of
from tsfm.cases.cases import Preparation
from tsfm.inference.windows import SlabInferer
from tsfm.network.cpu import keep_freed_memory
from tsfm.network.tsfm_net import TSFM
from tsfm.preparation.preprocessing import Grid
from tsfm.training.checkpoint import describe_network, save_weights

SPACING_MM = (1.5, 1.0, 1.0)
PATCH = (112, 160, 192)
IMPORTS = "import monai.bundle, torch, tsfm.inference.windows, tsfm.inference.prediction, tsfm.cases.volumes"


def from_file(source: tuple[int, ...], spacing: tuple[float, ...], targets: int) -> None:
    """Write the file and the weights, then run inference.json on them in a process of its own."""
    network = TSFM(
        1, targets, features=[2, 4, 8], depths_down=[1, 1, 1], depths_up=[1, 1], strides=[[2, 2, 2], [2, 4, 4]],
        hidden_size=8, num_layers=1, num_heads=2, mlp_dim=16, img_size=PATCH,
    )  # fmt: skip
    ct = {"CT": {"lower": -1000.0, "upper": 1000.0, "mean": 0.0, "sd": 500.0}}
    describe_network(
        network, organs(targets), Preparation(SPACING_MM, ct), PATCH, [{"modality": "CT", "dataset": "ct"}]
    )
    with tempfile.TemporaryDirectory() as folder:
        save_weights(network, f"{folder}/model.pt")
        voxels = np.random.default_rng(0).integers(-1000, 1000, source[::-1][:2], np.int16)[..., None]
        voxels = np.broadcast_to(voxels, source[::-1])
        nib.save(nib.Nifti1Image(voxels, np.diag([*spacing[::-1], 1])), f"{folder}/body.nii")
        del voxels
        bare = peak_gib_of([sys.executable, "-c", IMPORTS])
        started = time.perf_counter()
        options = {"checkpoint": f"{folder}/model.pt", "dataset_dir": f"{folder}/body.nii", "output_dir": folder}
        peak = peak_gib_of(bundle_run(ROOT / "bundles/tsfm_pretrain", ["inference.json"], **options))
        seconds = time.perf_counter() - started
        found = len(np.unique(np.asarray(nib.load(f"{folder}/body.nii.gz").dataobj))) - 1
    print(f"{os.cpu_count()} cores; file {source}, {targets} targets, {found} found: {seconds:.0f} s")
    print(f"peak {peak:.2f} GiB, on top of the imports: {peak - bare:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--slices", type=int, default=1500)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--spacing", type=float, nargs=3, default=(1.0, 0.9, 0.9), help="of the source, S P L, mm")
    parser.add_argument("--targets", type=int, default=30)
    parser.add_argument("--from_file", action="store_true", help="the whole of inference.json, with a small network")
    args = parser.parse_args()
    if args.from_file:
        return from_file((args.slices, args.size, args.size), tuple(args.spacing), args.targets)
    keep_freed_memory()  # as inference.json does
    source = (args.slices, args.size, args.size)
    shape = tuple(round(n * a / b) for n, a, b in zip(source, args.spacing, SPACING_MM, strict=True))
    image = torch.zeros(1, 1, *shape)
    grid = [torch.linspace(-1, 1, n) for n in shape]
    radius = (grid[1][:, None] ** 2 + grid[2][None] ** 2).sqrt()
    for plane, height in zip(image[0, 0], grid[0], strict=True):
        plane.copy_(radius + 0.3 * torch.sin(20 * height))
    network = torch.nn.Conv3d(1, args.targets, 1).eval()
    with torch.no_grad():
        network.weight.fill_(-40)
        network.bias.copy_(torch.linspace(36, 2, args.targets))
    inputs = MetaTensor(image)
    box = tuple((0, n) for n in source)
    record = Grid(source, box, source, shape, tuple(args.spacing), SPACING_MM).to_dict() | {
        "source_affine": torch.eye(4).tolist()
    }
    inputs.applied_operations = [{"class": "PrepareImaged", "extra_info": record}]
    before = forget_peak()
    started = time.perf_counter()
    names = [f"target_{i}" for i in range(args.targets)]
    label_map = SlabInferer(PATCH, names, activation="regions")(inputs, network)
    seconds, peak = time.perf_counter() - started, peak_gib()
    print(f"{os.cpu_count()} cores; source {source}, prepared {shape}, {args.targets} targets: {seconds:.0f} s")
    print(f"peak {peak:.2f} GiB, on top of Python, model and image: {peak - before:.2f} GiB", end="; ")
    print(f"image {image.nbytes / 2**30:.2f}, label map {label_map.nbytes / 2**30:.2f} GiB")
    print(f"targets painted: {len(label_map.unique()) - 1}")


if __name__ == "__main__":
    main()
