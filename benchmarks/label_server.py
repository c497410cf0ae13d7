"""A MONAI Label server under mixed requests: does its memory stay flat, how long does a request take, does anything fail?

Serves staged releases (`python -m tsfm release`) with the app that the first of them brings, on phantom images that differ in
size, and sends, in random order: inference with every option, an uploaded image, requests that have to be refused, submitted
labels, next samples, and now and then a training. Resident memory is the server process's own; what its background
processes (training, scoring) take is not in it.

    python benchmarks/label_server.py dist/tsfm_pretrain dist/tsfm_finetune --minutes 10 --python .venv-label/bin/python

With --once one release is served and one inference made: what the network costs in memory, loaded for real.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import requests

SIZES = ((48, 48, 24), (64, 80, 40), (96, 96, 60), (128, 128, 80))
AFFINE = np.diag([-1.5, -1.5, 3, 1])
BAD = (
    *({"threshold": "abc"}, {"overlap": 1.5}, {"targets": "no such target"}),
    *({"foreground": [[1, 2, 3]]}, {"device": "cuda:9"}),
)


class Server:
    """The server process, its images, and what it holds."""

    def __init__(self, python: str, releases: list[Path], folder: Path) -> None:
        self.studies, self.images = folder / "studies", {f"case{n}": size for n, size in enumerate(SIZES * 2)}
        bundles = [folder / "served" / release.name for release in releases]
        for release, bundle in zip(releases, bundles, strict=True):
            shutil.copytree(release, bundle)
            shorten(bundle / "configs/train.json")
        self.studies.mkdir()
        rng = np.random.default_rng(0)
        for name, size in self.images.items():
            array = np.where(rng.random(size) < 0.5, -100, 100) + rng.normal(0, 30, size)
            array[size[0] // 4 : size[0] // 2] += 150
            nib.save(nib.Nifti1Image(array.astype(np.int16), AFFINE), self.studies / f"{name}.nii.gz")
        shim = folder / "shim/torchvision"  # of which MONAI Label imports two names, and no CPU wheel fits this torch
        shim.mkdir(parents=True)
        (shim / "__init__.py").write_text("__version__ = '0'\n")
        (shim / "utils.py").write_text("make_grid = save_image = None\n")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [python, "-m", "monailabel.main", "start_server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--app", str(bundles[0] / "label_app"), "--studies", str(self.studies)]
        command += ["--conf", "models", ",".join(map(str, bundles)), "--conf", "scoring", "false"]
        own = {"PYTHONPATH": str(shim.parent), "MONAI_LABEL_SESSION_PATH": str(folder / "sessions")}
        with open(folder / "server.log", "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **own})
        while True:
            try:
                self.models = list(requests.get(f"{self.url}/info/", timeout=60).json()["models"])
                return
            except requests.ConnectionError:
                assert self.process.poll() is None, (folder / "server.log").read_text()[-3000:]
                time.sleep(1)

    def memory_mib(self, kind: str = "VmRSS") -> float:
        """Resident memory now, or its peak (VmHWM)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith(kind)).split()[1]) / 1024

    def infer(self, model: str, image: str, upload: bool = False, **options: Any) -> int:
        """HTTP status, as of the other requests."""
        data = {"params": json.dumps({"result_extension": ".nii.gz", "result_dtype": "uint8", **options})}
        url = f"{self.url}/infer/{model}?output=image"
        if not upload:
            return requests.post(f"{url}&image={image}", data, timeout=600).status_code
        with open(self.studies / f"{image}.nii.gz", "rb") as file:
            return requests.post(url, data, files={"file": file}, timeout=600).status_code

    def submit(self, image: str) -> int:
        label = np.zeros(self.images[image], np.uint8)
        label[label.shape[0] // 4 : label.shape[0] // 2] = 1
        file = ("label.nii.gz", gzip.compress(nib.Nifti1Image(label, AFFINE).to_bytes()))
        return requests.put(f"{self.url}/datastore/label?image={image}", files={"label": file}, timeout=60).status_code

    def train(self, model: str) -> int:
        body = {"max_epochs": 1, "val_split": 0.5, "multi_gpu": False}
        return requests.post(f"{self.url}/train/{model}?enqueue=true", json=body, timeout=60).status_code


def shorten(path: Path) -> None:
    """Trainings of a few steps."""
    config = json.loads(path.read_text()) | {"iterations_per_epoch": 5, "val_iterations": 1, "num_workers": 0}
    path.write_text(json.dumps(config))


def one_request(server: Server, rng: random.Random) -> tuple[str, bool]:
    """Make a request; its kind, and whether it was answered as it should be."""
    model, image = rng.choice(server.models), rng.choice(list(server.images))
    kind = rng.choices(["infer", "upload", "refused", "submit", "sample", "train"], [12, 3, 4, 2, 2, 0.3])[0]
    if kind == "infer":
        options = {"overlap": rng.choice([0.25, 0.5]), "threshold": rng.choice([0.3, 0.5])}
        return kind, server.infer(model, image, mirroring=rng.random() < 0.2, **options) == 200
    if kind == "upload":
        return kind, server.infer(model, image, upload=True) == 200
    if kind == "refused":
        return kind, server.infer(model, image, **rng.choice(BAD)) == 400
    if kind == "submit":
        return kind, server.submit(image) == 200
    if kind == "sample":
        return kind, requests.post(f"{server.url}/activelearning/random", json={}, timeout=60).status_code == 200
    return kind, server.train(model) in (200, 400)  # 400: no label was submitted yet


def campaign(server: Server, minutes: float) -> None:
    """Requests for so long; a line per tenth of the time, then a table."""
    rng, seconds, failed, begin = random.Random(0), defaultdict(list), 0, time.time()
    marks = [begin + 6 * minutes * tenth for tenth in range(1, 11)]
    print(f"{server.memory_mib():.0f} MiB after the start")
    for mark in marks:
        largest = 0.0
        while time.time() < mark:
            start = time.time()
            kind, right = one_request(server, rng)
            seconds[kind].append(time.time() - start)
            failed += not right
            largest = max(largest, server.memory_mib())
        done = sum(map(len, seconds.values()))
        print(
            f"{(time.time() - begin) / 60:5.1f} min: {done:5d} requests, {failed} wrong, at most {largest:.0f} MiB",
            flush=True,
        )
    for kind, taken in seconds.items():
        print(f"{kind:8} {len(taken):5d}  median {statistics.median(taken):.2f} s  longest {max(taken):.1f} s")
    tasks = requests.get(f"{server.url}/train/?all=true", timeout=60).json()
    states = [task["status"] for task in tasks]
    print("trainings:", {state: states.count(state) for state in set(states)})
    for task in tasks:
        if task["status"] == "ERROR":
            print("\n".join(task["details"][-15:]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("releases", nargs="+", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--python", default=".venv-label/bin/python")
    parser.add_argument("--once", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        server = Server(arguments.python, arguments.releases, Path(scratch))
        try:
            if arguments.once:
                print(f"{server.memory_mib():.0f} MiB after the start")
                for _ in range(2):
                    start = time.time()
                    status = server.infer(server.models[0], "case0")
                    held, peak = server.memory_mib(), server.memory_mib("VmHWM")
                    print(f"HTTP {status}, {time.time() - start:.0f} s: {held:.0f} MiB, peak {peak:.0f} MiB")
            else:
                campaign(server, arguments.minutes)
        finally:
            server.process.terminate()
            server.process.wait(60)
