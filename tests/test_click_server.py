"""Promptable weights as a release, and the routes of SlicerNNInteractive, as its client speaks them, over real HTTP."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import socket
import threading
import urllib.request
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT
from tsfm.cases.cases import Preparation
from tsfm.inference.postprocessing import apply
from tsfm.labels import LabelTable
from tsfm.network.clicks import ClickError
from tsfm.network.tsfm_net import TSFM
from tsfm.options import OptionError
from tsfm.training.checkpoint import describe_network, save_weights
from tsfm.training.weight_files import load_file
from tsfm_tools.click_server import ClickRequests, Session, serve
from tsfm_tools.release.folder_checks import FOLDER_CHECKS
from tsfm_tools.release.release import release
from tsfm_tools.release.rules import ReleaseError, built

pytestmark = pytest.mark.convolutions

TINY = {"features": [4, 8], "depths_down": [1, 1], "depths_up": [1], "strides": [[2, 2, 2]]}
TINY |= {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 16}
SHAPE = (24, 20, 18)


def weights(path, clicks=True, sigma=2.0):
    torch.manual_seed(0)
    table = LabelTable(
        {"organ": {}, "tumor": {"inside": "organ"}}, [{"name": "mine", "labels": {"1": "organ", "2": "tumor"}}]
    )
    network = TSFM(3 if clicks else 1, 2, **TINY, img_size=[16, 16, 16])
    for head in network.heads:
        torch.nn.init.zeros_(head.conv.bias)
    if clicks:
        network.description["click_sigma"] = sigma
    describe_network(
        network, table, Preparation((1.0, 1.0, 1.0), default_modality="MR"), [16, 16, 16], [{"modality": "MR"}]
    )
    save_weights(network, path)
    return str(path)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    voxels = np.random.default_rng(0).normal(100, 20, SHAPE).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, np.diag([-1, -1, 1.2, 1])), folder / "case.nii.gz")
    nib.save(nib.Nifti1Image(voxels + 1, np.diag([1, 1, 1.0, 1])), folder / "other.nii.gz")
    requests = ClickRequests(ROOT / "bundles/tsfm_finetune", checkpoint=weights(folder / "model.pt"), device="cpu")
    with serve(Session(requests, str(folder), "organ"), "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", voxels, requests, str(folder / "case.nii.gz")
        server.shutdown()


def post(url, body, kind="application/json"):
    with urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": kind})) as answer:
        return answer.read(), answer.headers


def upload(server, voxels, route="upload_image", packed=False):
    buffer = io.BytesIO()
    np.save(buffer, voxels)
    content = gzip.compress(buffer.getvalue()) if packed else buffer.getvalue()
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="volume.npy"\r\n\r\n'
    return json.loads(
        post(f"{server}/{route}", head + content + b"\r\n--b--\r\n", "multipart/form-data; boundary=b")[0]
    )


def click(server, voxel, positive=True):
    body = json.dumps({"voxel_coord": [int(n) for n in voxel[::-1]], "positive_click": positive}).encode()
    answer, headers = post(f"{server}/add_point_interaction", body)
    if headers["Content-Type"] == "application/json":
        return json.loads(answer)
    assert headers["Content-Encoding"] == "gzip"
    bits = np.unpackbits(np.frombuffer(gzip.decompress(answer), np.uint8))
    return bits[: np.prod(SHAPE)].reshape(SHAPE[::-1]).astype(bool).T


def test_clicks_of_the_extension_give_the_masks_that_inference_gives(served):
    server, voxels, requests, path = served
    assert click(server, (3, 3, 3)) == {"status": "error", "message": "No image uploaded"}
    assert "none of the 2 images" in upload(server, voxels.T + 7)["message"]
    assert upload(server, voxels.T) == {"status": "ok"}
    for clicks, voxel, inside in (
        ({"foreground": [[12, 9, 8]]}, (12, 9, 8), True),
        ({"foreground": [[12, 9, 8]], "background": [[4, 15, 10]]}, (4, 15, 10), False),
    ):
        expected = requests(path, label="organ", **clicks) > 0  # what is painted as tumor is organ too
        found = click(server, voxel, inside)
        assert np.array_equal(found, expected) and 0 < found.mean() < 1
    error = click(server, (12, 40, 8))
    assert error["status"] == "error" and "lies outside of the volume of 24x20x18 voxels" in error["message"]
    assert np.array_equal(click(server, (4, 15, 10), False), expected)  # the click outside was forgotten

    assert upload(server, np.zeros(SHAPE[::-1], np.uint8), "upload_segment", packed=True) == {"status": "ok"}
    assert np.array_equal(click(server, (12, 9, 8)), requests(path, label="organ", foreground=[[12, 9, 8]]) > 0)
    box = json.loads(post(f"{server}/add_bbox_interaction", b"{}")[0])
    assert box["status"] == "error" and "takes points only" in box["message"]


def test_a_post_processing_plan_counts_as_in_inference(served):
    _, _, requests, path = served
    clicks = {"label": "organ", "background": [[4, 15, 10]]}  # a step leaves a target alone inside of which was clicked
    plain = requests(path, **clicks)
    plan = {"targets": ["organ", "tumor"], "steps": [{"target": "organ", "values": [2], "fill": 1}]}
    checkpoint = str(Path(path).with_name("model.pt"))
    planned = ClickRequests(
        ROOT / "bundles/tsfm_finetune", checkpoint=checkpoint, device="cpu", postprocessing_plan=plan
    )
    expected = apply(plain, plan)
    assert np.array_equal(planned(path, **clicks), expected) and not np.array_equal(plain, expected)


def test_an_image_that_came_after_the_start_is_found(served):
    server, voxels, _, path = served
    late = Path(path).with_name("late.nii.gz")
    nib.save(nib.Nifti1Image(voxels + 3, np.eye(4)), late)
    assert upload(server, voxels.T + 3) == {"status": "ok"}
    late.unlink()


def test_a_file_that_cannot_be_read_blocks_no_other_and_every_error_is_answered(served, tmp_path, monkeypatch, caplog):
    server, voxels, requests, path = served
    for name in ("a.nii.gz", "b.nrrd"):
        (tmp_path / name).write_bytes(b"")
    shutil.copy(path, tmp_path / "z.nii.gz")
    session = Session(requests, str(tmp_path), "organ")
    session.upload_image(voxels.T)
    assert session.image == str(tmp_path / "z.nii.gz") and "a.nii.gz is left out" in caplog.text

    assert upload(server, voxels.T) == {"status": "ok"}
    with monkeypatch.context() as patch:
        patch.setattr(ClickRequests, "__call__", lambda *_, **__: 1 / 0)
        assert click(server, (3, 3, 3)) == {"status": "error", "message": "ZeroDivisionError: division by zero"}
    assert np.array_equal(click(server, (12, 9, 8)), requests(path, label="organ", foreground=[[12, 9, 8]]) > 0)
    for body in (b"[]", b"{", b'{"voxel_coord": 3, "positive_click": true}'):
        assert json.loads(post(f"{server}/add_point_interaction", body)[0])["status"] == "error"
    for length in (2**32 + 1, -1, "all"):
        with socket.create_connection(server.removeprefix("http://").split(":"), timeout=20) as connection:
            connection.sendall(f"POST /upload_image HTTP/1.0\r\nContent-Length: {length}\r\n\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
        assert f"a request of {length} bytes" in answer.decode()


def test_weights_without_clicks_and_unknown_targets_are_refused_before_anything_is_served(served, tmp_path):
    requests, path = served[2:]
    with pytest.raises(OptionError, match="a#b' has a #, which MONAI reads as ::"):
        ClickRequests(tmp_path / "a#b")
    with pytest.raises(ClickError, match=r"'liver' is unknown; these weights have \['organ', 'tumor'\]"):
        Session(requests, path, "liver")
    bundle = ROOT / "bundles/tsfm_finetune"
    automatic = ClickRequests(bundle, checkpoint=weights(tmp_path / "automatic.pt", clicks=False), device="cpu")
    with pytest.raises(ClickError, match=r"no click channels: train with configs/clicks\.json added"):
        Session(automatic, path, "organ")
    assert automatic(path).shape == SHAPE
    with pytest.raises(ClickError, match="these weights have no click channels"):
        automatic(path, organ=[[3, 3, 3]])


def test_a_release_of_promptable_weights_is_named_by_itself_serves_clicks_and_trains_with_them(served, tmp_path):
    requests, path = served[2:]
    source = str(ROOT / "bundles/tsfm_finetune")
    checkpoint = weights(tmp_path / "weights.pt", sigma=2.5)
    with pytest.raises(ReleaseError, match="use mine_deepedit"):
        release(source, checkpoint, str(tmp_path / "dist"), name="mine", zipped=False)
    bundle = Path(release(source, checkpoint, str(tmp_path / "dist"), zipped=False))
    assert bundle.name == "tsfm_finetune_deepedit"
    image = json.loads((bundle / "configs/metadata.json").read_text())["network_data_format"]["inputs"]["image"]
    assert image["num_channels"] == 3
    assert image["channel_def"] == {"0": "MR", "1": "clicks inside", "2": "clicks outside"}
    asked = {"label": "tumor", "foreground": [[12, 9, 8]]}
    staged, unstaged = (
        ClickRequests(folder, device="cpu", **more)(path, **asked)
        for folder, more in ((bundle, {}), (source, {"checkpoint": checkpoint}))
    )
    assert np.array_equal(staged, unstaged) and not np.array_equal(staged, requests(path))
    train = json.loads((bundle / "configs/train.json").read_text())
    assert train["click_sigma"] == 2.5 and train["train"]["step"]["_target_"].endswith("ClickTrainStep")
    network = built(
        str(bundle), "train.json", "loaded_network"
    )  # as a server's training begins, without data of its own
    assert (
        torch.equal(network.stem.weight, load_file(checkpoint)["stem.weight"])
        and network.description["click_sigma"] == 2.5
    )
    assert FOLDER_CHECKS["bundle name"](str(bundle)) == bundle.name
    again = Path(release(str(bundle), checkpoint, str(tmp_path / "again"), zipped=False))
    assert again.name == bundle.name and json.loads((again / "configs/train.json").read_text()) == train
    with pytest.raises(ReleaseError, match="deepedit"):
        release(source, weights(tmp_path / "other.pt", clicks=False), str(tmp_path), name="other_deepedit")
