"""Networks of any make keep channels_last within the block, with the same numbers, and are themselves again after it."""

import copy

import pytest
import torch
from conftest import logits_of
from monai.networks.nets import BasicUNet, DynUNet
from torch import nn
from tsfm.inference.windows import SlabInferer
from tsfm.network.cpu import channels_last, instance_norm

pytestmark = pytest.mark.convolutions

LAYOUT = torch.channels_last_3d
NETWORKS = {
    "BasicUNet": lambda: BasicUNet(3, 1, 4, features=(8, 8, 16, 16, 32, 8)),
    "DynUNet": lambda: DynUNet(3, 1, 4, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 32], res_block=True),
    "without affine parameters": lambda: nn.Sequential(nn.Conv3d(1, 8, 3), nn.InstanceNorm3d(8), nn.Conv3d(8, 4, 3)),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    return NETWORKS[request.param]().eval()


def window(batch=1):
    return torch.randn(batch, 1, 16, 32, 32).contiguous(memory_format=LAYOUT)


def lies_channels_last(x):
    return x.is_contiguous(memory_format=LAYOUT) or x.shape[1] == 1


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_every_convolution_sees_channels_last_and_the_numbers_stay(network, batch):
    x, seen = window(batch), []
    expected = network(x)
    for module in network.modules():
        if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
            module.register_forward_pre_hook(lambda _, args: seen.append(lies_channels_last(args[0])))
    with channels_last(network):
        found = network(x)
    assert seen and all(seen)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_afterwards_the_network_is_itself_also_after_an_error(network):
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(KeyError), channels_last(network), channels_last(network):
        raise KeyError
    assert not any("forward" in module.__dict__ for module in network.modules())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_where_gradients_are_needed_nothing_changes(network):
    with channels_last(network):
        network(window()).sum().backward()
        assert not any("forward" in module.__dict__ for module in network.modules())
    assert all(weights.grad is not None for weights in network.parameters())


@torch.no_grad()
def test_running_statistics_and_what_is_no_module_are_left_alone():
    norm = nn.InstanceNorm3d(8, track_running_stats=True).eval()
    x = torch.randn(1, 8, 4, 4, 4).contiguous(memory_format=LAYOUT)
    expected = norm(x)
    with channels_last(norm), channels_last(lambda windows: windows):
        assert torch.equal(norm(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
@torch.no_grad()
def test_normalization_is_that_of_numpy_in_double_precision(dtype, affine):
    x = (torch.randn(2, 3, 4, 5, 6) * 3 + 7).to(dtype).contiguous(memory_format=LAYOUT)
    weight, bias = (torch.randn(3, dtype=dtype), torch.randn(3, dtype=dtype)) if affine else (None, None)
    exact = x.double().numpy()
    exact = exact - exact.mean((2, 3, 4), keepdims=True)
    exact /= (exact.var((2, 3, 4), keepdims=True) + 1e-5) ** 0.5
    if affine:
        exact = exact * weight.double().numpy().reshape(3, 1, 1, 1) + bias.double().numpy().reshape(3, 1, 1, 1)
    y = instance_norm(x, weight, bias, 1e-5)
    assert y.dtype == dtype and y.is_contiguous(memory_format=LAYOUT)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(y.double(), torch.from_numpy(exact), rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_normalization_of_a_million_voxels_far_from_zero_is_still_exact():
    """One float32 that adds them all up puts the mean a standard deviation beside its place."""
    x = (torch.randn(1, 2, 64, 128, 128) + 99).contiguous(memory_format=LAYOUT)
    exact = x.double()
    exact = (exact - exact.mean((2, 3, 4), keepdim=True)) / exact.std((2, 3, 4), correction=0, keepdim=True)
    torch.testing.assert_close(instance_norm(x, None, None, 1e-5).double(), exact, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_normalization_is_its_slope(monkeypatch):
    monkeypatch.setattr("tsfm.network.cpu.BLOCK_ROWS", 7)
    x = (torch.randn(2, 3, 2, 3, 4, dtype=torch.float64) + 2).contiguous(memory_format=LAYOUT).requires_grad_()
    scale = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, scale: instance_norm(x, *scale, 1e-5), (x, scale))


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
def test_the_inferer_gives_the_same_label_map_in_either_layout(amp):
    """In bfloat16 (where the processor has it), but for voxels whose logit is 0 up to rounding."""
    torch.manual_seed(0)
    network, image = NETWORKS["BasicUNet"]().eval(), torch.randn(1, 1, 40, 48, 40)
    inferer = SlabInferer((32, 32, 32), ["a", "b", "c", "d"], activation="regions", amp=amp, progress=False)
    as_it_is = lambda windows: network(windows.contiguous())  # noqa: E731
    maps = [inferer(image, one) for one in (as_it_is, network)]
    assert maps[0].unique().numel() > 2
    differs = maps[0] != maps[1]
    if amp:
        logits = logits_of(inferer, image, network)
        differs &= logits.abs().amin(1, keepdim=True) > torch.finfo(torch.bfloat16).eps * logits.abs().max()
    assert differs.float().mean() < 1e-4
