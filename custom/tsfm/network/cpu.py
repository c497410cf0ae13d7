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
from torch.autograd.function import once_differentiable

from ..console import FOR_THE_LOG

logger = logging.getLogger(__name__)

LAYOUT = torch.channels_last_3d

BLOCK_ROWS = 2**14
"""Voxels whose sum float32 holds to seven digits or so, see `_moments`."""

_WITHOUT = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
"""Values of ``ONEDNN_MAX_CPU_ISA`` with which oneDNN has neither type, whatever the processor has."""


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
    samples = [_SampleNorm.apply(sample, weight, bias, eps) for sample in x.split(1)]
    return torch.cat(samples) if len(samples) > 1 else samples[0]


class _SampleNorm(torch.autograd.Function):
    """Batch normalization of one sample (1,C,S,P,L), with statistics that `_moments` takes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        mean, variance = _moments(x, weight.dtype)
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        ctx.eps = eps
        return torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, eps, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *moments = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        found = torch.ops.aten.native_batch_norm_backward(
            grad_output, x, weight, None, None, *moments, True, ctx.eps, wanted
        )
        return (*(one if want else None for one, want in zip(found, wanted, strict=True)), None)


def _moments(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of one sample (1,C,S,P,L), in `kind`.

    PyTorch's channels-last kernel adds up all voxels in one float32, whose last bits a patch of millions of voxels exceeds:
    so it takes a block at a time, and the blocks are joined in float64 (Chan's rule).
    """
    # running averages, of no use here; without them the kernel answers in the type of x
    unused = torch.zeros(2, x.shape[1], dtype=kind)
    if x.is_contiguous():
        return torch.batch_norm_update_stats(x, *unused, 0.0)
    rows = x.movedim(1, -1).reshape(-1, x.shape[1])
    blocks = rows.split(BLOCK_ROWS)
    parts = [torch.batch_norm_update_stats(block, *unused, 0.0) for block in blocks]
    means, variances = (torch.stack(part).double() for part in zip(*parts, strict=True))
    share = torch.tensor([[len(block) / len(rows)] for block in blocks], dtype=torch.float64)
    mean = (share * means).sum(0)
    return mean.to(kind), (share * (variances + (means - mean) ** 2)).sum(0).to(kind)


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
    """``torch.autocast``, switched off (float32) without `amp` and on devices that do not compute in `dtype`.

    Before a processor computes, its convolutions are mended where they are wrong.
    """
    if device.type == "cpu":
        mend_convolutions()
    return torch.autocast(device.type, dtype=dtype, enabled=amp and computes_in(device.type, dtype))


@lru_cache
def computes_in(device_type: str, dtype: torch.dtype) -> bool:
    """Does a device of this type have arithmetic in `dtype`? If not, this is logged, once."""
    if device_type == "cuda":
        found = dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False)
        kind, advice = "GPU", "; --amp_dtype float16 trains in mixed precision on it"
    elif device_type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        held_back = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _WITHOUT
        found = not held_back and any(capabilities.get(name, False) for name in _INSTRUCTIONS[dtype])
        kind, advice = "processor", ""
    else:
        return True
    if not found:
        name = str(dtype).removeprefix("torch.")
        logger.warning("this %s has no %s arithmetic: computing in float32%s", kind, name, advice)
    return found


@lru_cache
def mend_convolutions() -> bool:
    """Where bfloat16 convolutions of some shapes are wrong, have those computed in float32 from now on.

    oneDNN 3.12 (torch 2.13.0) on x86 has two defects, which leave garbage or memory that nothing was written to:

    - *narrow*: with AMX, output and weight gradient, where the output is one voxel wide along the last axis and the stride
      there exceeds 1 (pytorch issue 169688; of transposed convolutions both gradients, where the input is so);
    - *flat*: with avx512_bf16 and without AMX, the weight gradient, where the input has fewer slices than the kernel is deep and
      the output more than one (3x3x3, padding 1, stride 1: two slices); for 7x3x3 it corrupts the heap.

    Both are mended below autograd, so for any network, compiled, checkpointed or distributed; traced TorchScript, which has
    ``_convolution`` in it, keeps its own. Other convolutions, and processors on which `wrong_convolutions` finds nothing, stay
    as they are. Once it finds nothing there, nor under ``ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16``, torch has mended them, and
    this function can go.

    Returns:
        whether there was something to mend.
    """
    if not (found := wrong_convolutions()):
        return False
    logger.info(
        "this processor's bfloat16 is wrong for %s convolutions: computing those in float32", " and ".join(found),
        extra=FOR_THE_LOG,
    )  # fmt: skip
    _library.impl("convolution", _convolution, "CPU", with_keyset=True)
    _library.impl("convolution_backward", _convolution_backward, "CPU", with_keyset=True)
    return True


def wrong_convolutions() -> list[str]:
    """Of "narrow" and "flat", which shapes are wrong in bfloat16, by comparison with float32 (milliseconds).

    Where one is wrong, it is so whatever the memory held before: of a flat gradient the kernel's first slice misses half of
    its sum. A thread that is given one slice alone computes it right, so the batch has two images for each thread.
    """
    images = 2 * torch.get_num_threads()
    image = torch.linspace(-1, 1, 16 * 2 * 4 * 4).reshape(1, 16, 2, 4, 4).repeat(images, 1, 1, 1, 1).bfloat16()
    narrow, flat = [], []
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        for dtype in (torch.float32, torch.bfloat16):
            kernel = torch.full((32, 16, 3, 3, 3), 0.125, dtype=dtype, requires_grad=True)
            narrow.append(
                F.conv3d(image.reshape(-1, 16, 4, 4, 2).to(dtype), kernel, stride=(1, 2, 2), padding=1).float()
            )
            output = F.conv3d(image.to(dtype), kernel, padding=1)
            flat.append(torch.autograd.grad(output.sum(), kernel)[0].float())
    pairs = {"narrow": narrow, "flat": flat}
    scale = {name: float(one.detach().abs().max()) for name, (one, _) in pairs.items()}
    return [name for name, two in pairs.items() if not torch.allclose(*two, rtol=0.02, atol=0.02 * scale[name])]


_library = torch.library.Library("aten", "IMPL")

_originals = {
    name: torch.library.get_kernel(f"aten::{name}", "CPU") for name in ("convolution", "convolution_backward")
}


def _convolution(
    keys: Any, image: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int,
) -> Tensor:  # fmt: skip
    """PyTorch's operator, in float32 where a narrow bfloat16 convolution (B,C,S,P,L) is wrong."""
    options = (stride, padding, dilation, transposed, output_padding, groups)
    original = _originals["convolution"]
    if image.ndim == 5 and image.dtype == torch.bfloat16 and not transposed and stride[-1] > 1:
        reach = dilation[-1] * (weight.shape[4] - 1)
        if image.shape[4] + 2 * padding[-1] - reach - 1 < stride[-1]:
            bias = None if bias is None else bias.float()
            return original.call_boxed(keys, image.float(), weight.float(), bias, *options).to(image.dtype)
    return original.call_boxed(keys, image, weight, bias, *options)


def _convolution_backward(
    keys: Any, grad_output: Tensor, image: Tensor, weight: Tensor, bias_sizes: Any, stride: Any, padding: Any,
    dilation: Any, transposed: bool, output_padding: Any, groups: int, output_mask: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """PyTorch's operator, in float32 where gradients of a narrow or flat bfloat16 convolution (B,C,S,P,L) are wrong."""
    options = (bias_sizes, stride, padding, dilation, transposed, output_padding, groups, output_mask)
    original = _originals["convolution_backward"]
    wrong = False
    if image.ndim == 5 and image.dtype == torch.bfloat16:
        wide, made = (grad_output, image) if transposed else (image, grad_output)
        narrow = made.shape[4] == 1 and stride[-1] > 1
        wrong = narrow or (output_mask[1] and wide.shape[2] < weight.shape[2] and made.shape[2] > 1)
    if not wrong:
        return original.call_boxed(keys, grad_output, image, weight, *options)
    gradients = original.call_boxed(keys, grad_output.float(), image.float(), weight.float(), *options)
    return tuple(gradient if gradient is None else gradient.to(image.dtype) for gradient in gradients)


def is_eager_on_cpu(x: Tensor) -> bool:
    """Whether the layout is ours to choose: graphs (tracing, export, torch.compile) plan their own."""
    return x.device.type == "cpu" and not (torch.jit.is_tracing() or torch.compiler.is_compiling())
