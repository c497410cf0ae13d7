"""PartialLabelLoss against a plain float64 reference, alone and over two processes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tsfm.network.loss
from monai.losses import DeepSupervisionLoss, DiceCELoss, DiceLoss, FocalLoss
from tsfm.network.loss import PartialLabelLoss, PerTarget, level_weights, on_targets
from tsfm.preparation.parallel import _context

# Codes 0-2: data set A (background, target 0, targets 0 and 1), annotates targets 0 and 1; code 3: an ignored id of A.
# Codes 4-6: data set B (background, target 1, target 2), annotates 1 and 2. Target 3 is annotated by code 7 alone.
TABLE = SimpleNamespace(
    targets=np.array(
        [[0, 0, -1, -1], [1, 0, -1, -1], [1, 1, -1, -1], [-1, -1, -1, -1],
         [-1, 0, 0, -1], [-1, 1, 0, -1], [-1, 0, 1, -1], [0, 0, 0, 1]], np.int8,
    )
)  # fmt: skip
A, A_WITH_IGNORED, B, C = [0, 1, 2], [0, 1, 2, 3], [4, 5, 6], [7]


def reference(logits, codes, reduction="sum"):
    """One level: the definition of the loss, one voxel mask at a time, differentiable by autograd."""
    rows = torch.as_tensor(TABLE.targets)[codes[:, 0].long()].movedim(-1, 1)  # (B, T, *spatial)
    keep, truth, p = rows >= 0, (rows == 1).to(logits), logits.sigmoid()
    pairs = [(b, t) for b in range(len(logits)) for t in range(logits.shape[1]) if keep[b, t].any()]
    bce = [F.binary_cross_entropy_with_logits(logits[b, t][keep[b, t]], truth[b, t][keep[b, t]]) for b, t in pairs]
    dice = []
    for t in sorted({t for _, t in pairs}):
        q, y = p[:, t][keep[:, t]], truth[:, t][keep[:, t]]
        dice.append(-2 * (q * y).sum() / (q.sum() + y.sum()).clamp(min=1e-7))
    if reduction == "mean":
        return sum(bce) / len(bce) + sum(dice) / len(dice)
    return sum(bce) + sum(dice)


def batch(samples, shape=(5, 6, 7), seed=0, dtype=torch.float64):
    """Logits (B, T, *shape) and codes (B, 1, *shape); `samples` lists the codes each sample may hold."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(len(samples), 4, *shape, generator=generator, dtype=torch.float64)
    codes = torch.stack([torch.tensor(s)[torch.randint(len(s), (1, *shape), generator=generator)] for s in samples])
    return logits.to(dtype).requires_grad_(), codes


@pytest.fixture(params=[17, 1 << 20], ids=["small blocks", "one block"])
def block(request, monkeypatch):
    monkeypatch.setitem(tsfm.network.loss.BLOCK_VOXELS, "cpu", request.param)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("samples", [[A], [A, B], [A_WITH_IGNORED, B, A], [B, C], [[2]], [A + B + C + [3]]], ids=str)
def test_value_and_gradient_equal_the_reference(samples, reduction, block):
    for seed in range(3):
        logits, codes = batch(samples, seed=seed)
        expected = reference(logits, codes, reduction)
        (expected_grad,) = torch.autograd.grad(expected, logits)
        loss = PartialLabelLoss(TABLE, reduction=reduction)(logits, codes)
        (grad,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("code_dtype", [torch.uint8, torch.uint16, torch.int32, torch.float32])
def test_low_precision_follows_the_reference_and_codes_come_in_any_type(dtype, tolerance, code_dtype):
    logits, codes = batch([A, B], dtype=dtype)
    exact = logits.detach().double().requires_grad_()
    (expected_grad,) = torch.autograd.grad(reference(exact, codes), exact)
    loss = PartialLabelLoss(TABLE)(logits, codes.to(code_dtype))
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(loss.double(), reference(exact, codes), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=tolerance, atol=1e-6)


def test_gradcheck():
    logits, codes = batch([A_WITH_IGNORED, B], shape=(2, 3, 2))
    assert torch.autograd.gradcheck(lambda x: PartialLabelLoss(TABLE)(x, codes), (logits,))


def test_targets_and_voxels_without_annotation_get_exactly_zero_gradient():
    logits, codes = batch([A_WITH_IGNORED, B])
    with torch.no_grad():
        logits[0, 2:], logits[1, 0], logits[:, 3] = float("nan"), float("inf"), float("nan")  # may not leak either
        logits[0, :2][(codes[0] == 3).expand(2, -1, -1, -1)] = float("nan")
    loss = PartialLabelLoss(TABLE)(logits, codes)
    (grad,) = torch.autograd.grad(loss, logits)
    keep = (torch.as_tensor(TABLE.targets)[codes[:, 0]] >= 0).movedim(-1, 1)
    assert loss.isfinite()
    assert (grad[~keep] == 0).all()
    assert (grad[keep] != 0).all()


def test_a_batch_without_any_annotation_gives_zero():
    logits, codes = batch([[3]])
    loss = PartialLabelLoss(TABLE, reduction="mean")(logits, codes)
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def test_padding_with_the_background_code_counts_as_not_the_target():
    logits, codes = batch([A])
    padded = F.pad(codes, (0, 4), value=0)
    far = F.pad(logits, (0, 4), value=-1e4)
    (grad,) = torch.autograd.grad(PartialLabelLoss(TABLE)(far, padded), far)
    assert (grad[..., -4:] == 0).all()
    (grad,) = torch.autograd.grad(PartialLabelLoss(TABLE)(-far, padded), far)
    assert (grad[0, :2, ..., -4:] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("samples", [[[0], [4]], [[2], [5]], [A, B]], ids=["empty", "full", "mixed"])
def test_finite_for_empty_full_and_huge(dtype, value, samples):
    logits, codes = batch(samples)
    logits = torch.full_like(logits, value, dtype=dtype).requires_grad_()
    loss = PartialLabelLoss(TABLE)(logits, codes)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    torch.testing.assert_close(loss.double(), reference(logits.detach().double(), codes), rtol=1e-5, atol=1e-6)


def test_deep_supervision_weights_are_those_of_multitalent():
    assert level_weights(5) == pytest.approx((8 / 15, 4 / 15, 2 / 15, 1 / 15, 0))
    assert level_weights(1) == (1.0,)


def test_levels_see_the_codes_of_the_nearest_voxel_and_the_lowest_gets_zeros():
    logits, codes = batch([A, B], shape=(8, 12, 6))
    levels = [logits] + [batch([A, B], shape=s, seed=1)[0] for s in [(4, 6, 6), (3, 4, 2), (2, 2, 1)]]
    expected = 0
    for weight, level in zip(level_weights(4)[:3], levels, strict=False):
        small = F.interpolate(codes.double(), level.shape[2:], mode="nearest-exact").long()
        expected = expected + weight * reference(level, small)
    expected_grads = torch.autograd.grad(expected, levels[:3])
    loss = PartialLabelLoss(TABLE)(levels, codes)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for level, grad in zip(levels[:3], expected_grads, strict=True):
        torch.testing.assert_close(level.grad, grad)
    assert (levels[3].grad == 0).all()


def test_metatensors_and_other_memory_formats_change_nothing():
    from monai.data import MetaTensor

    logits, codes = batch([A, B])
    strided = logits.detach().contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    permuted = logits.detach().transpose(2, 4).contiguous().transpose(2, 4).requires_grad_()
    plain = PartialLabelLoss(TABLE)(logits, codes)
    meta = PartialLabelLoss(TABLE)(MetaTensor(strided), MetaTensor(codes))
    assert type(meta) is torch.Tensor and meta == plain
    (grad,) = torch.autograd.grad(meta, strided)
    expected = torch.autograd.grad(plain, logits)[0]
    torch.testing.assert_close(grad, expected)
    assert grad.is_contiguous(memory_format=torch.channels_last_3d)  # else the head's backward pass copies it
    torch.testing.assert_close(torch.autograd.grad(PartialLabelLoss(TABLE)(permuted, codes), permuted)[0], expected)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, c: (x, c + 8), "codes 0 to 7"),
        (lambda x, c: (x, c - 8), "code -8"),
        (lambda x, c: (x[:, :3], c), "4 targets"),
        (lambda x, c: (x, c[:, 0]), "expected codes"),
        (lambda x, c: (x[:1], c), "expected codes"),
    ],
)
def test_what_does_not_fit_is_an_error(change, message):
    logits, codes = batch([A, B])
    with pytest.raises(ValueError, match=message):
        PartialLabelLoss(TABLE)(*change(logits, codes))


def test_wrong_settings_are_errors():
    with pytest.raises(ValueError, match="expected 'sum' or 'mean'"):
        PartialLabelLoss(TABLE, reduction="max")
    logits, codes = batch([A])
    with pytest.raises(ValueError, match="2 levels of logits but 3"):
        PartialLabelLoss(TABLE, weights=(1, 1, 0))([logits, logits], codes)


def test_the_label_table_fits():
    from tsfm.labels import LabelTable

    table = LabelTable(
        {"kidney": {}, "kidney_tumor": {"inside": "kidney"}, "liver": {}},
        [{"name": "kits", "labels": {"1": "kidney", "2": "kidney_tumor"}}, {"name": "lits", "labels": {"1": "liver"}}],
    )
    codes = torch.full((1, 1, 2, 2, 2), table.offset("kits") + table.local_ids("kits").index(2))
    logits = torch.full((1, 3, 2, 2, 2), 2.0).requires_grad_()
    PartialLabelLoss(table)(logits, codes).backward()
    assert (logits.grad[0, :2] < 0).all()  # a tumor voxel is kidney too: both logits have to rise
    assert (logits.grad[0, 2] == 0).all()


class TinyNet(torch.nn.Module):
    """Two heads on shared features, so that a level of weight 0 has parameters of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = torch.nn.Conv3d(1, 3, 3, padding=1)
        self.heads = torch.nn.ModuleList([torch.nn.Conv3d(3, 4, 1), torch.nn.Conv3d(3, 4, 1)])

    def forward(self, x):
        features = self.stem(x).tanh()
        return [self.heads[0](features), self.heads[1](features[..., ::2, ::2, ::2])]


def training_step(network, images, codes, reduction):
    loss = PartialLabelLoss(TABLE, reduction=reduction)(network(images), codes)
    loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in network.parameters()]


def two_process_data(case):
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 1, 4, 6, 4, generator=generator, dtype=torch.float64)
    samples = {"same": [A, A], "different": [A, B], "nothing on one": [[3], B]}[case]
    return images, batch(samples, shape=(4, 6, 4))[1]


CASES = [("same", "sum"), ("different", "sum"), ("different", "mean"), ("nothing on one", "mean")]


def worker(rank, meeting, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    mine = slice(rank, rank + 1)
    results = []
    for case, reduction in CASES:
        network = torch.nn.parallel.DistributedDataParallel(TinyNet().double())  # unused parameters would be an error
        images, codes = two_process_data(case)
        for _ in range(2):  # DDP reports unused parameters at the second step
            network.zero_grad()
            value, grads = training_step(network, images[mine], codes[mine], reduction)
        if rank == 0:  # validation exchanges nothing: one process alone may call it
            with torch.no_grad():
                PartialLabelLoss(TABLE)(network.module(images[mine]), codes[mine])
        results.append((value, [grad.numpy() for grad in grads]))
    queue.put(results)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two gloo processes found for every case."""
    meeting = tmp_path_factory.mktemp("meeting") / "file"
    context = _context()  # a fork of a process that has run autograd or OpenMP may hang
    queue = context.Queue()
    processes = [context.Process(target=worker, args=(rank, meeting, queue), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=300) for _ in processes]
    for process in processes:
        process.join(30)
    return results


@pytest.mark.parametrize("index", range(len(CASES)), ids=[" ".join(case) for case in CASES])
def test_two_processes_equal_one_with_the_doubled_batch(two_processes, index):
    case, reduction = CASES[index]
    value, grads = training_step(TinyNet().double(), *two_process_data(case), reduction)
    for results in two_processes:
        their_value, their_grads = results[index]
        assert their_value == pytest.approx(value, rel=1e-12)
        for theirs, expected in zip(their_grads, grads, strict=True):
            np.testing.assert_allclose(theirs, expected.numpy(), rtol=1e-10, atol=1e-14)


def per_target(logits, codes, loss):
    """A loss of MONAI, target by target, of whole samples that annotate it."""
    rows = torch.as_tensor(TABLE.targets)[codes[:, 0].long()].movedim(-1, 1)
    values = []
    for t in range(rows.shape[1]):
        known = [b for b in range(len(rows)) if (rows[b, t] >= 0).any()]
        if known:
            values.append(loss(logits[known, t : t + 1], (rows[known, t : t + 1] == 1).to(logits)))
    return sum(values) / len(values)


@pytest.mark.parametrize("loss", [DiceCELoss(sigmoid=True, lambda_ce=0.3), FocalLoss(), torch.nn.BCEWithLogitsLoss()])
def test_a_loss_of_monai_is_computed_target_by_target_where_it_is_annotated(loss):
    logits, codes = batch([A, B, A])
    found, expected = on_targets(loss, TABLE)(logits, codes), per_target(logits, codes, loss)
    torch.testing.assert_close(found, expected)
    (grad,), (expected,) = torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(grad, expected)
    assert (grad[0, 2:] == 0).all() and (grad[1, 0] == 0).all() and (grad[:, 3] == 0).all()


def test_single_voxels_without_annotation_teach_a_loss_of_monai_nothing():
    logits, codes = batch([A_WITH_IGNORED])
    loss = on_targets(DiceLoss(sigmoid=True), TABLE)
    (grad,) = torch.autograd.grad(loss(logits, codes), logits)
    ignored = (codes[0, 0] == 3).expand(4, -1, -1, -1)
    assert ignored.any() and (grad[0][ignored] == 0).all()
    kept = torch.where(codes == 3, 0, codes)  # the same where these voxels are surely background
    far = torch.where((codes == 3).expand_as(logits), -1e4, logits.detach())
    torch.testing.assert_close(loss(logits, codes), loss(far, kept))
    assert on_targets(DiceLoss(sigmoid=True), TABLE)(logits, torch.full_like(codes, 3)) == 0


def test_levels_of_a_loss_of_monai_are_weighted_as_those_of_our_own():
    fine, codes = batch([A, B], shape=(4, 8, 8))
    coarse, coarsest = (fine[..., ::step, ::step, ::step].clone() for step in (2, 4))
    loss = DiceCELoss(sigmoid=True)
    alone = on_targets(loss, TABLE)
    picked = codes[..., 1::2, 1::2, 1::2]  # the nearest voxel centers
    expected = (2 * alone(fine, codes) + alone(coarse, picked)) / 3
    torch.testing.assert_close(alone([fine, coarse, coarsest], codes), expected)
    given = PerTarget(loss, TABLE, weights=[0.5, 0.5, 0])
    torch.testing.assert_close(given([fine, coarse, coarsest], codes), (alone(fine, codes) + alone(coarse, picked)) / 2)


def test_losses_that_would_compute_something_else_are_refused_and_our_own_stay_as_they_are():
    for wrong, word in (
        (DiceCELoss(softmax=True), "softmax"), (DiceLoss(), "sigmoid"), (DiceCELoss(to_onehot_y=True, sigmoid=True), "to_onehot_y"),
        (DeepSupervisionLoss(DiceCELoss(sigmoid=True)), "weights"), (torch.nn.CrossEntropyLoss(), "always 0 of a single channel"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            on_targets(wrong, TABLE)
    own = PartialLabelLoss(TABLE)
    assert on_targets(own, TABLE) is own
