"""What the Model Zoo does with a bundle: its ``ci/verify_bundle.py``, and a unit test as those in its ``ci/unit_tests``.

Both are run here as the zoo runs them: from the folder that holds ``models/NAME``, the bundle known by a relative path, in a
process that knows no package but the one in the bundle. Left out is what installs packages or asks the zoo's servers.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, warm
from tsfm.cases.cases import Preparation
from tsfm.labels import LabelTable
from tsfm.network.tsfm_net import TSFM
from tsfm.training.checkpoint import describe_network, save_weights
from tsfm_tools.release import release
from tsfm_tools.release.folder_checks import SCHEMA

pytestmark = pytest.mark.convolutions

TINY = {"features": [4, 8], "depths_down": [1, 1], "depths_up": [1], "strides": [[2, 2, 2]]}
TINY |= {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 16, "img_size": [16, 16, 16]}
TARGETS = {"liver": {}, "liver_tumor": {"inside": "liver"}}
MSD_LIVER = {"name": "msd_liver", "labels": {"1": "liver", "2": "liver_tumor"}}

VERIFY = """
import shutil, sys
import torch
from monai.bundle import ckpt_export, verify_metadata, verify_net_in_out

bundle, schema = sys.argv[1:3]
files = {"meta_file": f"{bundle}/configs/metadata.json", "config_file": f"{bundle}/configs/inference.json"}
verify_metadata(meta_file=files["meta_file"], filepath=schema)
verify_net_in_out(net_id="network_def", bundle_root=bundle, **files)
weights = {"filepath": f"{bundle}/models/verify_model.ts", "ckpt_file": f"{bundle}/models/model.pt"}
ckpt_export(net_id="network_def", bundle_root=bundle, **weights, **files)
assert torch.jit.load(weights["filepath"]).patch_size == [16, 16, 16]
"""

UNIT_TEST = """
import os, sys
from monai.bundle import ConfigWorkflow

bundle, _, dataset_dir, datasets = sys.argv[1:]
files = {"logging_file": f"{bundle}/configs/logging.conf", "meta_file": f"{bundle}/configs/metadata.json"}
override = {"bundle_root": bundle, "dataset_dir": dataset_dir, **({"datasets": [datasets]} if datasets else {})}
short = {"epochs": 1, "iterations_per_epoch": 1, "val_iterations": 1, "batch_size": 1, "num_workers": 0}

trainer = ConfigWorkflow(
    workflow_type="train", config_file=f"{bundle}/configs/train.json", **files, **override, **short
)
trainer.initialize()
assert not trainer.check_properties()
trainer.run()
trainer.finalize()

validator = ConfigWorkflow(
    workflow_type="eval", config_file=[f"{bundle}/configs/train.json", f"{bundle}/configs/evaluate.json"], **files,
    **override,
)
validator.initialize()
validator.run()
validator.finalize()

os.remove(f"{bundle}/models/model.pt")
inferrer = ConfigWorkflow(
    workflow_type="infer", config_file=f"{bundle}/configs/inference.json", **files, bundle_root=bundle,
    dataset_dir=f"{dataset_dir}/imagesTr" if not datasets else f"{dataset_dir}/Task03_Liver/imagesTr",
    **{"handlers#0#_disabled_": True},  # do not load weights
)
inferrer.initialize()
assert not inferrer.check_properties()
inferrer.run()
inferrer.finalize()
"""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """The zoo's folder: both bundles under ``models/``, and small random images in the layout of MSD Liver."""
    root = tmp_path_factory.mktemp("zoo")
    random = np.random.default_rng(0)
    data = root / "data/Task03_Liver"
    for case in range(3):
        for kind, values in (
            ("images", random.normal(50, 100, (20, 22, 18))),
            ("labels", random.integers(0, 3, (20, 22, 18))),
        ):
            (data / f"{kind}Tr").mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(values.astype(np.int16), np.eye(4)), data / f"{kind}Tr/liver_{case}.nii.gz")
    listed = [{"image": f"./imagesTr/liver_{n}.nii.gz", "label": f"./labelsTr/liver_{n}.nii.gz"} for n in range(3)]
    labels = {"0": "background", "1": "liver", "2": "liver_tumor"}
    content = {"name": "msd_liver", "labels": labels, "modality": {"0": "CT"}, "training": listed, "licence": "CC0"}
    (data / "dataset.json").write_text(json.dumps(content))
    torch.manual_seed(0)
    network = TSFM(1, 2, **TINY)
    ct = {"CT": {"lower": -200.0, "upper": 300.0, "mean": 50.0, "sd": 80.0}}
    items = [{"modality": "CT", "dataset": "msd_liver", "licence": "CC BY-SA 4.0"}]
    table = LabelTable(TARGETS, [MSD_LIVER])
    describe_network(network, table, Preparation((1.0, 1.0, 1.0), ct), TINY["img_size"], items)
    save_weights(network, root / "weights.pt")
    for name in ("tsfm_pretrain", "tsfm_finetune"):
        release.release(str(ROOT / "bundles" / name), str(root / "weights.pt"), str(root / "models"), zipped=False)
    return root


def run(script: str, zoo: Path, name: str, *more: str) -> None:
    environment = {**os.environ, "PYTHONPATH": f"models/{name}", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [warm().python, "-W", "ignore", "-c", script, f"models/{name}", SCHEMA, *more]
    done = subprocess.run(command, cwd=zoo, env=environment, capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("name", ["tsfm_pretrain", "tsfm_finetune"])
def test_verify_bundle_passes_torchscript_included(zoo, name):
    run(VERIFY, zoo, name)


@pytest.mark.parametrize("name", ["tsfm_pretrain", "tsfm_finetune"])
def test_each_config_runs_as_in_the_zoos_unit_tests(zoo, name):
    where = ("data", "msd_liver") if name == "tsfm_pretrain" else ("data/Task03_Liver", "")
    run(UNIT_TEST, zoo, name, *where)
    bundle = zoo / "models" / name
    assert json.loads((bundle / "evaluation/summary.json").read_text())["cases"] >= 1
    assert len(list((bundle / "predictions").glob("*.nii.gz"))) == 3
