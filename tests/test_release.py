"""Releases: self-contained, fitted to the checkpoint, reproducible, and through the Model Zoo's gate."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import warm
from monai.bundle import ConfigWorkflow
from tsfm.cases.cases import Preparation
from tsfm.cases.pool import DatasetPool
from tsfm.evaluation.evaluation import evaluate_folder
from tsfm.labels import LabelTable
from tsfm.network.tsfm_net import TSFM
from tsfm.options import OptionError
from tsfm.training.checkpoint import describe_network, load_weights, read_state, save_weights, table_of
from tsfm_tools.release import fitting, gate, readme, release
from tsfm_tools.release.folder_checks import SCHEMA
from tsfm_tools.release.rules import ReleaseError, built, check_weights

REPOSITORY = Path(__file__).resolve().parents[1]
TARGETS = {"kidney": {}, "kidney_tumor": {"inside": "kidney"}}
DATASETS = [{"name": "mine", "labels": {"1": "kidney", "2": "kidney_tumor"}}]
NETWORK = {
    "in_channels": 1,
    "out_channels": 2,
    "features": [4, 8],
    "depths_down": [1, 1],
    "depths_up": [1],
    "strides": [[2, 2, 2]],
    "img_size": [16, 16, 16],
    "hidden_size": 8,
    "num_layers": 1,
    "num_heads": 2,
    "mlp_dim": 16,
}
RELEASED = json.loads((REPOSITORY / "bundles/tsfm_pretrain/configs/released.json").read_text())
METADATA = {
    "schema": "https://project-monai.github.io/schema/meta_schema_20240725.json",
    "version": "0.1.0",
    "changelog": {"0.1.0": "first"},
    "monai_version": "1.6.1",
    "pytorch_version": "2.13.0",
    "numpy_version": "2.4.0",
    "required_packages_version": {"nibabel": "5.3.2"},
    "name": "Toy",
    "task": "segmentation",
    "description": "a toy",
    "authors": "the test",
    "copyright": "none",
    "network_data_format": {
        "inputs": {
            "image": {
                "type": "image",
                "format": "hounsfield",
                "num_channels": 1,
                "spatial_shape": [112, 160, 192],
                "dtype": "float32",
                "value_range": [-5, 5],
                "is_patch_data": True,
                "channel_def": {"0": "CT"},
            }
        },
        "outputs": {
            "pred": {
                "type": "image",
                "format": "segmentation",
                "num_channels": 31,
                "spatial_shape": [112, 160, 192],
                "dtype": "float32",
                "value_range": [0, 31],
                "is_patch_data": True,
                "channel_def": {"0": "background", "1": "spleen"},
            }
        },
    },
}


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=4) + "\n")


@pytest.fixture
def source(tmp_path) -> Path:
    """A source bundle with what a release touches."""
    bundle = tmp_path / "toy"
    definition = {
        "_target_": "tsfm.network.networks.create_network",
        "out_channels": 31,
        "checkpointing": "@checkpointing",
    }
    common = {
        "imports": ["$import os"],
        "bundle_root": ".",
        "patch_size": [112, 160, 192],
        "network_def": definition,
        "initialize": ["$os.makedirs(@bundle_root, exist_ok=True)"],
    }
    write(
        bundle / "configs/train.json",
        {**common, "spacing_mm": [1.5, 1, 1], "preparation": {"_target_": "x"}, "checkpointing": True},
    )
    by_weights = {
        "checkpoint": "$@bundle_root + '/models/model.pt'",
        "description": {"_target_": "tsfm.training.checkpoint.read_description", "path": "@checkpoint"},
        "network_def": {"_target_": "tsfm.training.checkpoint.build_network", "description": "@description"},
    }
    write(bundle / "configs/inference.json", {**common, **by_weights})
    write(bundle / "configs/released.json", RELEASED)
    write(bundle / "configs/small.json", {"patch_size": [48, 64, 64]})
    layout = {"name": "mine", "folder": "Mine", "format": "msd", "labels": {"1": "spleen"}}
    write(bundle / "configs/pool.json", {"targets": {"spleen": {}}, "datasets": [layout]})
    write(bundle / "configs/metadata.json", METADATA)
    write(bundle / "docs/README.md", "# Toy\n\n<!-- weights: begin -->\nnone yet\n<!-- weights: end -->\n\n# License\n")
    write(bundle / "LICENSE", "Apache License Version 2.0")
    for file in (
        "store/case.b2nd",
        "evaluation/case.nii.gz",
        "output_small/last.pt",
        "models_kits/model.pt",
        "mlruns/0",
    ):
        write(bundle / file, "a prepared case, a result, a run")
    write(bundle / "configs/__pycache__/x.pyc", "a cache")
    return bundle


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A training checkpoint of a two-target network, nested as training writes it."""
    torch.manual_seed(0)
    preparation = Preparation((3.0, 2.0, 2.0), {"CT": {"lower": -100.0, "upper": 300.0, "mean": 80.0, "sd": 60.0}})
    items = [{"image": "a", "label": "b", "dataset": "mine", "modality": "CT"}]
    network = describe_network(TSFM(**NETWORK), LabelTable(TARGETS, DATASETS), preparation, (16, 16, 16), items)
    path = tmp_path / "run" / "checkpoint.pt"
    path.parent.mkdir()
    torch.save({"model": network.state_dict(), "optimizer": {"state": {}}}, path)
    return path


@pytest.fixture
def staged(source, checkpoint, tmp_path) -> Path:
    return Path(release.release(str(source), str(checkpoint), str(tmp_path / "dist"), name="kidneys", zipped=False))


def config(bundle: Path, name: str) -> dict:
    return json.loads((bundle / "configs" / name).read_text())


def test_the_weight_files_hold_exactly_the_checkpoints_tensors(source, checkpoint, tmp_path):
    expected = torch.load(checkpoint, weights_only=True)["model"]
    arguments = {"output_dir": str(tmp_path / "dist"), "zipped": False}
    staged = Path(release.release(str(source), str(checkpoint), **arguments))
    assert os.listdir(staged / "models") == ["model.pt"]  # once, unless asked
    staged = Path(release.release(str(source), str(checkpoint), safetensors=True, **arguments))
    for file in ("model.pt", "model.safetensors"):
        tensors, description = read_state(staged / "models" / file)
        assert set(tensors) == set(expected) - {"_extra_state"}
        assert all(torch.equal(tensors[key], expected[key]) for key in tensors)
        assert list(description["targets"]) == ["kidney", "kidney_tumor"]
    assert "model" not in torch.load(staged / "models/model.pt", weights_only=True)  # plain, not nested


def test_configs_take_network_patch_spacing_and_normalization_from_the_checkpoint(staged):
    train = config(staged, "train.json")
    assert train["network_def"] == {**train["network_def"], **NETWORK}
    assert train["patch_size"] == [16, 16, 16]
    assert train["preparation"]["values"]["spacing_mm"] == [3.0, 2.0, 2.0]
    assert train["preparation"]["values"]["intensity"]["CT"]["mean"] == 80.0
    assert "spacing_mm" not in train  # it would have no effect: --spacing_mm is refused instead
    assert (
        train["initial_weights"]["_target_"] == "tsfm.training.checkpoint.bundled_weights"
    )  # training goes on from these weights
    assert train["network_def"]["checkpointing"] == "$@checkpointing is True"  # as the user's device needs it
    assert train["checkpointing"] == "auto"
    assert config(staged, "small.json") == {"patch_size": [48, 64, 64]}  # an overlay stays what it is


def test_inference_names_network_and_preparation_and_runs_without_the_weights(staged):
    inference = config(staged, "inference.json")
    assert inference["network_def"] == {
        "_target_": "tsfm.training.released.released_network", "path": "@checkpoint", "name": "tsfm",
        **TSFM(**NETWORK).description["network"],
    }  # fmt: skip
    assert inference["description"]["preparation"]["spacing_mm"] == [3.0, 2.0, 2.0]
    assert inference["description"]["patch_size"] == [16, 16, 16]
    before = read_state(staged / "models/model.pt")
    (staged / "models/model.pt").unlink()
    for name in ("network_def", "description"):
        found = built(str(staged), "inference.json", name)
        if name == "description":
            assert table_of(found).names == ("kidney", "kidney_tumor")
        else:
            assert {key: value.shape for key, value in found.state_dict().items() if key != "_extra_state"} == {
                key: value.shape for key, value in before[0].items()
            }


def test_weights_of_another_training_have_the_last_word(staged, caplog):
    """A training of the released bundle on another task leaves its own model.pt."""
    network = TSFM(**{**NETWORK, "out_channels": 1, "features": [4, 6]})
    describe_network(network, LabelTable({"liver": {}}, []), Preparation((4.0, 4.0, 4.0), {}), (16, 16, 16))
    save_weights(network, staged / "models/model.pt")
    found = built(str(staged), "inference.json", "network_def")
    load_weights(found, staged / "models/model.pt")
    assert "another network than the config declares" in caplog.text and "features" in caplog.text
    assert built(str(staged), "inference.json", "description")["preparation"]["spacing_mm"] == [4.0, 4.0, 4.0]


def test_a_bundle_that_does_not_say_what_a_release_changes_is_refused(source, checkpoint, tmp_path):
    (source / "configs/released.json").unlink()
    with pytest.raises(ReleaseError, match=r"no configs/released\.json"):
        release.release(str(source), str(checkpoint), str(tmp_path / "dist"))


def test_an_overlay_becomes_part_of_the_staged_training(source, checkpoint, tmp_path):
    write(source / "configs/short.json", {"_desc_": "short", "iterations": 25, "network_def#dropout": 0.1})
    staged = Path(
        release.release(str(source), str(checkpoint), str(tmp_path / "dist"), overlays=["short.json"], zipped=False)
    )
    train = config(staged, "train.json")
    assert train["iterations"] == 25 and train["network_def"]["features"] == NETWORK["features"]
    assert train["_desc_"] == "In this release short.json is merged into it."
    with pytest.raises(ReleaseError, match=r"no configs/long\.json"):
        release.release(str(source), str(checkpoint), str(tmp_path / "dist"), overlays=["long.json"], zipped=False)


def test_the_data_licenses_are_those_of_the_weights(source, checkpoint, tmp_path):
    write(tmp_path / "licenses.txt", "mine: CC0")
    arguments = {"data_license": str(tmp_path / "licenses.txt")}
    release.release(str(source), str(checkpoint), str(tmp_path / "dist"), **arguments)
    staged = tmp_path / "dist/toy"
    assert (staged / "docs/data_license.txt").read_text() == "mine: CC0"
    assert _run(staged, "data licenses")[0] == "pass"
    release.release(
        str(source), str(checkpoint), str(tmp_path / "dist")
    )  # without a file: what travels with the weights
    assert "- mine: not declared" in (staged / "docs/data_license.txt").read_text()
    assert (
        "licences of that data | Commercial use is not known to be permitted by mine."
        in (staged / "docs/README.md").read_text()
    )
    (staged / "docs/data_license.txt").write_text("theirs: CC0")
    assert _run(staged, "data licenses")[0] == "FAIL"
    (tmp_path / "latin.txt").write_bytes("für Forschung".encode("latin-1"))
    for file in ("latin.txt", "absent.txt"):
        with pytest.raises(
            ReleaseError, match=rf"--data_license .*{file} cannot be read .* expected a text file in UTF-8"
        ):
            release.release(str(source), str(checkpoint), str(tmp_path / "new"), data_license=str(tmp_path / file))
    assert not (tmp_path / "new").exists()


def test_inference_builds_the_network_of_the_weights_beside_the_package(staged, tmp_path):
    """As monai.bundle.load does it: from any folder, with nothing but the vendored package on the path."""
    script = """
import sys
from monai.bundle import ConfigParser
parser = ConfigParser()
parser.read_config(sys.argv[1])
print(parser.get_parsed_content("network_def").description["network"]["out_channels"])
"""
    environment = {**os.environ, "PYTHONPATH": str(staged), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [warm().python, "-W", "ignore", "-c", script, str(staged / "configs/inference.json")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")
    assert done.stdout.strip() == "2", done.stderr


def test_metadata_describes_these_weights(staged):
    data = config(staged, "metadata.json")["network_data_format"]
    assert data["inputs"]["image"]["spatial_shape"] == [16, 16, 16]
    assert "segments kidney, kidney_tumor. Trained on: mine." in config(staged, "metadata.json")["description"]
    assert (
        config(staged, "metadata.json")["name"] == "Kidneys"
        and "MSD" not in config(staged, "metadata.json")["data_source"]
    )
    assert config(staged, "metadata.json")["eval_metrics"] == {"mean_dice": "not evaluated"}
    assert data["outputs"]["pred"]["num_channels"] == 2
    assert data["outputs"]["pred"]["value_range"] == []  # logits have none
    assert data["outputs"]["pred"]["channel_def"] == {"0": "background", "1": "kidney", "2": "kidney_tumor"}


def test_the_pool_file_takes_the_labels_and_keeps_the_layout(staged):
    pool = config(staged, "pool.json")
    assert list(pool["targets"]) == ["kidney", "kidney_tumor"]
    assert pool["datasets"][0]["folder"] == "Mine"
    assert pool["datasets"][0]["labels"] == {"1": "kidney", "2": "kidney_tumor"}


def test_a_data_set_without_a_layout_gets_a_plain_one_that_the_pool_reads(source, checkpoint, tmp_path):
    write(source / "configs/pool.json", {"targets": {"spleen": {}}, "datasets": []})
    staged = Path(release.release(str(source), str(checkpoint), str(tmp_path / "dist"), zipped=False))
    pool = DatasetPool(str(staged / "configs/pool.json"), str(tmp_path))
    assert pool.table.names == ("kidney", "kidney_tumor")
    assert config(staged, "pool.json")["datasets"][0]["image"] == "images/{case}.nii.gz"


def test_the_readme_names_every_target_and_keeps_its_text(staged):
    text = (staged / "docs/README.md").read_text()
    assert "| 2 | kidney_tumor | kidney | mine | not evaluated |" in text
    assert "| network | TSFM |" in text and "every other modality: z-score" in text
    assert "none yet" not in text and text.rstrip().endswith("# License")


def test_of_a_pool_that_was_there_in_part_a_release_claims_what_was_trained():
    """`--allow_missing`: the table declares data sets and targets that these weights have never seen."""
    others = {"name": "others", "labels": {"1": "kidney", "2": "spleen"}}
    table = LabelTable({**TARGETS, "spleen": {}}, [*DATASETS, others])
    network = TSFM(**{**NETWORK, "out_channels": 3})
    item = {"image": "a.nii.gz", "dataset": "mine", "modality": "CT"}
    network = describe_network(network, table, Preparation((2.0, 2.0, 2.0)), [16, 16, 16], [item])
    metadata = copy.deepcopy(METADATA)
    fitting.fill_metadata(metadata, network.description, "Kidneys", None, 1000)
    assert metadata["task"] == "Segmentation of kidney, kidney_tumor in CT"
    assert "segments kidney, kidney_tumor. Trained on: mine." in metadata["description"]
    text = readme.weights_table(network.description, metadata, 1000, {})
    assert "| 1 | kidney |  | mine | not evaluated |" in text and "| 3 | spleen |  |  | not trained |" in text


def test_a_sentence_of_several_lines_stays_in_its_cell(source, checkpoint, tmp_path):
    staged = release.release(
        str(source), str(checkpoint), str(tmp_path), name="x", trained_on="A | B,\nC", zipped=False
    )
    assert "| trained on | A \\| B, C |" in (Path(staged) / "docs/README.md").read_text()


def test_the_readmes_training_section_is_the_merged_train_json_beside_the_run_that_made_the_weights(
    checkpoint, tmp_path
):
    arguments = {"bundle_dir": str(REPOSITORY / "bundles/tsfm_pretrain"), "checkpoint": str(checkpoint)}
    arguments |= {"output_dir": str(tmp_path / "dist"), "overlays": ["small.json"], "zipped": False}
    text = (Path(release.release(**arguments)) / "docs/README.md").read_text()
    assert "| optimizer | AdamW, weight_decay 0.01 |" in text and "| learning rate | 0.002 |" in text
    assert "| patch (S, P, L) | 16 x 16 x 16 |" in text and "not recorded" in text
    assert "RandPerChanneld (RandGaussianBlur)" in text and "These weights were not evaluated" in text
    for wrong in ("SGD with", "250 iterations", "112 x 160", "19.6 GB", ".7106"):
        assert wrong not in text, wrong
    folder = REPOSITORY / "bundles/tsfm_pretrain/configs"
    configs = {name: json.loads((folder / name).read_text()) for name in ("train.json", "small.json")}
    settings = {"learning_rate": 0.1, "amp": "off", "patch_size": [16, 16, 16]}  # options of the command line
    write(checkpoint.parent / "run.json", {"configs": configs, "settings": settings, "epochs": 7})
    text = (Path(release.release(**arguments)) / "docs/README.md").read_text()
    assert "| learning rate | 0.1 | 0.002 |" in text and "| epochs | 7 | 50 |" in text
    assert "| autocast |  | bfloat16 |" in text


def test_nothing_but_the_bundle_is_staged(staged, tmp_path):
    files = release.list_files(str(staged))
    assert {file.split("/")[0] for file in files} == {"LICENSE", "configs", "docs", "label_app", "models", "tsfm"}
    assert not [f for f in files if f.startswith("tsfm_tools") or "phantoms" in f or "gate" in f]
    assert not [f for f in files if "__pycache__" in f or f.endswith(".pyc")]
    assert "tsfm/network/tsfm_net.py" in files and not (staged / "tsfm").is_symlink()
    for file in files:
        assert str(tmp_path).encode() not in (staged / file).read_bytes(), file
        assert str(REPOSITORY).encode() not in (staged / file).read_bytes(), file


def test_the_vendored_package_is_the_one_that_runs(staged, tmp_path):
    script = "import tsfm; print(tsfm.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(staged), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.stdout.strip() == str(staged / "tsfm" / "__init__.py"), done.stderr


def test_the_same_input_gives_the_same_bytes(source, checkpoint, tmp_path):
    paths = []
    for folder in ("one", "two"):
        shutil.copytree(source, tmp_path / folder / "toy")  # other times, another place
        paths.append(release.release(str(tmp_path / folder / "toy"), str(checkpoint), str(tmp_path / folder / "dist")))
    first, second = (Path(path).read_bytes() for path in paths)
    assert first == second


def test_the_zip_holds_one_folder_and_its_checksums_are_right(source, checkpoint, tmp_path):
    path = Path(release.release(str(source), str(checkpoint), str(tmp_path / "d"), base_url="https://host/x/"))
    assert path.name == "toy_v0.1.0.zip"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {name.split("/")[0] for name in archive.namelist()} == {"toy"}
        assert archive.namelist() == sorted(archive.namelist())
        assert all(entry.external_attr >> 16 == 0o100644 for entry in archive.infolist())
    listed = (path.parent / (path.name + ".sha256")).read_text()
    assert listed == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  toy_v0.1.0.zip\n"
    entry = json.loads((path.parent / "model_info.json").read_text())["toy_v0.1.0"]
    assert entry == {"checksum": hashlib.sha1(path.read_bytes()).hexdigest(), "source": "https://host/x/toy_v0.1.0.zip"}


def test_large_weights_are_listed_for_the_zoo_and_not_in_the_zip(source, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(release, "LARGE_FILE_BYTES", 1000)
    path = release.release(str(source), str(checkpoint), str(tmp_path / "d"), base_url="https://host")
    text = (tmp_path / "d/toy/large_files.yml").read_text()
    digest = hashlib.sha256((tmp_path / "d/toy/models/model.pt").read_bytes()).hexdigest()
    assert 'path: "models/model.pt"' in text and digest in text
    assert 'url: "https://host/toy/models/model.pt"' in text
    assert "toy/large_files.yml" not in zipfile.ZipFile(path).namelist()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": "0.2.0"}, "stale"),
        ({"version": "0.10.0", "changelog": {"0.10.0": "x"}}, "one digit"),
        ({"changelog": {"0.1.0": "x", "0.2.0": "newer"}}, "newer"),
        ({"changelog": {}}, "stale"),
    ],
)
def test_a_stale_changelog_is_refused_before_anything_is_written(source, checkpoint, tmp_path, change, message):
    write(source / "configs/metadata.json", {**METADATA, **change})
    with pytest.raises(ReleaseError, match=message):
        release.release(str(source), str(checkpoint), str(tmp_path / "dist"))
    assert not (tmp_path / "dist").exists()


def test_a_new_version_brings_its_own_changelog(source, checkpoint, tmp_path):
    arguments = {"version": "0.2.0", "changelog": "four classes"}
    path = release.release(str(source), str(checkpoint), str(tmp_path / "dist"), **arguments)
    assert path.endswith("toy_v0.2.0.zip")
    assert config(tmp_path / "dist/toy", "metadata.json")["changelog"] == {"0.2.0": "four classes", "0.1.0": "first"}


def test_the_changelog_that_is_given_is_the_one_that_is_written(source, checkpoint, tmp_path):
    release.release(str(source), str(checkpoint), str(tmp_path / "dist"), changelog="two classes")
    assert config(tmp_path / "dist/toy", "metadata.json")["changelog"] == {"0.1.0": "two classes"}


def test_an_earlier_release_is_replaced_and_nothing_else_is(source, checkpoint, tmp_path):
    photos = tmp_path / "dist/toy/photos"
    write(photos / "one.png", "of somebody")
    with pytest.raises(ReleaseError, match="no earlier release"):
        release.release(str(source), str(checkpoint), str(tmp_path / "dist"))
    assert (photos / "one.png").exists()
    for place in (source.parent, checkpoint.parent.parent):
        name = source.name if place == source.parent else checkpoint.parent.name
        with pytest.raises(ReleaseError, match="it holds"):
            release.release(str(source), str(checkpoint), str(place), name=name)
    assert (source / "store/case.b2nd").exists() and checkpoint.exists()
    for _ in range(2):
        release.release(str(source), str(checkpoint), str(tmp_path / "other"), zipped=False)
    assert os.listdir(tmp_path / "other") == ["toy"]
    trained = tmp_path / "other/toy/models/model_of_today.pt"  # as a training of MONAI Label leaves it
    trained.touch()
    with pytest.raises(ReleaseError, match=r"\['model_of_today.pt'\], which no release writes"):
        release.release(str(source), str(checkpoint), str(tmp_path / "other"), zipped=False)
    assert trained.exists()
    trained.unlink()
    result = tmp_path / "other/toy/predictions/case.nii.gz"  # where inference.json writes
    write(result, "a label map")
    with pytest.raises(ReleaseError, match=r"it holds \['predictions'\], which .*: move these away, or choose another"):
        release.release(str(source), str(checkpoint), str(tmp_path / "other"), zipped=False)
    assert result.exists()


def test_lists_among_the_configs_are_none_and_the_notes_of_a_servers_training_stay(source, checkpoint, tmp_path):
    write(source / "configs/splits.json", [{"train": ["a"], "val": ["b"]}])
    write(source / "configs/monailabel_train.json", {"train#dataset#data": [{"image": "/studies/SMITH.nii.gz"}]})
    release.release(str(source), str(checkpoint), str(tmp_path / "dist"), zipped=False)
    assert "monailabel_train.json" not in os.listdir(tmp_path / "dist/toy/configs")


def test_releases_that_are_made_at_once_are_all_listed(tmp_path):
    names = [f"toy_v0.0.{number}" for number in range(10)]
    with ThreadPoolExecutor(10) as threads:
        list(threads.map(lambda name: release.list_release(str(tmp_path), name, "0", name), names))
    assert list(json.loads((tmp_path / "model_info.json").read_text())) == names


def test_the_scores_of_an_evaluation_stand_in_metadata_and_readme(source, checkpoint, tmp_path):
    table = LabelTable(TARGETS, DATASETS)
    for kind in ("truth", "found"):
        (tmp_path / kind).mkdir()
        volume = np.zeros((8, 8, 8), np.uint8)
        volume[2:6, 2:6, 2:6], volume[3:5, 3:5, 3 : 5 if kind == "truth" else 4] = 1, 2
        nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / kind / "case.nii.gz")
    evaluate_folder(tmp_path / "found", tmp_path / "truth", table, tmp_path / "scores")
    metrics = str(tmp_path / "scores/summary.json")
    release.release(str(source), str(checkpoint), str(tmp_path / "dist"), metrics=metrics, zipped=False)
    assert config(tmp_path / "dist/toy", "metadata.json")["eval_metrics"] == {"kidney": 1.0, "kidney_tumor": 0.6667}
    assert "| 2 | kidney_tumor | kidney | mine | 0.667 |" in (tmp_path / "dist/toy/docs/README.md").read_text()
    write(tmp_path / "other.json", {"dice": 0.9})
    with pytest.raises(ValueError, match=r"no summary\.json"):
        release.release(str(source), str(checkpoint), str(tmp_path / "d"), metrics=str(tmp_path / "other.json"))


def test_the_readmes_commands_carry_the_name_and_version_of_the_release(source, checkpoint, tmp_path):
    page = source / "docs/README.md"
    page.write_text(page.read_text() + "\nunzip toy_v0.1.0.zip; serve --conf models toy; toys\n")
    arguments = {"name": "kidneys", "version": "0.2.0", "changelog": "new"}
    release.release(str(source), str(checkpoint), str(tmp_path / "dist"), **arguments)
    text = (tmp_path / "dist/kidneys/docs/README.md").read_text()
    assert "unzip kidneys_v0.2.0.zip; serve --conf models kidneys; toys" in text
    renamed = source.rename(tmp_path / "of last year")
    release.release(str(renamed), str(checkpoint), str(tmp_path / "again"), name="livers", zipped=False)
    assert (
        "unzip livers_v0.1.0.zip; serve --conf models livers; toys"
        in (tmp_path / "again/livers/docs/README.md").read_text()
    )


def test_the_zip_brings_the_pins_of_its_environments(brats_weights, tmp_path):
    source = str(REPOSITORY / "bundles/tsfm_finetune")
    staged = Path(release.release(source, brats_weights, str(tmp_path / "dist"), name="brats", zipped=False))
    again = Path(release.release(str(staged), brats_weights, str(tmp_path / "again"), zipped=False))
    for bundle in (staged, again):  # a release can be made from a release, without the repository
        lines = (bundle / "docs/requirements.txt").read_text().splitlines()
        assert "torch==2.13.0" in lines and not [line for line in lines if line.startswith("-e")]
        assert (bundle / "docs/requirements-label.txt").is_file()
    text = (staged / "docs/README.md").read_text()
    assert "brats_v0.1.0.zip" in text and "tsfm_finetune" not in text and "repository's" not in text


@pytest.mark.parametrize("name", ["lung_detection", "my-model", "deepedit_kidney"])
def test_names_that_monai_label_cannot_serve_are_refused(source, checkpoint, tmp_path, name):
    with pytest.raises(ReleaseError, match="name"):
        release.release(str(source), str(checkpoint), str(tmp_path / "dist"), name=name, zipped=False)


def test_weights_without_a_description_are_refused(source, tmp_path):
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "bare.pt")
    with pytest.raises(ReleaseError, match="no description"):
        release.release(str(source), str(tmp_path / "bare.pt"), str(tmp_path / "dist"), zipped=False)


def test_weights_that_do_not_fit_leave_nothing_behind(source, checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)["model"]
    dropped = next(key for key in state if key.endswith("weight"))
    torch.save({key: value for key, value in state.items() if key != dropped}, tmp_path / "part.pt")
    with pytest.raises(ReleaseError, match="does not fit network_def"):
        release.release(str(source), str(tmp_path / "part.pt"), str(tmp_path / "dist"), zipped=False)
    assert os.listdir(tmp_path / "dist") == []


# ---- served by MONAI Label ------------------------------------------------------------------------------------------


BRATS = {"whole_tumor": {}, "tumor_core": {"inside": "whole_tumor"}, "enhancing_tumor": {"inside": "tumor_core"}}
BRATS_IDS = {"1": "tumor_core", "2": "whole_tumor", "4": "enhancing_tumor"}


@pytest.fixture
def brats_weights(tmp_path) -> str:
    """Weights of a task whose raw ids are neither 1..N nor in the targets' order."""
    network = TSFM(**{**NETWORK, "in_channels": 2, "out_channels": 3})
    table = LabelTable(BRATS, [{"name": "brats", "labels": BRATS_IDS}])
    ct = {"CT": {"lower": -100.0, "upper": 300.0, "mean": 80.0, "sd": 60.0}}  # of the pretraining; this task is MR
    describe_network(network, table, Preparation((2.0, 2.0, 2.0), ct, 2, "MR"), (16, 16, 16), [{"modality": "MR"}])
    save_weights(network, tmp_path / "brats.pt")
    return str(tmp_path / "brats.pt")


def test_a_served_bundle_trains_on_label_maps_whatever_the_raw_ids_were(brats_weights, tmp_path):
    """MONAI Label hands over bare items with the values of channel_def: 1 whole tumor, 2 core, 3 enhancing."""
    bundle = release.release(
        str(REPOSITORY / "bundles/tsfm_finetune"), brats_weights, str(tmp_path / "dist"), zipped=False
    )
    label_map = np.zeros((20, 18, 16), np.uint8)
    label_map[4:16, 4:14, 4:12], label_map[7:13, 7:11, 6:10], label_map[9:11, 8:10, 7:9] = 1, 2, 3
    image = np.random.default_rng(0).normal(label_map[..., None] * 100.0, 10, (*label_map.shape, 2))
    for name, volume in (("image", image), ("label", label_map)):
        nib.save(nib.Nifti1Image(volume.astype(np.float32), np.diag([2.0, 2, 2, 1])), tmp_path / f"{name}.nii.gz")
    workflow = ConfigWorkflow(
        config_file=f"{bundle}/configs/train.json",
        workflow_type="train",
        logging_file=False,
        bundle_root=bundle,
        **{"train#dataset#data": [{key: str(tmp_path / f"{key}.nii.gz") for key in ("image", "label")}]},
        **{"validate#dataset#data": [], "train#trainer#max_epochs": 1, "iterations_per_epoch": 1, "batch_size": 1},
        **{"num_workers": 0, "device": "cpu"},
    )
    workflow.initialize()
    table, sample = workflow.parser.get_parsed_content("table"), workflow.parser.get_parsed_content("train#dataset")[0]
    found = {tuple(table.targets[code].tolist()) for code in np.unique(np.asarray(sample["label"]).astype(int))}
    assert found == {(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)}
    assert workflow.parser.get_parsed_content("train#dataset").data[0]["modality"] == "MR"  # not normalized as CT
    before = read_state(f"{bundle}/models/model.pt")
    workflow.run()
    after = read_state(f"{bundle}/models/model.pt")
    assert after[1]["targets"] == before[1]["targets"] and list(after[1]["targets"]) == list(BRATS)
    assert not all(torch.equal(after[0][key], before[0][key]) for key in before[0])


def test_the_gate_finds_a_bundle_that_would_read_label_maps_wrongly(checkpoint, brats_weights, tmp_path):
    check = "label maps back (MONAI Label)"
    staged = release.release(
        str(REPOSITORY / "bundles/tsfm_pretrain"), str(checkpoint), str(tmp_path / "fits"), zipped=False
    )
    assert _run(Path(staged), check)[0] == "pass"  # one data set, raw ids 1 and 2: the same as the map's
    staged = release.release(
        str(REPOSITORY / "bundles/tsfm_pretrain"), brats_weights, str(tmp_path / "wrong"), zipped=False
    )
    assert _run(Path(staged), check)[0] == "FAIL"
    staged = release.release(
        str(REPOSITORY / "bundles/tsfm_finetune"), brats_weights, str(tmp_path / "right"), zipped=False
    )
    assert _run(Path(staged), check)[0] == "pass"


# ---- the gate -------------------------------------------------------------------------------------------------------


@pytest.fixture
def warm_interpreter(monkeypatch):
    """The process in which the gate checks a staged bundle is one of warm.py."""
    monkeypatch.setattr(sys, "executable", warm().python)


@pytest.mark.usefixtures("warm_interpreter")
def test_the_gate_runs_the_vendored_package_and_checks_the_weights(staged):
    rows = {row.name: row for row in gate.gate(str(staged))}
    for name in ("weights fit network_def", "verify_net_in_out", "ckpt_export", "label map (channel_def)"):
        assert rows[name].result == "pass", rows[name].detail
    assert rows["metadata against the schema"].result == "pass", rows["metadata against the schema"].detail
    assert rows["self-contained and clean"].result == "pass", rows["self-contained and clean"].detail
    assert rows["preferred files"].result == "FAIL"  # the toy has no logging.conf
    assert rows["TensorRT export"].result == "not run"
    assert not [file for file in release.list_files(str(staged)) if "__pycache__" in file]


def change_metadata(bundle: Path, **change) -> None:
    write(bundle / "configs/metadata.json", {**config(bundle, "metadata.json"), **change})


def break_schema(bundle: Path) -> None:
    change_metadata(bundle, authors=3)


def break_changelog(bundle: Path) -> None:
    change_metadata(bundle, version="0.3.0")


def break_style(bundle: Path) -> None:
    (bundle / "configs/small.json").write_text('{"patch_size": [48, 64, 64]}')


def break_weights(bundle: Path) -> None:
    tensors, _ = read_state(bundle / "models/model.pt")
    tensors.popitem()
    torch.save(tensors, bundle / "part.pt")  # not onto the file that the tensors are mapped from
    (bundle / "part.pt").replace(bundle / "models/model.pt")


def break_map(bundle: Path) -> None:
    metadata = config(bundle, "metadata.json")
    metadata["network_data_format"]["outputs"]["pred"]["channel_def"]["2"] = "something_else"
    write(bundle / "configs/metadata.json", metadata)


def break_outputs(bundle: Path) -> None:
    metadata = config(bundle, "metadata.json")
    metadata["network_data_format"]["outputs"]["pred"]["num_channels"] = 5
    write(bundle / "configs/metadata.json", metadata)


def break_license(bundle: Path) -> None:
    (bundle / "LICENSE").unlink()


def break_cleanness(bundle: Path) -> None:
    write(bundle / "tsfm/__pycache__/x.pyc", "a cache")


def link_package(bundle: Path) -> None:
    (bundle / "tsfm").rename(bundle.parent / "package")
    (bundle / "tsfm").symlink_to(bundle.parent / "package")


def name_home(bundle: Path) -> None:
    with open(bundle / "models/model.pt", "ab") as file:
        file.write(f"{Path.home()}/data".encode())


def leave_results(bundle: Path) -> None:
    write(bundle / "evaluation/patient.nii.gz", "a label map")


@pytest.mark.parametrize(
    "damage, check",
    [
        (break_schema, "metadata against the schema"),
        (break_changelog, "version and changelog"),
        (break_style, "JSON style"),
        (break_weights, "weights fit network_def"),
        (break_map, "label map (channel_def)"),
        (break_outputs, "verify_net_in_out"),
        (break_license, "required files"),
        (break_cleanness, "self-contained and clean"),
        (leave_results, "self-contained and clean"),
        (link_package, "self-contained and clean"),
        (name_home, "self-contained and clean"),
    ],
)
def test_each_fault_is_caught_by_its_check(staged, damage, check):
    assert gate.Check(check, *_run(staged, check)).result == "pass"
    damage(staged)
    assert gate.Check(check, *_run(staged, check)).result == "FAIL"


def test_the_gate_sees_what_lies_in_folders_of_odd_names(staged, tmp_path):
    moved = tmp_path / "releases [old]" / staged.name
    shutil.copytree(staged, moved)
    assert _run(moved, "JSON style") == _run(staged, "JSON style") != ("pass", "0 files")
    assert _run(moved, "weights fit network_def")[0] == "pass"
    with pytest.raises(OptionError, match="has a #, which MONAI reads as ::"):
        gate.gate(str(tmp_path / "a#b"))


def _run(bundle: Path, check: str) -> tuple[str, str]:
    row = gate.run_check(str(bundle), check)
    return row.result, row.detail


@pytest.mark.parametrize("name", ["tsfm_pretrain", "tsfm_finetune"])
def test_the_projects_bundles_pass_the_gate(name):
    bundle = REPOSITORY / "bundles" / name
    if not (bundle / "configs/metadata.json").is_file():
        pytest.skip(f"{name} has no metadata.json")
    failed = [f"{row.name}: {row.detail}" for row in gate.gate(str(bundle)) if row.result == "FAIL"]
    assert not failed


@pytest.mark.usefixtures("warm_interpreter")
@pytest.mark.parametrize("name", ["tsfm_pretrain", "tsfm_finetune"])
def test_the_projects_bundles_staged_around_weights_pass_the_gate_whole(name, checkpoint, tmp_path):
    write(tmp_path / "licenses.txt", "mine: CC0")
    staged = release.release(
        str(REPOSITORY / "bundles" / name), str(checkpoint), str(tmp_path / "dist"), name="kidneys",
        data_license=str(tmp_path / "licenses.txt"), trained_on="nothing", zipped=False,
    )  # fmt: skip
    rows = gate.gate(staged)
    assert not [f"{row.name}: {row.detail}" for row in rows if row.result not in ("pass", "not run")]
    assert {row.name for row in rows if row.result == "not run"} == set(gate.NOT_RUN)


def test_the_shipped_schema_is_the_one_that_metadata_names():
    with open(SCHEMA, encoding="utf-8") as file:
        assert json.load(file)["$schema"].startswith("https://json-schema.org")
    for bundle in ("tsfm_pretrain", "tsfm_finetune"):
        named = config(REPOSITORY / "bundles" / bundle, "metadata.json")["schema"]
        assert os.path.basename(SCHEMA) == os.path.basename(named)


def test_save_weights_makes_a_checkpoint_that_can_be_released(source, checkpoint, tmp_path):
    """The way a run ends: models/model.pt written by the handlers is all that a release needs."""
    network = TSFM(**NETWORK)
    tensors, description = read_state(checkpoint)
    network.load_state_dict(tensors, strict=False)
    network.description = description
    save_weights(network, tmp_path / "model.pt")
    staged = release.release(str(source), str(tmp_path / "model.pt"), str(tmp_path / "dist"), zipped=False)
    assert check_weights(staged)["parameters"] == sum(p.numel() for p in network.parameters())
