"""What a processor wants of a network: memory layout, precision and the reuse of memory."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)

LAYOUT = torch.channels_last_3d


@contextmanager
def channels_last(network: Callable) -> Iterator[None]:
    """Within the block a network on the CPU keeps channels_last; its numbers do not change but for rounding.

    The weights stay in it afterwards. Nothing happens on other devices, with gradients, or to what is no module.
    """
    modules = list(network.modules()) if isinstance(network, nn.Module) else []
    if torch.is_grad_enabled() or any(weights.device.type != "cpu" for m in modules[:1] for weights in m.parameters()):
        modules = []
    if modules:
        network.to(memory_format=LAYOUT)
    changed = [module for module in modules if "forward" not in vars(module)]
    for module in changed:
        if type(module) in (nn.Conv3d, nn.ConvTranspose3d):
            module.forward = partial(_convolve, module)
        elif type(module) is nn.InstanceNorm3d and not module.track_running_stats:
            module.forward = partial(_normalize, module)
    try:
        yield
    finally:
        for module in changed:
            vars(module).pop("forward", None)


def instance_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Instance normalization of x (B,C,S,P,L) in the layout of x, with gradients.

    As batch normalization of one sample at a time; PyTorch's own goes through channels-first. Statistics are at least
    float32, whatever the type of x.
    """
    kind = torch.promote_types(x.dtype, torch.float32)
    weight = torch.ones(x.shape[1], dtype=kind, device=x.device) if weight is None else weight.to(kind)
    bias = torch.zeros_like(weight) if bias is None else bias.to(kind)
    samples = [F.batch_norm(sample, None, None, weight, bias, True, 0.0, eps) for sample in x.split(1)]
    return torch.cat(samples) if len(samples) > 1 else samples[0]


def _convolve(convolution: nn.Module, *args: Any) -> Tensor:
    y = type(convolution).forward(convolution, *args)
    return y.contiguous(memory_format=LAYOUT) if y.ndim == 5 else y


def _normalize(norm: nn.InstanceNorm3d, x: Tensor) -> Tensor:
    if x.ndim == 5 and x.is_contiguous(memory_format=LAYOUT):
        norm._check_input_dim(x)
        return instance_norm(x, norm.weight, norm.bias, norm.eps)
    return nn.InstanceNorm3d.forward(norm, x)


def keep_freed_memory() -> None:
    """For a process of one's own: huge pages for large tensors, and freed blocks kept for the next tensor.

    glibc gives each freed block above 32 MiB back to the system and a new one comes page by page, each at the price of a
    fault; a network's activations come and go at every layer. It holds until the process ends, so bundles call it in
    ``initialize`` and nothing calls it by itself. The same for a process that is not one's own, from outside:
    ``THP_MEM_ALLOC_ENABLE=1 MALLOC_MMAP_THRESHOLD_=268435456 MALLOC_TRIM_THRESHOLD_=2147483647``.
    Without Linux and glibc nothing changes.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it with its first large tensor
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018
    except (OSError, TypeError, AttributeError):
        return
    trim_threshold, mmap_threshold = -1, -3
    libc.mallopt(mmap_threshold, 2**28)
    libc.mallopt(trim_threshold, 2**31 - 1)


_INSTRUCTIONS = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "avx10_2", "fp16_arith"},
}
"""What a processor must have to compute in a type, as ``torch.cpu.get_capabilities`` names it (x86, then Arm)."""


def autocast(device: torch.device, amp: bool = True, dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    """``torch.autocast``, switched off (float32) without `amp` and on devices that do not compute in `dtype`."""
    return torch.autocast(device.type, dtype=dtype, enabled=amp and computes_in(device.type, dtype))


@lru_cache
def computes_in(device_type: str, dtype: torch.dtype) -> bool:
    """Does a device of this type have arithmetic in `dtype`? If not, this is logged, once."""
    if device_type == "cuda":
        found = dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False)
        kind, advice = "GPU", "; --amp_dtype float16 trains in mixed precision on it"
    elif device_type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        found = any(capabilities.get(name, False) for name in _INSTRUCTIONS[dtype])
        kind, advice = "processor", ""
    else:
        return True
    if not found:
        name = str(dtype).removeprefix("torch.")
        logger.warning("this %s has no %s arithmetic: computing in float32%s", kind, name, advice)
    return found
