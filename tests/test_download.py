"""A stranger with only the zip: download, verify, load, infer, evaluate and train, without this repository.

The environment has the requirements but not the package: its interpreter finds links to this one's libraries through
PYTHONPATH, which runs no editable installs, but for those that only the tests need. Every command starts in a folder
that has nothing to do with the bundle. The first one starts that interpreter, the others are forked from one (warm.py).
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import shutil
import subprocess
import threading
import venv
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from tsfm.cases.cases import Preparation
from tsfm.labels import LabelTable
from tsfm.network.tsfm_net import TSFM
from tsfm.training.checkpoint import describe_network, save_weights
from tsfm_tools.phantoms.layouts import write_pool
from tsfm_tools.release import release
from warm import Warm

BUNDLES = Path(__file__).resolve().parents[1] / "bundles"
PATCH = [16, 16, 16]
TINY = {"features": [4, 8], "depths_down": [1, 1], "depths_up": [1], "strides": [[2, 2, 2]]}
TINY |= {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 16}
MSD_LIVER = {"name": "msd_liver", "labels": {"1": "liver", "2": "liver_tumor"}}
DEV_ONLY = ("pytest", "skimage", "onnx", "onnxscript", "onnxruntime", "mlflow", "sqlalchemy", "alembic")
SHORT = ["--epochs", "1", "--iterations_per_epoch", "1", "--val_iterations", "1", "--batch_size", "1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[Path]:
    """Phantoms, tiny weights for their two targets, and an interpreter that does not know the package."""
    root = tmp_path_factory.mktemp("world")
    write_pool(str(root / "data"), 2, (16, 24, 24), datasets=("msd_liver",))
    targets = {"liver": {}, "liver_tumor": {"inside": "liver"}}
    ct = {"CT": {"lower": -200.0, "upper": 300.0, "mean": 50.0, "sd": 80.0}}
    torch.manual_seed(0)
    network = TSFM(1, 2, **TINY, img_size=PATCH)
    items = [{"modality": "CT", "dataset": "msd_liver"}]
    describe_network(network, LabelTable(targets, [MSD_LIVER]), Preparation((16.0, 16.0, 16.0), ct), PATCH, items)
    save_weights(network, root / "weights.pt")
    venv.create(root / "env", symlinks=True, with_pip=False)
    (root / "elsewhere").mkdir()
    (root / "libraries").mkdir()
    for entry in Path(torch.__file__).parents[1].iterdir():
        if not entry.name.lower().startswith(DEV_ONLY):
            (root / "libraries" / entry.name).symlink_to(entry)
    warm = Warm(str(root / "env/bin/python"), surroundings(root))
    (root / "python").symlink_to(warm.python)
    yield root
    warm.close()


@pytest.fixture(scope="module", params=["tsfm_pretrain", "tsfm_finetune"])
def downloaded(request, world) -> Path:
    """The bundle as `monai.bundle download` fetches it from a local server."""
    name = request.param
    if not (BUNDLES / name / "configs" / "metadata.json").is_file():
        pytest.skip(f"{name} has no metadata.json")
    shelf = world / f"shelf_{name}"
    path = Path(release.release(str(BUNDLES / name), str(world / "weights.pt"), str(shelf)))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(shelf))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{path.name}"
        version = path.stem.split("_v")[-1]
        target = ["--name", name, "--version", version, "--bundle_dir", str(world / "got"), "--url", url]
        run(world, "-m", "monai.bundle", "download", *target)
        server.shutdown()
    fetched = next((world / "got").glob(f"{name}*.zip"))
    listed = (shelf / f"{path.name}.sha256").read_text().split()[0]
    assert hashlib.sha256(fetched.read_bytes()).hexdigest() == listed
    return world / "got" / name


def surroundings(world: Path) -> dict[str, str]:
    """The environment of the bare interpreter."""
    usual = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return usual | {"PYTHONPATH": str(world / "libraries"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def run(world: Path, *arguments: str, python: str = "python") -> str:
    """Run the bare interpreter on `arguments` from a folder of its own; returns what it printed."""
    done = subprocess.run(
        [str(world / python), "-W", "ignore", *arguments],
        cwd=world / "elsewhere", env=surroundings(world), capture_output=True, encoding="utf-8", timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def bundle_run(world: Path, bundle: Path, configs: list[str], *arguments: str) -> str:
    files = str([str(bundle / "configs" / config) for config in configs])
    common = ["--bundle_root", str(bundle), "--meta_file", str(bundle / "configs" / "metadata.json")]
    if "train.json" in configs:
        common += ["--num_workers", "0"]
    return run(world, "-m", "monai.bundle", "run", "--config_file", files, *common, *arguments)


def test_the_environment_knows_neither_the_package_nor_what_only_the_tests_need(world):
    script = "import importlib.util, sys, monai; print([n for n in sys.argv[1:] if importlib.util.find_spec(n)])"
    assert run(world, "-c", script, "tsfm", *DEV_ONLY, python="env/bin/python").strip() == "[]"


def test_load_and_create_workflow(world, downloaded):
    """`load` builds the network of train.json by default, from a folder that is not the bundle's, and leaves no files."""
    script = """
import os, sys, torch
from monai.bundle import create_workflow, load
folder, name, image, label, work = sys.argv[1:]
sys.path.insert(0, f"{folder}/{name}")
saved = torch.load(f"{folder}/{name}/models/model.pt", weights_only=True)
for kind in ("inference", "train"):
    own = load(name, bundle_dir=folder, source="github", workflow_type=kind).state_dict()
    assert all(torch.equal(own[key], saved[key]) for key in saved if key != "_extra_state")
    assert not os.listdir("."), os.listdir(".")
configs = f"{folder}/{name}/configs"
workflow = create_workflow(
    config_file=f"{configs}/inference.json", workflow_type="infer", bundle_root=f"{folder}/{name}", dataset_dir=image
)
assert type(workflow.network_def).__name__ == "TSFM", workflow.network_def
assert not workflow.check_properties()
workflow = create_workflow(
    config_file=f"{configs}/train.json", workflow_type="train", bundle_root=f"{folder}/{name}", num_workers=0, epochs=1,
    iterations_per_epoch=1, batch_size=1, ckpt_dir=f"{work}/models", store_dir=f"{work}/store", output_dir=f"{work}/out",
    **{"train#dataset#data": [{"image": image, "label": label}], "validate#dataset#data": []},
    **({"pretrained": f"{folder}/{name}/models/model.pt"} if name == "tsfm_finetune" else {}),
)
assert not workflow.check_properties()
workflow.run()
workflow.finalize()
trained = torch.load(f"{work}/models/model.pt", weights_only=True)
assert not all(torch.equal(trained[key], saved[key]) for key in saved)
"""
    image, label = (world / f"data/Task03_Liver/{kind}Tr/liver_0.nii.gz" for kind in ("images", "labels"))
    work = world / f"workflow_{downloaded.name}"
    run(world, "-c", script, str(downloaded.parent), downloaded.name, str(image), str(label), str(work))


def test_inference_from_another_folder(world, downloaded):
    images = world / "data/Task03_Liver/imagesTr"
    output = world / f"maps_{downloaded.name}"
    bundle_run(world, downloaded, ["inference.json"], "--dataset_dir", str(images), "--output_dir", str(output))
    for case in ("liver_0", "liver_1"):
        image = nib.load(images / f"{case}.nii.gz")
        result = nib.load(next(output.rglob(f"{case}*.nii.gz")))
        assert result.shape == image.shape
        np.testing.assert_allclose(result.affine, image.affine, atol=1e-4)
        assert set(np.unique(np.asarray(result.dataobj))) <= {0, 1, 2}


def test_one_epoch_and_an_evaluation(world, downloaded):
    """Last, as training replaces models/model.pt: a copy is trained."""
    bundle = world / f"trained_{downloaded.name}" / downloaded.name
    shutil.copytree(downloaded, bundle)
    before = (bundle / "models/model.pt").read_bytes()
    pretraining = downloaded.name == "tsfm_pretrain"
    data = world / "data" if pretraining else world / "data/Task03_Liver"
    common = ["--dataset_dir", str(data), "--store_dir", str(world / "store"), "--output_dir", str(bundle / "run")]
    bundle_run(world, bundle, ["train.json"], *common, *SHORT)
    assert (bundle / "models/model.pt").read_bytes() != before
    state = torch.load(bundle / "models/model.pt", weights_only=True)
    assert all(torch.isfinite(value.float()).all() for value in state.values())
    scores = bundle / "scores"
    bundle_run(world, bundle, ["inference.json", "evaluate.json"], *common[:2], "--output_dir", str(scores))
    text = "".join(path.read_text() for path in [*scores.rglob("*.csv"), *scores.rglob("*.json")])
    assert "liver" in text and "liver_1" in text
