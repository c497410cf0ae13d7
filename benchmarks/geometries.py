"""A structure seen in the prepared image comes back to its own voxels, for every axis order, direction and voxel size.

    python benchmarks/geometries.py

All 48 orders and directions of a file's axes times 11 voxel sizes. The structure (no two of its sides alike, far from the
middle) is marked where the prepared image shows it, turned back and written as inference writes; nibabel reads the file.
Right is: the file's shape and affine, and the structure's edge moved nowhere by more than half a prepared voxel and one of
the file's.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, LoadImaged, Orientationd
from scipy.ndimage import distance_transform_edt
from tsfm.cases.cases import Preparation
from tsfm.cases.volumes import Reader
from tsfm.inference.prediction import write_label_map
from tsfm.preparation.preprocessing import PrepareImaged

SHAPE = (40, 34, 28)
SPACINGS = (
    (1, 1, 1), (0.7, 0.7, 0.7), (2, 2, 2), (0.8, 0.8, 2.5), (0.8, 0.8, 5), (2.5, 0.8, 0.8), (0.8, 3, 0.8), (1.5, 1, 1),
    (0.6, 1.1, 1.9), (3, 1.2, 0.9), (1.2, 1.2, 6),
)  # fmt: skip
PREPARED_MM = (1.5, 1.0, 1.0)


def structure() -> np.ndarray:
    """A bar with a shorter one at its end, in one corner of the volume."""
    array = np.zeros(SHAPE, np.int16)
    array[2:-2, 2:-2, 2:-2] = 100
    array[24:36, 5:13, 4:12] = 1000
    array[30:36, 13:22, 4:12] = 1000
    return array


def affine_of(axes: tuple[int, ...], signs: tuple[int, ...], spacing: tuple[float, ...]) -> np.ndarray:
    """Array axis i runs along world axis ``axes[i]``, forward or backward; turned by 5 degrees where it is odd."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for i, (axis, sign, side) in enumerate(zip(axes, signs, spacing, strict=True)):
        affine[axis, i] = sign * side
    if sum(signs) % 4 == 1:
        c, s = np.cos(np.deg2rad(5)), np.sin(np.deg2rad(5))
        affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ affine[:3, :3]
    affine[:3, 3] = 11, -23, 5
    return affine


def result_of(array: np.ndarray, affine: np.ndarray, folder: Path) -> str:
    """'right', or what is wrong."""
    image = nib.Nifti1Image(array, affine)
    image.set_qform(affine, 1)
    nib.save(image, folder / "image.nii")
    preprocessing = Compose([
        LoadImaged("image", reader=Reader(), ensure_channel_first=True), Orientationd("image", axcodes="SPL", labels=None),
        PrepareImaged("image", Preparation(PREPARED_MM), modality="MR"),
    ])  # fmt: skip
    data = preprocessing({"image": str(folder / "image.nii")})
    prepared = data["image"]
    data["pred"] = MetaTensor((prepared > prepared.max() / 2).as_tensor().to(torch.uint8))
    inverse = Invertd("pred", transform=preprocessing, orig_keys="image", nearest_interp=True, to_tensor=True)
    write_label_map(inverse(data)["pred"], folder / "map.nii.gz")
    found = nib.load(folder / "map.nii.gz")
    if found.shape != array.shape or not np.allclose(found.affine, affine, atol=1e-4):
        return f"another grid: {found.shape}, {found.affine.tolist()}"
    seen, truth = np.asarray(found.dataobj) > 0, array > 500
    side = np.array(image.header.get_zooms(), float)
    allowed = side / (side + max(PREPARED_MM) / 2)  # distances in what the edge may move
    within = distance_transform_edt(truth, allowed) + distance_transform_edt(~truth, allowed)
    wrong = ((seen != truth) & (within > 1)).sum()
    return "right" if not wrong else f"{wrong} voxels elsewhere"


def main() -> None:
    torch.set_num_threads(1)
    array, wrong, count = structure(), [], 0
    with tempfile.TemporaryDirectory() as folder:
        for axes, signs, spacing in product(permutations(range(3)), product((1, -1), repeat=3), SPACINGS):
            result = result_of(array, affine_of(axes, signs, spacing), Path(folder))
            count += 1
            if result != "right":
                wrong.append(f"axes {axes}, directions {signs}, {spacing} mm: {result}")
    print("\n".join([*wrong[:20], f"{count - len(wrong)} of {count} geometries right"]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
