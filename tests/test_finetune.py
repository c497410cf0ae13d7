"""Whole fine-tuning runs through monai.bundle, in this process, from a tiny pretraining on the phantom pool."""

import csv
import json
import pickle
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, run_bundle
from tsfm.cases.folders import PoolError
from tsfm.training.checkpoint import read_state
from tsfm.training.weight_files import CheckpointError
from tsfm_tools.paper import commands as tables
from tsfm_tools.paper import grids as experiments
from tsfm_tools.phantoms import layouts as phantoms

pytestmark = pytest.mark.convolutions

BUNDLE = ROOT / "bundles/tsfm_finetune"
SHORT = {
    "epochs": 1,
    "iterations_per_epoch": 2,
    "val_iterations": 1,
    "step_seconds": 0.05,
    "num_workers": 0,
    "checkpointing": False,
    "device": "cpu",
}


def finetune(folder, pretrained, overlays=(), bundle=BUNDLE, **settings):
    """One short run that writes into `folder`; returns (tensors, description) of its weights."""
    options = {
        "output_dir": str(folder), "store_dir": str(folder / "store"), "ckpt_dir": str(folder / "published"),
        "pretrained": str(pretrained / "model.pt"), **SHORT, **settings,
    }  # fmt: skip
    experiments.run_bundle(bundle, ["train.json", *overlays], **options)
    return read_state(folder / "model.pt")


def evaluate(folder, overlays=(), **settings):
    """Segment and score the validation cases; returns the summary."""
    options = {
        "checkpoint": str(folder / "model.pt"),
        "output_dir": str(folder / "scores"),
        "progress": False,
        "device": "cpu",
    }
    experiments.run_bundle(BUNDLE, ["inference.json", "evaluate.json", *overlays], **{**options, **settings})
    return json.loads((folder / "scores/summary.json").read_text())


def curve(folder):
    return list(csv.DictReader((folder / "curve.csv").open()))


def write_case(
    folder, name, shape=(40, 40, 24), spacing=(8.0, 8.0, 9.0), labels=(1, 2), channels=1, label_dir="labels"
):
    """One case of two folders: a ball of each label in noise; `shape` and `spacing` along the array's own axes, RAS."""
    rng = np.random.default_rng(len(name))
    voxels = np.zeros(shape, np.uint8)
    grid = np.indices(shape)
    for number, value in enumerate(labels):
        center = np.array(shape)[:, None, None, None] * (0.35 + 0.3 * number)
        voxels[(((grid - center) / (np.array(shape)[:, None, None, None] * 0.15)) ** 2).sum(0) < 1] = value
    image = (rng.normal(-800, 60, (*shape, channels)) + 900.0 * (voxels > 0)[..., None]).astype(np.int16)
    affine = np.diag([*spacing, 1.0])
    for kind, array in (("images", image if channels > 1 else image[..., 0]), (label_dir, voxels)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, affine), folder / kind / f"{name}.nii.gz")


def two_folders(folder, cases=3, **how):
    for number in range(cases):
        write_case(folder, f"case{number}", **how)
    return {"dataset_dir": str(folder), "label_ids": {"1": "liver", "2": "liver_tumor"}}


# ---- the paper's downstream tasks, each in its own layout --------------------------------------------------------


@pytest.mark.parametrize(
    ("overlay", "write", "targets", "channels"),
    [
        ("brats2020.json", phantoms.write_brats2020, ["whole_tumor", "tumor_core", "enhancing_tumor"], 4),
        ("kits2019.json", phantoms.write_kits19, ["kidney", "kidney_tumor"], 1),
        ("abdomenct1k.json", phantoms.write_abdomenct1k, ["liver", "kidney", "spleen", "pancreas"], 1),
        ("own_data.json", two_folders, ["liver", "liver_tumor"], 1),
    ],
)
def test_a_downstream_task_trains_and_is_scored_in_its_own_layout(
    overlay, write, targets, channels, pretrained, tmp_path
):
    data = tmp_path / "data"
    write(Path(data), cases=3)
    settings = {"dataset_dir": str(data)} | ({"spacing_mm": [8.0, 8.0, 8.0]} if overlay == "brats2020.json" else {})
    _, description = finetune(tmp_path / "run", pretrained, [overlay], **settings)
    assert list(description["targets"]) == targets
    assert description["network"]["in_channels"] == channels
    report = json.loads((tmp_path / "run/transfer_report.json").read_text())
    assert report["totals"]["loaded"]["percent"] > 90 and report["targets"]["taken over"] == [
        name for name in targets if name in ("kidney", "liver", "spleen", "pancreas", "kidney_tumor", "liver_tumor")
    ]
    summary = evaluate(tmp_path / "run", [overlay], dataset_dir=str(data))
    (scored,) = summary["datasets"].values()
    assert list(scored) == targets and summary["failed"] == []
    assert (tmp_path / "run/scores/page.png").stat().st_size > 5000


def test_brats_regions_are_nested_and_the_excluded_case_stays_out(tmp_path):
    from tsfm.cases.pool import DatasetPool

    phantoms.write_brats2020(str(tmp_path), cases=1)
    assert (tmp_path / "BraTS20_Training_355").is_dir()
    pool = DatasetPool(json.loads((BUNDLE / "configs/brats2020.json").read_text())["pool_file"], tmp_path)
    assert [item["case"] for item in pool.cases] == ["BraTS20_Training_001"]
    rows = {raw: pool.table.targets[code].tolist() for code, (_, raw) in enumerate(pool.table.codes) if code < 4}
    assert rows == {0: [0, 0, 0], 1: [1, 1, 0], 2: [1, 0, 0], 4: [1, 1, 1]}


# ---- little data, odd grids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cases", "how", "settings"),
    [
        (1, {}, {"fold": "all"}),
        (2, {}, {"fold": "all"}),
        (2, {"labels": (1,)}, {"label_ids": {"1": "liver"}}),
        (2, {"shape": (9, 12, 11)}, {}),
        (2, {"shape": (64, 64, 8), "spacing": (0.3, 0.3, 6.0)}, {"spacing_mm": "auto"}),
        (2, {"shape": (64, 64, 8), "spacing": (0.3, 0.3, 6.0)}, {"spacing_mm": "checkpoint"}),
        (
            2,
            {"shape": (40, 40, 12), "spacing": (3.0, 3.0, 6.0)},
            {"spacing_mm": [6.0, 3.0, 3.0], "ct_normalization": "fingerprint"},
        ),
    ],
    ids=[
        "1-case",
        "fold-all",
        "one-class",
        "smaller-than-patch",
        "0.3x6mm-auto",
        "0.3x6mm-checkpoint",
        "6mm-slices",
    ],
)
def test_little_or_odd_data_trains_and_infers_without_special_treatment(cases, how, settings, pretrained, tmp_path):
    data = two_folders(tmp_path / "data", cases, **how) | settings
    _, description = finetune(tmp_path / "run", pretrained, **data)
    strides = np.prod(description["network"]["strides"], 0)
    assert not any(np.mod(description["patch_size"], strides))
    validated = bool(curve(tmp_path / "run")[0]["val_mean_dice"])
    assert validated == (cases > 1 and data.get("fold") != "all")
    image = tmp_path / "data/images/case0.nii.gz"
    experiments.run_bundle(
        BUNDLE, ["inference.json"], checkpoint=str(tmp_path / "run/model.pt"), dataset_dir=str(image),
        output_dir=str(tmp_path / "out"), progress=False, device="cpu",
    )  # fmt: skip
    assert nib.load(tmp_path / "out/case0.nii.gz").shape == nib.load(image).shape


def test_the_automatic_spacing_is_that_of_the_data(pretrained, tmp_path):
    data = two_folders(tmp_path / "data", 2, shape=(40, 40, 12), spacing=(2.5, 3.0, 6.0))
    _, description = finetune(tmp_path / "run", pretrained, spacing_mm="auto", **data)
    assert description["preparation"]["spacing_mm"] == pytest.approx([6.0, 3.0, 2.5])


def test_a_decathlon_folder_with_nnunets_reversed_labels_gives_the_targets(pretrained, tmp_path):
    for number in range(2):
        write_case(tmp_path / "data", f"case{number}", label_dir="labelsTr")
    (tmp_path / "data/images").rename(tmp_path / "data/imagesTr")
    declared = {
        "channel_names": {"0": "CT"}, "labels": {"background": 0, "Liver": 1, "Liver tumor": 2}, "file_ending": ".nii.gz",
        "training": [{"image": f"./imagesTr/case{n}.nii.gz", "label": f"./labelsTr/case{n}.nii.gz"} for n in range(2)],
    }  # fmt: skip
    (tmp_path / "data/dataset.json").write_text(json.dumps(declared))
    _, description = finetune(tmp_path / "run", pretrained, dataset_dir=str(tmp_path / "data"))
    assert list(description["targets"]) == ["liver", "liver_tumor"] and description["modalities"] == ["CT"]


# ---- items handed in from outside ----------------------------------------------------------------------------------


@pytest.mark.parametrize("with_validation", [False, True])
def test_bare_items_train_the_weights_that_the_bundle_ships(with_validation, pretrained, tmp_path):
    """As MONAI Label does: nothing but a datalist, whose label maps hold the values of channel_def."""
    bundle = tmp_path / "bundle"
    shutil.copytree(BUNDLE, bundle, ignore=shutil.ignore_patterns("models", "store", "output"))
    (bundle / "models").mkdir()
    shutil.copy(pretrained / "model.pt", bundle / "models/model.pt")
    for number in range(3):
        write_case(tmp_path / "studies", f"case{number}", labels=(7, 25))
    items = [{key: str(tmp_path / f"studies/{key}s/case{n}.nii.gz") for key in ("image", "label")} for n in range(3)]
    settings = {
        **{key: SHORT[key] for key in ("num_workers", "checkpointing", "device", "iterations_per_epoch", "val_iterations")},
        "train#trainer#max_epochs": 1, "train#dataset#data": items[:2], "validate#dataset#data": items[2:] if with_validation else [],
    }  # fmt: skip
    weights = bundle / "models/model.pt"
    loader = {
        "_target_": "CheckpointLoader",
        "load_path": str(weights),
        "load_dict": {"model": "$@network"},
        "strict": False,
    }
    handlers = json.loads((bundle / "configs/train.json").read_text())["train"]["handlers"]
    settings["train#handlers"] = [loader, *handlers]
    known = read_state(weights)[1]
    for _ in range(2):  # a second request is a run of its own, not the resumption of the first
        before = weights.read_bytes()
        experiments.run_bundle(bundle, ["train.json"], **settings)
        assert weights.read_bytes() != before
    found = read_state(weights)[1]
    assert found["trained_on"] == sorted({"label_map", *known["trained_on"]}) and len(found["targets"]) == 31
    assert set(found["trained_targets"]) == {
        *known["trained_targets"],
        *(list(found["targets"])[value - 1] for value in (7, 25)),
    }
    assert set(found["modalities"]) >= set(known["modalities"]) and found["dataset_labels"] == known["dataset_labels"]
    assert bool(curve(bundle / "output")[0]["val_mean_dice"]) == with_validation
    assert (bundle / "models/model_previous.pt").is_file()


# ---- channels, spacing, weights ---------------------------------------------------------------------------------------


def test_a_stem_for_four_channels_keeps_the_sum_of_activations(pretrained, tmp_path):
    data = two_folders(tmp_path / "data", 2, channels=4)
    weights, description = finetune(tmp_path / "run", pretrained, modality="MR", learning_rate=1e-12, **data)
    assert description["network"]["in_channels"] == 4
    theirs = read_state(pretrained / "model.pt")[0]["stem.weight"]
    torch.testing.assert_close(weights["stem.weight"].sum(1, keepdim=True), theirs, rtol=1e-4, atol=1e-6)


def test_from_scratch_takes_the_architecture_and_no_weight(pretrained, tmp_path):
    data = two_folders(tmp_path / "data", 2)
    weights, description = finetune(tmp_path / "run", pretrained, from_scratch=True, learning_rate=1e-12, **data)
    theirs, was = read_state(pretrained / "model.pt")
    assert description["network"]["features"] == was["network"]["features"]
    assert not torch.allclose(weights["stem.weight"], theirs["stem.weight"], atol=1e-3)
    assert not (tmp_path / "run/transfer_report.json").exists()


def test_a_start_from_nothing_needs_no_file_and_says_so(tmp_path, capsys):
    data = two_folders(tmp_path / "data", 2)
    options = {
        "output_dir": str(tmp_path / "run"),
        "store_dir": str(tmp_path / "store"),
        "ckpt_dir": str(tmp_path / "no"),
    }
    experiments.run_bundle(
        BUNDLE, ["train.json", "small.json"], **options, **data, **SHORT | {"iterations_per_epoch": 9}
    )
    output = capsys.readouterr().out
    assert (
        "starts from nothing" in output
        and "plan for 0.05 s a step" in output
        and re.search(r"\d (h|min|s) for 1 step \(", output)
    )
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    _, description = read_state(tmp_path / "run/model.pt")
    assert plan["patch_size"] == description["patch_size"] and plan["hours"] >= 0 and plan["network"] == "tsfm_s"
    experiments.run_bundle(
        BUNDLE, ["train.json", "small.json"], plan=str(tmp_path / "run/plan.json"), from_scratch=True, **data,
        **options | {"output_dir": str(tmp_path / "again")}, **SHORT | {"iterations_per_epoch": 1},
    )  # fmt: skip
    assert read_state(tmp_path / "again/model.pt")[1]["patch_size"] == plan["patch_size"]


@pytest.mark.parametrize(("freeze", "moves"), [("encoder", {"decoder", "heads"}), ("all_but_heads", {"heads"})])
def test_frozen_parts_do_not_move(freeze, moves, pretrained, tmp_path):
    from tsfm.planning.parts import part_of

    data = two_folders(tmp_path / "data", 2)
    weights, _ = finetune(
        tmp_path / "run", pretrained, freeze=freeze, learning_rate=0.1, patch_size=[16, 32, 32], **data
    )
    theirs = read_state(pretrained / "model.pt")[0]
    moved = {part_of(key) for key, value in weights.items() if key in theirs and not key.startswith("heads.")
             and not torch.equal(value, theirs[key])}  # fmt: skip
    assert moved == moves - {"heads"}


def test_warm_up_and_learning_rates_per_group(pretrained, tmp_path):
    data = two_folders(tmp_path / "data", 2)
    settings = {
        "epochs": 3,
        "warmup_epochs": 2,
        "head_learning_rate": 0.02,
        "encoder_learning_rate": 0.001,
        "learning_rate": 0.01,
    }
    finetune(tmp_path / "run", pretrained, **settings, **data)
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    groups = state["parts"]["optimizer"]["param_groups"]
    assert {group["name"]: group["initial_lr"] for group in groups} == {
        "encoder": 0.001,
        "decoder": 0.01,
        "heads": 0.02,
    }
    rates = [float(row["lr"]) for row in curve(tmp_path / "run")]
    assert rates == pytest.approx([0.001 / 3, 0.002 / 3, 0.001])  # the first group's: the encoder


def test_a_run_goes_on_where_it_stopped_and_refuses_other_settings(pretrained, tmp_path, capsys):
    data = two_folders(tmp_path / "data", 2)
    finetune(tmp_path / "whole", pretrained, epochs=2, **data)
    first = {"epochs": 2, "train#trainer#max_epochs": 2}
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        interrupted(stopped, pretrained, first, data)
    assert torch.load(stopped / "last.pt", weights_only=True)["epoch"] == 1
    finetune(stopped, pretrained, **first, **data)
    assert "resuming after epoch 1 of 2" in capsys.readouterr().out
    one, two = (torch.load(folder / "last.pt", weights_only=True)["model"] for folder in (tmp_path / "whole", stopped))
    assert [key for key in one if not torch.equal(one[key], two[key])] == []
    with pytest.raises(Exception, match="freeze: was none, is encoder"):
        finetune(stopped, pretrained, freeze="encoder", **first, **data)
    with pytest.raises(Exception, match="preparation: was"):
        finetune(stopped, pretrained, spacing_mm=[10.0, 8.0, 8.0], **first, **data)


def interrupted(folder, pretrained, settings, data):
    from tsfm.training.run_state import RunState

    def save_and_stop(self, engine, save=RunState.save):
        save(self, engine)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunState, "save", save_and_stop)
        finetune(folder, pretrained, **settings, **data)


# ---- what cannot work is said before anything long -----------------------------------------------------------------


def test_labels_of_which_there_is_no_voxel_stop_the_run(tmp_path, pretrained):
    with pytest.raises(PoolError, match=r"none has a voxel of the labels 1 \(liver\), 2 \(liver_tumor\)"):
        finetune(tmp_path / "run", pretrained, **two_folders(tmp_path / "data", 2, labels=()))


def test_missing_weights_are_named_with_what_to_do(tmp_path):
    data = two_folders(tmp_path / "data", 2)
    options = SHORT | {
        "output_dir": tmp_path / "run",
        "store_dir": tmp_path / "store",
        "pretrained": tmp_path / "none.pt",
    }
    output = run_bundle("tsfm_finetune", ["train.json"], expect=1, **options, **data)
    last = output.strip().splitlines()[-8:]
    assert any("none.pt" in line and "--pretrained" in line for line in last), last
    assert "fingerprint:" not in output and not (tmp_path / "store").exists()


def test_weights_that_do_not_fit_the_bundle_stop_it_before_training(pretrained, tmp_path):
    """The label maps of another task: the evaluation of the pool's weights as if they were for two targets."""
    data = two_folders(tmp_path / "data", 2)
    with pytest.raises(Exception, match="trained for the targets"):
        experiments.run_bundle(
            BUNDLE, ["inference.json", "evaluate.json"], checkpoint=str(pretrained / "model.pt"),
            output_dir=str(tmp_path / "scores"), progress=False, device="cpu", **data,
        )  # fmt: skip
    state = torch.load(pretrained / "model.pt", weights_only=True)
    del state[
        "encoder.0.0.conv1.weight"
        if "encoder.0.0.conv1.weight" in state
        else next(k for k in state if k.startswith("encoder."))
    ]
    (tmp_path / "wrong").mkdir()
    torch.save(state, tmp_path / "wrong/model.pt")
    with pytest.raises(Exception, match="does not fit the network"):
        finetune(tmp_path / "run", tmp_path / "wrong", **data)
    assert not (tmp_path / "run/last.pt").exists()


def test_weights_without_a_description_are_refused_with_a_way_out(tmp_path):
    data = two_folders(tmp_path / "data", 1)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="carry no description"):
        finetune(tmp_path / "run", tmp_path, **data)


class Evil:
    def __reduce__(self):
        return print, ("code in a pickle was executed",)


def test_a_pickle_with_code_is_refused(tmp_path, capsys):
    data = two_folders(tmp_path / "data", 1)
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"model": Evil()}))
    with pytest.raises(CheckpointError, match="is refused"):
        finetune(tmp_path / "run", tmp_path, **data)
    torch.save({"model": Evil()}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="is refused"):
        finetune(tmp_path / "run", tmp_path, **data)
    assert "was executed" not in capsys.readouterr().out


def test_folders_that_hold_nothing_known_and_labels_that_are_not_named(pretrained, tmp_path):
    two_folders(tmp_path / "data", 1)
    with pytest.raises(PoolError, match="--label_ids"):
        finetune(tmp_path / "run", pretrained, dataset_dir=str(tmp_path / "data"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(PoolError, match=r"empty holds no data set: neither dataset\.json"):
        finetune(tmp_path / "run", pretrained, dataset_dir=str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("label id", "holds the ids"),
        ("label grid", "different grids"),
        ("fractions", "no whole number"),
        ("truncated", "ends too early|cut short"),
        ("nan", "NaN"),
    ],
)
def test_a_case_that_cannot_be_used_is_named_before_training(damage, message, pretrained, tmp_path):
    data = two_folders(tmp_path / "data", 2)
    image, label = (tmp_path / f"data/{kind}/case1.nii.gz" for kind in ("images", "labels"))
    found = nib.load(label)
    voxels = np.asarray(found.dataobj)
    if damage == "label id":
        nib.save(nib.Nifti1Image(voxels + np.uint8(5), found.affine), label)
    elif damage == "label grid":
        nib.save(nib.Nifti1Image(voxels[:-1], found.affine), label)
    elif damage == "fractions":
        nib.save(nib.Nifti1Image(voxels * np.float32(0.5), found.affine), label)
    elif damage == "truncated":
        image.write_bytes(image.read_bytes()[:4000])
    else:
        intensities = nib.load(image).get_fdata(dtype=np.float32)
        intensities[3, 3, 3] = np.nan
        nib.save(nib.Nifti1Image(intensities, found.affine), image)
    with pytest.raises(Exception, match=message) as caught:
        finetune(tmp_path / "run", pretrained, **data)
    assert "case1.nii.gz" in str(caught.value)
    assert not (tmp_path / "run/last.pt").exists()


# ---- the paper's Table 2 on one data set -------------------------------------------------------------------------------

GRID = SHORT | {"val_interval": 1}


@pytest.fixture(scope="module")
def kits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kits19")
    phantoms.write_kits19(str(folder), cases=3)
    return folder


def test_the_transfer_grid_resumes_and_writes_the_table(kits, pretrained, tmp_path, monkeypatch):
    grid = {"epochs": (1, 2), "overlays": ["kits2019.json"], "name": "KiTS19", "bundle_dir": str(BUNDLE)}
    settings = {key: value for key, value in GRID.items() if key != "epochs"}
    runs = []

    def counted(bundle, configs, run=experiments.run_bundle, **options):
        runs.append((configs[0], Path(options["output_dir"]).name))
        if len(runs) == 4:
            raise KeyboardInterrupt
        run(bundle, configs, **options)

    monkeypatch.setattr(experiments, "run_bundle", counted)
    arguments = (str(pretrained / "model.pt"), str(kits), str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        tables.transfer_table(*arguments, **grid, **settings)
    assert (tmp_path / "table2.md").is_file(), "the table is there from the first cell on"
    table = tables.transfer_table(*arguments, **grid, **settings)
    trained = [name for config, name in runs if config == "train.json"]
    assert trained.count("pretrained-1epochs-seed0") == 1, "a cell that is done is not trained again"
    lines = table.splitlines()[2:]
    assert lines[0] == "| KiTS19 | 1 epochs | 2 epochs |"
    assert lines[2].startswith("| TSFM, pretrained |") and lines[3].startswith("| TSFM, from scratch |")
    rows = list(csv.DictReader((tmp_path / "table2.csv").open()))
    assert [(row["row"], row["epochs"], row["seed"]) for row in rows if row["target"] == "kidney"] == [
        ("pretrained", "1", "0"), ("scratch", "1", "0"), ("pretrained", "2", "0"), ("scratch", "2", "0"),
    ]  # fmt: skip
    assert (tmp_path / "table2.png").stat().st_size > 5000
    count = len(runs)
    assert tables.transfer_table(*arguments, **grid, **settings) == table and len(runs) == count
    with pytest.raises(CheckpointError, match="other settings"):
        tables.transfer_table(*arguments, **grid, **settings | {"iterations_per_epoch": 1})
    overlay = json.loads((BUNDLE / "configs/kits2019.json").read_text())
    edited = experiments.said_by([str(BUNDLE / "configs/kits2019.json")]) | {"clip": 3}
    assert edited.keys() - overlay.keys() == {"clip"} and "_desc_" not in edited
    monkeypatch.setattr(experiments, "said_by", lambda configs: edited)
    with pytest.raises(CheckpointError, match=r"other settings \(clip: was None, is 3\)"):
        tables.transfer_table(*arguments, **grid, **settings)
