"""From averaged logits to a label map on the source grid, slab by slab along S.

Resizing, cutting at the threshold and painting are one step for each slab and target, so that no volume of logits or
probabilities ever exists on the source grid. Axis letters: T targets, S P L the prepared grid, s p l the source grid.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..labels import LabelTable
from ..preparation.resampling import AxisResampler, axis_resampler, in_threads

ACTIVATIONS = ("sigmoid", "regions", "softmax", "probabilities")

_PART = 16
"""Source slices that one thread paints at a time: tight boxes, and intermediate values that stay in the cache."""


class Slab(NamedTuple):
    """Averaged logits (T, n, P, L) of prepared slices start to start + n; the first may have come before."""

    logits: torch.Tensor
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.logits.shape[1]


def as_logits(slab: Slab, activation: str) -> Slab:
    """The slab, or of averaged probabilities the logits whose softmax they are."""
    if activation != "probabilities":
        return slab
    return Slab(slab.logits.float().clamp_min(1e-30).log(), slab.start)


class Painter:
    """Paints slabs of averaged logits into a label map on the source grid (s, p, l).

    Each target is resized only inside the box where it exceeds its threshold: a linear interpolation never exceeds
    the largest of its neighbors, so nothing else can be painted.

    Args:
        shape, source_shape: of the prepared grid and of the label map.
        tiers: groups of (channel, value); later groups are painted over earlier ones, and within a group the channel wins
            that is furthest above its threshold.
        levels: threshold of each channel, as a logit.
        thick: axis along which the nearest slice is taken (nnU-Net's rule for thick slices), or None.
        exclusive: softmax networks: channel 0 is the background, the largest logit wins (one group), `levels` are not used.
    """

    def __init__(
        self,
        shape: Sequence[int],
        source_shape: Sequence[int],
        tiers: Sequence[Sequence[tuple[int, int]]],
        levels: Sequence[float],
        thick: int | None = None,
        exclusive: bool = False,
    ) -> None:
        self.axes = resize_axes(shape, source_shape, thick)
        self.tiers, self.levels, self.exclusive = tiers, levels, exclusive
        largest = max((value for tier in tiers for _, value in tier), default=0)
        self.label_map = torch.zeros(tuple(source_shape), dtype=torch.uint8 if largest < 256 else torch.int16)
        self._last = self.axes[0].index.max(1)
        self._done = 0

    def add(self, slab: Slab) -> None:
        """Paint the source slices that are determined by the slices up to the end of this slab.

        Raises:
            ValueError: the logits hold NaN.
        """
        begin, end = self._done, int(np.searchsorted(self._last, slab.stop))

        def paint(start: int) -> None:
            self._paint(slab, start, min(start + _PART, end))

        in_threads(paint, range(begin, end, _PART), slab.logits.device)
        self._done = end

    def _paint(self, slab: Slab, begin: int, end: int) -> None:
        """Paint the source slices begin to end."""
        low, high = self.axes[0].needed(begin, end)
        logits = slab.logits[:, low - slab.start : high - slab.start]
        peaks = highest_logits(logits, self.exclusive)
        if peaks.max().isnan():
            raise ValueError(f"the network's output is NaN in slices {low} to {high}: check the weights and the image")
        painted = self.label_map[begin:end].to(logits.device)
        background = logits[0].float() if self.exclusive else None
        levels = torch.tensor([0.0] * len(peaks) if self.exclusive else self.levels)
        above = (peaks > levels.to(peaks.device)[:, None, None]).cpu().numpy()
        lines = above.any(2), above.any(1)  # of each channel: rows and columns with something to paint
        for tier in self.tiers:
            found = [(channel, value) for channel, value in tier if lines[0][channel].any()]
            best = torch.zeros(painted.shape, device=logits.device) if len(found) > 1 else None
            for channel, value in found:
                level = float(levels[channel])
                rows = [_rows(axis, line[channel]) for axis, line in zip(self.axes[1:], lines, strict=True)]
                if any(first == last for first, last in rows):  # it lies between the voxels of a coarser source grid
                    continue
                spans = [axis.needed(*row) for axis, row in zip(self.axes[1:], rows, strict=True)]
                where = (slice(None), *(slice(*span) for span in spans))
                plane = logits[channel][where].float()
                if background is not None:
                    plane = plane - background[where]
                for axis in (2, 1):  # fewest voxels first
                    plane = self.axes[axis].apply(plane.contiguous(), axis, *rows[axis - 1], spans[axis - 1][0])
                view = tuple(slice(*row) for row in rows)
                for s in range(begin, end):
                    one = self._between(plane, s, low)
                    if best is None:
                        wins = _above(one, level)
                    else:
                        margin, record = one - level if level else one, best[s - begin][view]
                        wins = _above(margin, record)
                        torch.maximum(record, margin, out=record)
                    # torch fills by a mask twenty times slower than it computes
                    painted[s - begin][view].mul_((~wins).view(torch.uint8)).add_(wins.view(torch.uint8), alpha=value)
        if painted.device != self.label_map.device:
            self.label_map[begin:end] = painted.cpu()

    def _between(self, planes: torch.Tensor, s: int, low: int) -> torch.Tensor:
        """Source slice s (p, l) from slices that begin with prepared slice `low`: small enough to stay in the cache."""
        index, weights = self.axes[0].index[s] - low, self.axes[0].weights[s]
        if len(index) == 1 or weights[1] == 0:
            return planes[index[0]]
        return torch.lerp(planes[index[0]], planes[index[1]], float(weights[1]))


def highest_logits(logits: torch.Tensor, exclusive: bool) -> torch.Tensor:
    """Largest logit (above the background's, if exclusive) along S, float32 (T, P, L), one slice at a time: torch
    reduces float16 and strided tensors many times slower than it converts and compares them."""
    peaks = None
    for i in range(logits.shape[1]):
        one = logits[:, i].float()
        if exclusive:
            one = one - one[:1]
        peaks = one.clone() if peaks is None else torch.maximum(peaks, one, out=peaks)
    return peaks


def _above(one: torch.Tensor, other: torch.Tensor | float) -> torch.Tensor:
    """Bool ``one > other``; torch compares to bool twice as slowly as to float, and from there."""
    return torch.gt(one, other, out=torch.empty_like(one)).bool()


def _rows(axis: AxisResampler, line: np.ndarray) -> tuple[int, int]:
    """Half-open range of output voxels that see an input voxel from the first to the last of a `line` (bool)."""
    start, last = np.flatnonzero(line)[[0, -1]]
    seen = np.flatnonzero(((axis.index >= start) & (axis.index <= last)).any(1))
    return (int(seen[0]), int(seen[-1]) + 1) if seen.size else (0, 0)


def resize_axes(shape: Sequence[int], source_shape: Sequence[int], thick: int | None) -> list[AxisResampler]:
    """How each axis of the prepared grid is resized to the source grid: linearly, along `thick` by the nearest slice."""
    sizes = enumerate(zip(shape, source_shape, strict=True))
    return [axis_resampler(n, m, 0 if axis == thick else 1) for axis, (n, m) in sizes]


def paint_tiers(
    table: LabelTable, channels: Sequence[int | None], activation: str = "sigmoid"
) -> list[list[tuple[int, int]]]:
    """(channel, value) as `Painter` wants them: by how deep a target lies; regions in their order, softmax all in one.

    Args:
        table: says what lies in what.
        channels: of each target, in order; None for those that are not computed.
    """
    depth: Callable[[int], Any] = {"sigmoid": table.paint_depth, "regions": int}.get(activation, lambda target: 0)
    order = sorted((target for target, channel in enumerate(channels) if channel is not None), key=depth)
    return [[(channels[target], target + 1) for target in tier] for _, tier in itertools.groupby(order, key=depth)]


def threshold_logits(threshold: float | Mapping[str, float], names: Sequence[str]) -> list[float]:
    """Threshold of each target as a logit."""
    if isinstance(threshold, Mapping):
        unknown = set(threshold) - set(names)
        if unknown:
            raise ValueError(f"thresholds for unknown targets {sorted(unknown)}; the targets are {list(names)}")
    values = [threshold.get(name, 0.5) if isinstance(threshold, Mapping) else threshold for name in names]
    if not all(0 < value < 1 for value in values):
        raise ValueError(f"thresholds must lie between 0 and 1 (probabilities), found {values}")
    return [math.log(value / (1 - value)) for value in values]
