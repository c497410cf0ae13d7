"""Autocast only where the device computes in the type; a processor that would only convert is told once."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from tsfm.network import cpu as precision

pytestmark = pytest.mark.convolutions

CPU = torch.device("cpu")


@pytest.fixture
def processor(monkeypatch):
    """Pretend a processor with these capabilities."""

    def pretend(**capabilities):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        precision.computes_in.cache_clear()

    yield pretend
    precision.computes_in.cache_clear()


def product_dtype(**options):
    with precision.autocast(CPU, **options):
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16"])
def test_a_processor_with_bfloat16_computes_in_it(processor, name):
    processor(**{name: True})
    assert product_dtype() == torch.bfloat16
    assert product_dtype(amp=False) == torch.float32


def test_one_without_computes_in_float32_and_says_so_once(processor, caplog):
    processor(avx2=True, avx512_bf16=False)
    with caplog.at_level(logging.WARNING):
        assert product_dtype() == product_dtype() == torch.float32
    assert [record.message for record in caplog.records] == [
        "this processor has no bfloat16 arithmetic: computing in float32"
    ]


def test_one_that_is_held_to_older_instructions_computes_in_float32(processor, monkeypatch):
    processor(avx512_bf16=True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert product_dtype() == torch.float32


def test_float16_is_looked_up_apart(processor):
    processor(avx512_bf16=True)
    assert product_dtype(dtype=torch.float16) == torch.float32


def test_a_gpu_that_only_emulates_bfloat16_is_told_of_float16(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    precision.computes_in.cache_clear()
    assert not precision.computes_in("cuda", torch.bfloat16) and precision.computes_in("cuda", torch.float16)
    assert "--amp_dtype float16" in caplog.text
    precision.computes_in.cache_clear()


SHAPES = """
import json, torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tsfm.network import cpu as precision

torch.manual_seed(0)
CONV, UP, CPU = nn.Conv3d, nn.ConvTranspose3d, torch.device("cpu")

class Recomputed(nn.Sequential):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)

LAYERS = {  # name: layer, shape of the input
    "3x3x3": (CONV(16, 16, 3, padding=1), (2, 6, 6)), "in plane stride": (CONV(16, 16, 3, (1, 2, 2), 1), (2, 6, 6)),
    "groups": (CONV(16, 16, 3, padding=1, groups=2), (2, 6, 6)), "5x5x5": (CONV(16, 16, 5, padding=2), (4, 6, 6)),
    "transposed": (UP(16, 16, 3, padding=1), (2, 6, 6)),
    "recomputed": (Recomputed(CONV(16, 16, 3, padding=1), nn.InstanceNorm3d(16), CONV(16, 16, 3, padding=1)), (2, 6, 6)),
    "three slices": (CONV(16, 16, 3, padding=1), (3, 6, 6)), "one slice": (CONV(16, 16, 3, padding=1), (1, 6, 6)),
    "narrow": (CONV(16, 16, 3, (1, 2, 2), 1), (6, 6, 2)), "halved": (CONV(16, 32, 2, 2), (4, 6, 2)),
    "narrow, transposed": (UP(64, 64, 4, 2, 1), (3, 4, 1)),
    "wide": (CONV(16, 16, 3, 2, 1), (6, 6, 6)),
}

def gradients(layer, x, context):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with context:
        y = layer(x)
    (y.float() * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
    return [y.detach().float(), x.grad, *(parameter.grad for parameter in layer.parameters())]

def error(context):
    found = {}
    for name, (layer, shape) in LAYERS.items():
        x = torch.randn(2, layer[0].in_channels if isinstance(layer, Recomputed) else layer.in_channels, *shape,
                        generator=torch.Generator().manual_seed(0))
        exact = gradients(layer, x, torch.autocast("cpu", enabled=False))
        pairs = zip(gradients(layer, x, context()), exact)
        errors = torch.stack([(a - b).norm() / b.norm().clamp(min=1) for a, b in pairs])
        found[name] = float(errors.nan_to_num(torch.inf).max())  # Python's max would pass over a NaN
    return found

print(json.dumps([precision.wrong_convolutions(), error(lambda: torch.autocast("cpu", torch.bfloat16)),
                  error(lambda: precision.autocast(CPU)), precision.wrong_convolutions()]))
"""
WRONG = {"flat": ("3x3x3", "in plane stride", "5x5x5"), "narrow": ("narrow", "narrow, transposed")}
"""What `wrong_convolutions` finds, and layers of which at least one is far off then."""


@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("instructions", ["DEFAULT", "AVX512_CORE_BF16"])
def test_convolutions_in_bfloat16_are_those_of_float32(instructions, threads):
    """In a process with all instructions, and in one that is held to avx512_bf16: with AMX other shapes are wrong."""
    if not torch.cpu.get_capabilities().get("avx512_bf16"):
        pytest.skip("this processor has no avx512_bf16, whose convolutions are the wrong ones")
    limited = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions, "OMP_NUM_THREADS": threads}
    done = subprocess.run(
        [sys.executable, "-c", SHAPES], env=limited, capture_output=True, encoding="utf-8", check=True
    )
    found, before, after, left = json.loads(done.stdout)
    assert before["three slices"] < 0.02 and before["wide"] < 0.02
    for kind in found:
        assert max(before[layer] for layer in WRONG[kind]) > 0.3, (
            f"the probe finds {kind} convolutions wrong, which are not"
        )
    assert not left and {name: value for name, value in after.items() if not value < 0.1} == {}  # rounding: .04
