"""Whole runs of inference.json and evaluate.json: folders with bad files, odd grids, knobs, scores."""

import csv
import json
import shutil

import blosc2
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, run_bundle, write_dicom
from monai.bundle import ConfigParser
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from tsfm.cases.folders import read_report
from tsfm.cases.pool import DatasetPool
from tsfm.cases.splits import case_digests
from tsfm.errors import first_cause
from tsfm.evaluation.evaluation import items_to_score
from tsfm.inference.prediction import FailedCases
from tsfm.inference.windows import mirrored_axes
from tsfm.training.checkpoint import build_network, load_weights, read_description, save_weights
from tsfm.training.weight_files import CheckpointError
from tsfm_tools.paper import grids as experiments

pytestmark = pytest.mark.convolutions

BUNDLE = ROOT / "bundles/tsfm_pretrain"


@pytest.fixture(scope="module")
def case(phantom_pool):
    """One CT of the phantom pool, as nibabel gives it."""
    return nib.load(sorted((phantom_pool / "Task03_Liver/imagesTr").glob("*.nii.gz"))[0])


@pytest.fixture
def segment(pretrained, tmp_path):
    """Runs inference.json; returns the folder of results."""

    def run(source, configs=("inference.json",), out=None, **settings):
        out = out or tmp_path / "out"
        options = {"checkpoint": str(pretrained / "model.pt"), "dataset_dir": str(source), "output_dir": str(out)}
        experiments.run_bundle(BUNDLE, list(configs), **{**options, "device": "cpu", "progress": False, **settings})
        return out

    return run


def voxels(path):
    return np.asarray(nib.load(path).dataobj)


def turned(image, axes):
    """The same image with its array axes in another order and direction; the affine follows."""
    turn = ornt_transform(io_orientation(image.affine), axcodes2ornt(axes))
    array = apply_orientation(np.asarray(image.dataobj), turn)
    return nib.Nifti1Image(np.ascontiguousarray(array), image.affine @ inv_ornt_aff(turn, image.shape))


def oblique(image, degrees=7):
    angle = np.deg2rad(degrees)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return nib.Nifti1Image(np.asarray(image.dataobj), turn @ image.affine)


# ---- the image's own grid --------------------------------------------------------------------------------------------


def test_every_orientation_comes_back_on_its_own_grid_and_shows_the_same(case, segment, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    images = {axes: turned(case, axes) for axes in ("RAS", "LPS", "SPL", "PIR", "ASR")} | {"oblique": oblique(case)}
    for name, image in images.items():
        nib.save(image, folder / f"{name}.nii.gz")
    out = segment(folder, threshold=0.45)
    reference = voxels(out / "RAS.nii.gz")
    assert len(np.unique(reference)) > 2, "the map has to show something for this test to mean anything"
    for name, image in images.items():
        result = nib.load(out / f"{name}.nii.gz")
        assert result.shape == image.shape and result.get_data_dtype() == np.uint8
        np.testing.assert_allclose(result.affine, image.affine, atol=1e-4)
        back = turned(result, "RAS")
        if name == "oblique":
            back = nib.Nifti1Image(np.asarray(back.dataobj), np.eye(4))
        assert np.mean(np.asarray(back.dataobj) != reference) < 1e-3, name


def test_a_single_file_with_spaces_and_letters_beyond_ascii(case, segment, tmp_path):
    path = tmp_path / "Über Größe 肝臓" / "Fall 1 (nativ).nii.gz"
    path.parent.mkdir()
    nib.save(case, path)
    out = segment(path, out=tmp_path / "Ergebnis für 肝臓")
    assert sorted(file.name for file in out.iterdir()) == ["Fall 1 (nativ).nii.gz", "report.json", "run.log"]


def test_a_dicom_series_gives_the_map_of_the_same_voxels_in_nifti(case, segment, tmp_path):
    folder = tmp_path / "studies"
    hu = np.round(turned(case, "LPS").dataobj).astype(np.int16)
    spacing = [float(mm) for mm in case.header.get_zooms()]
    write_dicom(folder / "patient 1", hu, spacing)
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1])
    affine[:2, 3] = -1, -2
    nib.save(nib.Nifti1Image(hu, affine), folder / "same.nii.gz")
    out = segment(folder, threshold=0.45)
    dicom, nifti = nib.load(out / "patient 1.nii.gz"), nib.load(out / "same.nii.gz")
    assert len(np.unique(nifti.dataobj)) > 2
    np.testing.assert_allclose(dicom.affine, affine, atol=1e-3)
    np.testing.assert_array_equal(dicom.dataobj, nifti.dataobj)


def test_a_datalist_names_the_cases_relative_to_itself(case, segment, tmp_path):
    nib.save(case, tmp_path / "a.nii.gz")
    nib.save(case, tmp_path / "b.nii")
    datalist = {"testing": [{"image": "a.nii.gz", "case": "first"}, "b.nii"]}
    (tmp_path / "list.json").write_text(json.dumps(datalist))
    out = segment(tmp_path / "list.json")
    assert sorted(file.name for file in out.iterdir()) == ["b.nii.gz", "first.nii.gz", "report.json", "run.log"]
    assert np.array_equal(voxels(out / "first.nii.gz"), voxels(out / "b.nii.gz"))


# ---- bad files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def bad_folder(case, tmp_path):
    """A good case among seven that cannot be segmented."""
    folder = tmp_path / "in"
    folder.mkdir()
    array, affine = np.asarray(case.dataobj).astype(np.float32), case.affine
    nib.save(case, folder / "good.nii.gz")
    nib.save(case, folder / "truncated.nii.gz")
    (folder / "truncated.nii.gz").write_bytes((folder / "truncated.nii.gz").read_bytes()[:5000])
    (folder / "empty.nii.gz").write_bytes(b"")
    broken = array.copy()
    broken[2, 3, 4] = np.nan
    nib.save(nib.Nifti1Image(broken, affine), folder / "nan.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros_like(array), affine), folder / "zero.nii.gz")
    nib.save(nib.Nifti1Image(array[..., 5], affine), folder / "flat.nii.gz")
    nib.save(nib.Nifti1Image(np.stack([array, array], -1), affine), folder / "two_channels.nii.gz")
    nib.save(nib.Nifti1Image(np.full_like(array, np.inf), affine), folder / "zzz_infinite.nii.gz")
    return folder


REASONS = {
    "truncated": ("too early", "cut short"),
    "empty": ("an empty file",),
    "nan": ("1 voxels are NaN",),
    "zero": ("every voxel is zero",),
    "flat": ("expected a 3D volume", "1 slice", "3D"),
    "two_channels": ("2 channel(s), expected 1",),
    "zzz_infinite": ("NaN or infinite",),
}


def test_bad_files_are_reported_and_the_rest_goes_on(bad_folder, segment, tmp_path):
    with pytest.raises(FailedCases) as caught:
        segment(bad_folder)
    lines = {line.split(":")[0].strip(): line for line in str(caught.value).splitlines()[1:]}
    assert set(lines) == set(REASONS), "each bad case is named, the good one is not"
    for name, reasons in REASONS.items():
        assert any(reason in lines[name] for reason in reasons), lines[name]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["good.nii.gz", "report.json", "run.log"]
    report = read_report(tmp_path / "out")
    assert (
        "ml" in report["good"] and len(report) > 1 and all("error" in report[name] for name in report if name != "good")
    )


def test_the_command_ends_with_the_reasons_and_a_code_that_is_not_zero(bad_folder, pretrained, tmp_path):
    for path in bad_folder.iterdir():
        if path.name not in ("good.nii.gz", "zero.nii.gz"):
            path.unlink()
    output = run_bundle(
        "tsfm_pretrain", ["inference.json"], expect=1, checkpoint=pretrained / "model.pt", dataset_dir=bad_folder,
        output_dir=tmp_path / "out", device="cpu",
    )  # fmt: skip
    last = "\n".join(output.strip().splitlines()[-3:])
    assert "1 of 2 cases failed" in last and "zero.nii.gz: every voxel is zero" in last
    assert (tmp_path / "out/good.nii.gz").is_file()


def test_a_source_that_is_not_there_is_named(segment, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        segment(tmp_path / "nowhere")
    (tmp_path / "no_images").mkdir()
    with pytest.raises(FileNotFoundError, match="no image in"):
        segment(tmp_path / "no_images")


# ---- knobs -----------------------------------------------------------------------------------------------------------


def test_targets_limit_what_is_computed_and_keep_their_values(case, segment, tmp_path):
    nib.save(case, tmp_path / "case.nii.gz")
    everything = voxels(segment(tmp_path / "case.nii.gz", out=tmp_path / "all", threshold=0.1) / "case.nii.gz")
    chosen = voxels(
        segment(tmp_path / "case.nii.gz", out=tmp_path / "some", threshold=0.1, targets=["liver", "lung"])
        / "case.nii.gz"
    )
    assert set(np.unique(chosen)) <= {0, 7, 19} and chosen.any()
    assert len(np.unique(everything)) > len(np.unique(chosen))
    with pytest.raises(ValueError, match="brain"):
        segment(tmp_path / "case.nii.gz", out=tmp_path / "none", targets=["brain"])


def test_threshold_and_mirroring_change_the_result(case, segment, tmp_path):
    nib.save(case, tmp_path / "case.nii.gz")
    results = {}
    for name, settings in {
        "low": {"threshold": 0.3},
        "high": {"threshold": 0.7},
        "mirrored": {"threshold": 0.3, "mirror": True},
    }.items():
        results[name] = voxels(segment(tmp_path / "case.nii.gz", out=tmp_path / name, **settings) / "case.nii.gz")
    assert np.count_nonzero(results["low"]) > np.count_nonzero(results["high"])
    assert not np.array_equal(results["low"], results["mirrored"])
    row = read_report(tmp_path / "mirrored")["case"]
    agreement = {name: found["agreement"] for name, found in row["quality"].items()}
    assert any(row["ml"].values()) and all(0 < agreement[name] < 1 for name, ml in row["ml"].items() if ml)
    assert all(0 <= found < 1 for found in agreement.values()), "some version painted it, others perhaps did not"
    assert 0 < row["doubt"] < 1 and set(row["quality"]) <= set(row["ml"]) and "warnings" not in row


def test_an_image_unlike_those_of_the_training_is_segmented_with_a_warning(case, segment, tmp_path):
    voxels = np.asarray(case.dataobj)
    nib.save(nib.Nifti1Image(voxels, case.affine @ np.diag([0.3, 0.3, 0.3, 1])), tmp_path / "small.nii.gz")
    row = read_report(segment(tmp_path / "small.nii.gz"))["small"]
    assert any("mm along S; the weights saw" in line for line in row["warnings"]) and "error" not in row


def test_results_that_are_there_are_kept_unless_asked_otherwise(case, segment, tmp_path):
    nib.save(case, tmp_path / "case.nii.gz")
    out = tmp_path / "out"
    out.mkdir()
    (out / "case.nii.gz").write_bytes(b"somebody's work")
    with pytest.raises(FileExistsError, match=r"skip.*overwrite"):
        segment(tmp_path / "case.nii.gz")
    segment(tmp_path / "case.nii.gz", existing="skip")
    assert (out / "case.nii.gz").read_bytes() == b"somebody's work"
    segment(tmp_path / "case.nii.gz", existing="overwrite")
    assert nib.load(out / "case.nii.gz").shape == case.shape


def test_a_label_map_in_a_data_sets_own_ids_and_probabilities(case, segment, tmp_path):
    nib.save(case, tmp_path / "case.nii.gz")
    options = {"threshold": 0.1, "save": ["label_map", "probabilities"], "raw_ids": "msd_liver"}
    out = segment(tmp_path / "case.nii.gz", **options)
    found = voxels(out / "case.nii.gz")
    kept = blosc2.open(str(out / "case_probabilities.b2nd"))
    liver, tumor = (kept[kept.schunk.vlmeta["targets"].index(name)] for name in ("liver", "liver_tumor"))
    assert set(np.unique(found)) <= {0, 1, 2} and found.any() and liver.shape == found.shape
    edge = (np.abs(liver - 0.1) < 1e-3) | (np.abs(tumor - 0.1) < 1e-3)
    assert np.array_equal((found > 0)[~edge], ((liver > 0.1) | (tumor > 0.1))[~edge])


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_weights_that_do_not_fit_are_an_error_and_nothing_is_written(case, segment, pretrained, tmp_path):
    nib.save(case, tmp_path / "case.nii.gz")
    state = torch.load(pretrained / "model.pt", weights_only=True)
    state["stem.weight"] = state["stem.weight"][:, :, :1]
    torch.save(state, tmp_path / "wrong.pt")
    with pytest.raises(CheckpointError, match=r"does not fit the network.*\n.*stem\.weight"):
        segment(tmp_path / "case.nii.gz", checkpoint=str(tmp_path / "wrong.pt"))
    with pytest.raises(CheckpointError, match="does not exist"):
        segment(tmp_path / "case.nii.gz", checkpoint=str(tmp_path / "none.pt"))
    assert not list((tmp_path / "out").glob("*.nii.gz"))


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_weights_with_one_flipped_bit_segment_nothing(case, segment, pretrained, tmp_path, name):
    nib.save(case, tmp_path / "case.nii.gz")
    network = build_network(read_description(pretrained / "model.pt"))
    load_weights(network, pretrained / "model.pt")
    save_weights(network, tmp_path / name)
    content = bytearray((tmp_path / name).read_bytes())
    weights = max(network.parameters(), key=torch.numel).detach().numpy().tobytes()
    content[content.index(weights) + len(weights) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"(?s){name}.*download"):
        segment(tmp_path / "case.nii.gz", checkpoint=str(tmp_path / name))
    assert not list((tmp_path / "out").glob("*.nii.gz"))


def test_weights_in_a_training_checkpoint_safetensors_and_the_old_format_do_the_same(
    case, segment, pretrained, tmp_path
):
    nib.save(case, tmp_path / "case.nii.gz")
    network = build_network(read_description(pretrained / "model.pt"))
    load_weights(network, pretrained / "model.pt")
    save_weights(network, tmp_path / "model.safetensors")
    state = torch.load(pretrained / "model.pt", weights_only=True)
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        tmp_path / "old.pth",
        _use_new_zipfile_serialization=False,
    )
    results = []
    for path in (pretrained / "model.pt", tmp_path / "model.safetensors", tmp_path / "old.pth"):
        out = segment(
            tmp_path / "case.nii.gz", out=tmp_path / path.stem / path.suffix[1:], checkpoint=str(path), threshold=0.4
        )
        results.append(voxels(out / "case.nii.gz"))
    assert results[0].any() and all(np.array_equal(results[0], other) for other in results[1:])


# ---- several folds ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folds(pretrained, tmp_path):
    """Two folds' weights; a third one is changed by what it is told, and refused."""

    def write(name, seed=0, **changes):
        description = {**read_description(pretrained / "model.pt"), **changes}
        network = build_network(description)
        if not changes:
            load_weights(network, pretrained / "model.pt")
        for tensor in network.parameters() if seed else ():
            tensor.data += 0.1 * tensor.std() * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
        save_weights(network, tmp_path / name)
        return str(tmp_path / name)

    return write


def test_folds_are_averaged_as_logits(case, segment, folds, tmp_path):
    nib.save(case, tmp_path / "case.nii.gz")
    paths = [folds("fold0.pt"), folds("fold1.safetensors", seed=1)]
    networks = [build_network(read_description(path)).eval() for path in paths]
    for network, path in zip(networks, paths, strict=True):
        load_weights(network, path)
    ensemble = build_network(read_description(paths)).eval()
    load_weights(ensemble, paths)
    window = torch.randn(1, 1, *read_description(paths)["patch_size"])
    with torch.no_grad():
        expected = (networks[0](window) + networks[1](window)) / 2
        torch.testing.assert_close(ensemble(window), expected)
        assert not torch.allclose(networks[0](window), expected, atol=1e-3)
    save_weights(ensemble, tmp_path / "ensemble.pt")
    results = [
        voxels(
            segment(tmp_path / "case.nii.gz", out=tmp_path / str(i), checkpoint=weights, threshold=0.4) / "case.nii.gz"
        )
        for i, weights in enumerate((paths, str(tmp_path / "ensemble.pt"), paths[:1], paths[0]))
    ]
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[2], results[3])
    assert not np.array_equal(results[0], results[2])


def test_folds_that_do_not_fit_together_are_refused_by_name(folds, pretrained, tmp_path):
    known = read_description(pretrained / "model.pt")
    other = {
        "preparation": {**known["preparation"], "spacing_mm": [3, 3, 3]},
        "targets": {**known["targets"], "liver": {"lesion": True}},
        "patch_size": [16, 32, 64],
        "network": {**known["network"], "num_layers": 2},
    }
    first = folds("fold0.pt")
    for key, value in other.items():
        with pytest.raises(CheckpointError, match=rf"(?s){key}\.pt.*fold0\.pt.*their {key} differ"):
            read_description([first, folds(f"{key}.pt", **{key: value})])
    with pytest.raises(CheckpointError, match="spacing_mm"):
        read_description([first, str(tmp_path / "preparation.pt")])
    with pytest.raises(CheckpointError, match="empty"):
        read_description([])
    seen = [folds(f"{low}.pt", familiar={"CT": {"p5": [low, low + 1]}}) for low in (-900, 900)]
    assert read_description([first, *seen])["familiar"]["CT"]["p5"] == [-900, 901]
    free, bound = (
        {"name": name, "commercial": use, "share_alike": False} for name, use in (("CC0", True), ("own", False))
    )
    pair = [
        folds(
            "one.pt", trained_on=["msd_liver"], trained_targets=["liver", "liver_tumor"], licences={"msd_liver": free}
        ),
        folds("two.pt", trained_on=["amos22"], trained_targets=["spleen", "liver"], licences={"amos22": bound}),
    ]
    both = read_description(pair)
    digests = read_description([folds(f"{name}.pt", trained_cases=[name]) for name in ("c2", "a1")])["trained_cases"]
    assert digests == ["a1", "c2"], "an ensemble was trained on what one of its folds was trained on"
    assert both["trained_targets"] == ["liver"] and both["trained_on"] == ["amos22", "msd_liver"]
    assert both["licences"] == {"msd_liver": free, "amos22": bound}
    with pytest.raises(CheckpointError, match="no target is among the trained_targets of all"):
        read_description([*pair, folds("three.pt", trained_targets=["spleen"])])
    folds("alike.pt", network={**known["network"], "checkpointing": True})
    assert read_description([first, str(tmp_path / "alike.pt")])["network"]["count"] == 2


# ---- what the weights know ------------------------------------------------------------------------------------------


@pytest.fixture
def options(pretrained, tmp_path):
    """Weights trained on MR and CT without mirroring along L, and what inference.json makes of options."""
    description = read_description(pretrained / "model.pt")
    description |= {"modalities": ["CT", "MR"], "mirror_axes": "SP"}
    description["preparation"]["default_modality"] = "MR"
    network = build_network(description)
    load_weights(network, pretrained / "model.pt")
    save_weights(network, tmp_path / "both.pt")

    def read(**chosen):
        parser = ConfigParser(json.loads((BUNDLE / "configs/inference.json").read_text()))
        for key, value in {"checkpoint": str(tmp_path / "both.pt"), **chosen}.items():
            parser[key] = value
        return parser

    return read


def test_a_viewer_offers_the_modalities_of_the_weights_the_default_first(options):
    assert options().get_parsed_content("displayable_configs")["normalize_as"] == ["MR", "CT"]
    assert (
        options().get_parsed_content("preprocessing").transforms[-1].modality is None
    )  # the image's own, or the default
    for chosen in ({"displayable_configs#normalize_as": "CT"}, {"modality": "CT"}):
        assert options(**chosen).get_parsed_content("preprocessing").transforms[-1].modality == "CT"


def test_torchrun_gives_each_process_its_part(options, monkeypatch):
    assert [options().get_parsed_content(key) for key in ("part", "parts")] == [0, 1]
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert [options().get_parsed_content(key) for key in ("part", "parts")] == [2, 3]


def test_mirroring_keeps_to_the_axes_of_the_training(options):
    flips = {chosen: options(mirror=chosen).get_parsed_content("inferer").flips for chosen in (True, False, "SPL")}
    assert flips[True] == mirrored_axes("SP") and flips[False] == [] and flips["SPL"] == mirrored_axes("SPL")
    assert options(**{"displayable_configs#mirroring": True}).get_parsed_content("inferer").flips == flips[True]


def test_only_targets_of_the_training_are_offered(options):
    """The phantoms' four data sets annotate some of the pool's 31 targets; no data set of the training shows a colon."""
    offered = options().get_parsed_content("displayable_configs")["targets"]
    assert offered[0] == "all" and "liver_tumor" in offered and "colon_tumor" not in offered
    assert options().get_parsed_content("targets") == offered[1:]
    assert options(targets=["liver"]).get_parsed_content("targets") == ["liver"]


def test_targets_that_nobody_taught_or_that_the_ids_cannot_say_are_refused(options):
    for chosen in ({"targets": ["liver", "colon_tumor"]}, {"targets": ["pancreas"], "raw_ids": "msd_liver"}):
        with pytest.raises(RuntimeError) as error:
            options(**chosen).get_parsed_content("inferer")
        assert "are not among those that the weights were trained on" in str(first_cause(error.value))
    for chosen in ("liver_tumor", ["liver_tumor"]):
        assert options(targets=chosen, raw_ids="msd_liver").get_parsed_content("inferer").chosen == ["liver_tumor"]
    assert options(targets="all").get_parsed_content("inferer").chosen == options().get_parsed_content("targets")


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_an_evaluation_that_cannot_be_one_is_refused_before_it_begins(case, tmp_path):
    nib.save(case, tmp_path / "a.nii.gz")
    items = [{"image": str(tmp_path / "a.nii.gz"), "label": str(tmp_path / "labels/a.nii.gz"), "case": "a"}]
    out = tmp_path / "out"
    assert items_to_score(items, out) == items
    (tmp_path / "out").mkdir()
    (tmp_path / "out/summary.json").write_text("scores of another run")
    for given, settings, words in (
        ([], {}, "no case to score"),
        (items, {"existing": "skip"}, "computes what it scores"),
        (items, {"existing": "error"}, "summary.json is already there"),
        (items, {"parts": 2}, "one of 2 processes"),
        (items, {"clicks": {"a": {"liver": [[1, 2, 3]]}}}, "found without"),
        (items, {"save": "dicom_seg"}, "no folder with a DICOM series"),
        (items, {"output_dir": tmp_path / "labels"}, "an image, a label or the result of another case"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            items_to_score(given, **{"output_dir": out, **settings})


def test_scores_of_cases_that_the_weights_were_trained_on_are_called_too_good(
    case, pretrained, phantom_pool, tmp_path, caplog
):
    """Both where a fold that trained on them is scored alone, and where it is a part of an ensemble."""
    nib.save(case, tmp_path / "a.nii.gz")
    items = [
        {
            "image": str(tmp_path / "a.nii.gz"),
            "label": str(tmp_path / "a_label.nii.gz"),
            "case": name,
            "dataset": dataset,
        }
        for name, dataset in (("liver_0", "msd_liver"), ("kits21_case_1", "kits21"), ("liver_0_", "amos22"))
    ]
    trained = case_digests([{"case": "case_1", "dataset": "kits21"}, {"case": "liver_0", "dataset": "amos22"}])
    items_to_score(items, tmp_path / "out")
    items_to_score(items[:1], tmp_path / "out", trained_cases=trained)
    assert not caplog.text
    items_to_score(items, tmp_path / "out", trained_cases=trained)
    assert "trained on 1 of the 3 cases to score, for example kits21_case_1" in caplog.text
    pool = DatasetPool(BUNDLE / "configs/pool.json", phantom_pool, allow_missing=True)
    assert read_description(pretrained / "model.pt")["trained_cases"] == sorted(case_digests(pool.train_items(0)))


def test_the_validation_cases_of_the_pool_are_scored_with_a_page_of_pictures(phantom_pool, segment, tmp_path):
    out = segment(phantom_pool, ["inference.json", "evaluate.json"], allow_missing=True)
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["datasets"]) == {"msd_liver", "kits21", "amos22", "totalsegmentator"}
    assert set(summary["datasets"]["msd_liver"]) == {"liver", "liver_tumor"}, "annotated targets only"
    assert summary["failed"] == [] and summary["cases"] == len(list(out.glob("*.nii.gz")))
    assert summary["protocol"] == {
        "painted per case": "the targets that its data set annotates", "mirrored along": "S, P, L"
    }  # fmt: skip
    table = DatasetPool(BUNDLE / "configs/pool.json", phantom_pool, allow_missing=True).table
    for row in csv.DictReader((out / "cases.csv").open()):
        painted = np.unique(np.asarray(nib.load(out / f"{row['case']}.nii.gz").dataobj))[1:]
        assert {table.names[value - 1] for value in painted} <= set(table.annotated(row["dataset"]))
    rows = list(csv.DictReader((out / "cases.csv").open()))
    assert {row["status"] for row in rows} <= {"ok", "empty_truth"}
    assert all(0 <= float(row["dice"]) <= 1 for row in rows if row["status"] == "ok")
    assert (out / "page.png").stat().st_size > 5000 and "mean Dice" in (out / "scores.md").read_text()


def test_over_train_json_as_the_model_zoo_has_it_the_scores_are_the_same(phantom_pool, segment, tmp_path):
    scores = []
    for base in ("inference.json", "train.json"):
        out = segment(phantom_pool, [base, "evaluate.json"], out=tmp_path / base, datasets=["msd_liver"])
        scores.append((out / "cases.csv").read_text())
    assert scores[0] == scores[1] and "liver" in scores[0]


def test_targets_that_were_not_computed_are_not_scored(phantom_pool, segment):
    settings = {"datasets": ["msd_liver"], "targets": "liver"}
    out = segment(phantom_pool, ["inference.json", "evaluate.json"], **settings)
    assert set(json.loads((out / "summary.json").read_text())["datasets"]["msd_liver"]) == {"liver"}


def test_a_case_that_cannot_be_scored_is_reported_and_the_others_are(phantom_pool, segment, tmp_path):
    pool = tmp_path / "pool"
    shutil.copytree(phantom_pool / "Task03_Liver", pool / "Task03_Liver")
    kept = DatasetPool(BUNDLE / "configs/pool.json", pool, datasets=["msd_liver"])
    held_out = kept.val_items(0)[0]
    label = nib.load(held_out["label"])
    array = np.asarray(label.dataobj)
    nib.save(nib.Nifti1Image(array + np.uint8(50), label.affine), held_out["label"])
    with pytest.raises(FailedCases, match=r"holds the ids"):
        segment(pool, ["inference.json", "evaluate.json"], datasets=["msd_liver"])
    assert json.loads((tmp_path / "out/summary.json").read_text())["failed"][0]["case"] == held_out["case"]
