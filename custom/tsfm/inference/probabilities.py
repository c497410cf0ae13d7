"""Each target's probability on the image's own grid, written to disk as the windows go, in memory that does not grow.

``CASE_probabilities.b2nd`` is a Blosc2 array, float16, (targets, X, Y, Z) in the order of the image's voxels;
`blosc2.open(path)` reads any part of it. Its ``schunk.vlmeta`` has ``targets``, the names along the first axis, and
``affine``, from voxels to RAS millimetres. What the preparation cropped is 0, as are targets that were not computed.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import blosc2
import numpy as np
import torch
from scipy.special import entr

from ..cases.folders import saved_outputs
from ..cases.grids import turn_array, turn_to
from ..files import sweep, unfinished
from .painting import Slab, resize_axes
from .source_grids import SourceGrid

CHUNK = 16
"""Slices of one chunk, along the image's axis that is closest to superior."""


NEEDED_FOR = ("probabilities", "uncertainty")
"""Outputs (``--save``) that are made of them."""


class Probabilities:
    """The probabilities of one case at a time: the inferer fills them, the saver takes them.

    Args:
        output_dir: folder of the results; what is unfinished lies there under a hidden name.
    """

    def __init__(self, output_dir: str | os.PathLike) -> None:
        self.folder, self.file, self.array = Path(output_dir), None, None
        atexit.register(self.discard)

    def begin(
        self, shape: Sequence[int], grid: SourceGrid, names: Sequence[str], channels: Mapping[str, int], activation: str
    ) -> None:
        """Start a case.

        Args:
            shape: of the prepared image.
            grid: where it lies in its image.
            names: all targets; channels: number in the logits of those that are computed.
            activation: "softmax" over all logits, background first; "probabilities" already; else a sigmoid of each.
        """
        self.discard()
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder)
        self.channels, self.activation = [channels.get(name) for name in names], activation
        self.axes, self.done = resize_axes(shape, grid.shape, grid.thick), 0
        self.last = self.axes[0].index.max(1)
        affine = np.asarray(grid.image_affine, float)
        self.turn = turn_to(np.asarray(grid.affine, float), affine)
        self.along, self.step = (int(number) for number in self.turn[0])  # the image's axis of s, and its direction
        spans = [
            (start, stop) if sign > 0 else (full - stop, full - start)
            for (start, stop), sign, full in zip(grid.crop, self.turn[:, 1], grid.full_shape, strict=True)
        ]
        self.first = int(spans[0][0] if self.step > 0 else spans[0][1] - 1)
        order = np.argsort(self.turn[:, 0])
        self.box, size = [slice(*spans[axis]) for axis in order], [int(grid.full_shape[axis]) for axis in order]
        chunk = [min(n, CHUNK) if axis == self.along else n for axis, n in enumerate(size)]
        self.file = Path(unfinished(self.folder, ".b2nd"))
        self.array = blosc2.zeros(
            (len(names), *size), np.float16, chunks=(1, *chunk), urlpath=str(self.file), mode="w", contiguous=True,
            cparams={"codec": blosc2.Codec.ZSTD, "clevel": 1, "filters": [blosc2.Filter.BITSHUFFLE]},
        )  # fmt: skip
        self.array.schunk.vlmeta["targets"] = list(names)
        self.array.schunk.vlmeta["affine"] = affine.tolist()
        self.block = None

    def add(self, slab: Slab) -> None:
        """Take in the source slices that are determined by the slices up to the end of this slab."""
        begin, end = self.done, int(np.searchsorted(self.last, slab.stop))
        for s in range(begin, end):
            place = self.first + self.step * s
            number = place // CHUNK
            here = [slice(None)] * 4
            here[1 + self.along] = slice(number * CHUNK, number * CHUNK + CHUNK)
            if self.block is None:
                self.block = self.array[tuple(here)]
            where = list(self.box)
            where[self.along] = place - number * CHUNK
            plane = turn_array(self._slice(slab, s)[:, None].numpy(), self.turn)
            self.block[(slice(None), *where)] = plane.take(0, axis=1 + self.along)
            if s + 1 == self.axes[0].n_out or (place + self.step) // CHUNK != number:
                self.array[tuple(here)], self.block = self.block, None
            self.done = s + 1

    def save(self, path: str | os.PathLike) -> None:
        """Move the finished array to `path`."""
        self.array = None
        os.replace(self.file, path)
        self.file = None

    def uncertainty(self) -> np.ndarray:
        """float32 (X, Y, Z) in bits: the largest binary entropy that a target's probability has at the voxel."""
        found = np.zeros(self.array.shape[1:], np.float32)
        for start in range(0, found.shape[self.along], CHUNK):
            where = [slice(None)] * 3
            where[self.along] = slice(start, start + CHUNK)
            p = self.array[(slice(None), *where)].astype(np.float32)
            found[tuple(where)] = (entr(p) + entr(1 - p)).max(0) / np.log(2)
        return found

    def discard(self) -> None:
        """Remove what is there of a case that failed."""
        if self.file is not None:
            self.array = None
            self.file.unlink(missing_ok=True)
            self.file = None

    def _slice(self, slab: Slab, s: int) -> torch.Tensor:
        """Probabilities (T, p, l) of source slice s, float16, on the CPU."""
        index, weights = self.axes[0].index[s] - slab.start, self.axes[0].weights[s]
        logits = slab.logits[:, index[0]].float()
        if len(index) > 1 and weights[1] != 0:
            logits = torch.lerp(logits, slab.logits[:, index[1]].float(), float(weights[1]))
        for axis in (2, 1):
            logits = self.axes[axis].apply(logits.contiguous(), axis)
        if self.activation != "probabilities":
            logits = logits.softmax(0) if self.activation == "softmax" else logits.sigmoid()
        found = logits.half().cpu()
        absent = found.new_zeros(found.shape[1:])
        return torch.stack([absent if channel is None else found[channel] for channel in self.channels])


def kept_probabilities(output_dir: str | os.PathLike, save: str | Sequence[str]) -> Probabilities | None:
    """A `Probabilities` where an output in `save` needs it, or None: they take time and room."""
    return Probabilities(output_dir) if set(NEEDED_FOR) & set(saved_outputs(save)) else None
