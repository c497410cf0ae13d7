"""What makes a run this run: every id of train.json belongs to it, or stands here with the reason why not."""

import json

import pytest
import torch
from conftest import ROOT
from monai.bundle import ReferenceResolver
from tsfm.network.networks import create_network
from tsfm.training.curve import Curve
from tsfm.training.run_state import RunState
from tsfm.training.weight_files import CheckpointError

BUNDLES = ("tsfm_pretrain", "tsfm_finetune")
CHANGES_NO_STEP = {
    "output_dir": "where the run lies",
    "ckpt_dir": "where a copy goes",
    "epochs": "a run may be made longer",
    "val_iterations": "validation only",
    "val_interval": "validation only",
    "save_interval": "when it is saved",
    "save_sharded": "how it is saved",
    "device": "the same run goes on elsewhere",
    "compile": "the same arithmetic",
    "checkpointing": "the same arithmetic",
    "rank": "a process of the run",
    "annotated": "of MONAI Label's bare items, whose runs are not resumed",
    "network_size": "the network's own shape is compared",
    "bundle_root": "where the bundle lies",
    "imports": "no option",
}


SMALL = {
    **{"in_channels": 1, "out_channels": 1, "img_size": [8, 8, 8], "features": [4, 4], "strides": [[2, 2, 2]]},
    **{"depths_down": [0, 1], "depths_up": [1], "hidden_size": 4, "num_layers": 1, "num_heads": 1, "mlp_dim": 4},
}  # fmt: skip


def config(bundle):
    return json.loads((ROOT / "bundles" / bundle / "configs/train.json").read_text())


def references(value):
    if isinstance(value, str):
        return {name.split("#")[0].lstrip("@") for name in ReferenceResolver.match_refs_pattern(value)}
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return set().union(*map(references, parts))


@pytest.mark.parametrize("bundle", BUNDLES)
def test_no_option_is_forgotten(bundle):
    ids, reached, todo = config(bundle), set(), {"settings"}
    while todo:
        name = todo.pop()
        reached.add(name)
        todo |= (references(ids[name]) & set(ids)) - reached
    options = {name for name, value in ids.items() if not isinstance(value, dict) and not name.startswith("_")}
    blocks = {
        "table",
        "network",
        "placed_network",
        "prepare_cases",
        "prepare",
        "initialize",
        "run",
        "patch",
        "batch",
        "parameters",
    }
    assert options - reached - set(CHANGES_NO_STEP) - blocks == set(), (
        "add it to train.json's settings, or to CHANGES_NO_STEP with the reason"
    )


def state(folder, settings):
    network = create_network(**SMALL)
    parts = {"optimizer": torch.optim.SGD(network.parameters(), settings["learning_rate"])}
    item = [{"image": "a.nii.gz", "label": "b.nii.gz", "dataset": "one", "case": "a"}]
    return RunState(str(folder), network, parts, Curve(str(folder)), settings, item)


class Engine:
    """An engine at the end of its first epoch, as far as saving and resuming look at it."""

    def __init__(self):
        self.should_terminate = False
        self.state = type("State", (), {"epoch": 1, "max_epochs": 2, "iteration": 1, "metrics": {}})()


@pytest.mark.parametrize("bundle", BUNDLES)
def test_each_setting_that_differs_is_refused_by_name(bundle, tmp_path):
    settings = {name: 1 for name in config(bundle)["settings"] if not name.startswith("_")}
    state(tmp_path, settings).save(Engine())
    for name in settings:
        with pytest.raises(CheckpointError, match=f"{name}: was 1, is 2"):
            state(tmp_path, {**settings, name: 2}).resume(Engine())
