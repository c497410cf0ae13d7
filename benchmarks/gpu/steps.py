"""Seconds and peak memory of one training step: TSFM of 1.6 B parameters, and its rivals of similar cost.

Every row builds the network anew on the device and takes the bundle's own step (tsfm.training.steps.TrainStep): bfloat16
autocast, the loss with deep supervision, clipping, SGD with Nesterov momentum. Patch 112x160x192, 31 targets.

    python benchmarks/gpu/steps.py --seconds 120            the rows of ROWS, until the time is over
    python benchmarks/gpu/steps.py --seconds 150 --compile  those with torch.compile
    python benchmarks/gpu/steps.py --seconds 60 --rivals    STU-Net-H and nnU-Net ResEnc-L, where their packages are
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch
from record import DEVICE, OUT, TINY, attempt, record, seconds
from tsfm.labels import LabelTable
from tsfm.network.loss import PartialLabelLoss
from tsfm.network.tsfm_net import TSFM
from tsfm.training.steps import TrainStep

PATCH = (32, 32, 32) if TINY else (112, 160, 192)
TARGETS = 5 if TINY else 31
STRIDES = ((2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 2) if TINY else (1, 2, 2))
SMALL = {
    "features": (8, 16, 16, 16, 16, 16), "depths_down": (1,) * 6, "depths_up": (1,) * 5, "strides": STRIDES,
    "hidden_size": 24, "num_layers": 2, "num_heads": 2, "mlp_dim": 32,
}  # fmt: skip
USUAL = {
    "batch": 2, "checkpointing": False, "layout": "first", "tuned": True, "sgd": "fused", "dtype": "bfloat16",
    "weights": "float32", "compile": False,
}  # fmt: skip
ROWS = [
    {},
    {"checkpointing": True},
    {"layout": "last"},
    {"layout": "last", "checkpointing": True},
    {"batch": 1},
    {"batch": 1, "checkpointing": True},
    {"sgd": "foreach"},
    {"tuned": False},
    {"weights": "bfloat16"},
    {"dtype": "float16"},
]
COMPILED = [{"compile": True, "layout": "last"}, {"compile": True}]


def table() -> LabelTable:
    """31 targets, one data set that annotates 17 of them and one that annotates the rest."""
    names = [f"target_{i}" for i in range(TARGETS)]
    half = (TARGETS + 3) // 2
    datasets = [
        {"name": "organs", "labels": {str(i + 1): name for i, name in enumerate(names[:half])}},
        {"name": "tumors", "labels": {str(i + 1): name for i, name in enumerate(names[half:])}},
    ]
    return LabelTable({name: {} for name in names}, datasets)


def batch(size: int) -> dict[str, torch.Tensor]:
    """Random image and blocks of random codes, on the device; each sample is of the data set of its number."""
    rng, labels = np.random.default_rng(0), table()
    image = torch.from_numpy(rng.standard_normal((size, 1, *PATCH), np.float32))
    codes = []
    for i in range(size):
        dataset = labels.datasets[i % 2]
        count = len(labels.local_ids(dataset))
        coarse = rng.integers(0, count, [side // 8 for side in PATCH]) + labels.offset(dataset)
        codes.append(np.kron(coarse, np.ones((8, 8, 8), int))[None])
    return {"image": image.to(DEVICE), "label": torch.from_numpy(np.stack(codes)).to(DEVICE, torch.int32)}


def build(name: str, checkpointing: bool = False) -> torch.nn.Module:
    """The network by name, with random weights made on the device; ImportError where its package is absent."""
    with torch.device(DEVICE):
        if name == "TSFM":
            arguments = {"img_size": PATCH, "out_channels": TARGETS, "checkpointing": checkpointing}
            return TSFM(**{**arguments, **(SMALL if TINY else {})})
        if name == "STU-Net-H":
            import medim

            options = {"input_channels": 1, "num_classes": TARGETS, "strides": STRIDES}
            network = medim.create_model("STU-Net-S" if TINY else name, **options)
            network.decoder.deep_supervision = True
            return network
        from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

        return ResidualEncoderUNet(
            1, 6, [8] * 6 if TINY else [32, 64, 128, 256, 320, 320], torch.nn.Conv3d, 3,
            [(1, 1, 1), *STRIDES], [1] * 6 if TINY else [1, 3, 4, 6, 6, 6], TARGETS,
            [1] * 5, True, torch.nn.InstanceNorm3d, {"eps": 1e-5, "affine": True}, None, None, torch.nn.LeakyReLU,
            {"inplace": True}, True,
        )  # fmt: skip


def engine(network, size: int, sgd: str) -> SimpleNamespace:
    """What TrainStep asks of MONAI's trainer."""
    options = {"momentum": 0.99, "nesterov": True, "weight_decay": 1e-3, sgd: True}
    optimizer = torch.optim.SGD(network.parameters(), 1e-4, **options)
    return SimpleNamespace(
        network=network, optimizer=optimizer, loss_function=PartialLabelLoss(table()),
        inferer=lambda inputs, net: net(inputs), state=SimpleNamespace(device=DEVICE, output=None, iteration=0, epoch=1, epoch_length=10**6),
        prepare_batch=lambda b, *args, **kwargs: (b["image"], b["label"]), fire_event=lambda event: None,
        non_blocking=True, to_kwargs={},
    )  # fmt: skip


def measure(name: str, choice: dict, warm: int = 2, timed: int = 4) -> None:
    """One row: the median of `timed` steps after `warm`, and the peak of torch's memory while they ran."""
    torch.backends.cudnn.benchmark = choice["tuned"]
    torch.manual_seed(0)
    free_memory()
    network = build(name, choice["checkpointing"]).to(dtype=getattr(torch, choice["weights"]))
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    if choice["layout"] == "last":
        network = network.to(memory_format=torch.channels_last_3d)
        keep_channels_last(True)
    step = TrainStep(amp=DEVICE.type == "cuda", amp_dtype=choice["dtype"])
    if choice["compile"]:
        network.compile(backend="aot_eager" if TINY else "inductor")
    trainer, data = engine(network, choice["batch"], choice["sgd"]), batch(choice["batch"])
    losses, times, started = [], [], seconds()
    try:
        for i in range(warm + timed):
            if i == warm and DEVICE.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = seconds()
            trainer.state.iteration = i + 1
            losses.append(float(step(trainer, data)[0]["loss"]))
            times.append(seconds() - start)
    finally:
        keep_channels_last(False)
    took = statistics.median(times[warm:])
    row = {"network": name, "M": round(millions, 1), **choice}
    row |= {"s_per_step": round(took, 3), "patches_per_s": round(choice["batch"] / took, 2)}
    row |= {"first_step_s": round(times[0], 1), "loss": f"{losses[0]:.3f} to {losses[-1]:.3f}", "skipped": step.skipped}
    if DEVICE.type == "cuda":
        row["allocated_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        row["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 1)
    record("steps", **row)
    if name == "TSFM" and choice in (USUAL, {**USUAL, "layout": "last"}):
        attempt("shares", choice["layout"], shares, step, trainer, data, choice["layout"])
    print(f"    {seconds() - started:.0f} s", flush=True)


def keep_channels_last(on: bool) -> None:
    """Let TSFM lay its activations out channels-last on the GPU as it does on a CPU: both layouts are measured."""
    module = sys.modules[TSFM.__module__]
    if not hasattr(module, "_as_it_is"):
        module._as_it_is = module.is_eager_on_cpu
    everywhere = lambda x: not (torch.jit.is_tracing() or torch.compiler.is_compiling())  # noqa: E731
    module.is_eager_on_cpu = everywhere if on else module._as_it_is


def shares(step, trainer, data, layout: str) -> None:
    """GPU time of one step by kind of kernel, and the whole list in a file."""
    kinds = {"norm": "normalization", "bn_": "normalization", "conv": "convolution", "gemm": "convolution",
             "cutlass": "convolution", "xmma": "convolution", "sm90": "convolution", "sm80": "convolution",
             "cudnn": "convolution", "nchw": "layout", "nhwc": "layout", "copy": "copies and casts",
             "elementwise": "elementwise", "multi_tensor": "optimizer", "Fused": "optimizer"}  # fmt: skip
    activities = [torch.profiler.ProfilerActivity.CPU]
    if DEVICE.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step(trainer, data)
        seconds()
    spent: dict[str, float] = {}
    for event in profiler.key_averages():
        if (took := event.self_device_time_total / 1e6) and str(event.device_type).endswith("CUDA"):
            kind = next((kind for part, kind in kinds.items() if part in event.key), "other")
            spent[kind] = spent.get(kind, 0.0) + took
    sort = "self_device_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
    listing = profiler.key_averages().table(sort_by=sort, row_limit=40, max_name_column_width=100)
    (OUT / f"kernels_{layout}.txt").write_text(listing, encoding="utf-8")
    record("shares", layout=layout, **{kind: f"{took:.3f} s" for kind, took in sorted(spent.items())})


def free_memory() -> None:
    """Return what the row before left."""
    gc.collect()
    torch.compiler.reset()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=120, help="no row begins after this many")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rivals", action="store_true")
    arguments = parser.parse_args()
    jobs = [("TSFM", row) for row in (COMPILED if arguments.compile else ROWS)]
    if arguments.rivals:
        jobs = [(name, row) for row in ({}, {"layout": "last"}) for name in ("STU-Net-H", "ResEnc-L")]
    end = time.monotonic() + arguments.seconds
    for name, row in jobs:
        if time.monotonic() > end:
            record("steps", network=name, failed="not run: the time was over", **row)
            continue
        what = " ".join([name, *(f"{key}={value}" for key, value in row.items())])
        attempt("steps", what, measure, name, {**USUAL, **row})


if __name__ == "__main__":
    main()
