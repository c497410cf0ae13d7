"""Public weights of other projects as pretrained weights: every tensor accounted for, heads by the names of targets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tsfm.planning.public_weights import STUNET_TARGETS, read_pretrained
from tsfm.planning.transfer import load_pretrained
from tsfm.training.checkpoint import build_network, load_weights, read_description
from tsfm.training.weight_files import CheckpointError
from tsfm_tools.release.import_stunet import import_stunet

SWIN = 12
SIZE = [32, 32, 64]


def randomized(network):
    for value in network.state_dict().values():
        if value.is_floating_point():
            torch.nn.init.normal_(value, 0.1, 0.3)
    return network.eval()


def taken_over(path, targets, **options):
    """A network built as the file describes it, for these targets, filled from the file; and the report."""
    network = build_network(read_pretrained(path).description, out_channels=len(targets), **options)
    network.description["targets"] = {name: {} for name in targets}
    return network.eval(), load_pretrained(network, path, report_path=f"{path}.report.json")


@pytest.fixture(params=[1, 2], ids=["one block", "two blocks"])
def stunet(request, tmp_path):
    """A fold of STU-Net as its authors publish it, and the network that wrote it."""
    package = pytest.importorskip("medim.models.stu_net", reason="pip install --no-deps, see requirements-dev.txt")
    network = randomized(
        package.STUNet(1, 105, [request.param] * 6, [2, 4, 4, 4, 4, 4], package.DEFAULT_STRIDES, [[3, 3, 3]] * 6)
    )
    path = str(tmp_path / "small_ep4k.model")
    log = ([np.float64(0.5)], [np.float32(0.5)])
    torch.save(
        {"epoch": 4000, "state_dict": network.state_dict(), "plot_stuff": log, "optimizer_state_dict": None}, path
    )
    return network, path


def test_stunet_heads_come_over_by_the_alphabetical_names(stunet):
    theirs, path = stunet
    ours, report = taken_over(path, ["liver", "new", "bladder"])
    assert report.targets["taken over"] == ["liver", "bladder"] and report.targets["new"] == ["new"]
    assert not report.unused and {entry.how for entry in report.entries} == {"loaded", "adapted"}
    assert sum(entry.reused + entry.new for entry in report.entries) == sum(p.numel() for p in ours.parameters())
    x = torch.randn(1, 1, 32, 32, 64)
    with torch.no_grad():
        found, expected = ours(x), theirs(x)
    for target, row in (("liver", 40), ("bladder", 80)):  # class 40 and 80, relative to the background
        index = ["liver", "new", "bladder"].index(target)
        torch.testing.assert_close(found[:, index], expected[:, row] - expected[:, 0], atol=1e-3, rtol=1e-3)


def test_several_channels_are_inflated_and_the_report_says_so(stunet):
    theirs, path = stunet
    ours, report = taken_over(path, ["liver"], in_channels=2)
    notes = [entry.note for entry in report.entries if "channels" in entry.note]
    assert notes == ["1 to 2 input channels"] * 2  # conv1 and conv3 of the first block
    x = torch.randn(1, 1, 32, 32, 64)
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(
            ours(x.repeat(1, 2, 1, 1, 1))[:, 0], expected[:, 40] - expected[:, 0], atol=1e-3, rtol=1e-3
        )


def test_stunet_knows_104_classes_in_order():
    assert len(STUNET_TARGETS) == 104 and list(STUNET_TARGETS[37:39]) == ["kidney_left", "kidney_right"]
    places = {
        "aorta": 3,
        "colon": 9,
        "duodenum": 10,
        "gallbladder": 15,
        "pancreas": 46,
        "small_bowel": 76,
        "vertebrae_t9": 104,
    }
    assert {name: 1 + STUNET_TARGETS.index(name) for name in places} == places


def test_a_fine_tuned_stunet_starts_its_heads_anew(tmp_path):
    package = pytest.importorskip("medim.models.stu_net")
    network = package.STUNet(4, 5, [1] * 6, [2, 4, 4, 4, 4, 4], package.DEFAULT_STRIDES, [[3, 3, 3]] * 6)
    path = str(tmp_path / "brats.model")
    torch.save({"state_dict": network.state_dict()}, path)
    _, report = taken_over(path, ["whole_tumor"])
    assert any("all heads start anew" in note for note in report.mismatches)
    assert {"seg_outputs" in entry.name for entry in report.entries if entry.how == "new"} == {True}


@pytest.fixture(scope="module")
def swin():
    from monai.networks.nets import SwinUNETR

    return randomized(SwinUNETR(1, 2, feature_size=SWIN))


def swinvit_file(swin, folder):
    state = {
        "module." + name.replace("linear1", "fc1").replace("linear2", "fc2"): value
        for name, value in swin.swinViT.state_dict().items()
    }
    path = str(folder / "model_swinvit.pt")
    torch.save({"epoch": 1, "state_dict": {**state, "module.rotation_head.weight": torch.ones(4, 4)}}, path)
    return path


def ssl_file(swin, folder):
    state = {}
    for name, value in swin.swinViT.state_dict().items():
        where = name if name.startswith("patch_embed") else name.replace(".0.", ".0.0.", 1)
        state[f"encoder.{where}"] = value
    path = str(folder / "ssl_pretrained_weights.pth")
    torch.save({"model": {**state, "encoder.mask_token": torch.ones(1, 4), "decoder.0.weight": torch.ones(2)}}, path)
    return path


@pytest.mark.parametrize("write", [swinvit_file, ssl_file])
def test_a_swin_encoder_is_taken_over_whole_as_monai_does(write, swin, tmp_path):
    path = write(swin, tmp_path)
    network, report = taken_over(path, ["a"], img_size=SIZE)
    encoder = network.net.swinViT.state_dict()
    assert all(torch.equal(value, encoder[name]) for name, value in swin.swinViT.state_dict().items())
    assert {entry.how for entry in report.entries if "swinViT" in entry.name} == {"loaded"}
    assert {entry.how for entry in report.entries if "swinViT" not in entry.name} == {"new"}
    assert len(report.unused) == (1 if write is swinvit_file else 2)
    assert any("encoder alone" in note for note in report.mismatches)
    if write is swinvit_file:
        from monai.networks.nets import SwinUNETR

        reference = SwinUNETR(1, 1, feature_size=SWIN)
        reference.load_from(torch.load(path, weights_only=True))
        assert all(torch.equal(value, encoder[name]) for name, value in reference.swinViT.state_dict().items())


def test_a_swin_encoder_of_another_kind_is_refused(swin, tmp_path):
    state = torch.load(swinvit_file(swin, tmp_path), weights_only=True)
    del state["state_dict"]["module.layers1.0.blocks.0.norm1.weight"]
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(CheckpointError, match=r"layers1\.0\.blocks\.0\.norm1\.weight.*not in the checkpoint"):
        taken_over(str(tmp_path / "part.pt"), ["a"], img_size=SIZE)


def test_sam_med3d(tmp_path):
    package = pytest.importorskip("medim.models.sam_med3d")
    small = {"encoder_embed_dim": 24, "encoder_depth": 2, "encoder_num_heads": 2, "encoder_global_attn_indexes": [1]}
    theirs = randomized(package.build_sam3D_vit_b_ori(image_size=32, **small))
    path = str(tmp_path / "sam_med3d_turbo.pth")
    torch.save({"model_state_dict": theirs.state_dict(), "epoch": 1}, path)
    ours, report = taken_over(path, ["target"], img_size=[32] * 3, width=24, depth=2, num_heads=2, global_layers=[1])
    assert not report.unused and {entry.how for entry in report.entries} == {"loaded"}
    assert all(torch.equal(value, ours.net.state_dict()[name]) for name, value in theirs.state_dict().items())


def test_another_network_than_the_weights_is_refused(stunet):
    with pytest.raises(CheckpointError, match="'stunet', the configuration asks for 'nnunet'"):
        build_network(read_pretrained(stunet[1]).description, name="nnunet")


def test_stunet_becomes_a_bundle_of_its_own(stunet, tmp_path):
    theirs, path = stunet
    weights = Path(import_stunet(path, str(tmp_path / "out")), "models/model.pt")
    description = read_description(weights)
    assert tuple(description["targets"]) == STUNET_TARGETS and description["preparation"]["spacing_mm"] == [1.5] * 3
    network = build_network(description).eval()
    load_weights(network, weights)
    x = torch.randn(1, 1, 32, 32, 64)
    with torch.no_grad():
        torch.testing.assert_close(network(x), theirs(x))


def test_only_stunet_weights_with_known_structures_become_its_bundle(tmp_path):
    package = pytest.importorskip("medim.models.stu_net", reason="pip install --no-deps, see requirements-dev.txt")
    network = package.STUNet(1, 3, [1] * 6, [2, 4, 4, 4, 4, 4], package.DEFAULT_STRIDES, [[3, 3, 3]] * 6)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "mine.model")
    with pytest.raises(CheckpointError, match="with 0 named targets; expected STU-Net's"):
        import_stunet(str(tmp_path / "mine.model"), str(tmp_path / "out"))
