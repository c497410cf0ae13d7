"""What the bundles declare: the two share everything they can, and hold what MONAI and the paper ask for."""

import ast
import copy
import json
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.transforms import RandFlipd
from tsfm.inference.prediction import chosen_axes, chosen_flag, chosen_modality, chosen_targets
from tsfm.inference.probabilities import Probabilities, kept_probabilities
from tsfm.labels import LabelTable
from tsfm.network.networks import create_network
from tsfm.planning.own_data import default_pretrained
from tsfm_tools.release.fitting import merge_overlay

PRETRAIN, FINETUNE = (ROOT / "bundles" / name for name in ("tsfm_pretrain", "tsfm_finetune"))
BUNDLES = (PRETRAIN, FINETUNE)

# What one bundle declares otherwise than the other, line by line: everything else is the same.
AS_A_WHOLE = {"network_def", "parameters", "in_channels", "planned"}
TRAIN_DIFFERS = {
    *("_desc_", "pool_file", "epochs", "learning_rate", "patch_size", "spacing_mm", "batch_size", "network_def"),
    *(
        "settings#pool",
        "settings#warmup_epochs",
        "pool#_target_",
        "parameters",
        "optimizer#weight_decay",
        "patch",
        "batch",
    ),
    *("network_size", "planned", "preparation#spacing_mm", "train#handlers"),
    *("loaded_network#_target_", "described_network#network"),
}
ONLY_PRETRAIN_TRAINS = {
    *("datasets", "allow_missing", "pool#datasets", "pool#allow_missing"),
    *("initial_weights", "loaded_network#path", "loaded_network#licence", "settings#initial_weights"),
}
ONLY_FINETUNE_TRAINS = {
    *("images", "labels", "label_ids", "regions", "modality", "from_scratch", "freeze"),
    *(f"pretrained#{key}" for key in ("_target_", "dataset_dir", "ckpt_dir", "raw_data")),
    *("head_learning_rate", "encoder_learning_rate", "in_channels", "loss#reduction"),
    *("plan", "memory_gb", "step_seconds"),
    *(f"loaded_network#{key}" for key in ("pool", "preparation", "pretrained", "output_dir")),
    *(f"frozen_network#{key}" for key in ("_target_", "network", "what")),
    *(f"settings#{key}" for key in ("pretrained", "from_scratch", "freeze", "clicks")),
    *(f"settings#{key}" for key in ("head_learning_rate", "encoder_learning_rate")),
    *(f"pool#{key}" for key in ("images", "labels", "label_ids", "regions", "modality", "pretrained")),
    *("preparation#in_channels", "preparation#pretrained"),
}
EVALUATE_DIFFERS = {"pool_file", "pool#_target_"}
ONLY_PRETRAIN_EVALUATES = {"datasets", "allow_missing", "pool#datasets", "pool#allow_missing"}
ONLY_FINETUNE_EVALUATES = {
    *("images", "labels", "label_ids", "regions"),
    *(f"pool#{key}" for key in ("images", "labels", "label_ids", "regions", "modality", "pretrained")),
}

KNOBS = (
    *("dataset_dir", "pool_file", "store_dir", "output_dir", "epochs", "iterations_per_epoch", "batch_size"),
    *("patch_size", "learning_rate", "val_interval", "num_workers", "device", "amp", "seed", "fold"),
)
TRAIN_IDS = (
    *("bundle_root", "device", "dataset_dir", "network_def", "network", "val_interval", "initialize", "run"),
    *(f"train#{key}" for key in ("trainer", "dataset", "dataset#data", "dataloader", "inferer", "handlers")),
    *("train#trainer#max_epochs", "train#preprocessing"),
    *(f"validate#{key}" for key in ("evaluator", "handlers", "dataset", "dataset#data", "key_metric")),
)
INFERENCE_IDS = (
    *("bundle_root", "device", "dataset_dir", "output_dir", "dataset", "dataloader", "network_def", "inferer"),
    *("preprocessing", "postprocessing", "handlers", "evaluator", "handlers#0#path", "run"),
)
EVALUATES_OTHERWISE = {
    *("_desc_", "checkpoint", "output_dir", "existing", "threshold", "overlap", "mirror", "modality", "targets"),
    *("dataset", "handlers", "evaluator"),
}
EXPLAINED = ("preprocessing", "dataset", "sampler")


def config(bundle, name):
    return json.loads((bundle / "configs" / name).read_text())


def lines(value, prefix=""):
    """Id -> value of every leaf, as `#`-joined ids; a list is one leaf."""
    if isinstance(value, dict) and prefix.rstrip("#") not in AS_A_WHOLE:
        return {key: leaf for name, part in value.items() for key, leaf in lines(part, f"{prefix}{name}#").items()}
    return {prefix.rstrip("#"): value}


def differences(name):
    """(ids whose lines differ, ids that only the pretraining has, ids that only the fine-tuning has)."""
    one, two = (lines(config(bundle, name)) for bundle in BUNDLES)
    differs = {key for key in one.keys() & two.keys() if one[key] != two[key]}
    return differs, one.keys() - two.keys(), two.keys() - one.keys()


@pytest.mark.parametrize(
    ("name", "differs", "only_pretrain", "only_finetune"),
    [
        ("train.json", TRAIN_DIFFERS, ONLY_PRETRAIN_TRAINS, ONLY_FINETUNE_TRAINS),
        ("evaluate.json", EVALUATE_DIFFERS, ONLY_PRETRAIN_EVALUATES, ONLY_FINETUNE_EVALUATES),
        ("inference.json", set(), set(), set()),
        ("multi_gpu_train.json", set(), set(), set()),
        ("fsdp_train.json", set(), set(), set()),
        ("keep_sides.json", set(), set(), set()),
        *((f"{name}.json", set(), set(), set()) for name in ("swinunetr", "stunet")),
        ("nnunet.json", set(), set(), {"memory_gb"}),
        ("nnunet_resenc.json", {"_desc_"}, set(), {"memory_gb"}),
    ],
)
def test_both_bundles_declare_the_same_but_for_what_is_listed_here(name, differs, only_pretrain, only_finetune):
    assert differences(name) == (differs, only_pretrain, only_finetune)


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
def test_evaluate_json_stands_alone_and_segments_as_inference_json_does(bundle):
    """It lies over train.json too, so it repeats what it needs: whoever changes one changes the other."""
    inference, evaluate = config(bundle, "inference.json"), config(bundle, "evaluate.json")
    repeated = (inference.keys() & evaluate.keys()) - EVALUATES_OTHERWISE
    assert {key: evaluate[key] for key in repeated} == {key: inference[key] for key in repeated}
    assert {"network_def", "preprocessing", "inferer", "postprocessing", "run"} <= repeated
    scored = {"table": "@pool_table", "annotated_only": True}
    assert evaluate["evaluator"] == {**inference["evaluator"], **scored}
    assert {**evaluate["dataset"], "data": 0} == {**inference["dataset"], "data": 0, "output_dir": None}
    assert evaluate["handlers"][0] == inference["handlers"][0]
    known = {*evaluate, "bundle_root", "dataset_dir", "device", "amp"}  # these four are in train.json as well
    named = set(re.findall(r"@(\w+)", json.dumps(evaluate)))
    assert named <= known, named - known


def test_zero_shot_renumbers_what_is_post_processed_and_tells_the_saver_whose_numbers_they_are():
    steps, changed = (config(BUNDLES[1], name) for name in ("evaluate.json", "zero_shot.json"))
    process, _, save = steps["postprocessing"]["transforms"]
    first, renumber = changed["postprocessing#transforms#0"]["transforms"]
    assert first == process and renumber["_target_"].endswith("RenumberTargetsd")
    assert save["_target_"].endswith("SaveResultsd") and changed["postprocessing#transforms#2#table"] == "@pool_table"


def test_the_handlers_are_the_same_but_for_the_forecast_of_the_plan():
    first, second = (config(bundle, "train.json")["train"]["handlers"] for bundle in BUNDLES)
    assert [handler for handler in second if handler["_target_"] != "tsfm.planning.forecast.Forecast"] == first


def test_the_order_of_declarations_is_the_same():
    for name in ("train.json", "evaluate.json"):
        first, second = (list(config(bundle, name)) for bundle in BUNDLES)
        assert [key for key in first if key in second] == [key for key in second if key in first]


def mirrors(train):
    """(axis, probability) of the random flips of a train.json."""
    compose = ConfigParser(train).get_parsed_content("train#preprocessing")
    return [(one.flipper.spatial_axis, one.prob) for one in compose.transforms if isinstance(one, RandFlipd)]


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
def test_keep_sides_switches_off_the_mirror_along_left_right_and_nothing_else(bundle):
    plain = config(bundle, "train.json")
    sides = merge_overlay(copy.deepcopy(plain), config(bundle, "keep_sides.json"))
    assert mirrors(plain) == [(0, 0.5), (1, 0.5), (2, 0.5)]
    assert mirrors(sides) == [(0, 0.5), (1, 0.5), (2, 0.0)]
    assert sides["train"] == plain["train"]
    assert sides["described_network"]["mirror_axes"] == "@mirror_axes"  # inference with these weights knows it too
    assert {**sides, "mirror_axes": "SPL"} == plain


def test_logging_is_the_same():
    assert (PRETRAIN / "configs/logging.conf").read_text() == (FINETUNE / "configs/logging.conf").read_text()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "bundles").glob("*/configs/*.json")), ids=lambda path: f"{path.parts[-3]}-{path.name}"
)
def test_json_is_indented_by_four(path):
    text = path.read_text()
    assert text.rstrip("\n") == json.dumps(json.loads(text), indent=4)


def expressions(value):
    """Every `$` expression in a config."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = [value] if isinstance(value, str) and value.startswith("$") else []
    return own + [found for part in parts for found in expressions(part)]


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
def test_configs_can_be_read_aloud(bundle):
    for path in (bundle / "configs").glob("*.json"):
        assert [text for text in expressions(json.loads(path.read_text())) if len(text) > 120] == [], path.name
    train = config(bundle, "train.json")
    for part in (train["store"], train["prepare_cases"], *(train["train"][key] for key in EXPLAINED)):
        assert part["_desc_"]
    words = train["store"]["_desc_"] + train["train"]["dataset"]["_desc_"]
    assert all(word in words for word in ("spacing", "orient", "crop", "rotation"))


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
def test_knobs_and_the_ids_of_monai_and_monai_label_stand_there_literally(bundle):
    for name, wanted in (("train.json", (*KNOBS, *TRAIN_IDS)), ("inference.json", INFERENCE_IDS)):
        parser = ConfigParser(config(bundle, name))
        assert [key for key in wanted if parser.get(key, "absent") == "absent"] == []
    train, inference = config(bundle, "train.json"), config(bundle, "inference.json")
    assert set(KNOBS) <= set(train)
    assert isinstance(train["train"]["handlers"], list) and isinstance(inference["handlers"], list)
    assert isinstance(inference["displayable_configs"], dict)
    assert (bundle / "LICENSE").is_file() and (bundle / "configs/multi_gpu_train.json").is_file()
    for word in ("detection", "classification", "deepedit", "deepgrow"):
        assert word not in bundle.name
    # MONAI Label replaces the device by a string, and drops SaveImaged by its class
    assert "@device." not in json.dumps(inference) and "Invertd" in json.dumps(inference["postprocessing"])


def test_a_gpu_computes_two_windows_at_a_time():
    """That takes a quarter less time on an H100 (docs/gpu.md); where two do not fit, one goes at a time."""
    for device, expected in (("cuda", 2), ("cpu", 1), (torch.device("cuda", 1), 2)):
        parser = ConfigParser({**config(PRETRAIN, "inference.json"), "device": device})
        assert parser.get_parsed_content("sw_batch_size") == expected


def test_an_inference_that_names_a_targets_choice_says_so_in_one_place():
    """The knobs of the command line and of 3D Slicer are one: the plain ids read the displayable ones."""
    inference = config(PRETRAIN, "inference.json")
    assert set(inference["displayable_configs"]) == {"threshold", "mirroring", "overlap", "targets", "normalize_as"}
    for name in ("threshold", "mirror", "overlap", "targets", "modality"):
        assert "@displayable_configs#" in json.dumps(inference[name])


def test_a_choice_of_targets_and_modality_is_what_slicer_or_the_command_line_sends():
    trained = ["liver", "spleen"]
    for everything in ("all", ["all", *trained], ["spleen", "all"]):
        assert chosen_targets(everything, trained) == trained
    assert chosen_targets("spleen", trained) == chosen_targets(("spleen",), trained) == ["spleen"]
    assert chosen_modality("MR") == "MR" and chosen_modality(["CT", "MR"]) is None
    assert [chosen_flag(text) for text in ("false", "False", False, 0, "true", True)] == [False] * 4 + [True] * 2
    with pytest.raises(ValueError, match="'maybe' is neither true nor false"):
        chosen_flag("maybe")


def test_what_configs_leave_open_follows_from_weights_outputs_and_data(tmp_path):
    assert chosen_axes(True, {"mirror_axes": "SP"}) == "SP" and chosen_axes(True, {}) == "SPL"
    assert chosen_axes(False, {"mirror_axes": "SP"}) is False and chosen_axes("L", {"mirror_axes": "SP"}) == "L"
    assert kept_probabilities(tmp_path, "label_map") is kept_probabilities(tmp_path, ["label_map", "dicom_seg"]) is None
    for save in ("probabilities", ["label_map", "uncertainty"]):
        assert isinstance(kept_probabilities(tmp_path, save), Probabilities)
    assert default_pretrained(str(tmp_path), "models") is default_pretrained("gone", "models", raw_data=False) is None
    assert Path(default_pretrained(str(tmp_path / "gone"), "models")) == Path("models/model.pt")


def test_pretraining_declares_the_papers_numbers():
    train = config(PRETRAIN, "train.json")
    assert train["optimizer"] == {
        "_target_": "torch.optim.SGD", "params": "@parameters", "lr": "@learning_rate", "momentum": 0.99,
        "nesterov": True, "weight_decay": 1e-3, "fused": "$torch.device(@device).type == 'cuda'",
    }  # fmt: skip
    assert train["lr_scheduler"]["power"] == 0.9 and train["learning_rate"] == 1e-3
    assert (train["batch_size"], train["iterations_per_epoch"], train["epochs"]) == (2, 250, 1000)
    assert train["patch_size"] == [112, 160, 192] and train["train"]["step"]["clip_norm"] == 12
    assert train["amp"] is True


def test_finetuning_declares_nnunets_defaults():
    train = config(FINETUNE, "train.json")
    optimizer = train["optimizer"]
    assert (optimizer["momentum"], optimizer["nesterov"], optimizer["weight_decay"]) == (0.99, True, 3e-5)
    assert train["learning_rate"] == 1e-2 and train["lr_scheduler"]["power"] == 0.9
    assert (train["batch_size"], train["iterations_per_epoch"], train["val_iterations"]) == ("auto", 250, 50)
    assert train["spacing_mm"] == train["patch_size"] == "auto" and train["ct_normalization"] == "fingerprint"
    assert train["freeze"] == "none" and train["warmup_epochs"] == 0


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
def test_the_augmentation_is_the_one_that_is_compared_with_nnunet(bundle):
    checked = json.loads((Path(__file__).parent / "fixtures/augmentation.json").read_text())
    assert config(bundle, "train.json")["train"]["preprocessing"]["transforms"] == checked


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
def test_the_label_maps_table_in_the_metadata_is_the_pools(bundle):
    table = LabelTable.from_dict(config(PRETRAIN, "pool.json"))
    formats = config(bundle, "metadata.json")["network_data_format"]
    pred = formats["outputs"]["pred"]
    assert pred["channel_def"] == table.channel_def()
    assert pred["num_channels"] == len(table.names)
    assert next(iter(formats["inputs"])) == "image" and next(iter(formats["outputs"])) == "pred"
    assert all(name == name.lower() for name in pred["channel_def"].values())
    assert list(pred["channel_def"]) == [str(value) for value in range(len(table.names) + 1)]


DISTRIBUTIONS = {"ignite": "pytorch-ignite", "cc3d": "connected-components-3d"}  # where the import has another name
OPTIONAL = {"highdicom", "pydicom"}  # for --save dicom_seg, with a sentence where they are absent


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
def test_the_metadata_names_every_package_that_tsfm_imports(bundle):
    imported = set()
    for path in (ROOT / "custom/tsfm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module)
            imported |= {name.split(".")[0] for name in names}
    packages = imported - set(sys.stdlib_module_names) - {"tsfm", "torch", "monai", "numpy"} - OPTIONAL
    declared = config(bundle, "metadata.json")["required_packages_version"]
    assert {DISTRIBUTIONS.get(name, name) for name in packages} - set(declared) == set()


def test_the_declared_network_has_1600_million_parameters():
    declared = {key: value for key, value in config(PRETRAIN, "train.json")["network_def"].items() if key[0] != "_"}
    declared |= {"out_channels": 31, "img_size": [112, 160, 192], "deep_supervision": True, "checkpointing": True}
    assert declared.pop("plan") == "@planned" and config(PRETRAIN, "train.json")["network_size"] is None
    with torch.device("meta"):
        network = create_network(**declared)
    assert 1.56e9 < sum(parameter.numel() for parameter in network.parameters()) < 1.64e9


@pytest.mark.parametrize(
    ("size", "least", "most"), [("s", 1e6, 4e6), ("b", 4e7, 6e7), ("l", 3e8, 5e8), ("h", 1.5e9, 1.7e9)]
)
def test_tsfm_comes_in_four_sizes_in_both_bundles(size, least, most):
    overlay = config(FINETUNE, f"tsfm_{size}.json")
    assert overlay["network_size"] == f"tsfm_{size}" and set(overlay) == {"_desc_", "network_size"}
    train = merge_overlay(config(PRETRAIN, "train.json"), config(PRETRAIN, f"tsfm_{size}.json"))
    parser = ConfigParser({**train, "bundle_root": str(PRETRAIN)})
    with torch.device("meta"):
        network = parser.get_parsed_content("network_def")
    assert least < sum(parameter.numel() for parameter in network.parameters()) < most
    assert network.description["network"]["strides"] == [[2, 2, 2]] * 4 + [[1, 2, 2]]


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
@pytest.mark.parametrize("kind", ["train", "infer"])
def test_monai_finds_every_property_of_a_workflow(bundle, kind, pretrained, phantom_pool, tiny, tmp_path):
    """`check_properties` instantiates what it names: with files in place, nothing is missing."""
    files = {"train": ["train.json"], "infer": ["inference.json"]}[kind]
    settings = {"output_dir": str(tmp_path / "out"), "bundle_root": str(bundle), "device": "cpu"}
    if kind == "infer":
        settings |= {
            "checkpoint": str(pretrained / "model.pt"),
            "dataset_dir": str(phantom_pool / "Task03_Liver/imagesTr"),
        }
    elif bundle == PRETRAIN:
        settings |= {"dataset_dir": str(phantom_pool), "store_dir": str(tmp_path / "store"), "allow_missing": True}
        files.append(tiny)
    else:
        settings |= {
            "dataset_dir": str(phantom_pool / "Task03_Liver"),
            "store_dir": str(tmp_path / "store"),
            "num_workers": 0,
        }
        settings["pretrained"] = str(pretrained / "model.pt")
    workflow = ConfigWorkflow(
        config_file=[str(bundle / "configs" / name) if "/" not in name else name for name in files],
        meta_file=str(bundle / "configs/metadata.json"), logging_file=str(bundle / "configs/logging.conf"),
        workflow_type=kind, **settings,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        workflow.initialize()
        assert workflow.check_properties() == []
