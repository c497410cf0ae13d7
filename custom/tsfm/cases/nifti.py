"""NIfTI files: what the header says, checked before voxels are read, and voxels whose checksum was verified.

nibabel reads; here is what it lets pass: units other than millimetres, a voxel size of 0 (it takes 1 mm), a gzip
checksum that is never reached, more or fewer bytes than the header asks for, a compressed file under the wrong name.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy

from ..errors import CaseError
from .grids import SAME_GRID, grid_distance_mm, spacing_of, warn

UNITS_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
"""NIfTI's code of the unit of length (none, metre, millimetre, micrometre) -> millimetres."""

UNIT_NAMES = {0: "no unit", 1: "metres", 2: "millimetres", 3: "micrometres"}

DEFLATE_LIMIT = 1100
"""Gzip makes nothing more than 1032 times smaller, so a header that asks for more bytes is wrong."""

QUATERNION_EXCESS = 1e-5
"""How far float32 puts the squared length of a qform's quaternion above 1 in files that mean half a turn."""

_PIECE = 1 << 20


class Opened(NamedTuple):
    """What a header says: channels, shape (I, J, K), affine to RAS mm, how to name its unit, and how to read voxels.

    `load` gives (C, I, J, K) in the file's own type.
    """

    channels: int
    shape: tuple[int, int, int]
    affine: np.ndarray
    unit: str
    load: Callable[[], np.ndarray]


def open_nifti(path: str) -> Opened:
    """The header of a .nii or .nii.gz, checked.

    Raises:
        CaseError: not NIfTI, another compression than the name says, a header that contradicts itself or the file.
    """
    with _naming(path):
        with _stream(path) as file:
            raw = _raw_header(file.read(540), path)
        _check_sizes(raw, path)
        header = type(raw)(raw.binaryblock, raw.endianness)
        if header.get_data_dtype().kind == "c":
            raise CaseError(f"{path}: complex voxels; expected real ones: save the magnitude")
        shape = header.get_data_shape()
        if len(shape) < 3 or sum(n > 1 for n in shape[3:]) > 1:
            raise CaseError(
                f"{path}: {'x'.join(map(str, shape))} voxels; expected a 3D volume, or a 4D one with its channels last"
            )
        unit = int(header["xyzt_units"]) & 7
        if unit not in UNITS_MM:
            warn(f"{path}: the header's unit of length has the code {unit}, which means nothing; taken as millimetres")
        affine = _affine(header, raw, path)
        affine[:3] *= UNITS_MM.get(unit, 1.0)
    name = f"its unit says {UNIT_NAMES.get(unit, unit)}"
    return Opened(int(np.prod(shape[3:])), tuple(shape[:3]), affine, name, lambda: _voxels(path, header))


def header_of(path: str):
    """nibabel's header of a .nii or .nii.gz, with its extensions; its quaternion is readable."""
    with _stream(path) as file:
        kind = type(_raw_header(file.read(540), path))
        file.seek(0)
        header = kind.from_fileobj(file)
    _mend_quaternion(header, path)
    return header


def unit_mm(header) -> float:
    """Millimetres per unit of a NIfTI header's affine."""
    return UNITS_MM.get(int(header["xyzt_units"]) & 7, 1.0)


def _raw_header(raw: bytes, path: str):
    """The header as it stands in the file, before nibabel mends it."""
    for kind, size in ((nib.Nifti1Header, 348), (nib.Nifti2Header, 540)):
        for order in "<>":
            if len(raw) >= size and int.from_bytes(raw[:4], {"<": "little", ">": "big"}[order]) == size:
                return kind(raw[:size], order, check=False)
    reason = "it is shorter than a header" if len(raw) < 348 else "it does not begin with a header's size"
    raise CaseError(f"{path}: not a readable NIfTI file, or cut short ({reason}); copy or download it again")


def _check_sizes(header, path: str) -> None:
    """Refuse dimensions and voxel sizes that cannot be, and data that the file is too small for."""
    count = int(header["dim"][0])
    dim = [int(n) for n in header["dim"][1 : 1 + count]] if 1 <= count <= 7 else []
    if not dim or min(dim) < 1:
        raise CaseError(
            f"{path}: the header's dimensions are {[int(n) for n in header['dim']]}; expected their number (1 to 7), "
            "then positive sizes: the header is damaged; copy or download it again"
        )
    sides = np.array(header["pixdim"][1 : 1 + min(count, 3)], float)
    if not np.isfinite(sides).all() or (sides == 0).any():
        raise CaseError(
            f"{path}: voxel sizes of {' x '.join(f'{side:g}' for side in sides)} in the header (pixdim); expected "
            "positive ones: correct the header, or convert the image again"
        )
    if (sides < 0).any():
        warn(f"{path}: negative voxel sizes in the header (pixdim); they are taken as positive")
    bits = header.get_data_dtype().itemsize
    offset = float(header["vox_offset"])
    wanted, present = int(np.prod(dim, dtype=object)) * bits + max(offset, 0), os.path.getsize(path)
    room = present * (DEFLATE_LIMIT if path.lower().endswith(".gz") else 1)
    if not wanted <= room:
        raise CaseError(
            f"{path}: the header asks for {wanted:.4g} bytes of voxels ({'x'.join(map(str, dim))}), the file has "
            f"{present}: it ends too early, or its header is damaged; copy or download it again"
        )


def _voxels(path: str, header) -> np.ndarray:
    """(C, I, J, K) in the file's own type; slope and intercept applied (then float32); read to the end of the file."""
    with _naming(path), _stream(path) as file:
        proxy, size = ArrayProxy(file, header), header.get_data_dtype().itemsize
        array = np.asarray(proxy, np.float32) if (proxy.slope, proxy.inter) != (1.0, 0.0) else np.asanyarray(proxy)
        file.seek(proxy.offset + int(np.prod(proxy.shape)) * size)
        rest = 0
        while piece := file.read(_PIECE):  # the checksum of gzip stands at the end
            rest += len(piece)
            if rest >= size * int(np.prod(proxy.shape[:2])):
                raise CaseError(
                    f"{path}: holds more voxels than the {'x'.join(map(str, proxy.shape))} of its header; the "
                    "header is damaged: copy or download it again"
                )
    if array.dtype.fields is not None:
        array = gray(array, path)
    array = array.reshape((*array.shape[:3], -1))
    return np.moveaxis(array, -1, 0)


def gray(voxels: np.ndarray, path: str) -> np.ndarray:
    """Gray values of an RGB volume whose three colors are the same."""
    red, green, blue = (voxels[name] for name in voxels.dtype.names[:3])
    if not (np.array_equal(red, green) and np.array_equal(red, blue)):
        raise CaseError(f"{path}: RGB voxels with real colors; expected one value per voxel: convert it to gray first")
    warn(f"{path}: RGB voxels whose colors are all equal; they are read as gray values")
    return red.astype(np.float32)


def _mend_quaternion(header, path: str) -> None:
    """Make a NIfTI header's quaternion (b, c, d) readable: a length over 1 is float32's rounding of half a turn.

    Up to `QUATERNION_EXCESS` it is cut to 1, as ITK does. Beyond, the qform is left out where there is an sform.

    Raises:
        CaseError: such a quaternion without an sform.
    """
    names = ("quatern_b", "quatern_c", "quatern_d")
    quaternion = np.array([header[name] for name in names], float)
    excess = float(quaternion @ quaternion) - 1
    if not header["qform_code"] or not excess > 0:
        return
    if excess < QUATERNION_EXCESS:
        for name, value in zip(names, quaternion / np.sqrt(1 + excess), strict=True):
            header[name] = value
        return
    found = f"{path}: the qform's quaternion (b, c, d) is {quaternion.round(6).tolist()}, longer than 1"
    if not header["sform_code"]:
        raise CaseError(f"{found}, which is no rotation; correct the header, or convert the image again")
    warn(f"{found}; the qform is left out and the sform used")
    header["qform_code"] = 0


def _affine(header, raw, path: str) -> np.ndarray:
    """The sform where the header has one, else the qform, else the voxel sizes alone; disagreement is warned of."""
    _mend_quaternion(header, path)
    affine, shape = np.array(header.get_best_affine(), float), header.get_data_shape()[:3]
    (sform, s_code), (qform, q_code) = header.get_sform(coded=True), header.get_qform(coded=True)
    odd = {name: int(raw[name]) for name in ("sform_code", "qform_code") if not 0 <= int(raw[name]) <= 5}
    if q_code and float(raw["pixdim"][0]) not in (-1, 0, 1):
        odd["pixdim[0]"] = float(raw["pixdim"][0])
    if odd:
        warn(f"{path}: the header's {odd} mean nothing (expected 0 to 5; pixdim[0] 1 or -1); they are left out")
    allowed = SAME_GRID * min(spacing_of(affine))
    if not s_code and not q_code:
        warn(f"{path}: the header has neither sform nor qform; orientation is taken as nibabel's default (LAS)")
    elif s_code and q_code:
        apart = grid_distance_mm(sform, qform, shape)
        if not apart <= allowed:
            warn(f"{path}: sform and qform put a corner {apart:.3g} units apart; the sform is used")
    elif s_code:
        declared = np.abs(np.array(raw["pixdim"][1:4], float))
        apart = float(np.max(np.abs(declared - spacing_of(affine)) * np.array(shape)))
        if not apart <= allowed:
            warn(f"{path}: voxel sizes are {declared.tolist()} by pixdim, {spacing_of(affine)} by sform, which is used")
    return affine


@contextmanager
def _stream(path: str):
    """The file's bytes, decompressed where the name says so; a name that says otherwise than the content is refused."""
    compressed = path.lower().endswith(".gz")
    with open(path, "rb") as file:
        magic = file.read(4)
        if compressed and {int.from_bytes(magic, "little"), int.from_bytes(magic, "big")} & {348, 540}:
            raise CaseError(f"{path}: not compressed although its name ends in .gz; rename it to end in .nii")
        if not compressed and magic[:2] == b"\x1f\x8b":
            raise CaseError(f"{path}: compressed with gzip although its name ends in .nii; rename it to end in .nii.gz")
        file.seek(0)
        with gzip.GzipFile(fileobj=file) if compressed else nullcontext(file) as content:
            yield content


@contextmanager
def _naming(path: str):
    """Errors from below as CaseErrors that name the file; nibabel, gzip, zlib and numpy each raise their own kind."""
    try:
        yield
    except CaseError:
        raise
    except MemoryError as error:
        raise CaseError(f"{path}: its voxels do not fit into memory; free some, or cut the image") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # else it is gzip's word on the content
            raise CaseError(
                f"{path}: cannot be read ({error.strerror}); check the disk, the network, and the right to read it"
            ) from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CaseError(
            f"{path}: not a readable NIfTI file, damaged or cut short ({reason}); copy or download it again"
        ) from error
