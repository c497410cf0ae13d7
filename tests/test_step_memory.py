"""The memory of a training step, known beforehand, and what is decided by it."""

import pytest
import torch
import tsfm.training.step_memory
from torch import nn
from tsfm.network.networks import create_network
from tsfm.network.tsfm_net import TSFM
from tsfm.preparation.parallel import available_workers
from tsfm.training.step_memory import fit_memory, peak_bytes, walk

TINY = {
    "out_channels": 3, "features": (8, 16, 32), "depths_down": (1, 1, 1), "depths_up": (1, 1),
    "strides": ((2, 2, 2), (2, 2, 2)), "img_size": (16, 32, 32), "hidden_size": 24, "num_layers": 1, "num_heads": 2,
    "mlp_dim": 48,
}  # fmt: skip
PATCH = (16, 32, 32)


def test_two_convolutions_hold_what_one_counts_by_hand():
    """Kept: the input, the first output (the second needs it) and the second output with its gradient."""
    network = nn.Sequential(nn.Conv3d(1, 4, 1, bias=False), nn.Conv3d(4, 8, 1, bias=False))
    steps = walk(network, 1, (4, 8, 8), batch_size=2, checkpointing=False, half=False)
    voxels = 2 * 4 * 8 * 8
    forward = max(moment.activations for moment in steps.moments if moment.forward)
    assert (steps.weights, forward) == (36, 4 * voxels * (1 + 4 + 8))
    backward = max(moment.activations for moment in steps.moments)
    assert backward >= 4 * voxels * (1 + 4 + 8 + 8 + 4)  # both gradients, that of the weights comes on top
    assert backward <= 4 * voxels * (1 + 4 + 8 + 8 + 4) + 4 * 36
    assert steps.moments[-1].done == 36


def test_the_walk_sees_what_a_real_step_keeps():
    """Bytes of all tensors that autograd saves in a real forward pass, on the CPU in float32."""
    network = TSFM(**TINY).train()
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    image = torch.randn(1, 1, *PATCH)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = network(image)
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    real = sum(size for pointer, size in saved.items() if pointer not in weights)
    real += sum(output.nbytes for output in outputs)
    steps = walk(network, 1, PATCH, 1, checkpointing=False, half=False)
    last = [moment.activations for moment in steps.moments if moment.forward][-1]
    assert last == pytest.approx(real, rel=0.1)


def test_recomputing_halves_and_sharding_divide():
    network = TSFM(**TINY)
    kept, recomputed = (walk(network, 1, PATCH, 2, choice, True) for choice in (False, True))
    assert peak_bytes(recomputed, True) < 0.8 * peak_bytes(kept, False)
    assert all(p.device.type == "cpu" for p in network.parameters()) and not network.checkpointing
    held = 12 * kept.weights
    assert peak_bytes(kept, False, processes=2) > peak_bytes(kept, False)
    assert peak_bytes(kept, False, processes=8, sharded=True) < peak_bytes(kept, False)
    assert peak_bytes(recomputed, True, fused=False) >= held + 4 * kept.weights


@pytest.mark.parametrize("name", ["swinunetr", "nnunet"])
def test_a_sharded_network_of_any_kind_is_walked_as_the_whole_one(name, monkeypatch):
    pytest.importorskip({"nnunet": "dynamic_network_architectures"}.get(name, "monai"))
    options = {"feature_size": 12} if name == "swinunetr" else {"features": [4, 8], "strides": [[2, 2, 2]]}
    network = create_network(name, in_channels=2, out_channels=3, img_size=[32, 32, 64], **options)
    whole = walk(network, 2, (32, 32, 64), 1, checkpointing=False, half=True)
    monkeypatch.setattr(tsfm.training.step_memory, "is_sharded", lambda network: True)
    sharded = walk(network, 2, (32, 32, 64), 1, checkpointing=False, half=True)
    last = whole.moments[-1]
    assert sharded[1:] == whole[1:] and sharded.moments[-1].done == last.done
    assert max(sharded.moments) == pytest.approx(max(whole.moments), rel=0.01)
    assert whole.largest == whole.weights, "nothing in it is gathered alone"


@pytest.mark.parametrize(("share", "expected"), [(1.5, False), (0.9, True)])
def test_auto_recomputes_where_a_step_would_not_fit_without(monkeypatch, share, expected):
    network = TSFM(**TINY)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    needed = fit_memory(network, optimizer, PATCH, 2, False, amp=False)["gb"] * 1e9
    steps = walk(network, 1, PATCH, 2, False, False)
    needed = peak_bytes(steps, False, amp=False, fused=False)
    monkeypatch.setattr(tsfm.training.step_memory, "device_bytes", lambda device: int(share * needed))
    found = fit_memory(network, optimizer, PATCH, 2, "auto", amp=False)
    assert found["checkpointing"] is network.checkpointing is network.bottleneck.checkpointing is expected


def test_a_step_that_cannot_fit_is_refused_with_advice(monkeypatch):
    network = TSFM(**TINY)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    monkeypatch.setattr(tsfm.training.step_memory, "device_bytes", lambda device: 1_000_000)
    with pytest.raises(
        ValueError, match=r"needs about [\d.]+ MB, cpu has 1 MB.*--param_dtype bfloat16.*fsdp_train.json"
    ):
        fit_memory(network, optimizer, PATCH, 2, "auto")
    with pytest.raises(ValueError, match="expected true, false or 'auto'"):
        fit_memory(network, optimizer, PATCH, 2, "always")


def test_the_network_compiles_whole_and_computes_the_same():
    """No graph breaks: fullgraph raises at the first. In float64, since the two normalize in another order."""
    torch.manual_seed(0)
    network, image = TSFM(**TINY).double().train(), torch.randn(1, 1, *PATCH, dtype=torch.float64)
    results = []
    for compiled in (False, True):
        run = torch.compile(network, fullgraph=True, backend="aot_eager") if compiled else network
        network.zero_grad()
        outputs = run(image)
        sum(output.square().mean() for output in outputs).backward()
        results.append([*outputs, *(p.grad.clone() for p in network.parameters())])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


def test_workers_are_shared_among_the_processes_of_one_machine(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert available_workers() == 8
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert available_workers() == 12


@pytest.mark.parametrize("name", ["nnunet", "swinunetr", "stunet"])
def test_the_baselines_recompute_too_where_a_step_would_not_fit(name, monkeypatch):
    pytest.importorskip({"nnunet": "dynamic_network_architectures", "stunet": "medim"}.get(name, "monai"))
    tiny = {"features": [4, 8, 12], "strides": [[2, 2, 2]] * 2, "feature_size": 12, "out_channels": 2}
    network = create_network(name, img_size=[32, 32, 64], **tiny)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    kept, recomputed = (walk(network, 1, (32, 32, 64), 1, choice, False) for choice in (False, True))
    sizes = [peak_bytes(steps, choice, amp=False) for steps, choice in ((kept, False), (recomputed, True))]
    assert sizes[1] < sizes[0]
    for room, expected in ((10 * sizes[0], False), ((sizes[0] + sizes[1]) / 2 / 0.9, True)):
        monkeypatch.setattr(tsfm.training.step_memory, "device_bytes", lambda device, room=room: room)
        found = fit_memory(network, optimizer, (32, 32, 64), 1, "auto", amp=False)
        switches = [
            getattr(m, s) for m in network.modules() for s in ("checkpointing", "use_checkpoint") if hasattr(m, s)
        ]
        assert found["checkpointing"] is expected and switches and set(switches) == {expected}
