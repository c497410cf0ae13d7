"""What the MONAI Label app refuses before anything runs; the server itself is in test_monai_label.py."""

import importlib.util
from pathlib import Path

import pytest

APP = Path(__file__).parents[1] / "custom/tsfm_tools/label_app"


def module(name):
    spec = importlib.util.spec_from_file_location(name, APP / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


checks, bundles = module("label_checks"), module("label_bundles")

OPTIONS = {
    "threshold": 0.5,
    "overlap": 0.5,
    "mirroring": False,
    "targets": ["all", "liver", "liver_tumor"],
    "model_filename": ["model.pt"],
    "device": ["cpu"],
}
DEVICES = ("cpu", "cuda")


def infer(prompts=False, **request):
    return checks.check_inference(request, OPTIONS, DEVICES, prompts)


def train(labels=2, **request):
    return checks.check_training(request, {"max_epochs": 50, "val_split": 0.2, "pretrained": True}, DEVICES, labels)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"threshold": "abc"}, "threshold is 'abc', expected a number"),
        ({"threshold": 7}, "threshold is 7, expected a number above 0 and below 1"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": 10**400}, "threshold is 10+, expected a number"),
        ({"threshold": True}, "threshold is True"),
        ({"overlap": 1.5}, "overlap is 1.5, expected a number from 0 to below 1"),
        ({"mirroring": "perhaps"}, "mirroring is 'perhaps', expected true or false"),
        ({"targets": "livr"}, r"targets is 'livr' \(did you mean 'liver'\?\); choose from: all, liver, liver_tumor"),
        ({"targets": []}, r"targets is \[\]; choose from"),
        ({"targets": ["liver", "spleen"]}, r"targets is \['liver', 'spleen'\]"),
        ({"device": "cuda:9"}, "device is 'cuda:9'.*this server has: cpu, cuda"),
        ({"model_filename": "best.pt"}, "model_filename is 'best.pt'; choose from: model.pt"),
        ({"treshold": 0.3}, r"no option 'treshold' \(did you mean 'threshold'\?\)"),
        ({"foreground": [[1, 2, 3]]}, r"takes no clicks, boxes or scribbles, and the request has \['foreground'\]"),
        ({"result_extension": ".jpg"}, "result_extension is '.jpg'"),
    ],
)
def test_an_inference_that_cannot_be_meant_is_refused(request_, message):
    with pytest.raises(checks.BadRequest, match=message):
        infer(**request_)


def test_what_clients_send_is_taken_as_it_is_meant():
    meant = infer(
        threshold="0.3", overlap=0, mirroring="false", targets=["liver"], foreground=[], client_id="slicer", image="x"
    )
    assert (meant["threshold"], meant["overlap"], meant["mirroring"]) == (0.3, 0, False)
    assert meant["targets"] == ["liver"] and meant["client_id"] == "slicer" and meant["image"] == "x"
    everything = dict(OPTIONS)  # a client that sends back what it was shown
    assert infer(**everything) == everything
    assert infer(threshold="")["threshold"] == 0.5  # a field that was left empty
    assert infer(prompts=True, foreground=[[1, 2, 3]])["foreground"] == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"labels": 0}, "submit labels first"),
        ({"max_epochs": 0}, "max_epochs is 0, expected a whole number from 1"),
        ({"max_epochs": 1.5}, "max_epochs is 1.5"),
        ({"max_epochs": "many"}, "max_epochs is 'many'"),
        ({"val_split": 1}, "val_split is 1, expected a share"),
        ({"val_split": -1}, "val_split is -1"),
        ({"pretrained": "perhaps"}, "pretrained is 'perhaps'"),
        ({"gpus": "0,7"}, "gpus is '0,7'; this server has none"),
        ({"gpus": 0}, "gpus is '0'; this server has none"),
        ({"val_split": 0.8}, "val_split 0.8 leaves none of the 2 labeled images to train on"),
    ],
)
def test_a_training_that_cannot_be_meant_is_refused(request_, message):
    with pytest.raises(checks.BadRequest, match=message):
        train(**request_)


def test_a_training_as_it_is_meant():
    assert train(val_split=0.75)["val_split"] == 0.75  # of two labels one is left
    assert checks.check_training({"gpus": 1}, {}, ["cuda:0", "cuda:1"], 2)["gpus"] == "1"
    meant = train(max_epochs="3", pretrained="False", gpus="all")
    assert (meant["max_epochs"], meant["val_split"], meant["pretrained"]) == (3, 0.2, False)


def test_an_image_that_is_not_there_is_named_with_the_nearest_one(tmp_path):
    with pytest.raises(
        checks.BadRequest, match=r"no image 'case22' on this server \(did you mean 'case2'\?\)"
    ) as refused:
        checks.check_image("", "case22", ["case1", "case2"])
    assert refused.value.status == 404
    checks.check_image(str(tmp_path), "case2", [])


def test_bundles_that_are_served_together_are_told_apart(tmp_path, caplog):
    folders = [tmp_path / part / "tsfm" for part in ("old", "new")]
    for folder in folders:
        for file in ("configs/inference.json", "models/model.pt"):
            (folder / file).parent.mkdir(parents=True)
            (folder / file).touch()
    assert bundles.served_bundles(str(tmp_path), {"models": f"{folders[0]},{folders[0]}"}) == {"tsfm": str(folders[0])}
    with pytest.raises(ValueError, match=r"old.*new.*have one name"):
        bundles.served_bundles(str(tmp_path), {"models": ",".join(map(str, folders))})
    (tmp_path / "app [1]").mkdir()
    folders[0].parent.rename(tmp_path / "app [1]/model")
    assert list(bundles.served_bundles(str(tmp_path / "app [1]"), {})) == ["tsfm"]
    bundles.check_names("tsfm", ["tsfm", "tsfm_deepedit"])
    with pytest.raises(ValueError, match="'tsfm_seg' too, which is another bundle's name"):
        bundles.check_names("tsfm", ["tsfm", "tsfm_seg"])
    assert bundles.common_values({"a": {"liver": 1}, "a_seg": {"liver": 1}}) == {"liver": 1}
    assert bundles.common_values({"a": {"liver": 1}, "b": {"kidney": 1}}) is None and "a and b" in caplog.text
