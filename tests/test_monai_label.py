"""A real MONAI Label server on both released bundles: info, inference, active learning, training, inference again.

MONAI Label needs an environment of its own (`make test-label` builds it, or TSFM_LABEL_PYTHON names its interpreter);
without one these tests are skipped. About two minutes per bundle. The fine-tuning bundle, of 30 targets, is served by the app
that a release brings, the pretraining one by MONAI Label's own; one more server has promptable weights, and an imported nnU-Net.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import nibabel as nib
import nnunet_models
import numpy as np
import pytest
import torch
from conftest import free_port
from monai.bundle import ConfigParser
from monai_label_server import LABEL_PYTHON, Server, form, shim, staged, write_studies
from tsfm.labels import LabelTable
from tsfm.training.checkpoint import read_description
from tsfm_tools.click_server import ClickRequests
from tsfm_tools.release.import_nnunet import import_nnunet

TARGETS = {"organ": {}, "tumor": {"inside": "organ"}}
MANY = {**TARGETS, **{f"structure_{number}": {} for number in range(3, 31)}}

pytestmark = pytest.mark.skipif(not Path(LABEL_PYTHON).exists(), reason="no MONAI Label environment")


@pytest.fixture(scope="module", params=["tsfm_pretrain", "tsfm_finetune"])
def server(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(1)
    own_app = request.param == "tsfm_finetune"
    targets = MANY if own_app else TARGETS
    raw = {"1": "organ", "2": "tumor"}
    if own_app:  # the server's labels are 1 organ, 2 tumor, 3 ... all the same; structure 3 was never trained
        raw = {"1": "tumor", "4": "organ", **{str(10 + number): name for number, name in enumerate(list(MANY)[3:])}}
    bundle = staged(request.param, LabelTable(targets, [{"name": "mine", "labels": raw}]), root)
    write_studies(root / "studies", root / ("submitted" if own_app else "studies/labels/final"))
    running = Server(bundle, root, own_app)
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
    assert info["config"]["targets"] == ["all", *(name for name in targets if name != "structure_3")]

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
        _empty_maps_alone_teach_nothing(server, root)
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
            assert read_description(weights)["trained_on"] == ["label_map", "mine"]
            _only_the_drawn_and_named_targets_learned(before, after)
            _the_menu_offers_the_weights_before(server, root, result)
        result = np.asarray(server.infer("case2", root / "again.nii.gz").dataobj)
    assert not np.array_equal(result, np.asarray(nib.load(root / "result.nii.gz").dataobj))


def _a_training_without_labels_is_refused_at_once(server: Server) -> None:
    begin = time.time()
    status, content = server.answer(f"/train/{server.name}", b'{"max_epochs": 1}')
    assert status == 400 and b"submit labels first" in content and time.time() - begin < 5
    assert server.answer("/train/")[0] == 404  # no process was started


def _empty_maps_alone_teach_nothing(server: Server, root: Path) -> None:
    drawn = nib.load(root / "submitted/case0.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros(drawn.shape, np.uint8), drawn.affine), root / "empty.nii.gz")
    server.submit("case0", root / "empty.nii.gz")
    with pytest.raises(AssertionError, match="the submitted labels hold no target at all"):
        server.train()


def _only_the_drawn_and_named_targets_learned(before: dict, after: dict) -> None:
    """Organ and tumor were drawn, structure 3 was named, so it is absent; about 27 others nothing was said."""
    head = next(key for key in before if before[key].shape[:1] == (len(MANY),) and before[key].ndim == 1)
    change = (after[head] - before[head]).abs()
    assert change[:3].min() > 1e-6 and change[3:].max() < 1e-8


def _the_menu_offers_the_weights_before(server: Server, root: Path, result: np.ndarray) -> None:
    options = json.loads(server.request("/info/"))["models"][server.name]["config"]
    assert options["model_filename"] == ["model.pt", "model_previous.pt"] and options["targets"] == ["all", *MANY]
    earlier = np.asarray(server.infer("case2", root / "earlier.nii.gz", model_filename="model_previous.pt").dataobj)
    known = (earlier != 3) & (result != 3)  # structure 3 is computed since the first training
    assert np.array_equal(earlier[known], result[known]) and known.any()


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
    status, content = server.answer("/infer/tsfm?image=case2", *form({"params": (None, b"{}")}))
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
    port = free_port()
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
        np.testing.assert_array_equal(np.asarray(back.dataobj), drawn)
        np.testing.assert_allclose(back.affine, nib.load(item["image"]).affine, atol=1e-3)
    finally:
        for process in (pacs, first.process, second.process):
            process.terminate()
            process.wait(30)


REMOVED = """
import sys

sys.path.insert(0, sys.argv[1])
from label_tasks import UncertaintyScoring

class Store(dict):
    list_images = get_unlabeled_images = lambda self: list(self)
    get_image_info, get_image_uri = dict.__getitem__, lambda self, image: image
    refresh = lambda self: self.pop("a", None)
    update_image_info = lambda self, image, info: self[image].update(info)

task = type("Task", (), {"get_path": lambda self: __import__("os").__file__})()
scoring = UncertaintyScoring(task, "doubt")
scoring.score = lambda path, request: 0.5
store = Store(a={}, b={})
scoring({}, store)
assert list(store) == ["b"] and store["b"]["doubt"] == 0.5, store
"""


def test_an_image_that_is_removed_while_images_are_scored_stops_no_other(tmp_path):
    app = Path(__file__).parents[1] / "custom/tsfm_tools/label_app"
    surroundings = {**os.environ, "PYTHONPATH": str(shim(tmp_path))}
    done = subprocess.run([LABEL_PYTHON, "-c", REMOVED, app], env=surroundings, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def promptable(tmp_path_factory):
    """A server of promptable weights and, where nnU-Net's networks are installed on both sides, of an imported nnU-Net."""
    root, package = tmp_path_factory.mktemp("promptable"), "dynamic_network_architectures"
    torch.manual_seed(1)
    bundle = staged("tsfm_finetune", LabelTable(TARGETS, []), root, clicks=True)
    theirs = Path(LABEL_PYTHON).parents[1].glob(f"lib/*/site-packages/{package}")
    imported = importlib.util.find_spec(package) and any(theirs)
    if imported:
        network = nnunet_models.unet()
        with torch.no_grad():  # every class wins somewhere
            noise = torch.randn(1, 1, *nnunet_models.PATCH)
            network.decoder.seg_layers[-1].bias -= network(noise).mean((0, 2, 3, 4))
        imported = import_nnunet(
            nnunet_models.write_folder(root / "nnunet", {0: network}), str(root / "dist"), name="toy"
        )
    write_studies(root / "studies", root / "labels")
    running = Server(bundle, root, True, beside=imported or "")
    try:
        yield running, root, imported
    finally:
        running.stop()


def test_a_result_is_corrected_with_three_clicks(promptable):
    """Without clicks both models give the automatic result; with them what inference outside of the server gives with them."""
    server, root, _ = promptable
    models = server.info()["models"]
    assert server.name == "tsfm_finetune_deepedit"
    kinds = {name: models[name]["type"] for name in (server.name, f"{server.name}_seg")}
    assert kinds == {server.name: "deepedit", f"{server.name}_seg": "segmentation"}
    path, answer = str(root / "studies/case3.nii.gz"), root / "answer.nii.gz"
    outside = ClickRequests(server.bundle, device="cpu")
    automatic = np.asarray(server.infer("case3", answer, model=f"{server.name}_seg").dataobj)
    assert np.array_equal(automatic, np.asarray(server.infer("case3", answer).dataobj))
    assert (automatic == outside(path)).mean() > 0.999 and len(np.unique(automatic)) > 1

    clicks = {"label": "tumor", "foreground": [[6, 8, 5], [9, 8, 5]], "background": [[7, 11, 5]]}
    corrected = np.asarray(server.infer("case3", answer, **clicks).dataobj)
    assert (corrected == outside(path, **clicks)).mean() > 0.999
    changed = np.argwhere(corrected != automatic)
    assert len(changed) and (changed.max(0) <= np.array([9, 11, 5]) + 16 + 6).all()  # in windows that a click reaches
    slicers = {"organ": [], "tumor": clicks["foreground"], "background": clicks["background"]}
    assert not np.array_equal(np.asarray(server.infer("case3", answer, **slicers).dataobj), automatic)
    assert np.array_equal(np.asarray(server.infer("case3", answer).dataobj), automatic)  # they were of that request

    for options, status, message in (
        ({**clicks, "foreground": [[40, 8, 5]]}, 422, "at voxel [40, 8, 5] lies outside of the volume of 40x44x28 voxels"),
        ({**clicks, "label": "tumour"}, 422, "clicks for 'tumour', which is no target of these weights (did you mean 'tumor'?)"),
        ({**clicks, "foreground": [[4, 8]]}, 422, "is [4, 8]; expected a voxel of the image, [i, j, k]"),
        ({**clicks, "model": f"{server.name}_seg"}, 400, "this model takes no clicks"),
    ):  # fmt: skip
        found, content = server.try_infer("case3", **options)
        assert found == status and message in json.loads(content)["detail"], (options, found, content)


def test_an_imported_nnunet_answers_under_its_own_label_names(promptable):
    server, root, imported = promptable
    if not imported:
        pytest.skip("dynamic-network-architectures is not installed here or in MONAI Label's environment")
    assert server.info()["models"]["toy"]["labels"] == {"liver": 1, "liver_tumor": 2}
    found = server.infer("case3", root / "nnunet.nii.gz", model="toy")
    expected = ClickRequests(imported, device="cpu")(str(root / "studies/case3.nii.gz"))
    assert (np.asarray(found.dataobj) == expected).mean() > 0.999 and set(np.unique(expected)) == {0, 1, 2}


def test_the_only_image_without_a_label_can_be_asked_for_twice_in_a_second(promptable):
    server, root, _ = promptable
    server.info()
    for image in ("case0", "case1", "case2", "damaged", "series"):
        server.submit(image, root / "labels/case0.nii.gz")
    answers = [json.loads(server.request("/activelearning/random", b"{}"))["id"] for _ in range(5)]
    assert answers == ["case3"] * 5
