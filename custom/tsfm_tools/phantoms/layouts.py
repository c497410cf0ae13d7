"""Writes small made-up data sets as NIfTI files, in the folder layouts in which the real ones unpack.

A case looks like a CT (or MR) of a torso at about 4 mm; `anatomy` draws it. Every data set annotates only its own ids,
comes in its own spacing, field of view, array orientation and storage (int16 with or without slope and intercept). The
files depend on the seed, the data set and the number of the case alone. What is written below the given folder:

==================  =======================================================================================  ===========
data set            files                                                                                    array axes
==================  =======================================================================================  ===========
msd_liver           Task03_Liver/{dataset.json, imagesTr/liver_0.nii.gz, labelsTr/..., imagesTs/}            RAS
msd_lung            Task06_Lung/... (lung_001)                                                               LPS
msd_pancreas        Task07_Pancreas/... (pancreas_001)                                                       RAS
msd_hepaticvessel   Task08_HepaticVessel/... (hepaticvessel_001); affine tilted by 6 degrees (oblique)       RAS
msd_colon           Task10_Colon/... (colon_001)                                                             RAS
kits21              kits21/kits21/data/case_00000/{imaging, aggregated_MAJ_seg}.nii.gz                       IPL
breast_dce          Breast_DCE_MRI/case_001/{P0, P1, P2, GT}.nii.gz, P0 before contrast                      PIR
amos22              amos22/{dataset.json, imagesTr/amos_0001.nii.gz, labelsTr/..., imagesVa, labelsVa};      LAS
                    a case number of 500 or more is MR: amos_0507
btcv                BTCV/RawData/Training/{img/img0001.nii.gz, label/label0001.nii.gz}                       LAS
totalsegmentator    Totalsegmentator_dataset/s0000/{ct.nii.gz, segmentations/<structure>.nii.gz}, meta.csv   RAS
brats2020           BraTS20_Training_001/BraTS20_Training_001_{flair, t1, t1ce, t2, seg}.nii.gz, ids 1 2 4   LPS
kits19              case_00000/{imaging, segmentation}.nii.gz                                                IPL
abdomenct1k         AbdomenCT-1K-ImagePart1/Case_00001_0000.nii.gz, Mask/Case_00001.nii.gz                   LPS
==================  =======================================================================================  ===========

Raw ids are those of the real data sets: `IDS` lists them.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from .anatomy import Body, draw_breasts, draw_head, draw_torso

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

IDS: dict[
    str, dict[int, tuple[str, ...]]
] = {  # raw id -> structures drawn by `anatomy`; a later id covers earlier ones
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

PAPER_POOL = (
    *("msd_liver", "msd_lung", "msd_pancreas", "msd_hepaticvessel", "msd_colon"),
    *("kits21", "breast_dce", "amos22", "btcv", "totalsegmentator"),
)

DEMO_POOL = ("msd_liver", "kits21", "amos22", "totalsegmentator")


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


def write_pool(
    folder: str,
    cases_per_dataset: int = 6,
    size: Sequence[int] = REFERENCE_SIZE,
    seed: int = 0,
    datasets: Sequence[str] = DEMO_POOL,
) -> dict[str, list[str]]:
    """Write a pool of phantoms below ``folder`` in the layouts of the real data sets.

    Args:
        folder: created if needed; give it to a bundle as ``dataset_dir``.
        cases_per_dataset: annotated training cases of each data set.
        size: about how many voxels a case has along (S, P, L); a smaller size makes larger voxels, not a smaller body.
        seed: another seed makes other patients.
        datasets: names out of `PAPER_POOL`.

    Returns:
        data set -> names of its training cases.

    Raises:
        ValueError: an unknown data set.
    """
    unknown = sorted(set(datasets) - set(PAPER_POOL))
    if unknown:
        raise ValueError(f"unknown phantom data sets {unknown}; known are {', '.join(PAPER_POOL)}")
    return {name: _WRITERS.get(name, _write_msd)(folder, name, cases_per_dataset, size, seed) for name in datasets}


def write_all_ten(
    folder: str, cases_per_dataset: int = 1, size: Sequence[int] = (32, 40, 48), seed: int = 0
) -> dict[str, list[str]]:
    """All ten data sets of the paper, tiny: for tests of layouts and labels. AMOS gets one MR case more."""
    return write_pool(folder, cases_per_dataset, size, seed, PAPER_POOL)


def write_brats2020(folder: str, cases: int = 2, size: Sequence[int] = (40, 48, 40), seed: int = 0) -> list[str]:
    """BraTS 2020's training folder: four co-registered, skull-stripped channels and the map with ids 1, 2 and 4."""
    names = [f"BraTS20_Training_{i:03d}" for i in range(1, cases + 1)]
    spacing = (155.0 / size[0], 190.0 / size[1], 150.0 / size[2])
    for index, name in enumerate(names):
        images, label = draw_head(size, spacing, _rng(seed, "brats2020", index))
        for channel, image in images.items():
            _save(image, spacing, "LPS", _path(folder, name, f"{name}_{channel}.nii.gz"))
        _save(label, spacing, "LPS", _path(folder, name, f"{name}_seg.nii.gz"))
    return names


def write_kits19(folder: str, cases: int = 2, size: Sequence[int] = (40, 56, 64), seed: int = 0) -> list[str]:
    """KiTS 2019's data folder: case_00000/imaging.nii.gz and segmentation.nii.gz (1 kidney, 2 tumor)."""
    return _write_kits(folder, "kits19", cases, size, seed)


def write_abdomenct1k(folder: str, cases: int = 2, size: Sequence[int] = (40, 56, 64), seed: int = 0) -> list[str]:
    """AbdomenCT-1K as its archives unpack (1 liver, 2 kidney, 3 spleen, 4 pancreas)."""
    names = [f"Case_{i:05d}" for i in range(1, cases + 1)]
    for index, name in enumerate(names):
        body = _draw("abdomenct1k", index, size, seed)
        _save_case(
            body,
            "abdomenct1k",
            _path(folder, "AbdomenCT-1K-ImagePart1", f"{name}_0000.nii.gz"),
            _path(folder, "Mask", f"{name}.nii.gz"),
        )
    return names


_MSD = {  # folder, prefix, first number and its digits, names of the raw ids
    "msd_liver": ("Task03_Liver", "liver_{}", 0, ("background", "liver", "cancer")),
    "msd_lung": ("Task06_Lung", "lung_{:03d}", 1, ("background", "cancer")),
    "msd_pancreas": ("Task07_Pancreas", "pancreas_{:03d}", 1, ("background", "pancreas", "cancer")),
    "msd_hepaticvessel": ("Task08_HepaticVessel", "hepaticvessel_{:03d}", 1, ("background", "Vessel", "Tumour")),
    "msd_colon": ("Task10_Colon", "colon_{:03d}", 1, ("background", "colon cancer primaries")),
}

_TOTAL_FILES = {"portal_and_splenic_vein": "portal_vein_and_splenic_vein"}  # the one that is named otherwise on disk


def _write_msd(folder: str, name: str, cases: int, size: Sequence[int], seed: int) -> list[str]:
    task, pattern, first, ids = _MSD[name]
    names = [pattern.format(first + i) for i in range(cases)]
    for index, case in enumerate(names):
        body = _draw(name, index, size, seed)
        paths = [_path(folder, task, kind, f"{case}.nii.gz") for kind in ("imagesTr", "labelsTr")]
        _save_case(body, name, *paths)
    os.makedirs(os.path.join(folder, task, "imagesTs"), exist_ok=True)
    training = [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in names]
    _write_json(
        _path(folder, task, "dataset.json"),
        _dataset_json(task.split("_")[1], {"0": "CT"}, ids, training) | {"test": [], "numTest": 0},
    )
    return names


def _write_kits(folder: str, name: str, cases: int, size: Sequence[int], seed: int) -> list[str]:
    root = os.path.join(folder, "kits21", "kits21", "data") if name == "kits21" else folder
    label = "aggregated_MAJ_seg.nii.gz" if name == "kits21" else "segmentation.nii.gz"
    names = [f"case_{i:05d}" for i in range(cases)]
    for index, case in enumerate(names):
        body = _draw(name, index, size, seed)
        _save_case(body, name, _path(root, case, "imaging.nii.gz"), _path(root, case, label))
    return names


def _write_amos(folder: str, name: str, cases: int, size: Sequence[int], seed: int) -> list[str]:
    mr = max(1, cases // 4) if cases > 1 else 1
    numbers = [*range(1, max(cases - mr, 1) + 1), *range(507, 507 + mr)]
    listed: dict[str, list[dict[str, str]]] = {"Tr": [], "Va": []}
    for index, (number, part) in enumerate([*((n, "Tr") for n in numbers), (8, "Va")]):
        file = f"amos_{number:04d}.nii.gz"
        body = _draw(name, index, size, seed, modality="MR" if number >= 500 else "CT")
        entry = {"image": f"./images{part}/{file}", "label": f"./labels{part}/{file}"}
        _save_case(body, name, *(_path(folder, "amos22", path[2:]) for path in entry.values()))
        listed[part].append(entry)
    ids = ("background", *(structures[0] for structures in IDS[name].values()))
    described = _dataset_json("AMOS", {"0": "CT", "1": "MR"}, ids, listed["Tr"])
    _write_json(_path(folder, "amos22", "dataset.json"), described | {"validation": listed["Va"], "test": []})
    return [f"amos_{number:04d}" for number in numbers]


def _write_btcv(folder: str, name: str, cases: int, size: Sequence[int], seed: int) -> list[str]:
    root = os.path.join(folder, "BTCV", "RawData", "Training")
    names = [f"{i:04d}" for i in [*range(1, 11), *range(21, 41), *range(41, 1000)][:cases]]
    for index, case in enumerate(names):
        body = _draw(name, index, size, seed)
        _save_case(body, name, _path(root, "img", f"img{case}.nii.gz"), _path(root, "label", f"label{case}.nii.gz"))
    return names


def _write_totalsegmentator(folder: str, name: str, cases: int, size: Sequence[int], seed: int) -> list[str]:
    root = os.path.join(folder, "Totalsegmentator_dataset")
    names = [f"s{i:04d}" for i in range(cases)]
    for index, case in enumerate(names):
        body = _draw(name, index, size, seed)
        _save_case(body, name, _path(root, case, "ct.nii.gz"))
        for structures in IDS[name].values():
            file = _TOTAL_FILES.get(structures[0], structures[0]) + ".nii.gz"
            mask = body.mask(structures).astype(np.uint8)
            _save(mask, body.spacing_mm, SCANS[name].axes, _path(root, case, "segmentations", file))
    with open(_path(root, "meta.csv"), "w", encoding="utf-8") as file_:
        file_.write("image_id;split\n" + "".join(f"{case};train\n" for case in names))
    return names


def _write_breast(folder: str, name: str, cases: int, size: Sequence[int], seed: int) -> list[str]:
    root = os.path.join(folder, "Breast_DCE_MRI")
    names = [f"case_{i:03d}" for i in range(1, cases + 1)]
    spacing = (170.0 / size[0], 210.0 / size[1], 330.0 / size[2])
    for index, case in enumerate(names):
        phases, tumor = draw_breasts(size, spacing, _rng(seed, name, index))
        for phase, image in enumerate(phases):
            _save(image, spacing, "PIR", _path(root, case, f"P{phase}.nii.gz"))
        _save(tumor.astype(np.uint8), spacing, "PIR", _path(root, case, "GT.nii.gz"))
    return names


_WRITERS = {
    "kits21": _write_kits,
    "amos22": _write_amos,
    "btcv": _write_btcv,
    "totalsegmentator": _write_totalsegmentator,
    "breast_dce": _write_breast,
}


def _rng(seed: int, name: str, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode()), index])


def _draw(name: str, index: int, size: Sequence[int], seed: int, modality: str = "CT") -> Body:
    """One case of a data set: the scanner's field of view and voxel, both a little different from case to case."""
    scan, rng = SCANS[name], _rng(seed, name, index)
    in_plane = FIELD_MM[1] / size[2] * scan.in_plane * rng.uniform(0.95, 1.03)
    thick = scan.slice_mm * REFERENCE_SIZE[0] / size[0] * float(rng.choice((0.9, 1.0, 1.0, 1.1)))
    low = scan.low_mm + rng.uniform(-8, 8)
    shape = [round((scan.high_mm + rng.uniform(-8, 8) - low) / thick), *(round(mm / in_plane) for mm in FIELD_MM)]
    lesions = [kind for kind, probability in scan.lesions if rng.random() < probability or index == 0]
    spacing = (round(thick, 3), round(in_plane, 4), round(in_plane, 4))
    contrast = float(rng.uniform(0.1, 1.1) if name == "totalsegmentator" else rng.uniform(0.6, 1.1))
    return draw_torso(shape, spacing, low, rng, lesions, modality, contrast)


def _save_case(body: Body, name: str, image: str, label: str | None = None) -> None:
    scan = SCANS[name]
    _save(body.image, body.spacing_mm, scan.axes, image, scan.slope, scan.intercept, scan.tilt_degrees)
    if label is not None:
        raw = np.zeros(body.organs.shape, np.uint8)
        for value, structures in IDS[name].items():
            raw[body.mask(structures)] = value
        _save(raw, body.spacing_mm, scan.axes, label, tilt_degrees=scan.tilt_degrees)


def _save(
    array_SPL: np.ndarray,
    spacing_mm: Sequence[float],
    axes: str,
    path: str,
    slope: float = 1.0,
    intercept: float = 0.0,
    tilt_degrees: float = 0.0,
) -> None:
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


def _dataset_json(name: str, modality: dict[str, str], ids: Sequence[str], training: list) -> dict:
    return {
        "name": name,
        "description": "phantoms made by tsfm_tools.phantoms.layouts; no patient data",
        "licence": "Apache-2.0",
        "release": "1.0",
        "tensorImageSize": "3D",
        "modality": modality,
        "labels": {str(i): label for i, label in enumerate(ids)},
        "numTraining": len(training),
        "training": training,
    }


def _write_json(path: str, content: dict) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=4)


def _path(*parts: str) -> str:
    path = os.path.join(*parts)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return path
