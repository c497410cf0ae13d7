"""nnU-Net 1.7.1's side of nnunet_parity.py; runs in the benchmark environment, where tsfm cannot be imported.

As nnunet_peer.py: plans, preprocesses, trains (nnUNetTrainerV2) and predicts by nnU-Net's own code, with small networks
written into its plans. Each image is predicted as nnU-Net 1 does, and once more without its softmax, so that logits are
averaged and resampled, as in version 2 (CASE_mean_logits.nii.gz).

Changed at run time: `torch.load` reads whole pickles, as it did before torch 2.6. Nothing else of nnU-Net 1 fails with
torch 2.13, numpy 2.4, scikit-image 0.26 and batchgenerators 0.25.5 on a processor. The masked model needs batchgenerators
0.24 to agree in every voxel (docs/networks.md).

    .venv-bench/bin/python benchmarks/nnunet1_peer.py WORK DATA [ITERATIONS [MODEL]]
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

WORK, DATA = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
FOLDERS = {"nnUNet_raw_data_base": "raw", "nnUNet_preprocessed": "pre", "RESULTS_FOLDER": "results"}
for variable, folder in FOLDERS.items():
    (WORK / folder).mkdir(parents=True, exist_ok=True)
    os.environ[variable] = str(WORK / folder)
os.environ |= {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1"}

import nibabel as nib  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from nnunet.experiment_planning import nnUNet_plan_and_preprocess  # noqa: E402
from nnunet.experiment_planning.experiment_planner_baseline_3DUNet_v21 import ExperimentPlanner3D_v21  # noqa: E402
from nnunet.inference.predict import predict_cases  # noqa: E402
from nnunet.run.default_configuration import get_default_configuration  # noqa: E402
from nnunet.training.model_restore import load_model_and_checkpoint_files  # noqa: E402
from nnunet.training.network_training import nnUNetTrainerV2 as trainers  # noqa: E402

torch.load = functools.partial(torch.load, weights_only=False)
SOFTMAX = trainers.softmax_helper
CUBES = {"pool_op_kernel_sizes": [[2, 2, 2], [2, 2, 2]], "conv_kernel_sizes": [[3, 3, 3]] * 3}
MODELS = {
    "softmax": {
        "task": "Task004_Hippocampus",
        "labels": {0: 0, 1: 1, 2: 2},
        "cases": 6,
        "folds": [0, 1],
        "plans": {"patch_size": np.array([32, 40, 32]), **CUBES},
    },
    "anisotropic": {
        "task": "Task901_SarcomaCT",
        "labels": {0: 0, 1: 1},
        "cases": 6,
        "folds": [0],
        "plans": {
            "patch_size": np.array([16, 64, 64]),
            "current_spacing": np.array([3.3, 3.0, 3.0]),
            "pool_op_kernel_sizes": [[1, 2, 2], [2, 2, 2]],
            "conv_kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        },
    },
    "masked": {
        "task": "Task905_BrainTumour4ch",
        "labels": {0: 0, 1: 1, 2: 2, 4: 3},
        "cases": 2,
        "folds": ["all"],
        "transpose": [1, 0, 2],
        "plans": {
            "patch_size": np.array([48, 48, 40]),
            "current_spacing": np.array([2.0, 2.5, 2.0]),
            **CUBES,
        },
    },
}


def write_raw(model: dict) -> list[Path]:
    """The data set in nnU-Net's raw layout, one file per channel; the images to predict, of which it has no more than two."""
    folder, source = WORK / "raw" / "nnUNet_raw_data" / model["task"], DATA / model["task"]
    declared = json.loads((source / "dataset.json").read_text())
    images = sorted((source / "imagesTr").glob("*.nii.gz"))
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for path in images[: model["cases"] + 2]:
        name, image = path.name.removesuffix(".nii.gz"), nib.load(path)
        channels = nib.four_to_three(image) if image.ndim == 4 else [image]
        for number, channel in enumerate(channels):
            nib.save(channel, folder / "imagesTr" / f"{name}_{number:04d}.nii.gz")
        labels = nib.load(source / "labelsTr" / path.name)
        values = np.zeros(max(model["labels"]) + 1, np.uint8)
        values[list(model["labels"])] = list(model["labels"].values())
        renumbered = values[np.asarray(labels.dataobj).astype(int)]
        nib.save(nib.Nifti1Image(renumbered, labels.affine), folder / "labelsTr" / path.name)
    cases = [{"image": f"./imagesTr/{p.name}", "label": f"./labelsTr/{p.name}"} for p in images[: model["cases"]]]
    numbers = {str(value): str(value) for value in model["labels"].values()}
    told = {"name": model["task"], "modality": declared["modality"], "labels": numbers, "training": cases, "test": []}
    (folder / "dataset.json").write_text(json.dumps(told))
    return images[model["cases"] : model["cases"] + 2] or images


def files_of(path: Path, model: dict) -> list[str]:
    folder = WORK / "raw" / "nnUNet_raw_data" / model["task"] / "imagesTr"
    return [str(one) for one in sorted(folder.glob(path.name.replace(".nii.gz", "_0*.nii.gz")))]


class Planner(ExperimentPlanner3D_v21):
    """The planner's plans with a small network, as users edit them."""

    def save_my_plans(self) -> None:
        model = next(model for model in MODELS.values() if model["task"] == Path(self.preprocessed_output_folder).name)
        last = self.plans["plans_per_stage"][max(self.plans["plans_per_stage"])]
        stage = {**last, "batch_size": 2, "do_dummy_2D_data_aug": False, **model["plans"]}
        self.plans_per_stage = {0: stage}
        self.transpose_forward = forward = model.get("transpose", self.transpose_forward)
        self.plans |= {"num_stages": 1, "plans_per_stage": self.plans_per_stage, "base_num_features": 8}
        self.plans |= {"transpose_forward": forward, "transpose_backward": np.argsort(forward).tolist()}
        super().save_my_plans()


def train(model: dict, iterations: int) -> Path:
    """The model folder, trained where WORK does not have it already."""
    task, search = model["task"], nnUNet_plan_and_preprocess.recursive_find_python_class
    plans_file = WORK / "pre" / task / "nnUNetPlansv2.1_plans_3D.pkl"
    if not plans_file.exists():
        nnUNet_plan_and_preprocess.recursive_find_python_class = lambda *names, **more: Planner
        sys.argv = ["plan", "-t", task[4:7], "-pl2d", "None", "-tl", "1", "-tf", "1"]
        nnUNet_plan_and_preprocess.main()
        nnUNet_plan_and_preprocess.recursive_find_python_class = search
    for fold in model["folds"]:
        plans, folder, data, batch_dice, stage, kind = get_default_configuration("3d_fullres", task, "nnUNetTrainerV2")
        name = "all" if fold == "all" else f"fold_{fold}"
        if not (Path(folder) / name / "model_final_checkpoint.model").exists():
            options = {"unpack_data": True, "deterministic": True, "fp16": False}
            trainer = kind(plans, fold, folder, data, batch_dice, stage, **options)
            trainer.max_num_epochs, trainer.num_val_batches_per_epoch = 4, 1
            trainer.num_batches_per_epoch = iterations // trainer.max_num_epochs
            trainer.initialize(True)
            trainer.run_training()
    return Path(folder)


def predict(name: str, folder: Path, model: dict, images: list[Path]) -> None:
    """For every image: label maps by nnU-Net as it is, and with the mean of logits; prepared image; logits of one patch."""
    out = WORK / "expected" / name
    out.mkdir(parents=True, exist_ok=True)
    cases = [path.name.removesuffix(".nii.gz") for path in images]
    files = [files_of(path, model) for path in images]
    for ending, nonlinearity in (("", SOFTMAX), ("_mean_logits", lambda logits: logits)):
        trainers.softmax_helper = nonlinearity  # what the trainer gives the network for inference
        targets = [str(out / f"{case}{ending}.nii.gz") for case in cases]
        predict_cases(
            str(folder), files, targets, model["folds"], False, 1, 1, mixed_precision=False, overwrite_existing=True,
            checkpoint_name="model_final_checkpoint",
        )  # fmt: skip
    trainer, folds = load_model_and_checkpoint_files(str(folder), model["folds"], False, "model_final_checkpoint")
    trainer.network.do_ds = False
    trainer.network.eval()
    for case, paths in zip(cases, files, strict=True):
        data, _, _ = trainer.preprocess_patient(paths)
        patch = torch.zeros(1, data.shape[0], *trainer.patch_size)
        inside = tuple(slice(0, min(a, b)) for a, b in zip(data.shape[1:], trainer.patch_size, strict=True))
        patch[(0, slice(None), *inside)] = torch.from_numpy(data)[(slice(None), *inside)]
        logits = []
        for parameters in folds:
            trainer.load_checkpoint_ram(parameters, False)
            with torch.no_grad():
                logits.append(trainer.network.eval()(patch))
        mean = torch.stack(logits).mean(0)
        np.savez_compressed(out / f"{case}.npz", image=patch.numpy(), logits=mean.numpy(), resampled_first=data)
    (out / "info.json").write_text(json.dumps({"folder": str(folder), "images": [str(path) for path in images]}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted, steps = sys.argv[4:] or list(MODELS), int(sys.argv[3]) if len(sys.argv) > 3 else 40
    for name in wanted:
        predicted = write_raw(MODELS[name])
        predict(name, train(MODELS[name], steps), MODELS[name], predicted)
