"""Mixed precision where the device computes in it: elsewhere each number is converted to and fro, up to 50 times slower."""

from __future__ import annotations

import logging
from functools import lru_cache

import torch

logger = logging.getLogger(__name__)

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
