"""What a label map from a server says: about the targets that it holds and those named beside it, nothing else."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from tsfm.cases.cases import Preparation
from tsfm.cases.submitted import table_with_maps
from tsfm.errors import CaseError
from tsfm.labels import LabelTable
from tsfm.network.loss import PartialLabelLoss
from tsfm.patches.dataset import Draw, PatchDataset
from tsfm.patches.store import CaseStore

POOL = json.loads((Path(__file__).parents[1] / "bundles/tsfm_pretrain/configs/pool.json").read_text())
NAMES = tuple(POOL["targets"])
LIVER, TUMOR = NAMES.index("liver"), NAMES.index("liver_tumor")


@pytest.fixture(scope="module")
def table():
    return LabelTable.from_dict(POOL)


@pytest.fixture
def items(tmp_path):
    """One image with three label maps: liver and its tumor, the tumor alone, nothing."""
    image = np.random.default_rng(0).normal(0, 300, (20, 20, 20)).astype(np.int16)
    both = np.zeros(image.shape, np.uint8)
    both[4:16, 4:16, 4:16] = LIVER + 1
    both[8:12, 8:12, 8:12] = TUMOR + 1
    maps = {"both": both, "tumor": np.where(both == TUMOR + 1, both, 0), "empty": np.zeros_like(both)}
    for name, array in {"image": image, **maps}.items():
        nib.save(nib.Nifti1Image(array, np.diag([-1.0, -1, 1, 1])), tmp_path / f"{name}.nii.gz")
    return {name: {"image": str(tmp_path / "image.nii.gz"), "label": str(tmp_path / f"{name}.nii.gz")} for name in maps}


def annotated(table, item):
    return set(table.annotated(table.dataset_of(item)))


def test_a_map_annotates_what_it_holds_and_what_is_named_beside_it(table, items):
    assert len(NAMES) == 31
    named = {**items["tumor"], "annotated": ["spleen"]}
    found = table_with_maps(table, [items["both"], named])
    assert annotated(found, items["both"]) == {"liver", "liver_tumor"}
    assert annotated(found, items["tumor"]) == {"liver_tumor", "spleen"}
    everywhere = table_with_maps(table, [items["both"], items["empty"]], "aorta, pancreas")
    assert annotated(everywhere, items["empty"]) == {"aorta", "pancreas"}
    assert annotated(everywhere, items["both"]) == {"aorta", "pancreas", "liver", "liver_tumor"}
    assert annotated(table_with_maps(table, [items["both"]], "all"), items["both"]) == set(NAMES)


def test_the_weights_carry_the_pools_table_and_pools_keep_theirs(table, items):
    assert table_with_maps(table, [items["both"]]).to_dict() == table.to_dict()
    assert table_with_maps(table, [{**items["both"], "dataset": "amos22"}]) is table
    own_ids = LabelTable({"liver": {}}, [{"name": "own", "labels": {"7": "liver"}}])
    assert table_with_maps(own_ids, [items["both"]]) is own_ids
    assert table.dataset_of(items["both"]) == "label_map" and set(table.annotated("label_map")) == set(NAMES)


def test_a_two_target_map_teaches_a_thirty_target_network_two_targets(table, items, tmp_path):
    """The gradient of each output, against what the voxels of the map say by hand."""
    found = table_with_maps(table, [items["both"], items["tumor"], items["empty"]])
    store = CaseStore(tmp_path / "store", found, Preparation((1.0, 1.0, 1.0)))
    chosen = [items["both"], items["tumor"], items["empty"]]
    patches = PatchDataset(chosen, store, found, (20, 20, 20))
    for number, item in enumerate(chosen):
        codes = patches[Draw(number, 0, False)]["label"][None]
        logits = torch.zeros(1, len(NAMES), 20, 20, 20, requires_grad=True)
        PartialLabelLoss(found)(logits, codes).backward()
        learned = {NAMES[target] for target in logits.grad[0].flatten(1).abs().sum(1).nonzero().flatten().tolist()}
        assert learned == annotated(found, item)
        drawn = np.asarray(nib.load(item["label"]).dataobj).transpose(2, 1, 0)  # (S, P, L): these axes point L, P, S
        for target, inside in ((LIVER, drawn > 0), (TUMOR, drawn == TUMOR + 1)):
            if NAMES[target] in learned:
                assert np.array_equal(logits.grad[0, target].numpy() < 0, inside)


def test_what_says_nothing_or_names_nothing_is_refused(table, items):
    with pytest.raises(CaseError, match="hold no target at all"):
        table_with_maps(table, [items["empty"]])
    with pytest.raises(CaseError, match=r"no target named 'livr' .did you mean 'liver'"):
        table_with_maps(table, [items["both"]], ["livr"])
    wrong = nib.load(items["both"]["label"])
    nib.save(nib.Nifti1Image(np.asarray(wrong.dataobj) + np.uint8(40), wrong.affine), items["both"]["label"])
    with pytest.raises(CaseError, match=r"both.nii.gz: holds the values \[40, .*expected 0 .background. to 31"):
        table_with_maps(table, [items["both"]])
