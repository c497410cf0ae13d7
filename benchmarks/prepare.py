"""Prepare one CT of 300x512x512 voxels at (1.5, 0.7, 0.7) mm with labels to (1.5, 1, 1) mm: nnU-Net 2.8.1 against tsfm.

    python benchmarks/prepare.py --peer_python .venv-bench/bin/python [--repeats 3] [--size 300 512 512]

Each side and each row runs in a process of its own, on the same file, with the same number of threads; the table gives
medians and the peak resident memory of the process. Rows: `arrays` crops, normalises, resamples and samples foreground
voxels in memory (nnU-Net's `run_case_npy`); `file to store` reads the .nii.gz pair and writes the compressed arrays too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time

import numpy as np
import torch
from sides import PEER, answer, organs, peak_gib

SPACING_MM, TARGET_MM = (1.5, 0.7, 0.7), (1.5, 1.0, 1.0)
INTENSITY = {"lower": -927.0, "upper": 275.0, "mean": 63.4, "sd": 175.5}
ORGANS = 12


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer_python", default=PEER)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, nargs=3, default=(300, 512, 512))
    parser.add_argument("--side", choices=("nnunet", "tsfm"), help=argparse.SUPPRESS)
    parser.add_argument("--row", choices=("arrays", "file"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        times = (run_nnunet if args.side == "nnunet" else run_tsfm)(args.row, args.folder, args.repeats)
        print(json.dumps([statistics.median(times), peak_gib()]))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_ct(folder, tuple(args.size))
        print(f"{os.cpu_count()} cores; CT {'x'.join(map(str, args.size))}, {ORGANS} labels, median of {args.repeats}")
        for row, name in (("arrays", "arrays"), ("file", "file to store")):
            found = {}
            for side, python in (("nnunet", args.peer_python), ("tsfm", sys.executable)):
                words = ["--side", side, "--row", row, "--folder", folder, "--repeats", args.repeats]
                seconds, gib = found[side] = answer(python, __file__, *words)
                print(f"{name:14s} {side:7s} {seconds:7.2f} s  peak {gib:.2f} GiB")
            faster, memory = (a / b for a, b in zip(found["nnunet"], found["tsfm"], strict=True))
            print(f"{name:14s} {faster:.1f} times faster, {1 / memory:.2f} of the memory", flush=True)


def write_ct(folder: str, shape: tuple[int, int, int]) -> None:
    """A body of soft tissue in air with ellipsoid organs and noise, and its label map, as NIfTI with LPS axes."""
    import nibabel as nib

    random = np.random.default_rng(0)
    axes = [np.linspace(-1, 1, n, dtype=np.float32) for n in shape]
    s, p, left = axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]
    image = random.normal(0, 15, shape).astype(np.float32)
    image += np.where((p / 0.7) ** 2 + (left / 0.9) ** 2 < 1, 40.0, -1000.0) + 0 * s
    labels = np.zeros(shape, np.uint8)
    for organ in range(1, ORGANS + 1):
        center, radius = random.uniform(-0.5, 0.5, 3), random.uniform(0.05, 0.35, 3)
        inside = sum(((axis - c) / r) ** 2 for axis, c, r in zip((s, p, left), center, radius, strict=True)) < 1
        labels[inside] = organ
        image[inside] += random.uniform(-80, 120)
    affine = np.diag([-SPACING_MM[2], -SPACING_MM[1], SPACING_MM[0], 1.0])
    for name, array in (("image", image.round().astype(np.int16)), ("label", labels)):
        nib.save(nib.Nifti1Image(array.transpose(2, 1, 0), affine), os.path.join(folder, f"{name}.nii.gz"))


def run_tsfm(row: str, folder: str, repeats: int) -> list[float]:
    """Seconds of each repeat."""
    from tsfm.cases.cases import Preparation, load_case
    from tsfm.patches.store import CaseStore
    from tsfm.patches.stored_case import sample_foreground
    from tsfm.preparation.preprocessing import prepare_image
    from tsfm.preparation.resampling import resample_labels, thick_axis

    table = organs(ORGANS)
    preparation = Preparation(TARGET_MM, {"CT": INTENSITY})
    item = {"image": os.path.join(folder, "image.nii.gz"), "label": os.path.join(folder, "label.nii.gz")}
    case = load_case(item, table, preparation) if row == "arrays" else None
    times = []
    for _ in range(repeats):
        shutil.rmtree(os.path.join(folder, "store"), ignore_errors=True)
        start = time.perf_counter()
        if row == "arrays":
            image, grid = prepare_image(torch.from_numpy(case.image), case.spacing_mm, preparation, "CT")
            codes = case.codes[tuple(slice(*span) for span in grid.crop)]
            codes = resample_labels(codes, grid.shape, thick_axis(case.spacing_mm, TARGET_MM))
            sample_foreground(codes)
            del image, codes
        else:
            CaseStore(os.path.join(folder, "store"), table, preparation).open(item)
        times.append(time.perf_counter() - start)
    return times


def run_nnunet(row: str, folder: str, repeats: int) -> list[float]:
    """Seconds of each repeat."""
    from nnunet_plans import declared, preprocessing
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    preprocessor, plans, configuration = preprocessing(TARGET_MM, "CTNormalization", INTENSITY)
    dataset = declared(*(f"organ_{i}" for i in range(1, ORGANS + 1)))
    image, label = (os.path.join(folder, f"{name}.nii.gz") for name in ("image", "label"))
    times = []
    if row == "arrays":
        data, properties = SimpleITKIO().read_images([image])
        seg, _ = SimpleITKIO().read_seg(label)
    for _ in range(repeats):
        start = time.perf_counter()
        if row == "arrays":
            preprocessor.run_case_npy(data, seg, dict(properties), plans, configuration, dataset)
        else:
            target = os.path.join(tempfile.mkdtemp(dir=folder), "case")
            preprocessor.run_case_save(target, [image], label, plans, configuration, dataset)
        times.append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
