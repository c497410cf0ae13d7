"""Sliding window over 512x512x300 voxels to the label map of 31 targets: seconds and memory, with SlabInferer.

The network is TSFM of 1.6 B parameters with random weights. Random logits would paint noise or nothing, so logits of gray
levels in random blobs are laid over its own: the map then looks like organs, and takes as long to paint.

    python benchmarks/gpu/window.py --seconds 60
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import torch
from record import DEVICE, TINY, attempt, record, seconds
from scipy.ndimage import gaussian_filter, zoom
from steps import PATCH, TARGETS, build, free_memory, keep_channels_last
from torch import nn
from tsfm.inference.windows import SlabInferer

SHAPE = (48, 40, 48) if TINY else (300, 512, 512)
ROWS = [
    {},
    {"windows_at_once": 2},
    {"windows_at_once": 4},
    {"layout": "last"},
    {"layout": "last", "windows_at_once": 4},
]


class Decided(nn.Module):
    """The network's logits, and over them those of the image's gray level: value i + 1 of TARGETS + 1 is target i."""

    def __init__(self, network: nn.Module | None) -> None:
        super().__init__()
        self.network = network
        self.levels = nn.Parameter(torch.arange(1, TARGETS + 1, device=DEVICE).float().view(1, -1, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = 0.01 * self.network(x) if self.network is not None else 0.0
        return logits + (5 - 10 * (x.float() * (TARGETS + 1) - self.levels).abs()).clamp(-5, 5)


def scene() -> torch.Tensor:
    """Image (1, S, P, L) of gray levels 0 to 1 in blobs of a few centimeters, a third of them background."""
    factor = 2 if TINY else 8
    coarse = np.random.default_rng(0).standard_normal([-(-side // factor) for side in SHAPE], np.float32)
    field = gaussian_filter(zoom(gaussian_filter(coarse, 2), factor, order=1), 1)[tuple(map(slice, SHAPE))]
    levels = np.searchsorted(np.quantile(field[::4, ::4, ::4], np.linspace(1 / 3, 1, TARGETS + 1)[:-1]), field)
    return torch.from_numpy((levels / (TARGETS + 1)).astype(np.float32))[None]


def measure(image: torch.Tensor, layout: str = "first", windows_at_once: int = 1, network: str = "TSFM") -> None:
    """One row, without a warm-up run: a user's first case."""
    free_memory()
    torch.backends.cudnn.benchmark = True
    model = Decided(build("TSFM") if network == "TSFM" else None).eval()
    if layout == "last":
        model = model.to(memory_format=torch.channels_last_3d)
        keep_channels_last(True)
    inferer = SlabInferer(
        PATCH,
        [f"target_{i}" for i in range(TARGETS)],
        sw_batch_size=windows_at_once,
        activation="regions",
        progress=False,
    )
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        start = seconds()
        label_map = inferer(image[None], model)
        took = seconds() - start
    finally:
        keep_channels_last(False)
    truth = (image * (TARGETS + 1)).round().to(torch.uint8)
    row = {"network": network, "layout": layout, "windows_at_once": windows_at_once, "s": round(took, 1)}
    row |= {"targets_painted": len(label_map.unique()) - 1, "agree": f"{(label_map[0] == truth).float().mean():.4f}"}
    if DEVICE.type == "cuda":
        row["allocated_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    row["process_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)
    record("window", **row)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60, help="no row begins after this many")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    image = scene()
    for row in [ROWS[0], {"network": "none"}, *ROWS[1:]]:
        if time.monotonic() < end:
            attempt("window", str(row), lambda row=row: measure(image, **row))


if __name__ == "__main__":
    main()
