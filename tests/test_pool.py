import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import touch
from tsfm.cases.folders import PoolError, find_images
from tsfm.cases.pool import DatasetPool, complete_items, is_bare, sampling_weights
from tsfm.planning.own_data import dataset_pool
from tsfm_tools.phantoms import layouts as phantoms

PAPER_POOL = Path(__file__).parents[1] / "bundles/tsfm_pretrain/configs/pool.json"
PAPER_COUNTS = {
    "totalsegmentator": 1204, "msd_hepaticvessel": 303, "kits21": 300, "msd_pancreas": 281, "amos22": 240,
    "msd_liver": 131, "msd_colon": 126, "breast_dce": 100, "msd_lung": 63, "btcv": 30,
}  # fmt: skip
PAPER_SHARES = {
    "totalsegmentator": 0.235, "msd_hepaticvessel": 0.118, "kits21": 0.117, "msd_pancreas": 0.113, "amos22": 0.105,
    "msd_liver": 0.077, "msd_colon": 0.076, "breast_dce": 0.068, "msd_lung": 0.054, "btcv": 0.037,
}  # fmt: skip


def one_dataset(**fields):
    return {"targets": {"a": {}}, "datasets": [{"name": "own", "folder": "own", "labels": {"1": "a"}, **fields}]}


def test_cases_without_a_label_file_are_left_out_where_the_data_set_says_so(tmp_path):
    """KiTS19 unpacks 300 images of which 210 have labels, BraTS2020 one case whose label has another name."""
    touch(tmp_path, "own/case_0/imaging.nii.gz", "own/case_0/segmentation.nii.gz", "own/case_1/imaging.nii.gz")
    layout = {"image": "{case}/imaging.nii.gz", "label": "{case}/segmentation.nii.gz"}
    pool = DatasetPool(one_dataset(**layout, unlabelled="skip"), tmp_path)
    assert [item["case"] for item in pool.cases] == ["case_0"]
    with pytest.raises(PoolError, match=r"case_1.segmentation\.nii\.gz"):
        _ = DatasetPool(one_dataset(**layout), tmp_path).cases
    with pytest.raises(PoolError, match='only choice is "skip"'):
        DatasetPool(one_dataset(**layout, unlabelled="keep"), tmp_path)


def test_a_decathlon_case_may_have_one_file_per_channel(tmp_path):
    touch(tmp_path, "own/i/a_0.nii.gz", "own/i/a_1.nii.gz", "own/l/a.nii.gz")
    listed = {"image": ["./i/a_0.nii.gz", "./i/a_1.nii.gz"], "label": "./l/a.nii.gz"}
    (tmp_path / "own/dataset.json").write_text(json.dumps({"labels": {"1": "a"}, "training": [listed]}))
    (item,) = DatasetPool(one_dataset(format="msd"), tmp_path).cases
    assert item["image"] == [str(tmp_path / f"own/i/a_{channel}.nii.gz") for channel in range(2)]
    assert item["label"] == str(tmp_path / "own/l/a.nii.gz")


def test_a_case_that_is_listed_twice_is_one_case(tmp_path, caplog):
    """As two cases it would be in training and in validation."""
    touch(tmp_path, "own/i/a.nii.gz", "own/i/b.nii.gz", "own/l/a.nii.gz", "own/l/b.nii.gz")
    listed = [{"image": f"./i/{case}.nii.gz", "label": f"./l/{case}.nii.gz"} for case in "aba"]
    (tmp_path / "own/dataset.json").write_text(json.dumps({"labels": {"1": "a"}, "training": listed}))
    assert [item["case"] for item in DatasetPool(one_dataset(format="msd"), tmp_path).cases] == ["a", "b"]
    assert "lists 1 case twice" in caplog.text
    listed[2]["label"] = "./l/b.nii.gz"
    (tmp_path / "own/dataset.json").write_text(json.dumps({"labels": {"1": "a"}, "training": listed}))
    with pytest.raises(PoolError, match=r"lists .*a\.nii\.gz twice"):
        _ = DatasetPool(one_dataset(format="msd"), tmp_path).cases


def test_a_modality_pattern_that_fits_no_case_is_named(tmp_path, caplog):
    touch(tmp_path, "own/i/mr_1.nii.gz", "own/l/mr_1.nii.gz")
    layout = {"image": "i/{case}.nii.gz", "label": "l/{case}.nii.gz", "modality": {"MR_*": "MR", "default": "CT"}}
    assert DatasetPool(one_dataset(**layout), tmp_path).cases[0]["modality"] == "CT"
    assert "modality patterns ['MR_*'] fit no case; the cases have names like mr_1" in caplog.text


def test_only_stars_of_a_pattern_are_wildcards(tmp_path):
    names = ("scan[1]/ct.nii.gz", "scan[1]/seg_x.nii.gz", "scan1/ct.nii.gz", "scan1/seg_y.nii.gz")
    touch(tmp_path / "own[2]", *names)
    layout = {"folder": "own[2]", "image": "{case}/ct.nii.gz", "label": "{case}/seg*.nii.gz"}
    cases = DatasetPool(one_dataset(**layout), tmp_path).cases
    found = {item["case"]: os.path.basename(item["label"]) for item in cases}
    assert found == {"scan[1]": "seg_x.nii.gz", "scan1": "seg_y.nii.gz"}


@pytest.fixture(scope="module")
def all_ten(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ten")
    phantoms.write_all_ten(str(folder))
    return folder


def test_the_papers_ten_layouts_are_read_by_the_shipped_pool_file(all_ten):
    pool = DatasetPool(PAPER_POOL, all_ten)
    found = {item["dataset"] for item in pool.cases}
    assert found == set(PAPER_COUNTS)
    for item in pool.cases:
        labels = item["label"].values() if isinstance(item["label"], dict) else [item["label"]]
        assert all(os.path.isfile(path) for path in [item["image"], *labels]), item


def test_the_paper_pool_declares_about_thirty_targets_in_a_tree():
    table = DatasetPool(PAPER_POOL, "nowhere").table
    assert 28 <= len(table.names) <= 33
    assert table.parent("kidney_left") == "kidney" and table.parent("liver_tumor") == "liver"
    assert "kidney" in table.annotated("amos22") and "lung" in table.annotated("totalsegmentator")
    assert "kidney_left" not in table.annotated("kits21")


def test_amos_cases_from_500_on_are_mr(all_ten):
    pool = DatasetPool(PAPER_POOL, all_ten, datasets="amos22")
    for item in pool.cases:
        assert item["modality"] == ("MR" if int(item["case"][-4:]) >= 500 else "CT")


def test_sampling_shares_at_the_papers_counts():
    items = [{"dataset": name} for name, count in PAPER_COUNTS.items() for _ in range(count)]
    assert len(items) == 2779 - 1  # FACTS: one case too many in the paper's sum
    weights = sampling_weights(items)
    for name, share in PAPER_SHARES.items():
        found = sum(weight for item, weight in zip(items, weights, strict=True) if item["dataset"] == name)
        assert found == pytest.approx(share, abs=6e-4), name
    total = sum(np.sqrt(count) for count in PAPER_COUNTS.values())
    assert weights[0] == pytest.approx(1 / np.sqrt(1204) / total)


def test_patterns_read_a_data_set_without_python(tmp_path):
    touch(tmp_path, "own/p1/ct.nii.gz", "own/p1/seg.nii.gz", "own/p2/ct.nii.gz", "own/p2/seg.nii.gz", "own/notes.txt")
    pool = DatasetPool(one_dataset(image="{case}/ct.nii.gz", label="{case}/seg.nii.gz"), tmp_path)
    assert [item["case"] for item in pool.cases] == ["p1", "p2"]
    assert pool.cases[0]["label"] == str(tmp_path / "own/p1/seg.nii.gz")


def test_one_file_per_channel_and_wildcards(tmp_path):
    touch(tmp_path, "own/part1/c1_0000.nii.gz", "own/part1/c1_0001.nii.gz", "own/masks/c1.nii.gz")
    pool = DatasetPool(
        one_dataset(image=["part*/{case}_0000.nii.gz", "part*/{case}_0001.nii.gz"], label="masks/{case}.nii.gz"),
        tmp_path,
    )
    assert [Path(path).name for path in pool.cases[0]["image"]] == ["c1_0000.nii.gz", "c1_0001.nii.gz"]


@pytest.mark.parametrize(
    "written", ["ct/", "./ct", "../own/ct", "{folder}/ct", "./ct//{{case}}.nii", "{folder}/ct/{{case}}.nii"]
)
def test_a_folder_and_a_pattern_may_be_written_in_any_way(tmp_path, written):
    touch(tmp_path, "own/ct/p 1.nii", "own/seg/p 1.nii")
    images = written.format(folder=tmp_path / "own")
    pool = dataset_pool(str(tmp_path / "own"), images=images, labels=images.replace("ct", "seg"), label_ids={"1": "a"})
    (item,) = pool.cases
    assert item["case"] == "p 1" and os.path.samefile(item["image"], tmp_path / "own/ct/p 1.nii")


def test_a_name_in_another_encoding_becomes_text(tmp_path):
    name = os.fsdecode(b"m\xfcller")  # Latin-1, as unpacked from a zip of Windows
    touch(tmp_path, f"own/ct/{name}.nii", f"own/seg/{name}.nii")
    (item,) = DatasetPool(one_dataset(image="ct/{case}.nii", label="seg/{case}.nii"), tmp_path).cases
    assert item["case"] == find_images(tmp_path / "own/ct")[0]["case"] == r"m\xfcller"
    assert os.path.isfile(item["image"]) and os.path.isfile(item["label"])


def test_one_mask_per_structure(tmp_path):
    touch(tmp_path, "own/s1/ct.nii.gz", "own/s1/seg/liver.nii.gz")
    pool = DatasetPool(
        one_dataset(image="{case}/ct.nii.gz", label="{case}/seg/{structure}.nii.gz", labels={"liver": "a"}), tmp_path
    )
    assert pool.cases[0]["label"] == {"liver": str(tmp_path / "own/s1/seg/liver.nii.gz")}


def test_all_missing_data_sets_are_listed_at_once(tmp_path):
    with pytest.raises(PoolError) as error:
        _ = DatasetPool(PAPER_POOL, tmp_path).cases
    assert all(name in str(error.value) for name in PAPER_COUNTS)
    assert "--allow_missing" in str(error.value)


def test_going_on_without_missing_data_sets_needs_to_be_asked_for(tmp_path):
    touch(tmp_path, "own/a.nii.gz", "own/a_seg.nii.gz")
    declared = one_dataset(image="{case}.nii.gz", label="{case}_seg.nii.gz", exclude=["a_seg"])
    declared["datasets"].append({**declared["datasets"][0], "name": "absent", "folder": "absent"})
    with pytest.raises(PoolError, match="absent"):
        _ = DatasetPool(declared, tmp_path).cases
    pool = DatasetPool(declared, tmp_path, allow_missing=True)
    assert [item["case"] for item in pool.cases] == ["a"]
    assert "absent" in pool.summary()["missing"] and "absent" in pool.describe()


def test_a_missing_label_names_the_file(tmp_path):
    touch(tmp_path, "own/img/c1.nii.gz")
    with pytest.raises(PoolError, match=r"own/lab/c1\.nii\.gz"):
        _ = DatasetPool(one_dataset(image="img/{case}.nii.gz", label="lab/{case}.nii.gz"), tmp_path).cases


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "hdf5"}, "neither 'msd' nor 'patterns'"),
        ({"image": "ct.nii.gz", "label": "x"}, "no {case}"),
        ({"image": "{case}.nii.gz", "label": "seg.nii.gz"}, "the label pattern 'seg.nii.gz' has no {case}"),
        ({}, '"image" and "label" patterns'),
        ({"format": "msd", "colour": 1}, "unknown fields"),
    ],
)
def test_a_declaration_that_cannot_be_read_is_refused_at_once(tmp_path, fields, message):
    with pytest.raises(PoolError, match=message):
        DatasetPool(one_dataset(**fields), tmp_path)


def test_broken_json_names_the_file(tmp_path):
    (tmp_path / "pool.json").write_text("{")
    with pytest.raises(PoolError, match=r"pool\.json is not valid JSON"):
        DatasetPool(tmp_path / "pool.json")


def many_cases(folder, count, **fields):
    touch(folder, *(f"own/{part}/c{i:03d}.nii.gz" for part in ("img", "lab") for i in range(count)))
    return DatasetPool(one_dataset(image="img/{case}.nii.gz", label="lab/{case}.nii.gz", **fields), folder)


def test_folds_are_nnunets(tmp_path):
    """Reference: sklearn KFold(5, shuffle=True, random_state=12345) over 13 sorted keys, as nnU-Net 2.8.1 splits."""
    pool = many_cases(tmp_path, 13)
    expected = json.loads((Path(__file__).parent / "fixtures/kfold_13.json").read_text())
    for fold in range(5):
        train, val = pool.split(fold)
        assert [int(item["case"][1:]) for item in val] == expected[fold]
        assert len(train) + len(val) == 13


def test_few_cases_and_odd_folds(tmp_path):
    single = many_cases(tmp_path / "one", 1)
    assert [len(part) for part in single.split(0)] == [1, 0]
    three = many_cases(tmp_path / "three", 3)
    assert [len(part) for part in three.split(0)] == [2, 1]
    assert [len(part) for part in three.split("all")] == [3, 0]
    with pytest.raises(PoolError, match="fold 7 does not exist"):
        three.split(7)


def test_the_same_patient_stays_in_one_fold_across_data_sets(tmp_path):
    names = [f"p{i:02d}" for i in range(12)]
    touch(
        tmp_path,
        *(f"{d}/{k}_{n}.nii.gz" for d in ("ct", "mr") for k in ("i", "l") for n in names[: 12 if d == "ct" else 9]),
    )
    rule = {
        "image": "i_{case}.nii.gz",
        "label": "l_{case}.nii.gz",
        "labels": {"1": "a"},
        "patient": {"group": "g", "pattern": "p(\\d+)"},
    }
    pool = DatasetPool(
        {"targets": {"a": {}}, "datasets": [{"name": d, "folder": d, **rule} for d in ("ct", "mr")]}, tmp_path
    )
    held_out = set()
    for fold in range(5):
        train, val = pool.split(fold)
        assert not {item["case"] for item in train} & {item["case"] for item in val}
        held_out |= {item["case"] for item in val}
    assert held_out == set(names)


def test_a_splits_file_decides_and_is_checked(tmp_path):
    many_cases(tmp_path, 3)
    declared = one_dataset(image="img/{case}.nii.gz", label="lab/{case}.nii.gz")
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps({"own": [{"train": ["c000"], "val": ["c002"]}]}))
    train, val = DatasetPool(declared, tmp_path, splits_file=splits).split(0)
    with pytest.raises(PoolError, match="has 1 folds for data set 'own', fold -1 was asked for"):
        DatasetPool(declared, tmp_path, splits_file=splits).split(-1)
    assert [item["case"] for item in train] == ["c000"] and [item["case"] for item in val] == ["c002"]
    splits.write_text(json.dumps({"own": [{"train": ["c000", "cX"], "val": ["c000"]}]}))
    with pytest.raises(PoolError, match=r"both parts \['c000'\].*\['cX'\]"):
        DatasetPool(declared, tmp_path, splits_file=splits).split(0)


def test_a_splits_file_keeps_patients_apart_and_names_a_case_once(tmp_path):
    """Two data sets of the same patients: the splits of each alone look fine."""
    files = {"image": "i/{case}.nii.gz", "label": "l/{case}.nii.gz", "patient": {"group": "g", "pattern": "\\d+"}}
    sets = [{"name": name, "folder": name, "labels": {"1": "a"}, **files} for name in ("ct", "mr")]
    touch(tmp_path, *(f"{name}/{part}/p{n}.nii.gz" for name in ("ct", "mr") for part in "il" for n in (1, 2)))
    splits = tmp_path / "splits.json"
    folds = {"ct": [{"train": ["p1", "p1"], "val": ["p2"]}], "mr": [{"train": ["p2"], "val": []}]}
    splits.write_text(json.dumps(folds))
    declared = {"targets": {"a": {}}, "datasets": sets}
    with pytest.raises(PoolError, match=r'splits\.json, fold 0: patients in both parts.*"patient": 2 of g;'):
        DatasetPool(declared, tmp_path, splits_file=splits).split(0)
    train, val = DatasetPool(declared, tmp_path, ["ct", "ct"], splits_file=splits).split(0)
    assert [item["case"] for item in train] == ["p1"] and [item["case"] for item in val] == ["p2"]
    sets[0]["patient"] = {"pattern": "("}
    with pytest.raises(PoolError, match=r"'ct': the patient pattern '\(' is no regular expression"):
        DatasetPool(declared, tmp_path)


def test_a_label_that_is_a_folder_is_a_label(tmp_path):
    """A DICOM label map lies in a folder of its own; "skip" leaves out the cases without any."""
    touch(tmp_path, *(f"own/{case}/ct.nii.gz" for case in "ab"), "own/a/seg/1.dcm")
    pool = DatasetPool(one_dataset(image="{case}/ct.nii.gz", label="{case}/seg", unlabelled="skip"), tmp_path)
    assert [item["case"] for item in pool.cases] == ["a"]


def test_bare_items_are_completed_from_their_file_name():
    table = DatasetPool(one_dataset(format="msd")).table
    items = [{"image": "/x/scan 1.nii.gz", "label": "/y/1.nii.gz"}]
    assert is_bare(items)
    assert complete_items(items, table, "MR") == [{**items[0], "dataset": "own", "modality": "MR", "case": "scan 1"}]
    with pytest.raises(PoolError, match="unknown data set 'b'"):
        complete_items([{"image": "x", "dataset": "b"}], table)


def test_summary_says_what_was_found(all_ten):
    summary = DatasetPool(PAPER_POOL, all_ten).summary()
    assert summary["targets"]["kidney_tumor"] == ["kits21"]
    assert summary["datasets"]["msd_liver"]["labels"] == {"0": "background", "1": "liver", "2": "liver_tumor"}
    assert sum(entry["sampling_share"] for entry in summary["datasets"].values()) == pytest.approx(1)


def test_labels_without_an_image_are_named_and_images_without_a_label_refused_with_advice_that_fits(tmp_path, caplog):
    for path in ("mr/a.nii.gz", "mr/b.nii.gz", "masks/a.nii.gz", "masks/b.nii.gz", "masks/lone.nii.gz"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    settings = {"images": "mr", "labels": "masks", "label_ids": {"1": "sarcoma"}, "modality": "MR"}
    assert [item["case"] for item in dataset_pool(str(tmp_path), **settings).cases] == ["a", "b"]
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1 and str(tmp_path / "masks/lone.nii.gz") in warned[0] and "a.nii.gz" not in warned[0]
    (tmp_path / "masks/b.nii.gz").unlink()
    with pytest.raises(PoolError, match="unlabelled") as error:
        dataset_pool(str(tmp_path), **settings).cases  # noqa: B018
    assert str(tmp_path / "masks/b.nii.gz") in str(error.value) and "--allow_missing" not in str(error.value)
