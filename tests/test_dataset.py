"""PatchDataset and PoolSampler: which voxels a patch holds, which cases are drawn, and that nothing else decides it."""

from __future__ import annotations

import gc
import json
import weakref
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader as MonaiDataLoader
from monai.engines import Trainer
from monai.transforms import RandFlipd, RandGaussianNoised
from torch.utils.data import DataLoader
from tsfm.cases.cases import Preparation
from tsfm.labels import LabelTable
from tsfm.patches.augmentation import RandRotateScale
from tsfm.patches.dataset import Draw, PatchDataset, PoolSampler, patch_origin
from tsfm.patches.store import CaseStore

AUGMENTATION = Path(__file__).parent / "fixtures" / "augmentation.json"
TABLE = LabelTable(
    {"liver": {}, "kidney": {}},
    [{"name": "first", "labels": {"1": "liver"}}, {"name": "second", "labels": {"1": "kidney", "2": "liver"}}],
)


class MemoryCase:
    """What `tsfm.patches.store.StoredCase` promises, in memory; remembers the boxes that were read."""

    def __init__(self, image, codes):
        self.image, self.codes, self.boxes = image, codes, []
        self.shape, self.channels, self.steps = codes.shape, len(image), (0.0,) * len(image)
        self.cropped_share = 1.0
        self.foreground = {int(code): np.argwhere(codes == code) for code in np.unique(codes) if code > 0}

    def read_image(self, box):
        self.boxes.append(box)
        return self.image[(slice(None), *(slice(*side) for side in box))].copy()

    def read_codes(self, box):
        return self.codes[tuple(slice(*side) for side in box)].copy()


class MemoryStore:
    """One `MemoryCase` per item, made on first touch from the item's name."""

    preparation = Preparation((1.0, 1.0, 1.0))

    def __init__(self, shape=(20, 24, 28), channels=1):
        self.shape, self.channels, self.cases = shape, channels, {}

    def open(self, item):
        if item["image"] not in self.cases:
            rng = np.random.default_rng(zlib.crc32(item["image"].encode()))
            image = rng.normal(size=(self.channels, *self.shape)).astype(np.float32)
            codes = np.zeros(self.shape, np.uint8)
            codes[5:9, 6:11, 7:12] = 1
            if item["dataset"] == "second":
                codes[12:14, 14:16, 16:18] = 2
            self.cases[item["image"]] = MemoryCase(image, codes)
        return self.cases[item["image"]]


def items(first=3, second=5):
    names = ["first"] * first + ["second"] * second
    return [
        {"image": f"{i}", "label": f"{i}", "dataset": n, "modality": "CT", "case": f"c{i}"} for i, n in enumerate(names)
    ]


def augmentation():
    return ConfigParser({"mirror_axes": "SPL", "transforms": json.loads(AUGMENTATION.read_text())}).get_parsed_content(
        "transforms"
    )


def whole(patch_size=(16, 16, 16), channels=1, **kwargs):
    """A data set with every augmentation switched on."""
    return PatchDataset(items(), MemoryStore(channels=channels), TABLE, patch_size, augmentation(),
                        RandRotateScale(0.5, 30, 0.5), **kwargs)  # fmt: skip


# ---- the patch --------------------------------------------------------------------------------------------------


def test_a_patch_is_the_case_around_a_foreground_voxel_with_table_wide_codes():
    store = MemoryStore()
    dataset = PatchDataset(items(), store, TABLE, (8, 8, 8))
    for seed in range(20):
        sample = dataset[Draw(4, seed, True)]
        (box,) = store.cases["4"].boxes[-1:]
        where = tuple(slice(*side) for side in box)
        assert np.array_equal(sample["image"][0], store.cases["4"].image[0][where])
        assert np.array_equal(sample["label"][0] - TABLE.offset("second"), store.cases["4"].codes[where])
        assert sample["label"][0, 4, 4, 4] > TABLE.offset("second")  # the centre voxel is foreground
    assert sample["image"].dtype == torch.float32 and sample["label"].dtype == torch.uint8
    assert (sample["dataset"], sample["case"]) == ("second", "c4")


def test_only_the_box_of_an_unturned_patch_is_read():
    store = MemoryStore()
    PatchDataset(items(), store, TABLE, (8, 10, 12))[Draw(0, 1, False)]
    (box,) = store.cases["0"].boxes
    assert [stop - start for start, stop in box] == [8, 10, 12]


def test_outside_the_case_there_is_zero_and_the_data_sets_own_background():
    dataset = PatchDataset(items(), MemoryStore(shape=(20, 24, 28)), TABLE, (26, 24, 32))
    sample = dataset[Draw(7, 0, False)]
    inside = torch.zeros(26, 24, 32, dtype=torch.bool)
    inside[3:23, :, 2:30] = True
    assert torch.all(sample["image"][0][~inside] == 0) and torch.all(sample["image"][0][inside] != 0)
    assert torch.all(sample["label"][0][~inside] == TABLE.offset("second"))
    assert np.array_equal(sample["image"][0, 3:23, :, 2:30], dataset.store.cases["7"].image[0])


def test_positions_and_foreground_follow_nnunets_rule():
    """Against a loop written from the rule: uniform positions, classes equally likely, moved at the lower side only."""
    rng = np.random.default_rng(0)
    shape, patch = (10, 30, 5), (8, 8, 8)
    free = np.array([patch_origin(shape, patch, {}, rng) for _ in range(4000)])
    assert free[:, 0].min() == 0 and free[:, 0].max() == 2 and free[:, 1].max() == 22
    assert set(free[:, 2]) == {-2, -1}  # 3 voxels are missing: one is put before the case, or two
    assert np.allclose(np.bincount(free[:, 0]) / 4000, 1 / 3, atol=0.03)
    foreground = {1: np.array([[1, 29, 2]]), 2: np.array([[9, 9, 4]] * 99)}
    forced = np.array([patch_origin(shape, patch, foreground, rng) for _ in range(2000)])
    found, counts = np.unique(forced, axis=0, return_counts=True)
    assert found.tolist() == [[0, 25, -2], [5, 5, 0]]
    assert np.allclose(counts / 2000, 0.5, atol=0.05)


def test_a_case_without_foreground_gives_a_patch_anyway():
    rng = np.random.default_rng(0)
    assert np.all(patch_origin((9, 9, 9), (4, 4, 4), {1: np.zeros((0, 3), int)}, rng) >= 0)


def test_bare_items_belong_to_the_only_data_set():
    table = LabelTable({"liver": {}}, [{"name": "mine", "labels": {"1": "liver"}}])
    sample = PatchDataset([{"image": "/a/x.nii.gz", "label": "/a/y.nii.gz"}], MemoryStore(), table, (8, 8, 8))[0]
    assert (sample["dataset"], sample["case"]) == ("mine", "x")
    assert set(sample["label"].unique().tolist()) == {0, 1}


def test_more_than_256_codes_are_kept():
    table = LabelTable({"a": {}}, [{"name": f"d{i}", "labels": {"1": "a"}} for i in range(150)])
    data = [{"image": "x", "label": "x", "dataset": "d149"}]
    label = PatchDataset(data, MemoryStore(), table, (8, 8, 8))[0]["label"]
    assert set(label.unique().tolist()) == {298, 299}


def test_what_lies_outside_of_a_mask_stays_zero_after_all_transforms():
    """nnU-Net's MaskImageTransform, its last, for channels whose z-score looked at the non-zero region only."""

    class Masked(MemoryStore):
        preparation = Preparation((1.0, 1.0, 1.0), masked={"MR": True})

        def open(self, item):
            case = super().open(item)
            case.image[:, :10], case.steps = (
                0.004,
                (0.01,),
            )  # a 0 as a store's levels give it back, the range being wide
            return case

    class Cropped(Masked):  # no plan says anything of the mask: the case does
        preparation = Preparation((1.0, 1.0, 1.0))

        def open(self, item):
            case = super().open(item)
            case.cropped_share = 0.7
            return case

    noise = [RandFlipd(["image", "label"], 1.0, 0), RandGaussianNoised("image", 1.0, std=1.0)]
    data = [{**items()[0], "modality": "MR"}]
    for store, still in ((Masked(), True), (Cropped(), True), (MemoryStore(), False)):
        dataset = PatchDataset(data, store, TABLE, (20, 24, 28), noise)
        sample = dataset[Draw(0, 1, False)]
        assert sample["label"].shape == (1, 20, 24, 28) and set(sample) == {"image", "label", "dataset", "case"}
        assert (
            bool((sample["image"][:, 10:] == 0).all()) == still and (sample["image"][:, :10] != 0).float().mean() > 0.99
        )


def test_no_case_stays_in_memory():
    class Fresh(MemoryStore):
        opened: list = []

        def open(self, item):
            case = super().open(item)
            self.cases.clear()
            self.opened.append(weakref.ref(case))
            return case

    dataset = PatchDataset(items(), Fresh(), TABLE, (8, 8, 8), augmentation(), RandRotateScale(1, 30, 1))
    for index in range(len(dataset)):
        dataset[index]
    gc.collect()
    assert len(Fresh.opened) == 8 and all(case() is None for case in Fresh.opened)


def test_a_patch_size_of_two_numbers_is_refused():
    with pytest.raises(ValueError, match=r"\(8, 8\).*three"):
        PatchDataset(items(), MemoryStore(), TABLE, (8, 8))


# ---- one seed decides everything --------------------------------------------------------------------------------


def test_a_draw_always_gives_the_same_patch_and_another_seed_another():
    dataset = whole(channels=2)
    first, again, other = dataset[Draw(3, 5, True)], dataset[Draw(3, 5, True)], dataset[Draw(3, 6, True)]
    assert torch.equal(first["image"], again["image"]) and torch.equal(first["label"], again["label"])
    assert not torch.equal(first["image"], other["image"])


def test_a_plain_index_is_the_same_patch_every_epoch_and_shows_foreground():
    loader = DataLoader(whole(), batch_size=2)
    epochs = [torch.cat([batch["image"] for batch in loader]) for _ in range(2)]
    assert torch.equal(*epochs) and len(epochs[0]) == 8


def loaded(sampler, workers=0, loader=DataLoader):
    batches = list(loader(whole(), batch_size=sampler.batch_size, sampler=sampler, num_workers=workers))
    return torch.cat([b["image"] for b in batches]), torch.cat([b["label"] for b in batches])


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(workers):
    sampler = PoolSampler(items(), batch_size=2, iterations=4, seed=3)
    assert same(loaded(sampler), loaded(sampler, workers))


def test_it_serves_in_monais_loader():
    sampler = PoolSampler(items(), 2, 3)
    assert len(sampler) == 6
    # MONAI's workers seed every transform of the data set on their own
    assert same(loaded(sampler), loaded(sampler, workers=2, loader=MonaiDataLoader))


def test_the_default_collate_gives_a_batch():
    batch = next(iter(MonaiDataLoader(whole(), batch_size=2, sampler=PoolSampler(items(), 2, 1))))
    assert batch["image"].shape == batch["label"].shape == (2, 1, 16, 16, 16)
    assert type(batch["image"]) is torch.Tensor and len(batch["dataset"]) == 2


def write_case(folder, number):
    """A CT of (L, P, S) order with a ball of label 1, already on the target grid; returns its item."""
    rng = np.random.default_rng(number)
    axes = np.meshgrid(*(np.arange(n) - n / 2 for n in (28, 24, 20)), indexing="ij")
    ball = sum(axis**2 for axis in axes) < 36
    image = rng.normal(-900, 20, ball.shape).round() + 950 * ball
    affine = np.diag([-1.0, -1.0, 1.5, 1.0])
    item = {"image": str(folder / f"{number}.nii.gz"), "label": str(folder / f"{number}_label.nii.gz")}
    nib.save(nib.Nifti1Image(image.astype(np.int16), affine), item["image"])
    nib.save(nib.Nifti1Image(ball.astype(np.uint8), affine), item["label"])
    return {**item, "dataset": "first", "modality": "CT", "case": str(number)}


def test_patches_come_from_the_real_store_prepared_on_first_touch_by_any_worker(tmp_path):
    cases = [write_case(tmp_path, number) for number in range(3)]
    preparation = Preparation((1.5, 1.0, 1.0), {"CT": {"lower": -927, "upper": 275, "mean": 63.4, "sd": 175.5}})
    ahead, on_touch = (CaseStore(tmp_path / name, TABLE, preparation) for name in ("ahead", "on_touch"))
    ahead.prepare(cases, progress=False)
    sampler, how = (
        PoolSampler(cases, 2, 3, seed=4),
        {"transform": augmentation(), "spatial": RandRotateScale(0.5, 30, 0.5)},
    )
    batches = [
        list(DataLoader(PatchDataset(cases, store, TABLE, (8, 16, 16), **how), 2, sampler=sampler, num_workers=workers))
        for store, workers in ((ahead, 0), (on_touch, 2))
    ]
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["label"], other["label"])
    plain = PatchDataset(cases, ahead, TABLE, (8, 8, 8))[1]
    assert plain["label"][0, 4, 4, 4] == TABLE.offset("first") + 1
    organ, air = plain["image"][plain["label"] == 1], plain["image"][plain["label"] == 0]
    assert organ.mean() > (0 - 63.4) / 175.5 and air.mean() < (-800 - 63.4) / 175.5


def test_workers_that_are_spawned_as_on_macos_and_windows_give_the_same_batches(tmp_path):
    """Whatever a worker needs is pickled: store, table, sampler's draws, every transform of train.json."""
    cases = [write_case(tmp_path, number) for number in range(2)]
    store = CaseStore(tmp_path / "store", TABLE, Preparation((1.5, 1.0, 1.0), {}, default_modality="MR"))
    data = PatchDataset(cases, store, TABLE, (8, 16, 16), augmentation(), RandRotateScale(0.5, 30, 0.5))
    sampler = PoolSampler(cases, 2, 2, seed=4)
    spawned = MonaiDataLoader(data, batch_size=2, sampler=sampler, num_workers=1, multiprocessing_context="spawn")
    for one, other in zip(MonaiDataLoader(data, batch_size=2, sampler=sampler), spawned, strict=True):
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["label"], other["label"])


# ---- the sampler ------------------------------------------------------------------------------------------------


def test_cases_are_drawn_by_weight():
    draws = list(PoolSampler(items(1, 4), batch_size=2, iterations=5000))
    share = np.bincount([draw.case for draw in draws], minlength=5) / len(draws)
    assert np.allclose(share, np.array([1, 0.5, 0.5, 0.5, 0.5]) / 3, atol=0.02)  # 1/sqrt(n) per case


@pytest.mark.parametrize(
    ("batch", "expected"), [(2, [0, 1]), (3, [0, 0, 1]), (4, [0, 0, 0, 1]), (6, [0, 0, 0, 0, 1, 1])]
)
def test_the_last_third_of_a_batch_is_forced(batch, expected):
    draws = [draw.foreground for draw in PoolSampler(items(), batch, 5)]
    assert draws == [bool(flag) for flag in expected] * 5


def test_a_batch_of_one_is_forced_a_third_of_the_time():
    assert np.mean([d.foreground for d in PoolSampler(items(), 1, 4000)]) == pytest.approx(1 / 3, abs=0.025)


def test_epochs_differ_and_any_epoch_can_be_resumed():
    walked, resumed = PoolSampler(items(), 2, 3, seed=1), PoolSampler(items(), 2, 3, seed=1)
    epochs = []
    for epoch in range(4):
        walked.set_epoch(epoch)
        epochs.append(list(walked))
    assert len({draw.seed for epoch in epochs for draw in epoch}) == 4 * 6
    resumed.set_epoch(3)
    assert list(resumed) == epochs[3]
    assert list(PoolSampler(items(), 2, 3, seed=2)) != epochs[0]


def test_validation_draws_the_same_samples_in_every_epoch():
    sampler = PoolSampler(items(), 2, 3, seed=1, fixed=True)
    first = list(sampler)
    sampler.set_epoch(5)
    assert list(sampler) == first


def test_two_ranks_draw_what_one_with_the_doubled_batch_does():
    ranks = [PoolSampler(items(), 2, 4, seed=9, rank=rank, world_size=2) for rank in range(2)]
    together = PoolSampler(items(), 4, 4, seed=9)
    for sampler in (*ranks, together):
        sampler.set_epoch(2)
    batches = [list(zip(draws, draws, strict=True)) for draws in map(iter, ranks)]
    assert [draw for pair in zip(*batches, strict=True) for batch in pair for draw in batch] == list(together)


class Seeds:
    """A data set that gives the seed of each draw."""

    def __len__(self):
        return 8

    def __getitem__(self, draw):
        return draw.seed


def test_monais_trainer_tells_the_sampler_the_epoch():
    sampler, seen = PoolSampler(items(), 2, 3), []
    loader = MonaiDataLoader(Seeds(), sampler=sampler, batch_size=2)
    Trainer("cpu", 3, loader, iteration_update=lambda engine, batch: seen.extend(batch.tolist())).run()
    expected = []
    for epoch in (1, 2, 3):  # ignite counts from 1
        sampler.set_epoch(epoch)
        expected += [draw.seed for draw in sampler]
    assert seen == expected


def test_an_empty_pool_is_an_error():
    with pytest.raises(ValueError, match="no cases"):
        PoolSampler([], 2, 3)
