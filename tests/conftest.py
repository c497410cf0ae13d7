"""Shared by the whole-run tests: a tiny phantom pool on disk, a tiny network, and the bundles run as a user runs them."""

import atexit
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from warm import Warm

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

TINY = {
    "epochs": 2,
    "iterations_per_epoch": 3,
    "val_iterations": 2,
    "patch_size": [16, 32, 32],
    "spacing_mm": [10.0, 8.0, 8.0],
    "learning_rate": 0.01,
    "num_workers": 0,
    "checkpointing": False,
    "device": "cpu",
    "network_def#features": [8, 16, 32],
    "network_def#depths_down": [1, 1, 1],
    "network_def#depths_up": [1, 1],
    "network_def#strides": [[2, 2, 2], [2, 2, 2]],
    "network_def#hidden_size": 24,
    "network_def#num_layers": 1,
    "network_def#num_heads": 2,
    "network_def#mlp_dim": 48,
}


@pytest.fixture(autouse=True)
def seeded():
    """Every test begins with the same random numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def rates_of(optimizer, schedule, epochs):
    """The learning rate of each epoch."""
    found = []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@functools.cache
def warm():
    """Processes that begin with torch and MONAI imported, for all tests of this session."""
    server = Warm()
    atexit.register(server.close)
    return server


def usual_signals() -> None:
    """In a process to be: signals as in a terminal; whoever runs the tests in the background may ignore some."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def bundle_command(bundle, configs, run_id=None, launcher=("-m",), python=sys.executable, **overrides):
    """The command line of a bundle run, as the README gives it."""
    folder = ROOT / "bundles" / bundle
    files = [str(folder / "configs" / name) if "/" not in str(name) else str(name) for name in configs]
    command = [python, *launcher, "monai.bundle", "run", *([run_id] if run_id else [])]
    command += ["--config_file", str(files), "--bundle_root", str(folder)]
    command += [
        "--meta_file",
        str(folder / "configs/metadata.json"),
        "--logging_file",
        str(folder / "configs/logging.conf"),
    ]
    for key, value in overrides.items():
        command += [f"--{key}", str(value)]
    return command


def touch(folder, *names):
    """Empty files, in folders that are made."""
    for path in (Path(folder, name) for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHON_EXEC": warm().python}


def run_bundle(bundle, configs, *, expect=0, python=None, **overrides):
    """Run a bundle in its own process; returns its output. A run that should fail is named with ``expect=1``."""
    done = subprocess.run(
        bundle_command(bundle, configs, python=python or warm().python, **overrides),
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == expect, output[-6000:]
    return output


def made_once(tmp_path_factory, name, make):
    """Folder `name` that ``make(folder)`` fills, once for all workers of pytest-xdist; tests only read it."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name
    with FileLock(f"{folder}.lock"):
        if not folder.with_suffix(".done").exists():
            folder.mkdir()
            make(folder)
            folder.with_suffix(".done").touch()
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Path of the overlay that makes every run tiny."""
    folder = made_once(tmp_path_factory, "overlay", lambda folder: (folder / "tiny.json").write_text(json.dumps(TINY)))
    return str(folder / "tiny.json")


@pytest.fixture(scope="session")
def phantom_pool(tmp_path_factory):
    """Folder with the demo's data sets, three cases each, in the layouts of the paper's pool."""
    from tsfm_tools.phantoms import layouts as phantoms

    def write(folder):
        phantoms.write_pool(str(folder), cases_per_dataset=3, size=(32, 48, 48), seed=0)

    return made_once(tmp_path_factory, "phantoms", write)


@pytest.fixture(scope="session")
def pretrained(phantom_pool, tiny, tmp_path_factory):
    """Folder of one finished tiny pretraining run on the phantom pool: of the command as a user starts it."""

    def train(folder):
        options = pretrain_options(phantom_pool, folder)
        run_bundle("tsfm_pretrain", ["train.json", tiny], python=sys.executable, **options)

    return made_once(tmp_path_factory, "pretrained", train)


def pretrain_options(pool_folder, folder, **more):
    return {
        "dataset_dir": pool_folder,
        "allow_missing": True,
        "store_dir": Path(pool_folder).parent / "store",
        "output_dir": folder,
        "ckpt_dir": Path(folder) / "published",
        **more,
    }


@pytest.fixture(scope="session")
def shared_data():
    """The development data; users have none, so tests that need it are skipped there."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"{SHARED / 'data'} is absent: real images are not part of the project")
    return SHARED / "data"


def write_dicom(folder, voxels, spacing, series="1.2.826.0.1.3680043.2.1125.1"):
    """Write integer voxels (X, Y, Z), axes along +L, +P, +S, as one CT series, a file per slice; first voxel at (1, 2, 0)."""
    sitk = pytest.importorskip("SimpleITK")
    folder.mkdir(parents=True, exist_ok=True)
    for z in range(voxels.shape[2]):
        image = sitk.GetImageFromArray(voxels[:, :, z].T)
        image.SetSpacing(spacing[:2])
        for tag, value in {
            "0008|0060": "CT",
            "0020|000e": series,
            "0020|000d": "1.2.3",
            "0020|0032": f"1\\2\\{spacing[2] * z}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(z),
            "0018|0050": str(spacing[2]),
        }.items():
            image.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{series[-1]}_{z}.dcm"))
        writer.Execute(image)


def logits_of(inferer, image, network, **asked):
    """A `SlabInferer`'s averaged logits (1, T, S, P, L) of a prepared image, float32: its slabs put together."""
    whole, done = [], 0
    for slab in inferer.slabs(inferer._image(image), network, **asked):
        whole.append(slab.logits[:, done - slab.start :].float().clone())
        done = slab.stop
    return torch.cat(whole, 1)[None]
