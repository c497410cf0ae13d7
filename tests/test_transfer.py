"""Pretrained weights in networks of another shape, the report about it, and which parameters are trained how."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch import nn
from tsfm.network.networks import create_network
from tsfm.network.tsfm_net import TSFM
from tsfm.planning.parts import freeze, parameter_groups
from tsfm.planning.transfer import load_pretrained
from tsfm.training.checkpoint import load_weights, read_state, save_weights
from tsfm.training.weight_files import CheckpointError

pytestmark = pytest.mark.convolutions

SMALL = {
    "features": (4, 8, 16), "depths_down": (1, 1, 1), "depths_up": (1, 1), "strides": ((2, 2, 2), (2, 2, 2)), "img_size": (16, 16, 16),
    "hidden_size": 12, "num_layers": 2, "num_heads": 2, "mlp_dim": 16,
}  # fmt: skip
PRETRAINED = ("kidney", "liver", "kidney_tumor")
CT = {"lower": -900.0, "upper": 300.0, "mean": 60.0, "sd": 170.0}


def network(targets=PRETRAINED, seed=0, **changes):
    """A small TSFM whose parameters are all random (none at a constant start), with named targets."""
    torch.manual_seed(seed)
    result = TSFM(out_channels=len(targets), **{**SMALL, **changes})
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.copy_(torch.randn_like(parameter))
    result.description["targets"] = {name: {} for name in targets}
    return result


def describe(net, spacing=(1.5, 1.0, 1.0), modalities=("CT",), intensity=None, version="0.0.1"):
    net.description.update(
        format=1, version=version, modalities=list(modalities),
        preparation={"spacing_mm": list(spacing), "intensity": intensity or {"CT": CT}, "default_modality": "CT"},
    )  # fmt: skip
    return net


@pytest.fixture
def pretrained():
    return describe(network())


@pytest.fixture
def checkpoint(pretrained, tmp_path):
    save_weights(pretrained, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def weights(net):
    return {name: value.clone() for name, value in net.named_parameters()}


def test_the_same_shape_is_loaded_whole(checkpoint, pretrained):
    other = network(seed=1)
    report = load_pretrained(other, checkpoint)
    x = torch.randn(1, 1, 16, 16, 16)
    assert torch.equal(other.eval()(x), pretrained.eval()(x))
    assert report.totals()["loaded"]["percent"] == 100
    assert report.unused == {} and report.totals()["loaded"]["tensors"] == len(weights(other))


@pytest.mark.parametrize("old, new", [(1, 4), (4, 1), (2, 3), (3, 2)])
def test_other_input_channels_keep_the_sum_of_activations(old, new, tmp_path):
    first = network(in_channels=old)
    save_weights(first, tmp_path / "model.pt")
    second = network(in_channels=new, seed=1)
    report = load_pretrained(second, tmp_path / "model.pt")
    x = torch.randn(1, 1, 16, 16, 16)  # the same picture in every channel
    torch.testing.assert_close(second.stem(x.expand(-1, new, -1, -1, -1)), first.stem(x.expand(-1, old, -1, -1, -1)))
    (stem,) = [entry for entry in report.entries if entry.how == "adapted"]
    assert stem.name == "stem.weight" and stem.new == 0
    assert any("input channels" in line for line in report.mismatches)


def test_one_channel_becomes_several_equal_ones(checkpoint, pretrained):
    four = network(in_channels=4, seed=1)
    load_pretrained(four, checkpoint)
    for channel in range(4):
        torch.testing.assert_close(four.stem.weight[:, channel], pretrained.stem.weight[:, 0] / 4)


def test_heads_follow_the_names_of_the_targets(checkpoint, pretrained):
    names = ("spleen", "kidney_tumor", "kidney")
    other = network(names, seed=1)
    before = weights(other)
    report = load_pretrained(other, checkpoint)
    for mine, theirs in zip(other.heads, pretrained.heads, strict=True):
        assert torch.equal(mine.conv.weight[1], theirs.conv.weight[2]) and torch.equal(
            mine.conv.bias[1], theirs.conv.bias[2]
        )
        assert torch.equal(mine.conv.weight[2], theirs.conv.weight[0]) and torch.equal(
            mine.conv.bias[2], theirs.conv.bias[0]
        )
    for level in range(2):  # the target that the checkpoint does not know keeps its start
        assert torch.equal(other.heads[level].conv.weight[0], before[f"heads.{level}.conv.weight"][0])
    assert report.targets == {"taken over": ["kidney_tumor", "kidney"], "new": ["spleen"], "unused": ["liver"]}
    assert report.totals()["new"]["parameters"] == 4 + 1 + 8 + 1  # weights and bias of one target at two levels
    assert report.totals()["new"]["tensors"] == 0


def test_the_order_of_the_targets_decides_not_their_number(checkpoint, pretrained):
    other = network(("liver", "kidney", "kidney_tumor"), seed=1)
    load_pretrained(other, checkpoint)
    x = torch.randn(1, 1, 16, 16, 16)
    torch.testing.assert_close(other.eval()(x), pretrained.eval()(x)[:, [1, 0, 2]])


def test_targets_that_are_all_new_keep_their_start_and_the_rest_is_loaded(checkpoint, pretrained):
    other = network(("hippocampus",), seed=1)
    before = weights(other)
    report = load_pretrained(other, checkpoint)
    assert torch.equal(other.heads[0].conv.weight, before["heads.0.conv.weight"])
    assert torch.equal(other.decoder[0][0].conv1.weight, pretrained.decoder[0][0].conv1.weight)
    assert {"heads.0.conv.weight", "heads.1.conv.bias"} <= report.unused.keys()
    assert report.totals()["new"]["tensors"] == 4


def test_without_names_no_head_is_taken_for_another(pretrained, tmp_path):
    state = {name: value for name, value in pretrained.state_dict().items() if name != "_extra_state"}
    torch.save(state, tmp_path / "plain.pt")
    other = network(seed=1)
    before = weights(other)
    report = load_pretrained(other, tmp_path / "plain.pt")
    assert torch.equal(other.heads[0].conv.weight, before["heads.0.conv.weight"])
    assert report.targets["new"] == list(PRETRAINED)
    assert "no description" in report.mismatches[0]


@pytest.mark.parametrize("residual", [0, 1])
def test_a_head_whose_outputs_are_no_rows_is_taken_for_the_same_targets_alone(residual, tmp_path):
    """MONAI's UNet ends in a transposed convolution."""

    def unet(*targets):
        arguments = {"channels": [4, 8], "strides": [2], "num_res_units": residual}
        net = create_network("monai", net="UNet", arguments=arguments, out_channels=len(targets), img_size=[8, 8, 8])
        net.description["targets"] = {name: {} for name in targets}
        return net

    save_weights(unet("liver", "tumor"), tmp_path / "unet.pt")
    assert load_pretrained(unet("liver", "tumor"), tmp_path / "unet.pt").totals()["loaded"]["percent"] == 100
    for targets in (("tumor", "liver"), ("liver", "tumor", "cyst"), ("spleen",)):
        new = unet(*targets)
        start = {name: value.clone() for name, value in new.named_parameters()}
        report = load_pretrained(new, tmp_path / "unet.pt")
        assert report.targets["new"] == list(targets) and report.targets["taken over"] == []
        fresh = {entry.name for entry in report.entries if entry.new}
        assert fresh and all(name.startswith("net.model.2.") for name in fresh)
        kept = {name for name, value in new.named_parameters() if torch.equal(value, start[name])}
        assert {name for name in kept if "adn" not in name} == fresh, "slopes of PReLU are alike everywhere"


def test_the_position_embedding_goes_to_another_token_grid(checkpoint, pretrained):
    ramp = torch.arange(4.0).view(1, 1, 1, 1, 4).expand(1, 12, 4, 4, 4)
    with torch.no_grad():
        pretrained.bottleneck.position_embedding.copy_(ramp)
    save_weights(pretrained, checkpoint)
    other = network(img_size=(16, 24, 32), seed=1)
    report = load_pretrained(other, checkpoint)
    embedding = other.bottleneck.position_embedding
    assert embedding.shape == (1, 12, 4, 6, 8)
    expected = torch.tensor(
        [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    )  # the same ramp at half voxels, flat at the ends
    torch.testing.assert_close(embedding[0, 3, 2, 5], expected)
    assert [entry.name for entry in report.entries if entry.how == "adapted"] == ["bottleneck.position_embedding"]


@pytest.mark.parametrize("old, new", [((2, 2, 2), (1, 2, 2)), ((1, 2, 2), (2, 2, 2))])
def test_another_stride_keeps_the_shortcut_of_a_constant_image(old, new, tmp_path):
    first = network(strides=((2, 2, 2), old))
    save_weights(first, tmp_path / "model.pt")
    second = network(strides=((2, 2, 2), new), seed=1)
    report = load_pretrained(second, tmp_path / "model.pt")
    x = torch.randn(1, 8, 1, 1, 1)
    before, after = (net.down[1].shortcut(x.expand(1, 8, *stride)) for net, stride in ((first, old), (second, new)))
    torch.testing.assert_close(after, before)
    assert any("stride" in entry.note for entry in report.entries)


def test_a_flat_kernel_grows_without_changing_a_number_and_shrinks_to_its_sum(tmp_path):
    """Slices that are all the same look the same to a kernel of three and to its sum; back again nothing is lost."""
    flat, cubes = [(1, 3, 3), (3, 3, 3), (3, 3, 3)], [(3, 3, 3)] * 3
    first, second, third = (network(seed=seed, kernel_sizes=k) for seed, k in enumerate((flat, cubes, flat)))
    save_weights(first, tmp_path / "flat.pt")
    report = load_pretrained(second, tmp_path / "flat.pt")
    x = torch.randn(1, 1, 16, 16, 16)
    torch.testing.assert_close(second.eval()(x), first.eval()(x), rtol=1e-4, atol=1e-4)
    assert {entry.note for entry in report.entries if entry.how == "adapted"} == {"kernel (1, 3, 3) to (3, 3, 3)"}
    save_weights(network(seed=5, kernel_sizes=cubes), tmp_path / "cubes.pt")
    load_pretrained(third, tmp_path / "cubes.pt")
    theirs = network(seed=5, kernel_sizes=cubes)
    same = torch.randn(1, 1, 1, 16, 16).expand(-1, -1, 16, -1, -1)
    torch.testing.assert_close(third.stem(same)[:, :, 1:-1], theirs.stem(same)[:, :, 1:-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"features": (8, 16, 32)}, r"features: checkpoint \[4, 8, 16\], network \[8, 16, 32\]"),
        ({"features": (8, 16, 32)}, r"stem.weight: checkpoint \(4, 1, 3, 3, 3\), network \(8, 1, 3, 3, 3\)"),
        ({"features": (4, 8), "depths_down": (1, 1), "depths_up": (1,), "strides": ((2, 2, 2),)}, "not in the network"),
        ({"depths_down": (1, 1, 2)}, r"encoder.2.1.conv1.weight \(16, 16, 3, 3, 3\): not in the checkpoint"),
        ({"skip": "add"}, "skip: checkpoint concat, network add"),
        ({"num_layers": 1}, "num_layers: checkpoint 2, network 1"),
        ({"hidden_size": 24}, r"bottleneck.project_in.weight: checkpoint \(12, 16\), network \(24, 16\)"),
    ],
    ids=["wider", "wider, tensor", "shallower", "more blocks", "skips", "fewer layers", "wider Transformer"],
)
def test_what_does_not_fit_is_named_and_nothing_is_changed(checkpoint, tmp_path, changes, message):
    other = network(seed=1, **changes)
    before = weights(other)
    with pytest.raises(CheckpointError, match=message) as error:
        load_pretrained(other, checkpoint, report_path=tmp_path / "report.json")
    assert "the network was not changed" in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in other.named_parameters())
    assert not os.path.exists(tmp_path / "report.json")


def test_a_foreign_network_fails_because_nothing_fits(tmp_path):
    torch.save(nn.Linear(3, 4).state_dict(), tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not a single tensor fits"):
        load_pretrained(network(), tmp_path / "other.pt")


def test_the_transformer_may_be_missing_on_either_side(checkpoint, tmp_path):
    report = load_pretrained(network(bottleneck=False, seed=1), checkpoint)
    assert all(name.startswith("bottleneck.") for name in report.unused) and report.unused
    save_weights(network(bottleneck=False), tmp_path / "cnn.pt")
    report = load_pretrained(network(seed=1), tmp_path / "cnn.pt")
    assert {e.name.split(".")[0] for e in report.entries if e.how == "new"} == {"bottleneck"}


def test_deep_supervision_heads_may_be_missing_on_either_side(checkpoint, pretrained, tmp_path):
    one = network(deep_supervision=False, seed=1)
    report = load_pretrained(one, checkpoint)
    assert {name.split(".")[1] for name in report.unused} == {"1"}
    save_weights(one, tmp_path / "one.pt")
    two = network(seed=2)
    report = load_pretrained(two, tmp_path / "one.pt")
    assert torch.equal(two.heads[0].conv.weight, pretrained.heads[0].conv.weight)
    assert {e.name[:8] for e in report.entries if e.how == "new"} == {"heads.1."}


def test_the_best_head_may_not_be_missing(checkpoint, tmp_path):
    state = {key: value for key, value in torch.load(checkpoint).items() if not key.startswith("heads.0.")}
    torch.save(state, tmp_path / "headless.pt")
    with pytest.raises(CheckpointError, match=r"heads\.0\.norm\.weight"):
        load_pretrained(network(), tmp_path / "headless.pt")


def as_training_checkpoint(state, path):
    torch.save({"model": state, "optimizer": {"param_groups": [{"lr": 0.1}]}, "epoch": 3}, path)


def as_wrapped(state, path):
    torch.save({"state_dict": {f"module._orig_mod.{key}": value for key, value in state.items()}}, path)


def as_safetensors(state, path):
    from safetensors.torch import save_file

    save_file(state, path)


@pytest.mark.parametrize(
    "write, name",
    [
        (torch.save, "model.pt"),
        (as_training_checkpoint, "last.pt"),
        (as_wrapped, "x.pth"),
        (as_safetensors, "model.safetensors"),
    ],
)
def test_every_kind_of_file_gives_the_same_network(pretrained, tmp_path, write, name):
    write(pretrained.state_dict(), tmp_path / name)
    other = network(("liver",), seed=1)
    report = load_pretrained(other, tmp_path / name)
    assert torch.equal(other.heads[0].conv.weight[0], pretrained.heads[0].conv.weight[1])
    assert report.targets["taken over"] == ["liver"]


class Attack:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def test_a_pickle_with_code_is_refused(tmp_path):
    torch.save(
        {"model": {"stem.weight": torch.zeros(1)}, "payload": Attack(tmp_path / "executed")}, tmp_path / "evil.pt"
    )
    with pytest.raises(CheckpointError, match="refused"):
        load_pretrained(network(), tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.pt does not exist"):
        load_pretrained(network(), tmp_path / "nowhere.pt")
    with pytest.raises(CheckpointError, match=r"no model folder of nnU-Net 2: .*, or a weight file \(model\.pt\)"):
        load_pretrained(network(), tmp_path)
    with pytest.raises(CheckpointError, match=r"is a folder; name a file in it"):
        read_state(tmp_path)


def test_lower_precision_weights_are_read(pretrained, tmp_path):
    torch.save(
        {k: v.bfloat16() if v.is_floating_point() else v for k, v in pretrained.state_dict().items()}, tmp_path / "b.pt"
    )
    other = network(seed=1)
    load_pretrained(other, tmp_path / "b.pt")
    assert other.stem.weight.dtype == torch.float32
    torch.testing.assert_close(other.stem.weight, pretrained.stem.weight, rtol=1e-2, atol=1e-2)


def test_what_differs_from_the_pretraining_is_reported(checkpoint):
    other = network(seed=1, in_channels=4)
    mri = {"spacing_mm": [1.0, 1.0, 1.0], "intensity": {}, "default_modality": "MR"}
    report = load_pretrained(other, checkpoint, task={"preparation": mri, "modalities": ["MR"]})
    text = str(report)
    assert "spacing (S, P, L): [1.5, 1.0, 1.0] mm in the checkpoint, [1.0, 1.0, 1.0] mm now" in text
    assert "modality MR is new: the checkpoint saw CT" in text
    assert "input channels: 1 in the checkpoint, 4 now" in text
    assert "written by tsfm 0.0.1" in text
    assert "normalization" not in text  # MR is z-scored in both


def test_another_orientation_order_and_rule_of_channels_are_reported(checkpoint):
    own = describe(network(seed=1)).description
    changed = {"orientation": "kji", "resample_first": True, "channels": [{"scheme": "none"}]}
    task = {**own, "preparation": {**own["preparation"], **changed}}
    lines = load_pretrained(network(seed=1), checkpoint, task=task).mismatches
    assert [line for line in lines if "written by" not in line] == [
        "orientation of the axes: SPL in the checkpoint, kji now",
        "resampled before it is normalized: False in the checkpoint, True now",
        "normalization of the channels: by modality in the checkpoint, none now",
    ]


def test_another_ct_window_is_reported_and_the_same_task_is_not(checkpoint):
    same = describe(network(seed=1)).description
    report = load_pretrained(network(seed=1), checkpoint, task=same)
    assert [line for line in report.mismatches if "written by" not in line] == []
    window = describe(network(seed=1), intensity={"CT": {**CT, "lower": -100.0}}).description
    report = load_pretrained(network(seed=1), checkpoint, task=window)
    assert any(line.startswith("normalization of CT") and "-100" in line for line in report.mismatches)


def test_the_report_is_printed_and_saved(checkpoint, tmp_path, capsys):
    other = network(("kidney", "spleen"), seed=1, in_channels=2)
    report = load_pretrained(other, checkpoint, report_path=tmp_path / "run" / "transfer_report.json")
    saved = json.loads((tmp_path / "run" / "transfer_report.json").read_text())
    text = (tmp_path / "run" / "transfer_report.txt").read_text()
    assert capsys.readouterr().out == text == str(report) + "\n"
    totals = saved["totals"]
    parameters = sum(p.numel() for p in other.parameters())
    assert sum(totals[how]["parameters"] for how in ("loaded", "adapted", "new")) == parameters
    assert sum(totals[how]["tensors"] for how in ("loaded", "adapted", "new")) == len(weights(other))
    assert sum(totals[how]["percent"] for how in ("loaded", "adapted", "new")) == pytest.approx(100)
    assert "targets taken over: kidney" in text and "targets new: spleen" in text
    assert f"{totals['new']['percent']:.2f}" in text


def test_weights_that_share_no_target_keep_the_body_and_the_report_says_so(checkpoint):
    text = str(load_pretrained(network(("prostate",), seed=1), checkpoint))
    assert "no target is shared: the body of the network (all but its heads) keeps what was pretrained, 100%" in text
    assert "its heads, one output per target, start anew for prostate" in text
    assert "no target is shared" not in str(load_pretrained(network(("prostate", "liver"), seed=1), checkpoint))


def test_the_result_can_be_saved_and_read_strictly(checkpoint, tmp_path):
    other = network(("kidney", "spleen"), seed=1, img_size=(16, 16, 32))
    load_pretrained(other, checkpoint)
    assert list(other.description["targets"]) == ["kidney", "spleen"]  # its own description stays
    save_weights(other, tmp_path / "fine.pt")
    load_weights(network(("kidney", "spleen"), seed=2, img_size=(16, 16, 32)), tmp_path / "fine.pt")


@pytest.mark.parametrize(
    "what, trained",
    [("none", {"stem", "encoder", "down", "bottleneck", "up", "decoder", "heads"}),
     ("encoder", {"up", "decoder", "heads"}), ("all_but_heads", {"heads"})],
)  # fmt: skip
def test_freezing(what, trained):
    net = network()
    freeze(net, "all_but_heads")
    freeze(net, what)  # the last word counts
    assert {name.split(".")[0] for name, p in net.named_parameters() if p.requires_grad} == trained
    x = torch.randn(1, 1, 16, 16, 16)
    sum(level.sum() for level in net.train()(x)).backward()
    assert {name.split(".")[0] for name, p in net.named_parameters() if p.grad is not None} == trained


def test_freezing_what_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="'heads'; expected one of none, encoder, all_but_heads"):
        freeze(network(), "heads")
    with pytest.raises(ValueError, match="Linear lacks them"):
        freeze(nn.Linear(2, 2), "encoder")
    freeze(nn.Linear(2, 2), "none")


def test_parts_learn_at_their_own_rates():
    net = network()
    before = weights(net)
    optimizer = torch.optim.SGD(parameter_groups(net, head_lr=0.4, encoder_lr=0.0), 0.1)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    rates = {"heads": 0.4, "up": 0.1, "decoder": 0.1}
    for name, parameter in net.named_parameters():
        expected = before[name] - rates.get(name.split(".")[0], 0.0)
        torch.testing.assert_close(parameter.detach(), expected)


def test_groups_hold_every_trainable_parameter_once_also_when_wrapped():
    net = nn.DataParallel(network())
    freeze(net, "encoder")
    groups = parameter_groups(net, head_lr=0.1, encoder_lr=0.2)
    assert [(group["name"], group.get("lr")) for group in groups] == [("decoder", None), ("heads", 0.1)]
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in net.parameters() if p.requires_grad)


def test_a_network_with_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="nothing would be trained"):
        parameter_groups(network().requires_grad_(False))
    with pytest.raises(ValueError, match="none below 0"):
        parameter_groups(network(), head_lr=-1)


def test_a_promptable_network_starts_as_the_automatic_one_and_goes_back(pretrained, checkpoint, tmp_path):
    prompted = network(seed=1, in_channels=3)
    prompted.description["click_sigma"] = 2.0
    report = load_pretrained(prompted, checkpoint)
    (stem,) = [entry for entry in report.entries if entry.name == "stem.weight"]
    assert stem.new == prompted.stem.weight[:, 1:].numel() and stem.note == "click channels new"
    x = torch.randn(1, 1, 16, 16, 16)
    none = torch.zeros(1, 2, 16, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(prompted.eval()(torch.cat([x, none], 1)), pretrained.eval()(x))

    save_weights(describe(prompted), tmp_path / "prompted.pt")
    again, back = network(seed=2, in_channels=3), network(seed=3)
    again.description["click_sigma"] = 3.0
    load_pretrained(again, tmp_path / "prompted.pt")
    torch.testing.assert_close(again.stem.weight, prompted.stem.weight)
    load_pretrained(back, tmp_path / "prompted.pt")
    torch.testing.assert_close(back.stem.weight, pretrained.stem.weight)
    three = network(seed=4, in_channels=3)  # images of three channels are no images with clicks
    load_pretrained(three, tmp_path / "prompted.pt")
    torch.testing.assert_close(three.stem.weight[:, 2], pretrained.stem.weight[:, 0] / 3)
