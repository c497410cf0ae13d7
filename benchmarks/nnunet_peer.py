"""nnU-Net 2.8.1's side of nnunet_parity.py; runs in the benchmark environment, where tsfm cannot be imported.

Trains small models with nnU-Net's own trainer for some iterations on ../shared/data and predicts with nnU-Net's own
predictor. WORK/results/... are model folders as nnU-Net leaves them, WORK/expected has logits and label maps.

    .venv-bench/bin/python benchmarks/nnunet_peer.py WORK DATA [ITERATIONS [MODEL]]
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

WORK, DATA = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
for name in ("raw", "preprocessed", "results"):
    (WORK / name).mkdir(parents=True, exist_ok=True)
    os.environ[f"nnUNet_{name}"] = str(WORK / name)
os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f"}

import numpy as np  # noqa: E402
import torch  # noqa: E402
from nnunetv2.experiment_planning.plan_and_preprocess_api import (  # noqa: E402
    extract_fingerprints,
    plan_experiments,
    preprocess,
)
from nnunetv2.inference import predict_from_raw_data  # noqa: E402
from nnunetv2.training.nnUNetTrainer.variants.optimizer.nnUNetTrainerAdam import (  # noqa: E402
    nnUNetTrainerVanillaAdam1en3 as Trainer,  # learns something in far fewer steps than SGD
)

# nnU-Net looks a trainer up by importing all of them, some of which need torchvision.
predict_from_raw_data.recursive_find_trainer_class_by_name = lambda name: Trainer
CASES = 6
HALF = torch.half
HIPPOCAMPUS = {
    "source": "Task004_Hippocampus",
    "patch": [32, 40, 32],
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
    "kernels": [[3, 3, 3]] * 3,
}
MODELS = {
    "softmax": {
        **HIPPOCAMPUS,
        "id": 4,
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "anterior": 1, "posterior": 2},
        "folds": [0, 1],
    },
    "regions": {
        **HIPPOCAMPUS,
        "id": 5,
        "channel_names": {"0": "noNorm"},
        "labels": {"background": 0, "hippocampus": [1, 2], "posterior": [2]},
        "regions_class_order": [1, 2],
        "folds": ["all"],
        "residual": True,
        "transpose": [1, 0, 2],
        "schemes": ["RescaleTo01Normalization"],
    },
    "anisotropic": {
        "id": 901,
        "source": "Task901_SarcomaCT",
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "sarcoma": 1},
        "patch": [16, 64, 64],
        "spacing": [3.3, 3.0, 3.0],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "kernels": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        "folds": [0],
    },
}


def write_raw(name: str, model: dict) -> tuple[str, list[Path]]:
    """The data set in nnU-Net's raw layout; returns its name and the images that are predicted (not trained on)."""
    dataset = f"Dataset{model['id']:03d}_{name}"
    folder, source = WORK / "raw" / dataset, DATA / model["source"]
    images = sorted((source / "imagesTr").glob("*.nii.gz"))[: CASES + 2]
    for path in images[:CASES]:
        for part, target in (("imagesTr", path.name.replace(".nii.gz", "_0000.nii.gz")), ("labelsTr", path.name)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / part / path.name, folder / part / target)
    declared = {key: model[key] for key in ("channel_names", "labels", "regions_class_order") if key in model}
    declared |= {"numTraining": CASES, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(declared))
    return dataset, images[CASES:]


def edit_plans(path: Path, model: dict) -> dict:
    """The planner's plans with a small network, as users edit them."""
    plans = json.loads(path.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    stages = len(model["strides"])
    arguments = configuration["architecture"]["arch_kwargs"]
    arguments |= {"n_stages": stages, "features_per_stage": [8, 16, 32][:stages]}
    arguments |= {"kernel_sizes": model["kernels"], "strides": model["strides"]}
    arguments |= {"n_conv_per_stage_decoder": [2] * (stages - 1)}
    if model.get("residual"):
        configuration["architecture"]["network_class_name"] = (
            "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
        )
        del arguments["n_conv_per_stage"]
        arguments |= {"n_blocks_per_stage": [1, 2, 2], "n_conv_per_stage_decoder": [1] * (stages - 1)}
    else:
        arguments["n_conv_per_stage"] = [2] * stages
    configuration |= {"patch_size": model["patch"], "batch_size": 2}
    configuration["spacing"] = model.get("spacing", configuration["spacing"])
    configuration["normalization_schemes"] = model.get("schemes", configuration["normalization_schemes"])
    if "transpose" in model:
        plans["transpose_forward"] = model["transpose"]
        plans["transpose_backward"] = np.argsort(model["transpose"]).tolist()
    path.write_text(json.dumps(plans))
    return plans


def train(dataset: str, model: dict, iterations: int) -> None:
    """Nothing, where WORK has the model already."""
    trained = [f"*/fold_{fold}/checkpoint_final.pth" for fold in model["folds"]]
    if all(any((WORK / "results" / dataset).glob(pattern)) for pattern in trained):
        return
    base = WORK / "preprocessed" / dataset
    extract_fingerprints([model["id"]], num_processes=1, check_dataset_integrity=False)
    plan_experiments([model["id"]])
    plans = edit_plans(base / "nnUNetPlans.json", model)
    preprocess([model["id"]], configurations=["3d_fullres"], num_processes=[1])
    declared = json.loads((base / "dataset.json").read_text())
    for fold in model["folds"]:
        torch.manual_seed(0)
        given = {**json.loads(json.dumps(plans)), "continue_training": False}
        trainer = Trainer(given, "3d_fullres", fold, declared, torch.device("cpu"))
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, iterations, 1
        trainer.run_training()


def prepare(predictor: predict_from_raw_data.nnUNetPredictor, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The image as nnU-Net prepares it, and in the order of version 1: resampled first, then normalised."""
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    preprocessor = configuration.preprocessor_class(verbose=False)
    normalize = preprocessor._normalize
    data, _, _ = preprocessor.run_case([str(path)], None, plans, configuration, predictor.dataset_json)
    preprocessor._normalize = lambda image, *rest: image
    first, mask, _ = preprocessor.run_case([str(path)], None, plans, configuration, predictor.dataset_json)
    return data, normalize(first, mask, configuration, plans.foreground_intensity_properties_per_channel)


def predict(name: str, dataset: str, model: dict, images: list[Path]) -> None:
    """For every image: label maps by nnU-Net, as it is and with float32 sums; prepared image; logits of one patch."""
    folder = next((WORK / "results" / dataset).iterdir())
    out = WORK / "expected" / name
    out.mkdir(parents=True, exist_ok=True)
    predictor = predict_from_raw_data.nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), model["folds"])
    for path in images:
        case = path.name.removesuffix(".nii.gz")
        for ending, sums in (("", HALF), ("_mean_logits", torch.float32)):
            torch.half = sums  # what the predictor asks for, for its sums and nothing else
            predictor.predict_from_files_sequential([[str(path)]], [str(out / (case + ending))])
        torch.half = HALF
        data, first = prepare(predictor, path)
        patch = torch.zeros(1, data.shape[0], *model["patch"])
        inside = tuple(slice(0, min(a, b)) for a, b in zip(data.shape[1:], model["patch"], strict=True))
        patch[(0, slice(None), *inside)] = torch.as_tensor(np.asarray(data))[(slice(None), *inside)]
        logits = []
        with torch.no_grad():
            for parameters in predictor.list_of_parameters:
                predictor.network.load_state_dict(parameters)
                logits.append(predictor.network.eval()(patch))
        mean = torch.stack(logits).mean(0).numpy()
        np.savez_compressed(out / f"{case}.npz", image=patch.numpy(), logits=mean, prepared=data, resampled_first=first)
    (out / "info.json").write_text(json.dumps({"folder": str(folder), "images": [str(path) for path in images]}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_num_threads = lambda count: None  # nnU-Net would ask for as many as it has loader processes: none
    for name, model in MODELS.items():
        if sys.argv[4:] and name not in sys.argv[4:]:
            continue
        dataset, images = write_raw(name, model)
        train(dataset, model, iterations=int(sys.argv[3]) if len(sys.argv) > 3 else 40)
        predict(name, dataset, model, images)
