"""One forward pass of the paper's network over the paper's patch, in bfloat16, beside its convolutions alone.

    python benchmarks/network_forward.py [--threads 2] [--repeats 3] [--profile]

The peer is every convolution of the network called on its own, one after the other, on ready-made input of the same shape
and layout: what is above it is normalization, activation, interpolation, sums, the Transformer and memory traffic.
Weights are random: neither time nor memory depends on them. Needs about 7 GB.
"""

import argparse
import os
import platform
import resource
import statistics
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tsfm.network.tsfm_net import TSFM


def count() -> tuple[int, dict[str, tuple[int, ...]]]:
    """Floating-point operations of one pass (2 per multiply-add) and the input shape of each convolution, by meta device."""
    shapes = {}
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = TSFM().eval()
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv3d):
                module.register_forward_pre_hook(
                    lambda _, inputs, name=name: shapes.update({name: tuple(inputs[0].shape)})
                )
        network(torch.empty(1, 1, *network.description["network"]["img_size"]))
    return counter.get_total_flops(), shapes


def seconds(function) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def convolutions(network: nn.Module, shapes: dict[str, tuple[int, ...]]) -> float:
    """Sum over the network's convolutions of the time that each takes on its own, on ready-made input."""
    total = 0.0
    for name, shape in shapes.items():
        x = torch.full(shape, 0.5).contiguous(memory_format=torch.channels_last_3d)
        total += seconds(lambda x=x, name=name: network.get_submodule(name)(x))
    return total


def build() -> nn.Module:
    """The paper's network in bfloat16 (3.2 GB of weights, never 6.4), filled quickly."""
    with torch.device("meta"):
        network = TSFM().bfloat16()
    network = network.to_empty(device="cpu").eval().to(memory_format=torch.channels_last_3d)
    for parameter in network.parameters():
        parameter.uniform_(-0.02, 0.02)
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="print the operators that take the time")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    flops, shapes = count()

    torch.set_default_dtype(torch.bfloat16)
    network = build()
    size = network.description["network"]["img_size"]
    image = torch.randn(1, 1, *size)
    rounds = []
    for _ in range(1 + arguments.repeats):  # the first warms up; both sides in every round, so that they share its load
        whole = seconds(lambda: network(image))
        peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        rounds.append((whole, convolutions(network, shapes)))
    whole, alone = (statistics.median(times) for times in zip(*rounds[1:], strict=True))

    print(
        f"machine: {platform.processor() or platform.machine()}, {arguments.threads} threads, torch {torch.__version__}"
    )
    print(
        f"network: {sum(p.numel() for p in network.parameters()) / 1e9:.3f} B parameters, patch {tuple(size)}, bfloat16"
    )
    print(f"one pass: {flops / 2e12:.2f} TMAC, median of {arguments.repeats} after a warm-up")
    print(f"{'':28}{'seconds':>9}{'TFLOP/s':>9}")
    print(f"{'TSFM, whole pass':28}{whole:9.1f}{flops / whole / 1e12:9.2f}")
    print(f"{'its convolutions alone':28}{alone:9.1f}{flops / alone / 1e12:9.2f}")
    print(
        f"peak memory of the passes: {peak_gb:.1f} GB (weights {sum(p.numel() for p in network.parameters()) * 2e-9:.1f} GB)"
    )
    if arguments.profile:
        with torch.profiler.profile(record_shapes=True) as profile:
            network(image)
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40))


if __name__ == "__main__":
    main()
