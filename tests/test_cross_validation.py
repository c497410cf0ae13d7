"""A whole cross-validation on phantoms: interrupted, shared, gone on with, scored, released."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, TINY, environment
from tsfm.evaluation.postprocessing_plan import determine
from tsfm.files import write_first
from tsfm.inference.claims import Claims
from tsfm.inference.postprocessing import apply
from tsfm.options import OptionError
from tsfm.schema import FileError
from tsfm.training.checkpoint import read_description, read_state
from tsfm.training.weight_files import CheckpointError
from tsfm_tools.release import cross_validation
from tsfm_tools.release.cross_validation import CrossValidation, cross_validate
from tsfm_tools.release.gpus import visible_devices
from tsfm_tools.release.rules import ReleaseError

pytestmark = pytest.mark.convolutions

BUNDLE = str(ROOT / "bundles/tsfm_finetune")


def dice(label_map, truth, value):
    found, there = np.asarray(label_map) == value, np.asarray(nib.load(truth).dataobj) == value
    return 2 * (found & there).sum() / (found.sum() + there.sum()) if there.any() else None


def test_folds_are_trained_scored_and_released_and_nothing_is_done_twice(phantom_pool, tiny, tmp_path):
    data, out = str(phantom_pool / "Task03_Liver"), tmp_path / "out"
    options = {"folds": [0, 1], "overlays": [tiny], "bundle_dir": BUNDLE, "name": "two_folds"}
    options["store_dir"] = str(tmp_path / "shared store")
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "tsfm", "cross_validate", "--dataset_dir", data, "--output_dir", str(out), *words]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (out / "fold_0/last.pt").exists():
        assert process.poll() is None, process.stdout.read().decode()[-3000:]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "fold_0/done.json").exists()

    other = Claims(out)  # another process is at fold 1
    assert other.take("fold_1")
    assert "folds [1] are with other processes" in cross_validate(data, str(out), **options)
    first = {path: path.stat().st_mtime_ns for path in (out / "fold_0").iterdir()}
    assert out / "fold_0/done.json" in first and not (out / "fold_1").exists()
    other.free("fold_1")

    one = CrossValidation(data, str(out), BUNDLE, [0, 1], [tiny], {}, options["store_dir"])
    one.work(1)
    second = one.held_out[1][0]
    label = nib.load(second["label"])
    made = np.asarray(label.dataobj).copy()
    made[:3, :3, :3] = 1  # as if the second fold had found all, and a piece of liver too many
    nib.save(nib.Nifti1Image(made.astype(np.uint8), label.affine), out / f"held_out/{second['case']}.nii.gz")
    table = cross_validate(data, str(out), **options)
    assert {path: path.stat().st_mtime_ns for path in (out / "fold_0").iterdir()} == first
    assert Path(options["store_dir"]).is_dir() and not (out / "store").exists()
    items = [item for fold in (0, 1) for item in json.loads((out / f"fold_{fold}/held_out.json").read_text())]
    assert sorted(path.name for path in (out / "held_out").glob("*.nii.gz")) == sorted(
        f"{one['case']}.nii.gz" for one in items
    )
    rows = list(csv.DictReader((out / "scores/cases.csv").open()))
    steps = json.loads((out / "postprocessing.json").read_text())["steps"]
    maps = [np.asarray(nib.load(out / f"held_out/{one['case']}.nii.gz").dataobj) for one in items]
    for number, target in enumerate(("liver", "cancer"), start=1):
        cells = next(line for line in table.splitlines() if line.startswith(f"| {target} |")).split(" | ")
        for shown, processed in ((cells[3], maps), (cells[4], [apply(one, {"steps": steps}) for one in maps])):
            scores = [dice(one, item["label"], number) for one, item in zip(processed, items, strict=True)]
            scores = [score for score in scores if score is not None]
            assert shown == f"{np.mean(scores):.4f}".lstrip("0")
            if processed is maps:
                assert [float(row["dice"]) for row in rows if row["target"] == target and row["dice"]] == pytest.approx(
                    scores, abs=1e-5
                )

    assert [step["target"] for step in steps][:1] == ["all foreground"] and "kept of all foreground" in table
    released = out / "release/two_folds"
    assert cross_validation.SCORED in (released / "docs/README.md").read_text(encoding="utf-8")
    inference = json.loads((released / "configs/inference.json").read_text())
    pool = CrossValidation(data, str(out), BUNDLE, [0, 1], [tiny], {}).pool
    plan = determine([{**one, "prediction": out / f"held_out/{one['case']}.nii.gz"} for one in items], pool.table)
    assert steps == plan["steps"]
    assert (
        inference["postprocessing_plan"] == {key: plan[key] for key in ("targets", "steps")}
        and inference["displayable_configs"]["mirroring"] is True
    )
    assert read_description(released / "models/model.pt")["network"]["count"] == 2
    tensors, single = read_state(released / "models/model.pt")[0], read_state(out / "fold_1/model.pt")[0]
    assert tensors["members.1.stem.weight"].equal(single["stem.weight"])
    assert cross_validate(data, str(out), **options) == table

    with pytest.raises(CheckpointError, match="cross-validation with other settings"):
        cross_validate(data, str(out), **options, epochs=3)


def test_folds_trained_by_an_overlay_that_was_changed_since_are_no_longer_this_cross_validation(phantom_pool, tmp_path):
    own, record = tmp_path / "own.json", tmp_path / "out/cross_validation.json"
    arguments = (str(phantom_pool / "Task03_Liver"), str(tmp_path / "out"), BUNDLE, None, [str(own)])
    own.write_text(json.dumps({"_desc_": "first", "learning_rate": 0.01, "seed": 1}))
    CrossValidation(*arguments, {"seed": 2})
    own.write_text(json.dumps({"_desc_": "second", "learning_rate": 0.01, "seed": 3}))
    CrossValidation(*arguments, {"seed": 2})
    own.write_text(json.dumps({"learning_rate": 0.02}))
    with pytest.raises(CheckpointError, match=r"other settings \(learning_rate: was 0\.01, is 0\.02\)"):
        CrossValidation(*arguments, {"seed": 2})
    record.write_text(
        json.dumps({key: value for key, value in json.loads(record.read_text()).items() if key != "overlays"})
    )
    CrossValidation(*arguments, {"seed": 2})  # one of an earlier version goes on


def test_equally_named_cases_of_two_data_sets_are_told_apart(tmp_path):
    """Folds in which they changed places are other folds."""
    one = object.__new__(CrossValidation)
    one.folder, one.dataset_dir, one.configs, one.settings = tmp_path, "data", [], {}
    first, second = ({"dataset": name, "case": "case_1"} for name in ("ct", "mr"))
    one.held_out = {0: [first], 1: [second]}
    one._remember()
    one._remember()
    one.held_out = {0: [second], 1: [first]}
    with pytest.raises(CheckpointError, match="cases and folds"):
        one._remember()


def test_what_cannot_be_used_is_refused_before_any_training(phantom_pool, tmp_path, monkeypatch):
    data = str(phantom_pool / "Task03_Liver")
    with pytest.raises(FileError, match=r"smal\.json does not exist"):
        cross_validate(data, str(tmp_path / "out"), BUNDLE, overlays=["smal.json"])
    with pytest.raises(OptionError, match="epoch"):
        cross_validate(data, str(tmp_path / "out"), BUNDLE, epoch=3)
    with pytest.raises(OptionError, match="--fold, --ckpt_dir: a cross-validation sets"):
        cross_validate(data, str(tmp_path / "out"), BUNDLE, fold=1, ckpt_dir="x")
    for odd in ("dataset_dir", "output_dir", "store_dir"):
        with pytest.raises(OptionError, match=rf"{odd}: .*a#b' has a #, which MONAI reads as ::"):
            cross_validate(
                **{"dataset_dir": data, "output_dir": "out", "bundle_dir": BUNDLE, odd: str(tmp_path / "a#b")}
            )
    with pytest.raises(OptionError, match=r"checkpoint: 'a#b\.pt' has a #"):
        cross_validation.run_bundle(BUNDLE, ["inference.json"], checkpoint=["a.pt", "a#b.pt"])
    with pytest.raises(OptionError, match="--folds all: expected a number"):
        cross_validate(data, str(tmp_path / "out"), BUNDLE, folds="all")
    with pytest.raises(ReleaseError, match=r"--data_license .*absent\.txt cannot be read"):
        cross_validate(data, str(tmp_path / "out"), BUNDLE, data_license=str(tmp_path / "absent.txt"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    with pytest.raises(OptionError, match=r"sees 2 GPUs \(CUDA_VISIBLE_DEVICES: 4,7\)"):
        cross_validate(data, str(tmp_path / "out"), BUNDLE, gpus=[2])
    assert not (tmp_path / "out").exists()


def test_the_release_gets_a_name_that_it_may_have_before_any_training(phantom_pool, tmp_path, monkeypatch):
    monkeypatch.setattr(CrossValidation, "work", lambda self, fold: pytest.fail("a training began"))
    data = str(phantom_pool / "Task03_Liver")
    with pytest.raises(ReleaseError, match="'my-model': use letters"):
        cross_validate(data, str(tmp_path / "out"), BUNDLE, name="my-model")
    with pytest.raises(ReleaseError, match="use liver_deepedit"):
        cross_validate(data, str(tmp_path / "clicks"), BUNDLE, overlays=["clicks.json"], name="liver")
    clicks = CrossValidation(data, str(tmp_path / "clicks"), BUNDLE, None, ["clicks.json"], {})
    assert clicks.release_name(None) == "tsfm_task03_liver_deepedit"
    plain = CrossValidation(data, str(tmp_path / "plain"), BUNDLE, None, [], {})
    assert plain.release_name(None) == "tsfm_task03_liver"


def test_gpus_are_numbers_among_those_that_the_process_sees(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,MIG-a,7")
    assert visible_devices(2) == {0: "4", 1: "MIG-a"}
    assert visible_devices([2]) == {2: "7"}


@pytest.mark.parametrize("fold", [0, 2])
def test_a_number_means_that_fold_alone(phantom_pool, tmp_path, monkeypatch, fold):
    monkeypatch.setattr(CrossValidation, "work", lambda self, fold: None)
    said = cross_validate(str(phantom_pool / "Task03_Liver"), str(tmp_path), BUNDLE, folds=fold)
    assert said.startswith(f"folds [{fold}] are with")


def test_label_maps_of_other_weights_and_other_releases_are_made_anew(phantom_pool, tmp_path, monkeypatch):
    calls = []

    def run(bundle, configs, **options):
        if "checkpoint" not in options:
            return
        for item in json.loads(Path(options["dataset_dir"]).read_text()):
            path = tmp_path / f"held_out/{item['case']}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            if not path.exists():
                calls.append(item["case"])
                path.touch()

    monkeypatch.setattr(cross_validation, "run_bundle", run)
    monkeypatch.setattr(CrossValidation, "_plan", lambda self, fold: {})
    monkeypatch.setattr(CrossValidation, "_table", lambda self, pairs, plan, released: f"table of {released}")
    for name, value in {
        "evaluate_folder": None,
        "match_predictions": [],
        "determine": {"targets": [], "steps": []},
    }.items():
        monkeypatch.setattr(cross_validation, name, lambda *_, value=value: value)
    made = []

    def fake(bundle, weights, folder, *, name, trained_on, **more):
        Path(folder, name).mkdir(parents=True, exist_ok=True)
        made.append(name)
        return f"{name}, {trained_on}"

    monkeypatch.setattr(cross_validation, "release", fake)
    one = CrossValidation(str(phantom_pool / "Task03_Liver"), str(tmp_path), BUNDLE, [0, 1], [], {})
    for fold in (0, 1):
        one._fold(fold).mkdir()
        (one._fold(fold) / "model.pt").write_text("first")
        one.work(fold)
    release = cross_validation.release
    monkeypatch.setattr(cross_validation, "release", None)
    with pytest.raises(TypeError):
        one.finish("a", "b", None)
    monkeypatch.setattr(cross_validation, "release", release)
    assert not list(tmp_path.glob(".table.claim")), "a release that failed is no longer claimed"
    assert one.finish("a", "b", None) == one.finish("a", "b", None) == "table of a, b"
    assert one.finish("c", "b", None) == "table of c, b" and one.finish("c", "d", None) == "table of c, d"
    assert made == ["a", "c", "c"]
    (tmp_path / "release/c").rmdir()
    assert one.finish("c", "d", None) == "table of c, d" and made == ["a", "c", "c", "c"], "made again where it is gone"
    one._maps(1)[0].unlink()
    assert not one.is_done(1), "nor is a fold done whose label maps are gone"
    one.work(1)
    assert one.is_done(1) and calls.pop() == one.held_out[1][0]["case"]

    done = len(calls)
    one.work(1)
    assert len(calls) == done
    (one._fold(1) / "model.pt").write_text("second")
    assert not one.is_done(1)
    one.work(1)
    assert calls[done:] == [item["case"] for item in one.held_out[1]] and not (tmp_path / "table.md").exists()
    assert one.is_done(1) and one.finish("c", "d", None) == "table of c, d"


def test_of_two_plans_the_first_is_kept_and_nothing_else(tmp_path):
    for content in ("first", "second"):
        write_first(tmp_path / "plan.json", lambda path, content=content: Path(path).write_text(content))
    assert (tmp_path / "plan.json").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_all_folds_take_one_plan_unless_numbers_are_given(phantom_pool, tmp_path):
    data, plain = str(phantom_pool / "Task03_Liver"), {"device": "cpu", "num_workers": 0, "step_seconds": 0.1}
    one = CrossValidation(data, str(tmp_path / "planned"), BUNDLE, None, ["small.json"], plain)
    assert one.folds == [0, 1, 2], "three cases: no more folds hold one out"
    path = one._plan(1)["plan"]
    written = os.stat(path).st_mtime_ns
    assert one._plan(2)["plan"] == path and os.stat(path).st_mtime_ns == written
    given = {**plain, "patch_size": TINY["patch_size"]}
    assert CrossValidation(data, str(tmp_path / "given"), BUNDLE, None, [], given)._plan(0) == {}
