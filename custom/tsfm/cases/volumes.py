"""Reading image files: one volume, its affine and where it came from, whatever the format.

NIfTI goes through nibabel; everything else, DICOM folders included, through SimpleITK where it is installed and
through MONAI's ITKReader otherwise. Affines map voxel indices to RAS millimetres.
"""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from monai.data import ImageReader
from monai.utils import SpaceKeys
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt2axcodes, ornt_transform

SAME_GRID = 0.1
"""Two grids count as the same while no corner is further apart than this fraction of the smallest voxel side."""

NIFTI = (".nii", ".nii.gz")


class CaseError(ValueError):
    """A case that cannot be used; the message names the file, what was found, what was expected and what to do."""


class CaseWarning(UserWarning):
    """A case that is used although something about it looks wrong."""


@dataclass
class RawVolume:
    """Voxels (C, I, J, K) in the file's own type and axis order, affine (4, 4) to RAS millimetres, and the path."""

    array: np.ndarray
    affine: np.ndarray
    source: str


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """Voxel sides in mm along the array's axes."""
    return tuple(float(side) for side in np.linalg.norm(np.asarray(affine, float)[:3, :3], axis=0))


def grid_distance_mm(affine: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
    """Largest distance between the corners of two grids of this shape, in mm."""
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape) - 1)
    apart = corners @ (affine - other)[:3, :3].T + (affine - other)[:3, 3]
    return float(np.linalg.norm(apart, axis=1).max())


def read_volume(path) -> RawVolume:
    """Read one file, DICOM folder, or list of files that hold one channel each.

    A 4D file holds its channels along the last axis. Slope and intercept are applied (then voxels are float32).

    Raises:
        CaseError: missing, truncated or unreadable file; RGB, complex or 2D voxels; channels on different grids.
    """
    paths = [os.fspath(p) for p in path] if isinstance(path, (list, tuple)) else [os.fspath(path)]
    if not paths:
        raise CaseError("an empty list of image files; expected one path per channel")
    volumes = [_read_one(p) for p in paths]
    first = volumes[0]
    for other in volumes[1:]:
        check_same_grid(first, other, "channels of one case")
    if len(volumes) == 1:
        return first
    return RawVolume(np.concatenate([v.array for v in volumes]), first.affine, first.source)


def check_same_grid(first: RawVolume, second: RawVolume, what: str) -> None:
    """Raise CaseError unless both volumes have the same shape and, within `SAME_GRID`, the same affine."""
    shape = first.array.shape[1:]
    if shape != second.array.shape[1:]:
        raise CaseError(
            f"{second.source}: shape {second.array.shape[1:]}, but {first.source} has {shape}; {what} must lie on one "
            "grid: resample one onto the other, or pair the right files"
        )
    apart = grid_distance_mm(first.affine, second.affine, shape)
    allowed = SAME_GRID * min(spacing_of(first.affine))
    if apart > allowed:
        raise CaseError(
            f"{second.source}: its affine puts a corner {apart:.3g} mm away from that of {first.source} (allowed: "
            f"{allowed:.3g} mm, a tenth of a voxel); {what} must lie on one grid: correct the header, or pair the "
            "right files"
        )


def _read_one(path: str) -> RawVolume:
    if not os.path.exists(path):
        raise CaseError(f"{path}: no such file or folder; check the data folder and the datalist")
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise CaseError(f"{path}: an empty file; copy or download it again")
    if path.lower().endswith(NIFTI):
        array, affine = _read_nifti(path)
    else:
        array, affine = _read_itk(path)
    if array.ndim != 4 or 0 in array.shape:
        found = "x".join(str(n) for n in array.shape[1:])
        raise CaseError(f"{path}: {found} voxels; expected a 3D volume, or a 4D one with its channels last")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise CaseError(f"{path}: its affine is singular or not finite, so voxels have no size; correct the header")
    return RawVolume(array, affine, path)


def _read_nifti(path: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        image = nib.load(path)
        if image.get_data_dtype().kind == "c":
            raise CaseError(f"{path}: complex voxels; expected real ones: save the magnitude")
        voxels = image.dataobj
        scaled = (getattr(voxels, "slope", 1.0), getattr(voxels, "inter", 0.0)) != (1.0, 0.0)
        array = np.asarray(voxels, np.float32) if scaled else np.asanyarray(voxels)
        if array.dtype.fields is not None:
            array = _gray(array, path)
    except CaseError:
        raise
    except (EOFError, zlib.error) as error:
        raise CaseError(f"{path}: the file ends too early ({error}); copy or download it again") from error
    except (OSError, ValueError, nib.filebasedimages.ImageFileError) as error:
        reason = " ".join(str(error).split())
        raise CaseError(
            f"{path}: not a readable NIfTI file, or cut short ({reason}); copy or download it again"
        ) from error
    if array.ndim == 5 and 1 in array.shape[3:]:
        array = array.reshape((*array.shape[:3], -1))
    array = array[None] if array.ndim != 4 else np.moveaxis(array, -1, 0)
    return array, _nifti_affine(image, path)


def _nifti_affine(image, path: str) -> np.ndarray:
    """The sform where the header has one, else the qform, else the voxel sizes alone; disagreement is warned of."""
    affine = np.asarray(image.affine, float)
    header = image.header
    if not hasattr(header, "get_sform"):
        return affine
    try:
        (sform, s_code), (qform, q_code) = header.get_sform(coded=True), header.get_qform(coded=True)
    except (ValueError, nib.spatialimages.HeaderDataError):
        return affine
    if s_code == 0 and q_code == 0:
        _warn(f"{path}: the header has neither sform nor qform; orientation is taken as nibabel's default (LAS)")
    elif s_code > 0 and q_code > 0:
        apart = grid_distance_mm(sform, qform, image.shape[:3]) if len(image.shape) >= 3 else 0.0
        if apart > SAME_GRID * min(spacing_of(sform)):
            _warn(f"{path}: sform and qform put a corner {apart:.3g} mm apart; the sform is used")
    return affine


def _gray(voxels: np.ndarray, path: str) -> np.ndarray:
    """Gray values of an RGB volume whose three colors are the same."""
    red, green, blue = (voxels[name] for name in voxels.dtype.names[:3])
    if not (np.array_equal(red, green) and np.array_equal(red, blue)):
        raise CaseError(f"{path}: RGB voxels with real colors; expected one value per voxel: convert it to gray first")
    _warn(f"{path}: RGB voxels whose colors are all equal; they are read as gray values")
    return red.astype(np.float32)


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
    shape = volume.array.shape[1:]
    turn = ornt_transform(io_orientation(volume.affine), axcodes2ornt(axis_codes(volume.affine, orientation)))
    order = [0, *(1 + np.argsort(turn[:, 0]).astype(int))]
    array = volume.array[(slice(None), *(slice(None, None, int(flip)) for flip in turn[:, 1]))].transpose(order)
    return np.ascontiguousarray(array, dtype), volume.affine @ inv_ornt_aff(turn, shape)


def _warn(message: str) -> None:
    warnings.warn(message, CaseWarning, stacklevel=2)


def _read_itk(path: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        import SimpleITK
    except ImportError:
        return _read_with_monai(path)
    try:
        image = _read_dicom(SimpleITK, path) if os.path.isdir(path) else SimpleITK.ReadImage(path)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise CaseError(
            f"{path}: SimpleITK cannot read it ({reason}); expected NIfTI, NRRD, MetaImage, or a "
            "folder with one DICOM series"
        ) from error
    array = SimpleITK.GetArrayFromImage(image)
    size = image.GetDimension()
    if image.GetNumberOfComponentsPerPixel() > 1:
        array = np.moveaxis(array, -1, 0)
        if "RGB" in image.GetPixelIDTypeAsString() or (array.dtype == np.uint8 and len(array) in (3, 4)):
            colors = np.rec.fromarrays(list(array[:3]), names="R,G,B")
            array = _gray(colors, path)[None]
    elif size == 4:
        size = 3
    else:
        array = array[None]
    if size != 3:
        raise CaseError(f"{path}: a {size}D image; expected a 3D volume, or a 4D one with its channels last")
    affine = np.eye(4)
    direction = np.array(image.GetDirection()).reshape(image.GetDimension(), -1)[:3, :3]
    affine[:3, :3] = direction * np.array(image.GetSpacing()[:3])
    affine[:3, 3] = image.GetOrigin()[:3]
    array = array.transpose(0, 3, 2, 1)
    return array, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _read_dicom(sitk, path: str):
    """The one DICOM series in a folder."""
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(path)
    if len(series) != 1:
        listed = ", ".join(series) or "none"
        raise CaseError(f"{path}: {len(series)} DICOM series ({listed}); expected a folder that holds exactly one")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(path, series[0]))
    return reader.Execute()


def _read_with_monai(path: str) -> tuple[np.ndarray, np.ndarray]:
    """ITKReader, for environments that have itk in place of SimpleITK (MONAI Label's)."""
    from monai.data import ITKReader
    from monai.utils import OptionalImportError

    try:
        reader = ITKReader(affine_lps_to_ras=True, channel_dim=None)
        array, meta = reader.get_data(reader.read(path))
    except OptionalImportError as error:
        raise CaseError(f"{path}: reading this format needs SimpleITK: pip install SimpleITK") from error
    except (RuntimeError, TypeError) as error:
        raise CaseError(f"{path}: itk cannot read it ({str(error).strip().splitlines()[-1]})") from error
    channels_last = meta.get("original_channel_dim", "no_channel") == -1
    array = np.moveaxis(np.asarray(array), -1, 0) if channels_last else np.asarray(array)[None]
    return array, np.asarray(meta["affine"], float)


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
        paths = list(img) if isinstance(img, (list, tuple)) else img
        volume = read_volume(paths)
        meta = {
            "affine": volume.affine,
            "original_affine": volume.affine.copy(),
            "spatial_shape": np.array(volume.array.shape[1:]),
            "original_channel_dim": 0,
            "space": SpaceKeys.RAS,
            "filename_or_obj": volume.source,
        }
        return volume.array, meta


def as_whole_numbers(array: np.ndarray, source: str = "label map") -> np.ndarray:
    """The same values with an integer type.

    Raises:
        ValueError: fractions, NaN or infinite values.
    """
    array = np.asarray(array)
    if array.dtype.kind in "iub":
        return array.astype(np.uint8) if array.dtype.kind == "b" else array
    whole = np.rint(array)
    if not np.array_equal(whole, array):
        wrong = array[~(whole == array)]
        raise ValueError(f"{source}: {wrong.size} voxels hold no whole number, such as {wrong[0]}; expected label ids")
    return whole.astype(np.int32)


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
