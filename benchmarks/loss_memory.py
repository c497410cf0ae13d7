"""Peak memory and time of PartialLabelLoss against MONAI's DiceCELoss with one-hot targets, 30 targets, one run.

    python benchmarks/loss_memory.py [--shape 64 96 96] [--batch 2] [--targets 30] [--device cpu|cuda] [--channels_last]

Every loss runs forward and backward in its own process on the same logits and the same labels. "beyond logits" is the
peak during that, minus what was there before it (logits and integer labels), in multiples of one target channel of the
batch (batch x voxels x 4 bytes) too: the gradient of the logits alone is as many channels as there are targets.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch
from sides import answer, forget_peak, peak_gib

LOSSES = {
    "PartialLabelLoss": "tsfm, each sample annotated for half of the targets",
    "PartialLabelLoss, all annotated": "tsfm, every sample annotated for every target",
    "DiceCELoss, softmax": "monai DiceCELoss(to_onehot_y=True, softmax=True)",
    "DiceCELoss, sigmoid": "monai DiceCELoss(sigmoid=True) on float one-hot targets: BCE + Dice as here, nothing masked",
}


def table(targets: int, partial: bool) -> SimpleNamespace:
    """Two data sets of `targets` codes each (background first); with `partial` each annotates one half of the targets."""
    rows = np.concatenate([np.eye(targets + 1, targets, -1, dtype=np.int8)] * 2)
    if partial:
        half = targets // 2
        rows[: targets + 1, half:] = -1
        rows[targets + 1 :, :half] = -1
    return SimpleNamespace(targets=rows)


def make_step(name: str, logits: torch.Tensor, labels: torch.Tensor):
    """A function without arguments: one forward and backward pass. One-hot volumes are built inside, as in training."""
    targets = logits.shape[1]
    if name.startswith("PartialLabelLoss"):
        from tsfm.network.loss import PartialLabelLoss

        loss = PartialLabelLoss(table(targets, partial="all" not in name))
        labels[1::2] += targets + 1  # every other sample is of the second data set
        return lambda: loss(logits, labels).backward()
    from monai.losses import DiceCELoss
    from monai.networks.utils import one_hot

    if name.endswith("softmax"):
        loss = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
        return lambda: loss(logits, labels).backward()
    loss = DiceCELoss(sigmoid=True, batch=True)
    return lambda: loss(logits, one_hot(labels, targets + 1)[:, 1:]).backward()


def measure(
    name: str, shape: list[int], batch: int, targets: int, device: str, repeats: int, channels_last: bool
) -> dict:
    """Peak bytes beyond the logits in the first pass, and the best time of `repeats` passes after it, seconds."""
    torch.manual_seed(0)
    channels = targets + 1 if name.endswith("softmax") else targets  # softmax needs a background channel
    coarse = torch.randint(0, targets + 1, (batch, 1, *[-(-size // 8) for size in shape]), dtype=torch.uint8)
    for axis, size in enumerate(shape, start=2):  # labels in blocks of 8 voxels, every target present
        coarse = coarse.repeat_interleave(8, axis).narrow(axis, 0, size)
    labels = coarse.contiguous().to(device)
    make_step(
        name,
        torch.randn(2, channels, 4, 4, 4, device=device, requires_grad=True),
        labels[:1, :, :4, :4, :4].repeat(2, 1, 1, 1, 1),
    )()
    logits = torch.randn(batch, channels, *shape, device=device)
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last_3d)
    logits.requires_grad_()
    step = make_step(name, logits, labels)
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        before = forget_peak()
        step()
        peak = (peak_gib() - before) * 2**30
    times = []
    for _ in range(repeats):
        logits.grad = None
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {"peak_bytes": peak, "seconds": min(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[64, 96, 96])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--targets", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--channels_last", action="store_true", help="logits as the training step makes them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        settings = {key: value for key, value in vars(options).items() if key != "only"}
        print(json.dumps(measure(options.only, **settings)))
        return
    channel = options.batch * int(np.prod(options.shape)) * 4
    print(
        f"batch {options.batch} x {options.targets} targets x {options.shape}, fp32 on {options.device}{', channels last' * options.channels_last}, ",
        end="",
    )
    print(f"{torch.get_num_threads()} threads; one channel is {channel / 2**20:.1f} MiB\n")
    print("| loss | peak beyond logits, MiB | in channels | beyond the gradient, channels | forward + backward, s |")
    print("|---|---|---|---|---|")
    for name in LOSSES:
        found = answer(sys.executable, __file__, *sys.argv[1:], "--only", name)
        channels = found["peak_bytes"] / channel
        gradient = options.targets + ("softmax" in name)
        print(
            f"| {name} | {found['peak_bytes'] / 2**20:.0f} | {channels:.1f} | {channels - gradient:.1f} "
            f"| {found['seconds']:.3f} |"
        )
    print("\n" + "\n".join(f"{name}: {text}" for name, text in LOSSES.items()))


if __name__ == "__main__":
    main()
