"""Windows through a network: its versions (mirrored, several folds), precision, and what is done when memory runs out."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..network.cpu import autocast, channels_last
from .quality import Quality

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")

AMP_DTYPES = ("auto", "bfloat16", "float16")


@dataclass
class Passes:
    """The windows of one image through a network, on the network's device as far as memory goes.

    Args:
        network: a callable, or a module. An `Ensemble`'s folds are versions of their own.
        device: where windows go.
        size: windows per pass.
        flips: dimensions to flip together, for every mirrored version but the plain one.
        amp, amp_dtype: see `SlabInferer`.
        check: turns an output into plain logits, or raises.
        observer: sees what every version of the windows says.
    """

    network: Callable
    device: torch.device
    size: int
    flips: Sequence[tuple[int, ...]]
    amp: bool
    amp_dtype: str
    check: Callable[[Any], Tensor]
    observer: Quality | None

    def __post_init__(self) -> None:
        self.home, self.flips, self.stack = self.device, [(), *self.flips], ExitStack()

    def __enter__(self) -> Passes:
        self.stack.enter_context(torch.no_grad())
        self.stack.enter_context(channels_last(self.network))
        return self

    def __exit__(self, *_: Any) -> None:
        self.stack.close()
        if self.device != self.home:  # the next image may be smaller
            try:
                self.network.to(self.home)
            except torch.OutOfMemoryError:
                self.network.to(CPU)

    def logits(
        self, image: Tensor, corners: Sequence, window: Sequence[int], average: Any
    ) -> Iterator[tuple[Tensor, Sequence[int]]]:
        """(logits (T, *window), corner) of each window of `image` (C, S, P, L); `average` is the buffer they go to."""
        todo = list(corners)
        while todo:
            some, error = todo[: self.size], None
            try:
                found = self._mean(image, some, window)
                if self.observer is not None:
                    self.observer.keep()
            except torch.OutOfMemoryError as raised:
                error = raised.with_traceback(None)  # its frames hold the tensors that filled the memory
            if error is not None:
                found = None
                self._make_room(average, error)
                continue
            yield from zip(found, some, strict=True)
            todo = todo[len(some) :]
            del found  # its memory serves the next batch

    def _mean(self, image: Tensor, corners: Sequence, window: Sequence[int]) -> Tensor:
        """Mean logits (B, T, *window) over all versions."""
        batch = self._batch(image, corners, window).to(self.device)
        # `contiguous` leaves one channel as it is, and outputs may follow its strides
        batch = batch.clone(memory_format=torch.channels_last_3d)
        dtype = amp_type(self.device, self.amp_dtype)
        with autocast(self.device, self.amp, dtype):
            total = self._sum(batch)
        if self.amp and dtype == torch.float16 and not total.isfinite().all():
            logger.warning("the network's numbers exceed float16: computing in float32")
            self.amp = False
            return self._mean(image, corners, window)
        return total

    def _batch(self, image: Tensor, corners: Sequence, window: Sequence[int]) -> Tensor:
        """The network's input (B, C, *window)."""
        boxes = [tuple(slice(c, c + n) for c, n in zip(corner, window, strict=True)) for corner in corners]
        return torch.stack([image[(slice(None), *box)] for box in boxes])

    def _sum(self, batch: Tensor) -> Tensor:
        """Mean logits (B, T, *window) of a network's input."""
        versions = getattr(self.network, "versions", None)
        total, number, count = None, 0, len(self.flips) * (self.network.count if versions else 1)
        for flip in self.flips:
            turned = batch.flip(flip) if flip else batch
            outputs = versions(turned) if versions else [self.network(turned)]
            for output in outputs:
                logits = self.check(output)
                logits = logits.flip(flip) if flip else logits
                if self.observer is not None:
                    self.observer.watch(number, count, logits)
                total = logits if count == 1 else logits.float() if total is None else total.add_(logits)
                number += 1
        return total if count == 1 else total.div_(count)

    def _make_room(self, average: Any, error: torch.OutOfMemoryError) -> None:
        """Half the windows per pass, else the buffer on the CPU, else the network; raises `error` when all is done."""
        if self.size > 1:
            self.size = (self.size + 1) // 2
            what = f"{self.size} window(s) per pass from here on"
        elif average.device == self.device != CPU:
            average.move(CPU)
            what = "the buffer of averaged windows moves to the CPU"
        elif self.device != CPU and isinstance(self.network, nn.Module):
            self.network.to(CPU)
            self.device = CPU
            self.stack.enter_context(channels_last(self.network))
            what = "the network moves to the CPU for the rest of this image"
        else:
            raise error
        logger.warning("out of memory on %s: %s", self.home, what)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def mirrored_axes(mirror: bool | str) -> list[tuple[int, ...]]:
    """Dimensions of (B, C, S, P, L) to flip together, for every mirrored version but the plain one."""
    axes = mirror if isinstance(mirror, str) else "SPL" if mirror else ""
    if not set(axes) <= set("SPL"):
        raise ValueError(f"mirror is {mirror!r}, expected True, False, or some of the axes 'SPL'")
    dimensions = [2 + "SPL".index(axis) for axis in axes]
    return [some for n in range(1, len(axes) + 1) for some in itertools.combinations(dimensions, n)]


def amp_type(device: torch.device, amp_dtype: str) -> torch.dtype:
    """The type that autocast is asked for: "auto" is bfloat16, or float16 on a GPU that does not compute in bfloat16."""
    if amp_dtype == "auto":
        older = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.float16 if older else torch.bfloat16
    return getattr(torch, amp_dtype)


def where_it_fits(make: Callable[[torch.device], Any], device: torch.device, what: str) -> Any:
    """`make(device)`, or `make` on the CPU, with a line about `what`, where the memory of `device` runs out."""
    try:
        return make(device)
    except torch.OutOfMemoryError:
        logger.warning("out of memory on %s: %s is left to the CPU", device, what)
    return make(CPU)  # here, what the error's frames hold is free again


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that a new tensor can have: what is free, and what torch keeps of freed tensors."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def network_device(network: Callable, otherwise: torch.device) -> torch.device:
    """Where the network's weights are, or `otherwise` where it has none."""
    parameters = network.parameters() if isinstance(network, nn.Module) else iter(())
    return next((weights.device for weights in parameters), otherwise)
