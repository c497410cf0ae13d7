"""Whole-body CT, 512x512x1500 voxels, 30 targets: time and memory of SlabInferer from prepared image to label map.

The network is one 1x1x1 convolution, so that what is measured is the window loop, the averaging, the resizing and the
painting. "on top" is the peak of the process minus what it held before, which is Python, the model and the prepared
image; the image (S, P, L at 1.5, 1, 1 mm) is listed apart. nnU-Net would hold 30 float64 volumes of the source grid.

    python benchmarks/whole_body.py
"""

from __future__ import annotations

import argparse
import os
import resource
import time

import torch
from monai.data import MetaTensor
from tsfm.inference import SlabInferer
from tsfm.preprocessing import Grid

SPACING_MM = (1.5, 1.0, 1.0)


def gib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--slices", type=int, default=1500)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--spacing", type=float, nargs=3, default=(1.0, 0.9, 0.9), help="of the source, S P L, mm")
    parser.add_argument("--targets", type=int, default=30)
    args = parser.parse_args()
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
        network.bias.copy_(torch.linspace(2, 36, args.targets))
    inputs = MetaTensor(image)
    box = tuple((0, n) for n in source)
    record = Grid(source, box, source, shape, tuple(args.spacing), SPACING_MM).to_dict()
    inputs.applied_operations = [{"class": "PrepareImaged", "extra_info": record}]
    before = gib()
    started = time.perf_counter()
    names = [f"target_{i}" for i in range(args.targets)]
    label_map = SlabInferer((112, 160, 192), names)(inputs, network)
    seconds, peak = time.perf_counter() - started, gib()
    print(f"{os.cpu_count()} cores; source {source}, prepared {shape}, {args.targets} targets: {seconds:.0f} s")
    print(f"peak {peak:.2f} GiB, on top of Python, model and image: {peak - before:.2f} GiB", end="; ")
    print(f"image {image.nbytes / 2**30:.2f}, label map {label_map.nbytes / 2**30:.2f} GiB")
    print(f"targets painted: {len(label_map.unique()) - 1}")


if __name__ == "__main__":
    main()
