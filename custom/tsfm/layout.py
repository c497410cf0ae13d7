"""Networks of any make in channels_last on the CPU, where convolutions take a third less time in that layout.

It has to reach every layer, and PyTorch loses it in two places: instance normalization and convolutions of one channel (or
so small that oneDNN does not compute them) answer in channels-first, whatever they were given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def instance_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Instance normalization of x (B,C,S,P,L), with gradients, in the layout of x.

    As batch normalization of one sample at a time; PyTorch's own goes through channels-first.
    """
    samples = [F.batch_norm(sample, None, None, weight, bias, True, 0.0, eps) for sample in x.split(1)]
    return torch.cat(samples) if len(samples) > 1 else samples[0]


def instance_norm_into(y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Instance normalization of x (B,C,S,P,L) into `y`, which may be `x`; no gradient.

    As batch normalization of one sample at a time, which keeps channels_last; statistics are at least float32.
    """
    kind = torch.promote_types(x.dtype, torch.float32)
    weight = torch.ones(x.shape[1], dtype=kind, device=x.device) if weight is None else weight.to(kind)
    bias = torch.zeros_like(weight) if bias is None else bias.to(kind)
    mean, inverse_sd = torch.empty_like(weight), torch.empty_like(weight)
    for sample, result in zip(x.split(1), y.split(1), strict=True):
        torch.ops.aten.native_batch_norm.out(
            sample, weight, bias, None, None, True, 0.0, eps, out=result, save_mean=mean, save_invstd=inverse_sd
        )
    return y


def _convolve(convolution: nn.Module, *args: Any) -> Tensor:
    y = type(convolution).forward(convolution, *args)
    return y.contiguous(memory_format=LAYOUT) if y.ndim == 5 else y


def _normalize(norm: nn.InstanceNorm3d, x: Tensor) -> Tensor:
    if x.ndim == 5 and x.is_contiguous(memory_format=LAYOUT):
        norm._check_input_dim(x)
        return instance_norm_into(torch.empty_like(x), x, norm.weight, norm.bias, norm.eps)
    return nn.InstanceNorm3d.forward(norm, x)
