"""Write tests/fixtures/nnunet_preparation.npz: what nnU-Net 2.8.1 itself makes of a few small volumes.

    .venv-bench/bin/python benchmarks/make_nnunet_fixtures.py

Inputs are stored beside the results, so that the tests need neither nnU-Net nor this script.
"""

from __future__ import annotations

import json
import os

import numpy as np
from nnunet_plans import declared, preprocessing
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_spacing
from scipy.ndimage import gaussian_filter

FOLDER = os.path.join(os.path.dirname(__file__), "..", "tests", "fixtures")
SHAPE = (14, 26, 22)
SPACINGS = (
    ((1.5, 0.7, 0.7), (1.5, 1.0, 1.0)),
    ((3.0, 1.0, 1.0), (1.5, 1.4, 1.1)),
    ((5.0, 0.7, 0.7), (2.5, 1.0, 1.0)),
    ((5.0, 0.7, 0.7), (7.1, 0.5, 1.0)),
    ((0.7, 0.9, 4.0), (1.0, 1.0, 1.0)),
    ((1.0, 1.0, 1.0), (4.0, 1.5, 0.8)),
    ((1.0, 1.0, 1.0), (2.0, 2.0, 2.0)),
    ((2.0, 2.0, 2.0), (1.0, 1.0, 1.0)),
    ((0.3, 1.1, 1.2), (0.9, 0.9, 0.9)),
)
INTENSITY = {"mean": 400.0, "sd": 300.0, "lower": 450.0, "upper": 1900.0}
PLANNED = {
    "isotropic": ([[1, 1, 1], [2, 1, 1], [1.2, 0.8, 0.9]], [[90, 100, 110], [40, 90, 95], [80, 70, 90]]),
    "thick slices": ([[10, 1.5, 1.5], [5, 1.2, 1.2], [8, 1.4, 1.3]], [[10, 200, 220], [22, 256, 256], [12, 210, 230]]),
    "thick but many": (
        [[10, 1.5, 1.5], [5, 1.2, 1.2], [8, 1.4, 1.3]],
        [[90, 200, 220], [99, 256, 256], [95, 210, 230]],
    ),
    "one thin outlier": ([[6, 1, 1]] * 8 + [[0.5, 1, 1]] * 2, [[20, 200, 220]] * 10),
    "thick last": ([[0.8, 0.8, 6], [0.9, 0.9, 5], [0.7, 0.7, 3]], [[300, 310, 30], [290, 300, 33], [280, 310, 36]]),
}


def main() -> None:
    random = np.random.default_rng(7)
    found: dict[str, np.ndarray] = {}
    image = gaussian_filter(random.normal(size=SHAPE), 1.2) * 2000 + random.normal(size=SHAPE) * 60
    labels = np.digitize(gaussian_filter(random.normal(size=SHAPE), 2.0), [0.0, 0.03, 0.06]).astype(np.uint8)
    labels[:, :5] = 0
    image = image.round().astype(np.int16)
    found |= {"image": image, "labels": labels, "spacings": np.array(SPACINGS)}
    for i, (old, new) in enumerate(SPACINGS):
        found[f"image_{i}"] = resample_data_or_seg_to_spacing(
            image[None].astype(np.float32), old, new, False, 3, 0, None
        )[0]
        found[f"labels_{i}"] = resample_data_or_seg_to_spacing(labels[None].copy(), old, new, True, 1, 0, None)[0]

    axes = np.meshgrid(np.linspace(-1, 1, 14), np.linspace(-1.2, 1, 26), np.linspace(-1, 1.3, 22), indexing="ij")
    island = np.where(sum(axis**2 for axis in axes) < 0.9, image.clip(-900) + 1200, 0)
    island[7, 13, 9] = 0
    island_labels = np.where(island > 0, labels, 0).astype(np.uint8)
    found |= {"island": island.astype(np.int16), "island_labels": island_labels}
    for name, scheme, masked in (
        ("ct", "CTNormalization", False),
        ("z", "ZScoreNormalization", False),
        ("z_masked", "ZScoreNormalization", True),
    ):
        data, seg, properties = prepare(island, island_labels, scheme, masked)
        found |= {f"{name}_image": data[0], f"{name}_labels": seg[0].clip(0).astype(np.uint8)}
        found[f"{name}_crop"] = np.array(properties["bbox_used_for_cropping"])

    found |= fingerprints(random)
    target = {name: plan(*given) for name, given in PLANNED.items()}
    found["planned"] = np.array(json.dumps({n: [*PLANNED[n], target[n]] for n in PLANNED}))
    os.makedirs(FOLDER, exist_ok=True)
    path = os.path.join(FOLDER, "nnunet_preparation.npz")
    np.savez_compressed(path, **found)
    print(path, os.path.getsize(path), "bytes")


def prepare(image, labels, scheme: str, masked: bool):
    """`run_case_npy` of one case at (1.5, 0.7, 0.7) mm to (1.5, 1, 1) mm."""
    preprocessor, *how = preprocessing((1.5, 1.0, 1.0), scheme, INTENSITY, masked)
    data, seg = image[None].astype(np.float32), labels[None].astype(np.int8)
    return preprocessor.run_case_npy(data, seg, {"spacing": [1.5, 0.7, 0.7]}, *how, declared("a", "b", "c"))


def fingerprints(random) -> dict[str, np.ndarray]:
    """Three cases of different contrast, and nnU-Net's statistics over an equal number of voxels of each."""
    found, drawn = {}, []
    for i in range(3):
        image = (random.gamma(2 + i, 60, (8, 14, 12)) - 80).round().astype(np.int16)
        labels = (random.random(image.shape) < 0.3 * (i + 1) / 3).astype(np.uint8)
        found |= {f"case_{i}": image, f"case_labels_{i}": labels}
        data, seg, _ = crop_to_nonzero(image[None].astype(np.float32), labels[None].astype(np.int8))
        drawn.append(DatasetFingerprintExtractor.collect_foreground_intensities(seg, data, num_samples=1_000_000)[0][0])
    pooled = np.concatenate(drawn)
    lower, median, upper = np.percentile(pooled, (0.5, 50.0, 99.5))
    names = {"mean": pooled.mean(dtype=float), "sd": pooled.std(dtype=float), "median": median, "lower": lower}
    names |= {"upper": upper, "min": pooled.min(), "max": pooled.max()}
    return found | {"statistics": np.array(json.dumps({name: float(value) for name, value in names.items()}))}


def plan(spacings, shapes) -> list[float]:
    """`determine_fullres_target_spacing` on a bare planner."""
    planner = object.__new__(ExperimentPlanner)
    planner.overwrite_target_spacing = None
    planner.anisotropy_threshold = 3
    planner.dataset_fingerprint = {"spacings": spacings, "shapes_after_crop": shapes}
    return [float(side) for side in planner.determine_fullres_target_spacing()]


if __name__ == "__main__":
    main()
