"""The network: its published size, its blocks, and what every variant must do (shapes, files, tracing, export, gradients)."""

import io
import itertools
import json
import shutil
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tsfm.network.tsfm_net import TSFM, Head, NormAct, ResBlock, TransformerBottleneck, Up, interpolate_positions

pytestmark = pytest.mark.convolutions

TINY = {
    "out_channels": 3,
    "features": (8, 16, 32),
    "depths_down": (1, 1, 1),
    "depths_up": (1, 1),
    "strides": ((2, 2, 2), (2, 2, 2)),
    "img_size": (16, 16, 16),
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_dim": 48,
}
VARIANTS = {
    "tiny": {},
    "four channels, anisotropic": {
        **{"in_channels": 4, "out_channels": 1, "strides": ((1, 2, 2), (2, 2, 2)), "img_size": (8, 16, 16)},
    },
    "uneven widths, trilinear": {
        **{"features": (6, 10, 14), "depths_down": (2, 1, 3), "depths_up": (3, 1), "interpolation": "trilinear"},
    },
    "no bottleneck, one head": {"bottleneck": False, "deep_supervision": False},
    "dropout, checkpointed": {"dropout": 0.2, "checkpointing": True},
    "added skips": {"skip": "add", "depths_up": (2, 0), "checkpointing": True},
}


@lru_cache
def count(**arguments) -> tuple[int, float, torch.Size]:
    """Parameters, TMAC of one evaluation forward pass of the training patch, and the output's shape; no memory is used."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = TSFM(**arguments).eval()
        shape = network(torch.empty(1, network.in_channels, *network.description["network"]["img_size"])).shape
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops() / 2e12, shape


class TestPaperNetwork:
    def test_has_1_6_billion_parameters(self):
        assert 1.56e9 < count()[0] < 1.64e9

    def test_concatenated_skips_cost_40_million_parameters_and_an_eighth_of_the_arithmetic(self):
        assert count()[0] - count(skip="add")[0] == sum(29 * c**2 + 2 * c for c in (64, 128, 256, 512, 1024))
        assert 1.1 < count()[1] / count(skip="add")[1] < 1.13

    def test_needs_at_most_8_tmac_for_the_papers_patch(self):
        assert 5 < count()[1] <= 8
        assert count()[2] == (1, 31, 112, 160, 192)

    def test_bottleneck_is_vit_base_on_210_tokens(self):
        with torch.device("meta"):
            bottleneck = TSFM().bottleneck
        assert bottleneck.position_embedding.shape == (1, 768, 7, 5, 6)
        layers = sum(p.numel() for layer in bottleneck.layers for p in layer.parameters())
        vit_base_without_qkv_bias = 12 * (12 * 768**2 + 768 + 3072 + 768 + 2 * 2 * 768)
        assert layers == vit_base_without_qkv_bias + 12 * 3 * 768

    def test_down_doubles_and_up_halves_the_channels(self):
        with torch.device("meta"):
            network = TSFM()
        for down, up in zip(network.down, network.up, strict=True):
            assert down.conv1.out_channels == 2 * down.conv1.in_channels
            assert 2 * up.conv.out_channels == up.conv.in_channels


@pytest.mark.parametrize("variant", VARIANTS)
class TestEveryVariant:
    @pytest.fixture
    def network(self, variant):
        torch.manual_seed(0)
        return TSFM(**{**TINY, **VARIANTS[variant]}).eval()

    @pytest.fixture
    def image(self, network):
        return torch.randn(1, network.in_channels, *network.description["network"]["img_size"])

    @torch.no_grad()
    def test_evaluation_gives_one_tensor_of_sane_logits_per_sample_at_any_size_that_divides(self, network, image):
        logits, other = network(image), torch.randn_like(image)
        assert logits.shape == (1, network.description["network"]["out_channels"], *image.shape[2:])
        assert 0.2 < logits.std() < 3 and 0.02 < torch.sigmoid(logits).mean() < 0.4
        both = network(torch.cat([image, other]))  # the samples of a batch do not mix
        torch.testing.assert_close(both, torch.cat([logits, network(other)]), atol=1e-4, rtol=1e-4)
        wider = torch.randn(1, network.in_channels, 24, 8, 32)
        assert network(wider).shape[2:] == (24, 8, 32)

    def test_training_gives_a_list_finest_first_and_a_gradient_to_every_parameter(self, network, image):
        with torch.no_grad():
            expected = network(image)
        outputs = network.train()(torch.cat([image, torch.randn_like(image)]))
        if not network.deep_supervision:
            assert isinstance(outputs, torch.Tensor)
            outputs = [outputs]
        else:
            assert len(outputs) == len(network.up)
        if not network.description["network"]["dropout"]:
            torch.testing.assert_close(outputs[0][:1], expected, atol=1e-4, rtol=1e-4)
        strides = np.cumprod([(1, 1, 1), *network.description["network"]["strides"]], axis=0)
        for logits, stride in zip(outputs, strides, strict=False):
            assert logits.shape[0] == 2
            assert logits.shape[2:] == tuple(np.array(image.shape[2:]) // stride)
        sum((o * torch.randn_like(o)).sum() for o in outputs).backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 1e-6, name

    def test_strict_load_gives_the_same_output_and_the_description_builds_the_same_network(self, network, image):
        network.description["trained_on"] = ["kits21", "größer"]
        buffer = io.BytesIO()
        torch.save(network.state_dict(), buffer)
        buffer.seek(0)
        again = TSFM(**json.loads(json.dumps(network.description["network"]))).eval()
        again.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
        assert torch.equal(again(image), network(image))
        assert again.description == network.description

    def test_counts_on_the_meta_device(self, network, variant):
        parameters, tmac, _ = count(**{**TINY, **VARIANTS[variant]})
        assert parameters == sum(p.numel() for p in network.parameters())
        assert tmac > 0

    @torch.no_grad()
    def test_traces(self, network, image):
        traced = torch.jit.trace(network, image)
        other = torch.randn_like(image)
        torch.testing.assert_close(traced(other), network(other), atol=1e-4, rtol=1e-4)


def test_exports_with_a_dynamic_batch():
    network = TSFM(**TINY).eval()
    image = torch.randn(2, 1, 16, 16, 16)
    batch = torch.export.Dim("batch", min=1, max=8)
    three = torch.randn(3, 1, 16, 16, 16)
    with torch.no_grad():
        exported = torch.export.export(network, (image,), dynamic_shapes={"x": {0: batch}})
    torch.testing.assert_close(exported.module()(three), network(three), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
def test_compiles():
    from torch._inductor import config

    network = TSFM(
        **{
            **TINY,
            "features": (4, 8),
            "depths_down": (1, 1),
            "depths_up": (1,),
            "strides": ((2, 2, 2),),
            "num_layers": 1,
        }
    )
    image = torch.randn(1, 1, 16, 16, 16)
    # here, not in a pool of processes, and without trying out vector instructions: half a minute less
    with torch.no_grad(), config.patch({"compile_threads": 1, "cpp.vec_isa_ok": False}):
        expected = network.eval()(image)
        torch.testing.assert_close(torch.compile(network, backend="inductor")(image), expected, atol=1e-4, rtol=1e-4)


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = TSFM(**{**TINY, "dropout": 0.3}, checkpointing=checkpointing).train()
        sum(o.square().mean() for o in network(torch.randn(2, 1, 16, 16, 16))).backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_checkpointing_keeps_fewer_activations():
    saved = []
    for checkpointing in (False, True):
        network = TSFM(**TINY, checkpointing=checkpointing).train()
        held = {}

        def pack(tensor, held=held):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network(torch.randn(1, 1, 32, 32, 32))
        saved.append(sum(held.values()))
    assert saved[1] < 0.6 * saved[0]


def test_dropout_acts_in_training_only():
    network = TSFM(**{**TINY, "dropout": 0.5})
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(network.eval()(image), network.eval()(image))
        assert not torch.equal(network.train()(image)[0], network.train()(image)[0])


def test_bottleneck_can_be_the_identity():
    network = TSFM(**TINY, bottleneck=False)
    assert isinstance(network.bottleneck, nn.Identity)
    assert not any("bottleneck" in name for name in network.state_dict())


def test_an_unknown_skip_and_levels_without_a_block_to_take_a_concatenated_one_are_refused():
    for change, said in (
        ({"skip": "sum"}, "skip is 'sum'"),
        ({"skip": "concat", "depths_up": (1, 0)}, r"depths_up is \(1, 0\)"),
    ):
        with pytest.raises(ValueError, match=said):
            TSFM(**{**TINY, **change})


class TestSizes:
    @pytest.mark.parametrize(
        ("size", "message"),
        [
            ((18, 16, 16), r"axis 0 \(S\) has 18 voxels.*16 or 20 would fit"),
            ((16, 2, 16), r"axis 1 \(P\) has 2 voxels.*4 would fit"),
            ((16, 16, 15), r"axis 2 \(L\) has 15 voxels.*12 or 16 would fit"),
            ((4, 4, 4), r"single voxel.*\(4, 4, 8\)"),
        ],
    )
    def test_that_do_not_fit_are_named(self, size, message):
        with pytest.raises(ValueError, match=message):
            TSFM(**TINY)(torch.zeros(1, 1, *size))
        with pytest.raises(ValueError, match=message):
            TSFM(**{**TINY, "img_size": size})

    def test_wrong_channels_or_dimensions_are_named(self):
        for shape in ((1, 2, 16, 16, 16), (1, 16, 16, 16)):
            with pytest.raises(ValueError, match="set in_channels"):
                TSFM(**TINY)(torch.zeros(shape))

    @pytest.mark.parametrize("change", [{"depths_down": (1, 1)}, {"depths_up": (1, 1, 1)}, {"strides": ((2, 2, 2),)}])
    def test_lists_that_do_not_fit_are_named(self, change):
        with pytest.raises(ValueError, match=next(iter(change))):
            TSFM(**{**TINY, **change})


class TestBlocks:
    """Each block against its definition in float64."""

    # bfloat16 parameters go with bfloat16 input
    @pytest.mark.parametrize(
        "dtype, parameters",
        [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    )
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
    def test_norm_act(self, dtype, parameters, layout):
        for batch, grad in itertools.product([1, 2], [False, True]):
            self.check_norm_act(batch, dtype, layout, grad, parameters)

    def check_norm_act(self, batch, dtype, layout, grad, parameters):
        norm = NormAct(5).to(parameters)
        norm.weight.data, norm.bias.data = (torch.rand(5) + 0.5).to(parameters), torch.randn(5).to(parameters)
        # A mean far from zero: statistics in bfloat16 would lose everything.
        x = (torch.randn(batch, 5, 6, 7, 8) * 0.5 + 20).to(dtype).contiguous(memory_format=layout)
        x64 = x.double()
        mean, variance = x64.mean((2, 3, 4), keepdim=True), x64.var((2, 3, 4), keepdim=True, correction=0)
        expected = (x64 - mean) / (variance + 1e-5).sqrt() * norm.weight.view(-1, 1, 1, 1) + norm.bias.view(-1, 1, 1, 1)
        expected = torch.where(expected > 0, expected, 0.01 * expected)
        before = x.clone()
        with torch.set_grad_enabled(grad):
            output = norm(x)
        assert output.dtype == dtype
        assert torch.equal(x, before), "the input must not be overwritten"
        tolerance = 1e-4 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(output.double(), expected.double(), atol=tolerance, rtol=tolerance)

    def test_resblock_is_two_preactivated_convolutions_plus_the_input(self):
        block = ResBlock(4, 4).double()
        x = torch.randn(2, 4, 6, 6, 6, dtype=torch.float64)
        y = x
        for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
            y = F.instance_norm(y, weight=norm.weight, bias=norm.bias)
            y = F.conv3d(F.leaky_relu(y, 0.01), conv.weight, padding=1)
        torch.testing.assert_close(block(x), x + y)

    @pytest.mark.parametrize("interpolation", ["nearest", "trilinear"])
    @pytest.mark.parametrize("kind", ["add", "concat"])
    def test_up_is_interpolation_then_convolution_and_the_skip(self, interpolation, kind):
        up = Up(8, 4, (1, 2, 2), interpolation, kind).double()
        x, skip = torch.randn(2, 8, 3, 4, 5, dtype=torch.float64), torch.randn(2, 4, 3, 8, 10, dtype=torch.float64)
        larger = up.conv(F.interpolate(x, scale_factor=(1, 2, 2), mode=interpolation))
        expected = skip + larger if kind == "add" else torch.cat([skip, larger], 1)
        before = skip.clone()
        torch.testing.assert_close(up(x, skip), expected)
        with torch.no_grad():
            torch.testing.assert_close(up(x, skip.clone()), expected)
        assert torch.equal(skip, before)

    def test_head_starts_at_the_initial_probability(self):
        head = Head(8, 3)
        head.conv.weight.data.zero_()
        assert torch.allclose(torch.sigmoid(head(torch.randn(1, 8, 4, 4, 4))), torch.tensor(0.1))

    def test_bottleneck_adds_to_its_input(self):
        block = TransformerBottleneck(8, (2, 2, 2), 12, 1, 2, 24, 0.0)
        block.project_out.weight.data.zero_()
        x = torch.randn(1, 8, 2, 2, 2)
        assert torch.equal(block(x), x)


class TestPositionEmbedding:
    def test_same_grid_is_exact(self):
        embedding = torch.randn(1, 6, 2, 3, 4)
        assert interpolate_positions(embedding, (2, 3, 4)) is embedding

    def test_a_linear_ramp_stays_a_ramp(self):
        ramp = torch.arange(4.0).view(1, 1, 4, 1, 1)
        fine = interpolate_positions(ramp, (8, 1, 1)).flatten()
        assert torch.allclose(fine, (torch.arange(8) * 0.5 - 0.25).clamp(0, 3))

    def test_tells_the_positions_apart(self):
        block = TransformerBottleneck(8, (2, 2, 2), 12, 1, 2, 24, 0.0).eval()
        x = torch.randn(1, 8, 2, 2, 2)
        flipped = block(x.flip(2)).flip(2)
        assert not torch.allclose(block(x), flipped, atol=1e-4)
        block.position_embedding.data.zero_()
        assert torch.allclose(block(x), block(x.flip(2)).flip(2), atol=1e-5)


class TestPrecisionAndLayout:
    def reference(self):
        torch.manual_seed(0)
        network, image = TSFM(**TINY).eval(), torch.randn(1, 1, 16, 16, 16)
        with torch.no_grad():
            return network, image, network(image)

    def test_channels_last(self):
        network, image, expected = self.reference()
        network = network.to(memory_format=torch.channels_last_3d)
        with torch.no_grad():
            output = network(image.contiguous(memory_format=torch.channels_last_3d))
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("whole", [False, True])
    def test_bfloat16(self, whole):
        network, image, expected = self.reference()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not whole):
            output = network.bfloat16()(image.bfloat16()) if whole else network(image)
        assert output.dtype == torch.bfloat16
        assert (output.float() - expected).abs().mean() < 0.1 * expected.std()

    def test_autocast_trains(self):
        network, image, _ = self.reference()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = network.train()(image)
        sum(o.float().square().mean() for o in outputs).backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in network.parameters())


class TestDescription:
    def test_travels_in_safetensors(self, tmp_path):
        safetensors = pytest.importorskip("safetensors.torch")
        network = TSFM(**TINY)
        network.description["epoch"] = 7
        path = tmp_path / "model.safetensors"
        safetensors.save_file(network.state_dict(), path)
        again = TSFM(**TINY)
        again.load_state_dict(safetensors.load_file(path), strict=True)
        assert again.description["epoch"] == 7

    def test_the_networks_own_arguments_stay(self):
        trained, other = TSFM(**TINY), TSFM(**{**TINY, "checkpointing": True})
        trained.description["targets"] = {"liver": {}}
        other.load_state_dict(trained.state_dict())
        assert other.description["targets"] == {"liver": {}}
        assert other.description["network"]["checkpointing"] is True

    def test_weights_without_it_load(self):
        network = TSFM(**TINY)
        state = {k: v for k, v in network.state_dict().items() if k != "_extra_state"}
        assert network.load_state_dict(state, strict=False).missing_keys == ["_extra_state"]

    def test_its_tensor_is_json(self):
        state = TSFM(**TINY).state_dict()["_extra_state"]
        assert state.dtype == torch.uint8
        assert json.loads(bytes(state.tolist()))["network"]["features"] == [8, 16, 32]

    def test_distributed_training_finds_no_unused_parameter(self, tmp_path):
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            parallel = nn.parallel.DistributedDataParallel(TSFM(**TINY).train())
            for _ in range(2):  # the second pass fails when the first left a parameter without a gradient
                sum(o.mean() for o in parallel(torch.randn(1, 1, 16, 16, 16))).backward()
            again = TSFM(**TINY)
            again.load_state_dict(parallel.module.state_dict(), strict=True)
        finally:
            torch.distributed.destroy_process_group()
        assert "module._extra_state" in parallel.state_dict()
