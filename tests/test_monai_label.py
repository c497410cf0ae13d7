"""A real MONAI Label server on both released bundles: info, inference, active learning, training, inference again.

MONAI Label needs an environment of its own (`make test-label` builds it, or TSFM_LABEL_PYTHON names its interpreter);
without one these tests are skipped. About a minute per bundle. The fine-tuning bundle is served by the app with the
uncertainty strategy, the other one by MONAI Label's own.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from tsfm.cases.cases import Preparation
from tsfm.labels import LabelTable
from tsfm.network.tsfm_net import TSFM
from tsfm.training.checkpoint import describe_network, save_weights
from tsfm_tools.release import release

REPOSITORY = Path(__file__).resolve().parents[1]
LABEL_PYTHON = os.environ.get("TSFM_LABEL_PYTHON", str(REPOSITORY / ".venv-label/bin/python"))
TARGETS = {"organ": {}, "tumor": {"inside": "organ"}}
VALUES = {"organ": 1, "tumor": 2}
TINY = {"features": [4, 8], "depths_down": [1, 1], "depths_up": [1], "strides": [[2, 2, 2]]}
TINY |= {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 16}
WAIT_S = 600

pytestmark = pytest.mark.skipif(not Path(LABEL_PYTHON).exists(), reason="no MONAI Label environment")


class Server:
    """A MONAI Label server in a process of its own, and the few requests that these tests make."""

    def __init__(self, bundle: Path, root: Path, own_app: bool) -> None:
        self.name, self.app, self.log = bundle.name, root / "app", root / "server.log"
        prefix = Path(LABEL_PYTHON).parents[1]
        samples = prefix / "monailabel/sample-apps/monaibundle"
        shutil.copytree(samples, self.app, ignore=shutil.ignore_patterns("model", "logs", "__pycache__"))
        shutil.copytree(bundle, self.app / "model" / self.name)
        config = json.loads((self.app / "model" / self.name / "configs/train.json").read_text())
        config |= {"iterations_per_epoch": 20, "val_iterations": 2, "learning_rate": 1e-4}  # short; small steps
        (self.app / "model" / self.name / "configs/train.json").write_text(json.dumps(config))
        if own_app:
            (self.app / "main.py").rename(self.app / "bundle_app.py")
            shutil.copy(REPOSITORY / "custom/tsfm_tools/label_app.py", self.app / "main.py")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"MONAI_LABEL_SESSION_PATH": str(root / "sessions"), "PYTHONPATH": str(_shim(root))}
        command = [LABEL_PYTHON, "-m", "monailabel.main", "start_server", "--app", str(self.app)]
        command += ["--studies", str(root / "studies"), "--host", "127.0.0.1", "--port", str(self.port)]
        for key, value in {"models": self.name, "zoo_source": "ngc", "sam2": "false"}.items():
            command += ["--conf", key, value]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def request(self, path: str, body: bytes | None = None, kind: str = "application/json") -> bytes:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: HTTP {error.code}\n{self.log.read_text()[-3000:]}") from None

    def info(self) -> dict:
        deadline = time.time() + WAIT_S
        while time.time() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                return json.loads(self.request("/info/"))
            except urllib.error.URLError:
                time.sleep(1)
        raise AssertionError("the server did not answer\n" + self.log.read_text()[-3000:])

    def infer(self, image: str, target: Path, **options) -> nib.Nifti1Image:
        parameters = json.dumps({"result_extension": ".nii.gz", "result_dtype": "uint8", **options})
        body = b'--x\r\nContent-Disposition: form-data; name="params"\r\n\r\n' + parameters.encode() + b"\r\n--x--\r\n"
        path = f"/infer/{self.name}?image={image}&output=image"
        target.write_bytes(self.request(path, body, "multipart/form-data; boundary=x"))
        return nib.load(target)

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


def _shim(root: Path) -> Path:
    """The two names that MONAI Label imports from torchvision, of which no CPU wheel fits this torch."""
    package = root / "shim/torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '0'\n")
    (package / "utils.py").write_text(
        "def make_grid(*args, **kwargs): raise NotImplementedError\nsave_image = make_grid\n"
    )
    return root / "shim"


def _studies(folder: Path) -> None:
    """Four images whose array axes point left, back and up, the last one darker and noisy; two of them labeled."""
    grid = np.stack(np.meshgrid(*map(np.arange, (40, 44, 28)), indexing="ij"), -1).astype(float)
    label = np.zeros((40, 44, 28), np.uint8)
    label[(((grid - (18, 24, 13)) / (12, 13, 8)) ** 2).sum(-1) <= 1] = 1
    label[(((grid - (22, 24, 13)) / (4, 4, 3)) ** 2).sum(-1) <= 1] = 2
    image = np.array([-200, 80, 250])[label].astype(np.int16)
    affine = np.array([[-1.2, 0, 0, 40], [0, -1.2, 0, 55], [0, 0, 2.5, -300], [0, 0, 0, 1.0]])
    (folder / "labels/final").mkdir(parents=True)
    noisy = (image - 150 + np.random.default_rng(0).normal(0, 200, image.shape)).astype(np.int16)
    for i in range(4):
        nib.save(nib.Nifti1Image(noisy if i == 3 else image, affine), folder / f"case{i}.nii.gz")
        if i < 2:
            nib.save(nib.Nifti1Image(label, affine), folder / f"labels/final/case{i}.nii.gz")


@pytest.fixture(scope="module", params=["tsfm_pretrain", "tsfm_finetune"])
def server(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    ct = {"CT": {"lower": -300.0, "upper": 400.0, "mean": 50.0, "sd": 150.0}}
    raw = {"1": "organ", "2": "tumor"} if request.param == "tsfm_pretrain" else {"1": "tumor", "4": "organ"}
    table = LabelTable(
        TARGETS, [{"name": "mine", "labels": raw}]
    )  # the server's labels are 1 organ, 2 tumor all the same
    network = TSFM(1, 2, **TINY, img_size=[16, 16, 16])
    for head in network.heads:
        torch.nn.init.zeros_(head.conv.bias)  # so that about half of the voxels are segmented
    describe_network(network, table, Preparation((2.5, 1.2, 1.2), ct), [16, 16, 16], [{"modality": "CT"}])
    save_weights(network, root / "weights.pt")
    bundle = release.release(
        str(REPOSITORY / "bundles" / request.param), str(root / "weights.pt"), str(root / "dist"), zipped=False
    )
    _studies(root / "studies")
    running = Server(Path(bundle), root, own_app=request.param == "tsfm_finetune")
    try:
        yield running, root
    finally:
        running.stop()


def test_a_label_and_train_round_with_a_real_server(server):
    server, root = server
    info = server.info()["models"][server.name]
    assert info["type"] == "segmentation" and info["dimension"] == 3
    assert info["labels"] == VALUES
    assert info["config"]["model_filename"] == ["model.pt"]
    assert info["config"]["targets"] == ["all", *VALUES]

    reference = nib.load(root / "studies/case2.nii.gz")
    for options in ({"normalize_as": "CT"}, {"mirroring": True, "targets": "organ"}, {"threshold": 0.9999}):
        result = server.infer("case2", root / "result.nii.gz", **options)
        assert result.shape == reference.shape
        np.testing.assert_allclose(result.affine, reference.affine, atol=1e-3)
        found = set(np.unique(np.asarray(result.dataobj)).tolist())
        assert found <= ({0, 1} if "targets" in options else {0, *VALUES.values()})
        assert (1 in found) == ("threshold" not in options)  # the options arrived

    assert json.loads(server.request("/activelearning/first", b"{}"))["id"] == "case2"
    if server.name == "tsfm_finetune":
        _the_most_uncertain_image_comes_first(server, root)
    for _ in range(2):  # the second training goes on from what the first one published
        weights = server.app / "model" / server.name / "models/model.pt"
        before = torch.load(weights, weights_only=True)
        server.train(val_split=0.5)
        after = torch.load(weights, weights_only=True)
        assert {key: value.shape for key, value in after.items() if key != "_extra_state"} == {
            key: value.shape for key, value in before.items() if key != "_extra_state"
        }
        change = (after["stem.weight"] - before["stem.weight"]).abs().mean() / before["stem.weight"].abs().mean()
        assert (
            0 < change < 0.3
        )  # other weights, but near by: a fresh start would be as far away as the weights are large
        kept = torch.load(weights.with_name("model_previous.pt"), weights_only=True)
        assert torch.equal(kept["stem.weight"], before["stem.weight"])
    first = np.asarray(server.infer("case2", root / "again.nii.gz").dataobj)
    assert not np.array_equal(first, np.asarray(result.dataobj))


def _the_most_uncertain_image_comes_first(server: Server, root: Path) -> None:
    """The server's scores are those that the bundle computes outside of it, and the strategy takes the higher one."""
    name = f"uncertainty_{server.name}"
    assert name in json.loads(server.request("/info/"))["strategies"]
    server.wait("/scoring/")  # begins by itself with the server
    server.request(f"/scoring/{name}", b"{}")
    server.wait("/scoring/")
    parser = ConfigParser()
    parser.read_config(str(server.app / "model" / server.name / "configs/inference.json"))
    parser["bundle_root"], parser["device"] = str(server.app / "model" / server.name), "cpu"
    prepare, inferer, network, loader = (
        parser.get_parsed_content(key) for key in ("preprocessing", "inferer", "network", "handlers#0")
    )
    loader()
    expected = {
        case: inferer.uncertainty(
            prepare({"image": str(root / f"studies/{case}.nii.gz")})["image"][None], network.eval()
        )
        for case in ("case2", "case3")
    }
    known = json.loads((root / "studies/datastore_v2.json").read_text())["objects"]
    found = {case: known[case]["image"]["info"][name] for case in expected}
    assert found == pytest.approx(expected, rel=0.02)
    chosen = json.loads(server.request(f"/activelearning/{name}", b"{}"))["id"]
    assert chosen == max(expected, key=expected.get)
