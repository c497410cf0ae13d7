"""A real MONAI Label server on both released bundles: info, inference, active learning, training, inference again.

MONAI Label needs an environment of its own (`make test-label` builds it, or TSFM_LABEL_PYTHON names its interpreter);
without one these tests are skipped. About two minutes per bundle. The fine-tuning bundle, of 30 targets, is served by the app
that a release brings, the other one by MONAI Label's own.
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
from conftest import write_dicom
from monai.bundle import ConfigParser
from tsfm.cases.cases import Preparation
from tsfm.labels import LabelTable
from tsfm.network.tsfm_net import TSFM
from tsfm.training.checkpoint import describe_network, save_weights
from tsfm_tools.release import release

REPOSITORY = Path(__file__).resolve().parents[1]
LABEL_PYTHON = os.environ.get("TSFM_LABEL_PYTHON", str(REPOSITORY / ".venv-label/bin/python"))
TARGETS = {"organ": {}, "tumor": {"inside": "organ"}}
MANY = {**TARGETS, **{f"structure_{number}": {} for number in range(3, 31)}}
TINY = {"features": [4, 8], "depths_down": [1, 1], "depths_up": [1], "strides": [[2, 2, 2]]}
TINY |= {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 16}
WAIT_S = 600

pytestmark = pytest.mark.skipif(not Path(LABEL_PYTHON).exists(), reason="no MONAI Label environment")


class Server:
    """A MONAI Label server in a process of its own, and the few requests that these tests make."""

    def __init__(self, bundle: Path, root: Path, own_app: bool, studies: str | None = None) -> None:
        self.name, self.log = bundle.name, root / "server.log"
        if own_app:
            self.bundle, options = root / "served" / self.name, {}
            self.app = self.bundle / "label_app"
        else:
            self.app, options = root / "app", {"models": self.name, "zoo_source": "ngc", "sam2": "false"}
            self.bundle = self.app / "model" / self.name
            samples = Path(LABEL_PYTHON).parents[1] / "monailabel/sample-apps/monaibundle"
            shutil.copytree(samples, self.app, ignore=shutil.ignore_patterns("model", "logs", "__pycache__"))
        shutil.copytree(bundle, self.bundle, ignore=shutil.ignore_patterns("logs", "output", "store"))
        config = json.loads((self.bundle / "configs/train.json").read_text())
        config |= {"iterations_per_epoch": 20, "val_iterations": 2, "learning_rate": 1e-4}  # short; small steps
        (self.bundle / "configs/train.json").write_text(json.dumps(config))
        self.port = _free_port()
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"MONAI_LABEL_SESSION_PATH": str(root / "sessions"), "PYTHONPATH": str(_shim(root))}
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

    def try_infer(self, image: str, **options) -> tuple[int, bytes]:
        parameters = json.dumps({"result_extension": ".nii.gz", "result_dtype": "uint8", **options})
        body, kind = _form({"params": (None, parameters.encode())})
        return self.answer(f"/infer/{self.name}?image={image}&output=image", body, kind)

    def infer(self, image: str, target: Path, **options) -> nib.Nifti1Image:
        status, content = self.try_infer(image, **options)
        assert status == 200, f"HTTP {status} {content[-500:]!r}\n{self.log.read_text()[-3000:]}"
        target.write_bytes(content)
        return nib.load(target)

    def submit(self, image: str, label: Path, **about) -> None:
        """A label as 3D Slicer submits it."""
        body, kind = _form({"params": (None, json.dumps(about).encode()), "label": (label.name, label.read_bytes())})
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


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _form(fields: dict[str, tuple[str | None, bytes]]) -> tuple[bytes, str]:
    """Body and type of a form: name -> (file name or None, content)."""
    parts = []
    for name, (file, content) in fields.items():
        named = f'; filename="{file}"' if file else ""
        parts.append(f'--x\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + content)
    return b"\r\n".join([*parts, b"--x--\r\n"]), "multipart/form-data; boundary=x"


def _shim(root: Path) -> Path:
    """The two names that MONAI Label imports from torchvision, of which no CPU wheel fits this torch."""
    package = root / "shim/torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '0'\n")
    (package / "utils.py").write_text(
        "def make_grid(*args, **kwargs): raise NotImplementedError\nsave_image = make_grid\n"
    )
    return root / "shim"


def _studies(folder: Path, labels: Path) -> None:
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


@pytest.fixture(scope="module", params=["tsfm_pretrain", "tsfm_finetune"])
def server(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(1)
    ct = {"CT": {"lower": -300.0, "upper": 400.0, "mean": 50.0, "sd": 150.0}}
    own_app = request.param == "tsfm_finetune"
    targets = MANY if own_app else TARGETS
    raw = {"1": "organ", "2": "tumor"}
    if own_app:  # the server's labels are 1 organ, 2 tumor, 3 ... all the same
        raw = {"1": "tumor", "4": "organ", **{str(10 + number): name for number, name in enumerate(list(MANY)[2:])}}
    table = LabelTable(targets, [{"name": "mine", "labels": raw}])
    network = TSFM(1, len(targets), **TINY, img_size=[16, 16, 16])
    for head in network.heads:
        torch.nn.init.zeros_(head.conv.bias)  # so that about half of the voxels are segmented
    describe_network(network, table, Preparation((2.5, 1.2, 1.2), ct), [16, 16, 16], [{"modality": "CT"}])
    save_weights(network, root / "weights.pt")
    bundle = release.release(
        str(REPOSITORY / "bundles" / request.param), str(root / "weights.pt"), str(root / "dist"), zipped=False
    )
    _studies(root / "studies", root / ("submitted" if own_app else "studies/labels/final"))
    running = Server(Path(bundle), root, own_app)
    try:
        yield running, root
    finally:
        running.stop()


def test_a_label_and_train_round_with_a_real_server(server):
    server, root = server
    info = server.info()["models"][server.name]
    targets = MANY if server.name == "tsfm_finetune" else TARGETS
    assert info["type"] == "segmentation" and info["dimension"] == 3
    assert info["labels"] == {name: value for value, name in enumerate(targets, start=1)}
    assert info["config"]["model_filename"] == ["model.pt"]
    assert info["config"]["targets"] == ["all", *targets]

    reference = nib.load(root / "studies/case2.nii.gz")
    for options in ({"normalize_as": "CT"}, {"mirroring": True, "targets": "organ"}, {"threshold": 0.9999}):
        result = server.infer("case2", root / "result.nii.gz", **options)
        assert result.shape == reference.shape
        np.testing.assert_allclose(result.affine, reference.affine, atol=1e-3)
        found = set(np.unique(np.asarray(result.dataobj)).tolist())
        assert found <= ({0, 1} if "targets" in options else {0, *info["labels"].values()})
        assert bool(found - {0}) == ("threshold" not in options)  # the options arrived
    result = np.asarray(server.infer("case2", root / "result.nii.gz").dataobj)

    if server.name == "tsfm_finetune":
        _a_training_without_labels_is_refused_at_once(server)
        for case in ("case0", "case1"):
            server.submit(case, root / f"submitted/{case}.nii.gz", annotated="structure_3")
        _the_most_uncertain_image_comes_first(server, root)
    assert json.loads(server.request("/activelearning/first", b"{}"))["id"] == "case2"
    weights = server.bundle / "models/model.pt"
    for _ in range(2):  # the second training goes on from what the first one published
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
        if server.name == "tsfm_finetune":
            _only_the_drawn_and_named_targets_learned(before, after)
            _the_menu_offers_the_weights_before(server, root, result)
        result = np.asarray(server.infer("case2", root / "again.nii.gz").dataobj)
    assert not np.array_equal(result, np.asarray(nib.load(root / "result.nii.gz").dataobj))


def _a_training_without_labels_is_refused_at_once(server: Server) -> None:
    begin = time.time()
    status, content = server.answer(f"/train/{server.name}", b'{"max_epochs": 1}')
    assert status == 400 and b"submit labels first" in content and time.time() - begin < 5
    assert server.answer("/train/")[0] == 404  # no process was started


def _only_the_drawn_and_named_targets_learned(before: dict, after: dict) -> None:
    """Organ and tumor were drawn, structure 3 was named, so it is absent; about 27 others nothing was said."""
    head = next(key for key in before if before[key].shape[:1] == (len(MANY),) and before[key].ndim == 1)
    change = (after[head] - before[head]).abs()
    assert change[:3].min() > 1e-6 and change[3:].max() < 1e-8


def _the_menu_offers_the_weights_before(server: Server, root: Path, result: np.ndarray) -> None:
    files = json.loads(server.request("/info/"))["models"][server.name]["config"]["model_filename"]
    assert files == ["model.pt", "model_previous.pt"]
    earlier = server.infer("case2", root / "earlier.nii.gz", model_filename="model_previous.pt")
    assert np.array_equal(np.asarray(earlier.dataobj), result)


def _the_most_uncertain_image_comes_first(server: Server, root: Path) -> None:
    """The server's scores are those that the bundle computes outside of it, and the strategy takes the higher one."""
    name = f"uncertainty_{server.name}"
    assert name in json.loads(server.request("/info/"))["strategies"]
    server.wait("/scoring/")  # begins by itself with the server
    server.request(f"/scoring/{name}", b"{}")
    server.wait("/scoring/")
    parser = ConfigParser()
    parser.read_config(str(server.bundle / "configs/inference.json"))
    parser["bundle_root"], parser["device"] = str(server.bundle), "cpu"
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


WRONG = {
    "threshold is 'abc', expected a number": {"threshold": "abc"},
    "threshold is 7, expected a number above 0 and below 1": {"threshold": 7},
    "overlap is 1.5, expected": {"overlap": 1.5},
    "mirroring is 'perhaps', expected true or false": {"mirroring": "perhaps"},
    "targets is 'orgen' (did you mean 'organ'?)": {"targets": "orgen"},
    "normalize_as is 'PET'": {"normalize_as": "PET"},
    "device is 'cuda:9' (did you mean ": {"device": "cuda:9"},
    "model_filename is 'best.pt'; choose from: model.pt": {"model_filename": "best.pt"},
    "result_extension is '.jpg'": {"result_extension": ".jpg"},
    "this model takes no clicks": {"foreground": [[10, 10, 10]]},
    "no option 'treshold' (did you mean 'threshold'?)": {"treshold": 0.3},
}

WRONG_TRAINING = {
    "max_epochs is 0, expected a whole number from 1": {"max_epochs": 0},
    "max_epochs is 'many'": {"max_epochs": "many"},
    "val_split is 1": {"val_split": 1},
    "val_split is -1": {"val_split": -1},
    "no target named 'organs' (did you mean 'organ'?)": {"annotated": "organs"},
    "device is 'cuda:9'": {"device": "cuda:9"},
}


@pytest.mark.parametrize("server", ["tsfm_finetune"], indirect=True)
def test_what_cannot_be_meant_is_answered_with_a_sentence(server):
    server, root = server
    server.info()
    for message, options in WRONG.items():
        status, content = server.try_infer("case2", **options)
        assert status == 400 and message in json.loads(content)["detail"], (options, status, content)
    for message, options in WRONG_TRAINING.items():
        status, content = server.answer(f"/train/{server.name}", json.dumps(options).encode())
        assert status == 400 and message in json.loads(content)["detail"], (options, status, content)
    status, content = server.try_infer("damaged")
    assert status == 422 and "damaged.nii.gz" in json.loads(content)["detail"]
    status, content = server.try_infer("case22")
    assert status == 404 and "did you mean 'case2'" in json.loads(content)["detail"]
    status, content = server.answer("/infer/tsfm?image=case2", *_form({"params": (None, b"{}")}))
    assert status == 404 and "no model 'tsfm'; this server has tsfm_finetune" in json.loads(content)["detail"]
    for written, meant in (("false", False), ("True", True)):
        texts = server.infer("case3", root / "texts.nii.gz", mirroring=written, threshold="0.5")
        plain = server.infer("case3", root / "plain.nii.gz", mirroring=meant)
        assert np.array_equal(np.asarray(texts.dataobj), np.asarray(plain.dataobj))


@pytest.mark.parametrize("server", ["tsfm_finetune"], indirect=True)
def test_a_folder_of_a_dicom_series_is_an_image_like_others(server):
    """Its result lies on the grid that SimpleITK reads from the series, and is that of the same voxels in NIfTI."""
    sitk = pytest.importorskip("SimpleITK")
    server, root = server
    server.info()
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(root / "studies/series")))
    series = reader.Execute()
    server.infer("series", root / "of_series.nii.gz")
    result = sitk.ReadImage(str(root / "of_series.nii.gz"))
    for part in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(result, part)(), getattr(series, part)(), atol=1e-3)
    same = np.asarray(server.infer("case0", root / "of_file.nii.gz").dataobj)
    assert (same == sitk.GetArrayFromImage(result).T).mean() > 0.999


@pytest.mark.parametrize("server", ["tsfm_finetune"], indirect=True)
def test_labels_go_to_a_dicomweb_server_and_come_back_by_name(server, tmp_path):
    """Also to another station, which has nothing but the DICOM SEG: the values are those of the names, on the image's grid."""
    if subprocess.run([LABEL_PYTHON, "-c", "import dcmqi"], capture_output=True, check=False).returncode:
        pytest.skip("no dcmqi in MONAI Label's environment")
    served, root = server
    shutil.copytree(root / "studies/series", tmp_path / "pacs")
    port = _free_port()
    pacs = subprocess.Popen([LABEL_PYTHON, Path(__file__).parent / "dicomweb.py", str(port), tmp_path / "pacs"])
    try:
        first, second = (
            Server(served.bundle, tmp_path / name, True, f"http://127.0.0.1:{port}") for name in ("first", "second")
        )
        first.info()
        image = json.loads(first.request("/activelearning/first", b"{}"))["id"]
        result = first.infer(image, tmp_path / "result.nii.gz")
        drawn = np.asarray(nib.load(root / "submitted/case0.nii.gz").dataobj)
        drawn = np.where(drawn == 2, 7, drawn).astype(np.uint8)
        assert result.shape == drawn.shape
        nib.save(nib.Nifti1Image(drawn, result.affine), tmp_path / "drawn.nii.gz")
        first.submit(
            image, tmp_path / "drawn.nii.gz", label_info=[{"name": name} for name in MANY]
        )  # as 3D Slicer does
        assert json.loads(first.request("/datastore/"))["completed"] == 1
        second.info()
        (item,) = json.loads(second.request("/datastore/?output=train"))
        back = nib.load(item["label"])
        assert np.array_equal(np.asarray(back.dataobj), drawn)
        np.testing.assert_allclose(back.affine, nib.load(item["image"]).affine, atol=1e-3)
    finally:
        for process in (pacs, first.process, second.process):
            process.terminate()
            process.wait(30)
