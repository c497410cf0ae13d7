"""One prepared case on disk: the files of its folder, written once and whole, read in part.

The folder has `image.b2nd`, `codes.b2nd`, `foreground.npy` and `case.json`. It is written beside its place and renamed into
it, so a folder that exists is complete. `case.json` holds a checksum of each file and of itself; a process compares them
once, before it reads from the folder.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import blosc2
import numpy as np

from ..cases.grids import warn
from ..errors import CaseError
from ..files import unfinished
from ..labels import LabelTable
from ..schema import FileError, read_json

FORMAT = 2
"""Raise it whenever the same input would be prepared or stored differently."""

LEVELS = 2**14 - 1
"""Steps between a channel's smallest and largest value: voxels are stored as uint16 levels. Rounding errs by at most
3e-5 of the range, where float16 errs by up to 5e-4, and takes no more space."""

ENOUGH_LEVELS = 1000
"""With fewer levels for 98% of a channel's voxels, its outliers are warned of; where different values would then share a level,
the case is stored in float32."""

SAMPLE = 100_000
"""About how many voxels of a channel are looked at for this; all of them where these have few values."""

CHUNK = (64, 64, 64)

BLOCK = (32, 32, 32)
"""Voxels (S, P, L) that blosc2 keeps together in a file, and those it decompresses at least. A patch of 112x160x192
takes about 10 ms, and from half to twice these sizes little changes; LZ4 in place of ZSTD takes 7 ms and a third more
space."""

FOREGROUND_VOXELS = 10_000

FOREGROUND_SHARE = 0.01
"""nnU-Net keeps max(min(10000, N), 1% of N) voxels of each class."""

UNFINISHED = ".writing"
"""In a store: the folder in which cases are written."""

Box = Sequence[tuple[int, int]]

_VERIFIED: set[str] = set()
"""Folders whose checksums this process (or the one that it was forked from) compared or wrote."""


class StoreError(OSError):
    """The store cannot be written (full, read-only, not a folder); nothing half-written is left in it."""


class StoredCase:
    """One prepared case on disk; reads boxes, holds no voxels. Boxes are ((s0, s1), (p0, p1), (l0, l1)), inside."""

    def __init__(self, path: str, table: LabelTable) -> None:
        self.path, self._table = path, table
        index = read_index(path)
        self.properties: dict[str, Any] = index["properties"]
        self._foreground, self._steps = index["foreground"], index["steps"]
        self.steps: tuple[float, ...] = tuple(step for _, step in self._steps)  # between stored values; 0: as they were
        self.channels: int = len(self._steps)
        self.shape: tuple[int, int, int] = tuple(self.properties["shape"])

    def read_image(self, box: Box | None = None) -> np.ndarray:
        """float32 (C, s, p, l)."""
        image = self._read("image.b2nd", (slice(0, self.channels), *self._slices(box))).astype(np.float32)
        for channel, (start, step) in zip(image, self._steps, strict=True):
            if step:
                channel *= np.float32(step)
                channel += np.float32(start)
        return image

    def read_codes(self, box: Box | None = None) -> np.ndarray:
        """Local label codes (s, p, l)."""
        return self._read("codes.b2nd", self._slices(box))

    @property
    def cropped_share(self) -> float:
        """What the crop kept of the volume, as `preprocessing.channel_rules` asks for it."""
        cropped, source = (np.prod(self.properties[key], dtype=float) for key in ("cropped_shape", "source_shape"))
        return float(cropped / source)

    @cached_property
    def foreground(self) -> dict[int, np.ndarray]:
        """Local code -> voxel coordinates (n, 3), a sample per code; background and ignored codes left out."""
        voxels = np.load(os.path.join(self.path, "foreground.npy"), mmap_mode="r")
        ignored = self._table.ignored(self.properties["dataset"])
        return {code: voxels[start:stop] for code, start, stop in self._foreground if code not in ignored}

    def _read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        """A part of one array. It is opened anew each time: thousands of cases would use up the open files."""
        path = os.path.join(self.path, name)
        return blosc2.open(path, mode="r", mmap_mode="r", dparams={"nthreads": 1})[slices]

    def _slices(self, box: Box | None) -> tuple[slice, ...]:
        if box is None:
            return tuple(slice(0, size) for size in self.shape)
        if any(not 0 <= start < stop <= size for (start, stop), size in zip(box, self.shape, strict=True)):
            raise ValueError(f"{self.path}: box {tuple(box)} is empty or reaches beyond the volume {self.shape}")
        return tuple(slice(int(start), int(stop)) for start, stop in box)


def read_index(path: str, compare: bool = True) -> dict[str, Any]:
    """What ``case.json`` holds, after the checksums were compared (of the other files: unless `compare` is False).

    Raises:
        CaseError: a file of the case is damaged or gone.
    """
    try:
        index = read_json(os.path.join(path, "case.json"))
        damaged = [] if index.pop("checksum", None) == zlib.crc32(_json(index)) else ["case.json"]
        if not damaged and path not in _VERIFIED and compare:
            damaged = [name for name, value in index["checksums"].items() if _file_checksum(path, name) != value]
    except (FileError, OSError, AttributeError) as error:
        damaged = [str(error)]
    if damaged:
        raise CaseError(
            f"the prepared case {path} is damaged ({', '.join(damaged)}): delete this folder, and the same command "
            "prepares the case again"
        )
    if compare:
        _VERIFIED.add(path)
    return index


def folder_bytes(path: str) -> int:
    """Size of a stored case on disk."""
    return sum(entry.stat().st_size for entry in os.scandir(path))


def _file_checksum(path: str, name: str) -> int:
    file = os.path.join(path, name)
    return zlib.crc32(np.memmap(file, np.uint8, "r")) if os.path.getsize(file) else 0  # nothing cannot be mapped


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=4, default=_plain_number).encode()


def sample_foreground(codes: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Coordinates (n, 3) of foreground voxels, and (code, first row, last row + 1) of each code but 0.

    max(min(10000, N), 1% of N) voxels per code, drawn without replacement.
    """
    random = np.random.RandomState(1234)
    flat = np.flatnonzero(codes)
    values = codes.reshape(-1)[flat]
    by_code = flat[np.argsort(values, kind="stable")]
    rows, spans, start, first = [], [], 0, 0
    for code, count in enumerate(np.bincount(values)) if flat.size else []:
        if not count:
            continue
        wanted = max(min(FOREGROUND_VOXELS, count), int(np.ceil(FOREGROUND_SHARE * count)))
        chosen = by_code[first + np.sort(random.choice(count, wanted, replace=False))]
        rows.append(np.stack(np.unravel_index(chosen, codes.shape), 1))
        spans.append((code, start, start + wanted))
        start, first = start + wanted, first + count
    dtype = np.uint16 if max(codes.shape) < 65536 else np.uint32
    return (np.concatenate(rows) if rows else np.empty((0, 3))).astype(dtype), spans


def files_of(prepared) -> dict[str, bytes]:
    """File name -> content of a stored case."""
    codes = prepared.codes
    if codes is None:
        raise CaseError(f"{prepared.properties['source']}: no label in this item; the store holds labelled cases")
    levels, steps = quantize(prepared.image)
    exact = any(loses_grays(channel, *scale) for channel, scale in zip(prepared.image, steps, strict=True))
    _warn_of_outliers(prepared.image, steps, prepared.properties["source"], exact)
    if exact:
        levels, steps = np.asarray(prepared.image, np.float32), [(0.0, 0.0)] * len(steps)
    (voxels, spans), npy = sample_foreground(codes), io.BytesIO()
    np.save(npy, voxels)
    files = {"image.b2nd": _compress(levels), "codes.b2nd": _compress(codes), "foreground.npy": npy.getvalue()}
    index = {"format": FORMAT, "properties": prepared.properties, "steps": steps, "foreground": spans}
    index["checksums"] = {name: zlib.crc32(content) for name, content in files.items()}
    return {**files, "case.json": _json({**index, "checksum": zlib.crc32(_json(index))})}


def quantize(image: np.ndarray) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """float32 (C, S, P, L) -> uint16 levels and, per channel, the value of level 0 and the step between levels."""
    levels = np.empty(image.shape, np.uint16)
    steps = []
    for channel, out in zip(image, levels, strict=True):
        low, high = float(channel.min()), float(channel.max())
        step = (high - low) / LEVELS or 1.0
        for plane, target in zip(channel, out, strict=True):
            np.rint((plane - np.float32(low)) / np.float32(step), out=target, casting="unsafe")
        steps.append((low, step))
    return levels, steps


def loses_grays(channel: np.ndarray, low: float, step: float) -> bool:
    """Whether different values of a channel, of all or of the middle 98%, share fewer than `ENOUGH_LEVELS` levels."""
    values = channel.reshape(-1)
    sample = values[:: max(1, values.size // SAMPLE)]
    edges = np.percentile(sample, (1, 99))
    found = np.unique(sample)
    if len(found) < ENOUGH_LEVELS // 10:
        found = np.unique(values)
    for grays in (found, found[(edges[0] <= found) & (found <= edges[1])]):
        shared = np.unique(np.rint((grays - np.float32(low)) / np.float32(step)))
        if len(shared) < min(len(grays), ENOUGH_LEVELS):
            return True
    return False


def _warn_of_outliers(image: np.ndarray, steps: Sequence[tuple[float, float]], source: str, exact: bool) -> None:
    """Warn where a few extreme voxels stretch a channel's range so far that the others share few levels."""
    for number, (channel, (_, step)) in enumerate(zip(image, steps, strict=True)):
        values = channel.reshape(-1)
        low, middle, high = np.percentile(values[:: max(1, values.size // SAMPLE)], (1, 50, 99))
        if 0 < (used := (high - low) / step) < ENOUGH_LEVELS:
            extreme = float(max(values.min(), values.max(), key=lambda value: abs(value - middle)))
            warn(
                f"{source}: channel {number}, as prepared, reaches {extreme:.4g} while 98% of it lie between {low:.4g} "
                f"and {high:.4g}, which leaves {used:.0f} gray levels for these"
                f"{' (so it is stored in float32)' * exact}; correct the outliers in the image"
            )


def _compress(array: np.ndarray) -> bytes:
    """A blosc2 frame, chunked for reading patches. One thread: with more, the order of blocks in a chunk varies."""
    lead = (1,) * (array.ndim - 3)
    stored = blosc2.asarray(
        array,
        chunks=(*lead, *map(min, CHUNK, array.shape[-3:])),
        blocks=(*lead, *map(min, BLOCK, array.shape[-3:])),
        cparams={"codec": blosc2.Codec.ZSTD, "clevel": 1, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1},
    )
    return stored.to_cframe()


def write_folder(store_dir: str, path: str, files: Mapping[str, bytes]) -> None:
    """Write files into a new folder and move it to `path` in one step; on failure leave nothing behind."""
    scratch = unfinished(os.path.join(store_dir, UNFINISHED))
    try:
        os.makedirs(scratch)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        for name, content in files.items():
            with open(os.path.join(scratch, name), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        try:
            os.rename(scratch, path)
        except OSError:
            if not os.path.isdir(path):
                raise
    except OSError as error:
        raise StoreError(
            error.errno,
            f"cannot write the store at {store_dir} ({error.strerror or error}); free some space, or set store_dir to "
            "a folder that can be written",
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _plain_number(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)
