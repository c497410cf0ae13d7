"""What makes a run this run: every id of train.json belongs to it, or stands here with the reason why not."""

import json
import re

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
        self.state = type("State", (), {"epoch": 1, "max_epochs": 2, "iteration": 1, "epoch_length": 1})()


@pytest.mark.parametrize("bundle", BUNDLES)
def test_each_setting_that_differs_is_refused_by_name(bundle, tmp_path):
    settings = {name: 1 for name in config(bundle)["settings"] if not name.startswith("_")}
    state(tmp_path, settings).save(Engine())
    for name in settings:
        with pytest.raises(CheckpointError, match=f"{name}: was 1, is 2"):
            state(tmp_path, {**settings, name: 2}).resume(Engine())


PAGE = (ROOT / "docs/changes.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```json\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
CHANGED = {
    "Loss": "loss#reduction: was mean, is None",
    "Optimizer, schedule, accumulated gradients": "lr_scheduler#_target_: was tsfm.training.steps.poly_schedule, is torch.optim.lr_scheduler.CosineAnnealingLR",
    "Augmentation": "train#preprocessing#transforms#10#_target_: was None, is RandCoarseDropoutd",
    "Network": "network_def#arguments#init_filters: was None, is 8",
}
OWN_KNOB = {
    "decay": [0.5],
    "lr_scheduler": {"_target_": "ExponentialLR", "optimizer": "@optimizer", "gamma": "$@decay[0]"},
}


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Begins a run, or goes on with it, as a command line with `options` and an overlay says."""

    def run(*options, overlay="{}"):
        (tmp_path / "overlay.json").write_text(overlay)
        files = [str(ROOT / "bundles/tsfm_finetune/configs/train.json"), str(tmp_path / "overlay.json")]
        monkeypatch.setattr(
            "sys.argv", ["monai.bundle", "run", *(["--config_file", str(files), *options] if options else [])]
        )
        engine = Engine()
        found = state(tmp_path, {"learning_rate": 1})
        found.resume(engine)
        found.save(engine)

    return run


@pytest.mark.parametrize("title", BLOCKS)
def test_of_the_overlays_of_the_page_those_that_change_results_make_another_run(title, begin):
    begin("--epochs", "3")
    if title not in CHANGED:
        begin("--epochs", "4", overlay=BLOCKS[title])
        return
    with pytest.raises(CheckpointError) as refused:
        begin("--epochs", "4", overlay=BLOCKS[title])
    assert CHANGED[title] in str(refused.value)


@pytest.mark.parametrize(
    "name, value, was",
    [
        ("train::trainer::accumulation_steps", "2", "None"), ("train::step::clip_norm", "1.0", "12.0"),
        ("train::dataset::spatial::rotation_degrees", "5.0", "30.0"), ("train::sampler::foreground_fraction", "0.5", "$1 / 3"),
        ("lr_scheduler::power", "2.0", "0.9"), ("loss::reduction", "sum", "mean"), ("network_def::dropout", "0.5", "None"),
    ],
)  # fmt: skip
def test_an_option_that_changes_results_makes_another_run_and_is_named(name, value, was, begin):
    begin("--epochs", "3")
    with pytest.raises(CheckpointError, match=re.escape(f"{name.replace('::', '#')}: was {was}, is {value}")):
        begin(f"--{name}", value)


def test_what_an_overlay_defines_for_the_recipe_belongs_to_it(begin):
    begin("--epochs", "3", overlay=json.dumps(OWN_KNOB))
    with pytest.raises(CheckpointError, match=r"decay#0: was 0\.5, is 0\.1"):
        begin("--epochs", "3", overlay=json.dumps({**OWN_KNOB, "decay": [0.1]}))


@pytest.mark.parametrize(
    "options",
    [
        ("--train::trainer::max_epochs", "9"), ("--num_workers", "0"), ("--device", "cpu", "--optimizer::fused", "False"),
        ("--checkpointing", "True", "--compile", "True"), ("--train::handlers::2::interval", "2"), (),
    ],
)  # fmt: skip
def test_what_changes_no_step_may_change_and_a_run_from_python_goes_on(options, begin):
    begin("--epochs", "3")
    begin(*options)
    with pytest.raises(CheckpointError, match="train#step#clip_norm"):
        begin("--train::step::clip_norm", "1.0")


def test_a_run_of_an_earlier_version_goes_on(begin, tmp_path):
    begin("--epochs", "3")
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    del saved["settings"]["recipe"]
    torch.save(saved, tmp_path / "last.pt")
    begin("--train::step::clip_norm", "1.0")


def test_a_part_whose_state_was_not_kept_cannot_begin_in_the_middle(tmp_path):
    state(tmp_path, {"learning_rate": 1}).save(Engine())
    again = state(tmp_path, {"learning_rate": 1})
    again.parts["ema"] = torch.nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match="without \\['ema'\\]"):
        again.resume(Engine())
