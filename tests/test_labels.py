import json

import numpy as np
import pytest
from tsfm.cases.raw_ids import raw_values
from tsfm.labels import LABEL_MAP, LabelError, LabelTable

TARGETS = {
    "kidney": {},
    "kidney_left": {"part_of": "kidney"},
    "kidney_right": {"part_of": "kidney"},
    "liver": {},
    "kidney_tumor": {"inside": "kidney"},
}
DATASETS = [
    {"name": "kits21", "labels": {"1": "kidney", "2": "kidney_tumor"}, "ignore": [9]},
    {"name": "amos22", "labels": {"2": "kidney_right", "3": "kidney_left", "6": "liver"}},
    {"name": "sides", "labels": {"1": "kidney_left"}, "others": "background"},
]


@pytest.fixture
def table():
    return LabelTable(TARGETS, DATASETS)


def row(table, dataset, raw):
    code = table.codes.index((dataset, raw))
    return dict(zip(table.names, table.targets[code].tolist(), strict=True))


def test_every_pair_of_data_set_and_raw_id_has_its_own_code(table):
    declared = [pair for pair in table.codes if pair[0] != LABEL_MAP]
    assert declared == [
        ("kits21", 0), ("kits21", 1), ("kits21", 2), ("kits21", 9),
        ("amos22", 0), ("amos22", 2), ("amos22", 3), ("amos22", 6),
        ("sides", 0), ("sides", 1),
    ]  # fmt: skip
    assert [table.offset(name) for name in table.datasets] == [0, 4, 8]


def test_a_label_is_positive_for_its_target_and_every_annotated_ancestor(table):
    tumor = row(table, "kits21", 2)
    assert tumor == {"kidney": 1, "kidney_left": -1, "kidney_right": -1, "liver": -1, "kidney_tumor": 1}
    left = row(table, "amos22", 3)
    assert left == {"kidney": 1, "kidney_left": 1, "kidney_right": 0, "liver": 0, "kidney_tumor": -1}


def test_a_tumor_inside_a_whole_does_not_say_in_which_part(table):
    both = LabelTable(
        TARGETS, [{"name": "both", "labels": {"1": "kidney_left", "2": "kidney_right", "3": "kidney_tumor"}}]
    )
    assert row(both, "both", 3) == {
        "kidney": 1, "kidney_left": -1, "kidney_right": -1, "liver": -1, "kidney_tumor": 1,
    }  # fmt: skip
    assert row(both, "both", 1) == {
        "kidney": 1, "kidney_left": 1, "kidney_right": 0, "liver": -1, "kidney_tumor": 0,
    }  # fmt: skip
    assert raw_values(both, "both") == {2: 1, 3: 2, 5: 3}
    named = {"1": "kidney_left", "2": "kidney_right", "3": ["kidney_tumor", "kidney_left"]}
    assert row(LabelTable(TARGETS, [{"name": "named", "labels": named}]), "named", 3)["kidney_right"] == 0
    drawn = table.with_maps({"map.nii.gz": ["kidney_left", "kidney_right", "kidney_tumor"]})
    dataset = drawn.dataset_of({"image": "i", "label": "map.nii.gz"})
    assert [row(drawn, dataset, 5)[side] for side in ("kidney_left", "kidney_right")] == [-1, -1]


def test_a_whole_is_annotated_when_all_its_parts_are(table):
    assert table.annotated("amos22") == ("kidney", "kidney_left", "kidney_right", "liver")
    assert table.annotated("sides") == ("kidney_left",)
    assert row(table, "sides", 1)["kidney"] == -1


def test_background_says_no_only_to_what_the_data_set_annotates(table):
    assert row(table, "kits21", 0) == {
        "kidney": 0,
        "kidney_left": -1,
        "kidney_right": -1,
        "liver": -1,
        "kidney_tumor": 0,
    }


def test_an_ignored_id_annotates_nothing(table):
    assert set(row(table, "kits21", 9).values()) == {-1}
    assert table.ignored("kits21") == (3,)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.int64])
def test_encoding_is_a_look_up(table, dtype):
    raw = np.array([[0, 2, 3], [6, 0, 2]], dtype)
    codes = table.encode("amos22", raw)
    assert codes.dtype == np.uint8
    assert codes.tolist() == [[0, 1, 2], [3, 0, 1]]


def test_an_unlisted_id_is_an_error_with_file_id_and_voxel_count(table):
    with pytest.raises(LabelError, match=r"case_7\.nii\.gz.*\{5: 3\}.*kits21"):
        table.encode("kits21", np.array([0, 5, 5, 5, 1]), "case_7.nii.gz")


@pytest.mark.parametrize("unlisted", [7, -1, 70000])
def test_others_as_background_are_accepted(table, unlisted):
    assert table.encode("sides", np.array([0, 1, unlisted])).tolist() == [0, 1, 0]


def test_painting_goes_from_parents_to_parts_to_what_is_inside():
    table = LabelTable({"tumor": {"inside": "left"}, "left": {"part_of": "organ"}, "organ": {}, "other": {}}, [])
    order = [table.names[i] for i in table.paint_order()]
    assert order == ["organ", "other", "left", "tumor"]


def test_a_painted_voxel_belongs_to_all_ancestors_of_its_value(table):
    membership = table.map_membership()
    tumor = table.names.index("kidney_tumor") + 1
    assert {table.names[i] for i in np.flatnonzero(membership[tumor])} == {"kidney", "kidney_tumor"}
    assert not membership[0].any()


def test_viewers_get_the_display_name_and_no_two_targets_the_same():
    table = LabelTable({"kidney_right": {"display": "Right kidney"}, "liver": {}}, [])
    assert table.channel_def() == {"0": "background", "1": "right kidney", "2": "liver"}
    assert table.names == ("kidney_right", "liver")
    with pytest.raises(LabelError, match="display"):
        LabelTable({"kidney_right": {"display": "liver"}, "liver": {}}, [])


def test_channel_def_lists_the_label_map_from_one_to_n(table):
    assert table.channel_def() == {
        "0": "background", "1": "kidney", "2": "kidney_left", "3": "kidney_right", "4": "liver", "5": "kidney_tumor",
    }  # fmt: skip


def test_bare_items_belong_to_the_only_data_set_or_hold_the_label_map(table):
    assert table.bare_dataset == LABEL_MAP
    assert row(table, LABEL_MAP, 2) == {"kidney": 1, "kidney_left": 1, "kidney_right": 0, "liver": 0, "kidney_tumor": 0}
    assert row(table, LABEL_MAP, 5) == {
        "kidney": 1,
        "kidney_left": -1,
        "kidney_right": -1,
        "liver": 0,
        "kidney_tumor": 1,
    }
    assert LabelTable(TARGETS, DATASETS[:1]).bare_dataset == "kits21"


def test_the_table_survives_json(table):
    again = LabelTable.from_dict(json.loads(json.dumps(table.to_dict())))
    assert again.codes == table.codes
    np.testing.assert_array_equal(again.targets, table.targets)
    assert again.paint_order() == table.paint_order()


def test_nested_regions_are_declared_in_a_few_lines():
    brats = LabelTable(
        {"whole_tumor": {}, "tumor_core": {"inside": "whole_tumor"}, "enhancing_tumor": {"inside": "tumor_core"}},
        [{"name": "brats", "labels": {"1": "tumor_core", "2": "whole_tumor", "4": "enhancing_tumor"}}],
    )
    assert brats.targets[:4].tolist() == [[0, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("targets", "datasets", "message"),
    [
        ({"a": {"part_of": "b"}}, [], "refers to 'b'"),
        ({"a": {"part_of": "b"}, "b": {"inside": "a"}}, [], "circle"),
        ({"a": {"part_of": "b", "inside": "b"}, "b": {}}, [], "both part_of and inside"),
        ({"background": {}}, [], "background"),
        ({"a": {}}, [{"name": "x", "labels": {"1": "b"}}], "not among the targets"),
        ({"a": {}}, [{"name": "x", "labels": {"²": "a"}}], "'x': the raw id '²' is no whole number"),
        ({"a": {}}, [{"name": "x", "labels": {"--5": "a"}}], "'--5' is no whole number"),
        ({"a": {}}, [{"name": "x", "labels": {"0": "a"}}], "raw id 0 is the background"),
        ({"a": {}}, [{"name": "x", "labels": {"1": "a"}, "ignore": [1]}], "both uses and ignores"),
        ({"a": {}}, [{"name": "x", "labels": {}}, {"name": "x", "labels": {}}], "share a name"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(targets, datasets, message):
    with pytest.raises(LabelError, match=message):
        LabelTable(targets, datasets)
