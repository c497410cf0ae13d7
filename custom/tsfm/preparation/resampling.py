"""Resizing volumes with nnU-Net's numbers, one axis at a time.

nnU-Net resizes with `skimage.transform.resize(mode="edge", anti_aliasing=False)`: voxel edges stay where they are, so
output voxel o samples the input at (o + 0.5) * n_in / n_out - 0.5, and the input goes on with its edge value. A spline
resize is a product of one small banded matrix per axis, which costs far less than 64 taps for every output voxel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import find_objects

ANISOTROPY = 3.0
"""Ratio of largest to smallest spacing beyond which the thick axis is resampled apart (nnU-Net's threshold)."""

_POLE = math.sqrt(3.0) - 2.0

_REACH = 14

_BLOCK = 64

_TILE = 16


def new_shape(shape: Sequence[int], spacing_mm: Sequence[float], target_mm: Sequence[float]) -> tuple[int, ...]:
    """Shape after resampling, round(old spacing / new spacing * size) as in nnU-Net, but at least one voxel."""
    return tuple(max(1, round(s / t * n)) for n, s, t in zip(shape, spacing_mm, target_mm, strict=True))


def thick_axis(spacing_mm: Sequence[float], target_mm: Sequence[float]) -> int | None:
    """Axis that nnU-Net resamples apart (in-plane spline, nearest across), or None.

    The source spacing decides first, then the target's. Two equally thick axes (to 1e-5) count as none.
    """
    for spacing in (spacing_mm, target_mm):
        if max(spacing) / min(spacing) > ANISOTROPY:
            axes = [axis for axis, side in enumerate(spacing) if np.isclose(side, max(spacing))]
            return axes[0] if len(axes) == 1 else None
    return None


def _positions(n_in: int, n_out: int) -> np.ndarray:
    """Where each output voxel's centre lies in input voxels."""
    return (n_in / n_out) * (np.arange(n_out) + 0.5) - 0.5


def nearest_index(n_in: int, n_out: int) -> np.ndarray:
    """Input index nearest to each output voxel; a tie goes to the higher one, as in scipy."""
    return np.clip(np.floor(_positions(n_in, n_out) + 0.5), 0, n_in - 1).astype(np.int64)


def _linear_pair(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower index, upper index and weight of the upper one, for each output voxel."""
    x = np.clip(_positions(n_in, n_out), 0, n_in - 1)
    low = np.floor(x).astype(np.int64)
    return low, np.minimum(low + 1, n_in - 1), x - low


def _cardinal_spline(distance: np.ndarray) -> np.ndarray:
    """Weight of a sample at this distance (voxels) in cubic spline interpolation: B-spline after its prefilter."""
    nearest = np.floor(distance)
    fraction = distance - nearest
    taps = (
        (1 - fraction) ** 3 / 6,
        2 / 3 - fraction**2 * (2 - fraction) / 2,
        2 / 3 - (1 - fraction) ** 2 * (1 + fraction) / 2,
        fraction**3 / 6,
    )
    return sum(b * math.sqrt(3.0) * _POLE ** np.abs(nearest - 1 + i) for i, b in enumerate(taps))


def axis_weights(n_in: int, n_out: int, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Input indices and weights (n_out, taps) of a resize along one axis; weights of a row sum to one."""
    if order == 0:
        return nearest_index(n_in, n_out)[:, None], np.ones((n_out, 1))
    if order == 1:
        low, high, weight = _linear_pair(n_in, n_out)
        return np.stack([low, high], 1), np.stack([1 - weight, weight], 1)
    if order != 3:
        raise ValueError(f"order is {order}; nnU-Net's resampling knows 0 (nearest), 1 (linear) and 3 (cubic spline)")
    x = _positions(n_in, n_out)[:, None]
    index = np.floor(x).astype(np.int64) + np.arange(-_REACH, _REACH + 2)
    weights = _cardinal_spline(x - index)
    return np.clip(index, 0, n_in - 1), weights / weights.sum(1, keepdims=True)


class AxisResampler:
    """Resize of one axis from n_in to n_out voxels as a banded matrix in dense blocks, so that BLAS does the work.

    `apply` may compute a part of the rows from a part of the input, for callers that go slab by slab.
    """

    def __init__(self, n_in: int, n_out: int, order: int) -> None:
        self.n_in, self.n_out, self.order = n_in, n_out, order
        self.index, self.weights = axis_weights(n_in, n_out, order)

    def needed(self, start: int, stop: int) -> tuple[int, int]:
        """Half-open range of input voxels that output rows start to stop depend on."""
        rows = self.index[start:stop]
        return int(rows.min()), int(rows.max()) + 1

    def matrix(self, start: int, stop: int) -> tuple[int, int, np.ndarray]:
        """First and last + 1 input voxel and the dense float64 (rows, inputs) matrix of output rows start to stop."""
        low, high = self.needed(start, stop)
        dense = np.zeros((stop - start, high - low))
        np.add.at(dense, (np.arange(stop - start)[:, None], self.index[start:stop] - low), self.weights[start:stop])
        return low, high, dense

    def apply(self, x: torch.Tensor, axis: int, start: int = 0, stop: int | None = None, offset: int = 0):
        """Output rows start to stop along `axis` of a float tensor whose first row there is input voxel `offset`."""
        stop = self.n_out if stop is None else stop
        if self.n_in == self.n_out:
            return x.narrow(axis, start - offset, stop - start)
        shape = (*x.shape[:axis], stop - start, *x.shape[axis + 1 :])
        out = x.new_empty((x.shape[:axis].numel(), stop - start, x.shape[axis + 1 :].numel()))
        flat = x.reshape(out.shape[0], x.shape[axis], out.shape[2])
        for row in range(start, stop, _BLOCK):
            end = min(row + _BLOCK, stop)
            low, high, dense = self.matrix(row, end)
            block = torch.as_tensor(dense, dtype=x.dtype, device=x.device)
            source = flat[:, low - offset : high - offset]
            target = out[:, row - start : end - start]
            if out.shape[2] == 1:
                torch.mm(source[..., 0], block.T, out=target[..., 0])
            else:
                for one, result in zip(source, target, strict=True):
                    torch.mm(block, one, out=result)
        return out.reshape(shape)


axis_resampler = lru_cache(maxsize=64)(AxisResampler)
"""`AxisResampler`, kept for the next volume of this size."""


def resize_axis(x: torch.Tensor, axis: int, size: int, order: int) -> torch.Tensor:
    """Float tensor (S, P, L) resized along one axis; the same bits with any number of threads.

    A product's last bits depend on how BLAS splits it, so each tile is computed by one thread, and tiles share them.
    """
    resampler = axis_resampler(x.shape[axis], size, order)
    across = 1 if axis == 0 else 0
    out = x.new_empty((*x.shape[:axis], size, *x.shape[axis + 1 :]))

    def resize(start: int) -> None:
        length = min(_TILE, x.shape[across] - start)
        part = resampler.apply(x.narrow(across, start, length).contiguous(), axis)
        out.narrow(across, start, length).copy_(part)

    in_threads(resize, range(0, x.shape[across], _TILE), x.device)
    return out


def in_threads(work: Callable[[int], None], starts: Iterable[int], device: torch.device) -> None:
    """``work(start)`` for each start without gradients, each on one thread; on the processor torch's threads share them."""
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def alone(start: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(start)

    with one_thread():
        if threads == 1 or device.type != "cpu":
            for start in starts:
                alone(start)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(alone, starts))


@contextmanager
def one_thread():
    """torch on one thread within the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def resample(volume, shape: Sequence[int], order: int = 3, thick: int | None = None):
    """Volume (S, P, L), numpy or torch, resized to `shape` as float32 (or the tensor's own float type).

    With `thick` (see `thick_axis`) the other two axes are resized slice by slice and the nearest slice is taken along
    that one. The result stays in the input's range (per slice with `thick`), as scikit-image does it.
    """
    if not isinstance(volume, torch.Tensor):
        volume = np.ascontiguousarray(volume)
        if not np.issubdtype(volume.dtype, np.floating):
            volume = volume.astype(np.float32)
        return resample(torch.from_numpy(volume), shape, order, thick).numpy()
    x = volume if volume.is_floating_point() else volume.float()
    shape = tuple(int(n) for n in shape)
    if tuple(x.shape) == shape:
        return x
    if thick is not None and shape[thick] < x.shape[thick]:
        x = _nearest_along(x, thick, shape[thick])
    kept = [axis for axis in range(3) if axis != thick]
    limits = (x.amin(kept, keepdim=True), x.amax(kept, keepdim=True)) if order > 1 else None
    for axis in sorted(kept, key=lambda a: shape[a] / x.shape[a]):
        if shape[axis] != x.shape[axis]:
            x = resize_axis(x, axis, shape[axis], order)
    if limits is not None:
        x = torch.maximum(torch.minimum(x, limits[1], out=x if x is not volume else None), limits[0])
    return x if thick is None else _nearest_along(x, thick, shape[thick])


def nearest(volume, shape: Sequence[int]):
    """Volume (..., S, P, L), numpy or torch, any type, resized to `shape` by its nearest voxel."""
    for axis, size in zip(range(-3, 0), shape, strict=True):
        volume = _nearest_along(volume, axis, size)
    return volume


def _nearest_along(volume, axis: int, size: int):
    if volume.shape[axis] == size:
        return volume
    index = nearest_index(volume.shape[axis], size)
    if isinstance(volume, torch.Tensor):
        return volume.index_select(axis, torch.from_numpy(index).to(volume.device))
    return np.take(volume, index, axis=axis)


def resample_labels(codes: np.ndarray, shape: Sequence[int], thick: int | None = None) -> np.ndarray:
    """Label map (S, P, L), 0 is background, resized by linear interpolation of each label's indicator and argmax.

    A tie goes to the nearest voxel's label where it is among the winners, else to the lowest, as in nnU-Net 2.8.1
    (batchgenerators 0.25.5). Only voxels between unlike neighbors are interpolated, and none outside the box where
    labels are, so the cost does not grow with the number of labels. With `thick`, that axis takes the nearest slice.
    """
    shape = tuple(int(n) for n in shape)
    if codes.shape == shape:
        return codes
    out = np.zeros(shape, codes.dtype)
    box = label_box(codes)
    if box is None:
        return out
    sides = enumerate(zip(codes.shape, shape, box, strict=True))
    rows, cells = zip(*(_cells(*sizes, *span, axis == thick) for axis, (*sizes, span) in sides), strict=True)
    inner = np.ascontiguousarray(codes[tuple(slice(*span) for span in box)])
    padded = np.pad(inner, 1)
    part = padded
    for axis, cell in enumerate(cells):
        part = np.take(part, cell.nearest, axis=axis)
    mixed = _between_unlike(padded, cells)
    for chunk in np.array_split(mixed, max(1, mixed.size // 1_000_000)):
        where = np.unravel_index(chunk, part.shape)
        part.reshape(-1)[chunk] = _vote(padded, part.reshape(-1)[chunk], cells, where)
    out[tuple(slice(*row) for row in rows)] = part
    return out


def label_box(codes: np.ndarray) -> tuple[tuple[int, int], ...] | None:
    """Half-open bounding box of what is not 0 in an array with any number of axes, or None."""
    box = []
    for axis in range(codes.ndim):
        planes = np.moveaxis(codes, axis, 0)
        first = next((i for i in range(len(planes)) if planes[i].any()), None)
        if first is None:
            return None
        last = next(i for i in reversed(range(len(planes))) if planes[i].any())
        box.append((first, last + 1))
        codes = np.moveaxis(planes[first : last + 1], 0, axis)
    return tuple(box)


def enclosing(boxes: Iterable[Sequence[tuple[int, int]] | None]) -> tuple[tuple[int, int], ...] | None:
    """The half-open box around boxes, Nones left out; None where there is none."""
    sides = list(zip(*(box for box in boxes if box is not None), strict=True))
    return tuple((min(start for start, _ in side), max(stop for _, stop in side)) for side in sides) or None


def boxes_of(codes: np.ndarray) -> list[tuple[tuple[int, int], ...] | None]:
    """Half-open bounding box of each value 1, 2, ... of an integer array, None for values that do not occur."""
    return [box and tuple((side.start, side.stop) for side in box) for box in find_objects(codes)]


class _Cell(NamedTuple):
    """Along one axis, for each output voxel: lower, upper and nearest input voxel, and the upper one's weight."""

    low: np.ndarray
    high: np.ndarray
    nearest: np.ndarray
    weight: np.ndarray


def _cells(n_in: int, n_out: int, start: int, stop: int, thick: bool) -> tuple[tuple[int, int], _Cell]:
    """Output rows that see input voxels start to stop, and their cells in an array that begins at start - 1."""
    close = nearest_index(n_in, n_out)
    low, high, weight = (close, close, np.zeros(n_out)) if thick else _linear_pair(n_in, n_out)
    rows = np.flatnonzero((high >= start) & (low < stop))
    first, last = (rows[0], rows[-1] + 1) if rows.size else (0, 0)
    shifted = (np.clip(index[first:last] - start + 1, 0, stop - start + 1) for index in (low, high, close))
    return (first, last), _Cell(*shifted, weight[first:last])


def _between_unlike(codes: np.ndarray, cells: Sequence[_Cell]) -> np.ndarray:
    """Flat output indices of voxels whose (up to) eight source neighbors are not all the same."""
    low = high = codes
    for axis, cell in enumerate(cells):
        if cell.weight.any():
            low = np.minimum(np.take(low, cell.low, axis=axis), np.take(low, cell.high, axis=axis))
            high = np.maximum(np.take(high, cell.low, axis=axis), np.take(high, cell.high, axis=axis))
        else:
            low, high = np.take(low, cell.nearest, axis=axis), np.take(high, cell.nearest, axis=axis)
    return np.flatnonzero(low != high)


def _vote(codes: np.ndarray, nearest_label: np.ndarray, cells: Sequence[_Cell], where) -> np.ndarray:
    """Label with the largest linear weight at these output voxels; `where` holds one index array per axis.

    Products and sums run in scipy's order, so that ties are the same ones to the last bit.
    """
    labels, weights = [], []
    for corner in np.ndindex(2, 2, 2):
        index, weight = [], 1.0
        for cell, at, upper in zip(cells, where, corner, strict=True):
            index.append((cell.high if upper else cell.low)[at])
            lower = 1 - cell.weight[at]
            weight = weight * (1 - lower if upper else lower)
        labels.append(codes[tuple(index)])
        weights.append(weight)
    score_of_corner = [sum(np.where(labels[j] == label, weights[j], 0.0) for j in range(8)) for label in labels]
    top = np.max(score_of_corner, axis=0)
    best = np.full(nearest_label.shape, np.iinfo(codes.dtype).max, codes.dtype)
    nearest_wins = np.zeros(nearest_label.shape, bool)
    for label, score in zip(labels, score_of_corner, strict=True):
        wins = score >= top
        best = np.where(wins & (label < best), label, best)
        nearest_wins |= wins & (label == nearest_label)
    return np.where(nearest_wins, nearest_label, best)
