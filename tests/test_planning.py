"""What a run decides before it starts: pool, channels, spacing, normalization, patch, and where errors show."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from conftest import ROOT, touch
from tsfm.cases import sources
from tsfm.cases.cases import Preparation
from tsfm.cases.folders import PoolError
from tsfm.cases.pool import DatasetPool
from tsfm.errors import first_cause
from tsfm.labels import LabelError, LabelTable
from tsfm.network.tsfm_net import TSFM
from tsfm.options import OptionError, check_options
from tsfm.planning import own_data
from tsfm.planning import plan as planning
from tsfm.planning import plan_run as plan_run_module
from tsfm.planning.forecast import Forecast
from tsfm.planning.forecast import plan as show_plan
from tsfm.planning.parts import freeze
from tsfm.planning.plan_run import plan_run
from tsfm.planning.planner import PlanError, plan_patch
from tsfm.preparation import fingerprint as fingerprints
from tsfm.schema import read_json
from tsfm.training.checkpoint import EXTRA_STATE, describe_network, encode_description, read_state, save_weights
from tsfm.training.weight_files import CheckpointError

pytestmark = pytest.mark.convolutions

NETWORK = {
    "in_channels": 1, "out_channels": 2, "features": [4, 8, 16], "depths_down": [1, 1, 1], "depths_up": [1, 1],
    "strides": [[2, 2, 2], [1, 2, 2]], "img_size": [16, 32, 32], "hidden_size": 12, "num_layers": 1, "num_heads": 2, "mlp_dim": 24,
}  # fmt: skip
CT = {"lower": -100.0, "upper": 300.0, "mean": 50.0, "sd": 80.0}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights for liver and spleen at 4 x 2 x 2 mm, patch 16 x 32 x 32."""
    table = LabelTable({"liver": {}, "spleen": {}}, [{"name": "first", "labels": {"1": "liver", "2": "spleen"}}])
    torch.manual_seed(0)
    network = describe_network(TSFM(**NETWORK), table, Preparation((4.0, 2.0, 2.0), {"CT": CT}), [16, 32, 32])
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    save_weights(network, path)
    return str(path)


def write(folder, name, shape=(20, 22, 12), spacing=(2.0, 2.0, 4.0), channels=1, suffix="", kinds=("images", "labels")):
    rng = np.random.default_rng(0)
    label = np.zeros(shape, np.uint8)
    label[5:9, 5:9, 3:6] = 1
    image = rng.normal(0, 100, (*shape, channels)).astype(np.float32)
    for kind, array, ending in zip(kinds, (image if channels > 1 else image[..., 0], label), (suffix, ""), strict=True):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, np.diag([*spacing, 1.0])), folder / kind / f"{name}{ending}.nii.gz")


@pytest.fixture
def folders(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / "data", name)
    return tmp_path / "data"


# ---- the pool --------------------------------------------------------------------------------------------------------


def test_two_folders_are_paired_by_name(folders):
    pool = own_data.dataset_pool(str(folders), label_ids={"1": "liver"}, modality="MR")
    assert [(item["case"], item["modality"]) for item in pool.cases] == [("a", "MR"), ("b", "MR")]
    assert pool.table.names == ("liver",)


@pytest.mark.parametrize("spelled", ["{}/", "./{}", "FOLDER/{}", "../data/{}"])
def test_folders_and_patterns_may_be_spelled_in_any_way(folders, spelled):
    images, labels = (spelled.replace("FOLDER", str(folders)).format(kind) for kind in ("images", "labels"))
    for ending in ("", "/{case}.nii.gz"):
        pool = own_data.dataset_pool(
            str(folders), images=images + ending, labels=labels + ending, label_ids={"1": "liver"}
        )
        assert [item["case"] for item in pool.cases] == ["a", "b"]
        assert all(Path(item[key]).exists() for item in pool.cases for key in ("image", "label"))


def test_a_home_folder_by_its_sign_is_a_folder(folders, monkeypatch):
    monkeypatch.setenv("HOME", str(folders.parent))
    assert own_data.default_pretrained("~/data", "models") is None
    assert len(own_data.dataset_pool("~/data", label_ids={"1": "liver"}).cases) == 2


def test_nnunets_channel_suffix_is_understood(tmp_path):
    write(tmp_path, "case_1", suffix="_0000")
    pool = own_data.dataset_pool(str(tmp_path), label_ids={"1": "liver"})
    assert pool.cases[0]["case"] == "case_1" and pool.cases[0]["label"].endswith("labels/case_1.nii.gz")


def test_ids_may_stand_for_several_targets(folders):
    pool = own_data.dataset_pool(str(folders), label_ids={"1": ["liver", "organ"]})
    assert pool.table.names == ("liver", "organ")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ({"0": "background", "1": "Anterior", "2": "Posterior"}, ("anterior", "posterior")),
        ({"background": 0, "Left Lung": 1}, ("left_lung",)),
    ],
)
def test_decathlon_labels_become_targets(tmp_path, labels, names):
    write(tmp_path, "x", kinds=("imagesTr", "labelsTr"))
    content = {
        "modality": {"0": "MRI"},
        "labels": labels,
        "training": [{"image": "./imagesTr/x.nii.gz", "label": "./labelsTr/x.nii.gz"}],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    pool = own_data.dataset_pool(str(tmp_path))
    assert pool.table.names == names and pool.cases[0]["modality"] == "MR"


def nnunet_folder(folder, cases=("x_001", "x_002"), channels=1, **content):
    """nnU-Net v2's layout: one file per channel, no list of cases."""
    for case in cases:
        for channel in range(channels):
            write(folder, case, suffix=f"_{channel:04d}", kinds=("imagesTr", "labelsTr"))
    content = {"channel_names": {str(i): "MRI" for i in range(channels)}, "numTraining": len(cases), **content}
    (folder / "dataset.json").write_text(json.dumps({"file_ending": ".nii.gz", **content}))
    return own_data.dataset_pool(str(folder))


def test_nnunets_second_layout_has_a_file_per_channel_and_no_list(tmp_path):
    pool = nnunet_folder(tmp_path, channels=2, labels={"background": 0, "Liver": 1, "ignore": 2})
    assert [item["case"] for item in pool.cases] == ["x_001", "x_002"]
    assert [Path(path).name for path in pool.cases[0]["image"]] == ["x_001_0000.nii.gz", "x_001_0001.nii.gz"]
    assert own_data.count_channels(pool) == 2 and pool.table.names == ("liver",)
    assert pool.table.label_rules(tmp_path.name.lower().strip("_"))["ignore"] == [2]
    (tmp_path / "imagesTr/x_002_0001.nii.gz").unlink()
    with pytest.raises(PoolError, match=rf"{tmp_path}/imagesTr/x_002_0001\.nii\.gz"):
        _ = own_data.dataset_pool(str(tmp_path)).cases


def test_regions_are_lists_of_ids_and_nested(tmp_path):
    labels = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]}
    pool = nnunet_folder(tmp_path, labels=labels, regions_class_order=[1, 2, 3])
    assert pool.table.names == ("whole_tumor", "tumor_core", "enhancing_tumor")
    assert [pool.table.parent(name) for name in pool.table.names] == [None, "whole_tumor", "tumor_core"]
    rows = {raw: pool.table.targets[code].tolist() for code, (_, raw) in enumerate(pool.table.codes) if code < 4}
    assert rows == {0: [0, 0, 0], 1: [1, 0, 0], 2: [1, 1, 0], 3: [1, 1, 1]}
    with pytest.raises(PoolError, match="one entry for each of"):
        nnunet_folder(tmp_path, labels=labels, regions_class_order=[1, 2])


def test_the_first_layouts_list_leaves_the_channels_number_out(tmp_path):
    listed = [{"image": "./imagesTr/x_001.nii.gz", "label": "./labelsTr/x_001.nii.gz"}]
    pool = nnunet_folder(tmp_path, ("x_001",), labels={"0": "background", "1": "liver"}, training=listed)
    assert Path(pool.cases[0]["image"]).name == "x_001_0000.nii.gz"


def test_two_folders_with_a_file_per_channel(tmp_path):
    for channel in range(3):
        write(tmp_path, "case_0007", suffix=f"_{channel:04d}")
    pool = own_data.dataset_pool(str(tmp_path), label_ids={"1": "liver"})
    assert pool.cases[0]["case"] == "case_0007" and len(pool.cases[0]["image"]) == 3


def pairs_of(folder, **options):
    """Case -> (images, label) of a folder's pool, relative to it."""
    pool = own_data.dataset_pool(str(folder), **{"label_ids": {"1": "liver"}, **options})
    return {
        item["case"]: tuple(
            [str(Path(path).relative_to(folder)) for path in ([paths] if isinstance(paths, str) else paths)]
            for paths in (item["image"], item["label"])
        )
        for item in pool.cases
    }


@pytest.mark.parametrize(
    ("image", "label", "case"),
    [
        ("hip_00{}_img.nii.gz", "hip_00{}_seg.nii.gz", "hip_00{}"),
        ("hip_0{}1.NII.GZ", "hip_0{}1-label.nii.gz", "hip_0{}1"),
        ("volume-{}.nii", "segmentation-{}.nii", "{}"),
        ("img000{}.mhd", "label000{}.nrrd", "000{}"),
        ("a.b {}.nrrd", "a.b {}.seg.nrrd", "a.b {}"),
    ],
)
def test_two_folders_pair_by_what_their_names_do_not_share(tmp_path, image, label, case):
    for number in (1, 2, 12):
        touch(tmp_path, f"images/{image.format(number)}", f"labels/{label.format(number)}")
        touch(tmp_path, f"images/._{image.format(number)}", "images/.DS_Store", "labels/ages.csv")
    assert pairs_of(tmp_path) == {
        case.format(number): ([f"images/{image.format(number)}"], [f"labels/{label.format(number)}"])
        for number in (1, 2, 12)
    }


def test_folders_that_a_dataset_json_overrules_are_named(tmp_path, caplog):
    touch(tmp_path, "imagesTr/a.nii", "labelsTr/a.nii")
    listed = [{"image": "./imagesTr/a.nii", "label": "./labelsTr/a.nii"}]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"1": "liver"}, "training": listed}))
    assert list(pairs_of(tmp_path)) == ["a"] and not caplog.records
    assert list(pairs_of(tmp_path, images="ct")) == ["a"]
    assert "--images and --labels are no patterns" in caplog.text


def test_options_that_a_pool_file_overrules_are_named(tmp_path, caplog):
    touch(tmp_path, "images/a.nii", "labels/a.nii")
    layout = {"name": "x", "folder": ".", "image": "images/{case}.nii", "label": "labels/{case}.nii"}
    declared = {"targets": {"liver": {}}, "datasets": [{**layout, "modality": "CT", "labels": {"1": "liver"}}]}
    assert list(pairs_of(tmp_path, label_ids=None, pool_file=declared)) == ["a"] and not caplog.records
    assert list(pairs_of(tmp_path, pool_file=declared, modality="MR")) == ["a"]
    assert "--label_ids and --modality: without effect, since the pool file says it" in caplog.text


def test_files_of_macos_in_a_list_are_left_out(tmp_path, caplog):
    touch(tmp_path, *(f"{kind}/{name}.nii" for kind in ("imagesTr", "labelsTr") for name in ("a", "._a")))
    listed = [{"image": f"./imagesTr/{name}.nii", "label": f"./labelsTr/{name}.nii"} for name in ("._a", "a")]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"1": "liver"}, "training": listed}))
    assert list(pairs_of(tmp_path)) == ["a"] and "1 files of macOS" in caplog.text


def test_any_other_order_of_files_is_named_by_patterns(tmp_path):
    for patient in ("P 1", "ü"):
        touch(tmp_path, *(f"{patient}/{name}.nii.gz" for name in ("T1", "T2", "seg", "masks/liver")))
    several, one = ["{case}/T1.nii.gz", "{case}/T2.nii.gz"], "{case}/seg.nii.gz"
    found = pairs_of(tmp_path, images=several, labels=one)
    assert found["ü"] == (["ü/T1.nii.gz", "ü/T2.nii.gz"], ["ü/seg.nii.gz"]) and len(found) == 2
    masks = {"labels": "{case}/masks/{structure}.nii.gz", "label_ids": {"liver": "liver"}}
    pool = own_data.dataset_pool(str(tmp_path), images=several[0], **masks)
    assert pool.cases[0]["label"] == {"liver": str(tmp_path / "P 1/masks/liver.nii.gz")}
    touch(tmp_path / "flat", "a.nii", "a_seg.nii", "b.nii", "b_seg.nii")
    assert list(pairs_of(tmp_path / "flat", images="{case}.nii", labels="{case}_seg.nii")) == ["a", "b"]
    with pytest.raises(PoolError, match="holds no case in the layout"):
        pairs_of(tmp_path / "flat", images="{case}.nii", labels="{case}.nii")
    with pytest.raises(PoolError, match="--labels labels is none"):
        pairs_of(tmp_path, images=several)
    with pytest.raises(PoolError, match="say how the files lie"):
        pairs_of(tmp_path)


def test_no_image_of_a_folder_is_left_out_without_a_word(tmp_path, caplog):
    touch(tmp_path, "images/a.nii.gz", "images/b.nii", "labels/a.nii.gz", "labels/b.nii.gz")
    with pytest.raises(PoolError, match=r"several endings \(1 \.nii\.gz, 1 \.nii\)"):
        pairs_of(tmp_path)
    (tmp_path / "images/b.nii").unlink()
    touch(tmp_path, "images/c/ct.nii.gz", "images/d_0001.nii.gz", "labels/d.nii.gz")
    patterns = {"images": "images/{case}.nii.gz", "labels": "labels/{case}.nii.gz"}
    with pytest.raises(PoolError, match=r"labels/d_0001\.nii\.gz"):
        pairs_of(tmp_path, **patterns)
    assert list(pairs_of(tmp_path, images="images/{case}_0001.nii.gz", labels="labels/{case}.nii.gz")) == ["d"]
    assert "images of other names (images/{case}_0001.nii.gz) are not used" in caplog.text
    (tmp_path / "labels/a.nii.gz").rename(tmp_path / "labels/x.nii.gz")
    (tmp_path / "images/d_0001.nii.gz").unlink()
    (tmp_path / "labels/d.nii.gz").unlink()
    (tmp_path / "labels/b.nii.gz").rename(tmp_path / "labels/y z.nii.gz")
    with pytest.raises(PoolError, match="say what belongs together"):
        pairs_of(tmp_path)


def test_a_number_that_is_the_cases_own_is_no_channel(tmp_path):
    for name in ("case_0000", "case_0001"):
        write(tmp_path, name)
    pool = own_data.dataset_pool(str(tmp_path), label_ids={"1": "liver"})
    assert [item["case"] for item in pool.cases] == ["case_0000", "case_0001"]


def test_ids_that_are_not_listed_are_to_be_named_where_this_layout_names_them(folders, tmp_path):
    def advice(pool):
        with pytest.raises(LabelError, match=r"holds the ids \{7: 1\}") as error:
            pool.table.encode(pool.table.datasets[0], np.array([0, 1, 7]))
        return str(error.value).partition("it lists")[2]

    two_folders = own_data.dataset_pool(str(folders), label_ids={"1": "liver"})
    assert "Name them in --label_ids (now {'1': 'liver'})" in advice(two_folders)
    nnunet = nnunet_folder(tmp_path / "nnunet", labels={"background": 0, "liver": 1})
    assert f'Name them in "labels" of {tmp_path}/nnunet/dataset.json' in advice(nnunet)
    assert "--label_ids" in advice(own_data.dataset_pool(str(tmp_path / "nnunet"), label_ids={"1": "liver"}))
    declared = {"targets": {"liver": {}}, "datasets": [{"name": "x", "image": "{case}", "label": "{case}"}]}
    declared["datasets"][0]["labels"] = {"1": "liver"}
    assert 'under "ignore", or set "others"' in advice(DatasetPool(declared, tmp_path))


def test_what_is_missing_is_named(tmp_path, weights):
    with pytest.raises(PoolError, match=r"neither dataset\.json .* nor a folder 'images'"):
        own_data.dataset_pool(str(tmp_path))
    (tmp_path / "images").mkdir()
    with pytest.raises(PoolError, match=r"holds no \.nii\.gz"):
        own_data.dataset_pool(str(tmp_path), label_ids={"1": "liver"})
    write(tmp_path, "a", kinds=("images", "elsewhere"))
    with pytest.raises(PoolError, match="labels does not exist"):
        own_data.dataset_pool(str(tmp_path), label_ids={"1": "liver"})
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {}}))
    with pytest.raises(PoolError, match='no "labels"'):
        own_data.dataset_pool(str(tmp_path))


def test_without_files_the_targets_are_those_of_the_weights(tmp_path, weights):
    pool = own_data.dataset_pool(str(tmp_path), pretrained=weights)
    assert pool.table.names == ("liver", "spleen") and pool.table.bare_dataset == "label_map"
    assert own_data.count_channels(pool, weights) == 1
    with pytest.raises(PoolError, match="holds no data set"):
        _ = pool.cases


# ---- preparation and patch -------------------------------------------------------------------------------------------


@pytest.fixture
def pool(folders):
    return own_data.dataset_pool(str(folders), label_ids={"1": "liver"})


def test_spacing_and_normalization_are_the_checkpoints_unless_asked_otherwise(pool, weights, tmp_path):
    store = str(tmp_path / "store")
    kept = planning.plan_preparation(pool, store, pretrained=weights)
    assert kept.spacing_mm == (4.0, 2.0, 2.0) and kept.intensity == {"CT": CT}
    assert not (tmp_path / "store").exists(), "nothing was measured"
    given = planning.plan_preparation(pool, store, [3, 1, 1], {**CT, "mean": 1.0}, pretrained=weights)
    assert given.spacing_mm == (3.0, 1.0, 1.0) and given.intensity["CT"]["mean"] == 1.0
    planned = planning.plan_preparation(pool, store, "auto", "fingerprint", pretrained=weights)
    assert planned.spacing_mm == (4.0, 2.0, 2.0)
    values = np.concatenate([nib.load(item["image"]).get_fdata()[5:9, 5:9, 3:6].ravel() for item in pool.cases])
    assert planned.intensity["CT"]["mean"] == pytest.approx(values.mean(), abs=15)
    with pytest.raises(ValueError, match="'best'"):
        planning.plan_preparation(pool, store, ct_normalization="best", pretrained=weights)


def test_weights_keep_their_orientation_and_order_at_any_spacing(pool, weights, tmp_path):
    """Stored: 20 x 22 x 12 voxels of 2 x 2 x 4 mm, of which these weights want the axes 0, 2, 1."""
    tensors, description = read_state(weights)
    rules = ({"scheme": "zscore", "masked": False},)
    description["preparation"] |= {"orientation": "ikj", "resample_first": True, "channels": rules}
    theirs, store = str(tmp_path / "theirs.pt"), str(tmp_path / "store")
    torch.save({**tensors, EXTRA_STATE: encode_description(description)}, theirs)
    planning.plan_preparation(pool, store, "auto", "fingerprint")  # another orientation, in the same store
    for spacing, found in (("auto", (2, 4, 2)), ([3, 1, 1], (3, 1, 1)), ("checkpoint", (4, 2, 2))):
        for normalization, channels in (("fingerprint", ()), ("checkpoint", rules)):
            kept = planning.plan_preparation(pool, store, spacing, normalization, pretrained=theirs)
            assert (kept.spacing_mm, kept.channels) == (found, channels)
            assert kept.orientation == "ikj" and kept.resample_first
    plan = plan_run(pool, store, pretrained=theirs, step_seconds=0.05)
    assert plan.spacing_mm == (2.0, 4.0, 2.0) and plan.median_shape == (20, 12, 22)


def test_a_checkpoints_plan_needs_a_checkpoint(pool, tmp_path):
    with pytest.raises(ValueError, match="give --pretrained FILE, or numbers"):
        planning.plan_preparation(pool, str(tmp_path))
    with pytest.raises(CheckpointError, match=r"/none\.pt do not exist.*--pretrained"):
        planning.plan_preparation(pool, str(tmp_path), pretrained=str(tmp_path / "none.pt"))


def test_a_fingerprint_is_measured_once_and_anew_when_a_file_changes(pool, folders, tmp_path, monkeypatch):
    store, measured = str(tmp_path / "store"), []
    monkeypatch.setattr(
        planning, "fingerprint", lambda *args, run=planning.fingerprint, **how: measured.append(1) or run(*args, **how)
    )
    for _ in range(2):
        planning.plan_preparation(pool, store, "auto", "fingerprint")
    assert len(measured) == 1
    write(folders, "a", spacing=(3.0, 3.0, 4.0))
    planning.plan_preparation(
        own_data.dataset_pool(str(folders), label_ids={"1": "liver"}), store, "auto", "fingerprint"
    )
    assert len(measured) == 2


def test_a_store_that_cannot_be_written_is_named_with_its_option(pool, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"store cannot be written .*--store_dir"):
        planning.plan_preparation(pool, str(tmp_path / "file/store"), "auto", "fingerprint")


def test_a_store_that_may_only_be_read_keeps_no_fingerprint_and_stops_nothing(pool, tmp_path, monkeypatch, caplog):
    def refuse(path, content):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(planning, "write_json", refuse)
    assert planning.plan_preparation(pool, str(tmp_path / "store"), "auto", "fingerprint").spacing_mm
    assert "the fingerprint is not kept: [Errno 13]" in caplog.text


def test_what_was_measured_of_a_case_is_kept_by_its_bytes(pool, folders, tmp_path, monkeypatch):
    """A bad case at the end, another place, another pool around it: no case is read twice."""
    store, read = str(tmp_path / "store"), []
    monkeypatch.setattr(
        fingerprints,
        "load_case",
        lambda item, *rest, run=fingerprints.load_case: read.append(item["case"]) or run(item, *rest),
    )
    label = folders / "labels/b.nii.gz"
    content = label.read_bytes()
    label.write_bytes(content[:-20])
    with pytest.raises(PoolError, match=r"(?s)1 of 2 cases cannot be used.*labels/b\.nii\.gz"):
        planning.pool_fingerprint(pool, store)
    label.write_bytes(content)
    pools = [own_data.dataset_pool(str(folders), label_ids={"1": "liver"}) for _ in range(2)]
    mended = planning.pool_fingerprint(pools[0], store)
    assert sorted(read) == ["a", "b", "b"]
    whole = planning.pool_fingerprint(pools[1], str(tmp_path / "other store"))
    assert mended == whole and len(read) == 5
    moved = shutil.copytree(folders, tmp_path / "other place" / folders.name)
    entry, targets = pools[0].entries["data"], pools[0].table.to_dict()["targets"]
    one = DatasetPool({"targets": targets, "datasets": [{**entry, "exclude": ["b"]}]}, moved)
    two = own_data.dataset_pool(str(moved), label_ids={"1": "liver"})
    assert planning.pool_fingerprint(two, store).intensity == whole.intensity and len(read) == 5
    alone = planning.pool_fingerprint(one, store)
    assert len(alone.shapes) == 1 and len(read) == 5, "more voxels are drawn of one case"
    assert alone == planning.pool_fingerprint(one, str(tmp_path / "third store"))


def test_a_downstream_task_whose_files_are_gone_is_planned_from_the_store(pool, folders, tmp_path):
    found = planning.pool_fingerprint(pool, str(tmp_path / "store"))
    shutil.rmtree(folders)
    kept = own_data.dataset_pool(str(folders), kept_in=str(tmp_path / "store"))
    assert kept.cases == pool.cases and kept.table.to_dict() == pool.table.to_dict()
    assert own_data.count_channels(kept) == 1
    assert planning.pool_fingerprint(kept, str(tmp_path / "store")).intensity == found.intensity
    own_data.dataset_pool(str(folders), kept_in=str(tmp_path / "store"), label_ids={"1": "liver"}, modality="CT")
    for asked in ({"label_ids": {"1": "spleen"}}, {"modality": "MR"}, {"regions": {"spleen": {}}}):
        with pytest.raises(PoolError, match=f"--{next(iter(asked))}: the store .* has this data set with ids"):
            own_data.dataset_pool(str(folders), kept_in=str(tmp_path / "store"), **asked)
    with pytest.raises(PoolError, match=r"'data' is not known to the store .*--raw_data False"):
        own_data.dataset_pool(str(folders), kept_in=str(tmp_path / "no store"))


def test_a_longer_sample_begins_with_a_shorter_one():
    """So that what was measured in a small pool serves a larger one, to the bit; too short a sample serves none."""
    values = np.random.default_rng(0).normal(size=4567).astype(np.float32)
    long, short = (np.random.RandomState(1234).choice(values, n, replace=True) for n in (1000, 77))
    np.testing.assert_array_equal(long[:77], short)
    case = fingerprints.Measured("CT", long, False, (), (), 1.0, {})
    np.testing.assert_array_equal(case.drawn(77), short)
    assert case.drawn(1001) is None
    np.testing.assert_array_equal(case._replace(values=values, whole=True).drawn(77), short)


def test_the_fingerprint_is_the_same_in_workers(pool, tmp_path, monkeypatch):
    alone = planning.pool_fingerprint(pool, str(tmp_path / "alone"))
    monkeypatch.setattr(fingerprints, "ALONE_S", 0.0)
    assert planning.pool_fingerprint(pool, str(tmp_path / "workers"), num_workers=2) == alone


def test_the_fingerprint_of_an_earlier_version_is_taken_over(pool, tmp_path, monkeypatch):
    found = planning.pool_fingerprint(pool, str(tmp_path))
    files = [[item["modality"], sources.file_identity(item)] for item in pool.cases]
    key = json.dumps([2, files, pool.table.to_dict()["datasets"]], sort_keys=True)
    (kept,) = (tmp_path / "fingerprints").glob("pool-*.json")
    kept.rename(tmp_path / f"fingerprint-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json")
    shutil.rmtree(tmp_path / "fingerprints")
    monkeypatch.setattr(planning, "fingerprint", lambda *args, **how: pytest.fail("measured again"))
    taken = planning.pool_fingerprint(pool, str(tmp_path))
    assert taken.intensity == found.intensity and taken.median_spacing_mm == found.median_spacing_mm


def test_the_fingerprint_knows_modalities(folders, tmp_path):
    """MR declared as CT by mistake must not stay in the CT statistics once it is put right."""
    write(folders, "c")
    image = nib.load(folders / "images/c.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) + 5000, image.affine), folders / "images/c.nii.gz")
    layout = {"name": "x", "folder": ".", "image": "images/{case}.nii.gz", "label": "labels/{case}.nii.gz"}
    plans = {}
    for modality in ("CT", {"default": "CT", "c": "MR"}, "MR"):
        declared = {"targets": {"liver": {}}, "datasets": [{**layout, "modality": modality, "labels": {"1": "liver"}}]}
        pool = DatasetPool(declared, folders)
        plans[str(modality)] = planning.plan_preparation(pool, str(tmp_path), (4, 2, 2), "fingerprint")
    first, mended, none = plans.values()
    assert first.intensity["CT"]["upper"] > 4000 > mended.intensity["CT"]["upper"]
    assert none.intensity == {}
    assert mended.masked == {"MR": False}  # nnU-Net's one decision for all cases, from the median crop


def test_ct_that_the_weights_never_saw_is_normalized_by_its_own_fingerprint(pool, weights, tmp_path, caplog):
    tensors, description = read_state(weights)
    description["preparation"]["intensity"] = {}
    torch.save({**tensors, EXTRA_STATE: encode_description(description)}, tmp_path / "mr.pt")
    found = planning.plan_preparation(pool, str(tmp_path), pretrained=str(tmp_path / "mr.pt"))
    assert set(found.intensity) == {"CT"} and "never saw CT" in caplog.text
    caplog.clear()
    description["preparation"]["channels"] = [{"scheme": "ct", **CT}, {"scheme": "zscore"}]  # CT beside PET
    torch.save({**tensors, EXTRA_STATE: encode_description(description)}, tmp_path / "two.pt")
    found = planning.plan_preparation(pool, str(tmp_path), pretrained=str(tmp_path / "two.pt"))
    assert set(found.intensity) == {"CT"} and "never saw CT of 1 channel:" in caplog.text


def test_ct_without_a_labelled_voxel_is_a_clear_error(folders, tmp_path):
    for path in (folders / "labels").glob("*"):
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), path)
    pool = own_data.dataset_pool(str(folders), label_ids={"1": "liver"})
    with pytest.raises(PoolError, match="no CT case has a labelled voxel"):
        planning.plan_preparation(pool, str(tmp_path), (4, 2, 2), "fingerprint")


def test_channels_are_counted_in_other_formats_too(tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        volume = SimpleITK.GetImageFromArray(np.ones((6, 8, 8), np.int16))
        SimpleITK.WriteImage(volume, str(tmp_path / kind / "a.nrrd"))
    assert own_data.count_channels(own_data.dataset_pool(str(tmp_path), label_ids={"1": "liver"})) == 1


def test_several_channels_are_measured_too(tmp_path, weights):
    write(tmp_path / "data", "a", channels=3)
    pool = own_data.dataset_pool(str(tmp_path / "data"), label_ids={"1": "liver"}, modality="MR")
    assert own_data.count_channels(pool) == 3
    found = planning.plan_preparation(pool, str(tmp_path), "auto", in_channels=3, pretrained=weights)
    assert found.spacing_mm == (4.0, 2.0, 2.0) and found.default_modality == "MR"


def test_the_plan_is_the_datas_with_and_without_weights(pool, weights, tmp_path):
    """Cases of 12 x 22 x 20 voxels at 4 x 2 x 2 mm: S is halved last, along it the first kernel is flat."""
    for pretrained in (None, weights):
        plan = plan_run(pool, str(tmp_path), pretrained=pretrained, step_seconds=0.05)
        assert plan.spacing_mm == (4.0, 2.0, 2.0) and plan.patch_size == (12, 24, 20)
        assert plan.strides[0] == (1, 2, 2) and plan.kernel_sizes[0] == (1, 3, 3)
        assert plan.network == ("weights" if pretrained else "tsfm_s") and plan.batch_size == 2
    assert plan.features == (4, 8, 16) and len(plan.strides) == 2, "weights keep their levels"
    network = planning.downstream_network(pool, plan.patch_size, 1, weights, plan)
    planning.take_over(network, pool, weights, output_dir=str(tmp_path))
    assert network(torch.zeros(1, 1, *plan.patch_size))[0].shape == (1, 1, *plan.patch_size)
    written = tmp_path / "transfer_report.json"
    report = json.loads(written.read_text())
    assert any("kernels" in note for note in report["mismatches"]) and any("strides" in n for n in report["mismatches"])
    (tmp_path / "last.pt").touch()
    written.write_text("of the run that is there")
    again = planning.downstream_network(pool, plan.patch_size, 1, weights, plan)
    planning.take_over(again, pool, weights, output_dir=str(tmp_path))
    assert written.read_text() == "of the run that is there"


def test_numbers_and_the_checkpoints_geometry_on_request(pool, weights, tmp_path):
    given = plan_run(pool, str(tmp_path), [4, 2, 2], [8, 16, 16], 3, pretrained=weights)
    assert (given.patch_size, given.batch_size) == ((8, 16, 16), 3)
    # at most the pretrained 16 x 32 x 32, rounded up to its strides 2 x 4 x 4
    theirs = plan_run(pool, str(tmp_path), "checkpoint", "checkpoint", pretrained=weights)
    assert theirs.patch_size == (12, 24, 20) and theirs.to_dict()["strides"] == NETWORK["strides"]
    assert theirs.kernels_if_any_is_flat() is None, "nor are its kernels those of the rule, flat along S"
    for name in ("spacing_mm", "patch_size"):
        with pytest.raises(ValueError, match="--pretrained"):
            plan_run(pool, str(tmp_path), **{name: "checkpoint"})
    with pytest.raises(ValueError, match="spacing_mm is 'fine'"):
        plan_run(pool, str(tmp_path), "fine")


def test_weights_that_a_processor_has_no_time_for_are_planned_by_another_budget(
    pool, weights, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    monkeypatch.setattr(plan_run_module, "CPU_STEP_SECONDS", 1e-6)
    assert plan_run(pool, str(tmp_path), "coarse", pretrained=weights).spacing_mm == (4.0, 2.0, 2.0)
    assert "weights exceed 1e-06 s a step" in caplog.text and "plan for 8 GB" in caplog.text
    with pytest.raises(PlanError, match="nothing fits into 1e-06 s a step"):
        plan_run(pool, str(tmp_path), pretrained=weights, step_seconds=1e-6)


def test_a_plan_is_taken_back_from_its_file(pool, tmp_path):
    plan = plan_run(pool, str(tmp_path))
    Forecast(str(tmp_path), plan).save(hours=2.0)
    for asked in ("auto", "coarse"):  # an overlay may have it
        assert plan_run(pool, str(tmp_path), spacing_mm=asked, plan_file=str(tmp_path / "plan.json")) == plan
    same = {"patch_size": list(plan.patch_size), "batch_size": plan.batch_size, "network_size": plan.network}
    assert plan_run(pool, str(tmp_path), **same, plan_file=str(tmp_path / "plan.json")) == plan
    with pytest.raises(PlanError, match="leave --patch_size out"):
        plan_run(pool, str(tmp_path), patch_size=[8, 16, 16], plan_file=str(tmp_path / "plan.json"))
    with pytest.raises(PlanError, match=r"no\.json cannot be read"):
        plan_run(pool, str(tmp_path), plan_file=str(tmp_path / "no.json"))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("spacing_mm", [1, 1], "three numbers of millimetres"),
        ("patch_size", 64, "three whole numbers"),
        ("batch_size", "two", "a whole number from 1"),
        ("memory_gb", "24GB", "a number above 0, without its unit"),
        ("step_seconds", 0, "a number above 0"),
        ("ct_normalization", {"lower": -100, "upper": 300}, r"lacks \['mean', 'sd'\]"),
        ("label_ids", "1:liver", 'an object from raw ids to targets, like {"1": "liver"}'),
        ("regions", ["liver"], "an object from targets to their relations"),
    ],
)
def test_values_that_cannot_be_planned_by_are_refused_as_in_a_training(option, value, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        show_plan("nowhere", **{option: value})
    (tmp_path / "train.json").write_text(json.dumps({option: value}))
    with pytest.raises(OptionError, match=message):
        check_options(["monai.bundle", "run", "--config_file", str(tmp_path / "train.json")])


def test_a_plan_that_cannot_be_written_is_not_made(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "fingerprint", None)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file cannot be written .*--output_file"):
        show_plan(str(folders), label_ids={"1": "liver"}, output_file=str(tmp_path / "file/plan.json"))


def test_a_plan_that_was_made_for_weights_needs_them_and_one_of_other_levels_does_not_fit(
    pool, weights, tmp_path, caplog
):
    caplog.set_level("INFO")
    file = str(tmp_path / "plan.json")
    plan = plan_run(pool, str(tmp_path), pretrained=weights)
    Forecast(str(tmp_path), plan).save()
    assert plan_run(pool, str(tmp_path), pretrained=weights, plan_file=file) == plan
    assert "starts from nothing" not in caplog.text
    with pytest.raises(PlanError, match="made for pretrained weights"):
        plan_run(pool, str(tmp_path), plan_file=file)
    (tmp_path / "null.json").write_text("null")
    with pytest.raises(PlanError, match="the plan lacks"):
        plan_run(pool, str(tmp_path), plan_file=str(tmp_path / "null.json"))
    Forecast(str(tmp_path), plan_patch((32, 32, 32), (1, 1, 1), "tsfm_s")).save()
    with pytest.raises(PlanError, match=r"has 4 levels, the network of .* has 3"):
        plan_run(pool, str(tmp_path), pretrained=weights, plan_file=file)


def test_the_printed_plan_names_modality_and_normalization(folders, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    options = {"label_ids": {"1": "liver"}, "step_seconds": 0.05, "timed": False, "device": "cpu"}
    show_plan(str(folders), ct_normalization=CT, **options)
    assert "  images    2 CT cases, clipped to -100 to 300 HU, less 50, divided by 80\n" in capsys.readouterr().out
    assert "images: 2 CT cases, clipped" in caplog.text, "a run's console has it too"
    show_plan(str(folders), modality="MR", **options)
    assert "  images    2 MR cases, z-score of each case and channel\n" in capsys.readouterr().out


def test_data_of_which_nothing_can_be_learned_is_refused_before_the_work(folders, tmp_path):
    absent = own_data.dataset_pool(str(folders), label_ids={"1": "liver", "3": "cyst"})
    with pytest.raises(
        PoolError, match=r"of the 2 cases none has a voxel of the labels 3 \(cyst\).*out of --label_ids"
    ):
        plan_run(absent, str(tmp_path))
    (folders / "images/b.nii.gz").unlink()
    single = own_data.dataset_pool(str(folders), label_ids={"1": "liver"})
    with pytest.raises(PoolError, match=r"single case.*--fold all"):
        plan_run(single, str(tmp_path))
    assert plan_run(single, str(tmp_path), fold="all").batch_size == 2
    for name in ("a", "b"):
        flat = np.zeros((20, 22, 1), np.uint8)
        flat[5:9, 5:9] = 1
        for kind in ("images", "labels"):
            nib.save(nib.Nifti1Image(flat, np.eye(4)), folders / kind / f"{name}.nii.gz")
    with pytest.raises(PlanError, match="two-dimensional"):
        plan_run(own_data.dataset_pool(str(folders), label_ids={"1": "liver"}), str(tmp_path))


def test_a_spacing_too_coarse_for_a_structure_is_named(pool, tmp_path, caplog):
    plan_run(pool, str(tmp_path), [4, 2, 2])
    assert "coarse" not in caplog.text
    plan_run(pool, str(tmp_path), [4, 6, 6])  # the ball is 3 x 4 x 4 voxels of 4 x 2 x 2 mm
    assert "4x6x6 mm (S, P, L) is coarse for liver: at its smallest it is 3x1.33x1.33 voxels" in caplog.text


def test_weights_that_are_far_from_the_data_are_named(folders, weights, tmp_path, caplog):
    pool = own_data.dataset_pool(str(folders), label_ids={"1": "cyst"}, modality="MR")
    plan_run(pool, str(tmp_path), [4, 2, 0.9], pretrained=weights)
    for words in ("none of the targets ['cyst']", "more than 2 times as large"):
        assert words in caplog.text


def test_the_network_is_the_pretrained_one_in_the_tasks_shape(pool, weights, tmp_path):
    network = planning.downstream_network(pool, [12, 24, 20], 2, weights)
    assert planning.take_over(network, pool, weights, output_dir=str(tmp_path)) is network
    assert network.description["network"]["features"] == NETWORK["features"]
    assert network(torch.zeros(1, 2, 12, 24, 20))[0].shape == (1, 1, 12, 24, 20)
    assert json.loads((tmp_path / "transfer_report.json").read_text())["targets"]["taken over"] == ["liver"]
    with pytest.raises(ValueError, match="freeze is 'decoder'"):
        freeze(network, "decoder")


def test_a_folder_that_cannot_be_written_is_named_before_weights_are_taken_over(pool, weights, tmp_path):
    (tmp_path / "file").touch()
    network = planning.downstream_network(pool, (16, 32, 32), 1, weights)
    with pytest.raises(OSError, match=r"out cannot be written .*--output_dir"):
        planning.take_over(network, pool, weights, output_dir=str(tmp_path / "file/out"))


def test_what_nothing_pretrained_fills_cannot_be_frozen(pool, weights, tmp_path):
    def taken_over(pretrained, **more):
        network = planning.downstream_network(pool, [12, 24, 20], 1, weights, **more)
        return planning.take_over(network, pool, pretrained)

    freeze(taken_over(weights), "all_but_heads")
    freeze(taken_over(None), "none")
    for network in (taken_over(None), taken_over(weights, click_sigma=2.0)):  # click channels start at random
        with pytest.raises(ValueError, match=r"nothing pretrained fills stem\.weight"):
            freeze(network, "encoder")


def test_weights_that_saw_this_data_set_are_named(pool, weights, tmp_path, caplog):
    tensors, description = read_state(weights)
    for seen, warned in (["first"], False), (["first", "data"], True):
        torch.save({**tensors, EXTRA_STATE: encode_description({**description, "trained_on": seen})}, tmp_path / "m.pt")
        planning.take_over(planning.downstream_network(pool, [12, 24, 20], 1, weights), pool, str(tmp_path / "m.pt"))
        assert ("trained on data, too" in caplog.text) == warned


def test_weights_that_saw_a_data_set_that_holds_this_ones_scans_are_named(pool, weights, tmp_path, caplog):
    """KiTS2019 is within KiTS2021, which the paper's pool has."""
    tensors, description = read_state(weights)
    seen = {**description, "trained_on": ["kits21", "msd_lung"]}
    torch.save({**tensors, EXTRA_STATE: encode_description(seen)}, tmp_path / "m.pt")
    (entry,) = pool.entries
    for config, is_named in ("kits2019.json", True), ("abdomenct1k.json", True), ("brats2020.json", False):
        caplog.clear()
        declared = read_json(ROOT / "bundles/tsfm_finetune/configs" / config)["pool_file"]["datasets"][0]
        pool.entries[entry] = {**pool.entries[entry], "origin": declared.get("origin", [])}
        planning.take_over(planning.downstream_network(pool, [12, 24, 20], 1, weights), pool, str(tmp_path / "m.pt"))
        assert ("were trained on kits21, too" in caplog.text) == is_named


def test_bad_cases_are_listed_all_at_once(folders, tmp_path):
    for name in ("a", "b"):
        (folders / f"labels/{name}.nii.gz").write_bytes(b"no image")
    pool = DatasetPool(
        {"targets": {"liver": {}}, "datasets": [{"name": "x", "folder": ".", "image": "images/{case}.nii.gz",
         "label": "labels/{case}.nii.gz", "labels": {"1": "liver"}}]}, folders,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"(?s)labels/a\.nii\.gz.*labels/b\.nii\.gz"):
        planning.plan_preparation(pool, str(tmp_path), "auto", "fingerprint")


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_an_uncaught_error_ends_with_its_first_cause():
    program = """
from tsfm.errors import name_cause_last
name_cause_last()
try:
    raise ValueError("image 7 is upside down")
except ValueError as error:
    raise RuntimeError("config entry 3 failed") from error
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("Traceback") == 2
    assert done.stderr.strip().splitlines()[-1] == "ValueError: image 7 is upside down"


def test_the_first_cause_of_a_plain_error_is_itself():
    error = ValueError("plain")
    assert first_cause(error) is error
