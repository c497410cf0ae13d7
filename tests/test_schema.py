"""What users write in JSON: every slip is named with its file, its place and the nearest right word; what is meant is read."""

import json

import pytest
from conftest import touch
from tsfm.cases.folders import PoolError, find_images
from tsfm.cases.pool import DatasetPool, complete_items
from tsfm.labels import LabelError, LabelTable
from tsfm.names import case_names, modality_name, plain_name, plain_names
from tsfm.network.description import check_description
from tsfm.planning.own_data import dataset_pool
from tsfm.schema import FileError, read_json

LAYOUT = {"image": "img/{case}.nii.gz", "label": "lab/{case}.nii.gz"}
OWN = {"name": "own", "folder": "own", "modality": "CT", "labels": {"1": "liver"}, **LAYOUT}


def write(path, content, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding=encoding)
    return path


def pool_file(root, targets=None, **fields):
    return write(root / "pool.json", {"targets": targets or {"liver": {}}, "datasets": [{**OWN, **fields}]})


# ---- keys and types ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exlude": []}, "pool.json: data set 'own': unknown fields 'exlude' (did you mean 'exclude'?)"),
        ({"exclude": "liver_0"}, 'data set \'own\', "exclude" is "liver_0", expected a list of case names'),
        ({"ignore": ["4"]}, '"ignore", entry 0 is "4", expected a raw id'),
        ({"labels": {"1": 7}}, '"labels", "1" is 7, expected the name of a target'),
        ({"labels": ["liver"]}, '"labels" is ["liver"], expected an object from raw ids'),
        ({"patient": {"group": "g"}}, "lacks ['pattern']"),
        ({"modality": "CTT"}, "modality 'CTT' is unknown (did you mean 'CT'?)"),
        ({"modality": {"x*": "MR"}}, 'has no "default"'),
        ({"modality": "PET/CT"}, "names several"),
        ({"folder": 3}, '"folder" is 3, expected a path'),
        ({"name": "$x"}, "a letter or digit first"),
        ({"others": None}, '"others" is null, expected "background"'),
        ({"others": "ignore"}, '"others" is "ignore", expected "background"'),
        ({"labels": {"1": "livr"}}, "not among the targets (did you mean 'liver'?)"),
    ],
)
def test_a_slip_in_a_pool_file_is_named(tmp_path, fields, message):
    with pytest.raises((PoolError, LabelError)) as error:
        DatasetPool(pool_file(tmp_path, **fields), tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ({"type": "10200004 Liver", "side": "left"}, ""),
        ({"type": "10200005 Liver"}, '"type" is "10200005 Liver", expected a SNOMED CT code and its meaning'),
        ({"type": "10020004 Liver"}, "the last digit is a check"),
        ({"type": "10200004"}, "expected a SNOMED CT code and its meaning"),
        ({"type": "Liver"}, "expected a SNOMED CT code and its meaning"),
        ({"site": "10200004 Liver"}, "lacks ['type']"),
        ({"type": "10200004 Liver", "side": "both"}, 'expected "left" or "right"'),
    ],
)
def test_snomed_codes_are_checked_by_their_last_digit_and_travel_with_the_table(tmp_path, codes, message):
    path = pool_file(tmp_path, targets={"liver": {"snomed": codes}})
    if message:
        with pytest.raises(PoolError) as error:
            DatasetPool(path, tmp_path)
        assert message in str(error.value)
    else:
        table = DatasetPool(path, tmp_path).table
        assert LabelTable.from_dict(table.to_dict()).entry("liver")["snomed"] == codes
        check_description({"targets": table.to_dict()["targets"]}, "weights")


def test_everything_that_is_wrong_comes_in_one_message(tmp_path):
    with pytest.raises(PoolError) as error:
        DatasetPool(
            pool_file(tmp_path, {"liver": {"insid": "x", "lesion": "yes"}, "a": None}, exclude="a", ignore=3), tmp_path
        )
    text = str(error.value)
    assert all(
        part in text
        for part in (
            "'insid' (did you mean 'inside'?)",
            '"lesion" is "yes"',
            '"exclude"',
            '"ignore"',
            "target 'a' is null",
        )
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "the file is [], expected an object"),
        ('{"targets": {}}', "lacks ['datasets']"),
        ('{"targets": {"a": {}, "a": {}}, "datasets": []}', r"the keys ['a'] are there twice"),
        ('{"targets": {}, "datasets": [}', "not valid JSON"),
        ('{"targets": {}, "datasets": ' + "[" * 5000 + "]" * 5000 + "}", "nested too deeply"),
    ],
)
def test_content_that_is_no_pool_is_named_with_its_file(tmp_path, content, message):
    with pytest.raises(PoolError) as error:
        DatasetPool(write(tmp_path / "pool.json", content), tmp_path)
    assert "pool.json" in str(error.value) and message in str(error.value)


def test_a_raw_id_that_is_declared_twice_is_refused(tmp_path):
    text = json.dumps({"targets": {"a": {}, "b": {}}, "datasets": [{**OWN, "labels": {"1": "a", "2": "b"}}]})
    with pytest.raises(PoolError, match=r"the keys \['1'\] are there twice"):
        DatasetPool(write(tmp_path / "pool.json", text.replace('"2": "b"', '"1": "b"')), tmp_path)
    with pytest.raises(LabelError, match="the id 1 twice"):
        LabelTable({"a": {}, "b": {}}, [{"name": "d", "labels": {"1": "a", "01": "b"}}])


def test_a_byte_order_mark_is_read_and_another_encoding_named(tmp_path):
    touch(tmp_path, "own/img/c1.nii.gz", "own/lab/c1.nii.gz")
    text = pool_file(tmp_path).read_text()
    marked = write(tmp_path / "marked.json", text, "utf-8-sig")
    assert [item["case"] for item in DatasetPool(marked, tmp_path).cases] == ["c1"]
    with pytest.raises(FileError, match=r"wide.json is not text in UTF-8"):
        read_json(write(tmp_path / "wide.json", text, "utf-16"))
    with pytest.raises(FileError, match="cannot be read"):
        read_json(tmp_path)


@pytest.mark.parametrize(
    ("written", "meant"), [("ct", "CT"), ("CT scan", "CT"), ("MRI", "MR"), ("T1w", "MR"), ("pt", "PET")]
)
def test_what_people_write_for_a_modality_is_understood(tmp_path, written, meant):
    touch(tmp_path, "own/img/c1.nii.gz", "own/lab/c1.nii.gz")
    pool = DatasetPool(pool_file(tmp_path, modality=written), tmp_path)
    assert pool.cases[0]["modality"] == modality_name(written) == meant
    assert complete_items([{"image": "a.nii", "modality": written}], pool.table)[0]["modality"] == meant


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"trainin": [], "labels": {"1": "a"}}, "unknown key 'trainin' (did you mean 'training'?)"),
        ({"training": [{"image": "a.nii"}], "labels": {"1": "a"}}, "\"training\", entry 0: lacks ['label']"),
        ({"training": {"image": "a"}, "labels": {"1": "a"}}, 'expected a list of {"image": path'),
        ({"training": [], "labels": ["background", "a"]}, 'expected an object like {"0": "background"'),
        ({"training": [], "labels": {"0": "background", "1": "ER+/a", "2": "ER-/a"}}, "all become 'er_a'"),
        ({"training": [], "labels": {"0": "background", "1": "???"}}, "have no letter or digit"),
    ],
)
def test_a_slip_in_a_dataset_json_is_named(tmp_path, content, message):
    path = write(tmp_path / "dataset.json", content)
    with pytest.raises(ValueError) as error:
        _ = dataset_pool(str(tmp_path)).cases
    assert str(path) in str(error.value) and message in str(error.value)


def test_keys_of_others_in_a_dataset_json_are_left_alone(tmp_path):
    touch(tmp_path, "a.nii.gz", "b.nii.gz")
    known = {"name": "x", "relase": "1.0", "tensorImageSize": "3D", "hospital": "y", "modality": {"0": "CT"}}
    content = {
        **known,
        "labels": {"0": "background", "1": "liver"},
        "training": [{"image": "./a.nii.gz", "label": "b.nii.gz"}],
    }
    write(tmp_path / "dataset.json", content)
    assert [item["case"] for item in dataset_pool(str(tmp_path)).cases] == ["a"]


@pytest.mark.parametrize(("written", "meant"), [("CT", "CT"), ({"0": "MRI"}, "MR"), (["ct"], "CT"), ("T2w", "MR")])
def test_a_modality_may_be_a_text_a_list_or_an_object(tmp_path, written, meant):
    touch(tmp_path, "a.nii.gz", "b.nii.gz")
    training = [{"image": "./a.nii.gz", "label": "./b.nii.gz"}]
    write(
        tmp_path / "dataset.json",
        {"modality": written, "labels": {"0": "background", "1": "liver"}, "training": training},
    )
    assert [item["modality"] for item in dataset_pool(str(tmp_path)).cases] == [meant]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"imag": "a.nii"}], "entry 0: unknown key 'imag' (did you mean 'image'?)"),
        ({"testing": "a.nii"}, '"testing" is "a.nii", expected a list of images'),
        ([{"image": 3}], 'entry 0, "image" is 3, expected a path'),
    ],
)
def test_a_slip_in_a_datalist_is_named(tmp_path, content, message):
    path = write(tmp_path / "list.json", content)
    with pytest.raises(FileError) as error:
        find_images(str(path))
    assert "list.json" in str(error.value) and message in str(error.value)


def test_an_item_without_an_image_says_what_it_has():
    with pytest.raises(FileError, match=r"no \"image\"; it has \['img'\]"):
        find_images([{"img": "a.nii.gz"}])


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"own": [{"train": ["c1"], "vall": ["c2"]}]}, "unknown fields 'vall' (did you mean 'val'?)"),
        ({"own": {"train": [], "val": []}}, "expected a list of folds"),
        ({"others": [{"train": ["c1"], "val": ["c2"]}]}, "says nothing about data set 'own'"),
        ([{"train": ["c1"], "val": ["c_2"]}], "cases that do not exist ['c_2'] (did you mean 'c2'?)"),
    ],
)
def test_a_slip_in_a_splits_file_is_named(tmp_path, splits, message):
    touch(tmp_path, *(f"own/{part}/c{n}.nii.gz" for part in ("img", "lab") for n in (1, 2)))
    with pytest.raises(PoolError) as error:
        path = write(tmp_path / "splits.json", splits)
        DatasetPool(pool_file(tmp_path), tmp_path, splits_file=str(path)).split(0)
    assert message in str(error.value)


def test_cases_to_exclude_have_to_be_there(tmp_path):
    touch(tmp_path, *(f"own/{part}/liver_{n}.nii.gz" for part in ("img", "lab") for n in (0, 1)))
    assert [i["case"] for i in DatasetPool(pool_file(tmp_path, exclude=["liver_0"]), tmp_path).cases] == ["liver_1"]
    with pytest.raises(PoolError, match=r"not there: 'liver_00' \(did you mean 'liver_0'\?\)"):
        _ = DatasetPool(pool_file(tmp_path, exclude=["liver_00"]), tmp_path).cases


# ---- names -------------------------------------------------------------------------------------------------------


def test_names_stay_apart_and_legible():
    written = {
        "1": "ER+",
        "2": "ER-",
        "3": "肝",
        "4": "肿瘤",
        "5": "Leber-Läsion",
        "6": "गुर्दा",
        "7": "T2-FLAIR (edema)",
    }
    expected = ["er_plus", "er_minus", "肝", "肿瘤", "leber_läsion", "गुर्दा", "t2_flair_edema"]
    assert list(plain_names(written, "x").values()) == expected
    assert plain_name("Ｌｉｖｅｒ") == "liver"  # full-width letters
    table = LabelTable({name: {} for name in expected}, [])
    assert list(table.channel_def().values())[1:] == expected


def test_files_of_one_name_in_several_folders_are_several_cases(tmp_path):
    names = [f"case{n}" for n in range(6)]
    touch(tmp_path, *(f"{name}/{part}.nii.gz" for name in names for part in ("img", "lab")))
    training = [{"image": f"./{name}/img.nii.gz", "label": f"./{name}/lab.nii.gz"} for name in names]
    write(tmp_path / "dataset.json", {"labels": {"0": "background", "1": "liver"}, "training": training})
    pool = dataset_pool(str(tmp_path))
    assert [item["case"] for item in pool.cases] == [f"{name}_img" for name in names]
    folds = [{item["case"] for item in pool.val_items(fold)} for fold in range(5)]
    assert all(folds) and sum(map(len, folds)) == 6 == len(set().union(*folds))


def test_case_names_are_unique_whatever_they_are():
    assert case_names(["x", "x", "x_2", "y"], ["", "", "", ""]) == ["x", "x_3", "x_2", "y"]
    assert case_names(["c", "b_c"], ["a_b/c", "a/b_c"]) == ["c", "b_c"]
    assert case_names(["c", "c"], ["../p/q/c.nii", "p/c.nii"]) == ["p_q_c", "p_c"]
    tricky = case_names(["c", "c", "b_c", "b_c"], ["a_b/c", "z/c", "a/b_c", "z/b_c"])
    assert tricky == ["a_b_c", "z_c", "a_b_c_2", "z_b_c"]


def test_cases_of_one_name_in_two_data_sets_get_two_files(tmp_path):
    touch(tmp_path, *(f"{d}/{part}/{c}.nii.gz" for d in ("a", "b") for part in ("img", "lab") for c in ("c1", d + "2")))
    datasets = [{**OWN, "name": name, "folder": name} for name in ("a", "b")]
    splits = write(tmp_path / "s.json", {d: [{"train": [], "val": ["c1", d + "2"]}] for d in ("a", "b")})
    pool = DatasetPool({"targets": {"liver": {}}, "datasets": datasets}, tmp_path, splits_file=str(splits))
    assert [item["case"] for item in pool.val_items(0)] == ["c1", "a2", "c1", "b2"]
    assert [item["case"] for item in pool.evaluation_items(0)] == ["a_c1", "a2", "b_c1", "b2"]


@pytest.mark.parametrize("name", ["$os", "@table", "%x", "_target_", "a#b", "a/b", "a\nb", "", "x" * 101, "a|b", '"'])
def test_names_that_configs_or_paths_would_misread_are_refused(name):
    with pytest.raises(LabelError, match="a letter or digit first"):
        LabelTable({name: {}}, [])
    with pytest.raises(LabelError, match="a letter or digit first"):
        LabelTable({"a": {}}, [{"name": name, "labels": {"1": "a"}}])
