"""The audit of a pool finds what was planted in phantoms, and little else."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from tsfm.cases.folders import PoolError
from tsfm.cases.pool import DatasetPool
from tsfm.labels import LabelTable
from tsfm_tools.audit.checks import check_dataset
from tsfm_tools.audit.command import audit, find_sources
from tsfm_tools.audit.duplicates import find_pairs
from tsfm_tools.audit.measures import measure, measured
from tsfm_tools.audit.overlaps import Source, check_overlaps
from tsfm_tools.audit.pictures import picture
from tsfm_tools.audit.signature import canonical, describe_image
from tsfm_tools.phantoms import layouts
from tsfm_tools.phantoms.scans import draw_case, save


@pytest.fixture(scope="module")
def bodies():
    """Three phantoms of different patients."""
    return [draw_case("msd_liver", index, (48, 80, 96), 0) for index in range(3)]


def copies(image, spacing):
    """What happens to a scan on its way through data sets: (name, image, spacing)."""
    spacing = np.array(spacing)
    yield (
        "resampled",
        ndimage.zoom(image, (1.2, 0.8, 0.8), order=1),
        spacing * image.shape / np.round(np.multiply(image.shape, (1.2, 0.8, 0.8))),
    )
    yield "mirrored", image[:, :, ::-1], spacing
    yield "axes exchanged", image.transpose(0, 2, 1)[:, ::-1], spacing[[0, 2, 1]]
    yield "cropped", image[8:, 15:70, 20:85], spacing
    yield "scaled with noise", image * 1.01 + np.random.default_rng(0).normal(0, 8, image.shape), spacing


def test_a_scan_is_known_again_in_every_disguise_and_other_patients_are_not(bodies):
    first = describe_image(bodies[0].image, bodies[0].spacing_mm, "CT")
    others = [describe_image(body.image, body.spacing_mm, "CT") for body in bodies[1:]]
    assert not find_pairs([first, *others])
    for name, image, spacing in copies(bodies[0].image, bodies[0].spacing_mm):
        pairs = find_pairs([first, *others, describe_image(np.ascontiguousarray(image), spacing, "CT")])
        assert [(pair.first, pair.second) for pair in pairs] == [(0, 3)], name
        assert pairs[0].same_orientation == (name not in ("mirrored", "axes exchanged")), name
        if name == "mirrored":
            assert pairs[0].turned == (0, 1, 2, 1, 1, -1)


def test_a_descriptor_is_the_same_however_its_axes_are_turned():
    samples = np.random.default_rng(1).standard_normal((5, 5, 5))
    expected, _ = canonical(samples)
    for axes in ((0, 1, 2), (2, 0, 1), (1, 0, 2)):
        for signs in ((1, 1, 1), (-1, 1, -1), (-1, -1, -1)):
            turned = samples.transpose(axes)[tuple(slice(None, None, sign) for sign in signs)]
            assert np.array_equal(canonical(turned)[0], expected)


def stored(path):
    return nib.load(path).get_fdata().astype(np.int16), nib.load(path).affine


def store(array, affine, path, dtype=np.int16):
    nib.save(nib.Nifti1Image(array.astype(dtype), affine), path)


def test_a_kept_file_that_is_damaged_is_measured_again_and_a_tilted_voxel_is_smaller(tmp_path):
    affine = np.diag([1.0, 1, 1, 1])
    affine[:3, 2] = 0, 0.6, 0.8  # slices drift: a voxel of sides 1 mm has 0.8 mm^3
    voxels = np.arange(512).reshape(8, 8, 8)
    store(voxels, affine, tmp_path / "image.nii.gz")
    store(voxels > 411, affine, tmp_path / "label.nii.gz", np.uint8)
    item = {"image": str(tmp_path / "image.nii.gz"), "label": str(tmp_path / "label.nii.gz")}
    item |= {"dataset": "d", "case": "c", "modality": "MR"}
    table = LabelTable({"x": {}}, [{"name": "d", "labels": {"1": "x"}}]).to_dict()
    first = measured(item, table, str(tmp_path / "kept"))
    assert first["targets"]["x"]["ml"] == pytest.approx(0.08)
    (kept,) = (tmp_path / "kept").glob("*.npz")
    whole = kept.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:200] + bytes([whole[200] ^ 255]) + whole[201:]):
        kept.write_bytes(damaged)
        assert measured(item, table, str(tmp_path / "kept"))["targets"] == first["targets"]
        assert kept.read_bytes() == whole


@pytest.mark.parametrize("shape", [(20, 20, 1), (1, 20, 20), (20, 20, 20)])
def test_single_slices_and_names_with_any_signs_are_drawn(shape, tmp_path):
    voxels = np.random.default_rng(0).normal(0, 50, shape)
    store(voxels, np.eye(4), tmp_path / "image.nii.gz")
    store(np.ones(shape), np.eye(4), tmp_path / "label.nii.gz", np.uint8)
    item = {"image": str(tmp_path / "image.nii.gz"), "label": str(tmp_path / "label.nii.gz")}
    item |= {"dataset": "d", "case": "a$_$b", "modality": "MR"}
    table = LabelTable({"x": {}}, [{"name": "d", "labels": {"1": "x"}}])
    assert picture([(item, table, "key")], None, str(tmp_path)).startswith(b"\x89PNG")


def test_what_is_only_scored_on_may_lie_beside_the_pool(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        content = {"labels": {"0": "background", "1": "x"}, "training": [{"image": "a.nii", "label": "b.nii"}]}
        (tmp_path / name / "dataset.json").write_text(json.dumps(content))
    sources, left_out = find_sources(str(tmp_path), None, None, str(tmp_path / "one/../two"))
    assert [(source.pool.chosen, source.downstream) for source in sources] == [(["one"], False), (["two"], True)]
    assert not left_out
    for options, message in (
        (("gone", None, None, None), "gone is no folder"),
        ((".", None, ["one"], None), "--pool_file"),
    ):
        with pytest.raises(PoolError, match=message):
            find_sources(*options)


def test_nothing_is_said_of_data_sets_that_are_not_chosen(tmp_path):
    common = {"format": "msd", "labels": {"1": "x"}, "origin": ["LiTS"]}
    entries = [{"name": "one", **common}, {"name": "two", **common, "labels_by": "model"}]
    (tmp_path / "dataset.json").write_text("[1]")  # whatever this is
    pool = {"targets": {"x": {}}, "datasets": entries}
    kinds = [
        {one.kind for one in check_overlaps([], [Source(DatasetPool(pool, tmp_path, chosen))])}
        for chosen in (None, ["one"])
    ]
    assert kinds == [{"duplicates", "labels by a model", "licences"}, {"licences"}]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A pool of livers with everything wrong in it that the audit looks for, and a data set to score on."""
    folder = tmp_path_factory.mktemp("planted")
    layouts.write_pool(str(folder), 5, (40, 64, 76), 0, ("msd_liver",))
    liver, theirs = folder / "Task03_Liver", folder / "Theirs"
    shutil.copytree(liver, theirs)
    for path in [*theirs.glob("*Tr/*.gz")]:
        path.unlink()
    image, affine = stored(liver / "imagesTr/liver_0.nii.gz")
    label, _ = stored(liver / "labelsTr/liver_0.nii.gz")
    zoomed, drawn = (ndimage.zoom(a, (0.8, 0.8, 1.2), order=o) for a, o in ((image, 1), (label, 0)))
    sides = affine @ np.diag([*(np.array(image.shape) / zoomed.shape), 1])
    store(zoomed, sides, theirs / "imagesTr/patient_b.nii.gz")  # liver_0, resampled, under another name
    store(drawn, sides, theirs / "labelsTr/patient_b.nii.gz", np.uint8)
    image, affine = stored(liver / "imagesTr/liver_1.nii.gz")
    label, _ = stored(liver / "labelsTr/liver_1.nii.gz")
    store(image[::-1], affine, theirs / "imagesTr/patient_c.nii.gz")  # liver_1, left and right exchanged
    store(label[::-1], affine, theirs / "labelsTr/patient_c.nii.gz", np.uint8)
    training = [{"image": f"imagesTr/patient_{x}.nii.gz", "label": f"labelsTr/patient_{x}.nii.gz"} for x in "bc"]
    content = json.loads((theirs / "dataset.json").read_text())
    more = {"training": training, "licence": "CC BY-NC-SA 4.0", "description": "labels are pseudo labels of a network"}
    (theirs / "dataset.json").write_text(json.dumps({**content, **more}))

    label, affine = stored(liver / "labelsTr/liver_2.nii.gz")
    label[2:6, 2:6, 2:4] = 2  # a tumor in the air
    rng = np.random.default_rng(0)
    for at in rng.integers(3, np.array(label.shape) - 3, (12, 3)):
        label[tuple(at)] = 1  # specks of liver
    store(label, affine, liver / "labelsTr/liver_2.nii.gz", np.uint8)
    label, affine = stored(liver / "labelsTr/liver_3.nii.gz")
    store(label * 0, affine, liver / "labelsTr/liver_3.nii.gz", np.uint8)
    path = liver / "imagesTr/liver_4.nii.gz"
    path.write_bytes(path.read_bytes()[:2000])
    return folder


def found(folder, kind):
    """(severity, cases) of the findings of a kind."""
    content = json.loads((folder / "audit.json").read_text())
    return [
        (one["severity"], "+".join(case for _, case in one["cases"]) or one["dataset"])
        for one in content["findings"]
        if one["kind"] == kind
    ]


def test_what_was_planted_is_found_and_shown(planted, tmp_path, capsys):
    pool = {
        "targets": {"liver": {}, "liver_tumor": {"inside": "liver", "lesion": True}},
        "datasets": [
            {
                "name": "msd_liver", "folder": "Task03_Liver", "format": "msd", "labels": {"1": "liver", "2": "liver_tumor"},
                "licence": "CC BY-SA 4.0", "origin": ["LiTS"],
            },
        ],
    }  # fmt: skip
    theirs = {**pool, "datasets": [{**pool["datasets"][0], "name": "theirs", "folder": "."}]}
    for name, content in (("pool.json", pool), ("theirs.json", {"pool_file": theirs})):
        (tmp_path / name).write_text(json.dumps(content))
    options = {"pool_file": str(tmp_path / "pool.json"), "progress": False}
    options["downstream"] = {str(tmp_path / "theirs.json"): str(planted / "Theirs")}
    audit(str(planted), str(tmp_path / "out"), **options)
    folder = tmp_path / "out"
    assert found(folder, "cannot be read") == [("error", "liver_4")]
    assert set(found(folder, "leaks")) == {
        ("error", "liver_0+patient_b"), ("error", "liver_1+patient_c"), ("error", "msd_liver"),
    }  # fmt: skip
    assert found(folder, "outside the parent") == [("warning", "liver_2")]
    assert found(folder, "fragments") == [("warning", "liver_2")]
    assert found(folder, "empty labels") == [("warning", "liver_3")]
    assert found(folder, "labels by a model") == [("warning", "theirs")]
    assert not found(folder, "duplicates") and not found(folder, "volumes")
    text = (folder / "audit.html").read_text()
    assert (
        text.count("data:image/png;base64,") == 5
        and "http://" not in text
        and "https://" not in text
        and "one of the headers is wrong" in text
    )

    kept = sorted((folder / "cache").iterdir())
    times = [path.stat().st_mtime_ns for path in kept]
    audit(str(planted), str(folder), **options)
    assert [path.stat().st_mtime_ns for path in sorted((folder / "cache").iterdir())] == times  # nothing measured again
    assert (folder / "audit.html").read_text() == text


def test_without_a_pool_file_every_folder_with_a_dataset_json_is_a_data_set(planted, tmp_path, capsys):
    (planted / "notes").mkdir(exist_ok=True)
    audit(str(planted), str(tmp_path), pictures=0, progress=False)
    assert set(found(tmp_path, "duplicates")) == {("warning", "liver_0+patient_b"), ("error", "liver_1+patient_c")}
    assert ("note", "theirs") in found(tmp_path, "licences")
    assert json.loads((tmp_path / "audit.json").read_text())["folders left out (no dataset.json)"] == "notes"
    assert "leaks" not in capsys.readouterr().out


TARGETS = {"liver": {}, "tumor": {"inside": "liver", "lesion": True}}
TABLE = LabelTable(TARGETS, [{"name": "a", "labels": {"1": "liver", "2": "tumor"}}])


def record(case="x", **changes):
    targets = {
        name: {"ml": ml, "pieces": 1, "specks": 0, "stray": 0.0, "center_mm": center, "place": [1, 1, 1]}
        for name, ml, center in (("liver", 1500.0, [50.0, 60.0, 20.0]), ("tumor", 20.0, [50.0, 60.0, 90.0]))
    }
    for name, facts in changes.pop("targets", {}).items():
        targets[name] |= facts
    plain = {
        "dataset": "a", "case": case, "modality": "CT", "axes": "RAS", "spacing_mm": [5, 1, 1], "shape": [60, 300, 300],
        "intensity": [[-1000.0, -1000.0, 0.0, 300.0, 1500.0]], "warnings": [], "complaint": "", "targets": targets,
        "outside": [],
    }  # fmt: skip
    return {**plain, **changes}


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"targets": {"liver": {"ml": 15000.0}}}, "volumes"),
        ({"targets": {"liver": {"ml": 3.0}}}, "volumes"),
        ({"targets": {"liver": {"stray": 0.3, "pieces": 2}}}, "fragments"),
        ({"targets": {"liver": {"ml": 0.0}}}, "empty labels"),
        ({"targets": {"tumor": {"center_mm": [50.0, 60.0, -50.0]}}}, "orientation"),
        ({"axes": "LAS"}, "orientation"),
        ({"spacing_mm": [5, 0.1, 0.1]}, "header and voxels"),
        ({"complaint": "f: holds the ids {7: 1}"}, "label ids"),
        ({"warnings": ["cannot be Hounsfield units"]}, "units"),
    ],
)
def test_a_case_unlike_the_others_is_named_and_the_others_are_not(changes, kind):
    rng = np.random.default_rng(0)
    usual = [
        record(
            f"c{i}", targets={"liver": {"ml": 1500 * np.exp(rng.normal(0, 0.25))}, "tumor": {"stray": 0.4 * (i % 2)}}
        )
        for i in range(20)
    ]
    assert not check_dataset(usual, TABLE)
    findings = check_dataset([*usual, record("odd", **changes)], TABLE)
    assert kind in {one.kind for one in findings}
    assert {case for one in findings for _, case in one.cases} == {"odd"}


def test_intensities_of_another_unit_are_named():
    usual = [record(f"c{i}", modality="MR", intensity=[[0.0, 1.0, 300.0, 900.0 + i, 1200.0]]) for i in range(20)]
    assert not check_dataset(usual, TABLE)
    odd = record("odd", modality="MR", intensity=[[0.0, 1.0, 1e5, 4e5, 5e5]])
    assert {one.kind for one in check_dataset([*usual, odd], TABLE)} == {"units"}
    hounsfield = record("ct", modality="MR")
    assert "look like Hounsfield units" in check_dataset([hounsfield], TABLE)[0].message


def test_one_patients_structure_is_known_again_in_another_modality(tmp_path):
    """Like the sarcomas of one collection in CT and MR: the same contour, other voxels, other names."""
    rng = np.random.default_rng(3)
    blob = ndimage.gaussian_filter(rng.normal(size=(40, 60, 60)), 6)
    blob *= np.exp(-((np.indices(blob.shape) - np.reshape((20, 30, 30), (3, 1, 1, 1))) ** 2).sum(0) / 200)
    mask, other = (blob > 0.3 * blob.max()), ndimage.shift(blob[::-1], (3, 0, 0)) ** 2 > 0.2 * (blob**2).max()
    targets, records, entries = {"sarcoma": {}}, [], []
    for name, array, modality in (("ct", mask, "CT"), ("mr", mask[:, ::2], "MR"), ("else", other, "MR")):
        spacing = (3.0, 2.0 if name == "mr" else 1.0, 1.0)
        paths = [str(tmp_path / f"{name}_{kind}.nii.gz") for kind in ("image", "label")]
        noise = rng.normal(0, 100, array.shape) if modality == "CT" else rng.uniform(0, 900, array.shape)
        save(noise, spacing, "RAS", paths[0])
        save(array.astype(np.uint8), spacing, "RAS", paths[1])
        entries.append({"name": name, "labels": {"1": "sarcoma"}, "format": "msd"})
        item = {"image": paths[0], "label": paths[1], "dataset": name, "case": name, "modality": modality}
        records.append(measure(item, LabelTable(targets, entries[-1:])))

    pool = DatasetPool({"targets": targets, "datasets": entries}, tmp_path, allow_missing=True)
    findings = check_overlaps(records, [Source(pool)])
    assert [[case for _, case in one.cases] for one in findings if one.kind == "same patient"] == [["ct", "mr"]]


def test_a_single_thin_slice_has_no_landmarks():
    found = describe_image(np.random.default_rng(0).normal(size=(1, 40, 40)).astype(np.float32), (0.5, 0.5, 0.5), "MR")
    assert not len(found["places_mm"])
