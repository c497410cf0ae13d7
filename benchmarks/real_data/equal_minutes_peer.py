"""nnU-Net 2.8.1's side of equal_minutes.py; runs in the benchmark environment, where tsfm cannot be imported.

nnU-Net's own planner, preprocessing, trainer (3d_fullres, its batch, SGD) and predictor, one thread. WORK has the raw data.

    equal_minutes_peer.py WORK DATASET prepare                   plans and prepares; not part of a budget
    equal_minutes_peer.py WORK DATASET train FOLDER STEPS SEED   trains into FOLDER; the rate falls to 0 over STEPS
    equal_minutes_peer.py WORK DATASET predict FOLDER            label maps of the images in WORK/held_out

DATASET is nnU-Net's name of the folder, Dataset004_hippocampus for example.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

WORK, DATASET = Path(sys.argv[1]), sys.argv[2]
for name in ("raw", "preprocessed", "results"):
    os.environ[f"nnUNet_{name}"] = str(WORK / name)
os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f"}

import torch  # noqa: E402
from nnunetv2.experiment_planning.plan_and_preprocess_api import (  # noqa: E402
    extract_fingerprints,
    plan_experiments,
    preprocess,
)
from nnunetv2.inference import predict_from_raw_data  # noqa: E402
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer as Trainer  # noqa: E402

# nnU-Net looks a trainer up by importing all of them, some of which need torchvision.
predict_from_raw_data.recursive_find_trainer_class_by_name = lambda name: Trainer
PREPARED = WORK / "preprocessed" / DATASET
NUMBER = int(DATASET[7:10])
STEPS_PER_EPOCH = 5


def prepare() -> None:
    extract_fingerprints([NUMBER], num_processes=1, check_dataset_integrity=False)
    plan_experiments([NUMBER])
    preprocess([NUMBER], configurations=["3d_fullres"], num_processes=[1])


def train(folder: Path, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    plans, declared = (json.loads((PREPARED / name).read_text()) for name in ("nnUNetPlans.json", "dataset.json"))
    trainer = Trainer(plans | {"continue_training": False}, "3d_fullres", 0, declared, torch.device("cpu"))
    trainer.output_folder_base, trainer.output_folder = str(folder), str(folder / "fold_0")
    trainer.log_file = str(folder / "log.txt")
    (folder / "fold_0").mkdir(parents=True, exist_ok=True)
    trainer.num_epochs, trainer.num_iterations_per_epoch = max(1, round(steps / STEPS_PER_EPOCH)), STEPS_PER_EPOCH
    trainer.num_val_iterations_per_epoch, trainer.save_every = 1, 10**6
    trainer.run_training()


def predict(folder: Path) -> None:
    predictor = predict_from_raw_data.nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, use_mirroring=False)
    predictor.initialize_from_trained_model_folder(str(folder), [0])
    images = sorted((WORK / "held_out").glob("*.nii.gz"))
    (folder / "maps").mkdir(exist_ok=True)
    cases = [path.name.removesuffix(".nii.gz") for path in images]
    predictor.predict_from_files_sequential([[str(p)] for p in images], [str(folder / "maps" / case) for case in cases])


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_num_threads = lambda count: None  # nnU-Net would ask for as many as it has loader processes: none
    command, arguments = sys.argv[3], sys.argv[4:]
    if command == "prepare":
        prepare()
    elif command == "train":
        train(Path(arguments[0]), int(arguments[1]), int(arguments[2]))
    else:
        predict(Path(arguments[0]))
