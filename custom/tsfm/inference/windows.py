"""From a network's windows to one label map on the image's own grid, in memory that does not grow with its length.

Windows go along S, so slices that no further window covers are finished: their averaged logits are resized to the
source slices that they determine, cut at the threshold, painted, and forgotten. Positions, Gaussian, averaging of
logits and their resizing are nnU-Net's (2.8.1). Axis letters: T targets, S P L the prepared grid, s p l the source grid.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from ..labels import LabelTable
from .notes import COMPUTED
from .painting import ACTIVATIONS, Painter, Slab, as_logits, paint_tiers, threshold_logits
from .passes import AMP_DTYPES, CPU, Passes, free_bytes, mirrored_axes, network_device, where_it_fits
from .probabilities import Probabilities
from .quality import Quality, binary_entropy
from .source_grids import source_grid

logger = logging.getLogger(__name__)

FULL_PRECISION_BYTES = 2**30
"""A rolling buffer that would be larger than this in float32 is kept in float16 (nnU-Net always uses float16)."""

LARGEST = 32000.0
"""Logits are clipped here, so that float16 can hold them and their differences."""


def window_starts(size: int, patch: int, overlap: float = 0.5) -> list[int]:
    """First voxels of the windows along one axis: evenly spread, at most (1 - overlap) patches apart (nnU-Net)."""
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}, expected 0 <= overlap < 1 (a fraction of the patch)")
    if size <= patch:
        return [0]
    count = math.ceil((size - patch) / (patch * (1 - overlap))) + 1
    return sorted({int(np.round((size - patch) / (count - 1) * i)) for i in range(count)})


def gaussian_weights(patch: Sequence[int]) -> torch.Tensor:
    """Weight of each voxel of a window, float32 (S, P, L): sigma an eighth of the side, 10 at the center (nnU-Net).

    Rounded to float16 as nnU-Net does; what rounds to zero takes the smallest weight, so that no sum is zero.
    """
    impulse = np.zeros(tuple(patch))
    impulse[tuple(side // 2 for side in patch)] = 1
    weights = gaussian_filter(impulse, [side / 8 for side in patch], mode="constant")
    weights = (weights * (10 / weights.max())).astype(np.float16).astype(np.float32)
    weights[weights == 0] = weights[weights > 0].min()
    return torch.from_numpy(weights)


class RollingAverage:
    """Weighted mean of overlapping windows (T, S, P, L), for the slices that windows can still reach.

    Kept as a running mean, not as a sum, so that float16 neither overflows nor loses weak weights. Channels lie last
    in memory, as they do in the output of a channels-last network. One slice is averaged at a time, so that
    its float copies stay in the processor's cache. Row 0 holds the last finished slice.
    """

    def __init__(self, channels: int, shape: Sequence[int], patch: Sequence[int], device: torch.device) -> None:
        size = (min(patch[0], shape[0]) + 1, *shape[1:], channels)
        small = math.prod(size) * 4 <= FULL_PRECISION_BYTES
        self.mean = torch.zeros(size, dtype=torch.float32 if small else torch.float16, device=device)
        self.total = torch.zeros(size[:3], device=device)
        self.gaussian = gaussian_weights(patch).to(device)
        self.start, self.device = 0, device

    def move(self, device: torch.device) -> None:
        """Go on on another device."""
        self.mean, self.total, self.gaussian = (one.to(device) for one in (self.mean, self.total, self.gaussian))
        self.device = device

    def add(self, logits: torch.Tensor, corner: Sequence[int], channels: Sequence[int]) -> None:
        """Take in these channels of one window's logits (T, S, P, L), all where it has no others; `corner` is its first voxel.

        Where memory runs out, this and all that follows are averaged on the CPU.
        """
        logits = logits.to(CPU) if self.device == CPU else logits
        some = None if len(channels) == len(logits) else torch.tensor(channels)
        for s, plane in enumerate(logits.permute(1, 2, 3, 0)):
            try:
                self._add(plane, s, corner[1:], some)
            except torch.OutOfMemoryError:
                if self.device == CPU:
                    raise
                logger.warning("out of memory on %s: windows are averaged on the CPU from here on", self.device)
                self.move(CPU)
                self._add(plane, s, corner[1:], some)

    def _add(self, plane: torch.Tensor, s: int, corner: Sequence[int], channels: torch.Tensor | None) -> None:
        """Take in slice s (P, L, T) of a window: whole or, where memory runs out, not at all."""
        plane, (top, left) = plane.to(self.mean.device), corner
        where = (s + 1, slice(top, top + plane.shape[0]), slice(left, left + plane.shape[1]))
        mean, total = self.mean[where], self.total[where] + self.gaussian[s]
        plane = plane if channels is None else plane.index_select(2, channels.to(plane.device))
        share, logit = (self.gaussian[s] / total)[..., None], plane.float().clamp(-LARGEST, LARGEST)
        average = mean.float().lerp_(logit, share)
        if mean.dtype != torch.float32:
            self.mean[where] = average
        self.total[where] = total

    def finish(self, until: int) -> Slab:
        """The mean of the slices before `until` that were not handed over yet, and one that was."""
        count, first = until - self.start, 0 if self.start else 1
        return Slab(self.mean[first : count + 1].permute(3, 0, 1, 2), self.start + first - 1)

    def advance(self, until: int) -> None:
        """Forget the slices before `until` but for the last."""
        step, depth = until - self.start, len(self.mean) - 1
        for row in range(depth - step + 1):
            self.mean[row].copy_(self.mean[row + step])
        for row in range(1, depth + 1):
            self.total[row] = self.total[row + step] if row + step <= depth else 0
        self.start = until


def done_where_it_fits(take: Callable[[Slab], Any], slab: Slab) -> Any:
    """`take(slab)`, on the CPU where the memory of the slab's device runs out."""
    return where_it_fits(lambda place: take(Slab(slab.logits.to(place), slab.start)), slab.logits.device, "this part")


class SlabInferer(Inferer):
    """Sliding windows to a label map: value i + 1 for target i, on the grid before resampling.

    Args:
        roi_size: window (S, P, L), the patch the network was trained with.
        table: label table, or the names of targets of which none lies in another, in the order of the outputs.
        overlap: of neighboring windows, as a fraction of the window.
        sw_batch_size: windows per forward pass.
        mirror: average over the eight mirrored versions of each window; or over those along some axes, ``"SP"``.
        threshold: probability above which a target is painted; a number, or target -> number (others: 0.5).
        targets: names of the only targets to compute; None for all.
        amp: mixed precision, on devices that compute in its type.
        amp_dtype: "bfloat16", "float16", or "auto": bfloat16, or float16 on a GPU that does not compute in bfloat16.
        progress: show a progress bar over the windows.
        activation: "sigmoid": of targets that lie equally deep the one furthest above its threshold wins; "regions": later
            ones are painted over earlier ones (nnU-Net); "softmax": the largest logit wins, thresholds are not looked at,
            and the first output is the background; "probabilities": so too, but a softmax is averaged (nnU-Net 1).
        probabilities: keeps each target's probability of the case at hand, for the saver.
        doubts: say in `quality`, after each image, how far versions agree and how sure their mean is (`Quality.report`).

    Where a GPU's memory runs out, fewer windows go per pass; then the buffer, at last the network goes to the CPU.

    Raises:
        ValueError: an unknown target or axis, a threshold outside (0, 1), inputs that are not one image (1, C, S, P, L),
            outputs that do not fit the table, NaN logits.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        table: LabelTable | Sequence[str],
        overlap: float = 0.5,
        sw_batch_size: int = 1,
        mirror: bool | str = False,
        threshold: float | Mapping[str, float] = 0.5,
        targets: Sequence[str] | str | None = None,
        amp: bool = True,
        progress: bool = True,
        activation: str = "sigmoid",
        amp_dtype: str = "auto",
        probabilities: Probabilities | None = None,
        doubts: bool = False,
    ) -> None:
        self.roi_size = tuple(int(side) for side in roi_size)
        if len(self.roi_size) != 3 or min(self.roi_size) < 1:
            raise ValueError(f"roi_size is {roi_size}, expected three positive numbers of voxels (S, P, L)")
        self.table = table if isinstance(table, LabelTable) else LabelTable(dict.fromkeys(table), [])
        self.names = self.table.names
        self.levels = threshold_logits(threshold, self.names)
        chosen = [targets] if isinstance(targets, str) else self.names if targets is None else list(targets)
        unknown = [name for name in chosen if name not in self.names]
        if unknown or not chosen:
            raise ValueError(f"unknown targets {unknown}; choose from {list(self.names)}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}, expected one of {list(ACTIVATIONS)}")
        if amp_dtype not in AMP_DTYPES:
            raise ValueError(f"amp_dtype is {amp_dtype!r}, expected one of {list(AMP_DTYPES)}")
        self.activation, self.exclusive = activation, activation in ("softmax", "probabilities")
        self.outputs = (*(("background",) if self.exclusive else ()), *self.names)
        self._choose(chosen)
        window_starts(1, 1, overlap)
        if sw_batch_size < 1:
            raise ValueError(f"sw_batch_size is {sw_batch_size}, expected 1 window per pass or more")
        self.overlap, self.sw_batch_size, self.flips = overlap, sw_batch_size, mirrored_axes(mirror)
        self.amp, self.amp_dtype, self.progress = amp, amp_dtype, progress
        self.probabilities, self.doubts = probabilities, doubts
        self.quality: dict[str, dict[str, float | None]] = {}
        self._observer: Quality | None = None

    def restricted_to(self, targets: Sequence[str]) -> SlabInferer:
        """The same inferer, which computes of its targets only those that are among `targets`, perhaps none."""
        other = copy.copy(self)
        other._choose([name for name in self.chosen if name in targets])
        return other

    def _choose(self, chosen: Sequence[str]) -> None:
        """Paint these targets; of a softmax all outputs compete, whichever are painted."""
        self.chosen = chosen
        self.channels = [i for i, name in enumerate(self.outputs) if name in chosen or (self.exclusive and chosen)]

    def __call__(self, inputs: torch.Tensor, network: Callable, **asked: Any) -> torch.Tensor:
        """Label map (1, 1, s, p, l), uint8, of one prepared image (1, C, S, P, L), with the image's metadata.

        `asked`: more arguments of `slabs`.
        """
        image, grid = self._image(inputs), source_grid(inputs)
        numbers = {output: number for number, output in enumerate(self.channels)}
        channels = [numbers.get(target + self.exclusive) for target in range(len(self.names))]
        tiers = paint_tiers(self.table, channels, self.activation)
        levels = self.levels if self.exclusive else [self.levels[i] for i in self.channels]
        painter = Painter(image.shape[1:], grid.shape, tiers, levels, grid.thick, self.exclusive)
        quality = self._observer = self._quality(image.shape[1:]) if self.doubts else None
        takers = [painter.add, *([lambda slab: quality.see(as_logits(slab, self.activation))] if quality else [])]
        if self.probabilities is not None:
            kept = {name: numbers[self.outputs.index(name)] for name in self.chosen}
            self.probabilities.begin(image.shape[1:], grid, self.names, kept, self.activation)
            takers.append(self.probabilities.add)
        for slab in self.slabs(image, network, **asked) if tiers else ():
            for take in takers:
                done_where_it_fits(take, slab)
        self._observer, self.quality = None, quality.report() if quality else {}
        label_map = painter.label_map[None, None]
        for value, name in enumerate(self.names, start=1):
            if self.exclusive and name not in self.chosen:
                label_map[label_map == value] = 0
        if not isinstance(inputs, MetaTensor):
            return label_map
        result = MetaTensor(label_map).copy_meta_from(inputs, copy_attr=False)
        result.meta = {**inputs.meta, COMPUTED: json.dumps(list(self.chosen))}
        return result

    def uncertainty(self, inputs: torch.Tensor, network: Callable) -> float:
        """Mean binary entropy (bits) of all targets over the voxels where some target is painted, 0 where none is.

        Of a softmax network's targets, against the background.
        """
        total, count, done = 0.0, 0, 0

        def bits(slab: Slab) -> tuple[float, int]:
            logits = as_logits(slab, self.activation).logits[:, done - slab.start :].float()
            logits = logits[1:] - logits[:1] if self.exclusive else logits
            logits = logits[:, (logits > 0).any(0)]
            return float(binary_entropy(logits).sum()), logits.numel()

        for slab in self.slabs(self._image(inputs), network):
            found, values = done_where_it_fits(bits, slab)
            total, count, done = total + found, count + values, slab.stop
        return total / count if count else 0.0

    def slabs(self, image: torch.Tensor, network: Callable, passes: Callable[..., Passes] = Passes) -> Iterator[Slab]:
        """Averaged logits of an image (C, S, P, L), finished slices first; a slab is valid until the next is asked for.

        `passes` makes what takes the windows through the network.
        """
        shape = image.shape[1:]
        before = self._before(shape)
        after = [max(patch - size, 0) - low for size, patch, low in zip(shape, self.roi_size, before, strict=True)]
        if any(after):
            margins = [n for pair in zip(before[::-1], after[::-1], strict=True) for n in pair]
            image = where_it_fits(
                lambda place: torch.nn.functional.pad(image.to(place), margins), image.device, "the image"
            )
        starts = [
            window_starts(size, patch, self.overlap) for size, patch in zip(image.shape[1:], self.roi_size, strict=True)
        ]
        kept = tuple(slice(low, low + size) for low, size in zip(before[1:], shape[1:], strict=True))
        device = network_device(network, image.device)
        average = self._average(image.shape[1:], device)
        progress = tqdm(total=math.prod(map(len, starts)), desc="windows", unit="window", disable=not self.progress)
        settings = self.sw_batch_size, self.flips, self.amp, self.amp_dtype, self._checked, self._observer
        with passes(network, device, *settings) as through, progress:
            for row, s in enumerate(starts[0]):
                corners = list(itertools.product([s], *starts[1:]))
                for one, corner in through.logits(image, corners, self.roi_size, average):
                    average.add(one, corner, self.channels)
                    del one
                    progress.update()
                until = starts[0][row + 1] if row + 1 < len(starts[0]) else image.shape[1]
                slab = average.finish(until)
                top = max(before[0] - slab.start, 0)
                bottom = min(slab.stop, before[0] + shape[0]) - slab.start
                yield Slab(slab.logits[(slice(None), slice(top, bottom), *kept)], slab.start + top - before[0])
                if until < image.shape[1]:
                    average.advance(until)

    def _before(self, shape: Sequence[int]) -> list[int]:
        """Voxels that an image (S, P, L) smaller than the window is padded with in front."""
        return [max(patch - size, 0) // 2 for size, patch in zip(shape, self.roi_size, strict=True)]

    def _image(self, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.ndim != 5 or len(inputs) != 1:
            raise ValueError(f"inputs have the shape {tuple(inputs.shape)}, expected one image (1, C, S, P, L)")
        return (inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs)[0]

    def _quality(self, shape: Sequence[int]) -> Quality:
        """Of the targets that are painted, in an image (S, P, L)."""
        sides = zip(self._before(shape), shape, self.roi_size, strict=True)
        box = [slice(low, low + min(size, patch)) for low, size, patch in sides]
        outputs = {name: self.outputs.index(name) for name in self.chosen}
        targets = {name: (output, self.channels.index(output)) for name, output in outputs.items()}
        return Quality(targets, dict(zip(self.names, self.levels, strict=True)), self.exclusive, box)

    def _average(self, shape: Sequence[int], device: torch.device) -> RollingAverage:
        """The buffer, on the network's device where it takes at most half of the memory that is free there."""
        if device.type == "cuda":
            needed = 4 * len(self.channels) * self.roi_size[0] * math.prod(shape[1:])
            if min(needed, max(needed // 2, FULL_PRECISION_BYTES)) > free_bytes(device) // 2:
                device = CPU
        size = len(self.channels), shape, self.roi_size
        return where_it_fits(lambda place: RollingAverage(*size, place), device, "the buffer of averaged windows")

    def _checked(self, logits: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """The finest output, plain, or its softmax; ValueError where it does not fit the table."""
        logits = logits[0] if isinstance(logits, (list, tuple)) else logits
        if logits.shape[1] != len(self.outputs):
            raise ValueError(
                f"the network has {logits.shape[1]} outputs, the label table {len(self.outputs)} targets: {list(self.outputs)}"
            )
        if tuple(logits.shape[2:]) != self.roi_size:
            raise ValueError(f"the network turns windows {self.roi_size} into {tuple(logits.shape[2:])}; same expected")
        logits = logits.as_tensor() if isinstance(logits, MetaTensor) else logits
        return logits.float().softmax(1) if self.activation == "probabilities" else logits
