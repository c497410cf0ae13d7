"""How each data set scans a body and stores the file: field of view, voxel, array axes, scaling and raw ids."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from .canvas import Body
from .torso import draw_torso

FIELD_MM = (320.0, 384.0)  # in-plane field of view, along P and L

REFERENCE_SIZE = (64, 80, 96)  # the voxel sizes below hold for this `size`

LOBES = ("upper_lobe_left", "lower_lobe_left", "upper_lobe_right", "middle_lobe_right", "lower_lobe_right")

KIDNEYS = ("kidney_right", "kidney_left", "kidney_tumor", "kidney_cyst")

_COMMON = ("spleen", "kidney_right", "kidney_left", "gallbladder", "esophagus", "liver", "stomach", "aorta")

_TOTAL = (
    *("spleen", "kidney_right", "kidney_left", "gallbladder", "liver", "stomach", "aorta", "inferior_vena_cava"),
    *("portal_and_splenic_vein", "pancreas", "adrenal_gland_right", "adrenal_gland_left"),
    *(f"lung_{lobe}" for lobe in LOBES),
)

_AMOS = (
    *_COMMON,
    *("inferior_vena_cava", "pancreas", "adrenal_gland_right", "adrenal_gland_left", "duodenum", "bladder"),
    "prostate_or_uterus",
)

_BTCV = (
    *_COMMON,
    *("inferior_vena_cava", "portal_and_splenic_vein", "pancreas", "adrenal_gland_right", "adrenal_gland_left"),
)


def _numbered(names: Sequence[str]) -> dict[int, tuple[str, ...]]:
    return {i: (name,) for i, name in enumerate(names, start=1)}


_KITS = {1: KIDNEYS[:2], 2: ("kidney_tumor",), 3: ("kidney_cyst",)}

# raw id -> structures that `torso` draws; a later id covers earlier ones
IDS: dict[str, dict[int, tuple[str, ...]]] = {
    "msd_liver": _numbered(("liver", "liver_tumor")),
    "msd_lung": _numbered(("lung_tumor",)),
    "msd_pancreas": _numbered(("pancreas", "pancreas_tumor")),
    "msd_hepaticvessel": _numbered(("hepatic_vessel", "liver_tumor")),
    "msd_colon": _numbered(("colon_tumor",)),
    "kits21": _KITS,
    "amos22": _numbered(_AMOS),
    "btcv": _numbered(_BTCV),
    "totalsegmentator": _numbered(_TOTAL),
    "kits19": {1: KIDNEYS[:2], 2: ("kidney_tumor",)},
    "abdomenct1k": {1: ("liver",), 2: KIDNEYS[:2], 3: ("spleen",), 4: ("pancreas",)},
}


@dataclass(frozen=True)
class Scan:
    """How a data set is scanned and stored: slices from ``low_mm`` to ``high_mm``, thickness, in-plane voxel, axes."""

    low_mm: float
    high_mm: float
    slice_mm: float
    in_plane: float = 1.0
    axes: str = "RAS"
    intercept: float = 0.0
    slope: float = 1.0
    tilt_degrees: float = 0.0
    lesions: tuple[tuple[str, float], ...] = ()  # lesion and the probability of each


SCANS = {
    "msd_liver": Scan(105, 330, 5, 0.95, lesions=(("liver_tumor", 1), ("liver_tumor", 0.7), ("liver_tumor", 0.4))),
    "msd_lung": Scan(180, 420, 5, 0.95, "LPS", lesions=(("lung_tumor", 1), ("lung_tumor", 0.25))),
    "msd_pancreas": Scan(95, 300, 4, 0.95, lesions=(("pancreas_tumor", 1),)),
    "msd_hepaticvessel": Scan(
        120, 300, 5, tilt_degrees=6, lesions=(("liver_tumor", 1), ("liver_tumor", 0.6), ("liver_tumor", 0.3))
    ),
    "msd_colon": Scan(0, 330, 6.5, lesions=(("colon_tumor", 1),)),
    "kits21": Scan(80, 290, 4, 0.9, "IPL", -1024, lesions=(("kidney_tumor", 1), ("kidney_cyst", 0.7))),
    "amos22": Scan(0, 330, 6, 1.0, "LAS", lesions=(("liver_tumor", 0.1), ("kidney_cyst", 0.2))),
    "btcv": Scan(10, 320, 5, 1.0, "LAS", -1024, lesions=(("kidney_cyst", 0.15),)),
    "totalsegmentator": Scan(60, 420, 5, 1.25, lesions=(("lung_tumor", 0.15), ("kidney_cyst", 0.15))),
    "kits19": Scan(80, 290, 4, 0.9, "IPL", lesions=(("kidney_tumor", 1),)),
    "abdomenct1k": Scan(80, 330, 5, 0.95, "LPS", -1024, slope=0.5, lesions=(("liver_tumor", 0.2),)),
}


def rng_of(seed: int, name: str, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode()), index])


def draw_case(name: str, index: int, size: Sequence[int], seed: int, modality: str = "CT") -> Body:
    """One case of a data set: the scanner's field of view and voxel, both a little different from case to case."""
    scan, rng = SCANS[name], rng_of(seed, name, index)
    in_plane = FIELD_MM[1] / size[2] * scan.in_plane * rng.uniform(0.95, 1.03)
    thick = scan.slice_mm * REFERENCE_SIZE[0] / size[0] * float(rng.choice((0.9, 1.0, 1.0, 1.1)))
    low = scan.low_mm + rng.uniform(-8, 8)
    shape = [round((scan.high_mm + rng.uniform(-8, 8) - low) / thick), *(round(mm / in_plane) for mm in FIELD_MM)]
    lesions = [kind for kind, probability in scan.lesions if rng.random() < probability or index == 0]
    spacing = (round(thick, 3), round(in_plane, 4), round(in_plane, 4))
    contrast = float(rng.uniform(0.1, 1.1) if name == "totalsegmentator" else rng.uniform(0.6, 1.1))
    return draw_torso(shape, spacing, low, rng, lesions, modality, contrast)


def save_case(body: Body, name: str, image: str, label: str | None = None) -> None:
    scan = SCANS[name]
    save(body.image, body.spacing_mm, scan.axes, image, scan.slope, scan.intercept, scan.tilt_degrees)
    if label is not None:
        raw = np.zeros(body.organs.shape, np.uint8)
        for value, structures in IDS[name].items():
            raw[body.mask(structures)] = value
        save(raw, body.spacing_mm, scan.axes, label, tilt_degrees=scan.tilt_degrees)


def save(
    array_SPL: np.ndarray, spacing_mm: Sequence[float], axes: str, path: str, slope: float = 1.0,
    intercept: float = 0.0, tilt_degrees: float = 0.0,
) -> None:  # fmt: skip
    """Store an (S, P, L) array with the given array axes; int16 (uint8 for labels), origin at its center."""
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2] = spacing_mm[0], -spacing_mm[1], -spacing_mm[2]
    affine[:3, 3] = -affine[:3, :3] @ (np.array(array_SPL.shape) - 1) / 2
    affine[3, 3] = 1
    angle = np.deg2rad(tilt_degrees)
    tilt = np.eye(4)
    tilt[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine = tilt @ affine
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(axes))
    stored = apply_orientation(array_SPL, turn)
    affine = affine @ inv_ornt_aff(turn, array_SPL.shape)
    if stored.dtype != np.uint8:
        stored = np.clip(np.round((stored - intercept) / slope), -32768, 32767).astype(np.int16)
    image = nib.Nifti1Image(np.ascontiguousarray(stored), affine)
    image.header.set_data_dtype(stored.dtype)
    if (slope, intercept) != (1.0, 0.0):
        image.header.set_slope_inter(slope, intercept)
    image.header.set_xyzt_units("mm")
    with open(path, "wb") as file:
        file.write(gzip.compress(image.to_bytes(), compresslevel=4, mtime=0))
