"""Whole pretraining runs through monai.bundle, on a tiny phantom pool."""

import csv
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, bundle_command, environment, free_port, pretrain_options, run_bundle, warm
from tsfm.network.tsfm_net import TSFM
from tsfm.training.checkpoint import read_state

pytestmark = pytest.mark.convolutions


def weights(folder):
    """The last; of a run that writes in shares the best, which after one epoch are the same."""
    last = Path(folder) / "last.pt"
    if last.exists():
        return torch.load(last, weights_only=True)["model"]
    return torch.load(Path(folder) / "model.pt", weights_only=True)


def losses(folder):
    return [float(row["loss"]) for row in csv.DictReader((Path(folder) / "curve.csv").open())]


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert not different


def test_a_run_leaves_weights_curve_record_and_tensorboard(pretrained):
    rows = list(csv.DictReader((pretrained / "curve.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(float(row["loss"]) == float(row["loss"]) for row in rows)
    assert rows[0]["val_mean_dice"] and any(key.startswith("dice_") for key in rows[0])
    record = json.loads((pretrained / "run.json").read_text())
    assert record["settings"]["seed"] == 0 and record["versions"]["monai"] and record["pool"]["cases"] > 5
    assert any(path.endswith("train.json") for path in record["configs"])
    assert list((pretrained / "tensorboard").iterdir())
    assert (pretrained / "published/model.pt").read_bytes() == (pretrained / "model.pt").read_bytes()


def test_the_weights_alone_rebuild_the_network(pretrained):
    tensors, description = read_state(pretrained / "model.pt")
    assert description["preparation"]["spacing_mm"] == [10.0, 8.0, 8.0]
    assert "msd_liver" in description["trained_on"] and set(description["modalities"]) == {"CT", "MR"}
    network = TSFM(**description["network"])
    network.load_state_dict(tensors, strict=False)
    assert {key for key in network.state_dict() if key != "_extra_state"} == set(tensors)


def test_a_run_killed_at_any_moment_ends_with_the_same_weights(phantom_pool, tiny, tmp_path):
    options = {"epochs": 4, "iterations_per_epoch": 6}
    run_bundle("tsfm_pretrain", ["train.json", tiny], **pretrain_options(phantom_pool, tmp_path / "whole", **options))
    broken = pretrain_options(phantom_pool, tmp_path / "killed", **options)
    command = bundle_command("tsfm_pretrain", ["train.json", tiny], **broken)
    last = tmp_path / "killed/last.pt"
    for _ in range(2):
        before = last.stat().st_mtime_ns if last.exists() else 0
        process = subprocess.Popen(
            command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            if last.exists() and last.stat().st_mtime_ns != before:
                break
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert torch.load(last, weights_only=True)["epoch"] < 4, "the run ended before it could be killed"
    output = run_bundle("tsfm_pretrain", ["train.json", tiny], **broken)
    assert "resuming after epoch" in output
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    losses = [
        [row["loss"] for row in csv.DictReader((tmp_path / name / "curve.csv").open())] for name in ("whole", "killed")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert not list((tmp_path / "killed").glob(".*.partial"))


def test_a_finished_run_is_left_as_it_is_and_other_settings_are_refused(phantom_pool, tiny, tmp_path):
    options = pretrain_options(phantom_pool, tmp_path, epochs=1)
    run_bundle("tsfm_pretrain", ["train.json", tiny], **options)
    before = weights(tmp_path)
    assert "the run is complete" in run_bundle("tsfm_pretrain", ["train.json", tiny], **options)
    assert_same_weights(before, weights(tmp_path))
    output = run_bundle("tsfm_pretrain", ["train.json", tiny], expect=1, **{**options, "seed": 1})
    assert "seed: was 0, is 1" in output
    assert_same_weights(before, weights(tmp_path))


def test_workers_change_nothing(phantom_pool, tiny, tmp_path, pretrained):
    run_bundle("tsfm_pretrain", ["train.json", tiny], **pretrain_options(phantom_pool, tmp_path, num_workers=2))
    assert_same_weights(weights(pretrained), weights(tmp_path))


def test_one_flipped_bit_in_a_prepared_case_stops_a_run_before_its_first_step(phantom_pool, tiny, tmp_path, pretrained):
    shutil.copytree(phantom_pool.parent / "store", tmp_path / "store")
    image = sorted((tmp_path / "store").rglob("image.b2nd"))[0]
    content = bytearray(image.read_bytes())
    content[len(content) // 2] ^= 1
    image.write_bytes(content)
    options = pretrain_options(phantom_pool, tmp_path / "run", store_dir=tmp_path / "store")
    output = run_bundle("tsfm_pretrain", ["train.json", tiny], expect=1, **options)
    assert f"{image.parent} is damaged (image.b2nd): delete this folder" in output
    assert not (tmp_path / "run/last.pt").exists()
    shutil.rmtree(image.parent)
    run_bundle("tsfm_pretrain", ["train.json", tiny], **options)
    assert_same_weights(weights(pretrained), weights(tmp_path / "run"))


def torchrun(overlays, agents=1, **options):
    """Two gloo processes on the CPU, under one agent of torchrun or, as on two machines, under two."""
    port = free_port()
    running, outputs = [], []
    for agent in range(agents):
        nodes = ["--nnodes=2", f"--node_rank={agent}", "--master_addr=127.0.0.1", f"--master_port={port}"]
        place = ["--standalone"] if agents == 1 else nodes
        launcher = ("-m", "torch.distributed.run", *place, f"--nproc_per_node={2 // agents}", "-m")
        command = bundle_command(
            "tsfm_pretrain", ["train.json", *overlays], launcher=launcher, python=warm().python, **options
        )
        outputs.append(tempfile.NamedTemporaryFile("w+", encoding="utf-8"))  # noqa: SIM115
        running.append(subprocess.Popen(command, env=environment(), stdout=outputs[-1], stderr=subprocess.STDOUT))
    codes = [process.wait(600) for process in running]
    outputs = [Path(log.name).read_text(encoding="utf-8") for log in outputs]
    assert not any(codes), "\n".join(outputs)[-5000:]
    return "\n".join(outputs)


@pytest.mark.parametrize("overlay", ["multi_gpu_train.json", "fsdp_train.json"])
def test_two_processes_take_the_steps_of_one_with_the_doubled_batch(phantom_pool, tiny, tmp_path, overlay):
    """In float32, up to the rounding of sums in another order.

    Two Nesterov steps move a weight by at most 0.6: learning rate 0.01 times gradients of norm 12, 2.97 times the first
    and 1.99 times the second. Forward and backward pass round some hundred times in a row.
    """
    options = {"epochs": 1, "iterations_per_epoch": 2, "amp": False}
    rounding = 100 * torch.finfo(torch.float32).eps * 0.6
    run_bundle(
        "tsfm_pretrain",
        ["train.json", tiny],
        **pretrain_options(phantom_pool, tmp_path / "one", batch_size=4, **options),
    )
    two = pretrain_options(phantom_pool, tmp_path / "two", batch_size=2, **options)
    is_sharded = overlay == "fsdp_train.json"
    torchrun([tiny, overlay], agents=2 if is_sharded else 1, **two)
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert first.keys() == second.keys()
    for key, value in first.items():
        if key != "_extra_state":
            torch.testing.assert_close(
                value, second[key], rtol=1e-4, atol=rounding, msg=lambda text, key=key: f"{key}: {text}"
            )
    assert read_state(tmp_path / "two/model.pt")[1]["network"]["features"] == [8, 16, 32]
    if is_sharded:  # one process goes on from the two machines' shares, to the loss of the one that was always alone
        assert (tmp_path / "two/last/epoch_1").is_dir() and not (tmp_path / "two/last.pt").exists()
        alone = {**options, "epochs": 2, "batch_size": 4}
        outputs = [
            run_bundle(
                "tsfm_pretrain", ["train.json", tiny], **pretrain_options(phantom_pool, tmp_path / name, **alone)
            )
            for name in ("one", "two")
        ]
        assert "resuming after epoch 1 of 2" in outputs[1] and "two/last/epoch_1" in outputs[1]
        assert losses(tmp_path / "two")[1] == pytest.approx(losses(tmp_path / "one")[1], rel=1e-3)
    else:
        assert "resuming after epoch 1" in torchrun([tiny, overlay], **{**two, "epochs": 2})
    assert torch.load(tmp_path / "two/last.pt", weights_only=True)["epoch"] == 2


def test_missing_data_sets_are_listed_before_anything_starts(tmp_path, tiny):
    output = run_bundle(
        "tsfm_pretrain",
        ["train.json", tiny],
        expect=1,
        dataset_dir=tmp_path,
        store_dir=tmp_path / "s",
        output_dir=tmp_path / "o",
    )
    assert "10 of 10 data sets" in output and "Task03_Liver" in output and "--allow_missing" in output


def test_an_output_folder_that_cannot_be_written_is_named(phantom_pool, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    options = pretrain_options(phantom_pool, tmp_path / "file/run")
    output = run_bundle("tsfm_pretrain", ["train.json", tiny], expect=1, **options)
    assert "cannot be written" in output and "--output_dir" in output


def test_mlflow_tracking_works_when_installed(phantom_pool, tiny, tmp_path):
    pytest.importorskip("mlflow")
    options = pretrain_options(
        phantom_pool, tmp_path / "run", tracking="mlflow", epochs=1, tracking_uri=f"sqlite:///{tmp_path}/mlruns.db"
    )
    run_bundle("tsfm_pretrain", ["train.json", tiny], **options)
    with sqlite3.connect(tmp_path / "mlruns.db") as database:
        logged = {name for (name,) in database.execute("select distinct key from metrics")}
    assert {"loss", "val_mean_dice"} <= {name.split(":")[0] for name in logged} or "val_mean_dice" in logged


def test_the_package_runs_from_a_folder_that_is_not_the_repository(pretrained, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tsfm", "describe", str(pretrained / "model.pt")],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert json.loads(done.stdout)["network"]["features"] == [8, 16, 32]
    assert str(ROOT) not in done.stdout
