"""Whole runs on a device whose tensors nothing may mix with the processor's (strict.cpp): make test-device."""

import copy
import csv
import json
import os

import blosc2
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, pretrain_options
from strict_device import compiler, strict_device
from tsfm.network.networks import create_network
from tsfm.training.checkpoint import read_description
from tsfm_tools.paper.grids import run_bundle

pytestmark = [
    pytest.mark.convolutions,
    pytest.mark.skipif(os.environ.get("TSFM_DEVICE") != "1", reason="builds a device: make test-device"),
    pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler to build the device with"),
]

DEEPER = {
    "network_def#features": [8, 16, 24, 32],
    "network_def#depths_down": [1, 1, 1, 1],
    "network_def#depths_up": [1, 1, 1],
    "network_def#strides": [[2, 2, 2], [2, 2, 2], [1, 2, 2]],
}
"""One level more than tiny runs have, so that the loss brings codes to another grid."""

PRETRAIN, FINETUNE = ROOT / "bundles/tsfm_pretrain", ROOT / "bundles/tsfm_finetune"
ON_CPU = {"device": "cpu", "amp": False}
ON_DEVICE = {"device": "strict:0", "amp": False}
AS_ON_GPU = {**ON_DEVICE, "optimizer#fused": True, "train#dataloader#pin_memory": True}


@pytest.fixture(scope="module", autouse=True)
def device():
    return strict_device()


def test_the_device_refuses_what_a_gpu_refuses(device):
    tensor, other, number = torch.ones(2, 3, device=device), torch.ones(2, 3), torch.zeros(())
    mixed = [
        lambda: tensor + other, lambda: other + tensor, lambda: torch.cat([tensor, other]), lambda: other @ tensor.T,
        lambda: torch.where(other > 0, tensor, tensor), lambda: torch.nn.functional.conv1d(tensor[None], other[None]),
        lambda: number.add_(tensor.sum()), lambda: other[tensor.long()],
    ]  # fmt: skip
    for mix in mixed:
        with pytest.raises(RuntimeError, match=r"same device|different from other tensors|either on"):
            mix()
    with pytest.raises(TypeError, match=r"can't convert strict.*numpy"):
        tensor.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        tensor.normal_(generator=torch.Generator())
    assert (tensor * 2 + number).sum().item() == 12


@pytest.mark.parametrize("skip", ["add", "concat"])
def test_a_network_has_the_processors_gradients(device, skip):
    torch.manual_seed(0)
    shape = {
        key.removeprefix("network_def#"): value for key, value in {**TINY, **DEEPER}.items() if "network_def#" in key
    }
    network = create_network(in_channels=1, out_channels=3, img_size=TINY["patch_size"], skip=skip, **shape)
    image, found = torch.randn(2, 1, *TINY["patch_size"]), []
    for place in ("cpu", device):
        placed = copy.deepcopy(network).to(place)
        sum(level.square().mean() for level in placed(image.to(place))).backward()
        found.append({name: p.grad.cpu() for name, p in placed.named_parameters() if p.grad is not None})
    assert len(found[0]) > 50
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).norm() <= 0.01 * gradient.norm(), name


def curve(folder):
    return list(csv.DictReader((folder / "curve.csv").open()))


@pytest.fixture(scope="module")
def trained(phantom_pool, tiny, tmp_path_factory):
    """Folders of two runs, on the processor and on the device, of one epoch that a second command took to two."""
    folders = []
    for settings in (ON_CPU, AS_ON_GPU):
        folders.append(tmp_path_factory.mktemp("trained"))
        options = {
            **pretrain_options(str(phantom_pool), str(folders[-1])),
            **settings,
            **DEEPER,
            "lr_scheduler#epochs": 2,
        }
        options = {key: str(value) if key.endswith("_dir") else value for key, value in options.items()}
        for epochs in (1, 2):
            run_bundle(PRETRAIN, ["train.json", tiny], epochs=epochs, **options)
    return folders


def test_training_validation_checkpoint_and_resume_give_the_processors_numbers(trained):
    on_cpu, on_device = (curve(folder) for folder in trained)
    assert [row["epoch"] for row in on_device] == ["1", "2"]
    for expected, row in zip(on_cpu, on_device, strict=True):
        assert float(row["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-3)
        assert float(row["val_mean_dice"]) == pytest.approx(float(expected["val_mean_dice"]), abs=1e-3)
    weights = torch.load(trained[1] / "model.pt", weights_only=True)
    assert {tensor.device.type for tensor in weights.values()} == {"cpu"}


@pytest.fixture(scope="module", params=[[], ["clicks.json"]], ids=["automatic", "with clicks"])
def transferred(request, trained, phantom_pool, tmp_path_factory):
    """Folder of a run that took the weights over, with recomputed activations."""
    folder = tmp_path_factory.mktemp("transferred")
    run_bundle(
        FINETUNE, ["train.json", *request.param], **AS_ON_GPU, pretrained=str(trained[1] / "model.pt"),
        dataset_dir=str(phantom_pool / "Task03_Liver"), output_dir=str(folder), store_dir=str(folder / "store"),
        ckpt_dir="none", epochs=1, iterations_per_epoch=2, val_iterations=1, num_workers=0, checkpointing=True,
        step_seconds=0.05,
    )  # fmt: skip
    return folder


def infer_on_both(checkpoint, image, folder, **more):
    """Label maps and probabilities (T, X, Y, Z) of one image: on the processor and on the device."""
    maps, probabilities = [], []
    for name, settings in (("cpu", ON_CPU), ("device", ON_DEVICE)):
        run_bundle(
            PRETRAIN, ["inference.json"], **settings, **more, checkpoint=checkpoint, output_dir=str(folder / name),
            dataset_dir=[{"image": str(image), "case": "a"}], save=["label_map", "probabilities"], progress=False,
        )  # fmt: skip
        maps.append(np.asarray(nib.load(folder / name / "a.nii.gz").dataobj))
        probabilities.append(blosc2.open(str(folder / name / "a_probabilities.b2nd"))[:])
    return maps, probabilities


def test_transfer_takes_the_weights_over_and_its_network_infers_and_takes_clicks(transferred, phantom_pool, tmp_path):
    assert json.loads((transferred / "transfer_report.json").read_text())
    assert np.isfinite(float(curve(transferred)[0]["loss"]))
    image = phantom_pool / "Task03_Liver/imagesTr/liver_0.nii.gz"
    clicks = {"a": {"liver": [[20, 20, 12]], "background": [[2, 2, 2]]}}
    asked = {"clicks": clicks} if "click_sigma" in read_description(transferred / "model.pt") else {}
    maps, probabilities = infer_on_both(str(transferred / "model.pt"), image, tmp_path, **asked)
    np.testing.assert_allclose(*probabilities, atol=2e-3)
    assert (maps[0] != maps[1]).mean() < 1e-3


def test_two_folds_with_mirroring_paint_the_processors_label_map(trained, phantom_pool, tmp_path):
    image = phantom_pool / "Task03_Liver/imagesTr/liver_0.nii.gz"
    folds = [str(folder / "model.pt") for folder in trained]
    maps, probabilities = infer_on_both(folds, image, tmp_path, mirror=True)
    np.testing.assert_allclose(*probabilities, atol=2e-3)
    assert maps[0].any() and (maps[0] != maps[1]).mean() < 1e-3
