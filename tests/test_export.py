"""The network alone, exported: every format computes what the network computes, for any batch, without this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, warm
from tsfm.__main__ import main
from tsfm.cases.cases import Preparation
from tsfm.labels import LabelTable
from tsfm.network.tsfm_net import TSFM
from tsfm.training.checkpoint import build_network, describe_network, load_weights, read_description, save_weights
from tsfm_tools.release import export

pytestmark = pytest.mark.convolutions

TINY = {"features": [4, 8], "depths_down": [1, 1], "depths_up": [1], "strides": [[2, 2, 2]]}
TINY |= {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 16}
SUFFIX = {"torchscript": "ts", "export": "pt2", "onnx": "onnx"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    torch.manual_seed(0)
    network = TSFM(2, 3, **TINY, img_size=[16, 16, 8])
    table = LabelTable({"a": {}, "b": {}, "c": {}}, [])
    describe_network(network, table, Preparation((3.0, 2.0, 2.0), {}, 2, "MR"), [16, 16, 8])
    path = str(tmp_path_factory.mktemp("weights") / "model.pt")
    save_weights(network, path)
    return path


@pytest.fixture(scope="module", params=export.WRITERS)
def exported(request, weights, tmp_path_factory) -> tuple[str, str]:
    path = str(tmp_path_factory.mktemp(request.param) / f"model.{SUFFIX[request.param]}")
    assert export.export(weights, path, request.param) <= export.TOLERANCE
    return request.param, path


READERS = {
    "torchscript": "run = lambda x: torch.jit.load(path)(torch.from_numpy(x)).detach().numpy()",
    "export": "run = lambda x: torch.export.load(path).module()(torch.from_numpy(x)).detach().numpy()",
    "onnx": "import onnxruntime as o; run = lambda x: o.InferenceSession(path).run(None, {'image': x})[0]",
}


def test_a_process_without_the_package_computes_the_same_for_any_batch(exported, weights, tmp_path):
    kind, path = exported
    images = [np.random.default_rng(n).standard_normal((n, 2, 16, 16, 8)).astype(np.float32) for n in (1, 2, 5)]
    np.savez(tmp_path / "in.npz", *images)
    script = f"""
import sys, numpy as np, torch
sys.modules["tsfm"] = None  # importing it would fail
path, folder = sys.argv[1:]
{READERS[kind]}
given = np.load(folder + "/in.npz")
np.savez(folder + "/out.npz", *[run(given[key]) for key in given.files])
"""
    command = [warm().python, "-W", "ignore", "-c", script, path, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    network = build_network(read_description(weights)).eval()
    load_weights(network, weights)
    found = np.load(tmp_path / "out.npz")
    with torch.no_grad():
        for image, key in zip(images, found.files, strict=True):
            np.testing.assert_allclose(found[key], network(torch.from_numpy(image)).numpy(), atol=1e-4)


def test_the_description_lies_beside_the_file(exported, weights):
    with open(exported[1] + ".json", encoding="utf-8") as file:
        assert json.load(file) == read_description(weights)


REFUSED = {
    "torchscript": r"exported for windows of \[16, 16, 8\]",
    "export": r"x.size\(\)\[2\] == 16",
    "onnx": "Expected: 16",
}


def test_another_size_is_refused_by_its_name_and_the_files_metadata_hold_the_patch(exported, weights):
    kind, path = exported
    image, files = torch.zeros(1, 2, 24, 16, 8), {export.METADATA: ""}
    if kind == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(path)
        files, run = session.get_modelmeta().custom_metadata_map, lambda x: session.run(None, {"image": x.numpy()})
    elif kind == "torchscript":
        run = torch.jit.load(path, _extra_files=files)
        assert run.patch_size == [16, 16, 8]
    else:
        run = torch.export.load(path, extra_files=files).module()
    assert json.loads(files[export.METADATA]) == read_description(weights)
    with pytest.raises(Exception, match=REFUSED[kind]):
        run(image)


def test_another_window_can_be_asked_for(weights, tmp_path):
    path = str(tmp_path / "model.ts")
    export.export(weights, path, "torchscript", patch_size=[8, 8, 8])
    assert torch.jit.load(path)(torch.zeros(1, 2, 8, 8, 8)).shape == (1, 3, 8, 8, 8)


def test_a_file_that_computes_something_else_is_refused_and_removed(weights, tmp_path, monkeypatch):
    def off_by_one(network, example, path, metadata):
        for part in (path, f"{path}.data"):  # as large weights in ONNX
            open(part, "w").close()
        return lambda image: network(image) + 1

    monkeypatch.setitem(export.WRITERS, "torchscript", off_by_one)
    with pytest.raises(export.ExportError, match="differ"):
        export.export(weights, str(tmp_path / "model.ts"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "patch, message", [(16, "patch_size is 16; expected three numbers"), ([17, 16, 8], "16 or 18 would fit")]
)
def test_a_window_that_does_not_fit_is_refused_before_anything_is_written(weights, tmp_path, patch, message):
    with pytest.raises(ValueError, match=message):
        export.export(weights, str(tmp_path / "model.ts"), patch_size=patch)
    assert os.listdir(tmp_path) == []


def test_the_weights_are_not_overwritten(weights):
    before = read_description(weights)
    with pytest.raises(export.ExportError, match="the checkpoint itself"):
        export.export(weights, weights)
    assert read_description(weights) == before


@pytest.mark.parametrize("format, file, message", [("tflite", "m.x", "expected one of"), ("export", "m.ts", ".pt2")])
def test_wrong_formats_are_named(weights, tmp_path, format, file, message):
    with pytest.raises(export.ExportError, match=message):
        export.export(weights, str(tmp_path / file), format)


def test_the_command(weights, tmp_path, capsys, monkeypatch):
    path = str(tmp_path / "model.ts")
    monkeypatch.setattr(sys, "argv", ["tsfm", "export", "--checkpoint", weights, "--output_file", path])
    main()
    assert "at most" in capsys.readouterr().out and os.path.isfile(path)


def test_monais_own_command_needs_no_option(weights, tmp_path):
    """`python -m monai.bundle ckpt_export` on the bundle's inference.json, as the Model Zoo's verify_bundle calls it."""
    configs = ROOT / "bundles/tsfm_pretrain/configs"
    path = str(tmp_path / "model.ts")
    command = [warm().python, "-W", "ignore", "-m", "monai.bundle", "ckpt_export", "network_def"]
    command += ["--filepath", path, "--ckpt_file", weights, "--checkpoint", weights]
    command += ["--meta_file", str(configs / "metadata.json"), "--config_file", str(configs / "inference.json")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    network = build_network(read_description(weights)).eval()
    load_weights(network, weights)
    image = torch.randn(1, 2, 16, 16, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(path).eval()(image), network(image), atol=1e-3, rtol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_trt_export_without_a_gpu_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tsfm", "trt_export", "--net_id", "network_def", "--filepath", "model_trt.ts"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert str(ended.value).count("\n") == 0 and "GPU" in str(ended.value)
