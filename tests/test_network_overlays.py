"""The baselines' overlays: the same file for both bundles, with every other overlay, and one whole run."""

from __future__ import annotations

import pytest
import torch
from conftest import ROOT, rates_of, run_bundle
from monai.bundle import ConfigParser
from tsfm.errors import first_cause
from tsfm.network.networks import create_network
from tsfm.planning.forecast import Forecast
from tsfm.planning.planner import plan_patch
from tsfm.planning.public_weights import read_pretrained
from tsfm.training.checkpoint import read_description

OVERLAYS = {"nnunet": "nnunet", "nnunet_resenc": "nnunet", "swinunetr": "swinunetr", "stunet": "stunet"}


def parsed(bundle, files, phantom_pool, folder, **settings):
    parser = ConfigParser()
    parser.read_config([str(ROOT / "bundles" / bundle / "configs" / name) for name in files])
    dataset = {"dataset_dir": str(phantom_pool), "allow_missing": True}
    if bundle == "tsfm_finetune":
        dataset = {"dataset_dir": str(phantom_pool / "Task03_Liver"), "pretrained": None}
    for key, value in {
        "bundle_root": str(ROOT / "bundles" / bundle), "store_dir": str(folder / "store"), "output_dir": str(folder / "out"),
        "device": "cpu", "num_workers": 0, **dataset, **settings,
    }.items():  # fmt: skip
        parser[key] = value
    return parser


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("bundle", ["tsfm_pretrain", "tsfm_finetune"])
def test_every_overlay_declares_its_network_and_recipe_in_both_bundles(bundle, overlay, phantom_pool, tmp_path):
    name = OVERLAYS[overlay]
    pytest.importorskip({"nnunet": "dynamic_network_architectures", "stunet": "medim"}.get(name, "monai"))
    narrow = {"patch_size": [32, 64, 64]}
    parser = parsed(
        bundle, ["train.json", f"{overlay}.json"], phantom_pool, tmp_path, epochs=200, device="meta", **narrow
    )
    with torch.device("meta"):
        network = parser.get_parsed_content("network_def")
    assert network.description["network"]["name"] == name
    if overlay == "nnunet_resenc":
        assert network.description["network"]["residual"]
    network.check_size(parser.get_parsed_content("planned").patch_size)
    optimizer, schedule = (parser.get_parsed_content(key) for key in ("optimizer", "lr_scheduler"))
    rates = rates_of(optimizer, schedule, 200)
    best = {"nnunet": 1e-2, "nnunet_resenc": 1e-2, "swinunetr": 1e-4, "stunet": 1e-3}[overlay]
    assert max(rates) == pytest.approx(best) and rates[-1] < 0.02 * best
    warmed = overlay == "swinunetr"
    assert isinstance(optimizer, torch.optim.AdamW if warmed else torch.optim.SGD) and (rates[0] < best) == warmed
    assert rates[:3] == pytest.approx([best / 3, 2 * best / 3, best]) or not warmed, "no epoch learns nothing"


@pytest.mark.parametrize("bundle", ["tsfm_pretrain", "tsfm_finetune"])
@pytest.mark.parametrize("overlay", [[], ["swinunetr.json"]])
def test_a_warm_up_that_is_asked_for_is_taken_by_every_schedule(overlay, bundle, phantom_pool, tmp_path):
    for warmup, expected in ((4, [0.2, 0.4, 0.6, 0.8, 1.0]), (0, [1.0])):
        parser = parsed(bundle, ["train.json", *overlay], phantom_pool, tmp_path, epochs=50, warmup_epochs=warmup)
        parser["optimizer"] = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
        optimizer, schedule = (parser.get_parsed_content(key) for key in ("optimizer", "lr_scheduler"))
        rates = rates_of(optimizer, schedule, 7)
        assert rates[: len(expected)] == pytest.approx(expected) and rates[6] < rates[5] < 1


def test_a_network_size_alone_names_the_pretrainings_network_and_what_replaces_it_is_said(
    phantom_pool, tmp_path, caplog
):
    for overlays, features in (([], [8, 16, 32, 64, 80, 80]), (["small.json"], [16, 32, 64, 128])):
        parser = parsed("tsfm_pretrain", ["train.json", *overlays], phantom_pool, tmp_path, network_size="tsfm_s")
        caplog.clear()
        with torch.device("meta"):
            network = parser.get_parsed_content("network_def")
        assert network.description["network"]["features"] == features
        assert ("network: depths_down, depths_up, features" in caplog.text) == bool(overlays)


def test_what_the_plan_has_too_replaces_nothing_and_is_not_warned_of(caplog):
    found = plan_patch((16, 32, 32), (3.0, 2.0, 2.0), "tsfm_s", out_channels=2)
    with torch.device("meta"):
        create_network(out_channels=2, img_size=(16, 32, 32), strides=tuple(map(tuple, found.strides)), plan=found)
    assert not caplog.records


@pytest.mark.parametrize(
    ("overlay", "settings", "said"),
    [
        ("swinunetr.json", {"memory_gb": 24, "step_seconds": 2}, "--memory_gb 24 and --step_seconds 2: without effect"),
        ("swinunetr.json", {}, ""),
        ("tsfm_s.json", {"memory_gb": 24, "patch_size": [16, 32, 32]}, ""),
        ("tsfm_s.json", {"memory_gb": 24, "patch_size": [16, 32, 32], "batch_size": 2}, "patch and batch are given"),
    ],
)
def test_a_budget_that_nothing_looks_at_is_named(overlay, settings, said, phantom_pool, tmp_path, caplog):
    parser = parsed("tsfm_finetune", ["train.json", overlay], phantom_pool, tmp_path, **settings)
    parser.get_parsed_content("planned")
    assert (said in caplog.text) if said else "without effect" not in caplog.text


def test_the_plan_names_the_network_that_network_def_puts_in_its_place(phantom_pool, tmp_path, caplog):
    caplog.set_level("INFO")
    files, monai = ["train.json", "tsfm_s.json"], {"network_def#name": "monai", "network_def#net": "SegResNet"}
    found = parsed("tsfm_finetune", files, phantom_pool, tmp_path, patch_size=[16, 32, 32], **monai)
    found = found.get_parsed_content("planned")
    assert (found.network, found.patch_size, found.parameters) == ("monai", (16, 32, 32), 0)
    assert "  network   monai; starts from nothing" in caplog.text and "tsfm_s" not in caplog.text
    Forecast(str(tmp_path), found).save()
    back = {"plan": str(tmp_path / "plan.json")}
    assert (
        parsed("tsfm_finetune", files[:1], phantom_pool, tmp_path, **back, **monai).get_parsed_content("planned")
        == found
    )
    with pytest.raises(RuntimeError) as refused:
        parsed("tsfm_finetune", files[:1], phantom_pool, tmp_path, **back).get_parsed_content("planned")
    assert "network_def#name ('monai')" in str(first_cause(refused.value))


@pytest.mark.parametrize("order", [["small.json", "stunet.json"], ["stunet.json", "small.json"]])
def test_overlays_combine_with_the_laptops_in_any_order(order, phantom_pool, tmp_path):
    pytest.importorskip("medim")
    for bundle in ("tsfm_pretrain", "tsfm_finetune"):
        parser = parsed(bundle, ["train.json", *order], phantom_pool, tmp_path)
        network = parser.get_parsed_content("network_def")
        assert network.description["network"]["name"] == "stunet"
        assert "hidden_size" not in network.description["network"]


def test_a_patch_that_swinunetr_does_not_divide_is_refused_with_what_fits(phantom_pool, tmp_path):
    parser = parsed(
        "tsfm_finetune", ["train.json", "swinunetr.json"], phantom_pool, tmp_path, patch_size=[112, 160, 192]
    )
    with pytest.raises(RuntimeError) as refused:
        parser.get_parsed_content("planned")
    assert "128x160x192 would fit" in str(first_cause(refused.value))


def test_nnunet_trains_resumes_and_segments_like_tsfm(phantom_pool, tmp_path):
    pytest.importorskip("dynamic_network_architectures")
    options = {
        "dataset_dir": phantom_pool / "Task03_Liver", "store_dir": tmp_path / "store", "output_dir": tmp_path / "out",
        "ckpt_dir": tmp_path / "models", "iterations_per_epoch": 2, "val_iterations": 1, "device": "cpu", "num_workers": 0,
        "patch_size": "[16,32,32]", "spacing_mm": "[8.0,8.0,8.0]", "network_def#features": "[4,8,8,8]", "batch_size": 2,
    }  # fmt: skip
    files = ["train.json", "nnunet.json"]
    run_bundle("tsfm_finetune", files, **options, epochs=1)
    first = read_description(tmp_path / "out/model.pt")
    assert first["network"]["name"] == "nnunet"
    run_bundle("tsfm_finetune", files, **options, epochs=2)
    assert len((tmp_path / "out/curve.csv").read_text().splitlines()) == 3, "the second run goes on after the first"
    weights = tmp_path / "models/model.pt"
    run_bundle(
        "tsfm_finetune", ["inference.json"], dataset_dir=phantom_pool / "Task03_Liver/imagesTr", checkpoint=weights,
        output_dir=tmp_path / "maps", device="cpu",
    )  # fmt: skip
    assert list((tmp_path / "maps").glob("*.nii.gz"))
    assert read_pretrained(weights).description["network"]["name"] == "nnunet"
