"""A MONAI Label server in a process of its own, images for it, and releases of tiny networks to serve: for tests.

MONAI Label needs an environment of its own: `make test-label` builds it, or TSFM_LABEL_PYTHON names its interpreter.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from conftest import free_port, write_dicom
from tsfm.cases.cases import Preparation
from tsfm.labels import LabelTable
from tsfm.network.tsfm_net import TSFM
from tsfm.training.checkpoint import describe_network, save_weights
from tsfm_tools.release import release

REPOSITORY = Path(__file__).resolve().parents[1]
LABEL_PYTHON = os.environ.get("TSFM_LABEL_PYTHON", str(REPOSITORY / ".venv-label/bin/python"))
TINY = {"features": [4, 8], "depths_down": [1, 1], "depths_up": [1], "strides": [[2, 2, 2]]}
TINY |= {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 16}
CT = {"CT": {"lower": -300.0, "upper": 400.0, "mean": 50.0, "sd": 150.0}}
WAIT_S = 600


class Server:
    """A MONAI Label server in a process of its own, and the few requests that these tests make."""

    def __init__(self, bundle: Path, root: Path, own_app: bool, studies: str | None = None, beside: str = "") -> None:
        self.name, self.log = bundle.name, root / "server.log"
        if own_app:
            self.bundle = root / "served" / self.name
            self.app, options = self.bundle / "label_app", {"models": f"{self.bundle},{beside}"} if beside else {}
        else:
            self.app, options = root / "app", {"models": self.name, "zoo_source": "ngc", "sam2": "false"}
            self.bundle = self.app / "model" / self.name
            samples = Path(LABEL_PYTHON).parents[1] / "monailabel/sample-apps/monaibundle"
            shutil.copytree(samples, self.app, ignore=shutil.ignore_patterns("model", "logs", "__pycache__"))
        shutil.copytree(bundle, self.bundle, ignore=shutil.ignore_patterns("logs", "output", "store"))
        config = json.loads((self.bundle / "configs/train.json").read_text())
        config |= {"iterations_per_epoch": 20, "val_iterations": 2, "learning_rate": 1e-4}  # short; small steps
        (self.bundle / "configs/train.json").write_text(json.dumps(config))
        self.port = free_port()
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"MONAI_LABEL_SESSION_PATH": str(root / "sessions"), "PYTHONPATH": str(shim(root))}
        environment["MONAI_LABEL_DICOMWEB_CACHE_PATH"] = str(root / "cache")
        command = [LABEL_PYTHON, "-m", "monailabel.main", "start_server", "--app", str(self.app)]
        command += ["--studies", studies or str(root / "studies"), "--host", "127.0.0.1", "--port", str(self.port)]
        for key, value in options.items():
            command += ["--conf", key, value]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def answer(self, path: str, body: bytes | None = None, kind="application/json", method=None) -> tuple[int, bytes]:
        """HTTP status and content."""
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, body, {"Content-Type": kind}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def request(self, path: str, body: bytes | None = None, kind="application/json", method=None) -> bytes:
        status, content = self.answer(path, body, kind, method)
        assert status == 200, f"{path}: HTTP {status} {content[-500:]!r}\n{self.log.read_text()[-3000:]}"
        return content

    def info(self) -> dict:
        deadline = time.time() + WAIT_S
        while time.time() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                return json.loads(self.request("/info/"))
            except urllib.error.URLError:
                time.sleep(1)
        raise AssertionError("the server did not answer\n" + self.log.read_text()[-3000:])

    def try_infer(self, image: str, model: str | None = None, **options) -> tuple[int, bytes]:
        parameters = json.dumps({"result_extension": ".nii.gz", "result_dtype": "uint8", **options})
        body, kind = form({"params": (None, parameters.encode())})
        return self.answer(f"/infer/{model or self.name}?image={image}&output=image", body, kind)

    def infer(self, image: str, target: Path, **options) -> nib.Nifti1Image:
        status, content = self.try_infer(image, **options)
        assert status == 200, f"HTTP {status} {content[-500:]!r}\n{self.log.read_text()[-3000:]}"
        target.write_bytes(content)
        return nib.load(target)

    def submit(self, image: str, label: Path, **about) -> None:
        """A label as 3D Slicer submits it."""
        body, kind = form({"params": (None, json.dumps(about).encode()), "label": (label.name, label.read_bytes())})
        self.request(f"/datastore/label?image={image}&tag=final", body, kind, "PUT")

    def train(self, **options) -> None:
        self.request(f"/train/{self.name}", json.dumps({"max_epochs": 1, "multi_gpu": False, **options}).encode())
        self.wait("/train/")

    def wait(self, path: str) -> None:
        """Wait for the background task behind `path` to be done."""
        deadline = time.time() + WAIT_S
        while time.time() < deadline:
            state = json.loads(self.request(path))
            if state["status"] not in ("SUBMITTED", "RUNNING"):
                break
            time.sleep(1)
        assert state["status"] == "DONE", "\n".join(state["details"][-40:])

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def form(fields: dict[str, tuple[str | None, bytes]]) -> tuple[bytes, str]:
    """Body and type of a form: name -> (file name or None, content)."""
    parts = []
    for name, (file, content) in fields.items():
        named = f'; filename="{file}"' if file else ""
        parts.append(f'--x\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + content)
    return b"\r\n".join([*parts, b"--x--\r\n"]), "multipart/form-data; boundary=x"


def shim(root: Path) -> Path:
    """The two names that MONAI Label imports from torchvision, of which no CPU wheel fits this torch."""
    package = root / "shim/torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '0'\n")
    (package / "utils.py").write_text(
        "def make_grid(*args, **kwargs): raise NotImplementedError\nsave_image = make_grid\n"
    )
    return root / "shim"


def write_studies(folder: Path, labels: Path) -> None:
    """Four images whose array axes point left, back and up, the last one darker and noisy, and label maps of two of them;
    beside them a damaged file, and the first image as a DICOM series."""
    grid = np.stack(np.meshgrid(*map(np.arange, (40, 44, 28)), indexing="ij"), -1).astype(float)
    label = np.zeros((40, 44, 28), np.uint8)
    label[(((grid - (18, 24, 13)) / (12, 13, 8)) ** 2).sum(-1) <= 1] = 1
    label[(((grid - (22, 24, 13)) / (4, 4, 3)) ** 2).sum(-1) <= 1] = 2
    image = np.array([-200, 80, 250])[label].astype(np.int16)
    affine = np.array([[-1.2, 0, 0, 40], [0, -1.2, 0, 55], [0, 0, 2.5, -300], [0, 0, 0, 1.0]])
    folder.mkdir(parents=True)
    labels.mkdir(parents=True, exist_ok=True)
    noisy = (image - 150 + np.random.default_rng(0).normal(0, 200, image.shape)).astype(np.int16)
    for i in range(4):
        nib.save(nib.Nifti1Image(noisy if i == 3 else image, affine), folder / f"case{i}.nii.gz")
        if i < 2:
            nib.save(nib.Nifti1Image(label, affine), labels / f"case{i}.nii.gz")
    (folder / "damaged.nii.gz").write_bytes((folder / "case0.nii.gz").read_bytes()[:2000])
    write_dicom(folder / "series", image, (1.2, 1.2, 2.5))


def staged(bundle: str, table: LabelTable, root: Path, clicks: bool = False) -> Path:
    """A release of a tiny network's weights."""
    network = TSFM(3 if clicks else 1, len(table.names), **TINY, img_size=[16, 16, 16])
    network.description |= {"click_sigma": 2.0} if clicks else {}
    for head in network.heads:
        torch.nn.init.zeros_(head.conv.bias)  # so that about half of the voxels are segmented
    describe_network(network, table, Preparation((2.5, 1.2, 1.2), CT), [16, 16, 16], [{"modality": "CT"}])
    save_weights(network, root / "weights.pt")
    source = str(REPOSITORY / "bundles" / bundle)
    return Path(release.release(source, str(root / "weights.pt"), str(root / "dist"), zipped=False))
