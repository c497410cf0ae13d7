"""Licences: what a text permits, which data sets a run keeps for a use, and what weights and releases say of it."""

import json
from pathlib import Path

import pytest
import torch
from tsfm.cases.cases import Preparation
from tsfm.cases.folders import PoolError
from tsfm.cases.licences import all_licences, licence_facts, permits, weights_terms
from tsfm.cases.pool import DatasetPool
from tsfm.cases.splits import case_digests
from tsfm.labels import LabelTable
from tsfm.network.tsfm_net import TSFM
from tsfm.planning.own_data import dataset_pool
from tsfm.planning.plan import downstream_network, take_over
from tsfm.training.checkpoint import describe_network, read_description, save_weights, start_from

PAPER_POOL = Path(__file__).parents[1] / "bundles/tsfm_pretrain/configs/pool.json"
SMALL = {
    "features": [4, 4], "depths_down": [1, 1], "depths_up": [1], "strides": [[2, 2, 2]], "hidden_size": 4,
    "num_layers": 1, "num_heads": 1, "mlp_dim": 4, "img_size": [8, 8, 8],
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "commercial", "share_alike"),
    [
        ("CC BY 4.0", True, False),
        ("CC-BY-SA 4.0", True, True),
        ("CC BY-NC-SA 4.0", False, True),
        ("CC BY-NC 4.0", False, False),
        ("CC BY-ND 4.0", None, None),
        ("CC0", True, False),
        ("BSD-3-Clause", True, False),
        ("Apache-2.0 (repository); TCGA images CC BY 3.0", True, False),
        ("CC BY 4.0; see the authors' terms", None, None),
        ("Synapse terms of use", None, None),
        ("Creative Commons CC-BY-4.0 International License", True, False),
        ("CC0 1.0 Universal (Public Domain Dedication)", True, False),
        ("Not CC0", None, None),
        ("CC BY 4.0 for members", None, None),
        ("CC BY\u2011ND 4.0", None, None),
        ("CC BY 4.0 (research purposes only)", False, False),
        ("CC BY 4.0 for academic use only", False, False),
        ("CC BY 4.0, not for commercial use", False, False),
        (None, None, None),
        ({"name": "our own scans", "commercial": True, "share_alike": False}, True, False),
    ],
)
def test_what_a_licence_permits(text, commercial, share_alike):
    facts = licence_facts(text)
    assert (facts["commercial"], facts["share_alike"]) == (commercial, share_alike)
    assert permits(facts, "any")
    assert permits(facts, "commercial") == (commercial is True)
    assert permits(facts, "permissive") == (commercial is True and share_alike is False)


def test_a_run_for_commercial_use_keeps_what_permits_it(caplog):
    assert len(DatasetPool(PAPER_POOL).chosen) == 10
    assert not {"kits21", "breast_dce", "btcv"} & set(DatasetPool(PAPER_POOL, licence="commercial").chosen)
    assert "kits21 (CC BY-NC-SA 4.0)" in caplog.text
    assert DatasetPool(PAPER_POOL, licence="permissive").chosen == ["amos22", "totalsegmentator"]
    with pytest.raises(PoolError, match=r"btcv \(Synapse terms"):
        DatasetPool(PAPER_POOL, datasets="btcv", licence="commercial")
    with pytest.raises(ValueError, match="expected one of"):
        DatasetPool(PAPER_POOL, licence="comercial")


def test_a_folders_own_dataset_json_counts_where_the_pool_file_is_silent(tmp_path):
    case = {"image": "a.nii.gz", "label": "b.nii.gz"}
    content = {"labels": {"1": "a"}, "modality": {"0": "CT"}, "licence": "CC BY-NC 4.0", "training": [case]}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(PoolError, match="CC BY-NC"):
        dataset_pool(str(tmp_path), licence="commercial")


def test_weights_carry_the_licences_and_digests_of_all_they_saw(tmp_path):
    table = LabelTable({"a": {}}, [{"name": "one", "labels": {"1": "a"}}, {"name": "two", "labels": {"1": "a"}}])
    items = [{"image": "i", "dataset": "one", "case": "a", "modality": "CT", "licence": "CC BY-NC-SA 4.0"}]
    network = describe_network(TSFM(1, 1, **SMALL), table, Preparation((1, 1, 1)), [8, 8, 8], items)
    save_weights(network, tmp_path / "before.pt")
    pool = DatasetPool({"targets": {"a": {}}, "datasets": [{"name": "mine", "labels": {"1": "a"}, "format": "msd"}]})
    torch.manual_seed(0)
    own = [{"image": "i", "dataset": "mine", "case": "b", "modality": "CT", "licence": "CC BY 4.0"}]
    pool.cases = own
    before = str(tmp_path / "before.pt")
    for name, weights in (("scratch", None), ("after", before)):  # the network of the weights alone inherits nothing
        tuned = take_over(downstream_network(pool, [8, 8, 8], 1, before), pool, weights)
        tuned = describe_network(tuned, pool.table, Preparation((1, 1, 1)), [8, 8, 8], own)
        save_weights(tuned, tmp_path / f"{name}.pt")
    assert list(read_description(tmp_path / "scratch.pt")["licences"]) == ["mine"]
    assert read_description(tmp_path / "scratch.pt")["trained_cases"] == case_digests(own)
    assert read_description(tmp_path / "after.pt")["trained_cases"] == sorted(case_digests([*items, *own]))
    licences = read_description(tmp_path / "after.pt")["licences"]
    assert {name: one["commercial"] for name, one in licences.items()} == {"one": False, "mine": True}
    assert weights_terms(licences).startswith("Commercial use is excluded by one;")
    with pytest.raises(
        PoolError, match=r"before\.pt: these weights are not known to permit commercial use\. .* by one"
    ):
        dataset_pool(str(tmp_path), pretrained=str(tmp_path / "before.pt"), licence="commercial")


def test_a_pretraining_that_goes_on_from_weights_keeps_their_licences(tmp_path):
    table = LabelTable({"a": {}}, [{"name": "one", "labels": {"1": "a"}}, {"name": "two", "labels": {"1": "a"}}])
    closed, free = (
        [{"image": "i", "dataset": name, "modality": "CT", **licence}]
        for name, licence in (("one", {"licence": "CC BY-NC 4.0"}), ("two", {"licence": "CC BY 4.0"}))
    )

    def trained(name, items, start=None, licence="any"):
        network = start_from(TSFM(1, 1, **SMALL), start, licence)
        save_weights(describe_network(network, table, Preparation((1, 1, 1)), [8, 8, 8], items), tmp_path / name)
        found = read_description(tmp_path / name)["licences"]
        return {name: one["commercial"] for name, one in found.items()}

    trained("before.pt", closed)
    assert trained("anew.pt", free, "") == {"two": True}, "MONAI would drop None from a command line"
    assert trained("after.pt", free, tmp_path / "before.pt") == {"one": False, "two": True}
    with pytest.raises(PoolError, match=r"after\.pt: .* commercial use\. .* excluded by one.*--initial_weights \"\""):
        trained("no.pt", free, tmp_path / "after.pt", "commercial")

    torch.save({k: v for k, v in TSFM(1, 1, **SMALL).state_dict().items() if k != "_extra_state"}, tmp_path / "bare.pt")
    assert trained("on.pt", free, tmp_path / "bare.pt") == {"pretrained weights": None, "two": True}
    with pytest.raises(PoolError, match="not known to be permitted by"):
        trained("no.pt", free, tmp_path / "bare.pt", "commercial")

    trained("free.pt", free)
    assert trained("still_free.pt", free, tmp_path / "free.pt", "commercial") == {"two": True}
    assert not (tmp_path / "no.pt").exists()


def test_a_free_data_set_of_the_same_name_does_not_free_weights_that_saw_another(tmp_path):
    """Each fact is the stricter one, the names stand beside each other, and neither grows with further rounds."""
    table = LabelTable({"a": {}}, [{"name": "mine", "labels": {"1": "a"}}])
    start = None
    for number, licence in enumerate(["CC BY-NC-SA 4.0", "CC BY 4.0", "CC BY-NC-SA 4.0", None]):
        items = [{"image": "i", "dataset": "mine", "modality": "CT", "licence": licence}]
        network = start_from(TSFM(1, 1, **SMALL), start)
        start = tmp_path / f"{number}.pt"
        save_weights(describe_network(network, table, Preparation((1, 1, 1)), [8, 8, 8], items), start)
        found = read_description(start)["licences"]["mine"]
        assert found["commercial"] is False and found["share_alike"] is True
    assert found["name"] == "CC BY-NC-SA 4.0 and CC BY 4.0 and not declared"
    assert all_licences({"a": licence_facts("CC0")}, {"a": licence_facts(None)})["a"]["commercial"] is None
    long = [{"a": licence_facts(letter * 60)} for letter in "xy"]
    assert all_licences(*long) == long[0]  # no longer than a name may be
