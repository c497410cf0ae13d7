"""Writes small made-up data sets as NIfTI files, in the folder layouts in which the real ones unpack.

A case looks like a CT (or MR) of a torso at about 4 mm; `torso` draws it. Every data set annotates only its own ids,
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

import json
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .breasts import draw_breasts
from .head import draw_head
from .scans import IDS, REFERENCE_SIZE, SCANS, draw_case, rng_of, save, save_case

PAPER_POOL = (
    *("msd_liver", "msd_lung", "msd_pancreas", "msd_hepaticvessel", "msd_colon"),
    *("kits21", "breast_dce", "amos22", "btcv", "totalsegmentator"),
)

DEMO_POOL = ("msd_liver", "kits21", "amos22", "totalsegmentator")


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
    return {name: _OTHERS.get(name, _write_cases)(folder, name, cases_per_dataset, size, seed) for name in datasets}


def write_all_ten(
    folder: str, cases_per_dataset: int = 1, size: Sequence[int] = (32, 40, 48), seed: int = 0
) -> dict[str, list[str]]:
    """All ten data sets of the paper, tiny: for tests of layouts and labels. AMOS gets one MR case more."""
    return write_pool(folder, cases_per_dataset, size, seed, PAPER_POOL)


def write_brats2020(folder: str, cases: int = 2, size: Sequence[int] = (40, 48, 40), seed: int = 0) -> list[str]:
    """BraTS 2020's training folder: four co-registered, skull-stripped channels and the map with ids 1, 2 and 4.

    Beside the `cases` that are returned lies the one whose segmentation has another name, as the training set unpacks.
    """
    names = [f"BraTS20_Training_{i:03d}" for i in range(1, cases + 1)]
    spacing = (155.0 / size[0], 190.0 / size[1], 150.0 / size[2])
    for index, name in enumerate(names):
        images, label = draw_head(size, spacing, rng_of(seed, "brats2020", index))
        for channel, image in images.items():
            save(image, spacing, "LPS", _path(folder, name, f"{name}_{channel}.nii.gz"))
        save(label, spacing, "LPS", _path(folder, name, f"{name}_seg.nii.gz"))
    odd = "BraTS20_Training_355"
    for channel, image in images.items():
        save(image, spacing, "LPS", _path(folder, odd, f"{odd}_{channel}.nii.gz"))
    save(label, spacing, "LPS", _path(folder, odd, "W39_1998.09.19_Segm.nii"))
    return names


def write_kits19(folder: str, cases: int = 2, size: Sequence[int] = (40, 56, 64), seed: int = 0) -> list[str]:
    """KiTS 2019's data folder: case_00000/imaging.nii.gz and segmentation.nii.gz (1 kidney, 2 tumor)."""
    return _write_cases(folder, "kits19", cases, size, seed)


def write_abdomenct1k(folder: str, cases: int = 2, size: Sequence[int] = (40, 56, 64), seed: int = 0) -> list[str]:
    """AbdomenCT-1K as its archives unpack (1 liver, 2 kidney, 3 spleen, 4 pancreas)."""
    return _write_cases(folder, "abdomenct1k", cases, size, seed)


class Layout(NamedTuple):
    """The files of a data set with one image and one label map per case: its folder, their names, names of cases by number.

    ids: names of the raw ids in its ``dataset.json``; empty where it has none.
    """

    folder: str
    case: str
    first: int = 1
    image: str = "imagesTr/{case}.nii.gz"
    label: str = "labelsTr/{case}.nii.gz"
    ids: tuple[str, ...] = ()


_KITS = "{case}/imaging.nii.gz"

_LAYOUTS = {
    "msd_liver": Layout("Task03_Liver", "liver_{}", 0, ids=("background", "liver", "cancer")),
    "msd_lung": Layout("Task06_Lung", "lung_{:03d}", ids=("background", "cancer")),
    "msd_pancreas": Layout("Task07_Pancreas", "pancreas_{:03d}", ids=("background", "pancreas", "cancer")),
    "msd_hepaticvessel": Layout("Task08_HepaticVessel", "hepaticvessel_{:03d}", ids=("background", "Vessel", "Tumour")),
    "msd_colon": Layout("Task10_Colon", "colon_{:03d}", ids=("background", "colon cancer primaries")),
    "kits21": Layout("kits21/kits21/data", "case_{:05d}", 0, _KITS, "{case}/aggregated_MAJ_seg.nii.gz"),
    "kits19": Layout("", "case_{:05d}", 0, _KITS, "{case}/segmentation.nii.gz"),
    "btcv": Layout("BTCV/RawData/Training", "{:04d}", 1, "img/img{case}.nii.gz", "label/label{case}.nii.gz"),
    "abdomenct1k": Layout("", "Case_{:05d}", 1, "AbdomenCT-1K-ImagePart1/{case}_0000.nii.gz", "Mask/{case}.nii.gz"),
}

_TOTAL_FILES = {"portal_and_splenic_vein": "portal_vein_and_splenic_vein"}  # the one that is named otherwise on disk


def _write_cases(folder: str, name: str, cases: int, size: Sequence[int], seed: int) -> list[str]:
    """A data set of `_LAYOUTS`; the names of its cases."""
    layout, names, training = _LAYOUTS[name], [], []
    root = os.path.join(folder, layout.folder)
    for index in range(cases):
        number = layout.first + index
        if name == "btcv" and number > 10:  # it has no 11 to 20
            number += 10
        names.append(layout.case.format(number))
        files = [file.format(case=names[-1]) for file in (layout.image, layout.label)]
        save_case(draw_case(name, index, size, seed), name, *(_path(root, file) for file in files))
        training.append({"image": f"./{files[0]}", "label": f"./{files[1]}"})
    if layout.ids:
        os.makedirs(os.path.join(root, "imagesTs"), exist_ok=True)
        _describe(root, layout.folder.split("_")[1], {"0": "CT"}, layout.ids, training, test=[], numTest=0)
    return names


def _write_amos(folder: str, name: str, cases: int, size: Sequence[int], seed: int) -> list[str]:
    mr = max(1, cases // 4)
    numbers = [*range(1, max(cases - mr, 1) + 1), *range(507, 507 + mr)]
    listed: dict[str, list[dict[str, str]]] = {"Tr": [], "Va": []}
    for index, (number, part) in enumerate([*((n, "Tr") for n in numbers), (8, "Va")]):
        file = f"amos_{number:04d}.nii.gz"
        body = draw_case(name, index, size, seed, modality="MR" if number >= 500 else "CT")
        entry = {"image": f"./images{part}/{file}", "label": f"./labels{part}/{file}"}
        save_case(body, name, *(_path(folder, "amos22", path[2:]) for path in entry.values()))
        listed[part].append(entry)
    ids = ("background", *(structures[0] for structures in IDS[name].values()))
    root, modality = os.path.join(folder, "amos22"), {"0": "CT", "1": "MR"}
    _describe(root, "AMOS", modality, ids, listed["Tr"], validation=listed["Va"], test=[])
    return [f"amos_{number:04d}" for number in numbers]


def _write_totalsegmentator(folder: str, name: str, cases: int, size: Sequence[int], seed: int) -> list[str]:
    root = os.path.join(folder, "Totalsegmentator_dataset")
    names = [f"s{i:04d}" for i in range(cases)]
    for index, case in enumerate(names):
        body = draw_case(name, index, size, seed)
        save_case(body, name, _path(root, case, "ct.nii.gz"))
        for structures in IDS[name].values():
            file = _TOTAL_FILES.get(structures[0], structures[0]) + ".nii.gz"
            mask = body.mask(structures).astype(np.uint8)
            save(mask, body.spacing_mm, SCANS[name].axes, _path(root, case, "segmentations", file))
    with open(_path(root, "meta.csv"), "w", encoding="utf-8") as file_:
        file_.write("image_id;split\n" + "".join(f"{case};train\n" for case in names))
    return names


def _write_breast(folder: str, name: str, cases: int, size: Sequence[int], seed: int) -> list[str]:
    root = os.path.join(folder, "Breast_DCE_MRI")
    names = [f"case_{i:03d}" for i in range(1, cases + 1)]
    spacing = (170.0 / size[0], 210.0 / size[1], 330.0 / size[2])
    for index, case in enumerate(names):
        phases, tumor = draw_breasts(size, spacing, rng_of(seed, name, index))
        for phase, image in enumerate(phases):
            save(image, spacing, "PIR", _path(root, case, f"P{phase}.nii.gz"))
        save(tumor.astype(np.uint8), spacing, "PIR", _path(root, case, "GT.nii.gz"))
    return names


_OTHERS = {"amos22": _write_amos, "totalsegmentator": _write_totalsegmentator, "breast_dce": _write_breast}

DOWNSTREAM = {"brats2020": write_brats2020, "kits19": write_kits19, "abdomenct1k": write_abdomenct1k}


def _describe(
    folder: str, name: str, modality: dict[str, str], ids: Sequence[str], training: list, **more: list | int
) -> None:
    """Write a ``dataset.json``."""
    about = {"name": name, "description": "phantoms made by tsfm_tools.phantoms.layouts; no patient data"}
    about |= {"licence": "Apache-2.0", "release": "1.0", "tensorImageSize": "3D", "modality": modality}
    about |= {"labels": {str(i): label for i, label in enumerate(ids)}, "numTraining": len(training)}
    with open(_path(folder, "dataset.json"), "w", encoding="utf-8") as file:
        json.dump({**about, "training": training, **more}, file, indent=4)


def _path(*parts: str) -> str:
    path = os.path.join(*parts)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return path
