"""The post-processing rule against nnU-Net 2.8.1's own results (fixtures/make_postprocessing.py) and SimpleITK."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from tsfm.evaluation.postprocessing_plan import determine
from tsfm.inference.postprocessing import PostProcessd, apply
from tsfm.labels import LabelTable

STORED = np.load(Path(__file__).parent / "fixtures" / "postprocessing_nnunet.npz")
NOTES = json.loads(str(STORED["notes"]))


def table_of(note):
    """Plain labels, or each target inside the one before (nested regions)."""
    names = note["targets"]
    targets = {name: {"inside": names[i - 1]} if note["regions"] and i else {} for i, name in enumerate(names)}
    return LabelTable(targets, [{"name": "d", "labels": {str(i + 1): name for i, name in enumerate(names)}}])


@pytest.fixture
def plan_of(tmp_path):
    """`determine` for arrays: predictions, truths, and the data set of each (None: the table's only one)."""

    def plan(predictions, truths, table, datasets=None):
        pairs = []
        for number, arrays in enumerate(zip(predictions, truths, strict=True)):
            pairs.append({"dataset": datasets and datasets[number]})
            for key, array in zip(("prediction", "label"), arrays, strict=True):
                pairs[-1][key] = tmp_path / f"{key}_{number}.nii.gz"
                nib.save(nib.Nifti1Image(array.astype(np.uint8), np.diag([4.0, 4.0, 4.0, 1.0])), pairs[-1][key])
        return determine(pairs, table)

    return plan


@pytest.mark.parametrize("note", NOTES, ids=[note["name"] for note in NOTES])
def test_plan_and_result_are_nnunets(note, plan_of):
    truths, predictions = STORED[f"{note['name']}_truth"], STORED[f"{note['name']}_prediction"]
    plan = plan_of(list(predictions), list(truths), table_of(note))
    assert [step["values"] for step in plan["steps"]] == note["kept"]
    assert list(plan["evidence"][0]["before"].values()) == pytest.approx(note["before"])
    plan["steps"] = [{**step, "fill": 0} for step in plan["steps"]]  # nnU-Net fills with background alone
    results = np.stack([apply(prediction, plan) for prediction in predictions])
    np.testing.assert_array_equal(results, STORED[f"{note['name']}_result"])


def test_the_fixture_covers_every_outcome():
    kept = {note["name"]: note["kept"] for note in NOTES}
    assert [1, 2, 3] not in kept["nothing"] and [1, 2, 3] in kept["foreground"]
    assert [2] not in kept["truth_in_two"] and [2] in kept["one_class"]
    assert [2, 3] in kept["regions"]


def small_table(dataset_labels=None):
    targets = {"liver": {}, "liver_tumor": {"inside": "liver"}, "spleen": {}}
    labels = dataset_labels or {"1": "liver", "2": "liver_tumor", "3": "spleen"}
    return LabelTable(targets, [{"name": "d", "labels": labels}])


def liver_case():
    """A liver with one true tumor; the prediction adds a false tumor inside the liver."""
    truth = np.zeros((8, 10, 12), np.uint8)
    truth[1:7, 1:9, 1:11] = 1
    truth[2:4, 2:4, 2:5] = 2
    prediction = truth.copy()
    prediction[5, 7, 9] = 2
    return prediction, truth


def test_a_false_tumor_becomes_the_organ_around_it(plan_of):
    prediction, truth = liver_case()
    plan = plan_of([prediction], [truth], small_table())
    assert [step["target"] for step in plan["steps"]] == ["liver_tumor"]
    np.testing.assert_array_equal(apply(prediction, plan), truth)


def test_targets_that_the_data_set_does_not_annotate_decide_nothing(plan_of):
    prediction, truth = liver_case()
    plan = plan_of([prediction], [np.where(truth == 2, 1, truth)], small_table({"1": "liver"}))
    assert plan["steps"] == []
    assert {name for entry in plan["evidence"] for name in entry["before"]} == {"liver"}


def test_the_largest_component_is_simpleitks_and_equally_large_ones_stay():
    rng = np.random.default_rng(0)
    values = (rng.random((12, 14, 16)) < 0.12).astype(np.uint8) * rng.integers(1, 3, (12, 14, 16)).astype(np.uint8)
    plan = {"steps": [{"values": [1, 2], "fill": 0}]}
    image = sitk.ConnectedComponent(sitk.GetImageFromArray((values > 0).astype(np.uint8)), True)
    largest = sitk.GetArrayFromImage(sitk.RelabelComponent(image)) == 1
    np.testing.assert_array_equal(apply(values, plan), np.where(largest, values, 0))
    twins = np.zeros((5, 5, 5), np.uint8)
    twins[0, 0, 0] = twins[4, 4, 4] = 1
    np.testing.assert_array_equal(apply(twins, plan), twins)
    np.testing.assert_array_equal(apply(np.zeros_like(twins), plan), 0)


def test_a_thin_row_of_equally_large_single_voxels_stays():
    values = np.zeros((9, 1, 1), np.uint8)
    values[::2] = 1
    np.testing.assert_array_equal(apply(values, {"steps": [{"values": [1], "fill": 0}]}), values)


def test_the_plan_is_json_and_the_input_stays_as_it_was(tmp_path, plan_of):
    prediction, truth = liver_case()
    before = prediction.copy()
    plan = plan_of([prediction], [truth], small_table())
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    step = PostProcessd("pred", str(tmp_path / "plan.json"), targets=["liver", "liver_tumor", "spleen"])
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    item = {"pred": MetaTensor(torch.from_numpy(prediction)[None], affine=affine), "image": 1}
    result = step(item)["pred"]
    assert isinstance(result, MetaTensor) and result.dtype == torch.uint8
    assert torch.equal(result.affine, affine)
    np.testing.assert_array_equal(result.numpy()[0], truth)
    np.testing.assert_array_equal(prediction, before)
    np.testing.assert_array_equal(item["pred"].numpy()[0], before)


def inferred(array, targets=None, clicks=()):
    """A label map as an inferer gives it, with its notes."""
    meta = {"clicks": json.dumps(clicks)} | ({"computed": json.dumps(targets)} if targets else {})
    return MetaTensor(torch.from_numpy(array)[None], meta=meta)


def test_two_tumors_stay_where_the_liver_around_them_was_not_computed(plan_of):
    """The largest component of a liver with its tumors is the liver; of the tumors alone it would be one of them."""
    _, truth = liver_case()
    truth[6], truth[4:6, 6:8, 8:9] = 0, 2
    prediction = truth.copy()
    prediction[7, 2, 3] = 1
    other = LabelTable(
        {"liver": {}, "liver_tumor": {"inside": "liver"}, "spleen": {}},
        [{"name": "d", "labels": {"1": "liver", "2": "liver_tumor"}}, {"name": "e", "labels": {"2": "liver_tumor"}}],
    )
    alone = np.where(truth == 2, truth, 0)
    plan = plan_of([prediction, alone], [truth, alone], other, ["d", "e"])
    assert [step["target"] for step in plan["steps"]] == ["all foreground"] and plan["steps"][0]["needs"] == ["liver"]
    older = {**plan, "steps": [{key: step[key] for key in ("target", "values", "fill")} for step in plan["steps"]]}
    for one in (plan, older, {**plan, "steps": [{"target": "liver", "values": [1, 2], "fill": 0}]}):
        step = PostProcessd("pred", one, ["liver", "liver_tumor", "spleen"])
        assert np.array_equal(step({"pred": inferred(alone, ["liver_tumor"])})["pred"].numpy()[0], alone)
        everything = step({"pred": inferred(prediction, ["liver", "liver_tumor", "spleen"])})["pred"]
        assert np.array_equal(everything.numpy()[0], truth)


def test_what_is_removed_becomes_no_target_that_was_not_computed_and_a_click_keeps_it(plan_of):
    prediction, truth = liver_case()
    plan = plan_of([prediction], [truth], small_table())
    step = PostProcessd("pred", plan, ["liver", "liver_tumor", "spleen"])
    tumors = np.where(prediction == 2, prediction, 0)
    found = step({"pred": inferred(tumors, ["liver_tumor"])})["pred"].numpy()[0]
    np.testing.assert_array_equal(found, np.where(truth == 2, truth, 0))
    for kind, name, kept in (
        ("inside", "liver_tumor", True),
        ("label", "liver_tumor", True),
        ("label", "liver", False),
    ):
        found = step({"pred": inferred(prediction, clicks=[[kind, name, [5, 7, 9]]])})["pred"].numpy()[0]
        np.testing.assert_array_equal(found, prediction if kept else truth)
    nested = LabelTable(
        {"a": {}, "b": {"inside": "a"}, "c": {"inside": "b"}}, [{"name": "d", "labels": {"1": "a", "2": "b", "3": "c"}}]
    )
    truth = np.ones((6, 6, 6), np.uint8)
    truth[1:5, 1:5, 1:5], truth[1, 1, 1:3] = 2, 3
    prediction = truth.copy()
    prediction[4, 4, 4] = 3
    plan = plan_of([prediction], [truth], nested)
    found = apply(np.where(prediction == 2, 1, prediction).astype(np.uint8), plan, ["a", "c"])
    np.testing.assert_array_equal(found, np.where(truth == 2, 1, truth))


def test_without_a_plan_nothing_changes():
    pred = torch.ones(1, 3, 3, 3, dtype=torch.uint8)
    assert PostProcessd("pred")({"pred": pred})["pred"] is pred


def test_wrong_plans_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such post-processing plan"):
        PostProcessd("pred", str(tmp_path / "none.json"))
    for other in ({"cases": {}}, [1], {}, {"steps": [{"target": "a"}]}):
        (tmp_path / "report.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=r"report\.json is no post-processing plan; expected .steps."):
            PostProcessd("pred", str(tmp_path / "report.json"))
    with pytest.raises(ValueError, match="made for"):
        PostProcessd("pred", {"targets": ["a"], "steps": []}, targets=["b"])
