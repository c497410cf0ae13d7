"""Pooled Dice, surface Dice and lesion detection against loops, MONAI and SimpleITK."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.engines import SupervisedEvaluator
from monai.handlers import from_engine
from monai.metrics import compute_surface_dice
from tsfm.evaluation.metrics import lesions, surface_dice
from tsfm.labels import LabelTable
from tsfm.preparation.parallel import _context
from tsfm.training.pooled_dice import PooledDice

TARGETS = {
    "kidney": {},
    "kidney_left": {"part_of": "kidney"},
    "kidney_right": {"part_of": "kidney"},
    "kidney_tumor": {"inside": "kidney"},
    "liver": {},
}
DATASETS = [
    {"name": "kits", "labels": {"1": "kidney", "2": "kidney_tumor"}, "ignore": [9]},
    {"name": "amos", "labels": {"2": "kidney_right", "3": "kidney_left", "6": "liver"}},
]


@pytest.fixture(scope="module")
def table():
    return LabelTable(TARGETS, DATASETS)


def random_batches(table, seed=0, number=3):
    """Batches of two samples, one per data set, with every code of it."""
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(number):
        codes = np.stack([
            table.offset(name) + rng.integers(0, len(table.local_ids(name)), (1, 4, 5, 6)) for name in table.datasets
        ])  # fmt: skip
        logits = rng.normal(size=(2, len(table.names), 4, 5, 6)).astype(np.float32)
        batches.append((torch.from_numpy(logits), torch.from_numpy(codes)))
    return batches


def dice_by_loops(table, batches, datasets):
    """Voxel by voxel, target by target, from nothing but the table's rows."""
    counts = {name: [0, 0, 0] for name in table.names}
    for logits, codes in batches:
        for sample in range(len(codes)):
            for voxel in np.ndindex(*codes.shape[2:]):
                code = int(codes[(sample, 0, *voxel)])
                if table.codes[code][0] not in datasets:
                    continue
                for target, name in enumerate(table.names):
                    truth = table.targets[code, target]
                    claimed = torch.sigmoid(logits[(sample, target, *voxel)]) > 0.5
                    if truth >= 0:
                        counts[name][0] += bool(claimed and truth == 1)
                        counts[name][1] += bool(claimed and truth == 0)
                        counts[name][2] += bool(not claimed and truth == 1)
    return {n: 2 * tp / (2 * tp + fp + fn) for n, (tp, fp, fn) in counts.items() if tp + fn}


def test_pooled_dice_equals_loops_over_annotated_voxels(table):
    metric, batches = PooledDice(table), random_batches(table)
    for batch in batches:
        metric.update(batch)
    expected = dice_by_loops(table, batches, table.datasets)
    assert metric.compute() == pytest.approx(np.mean(list(expected.values())))
    assert metric.per_target == pytest.approx(expected)
    for dataset in table.datasets:
        assert metric.per_dataset[dataset] == pytest.approx(dice_by_loops(table, batches, [dataset]))
    assert set(metric.per_dataset["kits"]) == {"kidney", "kidney_tumor"}


def test_pooled_dice_takes_decollated_lists(table):
    whole, listed = PooledDice(table), PooledDice(table)
    for logits, codes in random_batches(table):
        whole.update((logits, codes))
        listed.update((list(logits), list(codes)))
    assert whole.compute() == listed.compute()


def test_targets_that_are_annotated_but_absent_stay_out_of_the_mean(table):
    codes = torch.full((1, 1, 4, 4, 4), table.offset("amos"))
    codes[..., 0] += table.local_ids("amos").index(6)
    logits = torch.full((1, 5, 4, 4, 4), -5.0)
    logits[:, 4, ..., 0] = 5
    logits[:, 1] = 5  # a false left kidney everywhere: the truth holds none, so no Dice can be given
    metric = PooledDice(table)
    metric.update((logits, codes))
    assert metric.compute() == 1
    assert metric.per_target == {"liver": 1.0}
    assert metric.absent == ("kidney", "kidney_left", "kidney_right")


def test_nothing_present_gives_zero_and_says_so(table, caplog):
    metric = PooledDice(table)
    metric.update((torch.zeros(1, 5, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2, dtype=torch.uint8)))
    assert metric.compute() == 0
    assert "no annotated target" in caplog.text
    metric.reset()
    assert metric.compute() == 0


def test_ignored_voxels_count_nowhere(table):
    codes = torch.zeros(1, 1, 2, 2, 2, dtype=torch.long)
    codes[0, 0, 0], codes[0, 0, 1] = 1, table.ignored("kits")[0]
    logits = torch.full((1, 5, 2, 2, 2), 5.0)
    metric = PooledDice(table)
    metric.update((logits, codes))
    assert metric.compute() == 1


def test_channels_that_are_not_the_tables_targets_are_an_error(table):
    with pytest.raises(ValueError, match="one channel per target"):
        PooledDice(table).update((torch.zeros(1, 3, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2)))
    with pytest.raises(ValueError, match="codes go up to 40"):
        PooledDice(table).update((torch.zeros(1, 5, 2, 2, 2), torch.full((1, 1, 2, 2, 2), 40)))


def test_pooled_dice_is_a_key_metric_of_monais_evaluator(table):
    batches = random_batches(table)
    loader = [{"image": logits, "label": codes} for logits, codes in batches]
    metric = PooledDice(table, output_transform=from_engine(["pred", "label"]))
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"), val_data_loader=loader, network=torch.nn.Identity(),
        key_val_metric={"val_dice": metric}, decollate=True,
    )  # fmt: skip
    evaluator.run()
    expected = dice_by_loops(table, batches, table.datasets)
    assert evaluator.state.metrics["val_dice"] == pytest.approx(np.mean(list(expected.values())))
    assert evaluator.state.best_metric == evaluator.state.metrics["val_dice"]
    kits = dice_by_loops(table, batches, ["kits"])
    assert evaluator.state.metrics["val_dice_kits"] == pytest.approx(np.mean(list(kits.values())))


def _one_of_two_processes(rank, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    table = LabelTable(TARGETS, DATASETS)
    metric = PooledDice(table)
    for batch in random_batches(table, number=4)[rank::2]:
        metric.update(batch)
    torch.save({"mean": metric.compute(), "again": metric.compute(), "parts": metric.per_dataset}, f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one_that_saw_everything(table, tmp_path):
    processes = [_context().Process(target=_one_of_two_processes, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    metric = PooledDice(table)
    for batch in random_batches(table, number=4):
        metric.update(batch)
    mean = metric.compute()
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt")
        assert result == {"mean": mean, "again": mean, "parts": metric.per_dataset}


def blobs(seed, shape=(14, 20, 24)):
    """A smooth random mask."""
    rng = np.random.default_rng(seed)
    noise = sitk.SmoothingRecursiveGaussian(sitk.GetImageFromArray(rng.normal(size=shape)), 2.0)
    return sitk.GetArrayFromImage(noise) > 0.02


@pytest.mark.parametrize("spacing", [(1, 1, 1), (5.0, 0.7, 0.8), (0.9, 3.0, 1.2)])
@pytest.mark.parametrize("tolerance", [0.5, 1.0, 2.0, 4.0])
def test_surface_dice_equals_monais_with_surface_elements(spacing, tolerance):
    a, b = blobs(1), blobs(2)
    one_hot = [torch.from_numpy(mask)[None, None] for mask in (a, b)]
    settings = {"class_thresholds": [tolerance], "include_background": True, "spacing": spacing, "use_subvoxels": True}
    expected = compute_surface_dice(*one_hot, **settings).item()
    assert 0 < expected <= 1
    assert surface_dice(a, b, spacing, tolerance) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_surface_dice_of_boxes_is_the_analytic_one_on_thick_slices(axis):
    """A box of 40 x 48 x 48 mm against one that reaches 12 mm further along one axis."""
    spacing, sides, more, tolerance = np.array([4.0, 0.8, 0.8]), np.array([40.0, 48.0, 48.0]), 12.0, 2.0
    cells = np.round(sides / spacing).astype(int)
    far = cells.copy()
    far[axis] += round(more / spacing[axis])
    masks = []
    for stop in (cells, far):
        mask = np.zeros(far + 4, bool)
        mask[tuple(slice(2, 2 + side) for side in stop)] = True
        masks.append(mask)
    b, c = np.delete(sides, axis)
    area = 2 * (b * c + sides[axis] * (b + c))
    area_far = area + 2 * more * (b + c)
    # Off by more than the tolerance: the short box's end but for its rim, the long box's end and what leads to it.
    off = (b - 2 * tolerance) * (c - 2 * tolerance) + b * c + 2 * (b + c) * (more - tolerance)
    expected = 1 - off / (area + area_far)
    assert surface_dice(*masks, spacing, tolerance) == pytest.approx(expected, abs=0.02)


def test_surface_dice_counts_millimeters_not_voxels():
    a = np.zeros((12, 12, 12), bool)
    a[3:8, 3:8, 3:8] = True
    b = np.roll(a, 1, axis=0)  # moved by one voxel along an axis with 4 mm steps
    assert surface_dice(a, b, (4, 1, 1), 4.0) == 1
    assert surface_dice(a, b, (4, 1, 1), 3.9) < 1
    assert surface_dice(a, b, (1, 1, 1), 1.0) == 1


def test_surface_dice_of_empty_masks():
    some, none = np.ones((3, 3, 3), bool), np.zeros((3, 3, 3), bool)
    assert surface_dice(none, none, (1, 1, 1), 1) is None
    assert surface_dice(some, none, (1, 1, 1), 1) == 0
    assert surface_dice(none, some, (1, 1, 1), 1) == 0
    assert surface_dice(some, some, (1, 1, 1), 0) == 1


def test_lesions_equal_simpleitks_components():
    truth, prediction, spacing = blobs(5), blobs(6) & (np.arange(24) > 5), (3.0, 0.8, 0.9)
    labels = []
    for mask in (truth, prediction):
        labels.append(sitk.GetArrayFromImage(sitk.ConnectedComponent(sitk.GetImageFromArray(mask * np.uint8(1)), True)))
    expected = []
    for own, other, hit, miss in ((labels[0], prediction, "found", "missed"), (labels[1], truth, None, "false")):
        for component in range(1, own.max() + 1):
            inside = own == component
            kind = hit if (inside & other).any() else miss
            expected += [(round(inside.sum() * 3 * 0.8 * 0.9 / 1000, 9), kind)] if kind else []
    found = [(round(row["volume_ml"], 9), row["kind"]) for row in lesions(prediction, truth, spacing)]
    assert sorted(found) == sorted(expected)
    assert {kind for _, kind in found} >= {"found", "false"}


@pytest.mark.parametrize("shape", [(9, 1, 1), (1, 1, 28), (13, 3, 1), (3, 3, 3)])
def test_a_thin_row_of_single_voxels_is_as_many_lesions(shape):
    truth = np.zeros(shape, bool)
    truth[::2, ::2, ::2] = True
    assert [row["kind"] for row in lesions(truth & False, truth, (1, 1, 1))] == ["missed"] * truth.sum()


def test_corner_neighbors_are_one_lesion_and_one_shared_voxel_finds_it():
    truth, prediction = np.zeros((2, 6, 6, 6), bool)
    truth[0, 0, 0] = truth[1, 1, 1] = True
    truth[3:5, 3:5, 3:5] = True
    prediction[3, 3, 3] = True
    assert [row["kind"] for row in lesions(prediction, truth, (10, 10, 10))] == ["found", "missed"]
    assert [row["volume_ml"] for row in lesions(prediction, truth, (10, 10, 10))] == [8.0, 2.0]
    assert [row["volume_ml"] for row in lesions(prediction, truth, (10, 10, 10), upright=0.5)] == [4.0, 1.0]
    assert lesions(prediction & False, truth & False, (1, 1, 1)) == []
