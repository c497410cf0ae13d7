"""Scores of whole cases and folders against loops over voxels, SimpleITK and hand-made files."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import DataLoader, MetaTensor
from tsfm.cases.dataset_folder import label_table
from tsfm.cases.folders import stem
from tsfm.cases.grids import grid_difference
from tsfm.cases.splits import case_digests
from tsfm.evaluation.evaluation import CaseScores, evaluate_folder
from tsfm.evaluation.label_maps import label_maps_in, match_predictions
from tsfm.evaluation.score_files import ScoreWriter
from tsfm.evaluation.scores import COLUMNS, count_voxels, score_case
from tsfm.evaluation.tables import format_scores, load_rows, markdown_scores, summarize
from tsfm.inference.prediction import CaseEvaluator, FailedCases
from tsfm.labels import LabelError, LabelTable
from tsfm.names import counted

TARGETS = {
    "kidney": {"tolerance_mm": 3.0},
    "kidney_left": {"part_of": "kidney"},
    "kidney_right": {"part_of": "kidney"},
    "kidney_tumor": {"inside": "kidney"},
    "liver": {},
}
DATASETS = [
    {"name": "kits", "labels": {"1": "kidney", "2": "kidney_tumor"}, "ignore": [9]},
    {"name": "amos", "labels": {"2": "kidney_right", "3": "kidney_left", "6": "liver"}},
    {"name": "masks", "labels": {"liver": "liver", "kidney_left": "kidney_left"}},
]
MEMBERS = {"kidney": {1, 2, 3, 4}, "kidney_left": {2}, "kidney_right": {3}, "kidney_tumor": {4}, "liver": {5}}
TRUTH = {"kits": {"kidney": {1, 2}, "kidney_tumor": {2}},
         "amos": {"kidney": {2, 3}, "kidney_right": {2}, "kidney_left": {3}, "liver": {6}}}  # fmt: skip
AFFINE = np.array([[-0.8, 0, 0, 10], [0, 0.9, 0, -5], [0, 0, 3.0, 7], [0, 0, 0, 1.0]])


@pytest.fixture(scope="module")
def table():
    return LabelTable(TARGETS, DATASETS)


def case_of(dataset, seed, shape=(10, 12, 8)):
    """Blocky random prediction (values 0 to 5) and raw truth."""
    rng = np.random.default_rng(seed)
    small = tuple(side // 2 for side in shape)
    blow_up = lambda values: np.kron(rng.choice(values, small), np.ones((2, 2, 2))).astype(np.uint8)  # noqa: E731
    ids = [0, 0, 1, 2, 9] if dataset == "kits" else [0, 0, 2, 3, 6]
    return blow_up([0, 0, 1, 2, 3, 4, 5]), blow_up(ids)


def masks_of(prediction, raw, dataset, target):
    keep = raw != 9
    return np.isin(prediction, list(MEMBERS[target])) & keep, np.isin(raw, list(TRUTH[dataset][target])) & keep


@pytest.mark.parametrize("dataset", ["kits", "amos"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_counts_are_those_of_the_masks(table, dataset, order):
    prediction, raw = case_of(dataset, 0)
    codes = table.encode(dataset, raw)
    counts = count_voxels(np.asarray(prediction, order=order), codes, table, dataset)
    assert set(counts) == set(TRUTH[dataset])
    for target, (tp, fp, fn) in counts.items():
        p, t = masks_of(prediction, raw, dataset, target)
        assert (tp, fp, fn) == ((p & t).sum(), (p & ~t).sum(), (~p & t).sum())


@pytest.mark.parametrize("dataset", ["kits", "amos"])
def test_dice_and_volumes_are_simpleitks(table, dataset):
    prediction, raw = case_of(dataset, 1)
    spacing = (0.8, 0.9, 3.0)
    for row in score_case(prediction, table.encode(dataset, raw), table, dataset, spacing, case="a"):
        images = []
        for mask in masks_of(prediction, raw, dataset, row["target"]):
            images.append(sitk.GetImageFromArray(mask.astype(np.uint8).T))
            images[-1].SetSpacing(spacing)
        overlap = sitk.LabelOverlapMeasuresImageFilter()
        overlap.Execute(*images)
        assert row["dice"] == pytest.approx(overlap.GetDiceCoefficient())
        for image, key in zip(images, ("volume_predicted_ml", "volume_true_ml"), strict=True):
            shape = sitk.LabelShapeStatisticsImageFilter()
            shape.Execute(image)
            assert row[key] == pytest.approx(shape.GetPhysicalSize(1) / 1000)
        assert 0 < row["nsd"] <= 1


def test_ignored_voxels_enter_neither_surfaces_nor_lesions(table):
    raw, prediction = np.zeros((12, 12, 12), np.uint8), np.zeros((12, 12, 12), np.uint8)
    raw[1:4, 1:4, 1:4], prediction[1:4, 1:4, 1:4] = 2, 4
    raw[:, :, 7:], prediction[1:4, 1:4, 8:11] = 9, 4
    rows = {r["target"]: r for r in score_case(prediction, table.encode("kits", raw), table, "kits", (1, 1, 1))}
    tumor = rows["kidney_tumor"]
    assert (tumor["dice"], tumor["nsd"], tumor["lesions_false"]) == (1, 1, 0)
    assert tumor["volume_predicted_ml"] == pytest.approx(0.027)


def test_only_lesions_are_counted_one_by_one_unless_the_table_says_otherwise(table):
    prediction, raw = case_of("kits", 2)
    codes = table.encode("kits", raw)
    rows = {row["target"]: row for row in score_case(prediction, codes, table, "kits", (1, 1, 1))}
    assert rows["kidney"]["lesions_true"] is None
    assert (
        rows["kidney_tumor"]["lesions_true"]
        == rows["kidney_tumor"]["lesions_found"] + rows["kidney_tumor"]["lesions_missed"]
    )
    targets = {**TARGETS, "kidney": {"lesion": True}, "kidney_tumor": {"inside": "kidney", "lesion": False}}
    other = LabelTable(targets, DATASETS)
    rows = {row["target"]: row for row in score_case(prediction, codes, other, "kits", (1, 1, 1))}
    assert rows["kidney"]["lesions_true"] >= 1
    assert rows["kidney_tumor"]["lesions_true"] is None


def test_tolerance_comes_from_the_call_then_the_table_then_the_default(table):
    prediction, raw = case_of("kits", 2)
    codes = table.encode("kits", raw)

    def tolerances(given):
        return {r["target"]: r["tolerance_mm"] for r in score_case(prediction, codes, table, "kits", (1, 1, 1), given)}

    assert tolerances(None) == {"kidney": 3, "kidney_tumor": 2}
    assert tolerances({"kidney_tumor": 1}) == {"kidney": 3, "kidney_tumor": 1}
    assert tolerances(4.5) == {"kidney": 4.5, "kidney_tumor": 4.5}


def test_an_empty_truth_has_no_dice_and_its_prediction_is_false_volume(table):
    raw, prediction = np.zeros((6, 6, 6), np.uint8), np.zeros((6, 6, 6), np.uint8)
    raw[:3] = 1
    prediction[:3], prediction[0, 0, :2], prediction[5, 5, 5] = 1, 4, 4
    rows = {r["target"]: r for r in score_case(prediction, table.encode("kits", raw), table, "kits", (10, 10, 10))}
    tumor = rows["kidney_tumor"]
    assert (tumor["status"], tumor["dice"], tumor["nsd"]) == ("empty_truth", None, None)
    assert tumor["volume_predicted_ml"] == pytest.approx(3.0)
    assert (tumor["lesions_true"], tumor["lesions_false"]) == (0, 2)
    summary = summarize(list(rows.values()))["datasets"]["kits"]["kidney_tumor"]
    assert (summary["cases"], summary["empty_truth"], summary["empty_truth_predicted_ml"]) == (0, 1, pytest.approx(3.0))
    assert summary["dice"] is None


def test_an_empty_prediction_scores_zero(table):
    raw = np.zeros((6, 6, 6), np.uint8)
    raw[2:4, 2:4, 2:4] = 2
    rows = score_case(np.zeros_like(raw), table.encode("kits", raw), table, "kits", (1, 1, 1))
    assert [(row["status"], row["dice"], row["nsd"]) for row in rows] == [("ok", 0, 0)] * 2
    assert rows[1]["lesions_missed"] == 1


@pytest.mark.parametrize(("wrong", "message"), [
    (np.full((4, 4, 4), 6), "5 targets"),
    (np.full((4, 4, 4), 0.5), "no whole number"),
    (np.full((4, 4, 4), np.nan), "no whole number"),
    (np.zeros((4, 4)), "three axes"),
    (np.zeros((4, 4, 5)), "the truth"),
])  # fmt: skip
def test_predictions_that_cannot_be_scored_are_errors_that_name_the_case(table, wrong, message):
    with pytest.raises(ValueError, match=f"case7.*{message}"):
        score_case(wrong, np.zeros((4, 4, 4), np.uint8), table, "kits", (1, 1, 1), case="case7")


def save(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return str(path)


def folder_of_cases(tmp_path, count=3):
    for number in range(count):
        prediction, raw = case_of("kits", number)
        save(tmp_path / "labels" / f"case_{number}.nii.gz", raw)
        save(tmp_path / "out" / f"case_{number}" / f"case_{number}_seg.nii.gz", prediction)
    return tmp_path / "out", tmp_path / "labels"


def test_a_folder_gives_rows_lesions_summary_and_tables(table, tmp_path, caplog):
    out, labels = folder_of_cases(tmp_path)
    save(out / "case_9.nii.gz", np.zeros((2, 3, 4), np.uint8))
    summary = evaluate_folder(out, labels, table, tmp_path / "scores", dataset="kits")
    rows = load_rows(tmp_path / "scores" / "cases.csv")
    assert [(row["case"], row["target"]) for row in rows[:2]] == [("case_0", "kidney"), ("case_0", "kidney_tumor")]
    expected = []
    for number in range(3):
        p, t = masks_of(*case_of("kits", number), "kits", "kidney")
        expected.append(2 * (p & t).sum() / (p.sum() + t.sum()))
    assert [row["dice"] for row in rows[::2]] == pytest.approx(expected, rel=1e-5)
    assert summary["datasets"]["kits"]["kidney"]["dice"]["mean"] == pytest.approx(np.mean(expected))
    assert summary["datasets"]["kits"]["kidney"]["dice"]["sd"] == pytest.approx(np.std(expected, ddof=1))
    assert json.loads((tmp_path / "scores" / "summary.json").read_text()) == json.loads(json.dumps(summary))
    lesions = load_rows(tmp_path / "scores" / "lesions.csv")
    counted = sum(row["lesions_true"] + row["lesions_false"] for row in rows if row["target"] == "kidney_tumor")
    assert len(lesions) == counted > 0
    assert "label maps without a truth, which are not scored: 1" in caplog.text and "case_9.nii.gz" in caplog.text
    text = (tmp_path / "scores" / "scores.md").read_text()
    assert "mean Dice for tumor" in text
    assert '"-" stands for lesions where a target is none (its name ends in none of tumor,' in text.splitlines()[-1]
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == [
        "cases.csv", "lesions.csv", "scores.md", "summary.json",
    ]  # fmt: skip


def test_all_missing_predictions_are_named_before_anything_is_scored(table, tmp_path):
    out, labels = folder_of_cases(tmp_path, 4)
    for number in (1, 3):
        (out / f"case_{number}" / f"case_{number}_seg.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="2 of 4 cases: case_1, case_3"):
        evaluate_folder(out, labels, table, tmp_path / "scores", dataset="kits")
    assert not (tmp_path / "scores").exists()


def test_all_grids_that_differ_are_named_before_anything_is_scored(table, tmp_path):
    out, labels = folder_of_cases(tmp_path, 3)
    flipped = AFFINE @ np.diag([-1, 1, 1, 1])
    save(out / "case_0" / "case_0_seg.nii.gz", case_of("kits", 0)[0], flipped)
    save(out / "case_2" / "case_2_seg.nii.gz", np.zeros((3, 4, 5), np.uint8))
    with pytest.raises(ValueError, match=r"(?s)case_0: affines.*case_2: shape \(3, 4, 5\) along \(L, A, S\) against"):
        evaluate_folder(out, labels, table, tmp_path / "scores", dataset="kits")


def test_others_label_maps_are_scored_by_a_dataset_json_and_in_its_own_ids(tmp_path):
    """nnU-Net writes regions as the ids of its labels, which are not the targets' numbers."""
    labels = {"background": 0, "whole tumor": [1, 2, 4], "tumor core": [1, 4], "enhancing": [4], "ignore": 9}
    (tmp_path / "Dataset001_Brain").mkdir()
    declared = tmp_path / "Dataset001_Brain/dataset.json"
    declared.write_text(json.dumps({"labels": labels, "file_ending": ".nii.gz"}))
    table = label_table(str(declared))
    assert table.names == ("whole_tumor", "tumor_core", "enhancing") and table.datasets[0] == "dataset001_brain"
    raw = np.zeros((6, 6, 6), np.uint8)
    raw[1:5, 1:5, 1:5], raw[2:4, 2:4, 1:5], raw[2, 2, 2], raw[5, 5, 5] = 2, 1, 4, 9
    found = np.where(raw == 9, 0, raw)
    found[2, 2, 3] = 2  # one of the core's 16 voxels is missed
    save(tmp_path / "labels/a.nii.gz", raw)
    save(tmp_path / "out/a.nii.gz", found)
    folders = (tmp_path / "out", tmp_path / "labels", table, tmp_path / "scores")
    scores = evaluate_folder(*folders, raw_ids="dataset001_brain")["datasets"]["dataset001_brain"]
    dice = {name: entry["dice"]["mean"] for name, entry in scores.items()}
    assert dice == pytest.approx({"whole_tumor": 1.0, "tumor_core": 2 * 15 / 31, "enhancing": 1.0})
    save(tmp_path / "out/a.nii.gz", np.full((6, 6, 6), 3, np.uint8))
    with pytest.raises(FailedCases, match=r"ids \{3: 216\}"):
        evaluate_folder(*folders, raw_ids="dataset001_brain")
    with pytest.raises(LabelError, match="unknown data set 'brain'"):
        evaluate_folder(*folders, raw_ids="brain")


def test_a_folder_is_not_compared_with_itself(table, tmp_path):
    _, labels = folder_of_cases(tmp_path, 1)
    with pytest.raises(ValueError, match="predictions and for the labels"):
        evaluate_folder(labels, labels, table, tmp_path / "scores", dataset="kits")


def test_images_of_nnunets_names_are_found_and_called_images(tmp_path):
    _, labels = folder_of_cases(tmp_path, 2)
    for number in range(2):
        for channel in range(2):
            save(tmp_path / "images" / f"case_{number}_000{channel}.nii.gz", case_of("kits", number)[0])
    found = match_predictions(tmp_path / "images", labels, "kits", "image")
    assert [Path(pair["prediction"]).name for pair in found] == ["case_0_0000.nii.gz", "case_1_0000.nii.gz"]
    (tmp_path / "images/case_1_0000.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="no image for 1 of 2 cases: case_1"):
        match_predictions(tmp_path / "images", labels, "kits", "image")


def test_predictions_are_found_by_nnunets_names_behind_links_and_not_in_hidden_folders(tmp_path):
    """Inference names its maps like the images: CASE_0000. Some archives unpack each file into a folder of its name."""
    _, labels = folder_of_cases(tmp_path, 2)
    save(tmp_path / "else/case_0_0000.nii.gz", case_of("kits", 0)[0])
    (tmp_path / "maps/.old").mkdir(parents=True)
    (tmp_path / "maps/linked").symlink_to(tmp_path / "else")
    save(tmp_path / "maps/.old/case_0.nii.gz", case_of("kits", 0)[0])
    save(tmp_path / "maps/case_1.nii/case_1.nii", case_of("kits", 1)[0])
    found = [pair["prediction"] for pair in match_predictions(tmp_path / "maps", labels, "kits")]
    assert found == [tmp_path / "maps/linked/case_0_0000.nii.gz", tmp_path / "maps/case_1.nii/case_1.nii"]


def test_names_that_the_table_does_not_know_are_refused_before_earlier_scores_are_lost(table, tmp_path):
    out, labels = folder_of_cases(tmp_path, 1)
    evaluate_folder(out, labels, table, tmp_path / "scores", dataset="kits", tolerances_mm={"kidney": 1})
    before = (tmp_path / "scores/cases.csv").read_text()
    with pytest.raises(ValueError, match=r"tolerances_mm for unknown targets 'kidny' \(did you mean 'kidney'\?\)"):
        evaluate_folder(out, labels, table, tmp_path / "scores", dataset="kits", tolerances_mm={"kidny": 1})
    with pytest.raises(LabelError, match="unknown data set 'kit'"):
        evaluate_folder(out, labels, table, tmp_path / "scores", dataset="kit")
    assert (tmp_path / "scores/cases.csv").read_text() == before


def test_one_bad_truth_is_reported_and_the_others_are_scored(table, tmp_path):
    out, labels = folder_of_cases(tmp_path, 3)
    save(labels / "case_1.nii.gz", np.full((10, 12, 8), 77, np.uint8))
    whole = (labels / "case_2.nii.gz").read_bytes()
    (labels / "case_2.nii.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FailedCases, match=r"2 case.*case_1.*77.*case_2"):
        evaluate_folder(out, labels, table, tmp_path / "scores", dataset="kits")
    assert {row["case"] for row in load_rows(tmp_path / "scores" / "cases.csv")} == {"case_0"}
    assert len(json.loads((tmp_path / "scores" / "summary.json").read_text())["failed"]) == 2


def test_pool_items_name_their_data_sets_and_structures(table, tmp_path):
    """Same file names in two data sets: the folder tells them apart; masks per structure are merged."""
    items = []
    for dataset in ("kits", "amos"):
        prediction, raw = case_of(dataset, 5)
        label = save(tmp_path / dataset / "label.nii.gz", raw)
        save(tmp_path / "out" / dataset / "0001.nii.gz", prediction)
        items.append({"image": "image.nii.gz", "label": label, "dataset": dataset, "case": "0001"})
    prediction, raw = case_of("amos", 6)
    masks = {name: save(tmp_path / "m" / f"{name}.nii.gz", np.uint8(raw == raw_id)) for name, raw_id in
             (("liver", 6), ("kidney_left", 3))}  # fmt: skip
    save(tmp_path / "out" / "s0001_pred.nii", prediction)
    items.append({"image": "x/ct.nii.gz", "label": masks, "dataset": "masks", "case": "s0001"})
    summary = evaluate_folder(tmp_path / "out", items, table, tmp_path / "scores")
    assert {name: set(parts) for name, parts in summary["datasets"].items()} == {
        "kits": {"kidney", "kidney_tumor"},
        "amos": {"kidney", "kidney_left", "kidney_right", "liver"},
        "masks": {"kidney_left", "liver"},
    }
    merged = summary["datasets"]["masks"]["liver"]["dice"]["mean"]
    p, t = masks_of(prediction, raw, "amos", "liver")
    assert merged == pytest.approx(2 * (p & t).sum() / (p.sum() + t.sum()))


def test_one_prediction_cannot_serve_two_cases(table, tmp_path):
    prediction, raw = case_of("kits", 0)
    save(tmp_path / "out" / "imaging_seg.nii.gz", prediction)
    labels = [save(tmp_path / f"case_{n}" / "label.nii.gz", raw) for n in range(2)]
    items = [{"image": f"case_{n}/imaging.nii.gz", "label": labels[n], "case": f"case_{n}"} for n in range(2)]
    with pytest.raises(ValueError, match="fits two cases: case_0 and case_1"):
        evaluate_folder(tmp_path / "out", items, table, tmp_path / "scores", dataset="kits")


class Given(torch.nn.Module):
    """A network that is perfect at one thing: its image is the prediction already."""

    def forward(self, image):
        return image.to(torch.uint8)


def evaluator_over(items, handler):
    """An evaluator of `Given`; items without an image go as they are."""
    data = [
        {**item, "image": MetaTensor(torch.from_numpy(item["image"].astype(np.float32))[None], affine=item["affine"])}
        if "image" in item
        else item
        for item in items
    ]
    return CaseEvaluator(
        device=torch.device("cpu"), val_data_loader=DataLoader(data, batch_size=1), network=Given(),
        decollate=True, val_handlers=[handler], table=handler.table,
    )  # fmt: skip


def test_the_handler_writes_what_the_folder_command_writes(table, tmp_path):
    out, labels = folder_of_cases(tmp_path)
    summary = evaluate_folder(out, labels, table, tmp_path / "folder", dataset="kits")
    items = [
        {"image": case_of("kits", n)[0], "affine": AFFINE, "label": str(labels / f"case_{n}.nii.gz"),
         "dataset": "kits", "case": f"case_{n}"}
        for n in range(3)
    ]  # fmt: skip
    handler = CaseScores(str(tmp_path / "handler"), table)
    evaluator_over(items, handler).run()
    assert handler.summary.pop("protocol") == {"painted per case": "all targets", "mirrored along": "no axis"}
    assert json.dumps(handler.summary) == json.dumps(summary)
    for name in ("cases.csv", "lesions.csv"):
        assert (tmp_path / "handler" / name).read_bytes() == (tmp_path / "folder" / name).read_bytes()
    assert (tmp_path / "handler/scores.md").read_text().startswith((tmp_path / "folder/scores.md").read_text())


def test_the_handler_scores_the_rest_when_a_case_does_not_fit(table, tmp_path):
    _, labels = folder_of_cases(tmp_path)
    items = [
        {"image": case_of("kits", n)[0], "affine": AFFINE * (1.5 if n == 1 else 1),
         "label": str(labels / f"case_{n}.nii.gz"), "dataset": "kits", "case": f"case_{n}"}
        for n in range(3)
    ]  # fmt: skip
    with pytest.raises(FailedCases, match=r"(?s)1 of 3 cases.*case_1.*different grids"):
        evaluator_over(items, CaseScores(str(tmp_path / "scores"), table)).run()
    assert {row["case"] for row in load_rows(tmp_path / "scores" / "cases.csv")} == {"case_0", "case_2"}


def test_the_handler_reads_one_mask_per_structure(table, tmp_path):
    prediction, raw = case_of("amos", 6)
    masks = {
        name: save(tmp_path / f"{name}.nii.gz", np.uint8(raw == raw_id)) for name, raw_id in (("liver", 6), ("kidney_left", 3))
    }  # fmt: skip
    item = {"image": prediction, "affine": AFFINE, "label": masks, "dataset": "masks", "case": "s1"}
    handler = CaseScores(str(tmp_path / "scores"), table)
    evaluator_over([item], handler).run()
    p, t = masks_of(prediction, raw, "amos", "liver")
    expected = 2 * (p & t).sum() / (p.sum() + t.sum())
    assert handler.summary["datasets"]["masks"]["liver"]["dice"]["mean"] == pytest.approx(expected)


def test_an_evaluator_that_collects_failures_is_told_and_raises_itself(table, tmp_path):
    _, labels = folder_of_cases(tmp_path)
    items = [
        {"image": case_of("kits", n)[0], "affine": AFFINE * (1.5 if n == 0 else 1),
         "label": str(labels / f"case_{n}.nii.gz"), "dataset": "kits", "case": f"case_{n}"}
        for n in range(2)
    ]  # fmt: skip
    handler = CaseScores(str(tmp_path / "scores"), table, trained_cases=case_digests(items[1:]))
    evaluator = evaluator_over([{"case": "broken", "error": "no such file"}, *items], handler)
    with pytest.raises(FailedCases, match=r"(?s)2 of 3 cases failed.*broken: no such file.*case_0: .*different grids"):
        evaluator.run()
    assert [failure["case"] for failure in handler.summary["failed"]] == ["case_0", "broken"]
    assert handler.summary["protocol"]["cases that the weights were trained on"] == "1"


def test_a_case_named_like_anothers_output_has_a_label_map_all_the_same(tmp_path):
    rows = {case: {"seconds": 1.0} for case in ("a", "a_uncertainty", "b")}
    (tmp_path / "report.json").write_text(json.dumps({"cases": rows}))
    maps = [tmp_path / f"{case}.nii.gz" for case in rows]
    for path in (*maps, tmp_path / "b_uncertainty.nii.gz"):
        path.touch()
    assert label_maps_in(tmp_path) == maps


def test_rows_are_on_disk_as_soon_as_their_case_ends(table, tmp_path):
    writer = ScoreWriter(tmp_path, table)
    prediction, raw = case_of("kits", 0)
    writer.add(score_case(prediction, table.encode("kits", raw), table, "kits", (1, 1, 1), case="first"))
    assert not (tmp_path / "cases.csv").exists()
    assert {row["case"] for row in load_rows(tmp_path / "cases.csv.part")} == {"first"}


def test_lesions_of_a_tilted_gantry_measure_what_their_target_does(table):
    prediction, raw = case_of("kits", 0)
    rows = score_case(prediction, table.encode("kits", raw), table, "kits", (1, 1, 1), upright=0.9)
    sums = [
        (row["volume_true_ml"], sum(one["volume_ml"] for one in row["lesions"] if one["kind"] != "false"))
        for row in rows
    ]
    counted = [(total, found) for total, found in sums if found]
    assert counted and all(found == pytest.approx(total) for total, found in counted)


def test_grids_are_compared_in_millimeters_at_the_corners():
    shape = (100, 100, 20)
    assert grid_difference(shape, AFFINE, shape, AFFINE + 1e-5) == ""
    tilted = AFFINE.copy()
    tilted[0, 2] += 0.05
    assert "0.95 mm" in grid_difference(shape, AFFINE, shape, tilted)
    text = grid_difference(shape, AFFINE, (100, 100, 21), AFFINE)
    assert text == "shape (100, 100, 20) along (L, A, S) against (100, 100, 21) along (L, A, S)"


def test_stems():
    assert [stem(name) for name in ("a/b.nii.gz", "c.nii", "d.e.nii.gz", "f.nrrd", "g")] == ["b", "c", "d.e", "f", "g"]


def test_scores_are_one_line_per_target_over_all_data_sets():
    lesions = {"found": 2, "true": 3, "false": 1}
    summary = {"datasets": {
        "a": {"liver": {"dice": {"mean": 0.9}, "cases": 2}, "liver_tumor": {"dice": None, "cases": 0, "lesions": lesions}},
        "b": {"liver": {"dice": {"mean": 0.6}, "cases": 1}},
    }}  # fmt: skip
    liver, tumor = format_scores(summary).splitlines()
    assert liver.split() == ["liver", "Dice", "0.80", "in", "3", "cases"]
    assert tumor.endswith("2 of 3 found, 1 false")


def test_one_case_has_no_standard_deviation():
    row = dict.fromkeys(COLUMNS) | {"case": "a", "dataset": "d", "target": "t", "status": "ok", "tolerance_mm": 2.0}
    row |= {"dice": 0.5, "nsd": 0.25, "volume_predicted_ml": 1.0, "volume_true_ml": 1.0}
    assert "0.5000 ± -" in markdown_scores(summarize([row])) and "0.0000" not in markdown_scores(summarize([row]))
    assert "in 1 case" in format_scores(summarize([row])) and "cases" not in format_scores(summarize([row]))
    assert (counted(0, "case"), counted(1, "case"), counted(2, "case")) == ("0 cases", "1 case", "2 cases")
    assert "0.5000 ± 0.0000" in markdown_scores(summarize([row, row | {"case": "b"}]))
