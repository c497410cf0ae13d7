"""The phantoms: layouts, raw ids, geometry and intensities of the files, read back with nibabel alone."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shlex

import fire
import nibabel as nib
import numpy as np
import pytest
from tsfm.cases.pool import DatasetPool
from tsfm_tools import demo
from tsfm_tools.commands import phantoms as phantoms_command
from tsfm_tools.phantoms import layouts as phantoms

POOL_FILE = os.path.join(os.path.dirname(__file__), "..", "bundles", "tsfm_pretrain", "configs", "pool.json")
SMALL = (24, 40, 48)


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ten")
    return str(folder), phantoms.write_all_ten(str(folder))


def ras(path):
    """Voxels in (right, anterior, superior) order and the affine, as the affine alone says."""
    image = nib.as_closest_canonical(nib.load(path))
    return np.asarray(image.dataobj), image.affine


def ids(path):
    return set(np.unique(np.asarray(nib.load(path).dataobj)).tolist())


def centroid_mm(mask, affine):
    return nib.affines.apply_affine(affine, np.argwhere(mask).mean(0))


def digest(folder):
    files = sorted(glob.glob(os.path.join(folder, "**", "*.*"), recursive=True))
    return {os.path.relpath(f, folder): hashlib.sha256(open(f, "rb").read()).hexdigest() for f in files}


@pytest.mark.parametrize(
    "label, expected",
    [
        ("Task03_Liver/labelsTr/liver_0.nii.gz", {0, 1, 2}),
        ("Task06_Lung/labelsTr/lung_001.nii.gz", {0, 1}),
        ("Task07_Pancreas/labelsTr/pancreas_001.nii.gz", {0, 1, 2}),
        ("Task08_HepaticVessel/labelsTr/hepaticvessel_001.nii.gz", {0, 1, 2}),
        ("Task10_Colon/labelsTr/colon_001.nii.gz", {0, 1}),
        ("kits21/kits21/data/case_00000/aggregated_MAJ_seg.nii.gz", {0, 1, 2, 3}),
        ("Breast_DCE_MRI/case_001/GT.nii.gz", {0, 1}),
        ("amos22/labelsTr/amos_0001.nii.gz", set(range(16))),
        ("BTCV/RawData/Training/label/label0001.nii.gz", set(range(14))),
    ],
)
def test_each_data_set_uses_its_own_raw_ids(ten, label, expected):
    assert ids(os.path.join(ten[0], label)) == expected


def test_totalsegmentator_has_one_mask_per_structure(ten):
    masks = glob.glob(os.path.join(ten[0], "Totalsegmentator_dataset", "s0000", "segmentations", "*.nii.gz"))
    assert len(masks) == 17
    assert all(ids(mask) == {0, 1} for mask in masks)


def test_images_and_labels_share_one_grid(ten):
    pairs = [
        ("Task03_Liver/imagesTr/liver_0", "Task03_Liver/labelsTr/liver_0"),
        ("kits21/kits21/data/case_00000/imaging", "kits21/kits21/data/case_00000/aggregated_MAJ_seg"),
        ("Totalsegmentator_dataset/s0000/ct", "Totalsegmentator_dataset/s0000/segmentations/aorta"),
        ("Breast_DCE_MRI/case_001/P2", "Breast_DCE_MRI/case_001/GT"),
    ]
    for image, label in pairs:
        a, b = (nib.load(os.path.join(ten[0], name + ".nii.gz")) for name in (image, label))
        assert a.shape == b.shape
        np.testing.assert_array_equal(a.affine, b.affine)


def test_orientations_differ_and_one_set_is_oblique(ten):
    axes = {
        "kits21/kits21/data/case_00000/imaging": "IPL",
        "Task06_Lung/imagesTr/lung_001": "LPS",
        "amos22/imagesTr/amos_0001": "LAS",
        "Totalsegmentator_dataset/s0000/ct": "RAS",
        "Breast_DCE_MRI/case_001/P1": "PIR",
    }
    for name, expected in axes.items():
        assert "".join(nib.aff2axcodes(nib.load(os.path.join(ten[0], name + ".nii.gz")).affine)) == expected
    oblique = nib.load(os.path.join(ten[0], "Task08_HepaticVessel/imagesTr/hepaticvessel_001.nii.gz")).affine
    assert (np.abs(oblique[:3, :3]) > 1e-3).sum() > 3


@pytest.mark.parametrize("name", ["imagesTr/amos_0001", "imagesTr/amos_0507"])
def test_the_body_lies_as_the_affine_says(ten, name):
    label, affine = ras(os.path.join(ten[0], "amos22", name.replace("images", "labels") + ".nii.gz"))
    spleen, right, left, liver, aorta, bladder = (centroid_mm(label == i, affine) for i in (1, 2, 3, 6, 8, 14))
    assert right[0] > left[0] and liver[0] > spleen[0]
    assert bladder[2] < right[2] < spleen[2]
    assert aorta[1] < bladder[1]


@pytest.mark.parametrize(
    "name",
    [
        "kits21/kits21/data/case_00000/imaging",
        "Task03_Liver/imagesTr/liver_0",
        "Task08_HepaticVessel/imagesTr/hepaticvessel_001",
        "Totalsegmentator_dataset/s0000/ct",
    ],
)
def test_every_scan_shows_spine_behind_lungs_above_and_liver_right(ten, name):
    """Whatever the array's axes: read from the intensities alone, in the affine's world."""
    voxels, affine = ras(os.path.join(ten[0], name + ".nii.gz"))
    body = centroid_mm(voxels > -200, affine)
    assert centroid_mm(voxels > 250, affine)[1] < body[1] - 10
    inside = np.zeros(voxels.shape, bool)
    center = [n // 2 for n in voxels.shape[:2]]
    inside[center[0] - 9 : center[0] + 9, center[1] - 4 : center[1] + 4] = True
    assert centroid_mm((voxels < -700) & inside, affine)[2] > body[2] + 15
    assert centroid_mm((voxels > 75) & (voxels < 140), affine)[0] > body[0] + 5


def test_ct_holds_hounsfield_units_after_slope_and_intercept(ten):
    for image, label, organ in (
        ("Task03_Liver/imagesTr/liver_0", "Task03_Liver/labelsTr/liver_0", 1),
        ("BTCV/RawData/Training/img/img0001", "BTCV/RawData/Training/label/label0001", 6),
    ):
        voxels, _ = ras(os.path.join(ten[0], image + ".nii.gz"))
        mask, _ = ras(os.path.join(ten[0], label + ".nii.gz"))
        assert -1100 <= voxels.min() < -950 and 200 < voxels.max() < 2000
        assert 60 < np.median(voxels[mask == organ]) < 140  # liver in a portal-venous phase
    stored = nib.load(os.path.join(ten[0], "BTCV/RawData/Training/img/img0001.nii.gz"))
    assert stored.dataobj.inter == -1024 and stored.get_data_dtype() == np.int16


def test_lesions_have_their_own_contrast(ten):
    voxels, _ = ras(os.path.join(ten[0], "Task03_Liver/imagesTr/liver_0.nii.gz"))
    label, _ = ras(os.path.join(ten[0], "Task03_Liver/labelsTr/liver_0.nii.gz"))
    assert np.median(voxels[label == 1]) - np.median(voxels[label == 2]) > 15
    before, early = (ras(os.path.join(ten[0], f"Breast_DCE_MRI/case_001/P{i}.nii.gz"))[0] for i in (0, 1))
    tumor = ras(os.path.join(ten[0], "Breast_DCE_MRI/case_001/GT.nii.gz"))[0] > 0
    gain = early - before
    assert gain[tumor].mean() > 5 * abs(gain[~tumor].mean())


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        phantoms.write_pool(str(tmp_path / name), 1, SMALL, seed, ("kits21", "amos22", "breast_dce"))
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    changed = [k for k, v in digest(tmp_path / "a").items() if digest(tmp_path / "c")[k] != v]
    assert all(k in changed for k in digest(tmp_path / "a") if k.endswith("imaging.nii.gz") or "images" in k)


def test_cases_do_not_depend_on_how_many_are_written(tmp_path):
    phantoms.write_pool(str(tmp_path / "one"), 1, SMALL, 0, ("kits21",))
    phantoms.write_pool(str(tmp_path / "two"), 2, SMALL, 0, ("kits21",))
    one, two = digest(tmp_path / "one"), digest(tmp_path / "two")
    assert one.items() <= two.items()


def test_cases_differ_in_shape_spacing_and_anatomy(tmp_path):
    phantoms.write_pool(str(tmp_path), 4, SMALL, 0, ("msd_liver",))
    images = [nib.load(f) for f in sorted(glob.glob(str(tmp_path / "Task03_Liver" / "imagesTr" / "*.nii.gz")))]
    assert len({image.shape for image in images}) > 1
    assert len({tuple(image.header.get_zooms()) for image in images}) == 4


def test_msd_dataset_json_lists_files_that_exist(ten):
    root = os.path.join(ten[0], "Task03_Liver")
    with open(os.path.join(root, "dataset.json")) as file:
        described = json.load(file)
    assert described["labels"] == {"0": "background", "1": "liver", "2": "cancer"}
    assert all(os.path.isfile(os.path.join(root, entry[key])) for entry in described["training"] for key in entry)


def test_an_unknown_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown phantom data sets"):
        phantoms.write_pool(str(tmp_path), datasets=("kits99",))


@pytest.mark.parametrize("wrong", [{"cases_per_dataset": 0}, {"size": 16}, {"layouts": "kits99"}])
def test_what_cannot_be_drawn_is_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        phantoms_command(str(tmp_path), **{"layouts": "brats2020", **wrong})
    assert not list(tmp_path.iterdir())


def test_brats2020(tmp_path):
    (name,) = phantoms.write_brats2020(str(tmp_path), cases=1)
    root = os.path.join(tmp_path, name)
    label, _ = ras(os.path.join(root, f"{name}_seg.nii.gz"))
    assert set(np.unique(label)) == {0, 1, 2, 4}
    channels = {c: ras(os.path.join(root, f"{name}_{c}.nii.gz"))[0] for c in ("flair", "t1", "t1ce", "t2")}
    assert all((image == 0).mean() > 0.3 for image in channels.values())  # skull-stripped
    assert channels["t1ce"][label == 4].mean() > 1.5 * channels["t1"][label == 4].mean()
    assert channels["flair"][label == 2].mean() > 1.5 * np.median(
        channels["flair"][(label == 0) & (channels["t1"] > 0)]
    )


def test_kits19_and_abdomenct1k(tmp_path):
    assert phantoms.write_kits19(str(tmp_path / "k"), cases=1) == ["case_00000"]
    assert ids(tmp_path / "k" / "case_00000" / "segmentation.nii.gz") == {0, 1, 2}
    phantoms.write_abdomenct1k(str(tmp_path / "a"), cases=1)
    assert ids(tmp_path / "a" / "Mask" / "Case_00001.nii.gz") == {0, 1, 2, 3, 4}
    image, _ = ras(tmp_path / "a" / "AbdomenCT-1K-ImagePart1" / "Case_00001_0000.nii.gz")
    assert image.min() == -1024


def test_the_commands_that_the_demo_prints_write_its_phantoms(tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise InterruptedError

    for name, value in {"SIZE": (16, 24, 24), "POOL_CASES": 1, "DOWNSTREAM_CASES": 1, "DatasetPool": stop}.items():
        monkeypatch.setattr(demo, name, value)
    with pytest.raises(InterruptedError):
        demo.demo(str(tmp_path / "demo"), seed=3)
    printed = capsys.readouterr().out.replace(str(tmp_path / "demo"), str(tmp_path / "again"))
    for line in [line for line in printed.splitlines() if "tsfm phantoms" in line]:
        fire.Fire(phantoms_command, command=shlex.split(line.partition("tsfm phantoms")[2]))
    for name in ("pool", "kits19"):
        assert digest(tmp_path / "again" / name) == digest(tmp_path / "demo" / name) != {}


def test_the_pool_file_reads_every_layout(ten):
    """The bundle's own declaration finds every case in the folders that the phantoms write."""
    found: dict[str, set[str]] = {}
    for item in DatasetPool(POOL_FILE, ten[0]).cases:
        found.setdefault(item["dataset"], set()).add(item["case"])
        if item["case"] == "amos_0507":
            assert item["modality"] == "MR"
    assert {name: set(cases) for name, cases in ten[1].items()} == found
