"""Every command of README.md, docs/*.md and the bundles' READMEs, taken from the page and run as it stands there.

Each page runs in a copy of the repository's folders in which the networks, patches and epochs are tiny; a bundle's README
runs as a stranger finds it, in a release under another name, with the package in it. `/data`, `/path/to/model.pt`, the host of
a download, a port and the number of GPUs stand for the reader's own and are replaced. `python` and `torchrun` are those
of warm.py. Blocks that build environments and the demo need minutes and the package index: `make test-docs` runs them
too, and with them those of MONAI Label, all with the usual programs. What can't run here at all is listed, with the
reason, in NOT_RUN.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import nnunet_models
import pytest
import torch
from conftest import ROOT, TINY, environment, free_port, warm
from tsfm.cases.cases import Preparation
from tsfm.labels import LabelTable
from tsfm.network.networks import STUNet
from tsfm.network.tsfm_net import TSFM
from tsfm.training.checkpoint import describe_network, save_weights
from tsfm_tools.phantoms import layouts as phantoms
from tsfm_tools.release.release import release

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("bundles/*/docs/*.md")])
NOT_RUN = {
    r"^make test$": "this test is part of it",
    r"trt_export|inference_trt": "needs TensorRT and a GPU",
    r"dicom_seg": "needs highdicom and a DICOM series: test_dicom_seg.py",
    r"zero_shot\.json": "minutes for 105 outputs on windows of 128 voxels; test_paper_tables.py runs it",
    r"dicom-web": "needs a DICOMweb server",
    r"click_server": "serves until it is interrupted; test_click_server.py",
    r"CASE\.nii": "names a file of the reader's; test_clicks.py",
}
BUILDS = r"^make demo$|-m venv|pip install (?!onnx )"
IS_FULL = os.environ.get("TSFM_DOCS") == "all"
LABEL_PYTHON = Path(os.environ.get("TSFM_LABEL_PYTHON", ROOT / ".venv-label/bin/python"))

PROLOGUE = r"""
set -euo pipefail
monailabel() {  # in its own environment: the one that the page has built, or LABEL_BIN
    PATH="$(ls -d "$PWD/.venv-label/bin" LABEL_BIN 2> /dev/null | head -n 1):$PATH" command monailabel "$@"
}
start_server() {  # until it answers
    monailabel "$@" > server.log 2>&1 & server=$!
    for i in $(seq 300); do
        if curl --silent --fail http://127.0.0.1:PORT/info/ > info.json; then kill $server; wait $server || true; return; fi
        kill -0 $server 2> /dev/null || break
        sleep 1
    done
    cat server.log; return 1
}
"""


class Block(NamedTuple):
    """A fenced block of a page: the heading it stands under, its language and its text."""

    heading: int
    language: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """The bash and Python blocks of a page."""
    heading, fence, lines = 0, "", []
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            if fence in ("bash", "python"):
                yield Block(heading, fence, "\n".join(lines))
            fence, lines = ("" if fence else line[3:].strip() or "text"), []
        elif fence:
            lines.append(line)
        elif line.startswith("#"):
            heading += 1


def why_not(line: str) -> str:
    """The reason why a line is not run, or nothing."""
    return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, line)), "")


def script(page: Path, has_label: bool) -> list[str]:
    """One shell script per heading of a page, without what can't be run now."""
    parts: dict[int, list[str]] = {}
    for block in blocks(page):
        if block.language == "python":
            text = f"python - <<'END'\n{block.text}\nEND"
        else:
            lines = [line for line in block.text.splitlines() if not why_not(line)]
            builds = any(re.search(BUILDS, line) for line in lines)
            needs_label = any("monailabel" in line or "monaibundle" in line for line in lines)
            if (builds and not IS_FULL) or (needs_label and not has_label):
                continue
            text = "\n".join(lines)
            text = f"(\n{text}\n)" if builds else text  # an activated environment ends with its block
        if text.strip():
            parts.setdefault(block.heading, []).append(text)
    return ["\n".join(texts) for texts in parts.values()]


@pytest.fixture
def world(tmp_path) -> Path:
    """`repo`, a copy of the repository with tiny settings; `data`, phantoms in every layout that a page names; weights."""
    repo, data = tmp_path / "repo", tmp_path / "data"
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "models", "output", "store")
    for name in ("bundles", "custom", "docs"):
        shutil.copytree(ROOT / name, repo / name, ignore=skip)
    for path in [*ROOT.glob("requirements*.txt"), ROOT / "Makefile", ROOT / "LICENSE"]:
        shutil.copy2(path, repo)
    for bundle in (repo / "bundles").iterdir():
        for path in (bundle / "configs").glob("*.json"):
            make_tiny(path)
        (bundle / "models").mkdir()
    phantoms.write_all_ten(str(data), 3, (32, 48, 48))
    nnunet_models.write_folder(
        data / "Dataset004_Toy/nnUNetTrainer__nnUNetPlans__3d_fullres", {0: nnunet_models.unet()}
    )
    stunet = STUNet(1, 105, features=[2, 4, 4, 4, 4, 4], depths_down=[1] * 6).net
    torch.save({"state_dict": stunet.state_dict()}, data / "base_ep4k.model")
    shutil.copytree(data / "Task03_Liver", data / "Task04_Hippocampus")
    phantoms.write_kits19(str(data / "kits19/data"), 3, (32, 48, 48))
    for folder, source in (("my_cts", "imagesTr"), ("new_images", "imagesTr"), ("mine/ct", "imagesTr")):
        shutil.copytree(data / "Task03_Liver" / source, data / folder)
    shutil.copytree(data / "Task03_Liver/labelsTr", data / "mine/masks")
    write_weights(tmp_path / "weights.pt")
    (tmp_path / "venv").mkdir()
    for name in ("run", "dev"):
        (tmp_path / "venv" / name).touch()  # what make takes for built
    (tmp_path / "venv/bin").symlink_to(Path(sys.executable).parent if IS_FULL else warm().programs)
    (tmp_path / "data_license.txt").write_text("msd_liver: CC BY-SA 4.0\n")
    return tmp_path


def make_tiny(path: Path) -> None:
    """Put TINY's settings into train.json and small.json, and into other overlays where they set the same ids.

    Fine-tuning takes network, patch and spacing from the weights.
    """
    config = json.loads(path.read_text())
    from_weights = ("network_def#", "patch_size", "spacing_mm", "learning_rate")
    for key, value in TINY.items():
        if path.name not in ("train.json", "small.json") and key not in config:
            continue
        if "tsfm_pretrain" in path.parts or not key.startswith(from_weights):
            parent, _, name = key.rpartition("#")
            if path.name == "train.json" and parent:
                config[parent][name] = value
            else:
                config[key] = value
    path.write_text(json.dumps(config, indent=4))


def write_weights(path: Path) -> None:
    """Tiny weights of a network for liver and liver tumor, with all that a checkpoint says of itself."""
    names = ("features", "depths_down", "depths_up", "strides", "hidden_size", "num_layers", "num_heads", "mlp_dim")
    network = TSFM(1, 2, **{name: TINY[f"network_def#{name}"] for name in names}, img_size=TINY["patch_size"])
    table = LabelTable(
        {"liver": {}, "liver_tumor": {"inside": "liver"}},
        [{"name": "msd_liver", "labels": {"1": "liver", "2": "liver_tumor"}}],
    )
    ct = {"CT": {"lower": -200.0, "upper": 300.0, "mean": 50.0, "sd": 80.0}}
    preparation = Preparation(tuple(TINY["spacing_mm"]), ct)
    describe_network(network, table, preparation, TINY["patch_size"], [{"modality": "CT", "dataset": "msd_liver"}])
    save_weights(network, path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run(page, world):
    has_label = LABEL_PYTHON.exists() or IS_FULL
    home, libraries = world / "repo", ""
    if page.is_relative_to(ROOT / "bundles"):
        source = home / page.relative_to(ROOT).parents[1]
        release(str(source), str(world / "weights.pt"), str(world / "shelf"), name="of_mine")
        home = world / "shelf/of_mine"
        page, libraries = home / "docs/README.md", str(home)
    scripts = script(page, has_label)
    if not scripts:
        pytest.skip("no command of this page runs here")
    handler = functools.partial(Quiet, directory=str(world / "repo/dist"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for text in scripts:
            run(text, home, world, server.server_port, libraries)
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


def run(text: str, home: Path, world: Path, download_port: int, libraries: str = "") -> None:
    """Run one heading's commands in `home`, with the reader's own things in place."""
    port = free_port()
    text = re.sub(r"(?<![\w.])/data\b", str(world / "data"), text)
    text = text.replace("/path/to/model.pt", str(world / "weights.pt"))
    text = text.replace("/path/to/data_license.txt", str(world / "data_license.txt"))
    text = text.replace("https://host/", f"http://127.0.0.1:{download_port}/")
    text = text.replace("--nproc_per_node=8", "--nproc_per_node=2")
    text = text.replace("monailabel start_server", "start_server start_server").replace("--port 8000", f"--port {port}")
    prologue = PROLOGUE.replace("PORT", str(port)).replace("LABEL_BIN", f"'{LABEL_PYTHON.parent}'")
    surroundings = environment() | {
        "PATH": os.pathsep.join([str(world / "venv/bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "MONAI_LABEL_SESSION_PATH": str(world / "sessions"),
        "MAKEFLAGS": f"VENV={world}/venv",
    }
    for name in ("PYTHONPATH", *(["PYTHON_EXEC"] if IS_FULL else [])):
        surroundings.pop(name, None)
    surroundings |= {"PYTHONPATH": libraries} if libraries else {}
    done = subprocess.run(
        ["bash", "-c", prologue + text],
        cwd=home, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{text}\n{done.stdout[-6000:]}"


def test_what_is_not_run_is_still_on_a_page():
    lines = [line for page in PAGES for block in blocks(page) for line in block.text.splitlines()]
    stale = [pattern for pattern in [*NOT_RUN, BUILDS] if not any(re.search(pattern, line) for line in lines)]
    assert not stale


def test_a_command_that_fails_is_found(world):
    with pytest.raises(AssertionError, match="does not exist"):
        run("python -m tsfm describe --checkpoint gone.pt\ntrue", world / "repo", world, 0)
