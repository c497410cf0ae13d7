"""Damaged NIfTI files for `fuzz.py`; what a file says is read from its bytes by the definition of NIfTI-1 alone."""

from __future__ import annotations

import gzip
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from tsfm.cases.cases import Preparation, load_case
from tsfm.cases.volumes import read_volume
from tsfm.errors import CaseWarning

COUNT = 1000
SHAPE = (24, 22, 20)
AFFINE = np.array([[-0.8, 0, 0, 10], [0, -0.9, 0, 20], [0, 0, 2.0, -30], [0, 0, 0, 1.0]])
DTYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
FIELDS = {  # offset and type of the header's fields that decide something
    "sizeof_hdr": (0, "i4"), "dim[0]": (40, "i2"), "dim[1]": (42, "i2"), "dim[3]": (46, "i2"), "dim[4]": (48, "i2"),
    "datatype": (70, "i2"), "bitpix": (72, "i2"), "pixdim[0]": (76, "f4"), "pixdim[1]": (80, "f4"), "pixdim[3]": (88, "f4"),
    "vox_offset": (108, "f4"), "scl_slope": (112, "f4"), "scl_inter": (116, "f4"), "xyzt_units": (123, "u1"),
    "qform_code": (252, "i2"), "sform_code": (254, "i2"), "quatern_b": (256, "f4"), "qoffset_x": (268, "f4"),
    "srow_x[0]": (280, "f4"), "srow_y[3]": (308, "f4"), "srow_z[2]": (320, "f4"), "magic": (344, "i4"),
}  # fmt: skip
VALUES = (
    0, 1, -1, 2, 3, 4, 7, 100, 255, 32767, -32768, 2**31 - 1, 1e-30, 1e-3, 0.5, 1e3, 1e30, np.inf, -np.inf, np.nan,
)  # fmt: skip


def prepare(folder: Path) -> None:
    """Write a CT with both forms that agree, plain and compressed."""
    rng = np.random.default_rng(0)
    smooth = np.cumsum(np.cumsum(rng.normal(size=SHAPE), 0), 1)
    voxels = np.clip(smooth * 60, -1000, 1500).astype(np.int16)
    voxels.flat[:2] = -1000, 1500
    image = nib.Nifti1Image(voxels, AFFINE)
    image.set_sform(AFFINE, 1)
    image.set_qform(AFFINE, 1)
    image.header.set_xyzt_units("mm")
    nib.save(image, folder / "whole.nii")
    (folder / "whole.nii.gz").write_bytes(gzip.compress((folder / "whole.nii").read_bytes(), mtime=0))


def mutate(rng: np.random.Generator, folder: Path, _whole: None) -> tuple[str, Path]:
    kind = str(rng.choice(["field", "field", "unit", "header bits", "gzip bits", "voxel bits", "cut", "grown", "swapped", "content",
                           "extension", "no file"]))  # fmt: skip
    packed = kind == "gzip bits" or bool(rng.integers(2))
    path = folder / ("damaged.nii.gz" if packed else "damaged.nii")
    for old in folder.glob("damaged*"):
        old.rmdir() if old.is_dir() and not old.is_symlink() else old.unlink()
    plain = bytearray((folder / "whole.nii").read_bytes())
    if kind == "field":
        name = list(FIELDS)[rng.integers(len(FIELDS))]
        offset, dtype = FIELDS[name]
        value = VALUES[rng.integers(len(VALUES))]
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain[offset : offset + int(dtype[1])] = np.array([value], float).astype(f"<{dtype}").tobytes()
        kind = f"header field: {name} became {value:g}"
    elif kind in ("header bits", "voxel bits"):
        low, high = (0, 352) if kind == "header bits" else (352, len(plain))
        _flip(rng, plain, low, high)
    elif kind == "unit":
        code, scale = int(rng.choice([0, 1, 2, 3, 5])), float(rng.choice([0.001, 1, 1000]))
        plain[123] = code | 8  # seconds beside it
        for offset, count in ((80, 3), (268, 3), (280, 12)):  # voxel sizes and both forms
            scaled = np.frombuffer(plain, "<f4", count, offset) * np.float32(scale)
            plain[offset : offset + 4 * count] = scaled.tobytes()
    elif kind == "grown":
        plain += rng.bytes(int(rng.choice([1, 3, 500, 1000, 5000])))
    elif kind == "swapped":
        size = int(rng.choice([2, 4, 8]))
        part = np.frombuffer(bytes(plain[:352]), f"<u{size}").byteswap().tobytes()
        plain[:352] = part
    elif kind == "extension":
        plain[348:352] = bytes([1, 0, 0, 0])
        plain[352:352] = np.array([rng.choice([0, 8, 15, 16, 32, -16, 2**31 - 1]), 4], "<i4").tobytes() + bytes(8)
        plain[108:112] = np.float32(rng.choice([352, 360, 368, 384])).tobytes()
    raw = bytearray(gzip.compress(plain, mtime=0)) if packed else plain
    if kind == "gzip bits":
        _flip(rng, raw, 0, len(raw))
    elif kind == "cut":
        raw = raw[: int(len(raw) * rng.choice([0, 0.001, 0.02, 0.5, 0.9, 0.9999]))]
    elif kind == "content":
        other = {"html": b"<html>not found</html>" * 50, "zeros": bytes(len(plain)), "noise": rng.bytes(5000),
                 "other name": plain if packed else gzip.compress(plain), "zip": b"PK\x03\x04" + rng.bytes(900)}  # fmt: skip
        raw = other[str(rng.choice(list(other)))]
        raw = gzip.compress(raw) if packed and rng.integers(3) == 0 else raw
    if kind != "no file":
        path.write_bytes(raw)
        return kind, path
    which = int(rng.integers(4))
    if which == 0:
        path.symlink_to("/nowhere/a.nii.gz")
    elif which == 1:
        os.mkfifo(path)
    elif which == 2:
        path.mkdir()
    return kind, path


def _flip(rng: np.random.Generator, raw: bytearray, low: int, high: int) -> None:
    """One to three flipped bits."""
    for position in rng.integers(low, high, rng.integers(1, 4)):
        raw[position] ^= 1 << int(rng.integers(8))


def judge(path: Path, _whole: None) -> tuple[str, str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_case({"image": str(path), "modality": "CT"}, None, Preparation((1.5, 1.0, 1.0)))
        found = read_volume(str(path))
    warned = any(issubclass(one.category, CaseWarning) for one in caught)
    try:
        voxels, affine, consistent = as_written(path)
    except Exception as error:
        return "silent", f"read, although {type(error).__name__}: {error}"
    if found.array.shape != voxels.shape or not np.allclose(found.array, voxels, rtol=1e-5, atol=1e-3, equal_nan=True):
        return "silent", f"other voxels than the file's: {found.array.shape}, {voxels.shape}"
    corners = np.array([*np.ndindex(2, 2, 2)]) * (np.array(voxels.shape[1:]) - 1)
    apart = np.abs((corners @ (found.affine - affine)[:3, :3].T) + (found.affine - affine)[:3, 3]).max()
    if not apart < 0.01:
        return ("right" if warned else "silent"), f"another place than the file's: {apart:g} mm"
    if not consistent and not warned:
        return "silent", "the header contradicts itself"
    return "right", "read as written" + (", with a warning" if warned else "")


def as_written(path: Path) -> tuple[np.ndarray, np.ndarray, bool]:
    """Voxels (C, I, J, K), affine to RAS mm and whether the two forms agree, from the bytes by NIfTI-1's definition alone.

    Raises:
        ValueError: bytes that contradict themselves.
    """
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if path.name.endswith(".gz") else raw
    order = next((o for o in "<>" if np.frombuffer(raw[:4], f"{o}i4")[0] == 348), None)
    if order is None:
        raise ValueError("no NIfTI-1 header")

    def field(offset: int, dtype: str, count: int = 1) -> np.ndarray:
        return np.frombuffer(raw, order + dtype, count, offset)

    dim, pixdim = field(40, "i2", 8), field(76, "f4", 8).astype(float)
    shape = [int(n) for n in dim[1 : dim[0] + 1]]
    dtype = np.dtype(order + DTYPES[int(field(70, "i2")[0])])
    offset, count = int(field(108, "f4")[0]), int(np.prod(shape))
    missing = offset + count * dtype.itemsize - len(raw)
    if not 1 <= dim[0] <= 7 or min(shape) < 1 or missing > 0 or -missing >= dtype.itemsize * shape[0] * shape[1]:
        raise ValueError(f"dimensions {dim.tolist()} do not fit {len(raw)} bytes")
    if not np.isfinite(pixdim[1:4]).all() or (pixdim[1:4] == 0).any():
        raise ValueError(f"pixdim {pixdim[1:4]}")
    voxels = np.frombuffer(raw, dtype, count, offset).reshape(shape, order="F").astype(float)
    slope, inter = (float(value) for value in field(112, "f4", 2))
    if np.isfinite(slope) and slope != 0:
        voxels = voxels * slope + inter
    voxels = np.moveaxis(voxels.reshape(*shape[:3], -1), -1, 0)
    q_code, s_code = field(252, "i2", 2)
    qform, sform = _qform(field, np.abs(pixdim), pixdim[0]), np.eye(4)
    sform[:3] = field(280, "f4", 12).reshape(3, 4)
    unit = int(field(123, "u1")[0]) & 7
    scale = np.diag([*[{0: 1, 1: 1000, 2: 1, 3: 0.001}.get(unit, 1)] * 3, 1.0])
    default = np.diag([-1.0, 1, 1, 1]) @ np.diag([*np.abs(pixdim[1:4]), 1])
    default[:3, 3] = -default[:3, :3] @ (np.array(shape[:3]) - 1) / 2
    affine = sform if s_code > 0 else qform if q_code > 0 else default
    corners = np.array([*np.ndindex(2, 2, 2)]) * (np.array(shape[:3]) - 1)
    apart = np.linalg.norm(corners @ (qform - sform)[:3, :3].T + (qform - sform)[:3, 3], axis=1).max()
    agree = (
        apart < 0.1 * np.linalg.norm(affine[:3, :3], axis=0).min() if min(s_code, q_code) > 0 else s_code + q_code > 0
    )
    return voxels, scale @ affine, bool(agree and unit <= 3)


def _qform(field: Callable, sides: np.ndarray, handed: float) -> np.ndarray:
    b, c, d = field(256, "f4", 3).astype(float)
    a = np.sqrt(max(0.0, 1 - b * b - c * c - d * d))
    rotation = np.array([
        [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
    ])  # fmt: skip
    affine = np.eye(4)
    affine[:3, :3] = rotation * sides[1:4] * (1, 1, -1 if handed < 0 else 1)
    affine[:3, 3] = field(268, "f4", 3)
    return affine
