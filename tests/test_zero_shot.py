"""Public weights scored on a pool whose targets they were not trained for."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from tsfm.evaluation.zero_shot import RenumberTargetsd, shared_targets
from tsfm.labels import LabelTable

TABLE = LabelTable(
    {"aorta": {}, "kidney_left": {}, "kidney_right": {}, "liver": {}, "cyst": {"inside": "kidney_left"}}, []
)
TRAINED = TABLE.names
POOL = {
    "targets": {"kidney": {}, "kidney_left": {"part_of": "kidney"}, "liver": {}, "liver_tumor": {"inside": "liver"}},
    "datasets": [
        {"name": "kits", "labels": {"1": "kidney"}},
        {"name": "both", "labels": {"1": "kidney", "2": "kidney_left", "3": "liver", "4": "liver_tumor"}},
    ],
}
UNIONS = {"kidney": ["kidney_left", "kidney_right"], "prostate": ["gone"]}


@pytest.fixture
def table():
    return LabelTable(POOL["targets"], POOL["datasets"])


def test_targets_come_by_name_or_as_unions(table):
    assert shared_targets(TRAINED, table, UNIONS) == {
        "kidney": ("kidney_left", "kidney_right"), "kidney_left": ("kidney_left",), "liver": ("liver",)
    }  # fmt: skip
    with pytest.raises(ValueError, match="kidney_letf"):
        shared_targets(TRAINED, table, {"kidney": ["kidney_letf"]})
    with pytest.raises(ValueError, match="no name in common"):
        shared_targets(("spleen",), table)


@pytest.mark.parametrize(("dataset", "expected"), [("kits", [0, 0, 1, 1, 0, 1]), ("both", [0, 0, 2, 1, 3, 2])])
def test_a_map_in_the_weights_numbers_becomes_one_in_the_pools(table, dataset, expected):
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    found = MetaTensor(torch.arange(6, dtype=torch.uint8).reshape(1, 6, 1, 1), affine=affine)
    renumber = RenumberTargetsd("pred", TABLE, shared_targets(TRAINED, table, UNIONS), table)
    pred = renumber({"pred": found, "dataset": dataset})["pred"]
    assert pred.flatten().tolist() == expected and np.array_equal(pred.affine, affine)
    assert found.flatten().tolist() == [0, 1, 2, 3, 4, 5], "what is given stays as it is"


def test_a_plan_for_the_weights_targets_is_applied_before_and_one_for_the_pools_is_refused(table):
    steps = json.loads((ROOT / "bundles/tsfm_finetune/configs/zero_shot.json").read_text())[
        "postprocessing#transforms#0"
    ]
    plan = {"targets": list(TRAINED), "steps": [{"target": "liver", "values": [4], "fill": 0}]}

    def parsed(plan):
        ids = {"table": TABLE, "pool_table": table, "shared": shared_targets(TRAINED, table, UNIONS)}
        return ConfigParser({**ids, "postprocessing_plan": plan, "steps": steps}).get_parsed_content("steps")

    found = torch.tensor([4, 0, 4, 4, 3, 0, 3, 3], dtype=torch.uint8).reshape(1, 8, 1, 1)
    pred = parsed(plan)({"pred": MetaTensor(found), "dataset": "both"})["pred"]
    assert pred.flatten().tolist() == [0, 0, 3, 3, 1, 0, 1, 1], "one liver is left; of the kidneys nothing is taken"
    with pytest.raises(RuntimeError) as error:
        parsed({**plan, "targets": list(table.names)})
    assert "plan was made for" in str(error.value.__cause__)
