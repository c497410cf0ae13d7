"""Reading image files: one volume, its affine and where it came from, whatever the format; for images, label maps,
training, inference and scoring alike.

NIfTI goes through nifti.py (nibabel), everything else, DICOM folders included, through dicom.py (SimpleITK).
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import Any

import numpy as np
from monai.data import ImageReader
from monai.utils import SpaceKeys
from nibabel.orientations import axcodes2ornt, io_orientation, ornt2axcodes, ornt_transform

from ..errors import CaseError
from .dicom import open_file, open_series
from .folders import NIFTI, paths_of
from .grids import check_body, grid_difference, turn_array, turn_grid, turn_to
from .nifti import Opened, open_nifti


@dataclass
class RawVolume:
    """Voxels (C, I, J, K) in the file's own type and axis order, affine (4, 4) to RAS millimetres, and the path."""

    array: np.ndarray
    affine: np.ndarray
    source: str


def read_volume(path) -> RawVolume:
    """Read one file, DICOM folder, or list of files that hold one channel each.

    A 4D file holds its channels along the last axis. Slope and intercept are applied (then voxels are float32).

    Raises:
        CaseError: missing, damaged or unreadable file; RGB, complex or 2D voxels; a geometry that no scan of a body
            has; channels on different grids.
    """
    paths = [os.fspath(one) for one in paths_of(path)]
    if not paths:
        raise CaseError("an empty list of image files; expected one path per channel")
    volumes = []
    for one in paths:
        opened = _open(one)
        volumes.append(RawVolume(opened.load(), opened.affine, one))
        check_same_grid(volumes[0], volumes[-1], "channels of one case")
    if len(volumes) == 1:
        return volumes[0]
    return RawVolume(np.concatenate([v.array for v in volumes]), volumes[0].affine, volumes[0].source)


def read_grid(path) -> Opened:
    """The grid of what `read_volume` reads, from the header alone (of the first file, where each holds a channel)."""
    paths = paths_of(path)
    opened = _open(os.fspath(paths[0]))
    return opened._replace(channels=len(paths)) if len(paths) > 1 else opened


def read_labels(path) -> RawVolume:
    """One 3D label map with whole numbers, array (1, I, J, K) of an integer type, on its own axes.

    Raises:
        CaseError: what `read_volume` refuses; several volumes; fractions, NaN, numbers beyond 32 bits.
    """
    raw = read_volume(path)
    if len(raw.array) != 1:
        raise CaseError(f"{raw.source}: {len(raw.array)} volumes in a label file; expected one 3D label map")
    return RawVolume(as_whole_numbers(raw.array, raw.source), raw.affine, raw.source)


def as_whole_numbers(array: np.ndarray, source: str = "label map") -> np.ndarray:
    """The same values with an integer type.

    Raises:
        CaseError: fractions, NaN or numbers beyond 32 bits; the message says by how much they differ.
    """
    array = np.asarray(array)
    if array.dtype.kind in "iub":
        return array.view(np.uint8) if array.dtype.kind == "b" else array
    with np.errstate(invalid="ignore"):
        whole = array.astype(np.int32)
    wrong = array != whole
    if wrong.any():
        example = float(array[wrong].flat[0])
        if np.isfinite(array[wrong]).all() and not np.any(array[wrong] % 1):
            raise CaseError(
                f"{source}: {int(wrong.sum())} voxels are beyond 32 bits, for example {example:.0f}; a label map holds ids: "
                "pair the right file, or save it with smaller ones, as integers"
            )
        apart = f", {abs(example - round(example)):.2g} beside {round(example)}" if np.isfinite(example) else ""
        raise CaseError(
            f"{source}: {int(wrong.sum())} voxels are not whole (no whole number: {example!r}{apart}); a label map holds "
            "ids: resample it with nearest neighbor and save it as integers, or pair the right file"
        )
    return whole


def check_same_grid(first: RawVolume, second: RawVolume, what: str) -> None:
    """Raise CaseError unless both volumes have the same shape and, within `SAME_GRID`, the same affine."""
    difference = grid_difference(second.array.shape[1:], second.affine, first.array.shape[1:], first.affine)
    if difference:
        raise CaseError(
            f"{second.source} and {first.source}: {what} lie on different grids: {difference}; resample one onto the other, "
            "correct the header, or pair the right files"
        )


def on_grid_of(first: RawVolume, second: RawVolume, what: str) -> RawVolume:
    """The second volume with its axes flipped and permuted as the first one's (a view), checked to be on its grid."""
    if grid_difference(first.array.shape[1:], first.affine, second.array.shape[1:], second.affine):
        turn = turn_to(second.affine, first.affine)
        affine = turn_grid(second.array.shape[1:], second.affine, turn)[1]
        second = RawVolume(turn_array(second.array, turn), affine, second.source)
    check_same_grid(first, second, what)
    return second


def axis_codes(affine: np.ndarray, orientation: str = "SPL") -> str:
    """Where each axis shall point, "SPL" for example; an `orientation` of stored axes ("kji") in this affine's letters.

    Stored axes are NIfTI's voxel indices i, j, k: "kji" is their order reversed and none turned round, as nnU-Net has it.

    Raises:
        ValueError: an orientation that is neither.
    """
    if sorted(orientation) == ["i", "j", "k"]:
        codes = ornt2axcodes(io_orientation(affine))
        return "".join(codes["ijk".index(axis)] for axis in orientation)
    if sorted("LPS"["LRPAIS".index(axis) // 2] for axis in orientation if axis in "LRPAIS") != ["L", "P", "S"]:
        raise ValueError(f"orientation is {orientation!r}; expected three of LR, PA, IS, or the stored axes i, j and k")
    return orientation


def to_spl(volume: RawVolume, dtype: type | None = None, orientation: str = "SPL") -> tuple[np.ndarray, np.ndarray]:
    """Voxels (C, S, P, L), contiguous, and their affine: the axes turned by the affine alone, as Orientationd does."""
    turn = ornt_transform(io_orientation(volume.affine), axcodes2ornt(axis_codes(volume.affine, orientation)))
    affine = turn_grid(volume.array.shape[1:], volume.affine, turn)[1]
    return np.ascontiguousarray(turn_array(volume.array, turn), dtype), affine


def _open(path: str) -> Opened:
    """The header of a file or DICOM folder, with everything checked that does not need the voxels."""
    try:
        state = os.stat(path)
    except OSError as error:
        reason = "no such file or folder"
        if not isinstance(error, FileNotFoundError):
            reason = f"cannot be read ({error.strerror})"
        elif os.path.islink(path):
            reason = f"a link to {os.readlink(path)}, which is not there"
        raise CaseError(f"{path}: {reason}; check the data folder and the datalist") from error
    if stat.S_ISDIR(state.st_mode):
        opened = open_series(path)
    elif not stat.S_ISREG(state.st_mode):
        raise CaseError(f"{path}: neither a file nor a folder (a pipe or a device); expected an image")
    elif state.st_size == 0:
        raise CaseError(f"{path}: an empty file; copy or download it again")
    elif not os.access(path, os.R_OK):
        raise CaseError(f"{path}: cannot be read (permission denied); ask for the right to read it")
    else:
        opened = open_nifti(path) if path.lower().endswith(NIFTI) else open_file(path)
    if 0 in opened.shape or not opened.channels:
        raise CaseError(f"{path}: {'x'.join(map(str, opened.shape))} voxels; expected a 3D volume")
    check_body(opened.shape, opened.affine, path, opened.unit)
    return opened


class Reader(ImageReader):
    """`read_volume` for MONAI: `LoadImaged(keys="image", reader="$tsfm.cases.volumes.Reader()", ensure_channel_first=True)`.

    Everything happens in `get_data`, because LoadImage takes an error in `read` for "try the next reader" and would
    bury the message.
    """

    def verify_suffix(self, filename: Any) -> bool:
        return True

    def read(self, data: Any, **kwargs: Any) -> Any:
        return data

    def get_data(self, img: Any) -> tuple[np.ndarray, dict]:
        """Voxels (C, I, J, K) and MONAI's meta data for one file or a sequence of channel files."""
        volume = read_volume(img)
        meta = {
            "affine": volume.affine,
            "original_affine": volume.affine.copy(),
            "spatial_shape": np.array(volume.array.shape[1:]),
            "original_channel_dim": 0,
            "space": SpaceKeys.RAS,
            "filename_or_obj": volume.source,
        }
        return volume.array, meta


def as_label_map(array: np.ndarray, targets: int, source: str = "") -> np.ndarray:
    """A predicted label map, checked: three axes, whole numbers from 0 to `targets`."""
    array = as_whole_numbers(array, f"{source}: the prediction")
    if array.ndim != 3:
        raise ValueError(f"{source}: the prediction has shape {array.shape}, expected three axes")
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low < 0 or high > targets:
        raise ValueError(
            f"{source}: the prediction holds values from {low} to {high}, but the label table has {targets} targets "
            f"(0 to {targets}); was it made with another table?"
        )
    return array.astype(np.uint8 if targets < 256 else np.uint16, copy=False)
