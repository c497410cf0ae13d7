"""A whole cross-validation on phantoms: interrupted, shared, gone on with, scored, released."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, TINY, environment
from tsfm.evaluation.postprocessing_plan import determine
from tsfm.inference.claims import Claims
from tsfm.inference.postprocessing import apply
from tsfm.options import OptionError
from tsfm.schema import FileError
from tsfm.training.checkpoint import read_description, read_state
from tsfm.training.weight_files import CheckpointError
from tsfm_tools.release.cross_validation import CrossValidation, cross_validate

pytestmark = pytest.mark.convolutions

BUNDLE = str(ROOT / "bundles/tsfm_finetune")


def dice(label_map, truth, value):
    found, there = np.asarray(label_map) == value, np.asarray(nib.load(truth).dataobj) == value
    return 2 * (found & there).sum() / (found.sum() + there.sum()) if there.any() else None


def test_folds_are_trained_scored_and_released_and_nothing_is_done_twice(phantom_pool, tiny, tmp_path):
    data, out = str(phantom_pool / "Task03_Liver"), tmp_path / "out"
    options = {"folds": [0, 1], "overlays": [tiny], "bundle_dir": BUNDLE, "name": "two_folds"}
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

    second = CrossValidation(data, str(out), BUNDLE, [0, 1], [tiny], {}).held_out[1][0]
    label = nib.load(second["label"])
    made = np.asarray(label.dataobj).copy()
    made[:3, :3, :3] = 1  # as if the second fold had found all, and a piece of liver too many
    nib.save(nib.Nifti1Image(made.astype(np.uint8), label.affine), out / f"held_out/{second['case']}.nii.gz")
    table = cross_validate(data, str(out), **options)
    assert {path: path.stat().st_mtime_ns for path in (out / "fold_0").iterdir()} == first
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
    inference = json.loads((released / "configs/inference.json").read_text())
    pool = CrossValidation(data, str(out), BUNDLE, [0, 1], [tiny], {}).pool
    plan = determine(
        [out / f"held_out/{one['case']}.nii.gz" for one in items], [one["label"] for one in items], pool.table
    )
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


def test_what_cannot_be_used_is_refused_before_any_training(phantom_pool, tmp_path):
    data = str(phantom_pool / "Task03_Liver")
    with pytest.raises(FileError, match=r"smal\.json does not exist"):
        cross_validate(data, str(tmp_path / "out"), BUNDLE, overlays=["smal.json"])
    with pytest.raises(OptionError, match="epoch"):
        cross_validate(data, str(tmp_path / "out"), BUNDLE, epoch=3)
    assert not (tmp_path / "out").exists()


def test_all_folds_take_one_plan_unless_numbers_are_given(phantom_pool, tmp_path):
    data, plain = str(phantom_pool / "Task03_Liver"), {"device": "cpu", "num_workers": 0, "step_seconds": 0.1}
    one = CrossValidation(data, str(tmp_path / "planned"), BUNDLE, None, [], plain)
    assert one.folds == [0, 1, 2], "three cases: no more folds hold one out"
    path = one._plan(1)["plan"]
    written = os.stat(path).st_mtime_ns
    assert one._plan(2)["plan"] == path and os.stat(path).st_mtime_ns == written
    given = {**plain, "patch_size": TINY["patch_size"]}
    assert CrossValidation(data, str(tmp_path / "given"), BUNDLE, None, [], given)._plan(0) == {}
