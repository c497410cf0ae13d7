"""GPUs by the numbers that a process sees them under, for processes of their own."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from tsfm.options import OptionError


def visible_devices(gpus: Sequence[int] | int) -> dict[int, str]:
    """Number of each GPU among those that this process sees -> what CUDA_VISIBLE_DEVICES shall say for it alone."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(torch.cuda.device_count())) if said is None else map(str.strip, said.split(","))
    visible = list(filter(None, names))
    numbers = list(range(gpus)) if isinstance(gpus, int) else list(gpus)
    if not numbers or not all(isinstance(one, int) and 0 <= one < len(visible) for one in numbers):
        raise OptionError(
            f"--gpus {gpus}: this process sees {len(visible)} GPUs (CUDA_VISIBLE_DEVICES: {said}); expected how many of "
            "them, or a list of numbers from 0 among them; without --gpus the folds are done one after the other"
        )
    return {one: visible[one] for one in numbers}
