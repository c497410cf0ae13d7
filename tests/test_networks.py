"""Every network that the bundles train passes the same tests, whatever package it comes from."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from tsfm.cases.cases import Preparation
from tsfm.labels import LabelTable
from tsfm.network.adapted import NetworkError
from tsfm.network.description import check_description
from tsfm.network.loss import PartialLabelLoss
from tsfm.network.networks import create_network
from tsfm.planning.parts import freeze, parameter_groups
from tsfm.planning.transfer import load_pretrained
from tsfm.training.checkpoint import (
    build_network,
    describe_network,
    load_weights,
    read_description,
    save_weights,
    start_from,
)
from tsfm_tools.release.export import relative_difference

TABLE = LabelTable({"a": {}, "b": {"inside": "a"}}, [{"name": "mine", "labels": {"1": "a", "2": "b"}}])
LEVELS = {"features": [4, 8, 12], "strides": [[2, 2, 2], [1, 2, 2]]}
TINY = {
    "tsfm": {
        **LEVELS,
        "depths_down": [1] * 3,
        "depths_up": [1] * 2,
        "hidden_size": 8,
        "num_layers": 1,
        "num_heads": 2,
        "mlp_dim": 8,
    },
    "nnunet": {**LEVELS, "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]]},
    "nnunet residual": {**LEVELS, "residual": True, "depths_down": [1, 2, 1]},
    "swinunetr": {"feature_size": 12},
    "stunet": LEVELS,
    "monai": {"net": "SegResNet", "arguments": {"init_filters": 8, "blocks_down": [1, 1, 1], "blocks_up": [1, 1]}},
}
PACKAGES = {"nnunet": "dynamic_network_architectures", "stunet": "medim"}
SIZES = {"swinunetr": [32, 32, 64]}
DEEP = set(TINY) - {"swinunetr", "monai"}


def make(kind: str, **options):
    torch.manual_seed(0)
    name = kind.split()[0]
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name], reason="pip install --no-deps, see requirements-dev.txt")
    given = {"in_channels": 1, "out_channels": 2, "img_size": SIZES.get(kind, [8, 16, 8]), **TINY[kind], **options}
    return create_network(name, **given)


def image_for(network, batch=1):
    arguments = network.description["network"]
    return torch.randn(batch, arguments["in_channels"], *arguments["img_size"])


@pytest.fixture(params=TINY)
def kind(request):
    return request.param


class TestEveryNetwork:
    def test_answers_one_logit_per_target_and_voxel(self, kind):
        network = make(kind)
        x = image_for(network, 2)
        with torch.no_grad():
            assert network.eval()(x).shape == (2, 2, *x.shape[2:])

    def test_supervises_deeply_while_it_trains_finest_first(self, kind):
        network, x = make(kind), image_for(make(kind))
        levels = network.train()(x)
        assert isinstance(levels, list) == (kind in DEEP)
        if kind in DEEP:
            assert [tuple(level.shape[2:]) for level in levels] == [(8, 16, 8), (4, 8, 4)]
        alone = make(kind, deep_supervision=False).train()
        output = alone(x)
        assert isinstance(output, torch.Tensor)
        output.sum().backward()
        assert all(parameter.grad is not None for parameter in alone.parameters()), "DDP would stop"

    def test_refuses_sizes_and_channels_and_says_what_fits(self, kind):
        network = make(kind)
        size = list(image_for(network).shape[2:])
        stride = network.total_stride[1]
        odd = [size[0], size[1] + 1, size[2]]
        with pytest.raises(ValueError, match=f"{size[1]} or {size[1] + stride} would fit"):
            network(torch.zeros(1, 1, *odd))
        with pytest.raises(ValueError, match="in_channels"):
            network(torch.zeros(1, 3, *size))
        with pytest.raises(ValueError, match="single voxel"):
            network.check_size(network.total_stride)

    @pytest.mark.parametrize("suffix", ["pt", "safetensors"])
    def test_is_rebuilt_from_its_weights_alone(self, kind, suffix, tmp_path):
        network = make(kind)
        describe_network(network, TABLE, Preparation((1.0, 1.0, 1.0)), image_for(network).shape[2:])
        path = str(tmp_path / f"model.{suffix}")
        save_weights(network, path)
        again = build_network(read_description(path), dropout=0.0)
        load_weights(again, path)
        x = image_for(network)
        with torch.no_grad():
            torch.testing.assert_close(again.eval()(x), network.eval()(x), atol=0, rtol=0)
        assert again.description["targets"] == {"a": {}, "b": {"inside": "a"}}

    def test_learns(self, kind):
        network = make(kind)
        loss = PartialLabelLoss(TABLE)
        x = image_for(network)
        codes = (x > 0.5).long()
        optimizer = torch.optim.Adam(parameter_groups(network), 3e-3)
        values = []
        for _ in range(6):
            optimizer.zero_grad()
            value = loss(network.train()(x), codes)
            value.backward()
            optimizer.step()
            values.append(float(value))
        assert values[-1] < values[0] - 0.05, values

    def test_recomputing_activations_changes_no_gradient(self, kind):
        plain = make(kind)
        saving = make(kind, checkpointing=True)
        saving.load_state_dict(plain.state_dict())
        x = image_for(plain)
        for network in (plain, saving):
            output = network.train()(x)
            (output[0] if isinstance(output, list) else output).square().mean().backward()
        for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
            if one.grad is not None:
                torch.testing.assert_close(one.grad, other.grad, msg=name)

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    def test_exports_and_copies(self, kind):
        network = make(kind).eval()
        x = image_for(network)
        with torch.no_grad():
            traced = torch.jit.trace(network, x, check_trace=False)
            assert relative_difference(network, traced, tuple(x.shape)) < 1e-4
            torch.testing.assert_close(copy.deepcopy(network)(x), network(x), atol=0, rtol=0)

    def test_has_an_encoder_and_heads_that_freeze_apart(self, kind):
        network = make(kind)
        freeze(network, "all_but_heads")
        left = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        assert left and all(len(dict(network.named_parameters())[name]) in (2, 4, 8) for name in left)
        freeze(network, "encoder")
        assert {group["name"] for group in parameter_groups(network)} == {"decoder", "heads"}

    def test_takes_over_what_another_task_has_learned(self, kind, tmp_path):
        source = make(kind)
        describe_network(source, TABLE, Preparation((1.0, 1.0, 1.0)), image_for(source).shape[2:])
        path = str(tmp_path / "model.pt")
        save_weights(source, path)
        network = make(kind, in_channels=3, out_channels=2)
        network.description["targets"] = {"b": {}, "new": {}}
        report = load_pretrained(network, path)
        assert report.targets == {"taken over": ["b"], "new": ["new"], "unused": ["a"]}
        assert not report.unused and not [entry.name for entry in report.entries if entry.how == "new"]
        assert any("1 to 3 input channels" in entry.note for entry in report.entries)
        x = torch.randn(1, 1, *image_for(network).shape[2:])
        with torch.no_grad():  # an image repeated in all channels gives what it gave
            ours, theirs = network.eval()(x.repeat(1, 3, 1, 1, 1)), source.eval()(x)
        torch.testing.assert_close(ours[:, 0], theirs[:, 1], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("nnunet", {"out_channels": 2}, 31_195_594),
        ("nnunet", {"out_channels": 2, "residual": True}, 102_349_770),
        ("swinunetr", {"out_channels": 2}, 62_186_708),
        ("stunet", {"out_channels": 105, "size": "S"}, 14_596_941),
        ("stunet", {"out_channels": 105, "size": "B"}, 58_262_669),
        ("stunet", {"out_channels": 105, "size": "L"}, 440_302_605),
        ("stunet", {"out_channels": 105, "size": "H"}, 1_457_326_221),
        ("sam_med3d", {}, 100_509_232),
    ],
)
def test_full_sizes_have_the_published_number_of_parameters(name, options, parameters):
    pytest.importorskip({**PACKAGES, "sam_med3d": "medim"}.get(name, "monai"))
    with torch.device("meta"):
        network = create_network(name, **options)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_arguments_of_other_networks_are_left_out_and_unknown_ones_refused():
    network = create_network("swinunetr", feature_size=12, hidden_size=3, residual=True)
    assert "hidden_size" not in network.description["network"]
    with pytest.raises(NetworkError, match="featuers"):
        create_network("swinunetr", featuers=12)
    with pytest.raises(NetworkError, match="expected one of tsfm, nnunet"):
        create_network("os.system")


@pytest.mark.parametrize("name", PACKAGES)
def test_an_absent_package_is_named_with_the_command_that_installs_it(name, monkeypatch):
    for module in [module for module in sys.modules if module.split(".")[0] == PACKAGES[name]]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(NetworkError, match="pip install --no-deps"):
        create_network(name)


def test_sam_med3d_answers_to_clicks():
    pytest.importorskip("medim")
    network = create_network("sam_med3d", img_size=[32] * 3, width=24, depth=2, num_heads=2, global_layers=[1]).eval()
    x, click = torch.randn(1, 1, 32, 32, 32), torch.full((1, 1, 3), 10.0)
    with torch.no_grad():
        on, off = (network(x, click, torch.full((1, 1), label)) for label in (1.0, 0.0))
        again = network(x, click, torch.ones(1, 1), mask=on)
    assert on.shape == (1, 1, 32, 32, 32) and not torch.equal(on, off) and not torch.equal(on, again)
    with pytest.raises(ValueError, match="only \\(32, 32, 32\\) fits"):
        network(torch.zeros(1, 1, 48, 32, 32))
    with pytest.raises(NetworkError, match="one target at a time"):
        create_network("sam_med3d", out_channels=4)


@pytest.mark.parametrize(
    ("net", "arguments", "stride"),
    [
        ("UNet", {"channels": [4, 8, 8], "strides": [2, 2], "norm": ["instance", {"affine": True}]}, 4),
        ("BasicUNet", {"features": [4, 4, 8, 8, 8, 4], "spatial_dims": 2}, 1),  # what the data decide is filled in
    ],
)
def test_a_network_of_monai_says_which_sizes_it_takes(net, arguments, stride):
    network = create_network(
        "monai", net=net, arguments=arguments, in_channels=2, out_channels=3, img_size=[32, 16, 32]
    )
    assert network.total_stride == (stride,) * 3
    assert network(torch.zeros(1, 2, 32, 16, 32)).shape == (1, 3, 32, 16, 32)
    check_description(network.description, "here")


def test_modules_that_cannot_say_what_they_are_are_refused_with_what_to_do():
    with pytest.raises(TypeError, match=r"makes a Conv3d.*NETWORKS"):
        start_from(torch.nn.Conv3d(1, 2, 1), None)
    with pytest.raises(NetworkError, match="expected one of AttentionUnet"):
        create_network("monai", net="TorchVisionFCModel")
    with pytest.raises(NetworkError, match=r"SegResNet does not take these arguments: .*filtres"):
        create_network("monai", net="SegResNet", arguments={"filtres": 3})
    with pytest.raises(NetworkError, match=r"a patch of \[16, 16, 16\] .*spatial"):
        create_network("monai", net="BasicUNet", arguments={"features": [4] * 6}, img_size=[16, 16, 16])
    with pytest.raises(ValueError, match="16 or 24 would fit"):
        create_network("monai", img_size=[16, 20, 16])
