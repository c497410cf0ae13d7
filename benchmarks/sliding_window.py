"""150 windows through the same small U-Net: TSFM's SlabInferer beside nnU-Net 2.8.1's sliding window.

A U-Net of 32 outputs is first trained for a moment to tell 33 gray levels apart, so that its logits are decided as a
real network's are. Both sides then load the same weights and image in processes of their own. nnU-Net runs fp32, as it
does on any CPU, and returns logits; TSFM runs bf16 where the processor computes in it, and returns the label map.
Seconds are from image to that result. With --profile, only TSFM's side runs, once, and says where its time goes.

    python benchmarks/sliding_window.py --peer .venv-bench/bin/python
    python benchmarks/sliding_window.py --profile
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from sides import PEER, answer, peak_gib
from torch import nn

PATCH, SHAPE, CLASSES, FEATURES = (64, 96, 96), (192, 288, 336), 32, (16, 32, 64, 128)


class SmallUNet(nn.Module):
    """Conv-IN-LeakyReLU twice per level, strided convolutions down, transposed ones up: nnU-Net's plain U-Net."""

    def __init__(self):
        super().__init__()

        def block(inside, outside, stride=1):
            layers = []
            for channels, step in ((inside, stride), (outside, 1)):
                layers += [nn.Conv3d(channels, outside, 3, step, 1), nn.InstanceNorm3d(outside, affine=True)]
                layers += [nn.LeakyReLU(inplace=True)]
            return nn.Sequential(*layers)

        sides = list(itertools.pairwise(FEATURES))
        self.down = nn.ModuleList([block(1, FEATURES[0]), *(block(a, b, 2) for a, b in sides)])
        self.up = nn.ModuleList(nn.ConvTranspose3d(b, a, 2, 2) for a, b in sides)
        self.decoder = nn.ModuleList(block(2 * a, a) for a, _ in sides)
        self.head = nn.Conv3d(FEATURES[0], CLASSES, 1)

    def forward(self, x):
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
        for up, decoder, skip in zip(reversed(self.up), reversed(self.decoder), reversed(skips[:-1]), strict=True):
            x = decoder(torch.cat([up(x), skip], 1))
        return self.head(x)


def scene(shape, seed):
    """Image (S, P, L) of 33 gray levels in random blobs, mean 0 and sd 1 in each window, and the levels 0 to 32."""
    field = gaussian_filter(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32), 5)
    levels = np.searchsorted(np.quantile(field[::4, ::4, ::4], np.arange(1, CLASSES + 1) / (CLASSES + 1)), field)
    image = ((levels - levels.mean()) / levels.std()).astype(np.float32)
    image += 0.02 * np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return image, levels.astype(np.uint8)


def train(path, iterations):
    """Teach the network that target i is where the level is above i: painted in this order, each level is seen."""
    torch.manual_seed(0)
    network = SmallUNet()
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    for i in range(iterations):
        image, levels = scene((48, 64, 64), i)
        truth = torch.from_numpy(levels)[None, None] > torch.arange(CLASSES)[:, None, None, None]
        logits = network(torch.from_numpy(image)[None, None])
        loss = nn.functional.binary_cross_entropy_with_logits(logits, truth.float())
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - i / iterations) ** 0.9
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(network.state_dict(), path)
    return loss.item()


def tsfm(network, image):
    from tsfm.inference.windows import SlabInferer

    inferer = SlabInferer(PATCH, [f"target_{i}" for i in range(CLASSES)], activation="regions", progress=False)
    started = time.perf_counter()
    label_map = inferer(image[None], network)
    return time.perf_counter() - started, label_map[0, 0]


def profile(network, image):
    """Seconds of one run by kind of operation, as torch's profiler sees them; what is left is Python and the rest."""
    kinds = {
        "conv": "convolution",
        "norm": "normalization",
        "leaky": "activation",
        "lerp": "averaging",
        "cat": "copies",
    }
    kinds |= {"copy": "copies", "contiguous": "copies"}
    spent = dict.fromkeys([*kinds.values(), "other"], 0.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        seconds, _ = tsfm(network, image)
    for event in profiler.key_averages():
        kind = next((kind for part, kind in kinds.items() if part in event.key), "other")
        spent[kind] += event.self_cpu_time_total / 1e6
    for kind, part in spent.items():
        print(f"{kind:15s} {part:6.1f} s  {part / seconds:.0%}")
    print(f"{'all':15s} {seconds:6.1f} s")


def nnunet(network, image):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        device=torch.device("cpu"), use_mirroring=False, perform_everything_on_device=False, allow_tqdm=False
    )
    predictor.network = network
    predictor.configuration_manager = SimpleNamespace(patch_size=PATCH)
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=CLASSES)
    started = time.perf_counter()
    logits = predictor.predict_sliding_window_return_logits(image)
    seconds = time.perf_counter() - started
    label_map = torch.zeros(logits.shape[1:], dtype=torch.uint8)
    for target in range(CLASSES):
        label_map[logits[target] > 0] = target + 1
    return seconds, label_map


def load(weights):
    """The network and the image (1, S, P, L)."""
    network = SmallUNet().eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    return network, torch.from_numpy(scene(SHAPE, 12345)[0])[None]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer", default=PEER, help="python of the nnU-Net environment")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--weights", help="file of weights to use, made if it is not there")
    parser.add_argument("--profile", action="store_true", help="where TSFM's time goes, without the peer")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side, weights, out = args.side
        if side == "tsfm":  # as inference.json does
            from tsfm.network.cpu import keep_freed_memory

            keep_freed_memory()
        seconds, label_map = {"tsfm": tsfm, "nnunet": nnunet}[side](*load(weights))
        np.save(out, label_map.numpy())
        print(json.dumps([seconds, peak_gib()]))
        return
    with tempfile.TemporaryDirectory() as folder:
        weights = args.weights or f"{folder}/weights.pt"
        if not os.path.exists(weights):
            print(f"trained to a loss of {train(weights, args.iterations):.4f}", flush=True)
        if args.profile:
            return profile(*load(weights))
        runs, maps = {"tsfm": [], "nnunet": []}, {}
        for _ in range(args.rounds):
            for side, python in (("tsfm", sys.executable), ("nnunet", args.peer)):
                out = f"{folder}/{side}.npy"
                runs[side].append(answer(python, __file__, "--side", side, weights, out))
                maps[side] = np.load(out)
    print(
        f"{os.cpu_count()} cores, image {SHAPE}, window {PATCH}, 150 windows, {CLASSES} outputs, {args.rounds} rounds"
    )
    for side, results in runs.items():
        seconds, gib = map(statistics.median, zip(*results, strict=True))
        print(f"{side:7s} {seconds:7.1f} s  {gib:.2f} GiB")
    painted = len(np.unique(maps["nnunet"])) - 1
    truth = scene(SHAPE, 12345)[1]
    print(f"accuracy of the levels {(maps['nnunet'] == truth).mean():.3f}")
    print(f"{(maps['tsfm'] != maps['nnunet']).mean():.2e} of the voxels differ; {painted} targets painted")


if __name__ == "__main__":
    main()
