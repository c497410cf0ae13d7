"""What nnU-Net 2.8.1's own planner gives for fingerprints of published data sets, for tests/fixtures/nnunet_plans.json.

Run in nnU-Net's environment (`make bench-env`): `python benchmarks/make_plan_fixtures.py tests/fixtures/nnunet_plans.json
[MSD_FOLDER ...]`. What the file holds already is kept. The fingerprints are synthetic: a median shape and spacing, and cases around it; folders of real data are
measured.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

FOLDER = tempfile.mkdtemp()
os.environ |= {"nnUNet_raw": FOLDER + "/raw", "nnUNet_preprocessed": FOLDER + "/prepared", "nnUNet_results": FOLDER}

from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner as default  # noqa: E402
from nnunetv2.experiment_planning.experiment_planners.residual_unets import (  # noqa: E402
    residual_encoder_unet_planners as residual,
)

# name: median shape and spacing (z, y, x), cases, channels, classes with background, relative spread of spacing and shape
PUBLISHED = {
    "liver": ((432, 512, 512), (1.0, 0.7676, 0.7676), 131, 1, 3, 0.0),
    "lung": ((252, 512, 512), (1.245, 0.785, 0.785), 63, 1, 2, 0.0),
    "pancreas": ((93, 512, 512), (2.5, 0.8027, 0.8027), 281, 1, 3, 0.0),
    "hepatic_vessel": ((49, 512, 512), (5.0, 0.7988, 0.7988), 303, 1, 3, 0.3),
    "hepatic_vessel_1.5mm": ((150, 512, 512), (1.5, 0.7988, 0.7988), 303, 1, 3, 0.0),
    "colon": ((95, 512, 512), (5.0, 0.7793, 0.7793), 126, 1, 2, 0.3),
    "colon_3mm": ((150, 512, 512), (3.0, 0.7793, 0.7793), 126, 1, 2, 0.0),
    "kits": ((528, 512, 512), (0.78125, 0.78125, 0.78125), 210, 1, 3, 0.0),
    "pool": ((300, 400, 400), (1.5, 1.0, 1.0), 1000, 1, 32, 0.0),
    "brats": ((138, 169, 138), (1.0, 1.0, 1.0), 484, 4, 4, 0.0),
    "prostate": ((20, 320, 319), (3.6, 0.62, 0.62), 32, 2, 3, 0.1),
    "heart": ((115, 320, 320), (1.37, 1.25, 1.25), 20, 1, 2, 0.05),
    "thick_left_right": ((320, 300, 24), (0.7, 0.7, 5.5), 40, 1, 2, 0.1),
    "acdc": ((9, 256, 216), (10.0, 1.56, 1.56), 200, 1, 4, 0.2),
    "small": ((20, 24, 28), (1.0, 1.0, 1.0), 30, 1, 2, 0.1),
}
PLANNERS = {
    "nnunet": default.ExperimentPlanner,
    "nnunet_resenc_m": residual.nnUNetPlannerResEncM,
    "nnunet_resenc_l": residual.nnUNetPlannerResEncL,
    "nnunet_resenc_xl": residual.nnUNetPlannerResEncXL,
}
RESIDUAL_TOO = ("liver", "lung", "pancreas", "acdc", "Task004_Hippocampus")  # large networks take minutes


def synthetic(shape, spacing, spread: float) -> tuple[list, list]:
    rng = np.random.default_rng(0)
    factors = 1 + spread * rng.uniform(-1, 1, (9, 3))
    factors -= np.median(factors, 0) - 1
    shapes = [[max(2, round(n / f)) for n, f in zip(shape, row, strict=True)] for row in factors]
    return shapes, [[round(float(s * f), 4) for s, f in zip(spacing, row, strict=True)] for row in factors]


def measured(folder: str) -> tuple[list, list, int, int, int]:
    import SimpleITK

    declared = json.loads(Path(folder, "dataset.json").read_text())
    shapes, spacings = [], []
    for entry in declared["training"]:
        image = SimpleITK.ReadImage(str(Path(folder, entry["image"])))
        where = np.nonzero(SimpleITK.GetArrayFromImage(image))
        shapes.append([int(w.max() - w.min() + 1) for w in where])
        spacings.append([round(float(s), 6) for s in image.GetSpacing()[::-1]])
    return shapes, spacings, len(shapes), 1, len(declared["labels"])


def plans(planners: dict, shapes: list, spacings: list, cases: int, channels: int, classes: int) -> dict:
    raw, prepared = (Path(FOLDER, kind, "Dataset001_X") for kind in ("raw", "prepared"))
    for folder in (raw, prepared):
        folder.mkdir(parents=True, exist_ok=True)
    declared = {
        "channel_names": {str(i): "MRI" for i in range(channels)}, "labels": {str(i): i for i in range(classes)},
        "numTraining": cases, "file_ending": ".nii.gz", "dataset": {},
    }  # fmt: skip
    found = {
        "spacings": spacings, "shapes_after_crop": shapes, "median_relative_size_after_cropping": 1.0,
        "foreground_intensity_properties_per_channel": {},
    }  # fmt: skip
    (raw / "dataset.json").write_text(json.dumps(declared))
    (prepared / "dataset_fingerprint.json").write_text(json.dumps(found))
    result = {}
    for name, planner in planners.items():
        for kept in prepared.glob("*Plans*.json"):  # the planner keeps configurations of an earlier plan
            kept.unlink()
        made = planner(1)
        made.determine_reader_writer = lambda: default.ExperimentPlanner
        with contextlib.redirect_stdout(io.StringIO()):
            plan = made.plan_experiment()
        result[name] = {"transpose": plan["transpose_forward"]}
        for key in ("3d_fullres", "3d_lowres")[: 2 if name == "nnunet" else 1]:
            if key in plan["configurations"]:
                c = plan["configurations"][key]
                kept = c["architecture"]["arch_kwargs"]
                result[name][key] = {
                    "spacing": [float(s) for s in c["spacing"]], "patch_size": [int(n) for n in c["patch_size"]],
                    "batch_size": int(c["batch_size"]),
                    "median": [float(n) for n in c["median_image_size_in_voxels"]],
                    **{k: v for k, v in kept.items() if k in ("features_per_stage", "kernel_sizes", "strides")},
                    **{k: list(v) for k, v in kept.items() if k.startswith("n_")and k != "n_stages"},
                }  # fmt: skip
    return result


def main() -> None:
    rows = {
        name: (*synthetic(shape, spacing, spread), *rest) for name, (shape, spacing, *rest, spread) in PUBLISHED.items()
    }
    rows |= {Path(folder).name: measured(folder) for folder in sys.argv[2:]}
    path = Path(sys.argv[1])
    fixture = json.loads(path.read_text()) if path.is_file() else {}
    for name, row in rows.items():
        if name in fixture:
            continue
        fixture[name] = dict(zip(("shapes", "spacings", "cases", "channels", "classes"), row, strict=True))
        fixture[name]["plans"] = plans(PLANNERS if name in RESIDUAL_TOO else {"nnunet": PLANNERS["nnunet"]}, *row)
        print(name, fixture[name]["plans"]["nnunet"]["3d_fullres"]["patch_size"], flush=True)
        path.write_text(json.dumps(fixture, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v)))


if __name__ == "__main__":
    main()
