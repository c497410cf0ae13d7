"""A folder that nnU-Net left becomes weights and a bundle that compute the same; what would differ is refused by name."""

from __future__ import annotations

import itertools
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from tsfm.cases.cases import Preparation
from tsfm.inference.windows import SlabInferer
from tsfm.network.description import fill_in
from tsfm.planning.public_weights import read_folder, read_pretrained
from tsfm.planning.transfer import load_pretrained
from tsfm.training.checkpoint import build_network, load_weights, read_description
from tsfm.training.safe_pickle import read_pickle
from tsfm.training.weight_files import CheckpointError
from tsfm_tools.release.import_nnunet import import_nnunet

models = pytest.importorskip("nnunet_models")
pytest.importorskip("dynamic_network_architectures", reason="pip install --no-deps, see requirements-dev.txt")


def load(model_or_pretrained, tensors=None):
    network = build_network(model_or_pretrained.description)
    missing = network.load_state_dict(tensors or model_or_pretrained.tensors, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"_extra_state"}
    return network.eval()


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_the_same_logits_and_every_tensor_accounted_for(residual, tmp_path):
    theirs = models.unet(residual)
    path = models.write_folder(tmp_path / "model", {0: theirs}, models.plans(residual))
    read = read_pretrained(path)
    network = load(read)
    x = torch.randn(1, 1, *models.PATCH)
    with torch.no_grad():
        torch.testing.assert_close(network(x), theirs(x), atol=1e-5, rtol=1e-5)
        levels = network.train()(x)
    assert [level.shape[2] for level in levels] == [8, 8]
    single = read_pretrained(os.path.join(path, "fold_0", "checkpoint_final.pth"))
    assert single.description == read.description


def test_plans_labels_and_mirroring_travel(tmp_path):
    statistics = models.plans()["foreground_intensity_properties_per_channel"]
    plan = {**models.plans(), "transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]}
    dataset = {**models.DATASET, "labels": {**models.DATASET["labels"], "ignore": 3}}
    path = models.write_folder(
        tmp_path / "m", {"all": models.unet()}, plan, dataset, inference_allowed_mirroring_axes=(0, 1)
    )
    description = read_folder(path).description
    preparation = Preparation.from_dict(description["preparation"])
    assert preparation.orientation == "ikj" and preparation.spacing_mm == (3.0, 1.5, 1.5)
    assert preparation.intensity["CT"]["lower"] == statistics["0"]["percentile_00_5"]
    assert list(description["targets"]) == ["liver", "liver_tumor"] and description["activation"] == "softmax"
    assert description["dataset_labels"][0]["ignore"] == [3] and description["mirror_axes"] == "SP"
    assert description["patch_size"] == models.PATCH and description["epoch"] == 1000


def test_regions_lie_in_one_another_and_are_painted_in_their_order(tmp_path):
    dataset = {**models.DATASET, "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}}
    dataset["regions_class_order"] = [1, 2, 3]
    description = read_folder(
        models.write_folder(tmp_path / "m", {0: models.unet(outputs=3)}, None, dataset)
    ).description
    assert description["targets"] == {"whole": {}, "core": {"inside": "whole"}, "enhancing": {"inside": "core"}}
    assert (
        description["dataset_labels"][0]["labels"]["2"] == ["whole", "core"] and description["activation"] == "regions"
    )
    del description["activation"]  # as imports of earlier versions were
    fill_in(description)
    assert description["activation"] == "regions"


def test_names_of_any_script_are_those_that_a_fine_tuning_gives_them(tmp_path):
    dataset = {**models.DATASET, "labels": {"background": 0, "Léber": 1, "肝 tumor": 2}}
    description = read_folder(models.write_folder(tmp_path / "m", {0: models.unet()}, None, dataset)).description
    assert list(description["targets"]) == ["léber", "肝_tumor"]


@pytest.mark.parametrize(
    ("scheme", "rule"),
    [("ZScoreNormalization", None), ("NoNormalization", "none"), ("RescaleTo01Normalization", "01"), ("RGBTo01Normalization", "rgb")],
)  # fmt: skip
def test_every_normalization_scheme(scheme, rule, tmp_path):
    plan = models.plans(normalization_schemes=[scheme], use_mask_for_norm=[True])
    preparation = read_folder(models.write_folder(tmp_path / "m", {0: models.unet()}, plan)).description["preparation"]
    if rule is None:
        assert preparation["masked"] == {"MR": True} and not preparation["channels"]
    else:
        assert preparation["channels"] == [{"scheme": rule}]


def test_plans_from_before_2_3_1(tmp_path):
    plan, path = models.plans(), tmp_path / "m"
    full = plan["configurations"]["base"]
    del full["architecture"]
    full |= {"UNet_class_name": "PlainConvUNet", "UNet_base_num_features": 4, "unet_max_num_features": 8}
    full |= {"n_conv_per_stage_encoder": [2, 2, 2], "n_conv_per_stage_decoder": [2, 2]}
    full |= {"pool_op_kernel_sizes": models.STRIDES, "conv_kernel_sizes": models.KERNELS}
    theirs = models.unet()
    network = load(read_pretrained(models.write_folder(path, {0: theirs}, plan)))
    x = torch.randn(1, 1, *models.PATCH)
    with torch.no_grad():
        torch.testing.assert_close(network(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_version_1_with_biases_of_zero_its_decoders_kernels_and_its_own_order(tmp_path):
    theirs = models.generic_unet()
    path = models.write_version_1(tmp_path / "m", models.generic_unet_state(theirs))
    read = read_pretrained(path)
    x = torch.randn(1, 1, *models.PATCH)
    with torch.no_grad():
        torch.testing.assert_close(load(read)(x), theirs(x), atol=1e-5, rtol=1e-5)
    assert read.description["preparation"]["resample_first"] and read.description["preparation"]["orientation"] == "kji"
    alone = read_pretrained(os.path.join(path, "fold_0", "model_final_checkpoint.model"))
    assert alone.description == read.description


def test_version_1_has_the_plan_of_the_stage_that_was_trained(tmp_path):
    state = models.generic_unet_state(models.generic_unet())
    plans_of = {
        stage: {
            "patch_size": np.array(models.PATCH), "current_spacing": np.array([spacing] * 3),
            "pool_op_kernel_sizes": models.STRIDES[1:], "conv_kernel_sizes": models.KERNELS,
        }
        for stage, spacing in ((0, 3.0), (1, 1.5))
    }  # fmt: skip
    for stage, spacing in ((0, 3.0), (1, 1.5)):
        path = models.write_version_1(tmp_path / str(stage), state, trained=stage, plans_per_stage=plans_of)
        assert read_folder(path).description["preparation"]["spacing_mm"] == [spacing] * 3
    for stage in (None, 2):
        path = models.write_version_1(tmp_path / f"no{stage}", state, trained=stage, plans_per_stage=plans_of)
        with pytest.raises(CheckpointError, match=rf"stages \[0, 1\], and the one that was trained is {stage}"):
            read_folder(path)


def test_version_1_averages_probabilities_where_version_2_averages_logits(tmp_path):
    torch.manual_seed(2)  # every class wins somewhere, and versions disagree
    theirs, x = models.generic_unet(), torch.randn(1, 1, *models.PATCH)
    torch.nn.init.normal_(theirs.decoder.seg_layers[-1].weight)
    path = models.write_version_1(tmp_path / "m", models.generic_unet_state(theirs))
    read, axes = read_pretrained(path), [some for n in range(4) for some in itertools.combinations((2, 3, 4), n)]
    with torch.no_grad():
        versions = torch.stack([theirs(x.flip(some)).flip(some)[0] for some in axes])
    expected, other = versions.softmax(1).mean(0).argmax(0), versions.mean(0).argmax(0)
    activation, mirror = read.description["activation"], read.description["mirror_axes"]
    options = {"activation": activation, "mirror": mirror, "amp": False, "progress": False, "doubts": True}
    inferer = SlabInferer(models.PATCH, list(read.description["targets"]), **options)
    found = inferer(x, load(read))[0, 0]
    assert (found == expected).float().mean() > 0.9999 and (expected != other).float().mean() > 0.005
    assert all(0 < one["agreement"] < 1 and 0 < one["entropy"] < 1 for one in inferer.quality.values())


def test_version_1_keeps_the_fold_of_all_cases_in_a_folder_named_all(tmp_path):
    path = models.write_version_1(tmp_path / "m", models.generic_unet_state(models.generic_unet()))
    os.rename(os.path.join(path, "fold_0"), os.path.join(path, "all"))
    assert list(read_folder(path).folds) == list(read_folder(path, folds="all").folds) == ["all"]


def test_older_plans_of_version_1_count_the_halvings_of_each_axis_and_have_kernels_of_three(tmp_path):
    theirs = models.generic_unet(kernel_sizes=[[3, 3, 3]] * 3)
    stage = {"patch_size": models.PATCH, "current_spacing": [3.0, 1.5, 1.5], "num_pool_per_axis": [1, 2, 2]}
    path = models.write_version_1(tmp_path / "m", models.generic_unet_state(theirs), plans_per_stage={0: stage})
    network = read_folder(path).description["network"]
    assert network["strides"] == models.STRIDES[1:] and network["kernel_sizes"] == [[3, 3, 3]] * 3


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ({"preprocessor_name": "PreprocessorFor3D_NoResampling"}, "'PreprocessorFor3D_NoResampling' is unknown"),
        ({"segmentation_export_params": {"interpolation_order": 3}}, "'interpolation_order': 3.* is not done here"),
    ],
)
def test_other_preprocessing_of_version_1_is_refused(plans, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        read_folder(models.write_version_1(tmp_path / "m", models.generic_unet_state(models.generic_unet()), **plans))


def test_trainers_of_version_1_without_mirroring_and_with_another_nonlinearity(tmp_path):
    state = models.generic_unet_state(models.generic_unet())
    for name in ("nnUNetTrainerV2_noMirroring", "nnUNetTrainerV2_noDataAugmentation", "nnUNetTrainerV2_DA5"):
        description = read_folder(models.write_version_1(tmp_path / name, state, name)).description
        assert description["mirror_axes"] == ("SPL" if name.endswith("DA5") else "")
    with pytest.raises(CheckpointError, match="trainer 'nnUNetTrainerV2_Mish' is unknown"):
        read_folder(models.write_version_1(tmp_path / "mish", state, "nnUNetTrainerV2_Mish"))


def test_version_1s_statistics_per_case_within_a_window_are_refused(tmp_path):
    path = models.write_version_1(
        tmp_path / "m", models.generic_unet_state(models.generic_unet()), normalization_schemes={0: "CT2"}
    )
    with pytest.raises(CheckpointError, match="normalization 'CT2' is unknown"):
        read_folder(path)


BAD_PLANS = {
    "previous_stage": ("3d_lowres", "second stage of a cascade"),
    "patch_size": ([64, 64], "two-dimensional"),
    "preprocessor_name": ("MyPreprocessor", "MyPreprocessor"),
    "resampling_fn_data": ("resample_torch_fornnunet", "resample_torch_fornnunet"),
    "resampling_fn_data_kwargs": ({"is_seg": False, "order": 1}, "resampling of data .*'order': 1"),
    "resampling_fn_probabilities_kwargs": ({"is_seg": False, "order": 3}, "resampling of probabilities .*'order': 3"),
    "normalization_schemes": (["MyNormalization"], "MyNormalization"),
}


@pytest.mark.parametrize("key", BAD_PLANS)
def test_what_would_be_done_differently_is_refused_by_name(key, tmp_path):
    value, message = BAD_PLANS[key]
    path = models.write_folder(tmp_path / "m", {0: models.unet()}, models.plans(**{key: value}))
    with pytest.raises(CheckpointError, match=message):
        read_folder(path)


@pytest.mark.parametrize("name", ["nnUNetTrainerBN", "nnUNetTrainerUMambaBot", "nnUNetTrainer_Primus_M_Trainer"])
def test_trainers_with_a_network_of_their_own_are_refused_unless_trusted(name, tmp_path):
    path = models.write_folder(tmp_path / "m", {0: models.unet()}, trainer_name=name)
    with pytest.raises(CheckpointError, match=f"trainer '{name}' is unknown"):
        read_folder(path)
    assert read_folder(path, trainer=name).folds


@pytest.mark.parametrize(
    "name",
    [
        "nnUNetTrainer_4000epochs_NoMirroring",
        "nnUNetTrainerDA5",
        "nnUNetTrainerDiceCELoss_noSmooth",
        "nnUNetTrainerAdam",
    ],
)
def test_trainers_that_only_train_otherwise_are_known(name, tmp_path):
    assert read_folder(models.write_folder(tmp_path / "m", {0: models.unet()}, trainer_name=name)).folds


def test_readers_networks_folds_and_foreign_folders_are_refused(tmp_path):
    path = models.write_folder(
        tmp_path / "m", {0: models.unet()}, {**models.plans(), "image_reader_writer": "Tiff3DIO"}
    )
    with pytest.raises(CheckpointError, match="Tiff3DIO"):
        read_folder(path)
    with pytest.raises(CheckpointError, match=r"no checkpoint_final\.pth in fold_1.*found folds: 0"):
        read_folder(path, folds=[0, 1])
    with pytest.raises(CheckpointError, match="no model folder of nnU-Net 2"):
        read_folder(str(tmp_path))
    path = models.write_folder(tmp_path / "damaged", {0: models.unet()})
    Path(path, "plans.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"plans\.json is not valid JSON"):
        read_folder(path)
    wider = models.plans(residual=True)
    with pytest.raises(CheckpointError, match="does not fit the plans"):
        read_folder(models.write_folder(tmp_path / "n", {0: models.unet()}, wider))
    plan = models.plans()
    plan["configurations"]["base"]["architecture"]["network_class_name"] = "my_code.MyNet"
    with pytest.raises(CheckpointError, match="'MyNet' cannot be imported"):
        read_folder(models.write_folder(tmp_path / "o", {0: models.unet()}, plan))


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/tsfm_evil",)


def test_pickles_with_code_in_them_are_refused_by_the_name_of_the_global_and_not_run(tmp_path):
    path = models.write_folder(tmp_path / "m", {0: models.unet()}, logging={"evil": Evil()})
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        read_folder(path)
    old = models.write_version_1(tmp_path / "old", models.generic_unet_state(models.generic_unet()))
    with open(os.path.join(old, "fold_0", "model_final_checkpoint.model.pkl"), "wb") as file:
        pickle.dump({"name": Evil()}, file)
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        read_folder(old)
    assert not os.path.exists("/tmp/tsfm_evil")


class Reduced:
    """Pickled as a call of `parts`."""

    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        return self.parts


def test_pickled_numbers_and_arrays_are_what_they_were_and_types_with_pointers_are_refused(tmp_path):
    content = {
        "big": np.arange(6, dtype=">i4").reshape(2, 3), "fortran": np.asfortranarray(np.eye(3)[:2]), "zero": np.array(5),
        "none": np.zeros((0, 3), np.float32), "texts": np.array(["a", "bcd"]), "bytes": np.array([b"a", b"bc"]),
        "truth": np.bool_(True), "number": np.float32(0.1), "text": np.str_("abc"), "complex": np.complex64(1 + 2j),
    }  # fmt: skip
    path = str(tmp_path / "a.pkl")
    for protocol in (3, 4):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
        found = read_pickle(path)
        for name, value in content.items():
            np.testing.assert_array_equal(found[name], value)
            assert found[name].dtype == value.dtype.newbyteorder("=") and found[name].shape == value.shape
    scalar, (reconstruct, begin, _) = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()
    flagged = Reduced(np.dtype, ("f8", False, True), (3, "<", None, ("a",), {"a": (np.dtype("f8"), 0)}, 8, 8, 27))
    kinds = [Reduced(np.dtype, (kind, False, True)) for kind in ("O8", "(2,)O", "V8", "M8[s]", "f8,O")]
    evil = [Reduced(scalar, (kind, b"A" * 8)) for kind in [*kinds, flagged]]
    evil += [Reduced(reconstruct, begin, (1, (1,), kinds[0], False, [0])), np.array([{}])]
    evil += [
        Reduced(np.ndarray, ((1 << 40,),)),
        Reduced(reconstruct, begin, (1, (-2, -2), np.dtype("u1"), False, b"AAAA")),
    ]
    for value in evil:
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(value, 2))
        with pytest.raises(CheckpointError, match=r"a\.pkl is refused"):
            read_pickle(path)


def test_softmax_paints_the_largest_logit_of_the_mean_over_folds(tmp_path):
    folds, x = {0: models.unet(), 1: models.unet()}, torch.randn(1, 1, *models.PATCH)
    with torch.no_grad():
        for fold in folds.values():  # every class wins somewhere
            fold.decoder.seg_layers[-1].bias -= fold(x).mean((0, 2, 3, 4))
    path = models.write_folder(tmp_path / "m", folds)
    bundle = import_nnunet(path, str(tmp_path / "out"), name="toy")
    weights = os.path.join(bundle, "models", "model.pt")
    description = read_description(weights)
    network = build_network(description).eval()
    load_weights(network, weights)
    with torch.no_grad():
        logits = torch.stack([fold(x) for fold in folds.values()]).mean(0)
        torch.testing.assert_close(network(x), logits, atol=1e-5, rtol=1e-5)
    names = list(description["targets"])
    inferer = SlabInferer(models.PATCH, names, activation="softmax", amp=False, progress=False)
    found = inferer(x, network)[0, 0]
    assert (found == logits[0].argmax(0)).float().mean() > 0.9999 and len(np.unique(found)) == 3
    only = SlabInferer(models.PATCH, names, activation="softmax", amp=False, progress=False, targets=names[1])
    assert torch.equal(only(x, network)[0, 0], torch.where(found == 2, found, 0))


def test_the_bundle_says_what_it_is_and_carries_the_package(tmp_path):
    path = models.write_folder(tmp_path / "m", {0: models.unet(), 3: models.unet()})
    bundle = import_nnunet(path, str(tmp_path), "toy")
    with open(os.path.join(bundle, "configs", "metadata.json"), encoding="utf-8") as file:
        metadata = json.load(file)
    assert metadata["required_packages_version"]["dynamic-network-architectures"] == "0.4.4"
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"]["2"] == "liver_tumor"
    with open(os.path.join(bundle, "configs", "inference.json"), encoding="utf-8") as file:
        assert json.load(file)["displayable_configs"]["mirroring"] is True
    assert os.path.isfile(os.path.join(bundle, "tsfm", "network", "networks.py"))


def test_version_1_becomes_a_bundle_and_its_postprocessing_is_said_to_be_left_out(tmp_path, capsys):
    path = models.write_version_1(tmp_path / "m", models.generic_unet_state(models.generic_unet()))
    Path(path, "postprocessing.json").write_text("{}")
    description = read_description(os.path.join(import_nnunet(path, str(tmp_path), "toy"), "models", "model.pt"))
    assert description["activation"] == "probabilities" and list(description["targets"]) == ["label_1", "label_2"]
    assert "postprocessing.json is left out" in capsys.readouterr().out


def test_fine_tuning_starts_from_one_fold_its_heads_relative_to_the_background(tmp_path):
    folds = {0: models.unet(), 3: models.unet()}
    bundle = import_nnunet(models.write_folder(tmp_path / "m", folds), str(tmp_path), "toy")
    path = os.path.join(bundle, "models", "model.pt")
    network = build_network(read_pretrained(path).description, out_channels=2)
    network.description["targets"] = {"liver_tumor": {}, "spleen": {}}
    report = load_pretrained(network, path)
    assert (
        report.targets["taken over"] == ["liver_tumor"] and "first of 2" in report.mismatches[0] and not report.unused
    )
    x = torch.randn(1, 1, *models.PATCH)
    with torch.no_grad():
        theirs = folds[0](x)
        torch.testing.assert_close(network.eval()(x)[:, 0], theirs[:, 2] - theirs[:, 0], atol=1e-5, rtol=1e-5)
