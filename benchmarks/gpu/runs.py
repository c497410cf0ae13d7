"""Whole runs through monai.bundle on the device: train, resume, DDP, FSDP, float16, inference; and the paper's own setting.

python benchmarks/gpu/runs.py small     a network of 2.6 million parameters on phantoms, the runs side by side
python benchmarks/gpu/runs.py paper     train.json as it stands, on phantoms at the paper's spacing: 1.6 B parameters
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from record import DEVICE, TINY, attempt, record
from sides import ROOT, bundle_run
from tsfm_tools.phantoms import layouts as phantoms

LOGS = Path("/tmp/tsfm_gpu_logs")
PORT = 29511
SMALL = {"patch_size": "[16,32,32]", "spacing_mm": "[10.0,8.0,8.0]", "num_workers": 0} if TINY else {}
EPOCHS, ITERATIONS = (2, 3) if TINY else (4, 40)


def bundle(name: str, configs: list[str], launcher: Sequence[str] = (), **options) -> float:
    """Run the bundle in its own process, its output in LOGS/NAME.log; returns seconds.

    Raises:
        RuntimeError: it ended with an error, whose last line is given.
    """
    command = bundle_run(ROOT / "bundles/tsfm_pretrain", configs, launcher, **options)
    LOGS.mkdir(exist_ok=True)
    log, start = LOGS / f"{name}.log", time.perf_counter()
    with open(log, "a", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise RuntimeError(f"{name}: {lines[-1] if lines else done.returncode}")
    return time.perf_counter() - start


def training(name: str, overlays: list[str], launcher: Sequence[str] = (), **options) -> float:
    """`bundle` with train.json, tiny where that is asked for."""
    return bundle(name, ["train.json", *overlays], launcher, **{**options, **SMALL})


def curve(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's curve.csv."""
    with open(folder / "curve.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def losses(folder: Path) -> str:
    """The loss of each epoch."""
    return ", ".join(f"{float(row['loss']):.4f}" for row in curve(folder))


def data(scratch: Path) -> dict[str, object]:
    """The small runs' phantoms."""
    return {"dataset_dir": scratch / "data", "datasets": "['msd_liver','msd_pancreas']", "store_dir": scratch / "store"}


def train(scratch: Path, name: str, overlays: list[str], launcher: Sequence[str] = (), **options) -> None:
    """One training run and its row."""
    options = {
        **data(scratch), "output_dir": scratch / name, "ckpt_dir": "none", "epochs": EPOCHS, "iterations_per_epoch": ITERATIONS,
        "val_iterations": 4, "num_workers": 2, **options,
    }  # fmt: skip
    took = training(name, ["small.json", *overlays], launcher, **options)
    row = {"run": name, "loss_per_epoch": losses(scratch / name), "s": round(took)}
    record("runs", **row, s_per_epoch=curve(scratch / name)[-1]["train_s"])


def torchrun(port: int) -> list[str]:
    """The launcher of one process, as torchrun is."""
    return ["-m", "torch.distributed.run", "--nproc_per_node=1", "--master_port", str(port)]


def resumed(scratch: Path) -> None:
    """Half of the epochs in one go, the rest after a resume, with four workers in place of two: the same weights?"""
    train(scratch, "resumed", [], epochs=EPOCHS // 2, **{"lr_scheduler#epochs": EPOCHS})
    train(scratch, "resumed", [], num_workers=4)


def inference(scratch: Path, device: str, amp: bool) -> None:
    """Segment the phantoms with the weights of the run "plain"."""
    took = bundle(
        f"inference_{device}", ["inference.json"], dataset_dir=scratch / "data/Task03_Liver/imagesTr", progress=False, amp=amp,
        checkpoint=scratch / "plain/model.pt", output_dir=scratch / f"inference_{device}",
        device=f"$torch.device('{device}')",
    )  # fmt: skip
    record("runs", run=f"inference on {device}, {'bfloat16' if amp else 'float32'}", s=round(took))


def compare(scratch: Path) -> None:
    """Resumed against uninterrupted weights; label maps of both devices."""
    states = [torch.load(scratch / name / "last.pt", weights_only=True)["model"] for name in ("plain", "resumed")]
    largest = max(float((a.double() - states[1][key].double()).abs().max()) for key, a in states[0].items())
    record("runs", run=f"resumed and uninterrupted weights differ by at most {largest:.1e}")
    pairs = []
    found, expected = (scratch / f"inference_{device}" for device in (DEVICE.type, "cpu"))
    for path in sorted(found.rglob("*.nii.gz")):
        maps = [np.asarray(nib.load(p).dataobj) for p in (path, expected / path.relative_to(found))]
        pairs.append((float((maps[0] != maps[1]).mean()), len(np.unique(maps[1])) - 1))
    share, targets = max(p[0] for p in pairs), max(p[1] for p in pairs)
    record(
        "runs",
        run=f"label maps of GPU and CPU: {len(pairs)} cases, up to {targets} targets, {share:.1e} of the voxels differ",
    )


def small() -> None:
    """All small runs; those that do not need each other run side by side."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        scratch = Path(folder)
        phantoms.write_pool(str(scratch / "data"), cases_per_dataset=4, datasets=["msd_liver", "msd_pancreas"])
        options = {"run_id": "prepare", "output_dir": scratch / "x", "num_workers": 4}
        took = training("prepare", ["small.json"], **data(scratch), **options)
        record("runs", run="prepare 8 phantoms", s=round(took))
        jobs = {
            "plain": lambda: train(scratch, "plain", []),
            "resumed": lambda: resumed(scratch),
            "ddp": lambda: train(scratch, "ddp", ["multi_gpu_train.json"], torchrun(PORT)),
            "fsdp": lambda: train(scratch, "fsdp", ["fsdp_train.json"], torchrun(PORT + 1)),
            "float16": lambda: train(scratch, "float16", [], amp_dtype="float16"),
        }
        with ThreadPoolExecutor(2 if TINY else len(jobs)) as pool:
            for name, job in jobs.items():
                pool.submit(attempt, "runs", name, job)
        with ThreadPoolExecutor(2) as pool:
            for device in {DEVICE.type, "cpu"}:
                pool.submit(attempt, "runs", f"inference {device}", inference, scratch, device, False)
        attempt("runs", "comparison", compare, scratch)


def paper() -> None:
    """One epoch of the paper's network and batch, loader, validation and both checkpoints included."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        scratch = Path(folder)
        size = (24, 32, 32) if TINY else phantoms.REFERENCE_SIZE
        phantoms.write_pool(str(scratch / "data"), cases_per_dataset=3, datasets=["msd_liver"], size=size)
        took = training(
            "paper", ["small.json"] if TINY else [], dataset_dir=scratch / "data", datasets="['msd_liver']", ckpt_dir="none",
            store_dir=scratch / "store", output_dir=scratch / "output", epochs=1, val_iterations=4,
            iterations_per_epoch=2 if TINY else 16, num_workers=min(12, os.cpu_count()),
        )  # fmt: skip
        row = curve(scratch / "output")[-1]
        size = sum(path.stat().st_size for path in (scratch / "output").glob("*.pt")) / 1e9
        record("paper", iterations=2 if TINY else 16, loss=row["loss"], train_s=row["train_s"], data_wait_s=row["data_wait_s"],
               whole_run_s=round(took), checkpoints_gb=round(size, 2))  # fmt: skip


if __name__ == "__main__":
    {"small": small, "paper": paper}[sys.argv[1]]()
