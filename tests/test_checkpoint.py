import os
import pickle

import pytest
import torch
from tsfm.cases.cases import Preparation
from tsfm.files import atomic_write
from tsfm.labels import LabelTable
from tsfm.network.tsfm_net import TSFM
from tsfm.training.checkpoint import (
    build_network,
    decode_description,
    describe_network,
    encode_description,
    load_weights,
    matching_table,
    read_description,
    read_state,
    save_weights,
    table_of,
)
from tsfm.training.run_state import RunState
from tsfm.training.weight_files import CheckpointError

pytestmark = pytest.mark.convolutions

SMALL = {
    "features": [4, 8], "depths_down": [1, 1], "depths_up": [1], "strides": [[2, 2, 2]], "img_size": [8, 8, 8],
    "hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 16,
}  # fmt: skip
# not in alphabetical order: the order is the label map's
TABLE = LabelTable({"zebra": {}, "ape": {"inside": "zebra"}}, [{"name": "zoo", "labels": {"7": "ape", "2": "zebra"}}])
PREPARATION = Preparation((3.0, 2.0, 2.0), {"CT": {"lower": -1000, "upper": 400, "mean": 50, "sd": 200}})


@pytest.fixture
def network():
    return describe_network(
        TSFM(1, 2, **SMALL), TABLE, PREPARATION, [8, 8, 8], [{"image": "a", "dataset": "zoo", "modality": "CT"}]
    )


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_what_travels_with_the_weights_comes_back_in_order(network, tmp_path, name):
    save_weights(network, tmp_path / name)
    description = read_description(tmp_path / name)
    assert list(description["targets"]) == ["zebra", "ape"]
    table = table_of(description)
    assert table.names == TABLE.names and table.codes == TABLE.codes
    assert Preparation.from_dict(description["preparation"]) == PREPARATION
    assert description["modalities"] == ["CT"] and description["trained_on"] == ["zoo"]
    again = build_network(description)
    load_weights(again, tmp_path / name)
    image = torch.randn(1, 1, 8, 8, 8)
    torch.testing.assert_close(again.eval()(image), network.eval()(image))


def test_a_network_that_does_not_fit_its_targets_or_channels_is_refused():
    with pytest.raises(CheckpointError, match="3 outputs, the label table 2 targets"):
        describe_network(TSFM(1, 3, **SMALL), TABLE, PREPARATION, [8, 8, 8])
    with pytest.raises(CheckpointError, match="takes 4 channels"):
        describe_network(TSFM(4, 2, **SMALL), TABLE, PREPARATION, [8, 8, 8])


def test_weights_that_do_not_fit_change_nothing(network, tmp_path):
    save_weights(TSFM(1, 3, **SMALL), tmp_path / "other.pt")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"nothing was loaded:\n(.*\n)*.*heads\.0"):
        load_weights(network, tmp_path / "other.pt")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_labels_declared_for_other_targets_are_refused(network):
    description = network.description
    assert matching_table(description, TABLE) is TABLE
    swapped = LabelTable({"ape": {}, "zebra": {}}, [])
    with pytest.raises(CheckpointError, match=r"\['zebra', 'ape'\].*\['ape', 'zebra'\]"):
        matching_table(description, swapped)


def test_weights_that_do_not_say_how_they_join_skips_were_trained_with_added_ones(tmp_path):
    earlier = describe_network(TSFM(1, 2, **SMALL, skip="add"), TABLE, PREPARATION, [8, 8, 8])
    state = earlier.state_dict()
    description = decode_description(state["_extra_state"])
    del description["network"]["skip"]
    save_weights({**state, "_extra_state": encode_description(description)}, tmp_path / "earlier.pt")
    again = build_network(read_description(tmp_path / "earlier.pt"))
    assert again.description["network"]["skip"] == "add"
    load_weights(again, tmp_path / "earlier.pt")
    with pytest.raises(CheckpointError, match="skip: checkpoint add, network concat"):
        load_weights(TSFM(1, 2, **SMALL, skip="concat"), tmp_path / "earlier.pt")
    with pytest.raises(CheckpointError, match="the file with --network_def#skip add"):
        load_weights(TSFM(1, 2, **SMALL), tmp_path / "earlier.pt")


def test_folds_of_an_ensemble_that_do_not_say_how_they_join_skips_have_added_ones(tmp_path):
    for name in ("a", "b"):
        save_weights(describe_network(TSFM(1, 2, **SMALL, skip="add"), TABLE, PREPARATION, [8, 8, 8]), tmp_path / name)
    tensors, description = read_state([tmp_path / "a", tmp_path / "b"])
    del description["network"]["network"]["skip"]
    save_weights({**tensors, "_extra_state": encode_description(description)}, tmp_path / "earlier.pt")
    load_weights(build_network(read_description(tmp_path / "earlier.pt")), tmp_path / "earlier.pt")


def test_folds_whose_clicks_are_of_different_sizes_are_no_ensemble(tmp_path):
    for sigma in (2.0, 4.0):
        network = TSFM(3, 2, **SMALL)
        network.description["click_sigma"] = sigma
        save_weights(describe_network(network, TABLE, PREPARATION, [8, 8, 8]), tmp_path / f"{sigma}.pt")
    with pytest.raises(CheckpointError, match=r"their click_sigma differ: 4\.0 and 2\.0"):
        read_state([tmp_path / "2.0.pt", tmp_path / "4.0.pt"])


class Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Attack()}, tmp_path / "bad.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Attack()))
    for name in ("bad.pt", "raw.pt"):
        with pytest.raises(CheckpointError, match=name):
            read_state(tmp_path / name)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "not a readable|refused"), (b"hello", "not a readable|refused")]
)
def test_files_that_are_no_weights_are_named(tmp_path, content, message):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_state(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="does not exist"):
        read_state(tmp_path / "absent.pt")


def test_weights_without_a_description_cannot_be_rebuilt(tmp_path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "plain.pt")
    assert read_state(tmp_path / "plain.pt")[1] == {}
    with pytest.raises(CheckpointError, match="no description"):
        read_description(tmp_path / "plain.pt")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_wrappers_prefixes_are_dropped(tmp_path, prefix):
    torch.save({"state_dict": {prefix + "a": torch.ones(1), prefix + "b": torch.ones(1)}}, tmp_path / "w.pt")
    assert set(read_state(tmp_path / "w.pt")[0]) == {"a", "b"}


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "model.pt"
    target.write_bytes(b"old")

    def fail(temporary):
        with open(temporary, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        atomic_write(str(target), fail)
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["model.pt"]


def test_safetensors_beside_the_bundles_weights_are_not_left_behind_by_a_training(tmp_path):
    run = object.__new__(RunState)
    run.write, run.model_path, run.ckpt_dir = True, str(tmp_path / "run/model.pt"), str(tmp_path / "models")
    for folder, value in (("run", 2.0), ("models", 1.0)):
        (tmp_path / folder).mkdir()
        save_weights({"weight": torch.full((2,), value)}, tmp_path / folder / "model.pt")
    save_weights({"weight": torch.ones(2)}, tmp_path / "models/model.safetensors")
    run.publish(None)
    for file in ("model.pt", "model.safetensors"):
        assert read_state(tmp_path / "models" / file)[0]["weight"].tolist() == [2.0, 2.0]
