"""A word of doubt: the agreement of versions and the entropy of their mean, beside what they are by definition."""

import itertools
import json

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from tsfm.cases import folders
from tsfm.cases.folders import JOURNAL, find_images, read_report
from tsfm.inference import report
from tsfm.inference.painting import Slab
from tsfm.inference.prediction import CaseEvaluator, volumes_ml
from tsfm.inference.quality import Quality, binary_entropy, doubt
from tsfm.inference.report import CaseReport
from tsfm.inference.windows import SlabInferer
from tsfm.labels import LabelTable
from tsfm.preparation.familiar import Familiar, features, ranges

NAMES = ("liver", "tumor")
TUMOR = LabelTable({"tumor": {}}, [])


def pairwise_dice(masks):
    pairs = list(itertools.combinations(masks, 2))
    shared = sum(int((a & b).sum()) for a, b in pairs)
    return 2 * shared / sum(int(a.sum() + b.sum()) for a, b in pairs)


@pytest.mark.parametrize("exclusive", [False, True])
def test_agreement_is_the_dice_of_pairs_of_versions_and_a_batch_that_begins_again_counts_once(exclusive):
    versions = torch.randn(4, 2, 2 + exclusive, 3, 4, 5)
    first = {name: (i + exclusive, i + exclusive) for i, name in enumerate(NAMES)}
    quality = Quality(first, {"liver": 0.5, "tumor": -0.5}, exclusive)
    for attempt in (versions[:2], versions, versions):  # out of memory, then beyond float16
        for number, logits in enumerate(attempt):
            quality.watch(number, 4, logits)
    quality.keep()
    report = quality.report()
    for i, (name, level) in enumerate((("liver", 0.5), ("tumor", -0.5))):
        masks = versions.argmax(2) == i + 1 if exclusive else versions[:, :, i] > level
        assert report[name]["agreement"] == pytest.approx(pairwise_dice(masks))
    assert doubt(report) == pytest.approx(1 - np.mean([row["agreement"] for row in report.values()]))


def test_entropy_is_that_of_painted_voxels_and_a_slice_that_comes_twice_counts_once():
    logits = torch.randn(2, 6, 4, 4)
    quality = Quality({"liver": (0, 0), "tumor": (1, 1)}, dict.fromkeys(NAMES, 0.0))
    for start, stop in ((0, 3), (2, 6)):
        quality.see(Slab(logits[:, start:stop], start))
    p = torch.sigmoid(logits).double()
    expected = -(p * p.log2() + (1 - p) * (1 - p).log2())
    for i, name in enumerate(NAMES):
        found = quality.report()[name]
        assert found == {
            "agreement": None,
            "entropy": pytest.approx(float(expected[i][logits[i] > 0].mean()), rel=1e-5),
        }
    torch.testing.assert_close(binary_entropy(torch.zeros(1)), torch.ones(1))


@pytest.mark.convolutions
def test_the_inferer_says_it_of_mirrored_versions_and_paints_the_same():
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, 2, 3, padding=1)
    image = torch.randn(1, 1, 20, 16, 12)
    settings = {"mirror": "SL", "amp": False, "progress": False}
    doubting = SlabInferer((8, 8, 8), NAMES, doubts=True, **settings)
    assert torch.equal(doubting(image, network), SlabInferer((8, 8, 8), NAMES, **settings)(image, network))
    assert set(doubting.quality) == set(NAMES)
    assert all(0 < row["agreement"] < 1 and 0 < row["entropy"] < 1 for row in doubting.quality.values())
    alike = SlabInferer((8, 8, 8), NAMES, doubts=True, **settings)
    alike(torch.ones_like(image), torch.nn.Conv3d(1, 2, 1))
    assert all(row["agreement"] == 1 for row in alike.quality.values()), "versions that are the same agree"
    one = SlabInferer((8, 8, 8), NAMES, doubts=True, amp=False, progress=False, targets="liver")
    one(image, network)
    assert list(one.quality) == ["liver"] and one.quality["liver"]["agreement"] is None
    assert doubt(one.quality) == one.quality["liver"]["entropy"] and doubt({}) == 0


class Boxes(torch.nn.Module):
    """Paints a box of its own per target in the versions numbered `when`, and nothing in the others."""

    def __init__(self, *boxes, when=range(8)):
        super().__init__()
        self.boxes, self.when, self.number = boxes, when, 0

    def forward(self, x):
        logits = torch.full((1, len(self.boxes), *x.shape[2:]), -4.0)
        for target, box in enumerate(self.boxes) if self.number in self.when else ():
            logits[(0, target, *box)] = 5.0
        self.number += 1
        return logits


def reported(folder, network, table, size, patch, **settings):
    """What report.json says of one image."""
    inferer = SlabInferer((patch,) * 3, table, doubts=True, amp=False, progress=False, mirror=True, **settings)
    images = [{"case": ["x"], "image": torch.zeros(1, 1, size, size, size)}]
    CaseEvaluator(
        device="cpu", val_data_loader=images, network=network, inferer=inferer, table=table,
        val_handlers=[CaseReport(str(folder))],
    ).run()  # fmt: skip
    return read_report(folder)["x"]


def test_a_volume_includes_parts_and_what_lies_inside_of_targets_that_are_computed(tmp_path):
    table = LabelTable(
        {"kidney": {}, "left": {"part_of": "kidney"}, "right": {"part_of": "kidney"}, "tumor": {"inside": "left"}},
        [{"name": "mine", "labels": {"1": "left", "2": "right", "3": "tumor"}}],
    )
    network = Boxes(*([slice(4, 16)] * 3 for _ in range(4)))
    every = reported(tmp_path / "every", network, table, 20, 20)
    assert every["ml"] == pytest.approx(dict.fromkeys(("kidney", "left", "tumor"), 1.728) | {"right": 0})
    assert set(every["quality"]) == set(table.names) and every["doubt"] == 0
    network.number = 0
    assert reported(tmp_path / "one", network, table, 20, 20, targets="tumor")["ml"] == {"tumor": pytest.approx(1.728)}


def test_volumes_are_of_the_tables_targets_where_the_networks_were_renumbered(tmp_path):
    """As zero_shot.json does: what the weights call a left kidney is a kidney of the pool, with the same value here."""
    inferer = SlabInferer((8,) * 3, ["left"], doubts=True, amp=False, progress=False)
    engine = CaseEvaluator(
        device="cpu", val_data_loader=[{"case": ["x"], "image": torch.zeros(1, 1, 8, 8, 8)}],
        network=Boxes([slice(2, 6)] * 3), inferer=inferer, table=LabelTable({"kidney": {}}, []),
    )  # fmt: skip
    engine.run()
    assert engine.results[0]["ml"] == {"kidney": pytest.approx(0.064)}


def test_values_that_no_target_has_count_in_no_volume():
    assert volumes_ml(torch.tensor([[[[0, 1, 2]]]], dtype=torch.uint8), TUMOR, ["tumor"]) == {"tumor": 0.001}


def test_what_some_versions_see_and_their_mean_does_not_is_doubtful(tmp_path):
    box = [slice(2, 6)] * 3
    row = reported(tmp_path, Boxes(box, when=range(3)), TUMOR, 8, 8)
    assert row["ml"] == {"tumor": 0.0} and row["doubt"] == pytest.approx(1 - 3 * 2 / (7 * 3))
    nothing = reported(tmp_path, Boxes(box, when=()), TUMOR, 8, 8)
    assert nothing["ml"] == nothing["quality"] == {} and nothing["doubt"] == 0


def test_versions_that_differ_outside_of_a_small_image_alone_agree(tmp_path):
    """A patch of 16 around an image of 8: one version paints all of it, the others the image's box."""

    class Padded(Boxes):
        def forward(self, x):
            logits = super().forward(x)
            return torch.full_like(logits, 5.0) if self.number == 1 else logits

    row = reported(tmp_path, Padded([slice(4, 12)] * 3), TUMOR, 8, 16)
    assert row["quality"]["tumor"]["agreement"] == 1 and row["ml"] == {"tumor": pytest.approx(0.512)}


def engine_of(folder, results):
    """An evaluator whose cases end at once, with a report."""
    engine = Engine(lambda engine, case: engine.results.append({"case": case, "seconds": 1.0}))
    engine.results = results
    CaseReport(folder).attach(engine)
    return engine


def test_each_row_is_kept_as_its_case_ends_though_the_report_is_not_written_whole_each_time(tmp_path, monkeypatch):
    written, seen, write = [], [], report.write_text
    monkeypatch.setattr(report, "PATIENCE", 1e9)
    monkeypatch.setattr(report, "write_text", lambda *args: written.append(args) or write(*args))
    engine, cases = engine_of(tmp_path, []), list("abcdef")
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda _: seen.append(list(read_report(tmp_path))))
    engine.run(cases)
    assert seen == [cases[: n + 1] for n in range(6)] and len(written) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert json.loads((tmp_path / "report.json").read_text()) == {"cases": {case: {"seconds": 1.0} for case in cases}}


def test_what_a_killed_run_left_is_known_and_in_the_next_report(tmp_path):
    (tmp_path / JOURNAL).write_text('\n{"a": {"seconds": 2.0}}\n{"b": {"sec')
    for name in ("a.nii.gz", "c.nii.gz"):
        (tmp_path / name).touch()
    assert list(read_report(tmp_path)) == ["a"]
    assert [item["case"] for item in find_images(tmp_path)] == ["c"], "the label map of a is no image"
    engine_of(tmp_path, []).run(["c"])
    content = json.loads((tmp_path / "report.json").read_text())
    assert content == {"cases": {"a": {"seconds": 2.0}, "c": {"seconds": 1.0}}}


# ---- what the weights have seen ------------------------------------------------------------------------------------------

GRID = {"spacing_mm": [4.0, 2.0, 2.0], "source_spacing_mm": [3.0, 1.0, 1.0]}


def seen(count=6):
    rng = np.random.default_rng(0)
    return ranges([features(rng.normal(0, 1, (1, 20 + n, 60, 60)), GRID) for n in range(count)])


def test_a_case_like_those_of_the_training_passes():
    image = np.random.default_rng(1).normal(0.1, 1.1, (1, 22, 66, 55))
    assert Familiar({"CT": seen()}).warnings(image, GRID) == [] and Familiar().warnings(image, GRID) == []
    assert Familiar({"MR": seen()}, modality="MRI").warnings(image, GRID) == []
    assert Familiar({"MR": seen()}).warnings(image, GRID, "T1w") == []


@pytest.mark.parametrize(
    ("shape", "shift", "grid", "modality", "said"),
    [
        ((1, 90, 60, 60), 0, GRID, None, "360 mm along S; the weights saw 80 to 100"),
        (
            (1, 22, 60, 60),
            0,
            {**GRID, "source_spacing_mm": [3, 5, 1]},
            None,
            "5 mm of voxel along P; the weights saw 1 to 1",
        ),
        ((1, 22, 60, 60), 3, GRID, None, "as the 50th percentile of its prepared intensities"),
        ((1, 22, 60, 60), 0, GRID, "MR", "it is MR; the weights saw CT"),
    ],
)
def test_what_is_far_from_the_training_is_named(shape, shift, grid, modality, said):
    image = np.random.default_rng(1).normal(shift, 1, shape)
    assert any(said in line for line in Familiar({"CT": seen()}).warnings(image, grid, modality))


def test_a_report_is_read_whole_while_another_process_moves_its_journal_into_it(tmp_path, monkeypatch):
    (tmp_path / "report.json").write_text('{"cases": {"a": {}}}')
    (tmp_path / JOURNAL).write_text('\n{"b": {}}')
    plain = folders.read_json

    def read_json(path):
        content = plain(path)
        CaseReport(tmp_path).write()
        return content

    monkeypatch.setattr(folders, "read_json", read_json)
    monkeypatch.setattr(report, "read_report", lambda _: {"a": {}, "b": {}})
    assert set(read_report(tmp_path)) == {"a", "b"}
