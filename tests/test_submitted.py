"""What a label map from a server says: about the targets that it holds and those named beside it, nothing else."""

import json
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT
from monai.bundle import ConfigParser
from tsfm.cases.cases import Preparation
from tsfm.cases.submitted import table_with_maps
from tsfm.errors import CaseError
from tsfm.labels import LabelTable
from tsfm.network.loss import PartialLabelLoss
from tsfm.network.tsfm_net import TSFM
from tsfm.patches.dataset import Draw, PatchDataset
from tsfm.patches.store import CaseStore
from tsfm.training.checkpoint import describe_network, goes_on, read_description, save_weights, trained_targets
from tsfm.training.seen import DescribeImages

TINY = {"features": [4, 8], "depths_down": [1, 1], "depths_up": [1], "strides": [[2, 2, 2]], "img_size": [8, 8, 8]}
TINY |= {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 16}
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


@pytest.mark.convolutions
@pytest.mark.parametrize("bundle", ["tsfm_pretrain", "tsfm_finetune"])
def test_weights_that_learn_from_label_maps_offer_what_they_knew_before_too(bundle, table, items, tmp_path):
    """As MONAI Label trains: bare items, weights of a part of the pool; with clicks too, the loss reads the store's codes."""
    clicks = bundle == "tsfm_finetune"
    network = TSFM(3 if clicks else 1, len(NAMES), **TINY)
    network.description |= {"click_sigma": 2.0} if clicks else {}
    lung = [{"image": "i", "dataset": "msd_lung", "modality": "CT"}]
    preparation = Preparation((2.0, 2.0, 2.0), {"CT": {"lower": -300, "upper": 400, "mean": 50, "sd": 150}})
    weights = tmp_path / "model.pt"
    save_weights(describe_network(network, table, preparation, [8, 8, 8], lung), weights)
    assert trained_targets(read_description(weights)) == ["lung_tumor"]

    parser = ConfigParser()
    configs = [ROOT / "bundles" / bundle / "configs" / name for name in ("train.json", *["clicks.json"] * clicks)]
    parser.read_config([str(path) for path in configs])
    changes = {
        "dataset_dir": str(tmp_path),
        "num_workers": 0,
        "device": "cpu",
        "bundle_root": str(configs[0].parents[1]),
    }
    changes |= {"pretrained": str(weights)} if clicks else {"initial_weights": str(weights), "preparation": preparation}
    if not clicks:
        network = {"_target_": "tsfm.network.networks.create_network", **network.description["network"]}
        changes |= {"network_def": network, "patch": [8, 8, 8]}
    for key, value in {**changes, "train#dataset#data": [items["both"]], "validate#dataset#data": []}.items():
        parser[key] = value
    description = parser.get_parsed_content("described_network").description
    assert trained_targets(description) == [name for name in NAMES if name in ("lung_tumor", "liver", "liver_tumor")]
    assert description["trained_on"] == ["label_map", "msd_lung"]
    maps, loss = (parser.get_parsed_content(key) for key in ("map_table", "click_table" if clicks else "map_table"))
    assert annotated(maps, items["both"]) == {"liver", "liver_tumor"}
    assert np.array_equal(loss.targets[: len(maps.targets)], maps.targets)


@pytest.mark.parametrize(
    ("bare", "before", "expected"),
    [
        (True, {"CT": {"p50": [-2.0, 0.25]}, "MR": {"p50": [0.0, 1.0]}}, {"CT": [-2.0, 0.5], "MR": [0.0, 1.0]}),
        (False, {"CT": {"p50": [-2.0, 0.25]}, "MR": {"p50": [0.0, 1.0]}}, {"CT": [0.5, 0.5]}),
        (True, {}, {}),  # a few cases do not stand for all that weights saw which do not say it
        (True, None, {"CT": [0.5, 0.5]}),  # a start from nothing
    ],
)
def test_label_maps_widen_what_weights_have_seen_and_a_fine_tuning_replaces_it(bare, before, expected, table):
    image, grid = np.full((1, 4, 4, 4), 0.5, np.float32), {"spacing_mm": (2, 2, 2), "source_spacing_mm": (1, 1, 1)}
    case = SimpleNamespace(read_image=lambda: image, properties=grid)
    store = SimpleNamespace(preparation=Preparation((2.0, 2.0, 2.0)), open=lambda item: case)
    items = [{"image": "i", "label": "l", **({} if bare else {"dataset": "msd_lung", "modality": "CT"})}]
    network, weights = (TSFM(1, len(NAMES), **TINY) for _ in range(2))
    if before is not None:
        known = describe_network(weights, table, store.preparation, [8, 8, 8]).description
        goes_on(network, {**known, "familiar": before} if before else known)
    describe_network(network, table, store.preparation, [8, 8, 8], items)
    DescribeImages(network, store, items).describe()
    assert {kind: row["p50"] for kind, row in network.description["familiar"].items()} == expected
