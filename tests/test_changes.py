"""The overlays of docs/changes.md, taken from the page: whole runs with all of them, in both bundles."""

import csv
import json
import re

import pytest
import torch
from conftest import ROOT, pretrain_options, run_bundle
from tsfm.network.monai_nets import NETS
from tsfm.training.checkpoint import read_description, read_state

pytestmark = pytest.mark.convolutions

PAGE = (ROOT / "docs/changes.md").read_text(encoding="utf-8")


def overlays(folder, bundle):
    paths = []
    for number, block in enumerate(re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)):
        if bundle == "tsfm_pretrain":  # as the page says
            block = block.replace("handlers#6#parts", "handlers#5#parts")
        paths.append(folder / f"{number}.json")
        paths[-1].write_text(block)
    return [str(path) for path in paths]


def test_a_pretraining_takes_all_overlays_of_the_page(phantom_pool, tiny, tmp_path):
    files = ["train.json", tiny, *overlays(tmp_path, "tsfm_pretrain")]
    run_bundle("tsfm_pretrain", files, **pretrain_options(phantom_pool, tmp_path, epochs=1))
    assert read_description(tmp_path / "ema.pt")["network"]["net"] == "SegResNet"


def test_a_fine_tuning_takes_all_overlays_of_the_page_and_goes_on_with_them(phantom_pool, tmp_path):
    options = {
        "dataset_dir": phantom_pool / "Task03_Liver", "output_dir": tmp_path / "run", "ckpt_dir": "none", "device": "cpu",
        "store_dir": tmp_path / "store", "num_workers": 0, "iterations_per_epoch": 3, "val_iterations": 2, "step_seconds": 0.02,
    }  # fmt: skip
    averages = []
    for epochs in (1, 2):
        run_bundle("tsfm_finetune", ["train.json", *overlays(tmp_path, "tsfm_finetune")], **options, epochs=epochs)
        averages.append({key: value.clone() for key, value in read_state(tmp_path / "run/ema.pt")[0].items()})
    settings = json.loads((tmp_path / "run/run.json").read_text())["settings"]
    assert settings["loss"] == "DiceCELoss" and settings["mirror_axes"] == ""
    rates = [float(row["lr"]) for row in csv.DictReader((tmp_path / "run/curve.csv").open())]
    assert rates == pytest.approx([3e-4, 1.5e-4])
    network = read_description(tmp_path / "run/ema.pt")["network"]
    assert network["name"] == "monai" and network["net"] == "SegResNet"
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert state["epoch"] == 2 and all(torch.equal(state["parts"]["ema"][key], averages[1][key]) for key in averages[1])
    moved = [key for key in averages[0] if not torch.equal(averages[0][key], averages[1][key])]
    near = [key for key in moved if (averages[0][key] - averages[1][key]).abs().max() < 0.01]
    assert moved and near == moved, "the average of before, not another beginning"


def test_the_page_lists_the_networks_of_monai():
    for name in NETS:
        assert name in PAGE
