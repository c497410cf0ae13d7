"""Files as people have them: each is read with the right values at the right place, or refused by name with what to do."""

import gzip
import logging
import os
import struct
import warnings

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, LoadImaged, Orientationd
from tsfm.cases.cases import Preparation, load_case
from tsfm.cases.dicom import slice_files
from tsfm.cases.folders import find_images
from tsfm.cases.sources import Sources, file_identity
from tsfm.cases.volumes import Reader, read_grid, read_volume
from tsfm.errors import CaseError, CaseWarning
from tsfm.evaluation.evaluation import evaluate_folder
from tsfm.evaluation.label_maps import load_map
from tsfm.inference.prediction import write_label_map
from tsfm.labels import LabelTable
from tsfm.patches.store import CaseStore
from tsfm.planning.own_data import count_channels
from tsfm.preparation.preprocessing import PrepareImaged, prepare_image

SHAPE = (14, 12, 10)
HU = np.random.default_rng(0).integers(-1000, 1500, SHAPE).astype(np.int16)
AFFINE = np.array([[-0.8, 0, 0, 10], [0, -0.7, 0, 20], [0, 0, 2.0, -30], [0, 0, 0, 1.0]])
TABLE = LabelTable({"liver": {}}, [{"name": "one", "labels": {"1": "liver"}}])
CT = Preparation((1.5, 1.0, 1.0))
UPRIGHT = ((1, 0, 0), (0, 1, 0))


def save(path, array=HU, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def patch(path, offset, kind, *values):
    """Overwrite fields of a .nii's header (little endian), as a broken tool would."""
    raw = bytearray(path.read_bytes())
    struct.pack_into(f"<{len(values)}{kind}", raw, offset, *values)
    path.write_bytes(raw)
    return path


def refused(path, match, read=read_volume):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CaseError, match=match) as caught:
            read(path)
    assert str(path) in str(caught.value) or os.path.basename(path) in str(caught.value)


def warned(path, match):
    with pytest.warns(CaseWarning, match=match):
        return read_volume(path)


# ---- DICOM ---------------------------------------------------------------------------------------------------------


def write_slices(folder, positions, planes=None, axes=UPRIGHT, spacing=(0.8, 0.7), names=None, **tags):
    """One CT file per position (LPS mm); `tags`: one value for all slices or a list, as t0018_0081."""
    folder.mkdir(parents=True, exist_ok=True)
    planes = [HU[:, :, i % SHAPE[2]] for i in range(len(positions))] if planes is None else planes
    for i, (position, plane) in enumerate(zip(positions, planes, strict=True)):
        image = sitk.GetImageFromArray(np.ascontiguousarray(plane.T))
        image.SetSpacing(spacing)
        for tag, value in {
            "0008|0060": "CT",
            "0020|000e": "1.2.826.0.1.3680043.2.1125.1",
            "0020|000d": "1.2.3",
            "0020|0032": "\\".join(f"{x:g}" for x in position),
            "0020|0037": "\\".join(f"{x:g}" for x in np.ravel(axes)),
            "0020|0013": str(i),
            "0018|0050": "3",
        }.items():
            image.SetMetaData(tag, value)
        for tag, value in tags.items():
            image.SetMetaData(tag[1:].replace("_", "|"), str(value[i] if isinstance(value, list) else value))
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / (names[i] if names else f"{i:03}.dcm")))
        writer.Execute(image)
    return folder


def line(distances, direction=(0, 0, 1), start=(1, 2, 0)):
    return [np.array(start) + d * np.array(direction, float) for d in distances]


def ras(volume, i, j, k):
    """Where a voxel lies, in LPS mm."""
    return (volume.affine @ (i, j, k, 1))[:3] * (-1, -1, 1)


@pytest.mark.parametrize(
    ("distances", "found"),
    [
        (
            [0, 3, 6, 9, 21, 24, 27, 30],
            r"3 slices .* missing, between 9 and 21 mm where others are 3 mm .*0, 3, 6, 9, 21",
        ),
        ([0, 3, 6, 12, 15, 21, 24], r"2 slices .* missing, between 6 and 12, 15 and 21 mm"),
        ([0, 3, 6, 9, 14, 19, 24, 29], r"from 3 to 5 mm apart; expected even steps"),
        ([0, 3, 6, 10.5, 13.5, 16.5], r"from 3 to 4.5 mm apart"),
    ],
)
def test_slices_that_are_missing_or_uneven_are_refused_with_their_positions(tmp_path, distances, found):
    refused(write_slices(tmp_path / "ct", line(distances)), f"(?s){found}")


@pytest.mark.parametrize(
    ("distances", "tags", "found"),
    [
        ([0, 3, 6, 9] * 2, {"t0020_0012": [1] * 4 + [2] * 4}, r"8 slices .* at 4 places.*AcquisitionNumber: 1, 2"),
        (
            [0, 0, 3, 3, 6, 6, 9, 9],
            {"t0020_0100": [1, 2] * 4},
            r"more than once \(from 0 to 9 mm.*TemporalPositionIdentifier: 1, 2",
        ),
        ([0, 3, 6, 3.01], {}, r"4 slices .* at 3 places, 1 of them"),
        ([0, 3, 6, 9, 12, 15], {"t0018_0081": [2, 5] * 3}, r"2 different EchoTime \(2, 5\)"),
    ],
)
def test_two_volumes_in_one_series_are_refused_with_what_tells_them_apart(tmp_path, distances, tags, found):
    refused(write_slices(tmp_path / "ct", line(distances), **tags), f"(?s){found}.*a folder of its own")


def test_slices_are_sorted_by_their_place_whatever_their_names_and_numbers_are(tmp_path):
    order = np.random.default_rng(1).permutation(8)
    planes = [HU[:, :, n] for n in order]
    write_slices(tmp_path / "ct", line(2.5 * order), planes, names=[f"{i}.dcm" for i in np.argsort(-order)])
    volume = read_volume(tmp_path / "ct")
    np.testing.assert_array_equal(volume.array[0], HU[:, :, :8])
    np.testing.assert_allclose(ras(volume, 3, 4, 5), (1 + 3 * 0.8, 2 + 4 * 0.7, 12.5), atol=1e-6)


def test_positions_rounded_to_a_tenth_are_even(tmp_path):
    exact = np.arange(10) * 0.625
    volume = read_volume(write_slices(tmp_path / "ct", line(exact.round(1))))
    np.testing.assert_allclose([ras(volume, 0, 0, k)[2] for k in range(10)], exact, atol=0.05)


@pytest.mark.parametrize("axes", [UPRIGHT, ((1, 0, 0), (0, 0, -1))], ids=["axial", "coronal"])
def test_a_tilted_gantry_is_a_sheared_grid_and_the_result_lies_on_it(tmp_path, axes):
    normal = np.cross(*axes)
    step = 3.0 * normal + 0.9 * np.array(axes[1])  # 16.7 degrees
    positions = line(np.arange(10), step)
    write_slices(tmp_path / "ct", positions, axes=axes)
    volume = warned(tmp_path / "ct", r"tilted gantry, each slice lies 0.9 mm beside .*16.7 degrees")
    first = int(np.argmin(np.array(positions) @ normal))
    assert first == 0
    np.testing.assert_array_equal(volume.array[0], HU)
    for i, j, k in ((0, 0, 9), (13, 0, 4), (5, 11, 7)):
        expected = positions[k] + i * 0.8 * np.array(axes[0]) + j * 0.7 * np.array(axes[1])
        np.testing.assert_allclose(ras(volume, i, j, k), expected, atol=1e-5)
    steps = Compose(
        [LoadImaged("image", Reader(), ensure_channel_first=True), Orientationd("image", "SPL", labels=None),
         PrepareImaged("image", CT)]
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = steps({"image": str(tmp_path / "ct")})
        prepared["pred"] = MetaTensor((prepared["image"] > 0).byte(), meta=prepared["image"].meta)
        back = Invertd("pred", steps, "image", nearest_interp=True, to_tensor=True)(prepared)["pred"]
        write_label_map(back, tmp_path / "out.nii.gz")
        written, affine = load_map(tmp_path / "out.nii.gz")
    assert written.shape == SHAPE
    np.testing.assert_allclose(affine, volume.affine, atol=1e-4)
    header = nib.load(tmp_path / "out.nii.gz").header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 0)


def test_slices_that_drift_unevenly_are_refused(tmp_path):
    positions = line(np.arange(8) * 3.0)
    positions[4] = positions[4] + (0, 2, 0)
    refused(write_slices(tmp_path / "ct", positions), "drift sideways by uneven steps")


@pytest.mark.parametrize("odd", ["turned", "size", "spacing", "place"])
def test_a_slice_that_does_not_belong_is_named(tmp_path, odd):
    folder = write_slices(tmp_path / "ct", line([3, 6, 9]))
    axes = ((0, 1, 0), (0, 0, -1)) if odd == "turned" else UPRIGHT
    plane = HU[:9, :, 0] if odd == "size" else HU[:, :, 0]
    spacing = (0.9, 0.7) if odd == "spacing" else (0.8, 0.7)
    write_slices(folder, line([0]), [plane], axes, spacing, names=["scout.dcm"])
    if odd == "place":
        scout = (folder / "scout.dcm").read_bytes()
        (folder / "scout.dcm").write_bytes(scout.replace(b"1\\0\\0\\0\\1\\0", b"1\\0\\0\\0\\1  "))
    match = {
        "turned": "turned another way", "size": "another size", "spacing": "another PixelSpacing", "place": "6 numbers",
    }  # fmt: skip
    refused(folder, rf"(?s){match[odd]}.*|scout.dcm.*{match[odd]}")


def write_study(folder, thicknesses=(3,)):
    """A scout of two views, a SEG, a screenshot and a report beside one axial series per thickness, as a PACS exports them."""
    uid = "1.2.826.0.1.3680043.2.1125.9"
    for number, thickness in enumerate(thicknesses):
        write_slices(
            folder, line([0, 3, 6, 9]), names=[f"{number}_{i}.dcm" for i in range(4)], t0020_000e=f"{uid}.{number}",
            t0018_0050=thickness, t0008_103e=f"Thorax {thickness}", t0008_0008="ORIGINAL\\PRIMARY\\AXIAL",
        )  # fmt: skip
    for view, axes in enumerate([((1, 0, 0), (0, 0, -1)), ((0, 1, 0), (0, 0, -1))]):
        write_slices(
            folder, line([0]), axes=axes, names=[f"scout{view}.dcm"], t0020_000e=f"{uid}.90", t0008_103e="Scout",
            t0008_0008="ORIGINAL\\PRIMARY\\LOCALIZER",
        )  # fmt: skip
    for modality in ("SEG", "OT"):
        name = f"{modality}.dcm"
        write_slices(
            folder, line([0]), names=[name], t0020_000e=f"{uid}.91{len(modality)}", t0008_0060=modality,
            t0008_103e=f"Result {modality}",
        )  # fmt: skip
    screenshot = folder / "OT.dcm"  # without a place: another tag stands where its position was
    screenshot.write_bytes(screenshot.read_bytes().replace(b" \x002\x00", b" \x003\x00"))
    (folder / "report.dcm").write_bytes((folder / "SEG.dcm").read_bytes()[:600])  # DICOM, but without an image
    (folder / "notes.txt").write_text("read me")
    return folder


def test_of_a_study_the_one_series_of_image_planes_is_read_and_the_rest_named(tmp_path):
    alone = read_volume(write_slices(tmp_path / "alone", line([0, 3, 6, 9])))
    study = write_study(tmp_path / "study")
    volume = warned(study, r"left out .*'Scout' \(2 slices of 3 mm\).*report.dcm")
    np.testing.assert_array_equal(volume.array, alone.array)
    np.testing.assert_allclose(volume.affine, alone.affine)
    with pytest.warns(CaseWarning) as told:
        assert slice_files(str(study)) == [str(study / f"0_{i}.dcm") for i in range(4)]
        assert read_grid(study).shape == (*SHAPE[:2], 4)
    (text,) = {str(one.message) for one in told}
    assert all(f"'Result {modality}' (1 slice of 3 mm)" in text for modality in ("SEG", "OT"))
    assert "notes.txt" not in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_volume(tmp_path / "alone")


def test_a_slice_that_is_cut_short_is_refused_also_at_the_end_of_its_series(tmp_path):
    last = write_slices(tmp_path / "ct", line([0, 3, 6, 9])) / "003.dcm"
    whole = last.read_bytes()
    for damaged in (whole[:-1], whole[:600], b"", bytes(len(whole))):
        last.write_bytes(damaged)
        refused(tmp_path / "ct", "1 DICOM files of the kind .* cannot be read: 003.dcm; .*copy or download")


def test_of_a_study_with_several_series_each_is_listed_with_what_to_do(tmp_path):
    listed = r"3 DICOM series: .*'Thorax 1.5' \(4 slices of 1.5 mm\); 'Thorax 5' \(4 slices of 5 mm\)"
    refused(write_study(tmp_path / "three", (1, 1.5, 5)), rf"{listed}; expected exactly one: .* own \(`dcm2niix -f")
    refused(write_study(tmp_path / "many", range(1, 13)), "12 DICOM series: .*; and 2 more; expected exactly one")
    refused(write_study(tmp_path / "none", ()), "3 DICOM series: .*'Scout'.*localizers or hold no image planes")


def test_each_slices_own_slope_counts_though_the_first_ones_is_whole(tmp_path):
    slopes = [b"1 ", b".5", b"2 ", b"4 "]
    write_slices(tmp_path / "pet", line([0, 3, 6, 9]))
    for path, slope in zip(sorted((tmp_path / "pet").iterdir()), slopes, strict=True):
        raw, tag = path.read_bytes(), b"\x28\x00\x53\x10\x02\x00\x00\x00"
        assert raw.count(tag + b"1 ") == 1
        path.write_bytes(raw.replace(tag + b"1 ", tag + slope))
    found = read_volume(tmp_path / "pet").array[0]
    np.testing.assert_allclose(found, HU[:, :, :4] * np.array([float(slope) for slope in slopes]))


def test_a_nifti_beside_a_series_hides_nothing_and_one_slice_of_it_is_no_volume(tmp_path, caplog):
    folder = write_slices(tmp_path / "patient", line([0, 2, 4]))
    save(folder / "converted.nii.gz")
    with caplog.at_level(logging.WARNING):
        items = find_images(str(tmp_path))
    assert {(item["case"], item["image"]) for item in items} == {
        ("converted", str(folder / "converted.nii.gz")), ("patient", str(folder)),
    }  # fmt: skip
    assert "both are segmented" in caplog.text
    refused(folder / "001.dcm", rf"one of 3 files of a DICOM series; give its folder, {folder}")
    alone = write_slices(tmp_path / "alone", line([0]))
    for path in (alone, alone / "000.dcm"):
        np.testing.assert_array_equal(read_volume(path).array[0, :, :, 0], HU[:, :, 0])
        np.testing.assert_allclose(np.diag(read_volume(path).affine), (-0.8, -0.7, 3, 1))


def test_a_multi_frame_file_that_places_no_frame_is_read_with_a_warning(tmp_path):
    frames = (HU + 1000).astype(np.uint16)
    image = sitk.GetImageFromArray(frames.T.copy())
    image.SetSpacing((0.8, 0.7, 2.0))
    path = tmp_path / "frames.dcm"
    sitk.WriteImage(image, str(path))
    assert path.read_bytes().count(b"\x20\x00\x13\x91") == SHAPE[2]  # PlanePositionSequence
    path.write_bytes(path.read_bytes().replace(b"\x20\x00\x13\x91", b"\x20\x00\x12\x91"))
    for given in (path, tmp_path):
        np.testing.assert_array_equal(warned(given, "multi-frame").array[0], frames)


def write_frames(path, distances, slopes=None, explicit=True):
    """An enhanced MR with a frame per distance (mm, along z); a slope for all, or one per frame."""
    pydicom = pytest.importorskip("pydicom", "3")

    def dataset(**values):
        made = pydicom.Dataset()
        for name, value in values.items():
            setattr(made, name, [dataset(**one) for one in value] if name.endswith("Sequence") else value)
        return made

    def rescaled(slope):
        return {
            "PixelValueTransformationSequence": [{"RescaleIntercept": 5, "RescaleSlope": slope, "RescaleType": "US"}]
        }

    frames = [{"PlanePositionSequence": [{"ImagePositionPatient": [1, 2, float(z)]}]} for z in distances]
    shared = {
        "PixelMeasuresSequence": [{"PixelSpacing": [0.7, 0.8], "SliceThickness": 2}],
        "PlaneOrientationSequence": [{"ImageOrientationPatient": np.ravel(UPRIGHT).tolist()}],
    }
    kinds = (pydicom.uid.ImplicitVRLittleEndian, pydicom.uid.ExplicitVRLittleEndian)
    one = dataset(
        SOPClassUID=pydicom.uid.EnhancedMRImageStorage, SOPInstanceUID=pydicom.uid.generate_uid(), Modality="MR",
        SeriesInstanceUID=pydicom.uid.generate_uid(), NumberOfFrames=len(frames), Columns=SHAPE[0], Rows=SHAPE[1],
        SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2", BitsAllocated=16, BitsStored=16, HighBit=15,
        PixelRepresentation=1, PixelData=np.ascontiguousarray(HU[:, :, : len(frames)].T).tobytes(),
        SharedFunctionalGroupsSequence=[shared if slopes else shared | rescaled(2)],
        PerFrameFunctionalGroupsSequence=[a | rescaled(b) for a, b in zip(frames, slopes, strict=True)] if slopes else frames,
    )  # fmt: skip
    one.file_meta = pydicom.dataset.FileMetaDataset()
    one.file_meta.TransferSyntaxUID = kinds[explicit]
    one.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("explicit", [True, False])
def test_frames_of_one_file_that_are_no_even_stack_are_refused(tmp_path, explicit):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step, slopes in ((3, None), (-3, [2] * 6)):
            volume = read_volume(write_frames(tmp_path / "even.dcm", np.arange(6) * step, slopes, explicit))
            np.testing.assert_array_equal(volume.array[0], HU[:, :, :6] * 2 + 5)
            np.testing.assert_allclose(ras(volume, 3, 4, 5), (1 + 3 * 0.8, 2 + 4 * 0.7, 5 * step), atol=1e-6)
        whole = (tmp_path / "even.dcm").read_bytes()
        (tmp_path / "even.dcm").write_bytes(whole[whole.index(b"\x08\x00\x16\x00") :])  # no preamble, no meta header
        np.testing.assert_array_equal(read_volume(tmp_path / "even.dcm").array, volume.array)
    os.remove(tmp_path / "even.dcm")
    for name, distances in {"gap": (0, 3, 6, 15, 18), "echoes": (0, 3, 6) * 2, "shuffled": (0, 6, 3, 9)}.items():
        path = write_frames(tmp_path / f"{name}.dcm", distances, None, explicit)
        refused(path, r"no even stack .*frame \d of \d lies .* mm beside its place; `dcm2niix")
    refused(write_frames(tmp_path / "pet.dcm", (0, 3, 6), [1, 2, 4], explicit), "different rescalings")


def test_slices_that_are_stored_in_different_types_keep_their_values(tmp_path):
    planes = [np.full(SHAPE[:2], 50, np.uint16), np.full(SHAPE[:2], -50, np.int16)]
    volume = read_volume(write_slices(tmp_path / "ct", line([0, 3]), planes))
    np.testing.assert_array_equal(volume.array[0, 0, 0], [50, -50])


# ---- NIfTI: units, sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "scale"), [(1, 0.001), (3, 1000.0), (2, 1.0), (0, 1.0)])
def test_the_unit_of_length_counts_and_the_result_has_the_images_own_header(tmp_path, code, scale):
    image = nib.Nifti1Image(HU, np.diag([scale, scale, scale, 1]) @ AFFINE)
    image.header["xyzt_units"] = code | 8  # seconds beside it
    nib.save(image, tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(volume.affine, AFFINE, rtol=1e-5)
    meta = {"affine": torch.from_numpy(volume.affine), "filename_or_obj": volume.source}
    write_label_map(MetaTensor(torch.from_numpy(np.uint8(HU > 0))[None], meta=meta), tmp_path / "b.nii.gz")
    result = nib.load(tmp_path / "b.nii.gz")
    np.testing.assert_allclose(result.affine, image.affine, rtol=1e-5)
    assert int(result.header["xyzt_units"]) == code | 8
    np.testing.assert_allclose(load_map(tmp_path / "b.nii.gz")[1], AFFINE, rtol=1e-5)


def test_a_unit_that_means_nothing_is_warned_of(tmp_path):
    path = patch(save(tmp_path / "a.nii"), 123, "B", 5)
    np.testing.assert_allclose(warned(path, "unit of length has the code 5").affine, AFFINE)


@pytest.mark.parametrize(
    ("scale", "unit", "found"),
    [
        (1, 1, r"voxels of 800 x 700 x 2000 mm; expected 0.01 to 100 mm; .*its unit says metres"),
        (10_000, 2, "voxels of 8000 x 7000 x 2e.04 mm"),
        (0.003, 2, "voxels of 0.0024 x 0.0021 x 0.006 mm"),
        (1, 3, "voxels of 0.0008 x .*micrometres"),
    ],
)
def test_voxels_that_no_body_scan_has_are_refused_with_value_and_limit(tmp_path, scale, unit, found):
    image = nib.Nifti1Image(HU, np.diag([scale, scale, scale, 1]) @ AFFINE)
    image.header["xyzt_units"] = unit
    nib.save(image, tmp_path / "a.nii.gz")
    refused(tmp_path / "a.nii.gz", found)


def test_extents_that_no_body_has_are_refused(tmp_path):
    long = np.ones((60, 2, 2), np.uint8)
    refused(
        save(tmp_path / "long.nii", long, np.diag([90, 90, 90, 1.0])), "60x2x2 voxels measure 5400 mm .* 2 to 4000 mm"
    )
    refused(save(tmp_path / "tiny.nii", long, np.diag([0.02, 0.02, 0.02, 1])), "60x2x2 voxels measure 1.2 mm")


@pytest.mark.parametrize(
    ("spacing", "found"), [((60, 60, 60), "would become .*at most"), ((0.02,) * 3, "at least 0.0001")]
)
def test_a_prepared_size_that_cannot_be_meant_is_refused_before_memory_is_asked_for(spacing, found):
    image = torch.ones(1, 60, 60, 60)
    with pytest.raises(CaseError, match=f"(?s)x.nii: .*{found}"):
        prepare_image(image, spacing, CT, "MR", source="x.nii")


@pytest.mark.parametrize("form", ["sform", "qform", "neither"])
@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_voxel_size_of_zero_is_refused(tmp_path, form, value):
    image = nib.Nifti1Image(HU, AFFINE)
    image.set_sform(AFFINE, int(form == "sform"))
    image.set_qform(AFFINE, int(form == "qform"))
    nib.save(image, tmp_path / "a.nii")
    refused(patch(tmp_path / "a.nii", 76 + 4 * 3, "f", value), r"voxel sizes of 0.8 x 0.7 x (0|nan) in the header")


def test_voxel_sizes_beside_an_sform_that_says_otherwise_are_warned_of(tmp_path):
    path = patch(save(tmp_path / "a.nii"), 80, "f", 5.0)
    patch(path, 252, "h", 0)
    np.testing.assert_allclose(warned(path, "by pixdim, .* by sform").affine, AFFINE)


# ---- damage -------------------------------------------------------------------------------------------------------


def readers(path, tmp_path):
    """The ways into training, inference and scoring."""
    yield lambda: load_case({"image": str(path), "modality": "CT"}, None, CT)
    yield lambda: Reader().get_data(str(path))
    yield lambda: load_map(path)
    yield lambda: CaseStore(tmp_path / "store", TABLE, CT).open(
        {"image": str(path), "label": str(path), "dataset": "one"}
    )


@pytest.mark.parametrize("damage", ["checksum", "a voxel", "length", "no end", "rubbish after it"])
def test_a_gzip_file_whose_checksum_fails_is_refused_everywhere(tmp_path, damage):
    plain = save(tmp_path / "a.nii").read_bytes()
    raw = bytearray(gzip.compress(plain, 0))  # stored, so that a flipped voxel decompresses well
    if damage == "no end":
        del raw[-6:]
    elif damage == "rubbish after it":
        raw += b"rubbish"
    else:
        raw[{"checksum": -8, "length": -4, "a voxel": -500}[damage]] ^= 16
    path = tmp_path / "b.nii.gz"
    path.write_bytes(raw)
    for read in readers(path, tmp_path):
        with pytest.raises(CaseError, match=r"b.nii.gz: .*copy or download it again"):
            read()
    path.write_bytes(gzip.compress(plain[:400]) + gzip.compress(plain[400:]))  # two members are one file
    np.testing.assert_array_equal(read_volume(path).array[0], HU)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".nhdr", ".mhd"])
def test_compressed_nrrd_and_metaimage_files_are_checked_too(tmp_path, suffix):
    image = sitk.GetImageFromArray(np.cumsum(HU, 0).astype(np.int16).T.copy())
    image.SetSpacing((0.8, 0.7, 2.0))
    path = tmp_path / f"a{suffix}"
    sitk.WriteImage(image, str(path), useCompression=True)
    np.testing.assert_array_equal(read_volume(path).array[0], np.cumsum(HU, 0).astype(np.int16))
    data = next((p for p in tmp_path.iterdir() if p != path), path)
    whole = data.read_bytes()
    for position in (len(whole) - 3, len(whole) - 900):
        data.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        refused(path, "compressed voxels (are damaged|end too early)")
    data.write_bytes(whole[:-500])
    refused(path, "compressed voxels end too early")


def test_a_header_that_disagrees_with_the_size_of_its_file_is_refused(tmp_path):
    for name in ("a.nii", "b.nii.gz"):
        path = save(tmp_path / name)
        raw = bytearray(gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes())
        for size, found in ((6, "holds more voxels than the 14x12x6"), (32767, "asks for|too early|cut short")):
            struct.pack_into("<h", raw, 46, size)
            path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
            refused(path, found)
    image = sitk.GetImageFromArray(HU.T.copy())
    sitk.WriteImage(image, str(tmp_path / "c.mha"))
    (tmp_path / "c.mha").write_bytes((tmp_path / "c.mha").read_bytes().replace(b"14 12 10", b"14 12 06"))
    refused(tmp_path / "c.mha", "header asks for 2016 bytes of voxels, it holds 3360")


BROKEN = {
    "datatype": (70, "h", 7777),
    "dimensions": (40, "7h", 7, *[32767] * 6),
    "negative size": (42, "h", -5),
    "no axes": (40, "h", 99),
    "offset": (108, "f", float("nan")),
    "far offset": (108, "f", 1e30),
    "quaternion": (252, "h", 1, 0),
    "header size": (0, "i", 350),
    "voxel sizes": (76, "8f", *[float("inf")] * 8),
    "sform": (280, "12f", *[3e38] * 12),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_header_that_nibabel_chokes_on_names_its_file_and_the_other_cases_go_on(tmp_path, name):
    offset, kind, *values = BROKEN[name]
    label = save(tmp_path / "label.nii", np.uint8(HU > 0))
    good = {"image": str(save(tmp_path / "good.nii")), "label": str(label), "dataset": "one"}
    bad = patch(save(tmp_path / "bad.nii"), offset, kind[-1], *values)
    if name == "quaternion":
        patch(bad, 256, "f", 5, 5, 5)
    items = [{**good, "image": str(bad)}, good]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = CaseStore(tmp_path / "store", TABLE, CT).prepare(items, progress=False)
    assert report.prepared == 1
    [(item, message)] = report.failed
    assert item["image"] == str(bad) and message.startswith(str(bad)), message
    assert any(word in message for word in ("download", "correct", "convert", "header")), message


def test_memory_that_runs_out_names_the_file(tmp_path, monkeypatch):
    def fail(*_args, **_options):
        raise MemoryError

    path = save(tmp_path / "a.nii.gz")
    monkeypatch.setattr("nibabel.arrayproxy.array_from_file", fail)
    refused(path, "do not fit into memory")


def test_links_pipes_and_unreadable_files_are_listed_and_nothing_hangs(tmp_path, caplog):
    save(tmp_path / "good.nii.gz")
    (tmp_path / "sub").mkdir()
    os.symlink("/nowhere/far", tmp_path / "sub" / "alone")
    os.symlink("/nowhere/scan.nii.gz", tmp_path / "sub" / "dead.nii.gz")
    os.mkfifo(tmp_path / "sub" / "pipe")
    os.mkfifo(tmp_path / "sub" / "pipe.nii.gz")
    with caplog.at_level(logging.WARNING):
        found = {item["case"]: item["image"] for item in find_images(str(tmp_path))}
    assert set(found) == {"good", "dead", "pipe"}
    assert "sub/alone is left out: No such file" in caplog.text and "sub/pipe is left out" in caplog.text
    refused(found["dead"], "a link to /nowhere/scan.nii.gz, which is not there")
    refused(found["pipe"], "neither a file nor a folder")


def test_a_folder_that_cannot_be_listed_is_a_case_that_fails(tmp_path, monkeypatch):
    save(tmp_path / "good.nii.gz")
    (tmp_path / "closed").mkdir()
    listed = os.scandir

    def scandir(path):
        if os.path.basename(path) == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert {item["case"] for item in find_images(str(tmp_path))} == {"good", "closed"}


# ---- names and contents -------------------------------------------------------------------------------------------


def test_a_compression_that_the_name_denies_says_rename(tmp_path):
    packed, plain = save(tmp_path / "a.nii.gz").read_bytes(), save(tmp_path / "b.nii").read_bytes()
    (tmp_path / "c.nii").write_bytes(packed)
    refused(tmp_path / "c.nii", "compressed with gzip .* rename it to end in .nii.gz")
    (tmp_path / "d.nii.gz").write_bytes(plain)
    refused(tmp_path / "d.nii.gz", "not compressed .* rename it to end in .nii")
    (tmp_path / "e.nii.gz").write_bytes(bytes(len(plain)))
    refused(tmp_path / "e.nii.gz", "damaged or cut short .*Not a gzipped file")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1.0000001, r"1.00000011920.*, 1.2e-07 beside 1"), (1.5, "1.5, 0.5 beside 2")],
)
def test_a_label_that_is_no_whole_number_shows_what_differs(tmp_path, value, shown):
    label = np.zeros(SHAPE, np.float32)
    label[3, 4, 5] = value
    item = {"image": str(save(tmp_path / "i.nii")), "label": str(save(tmp_path / "l.nii", label)), "dataset": "one"}
    with pytest.raises(CaseError, match=f"l.nii: 1 voxels are not whole .*{shown}"):
        load_case(item, TABLE, CT)
    label[3, 4, 5] = 3e9
    save(tmp_path / "l.nii", label)
    with pytest.raises(CaseError, match=r"l\.nii: 1 voxels are beyond 32 bits, for example 3000000000;"):
        load_case(item, TABLE, CT)


def test_an_image_of_one_value_is_warned_of_and_not_segmented(tmp_path):
    flat = np.full(SHAPE, 40, np.int16)
    path = str(save(tmp_path / "flat.nii", flat))
    with pytest.warns(CaseWarning, match="flat.nii: every voxel holds 40, so there is nothing in it"):
        load_case({"image": path, "modality": "MR"}, None, CT)
    with pytest.raises(CaseError, match=r"flat.nii: every voxel holds the same value"), pytest.warns(CaseWarning):
        array, meta = Reader().get_data(path)
        PrepareImaged("image", CT)({"image": MetaTensor(torch.from_numpy(array.astype(np.float32)), meta=meta)})
    both = str(save(tmp_path / "both.nii", np.stack([HU, flat], -1)))
    with pytest.warns(CaseWarning, match="both.nii: channel 1 of 2: every voxel holds 40"):
        load_case({"image": both, "modality": "MR"}, None, Preparation((1, 1, 1), in_channels=2))


# ---- one reader: what training takes, scoring takes ---------------------------------------------------------------


@pytest.fixture
def truth(tmp_path):
    """A blob, saved as prediction `case` with ending _seg, and its voxels."""
    blob = np.zeros(SHAPE, np.uint8)
    blob[3:9, 2:7, 4:9] = 1
    blob[3:5, 2:4, 4:6] = 0
    save(tmp_path / "out" / "case_seg.nii.gz", blob)
    return blob


def dice(tmp_path, labels):
    summary = evaluate_folder(tmp_path / "out", labels, TABLE, tmp_path / "scores")
    return summary["datasets"]["one"]["liver"]["dice"]["mean"], summary


def as_sitk(array, affine):
    image = sitk.GetImageFromArray(array.T.copy())
    lps = np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def test_the_volume_of_a_sheared_voxel_is_its_own(tmp_path, truth):
    sheared = AFFINE.copy()
    sheared[1, 2] = 0.6
    save(tmp_path / "out" / "case_seg.nii.gz", truth, sheared)
    save(tmp_path / "labels" / "case.nii.gz", truth, sheared)
    with pytest.warns(CaseWarning, match="not at right angles"):
        evaluate_folder(tmp_path / "out", tmp_path / "labels", TABLE, tmp_path / "scores")
    row = (tmp_path / "scores" / "cases.csv").read_text().splitlines()
    found = float(row[1].split(",")[row[0].split(",").index("volume_true_ml")])
    assert found == pytest.approx(truth.sum() * 0.8 * 0.7 * 2.0 / 1000, rel=1e-4)


def test_voxels_beside_a_header_are_part_of_a_cases_identity(tmp_path):
    sitk.WriteImage(as_sitk(HU, AFFINE), str(tmp_path / "a.mhd"))
    before = file_identity({"image": str(tmp_path / "a.mhd")})
    os.utime(tmp_path / "a.raw", ns=(1, 1))
    assert [os.path.basename(path) for path, *_ in before] == ["a.mhd", "a.raw"]
    assert file_identity({"image": str(tmp_path / "a.mhd")}) != before


@pytest.mark.parametrize(
    ("name", "header", "files"),
    [
        ("a.mhd", "ObjectType = Image\nElementDataFile = voxels of a.raw\n", ["voxels of a.raw"]),
        ("a.mhd", "ElementDataFile = LOCAL\nELEMENTDATAFILE = b\n", []),
        ("a.mhd", "ElementDataFile = LIST\ns1.raw\ns 2.raw\n", ["s1.raw", "s 2.raw"]),
        ("a.mhd", "ElementDataFile = s%02d.raw 3 7 2\n", ["s03.raw", "s05.raw", "s07.raw"]),
        ("a.nhdr", "NRRD0004\nencoding: gzip\ndata file: sub/ö.gz\n", ["sub/ö.gz"]),
        ("a.nrrd", "NRRD0004\ndatafile: LIST 2\nx\ny\n", ["x", "y"]),
        ("a.nhdr", "NRRD0004\ndata file: %d.raw 2 1 -1 2\n\n", ["2.raw", "1.raw"]),
        ("a.nrrd", "NRRD0004\nencoding: raw\n\ndata file: x\n", []),
    ],
)
def test_the_files_of_a_header_are_those_that_it_names(tmp_path, name, header, files):
    paths = [tmp_path / one for one in (name, *files)]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text(header, "utf-8")
    (tmp_path / "a.raw").touch()
    assert [path for path, *_ in file_identity({"image": str(paths[0])})] == [str(path) for path in paths]
    if files:
        paths[-1].unlink()
        with pytest.raises(CaseError, match="cannot be read"):
            file_identity({"image": str(paths[0])})


def test_equal_headers_of_other_voxels_are_other_cases(tmp_path):
    for case, value in (("a", 1), ("b", 2)):
        (tmp_path / case).mkdir()
        sitk.WriteImage(as_sitk(np.full(SHAPE, value, np.int16), AFFINE), str(tmp_path / case / "ct.mhd"))
        header = tmp_path / case / "ct.mhd"
        (tmp_path / case / "ct.raw").rename(tmp_path / case / "v.raw")
        header.write_text(header.read_text().replace("ct.raw", "v.raw"))
        assert (read_volume(header).array == value).all()
    sources = Sources(tmp_path / "store")
    first, second = (
        sources.identity({"image": str(tmp_path / case / "ct.mhd"), "dataset": "d", "case": case}) for case in "ab"
    )
    assert first[0] == second[0] and first[1] != second[1]


def test_a_folder_beside_the_slices_is_no_part_of_a_cases_identity(tmp_path):
    (tmp_path / "series/thumbs").mkdir(parents=True)
    (tmp_path / "series/1.dcm").touch()
    assert [os.path.basename(path) for path, *_ in file_identity({"image": str(tmp_path / "series")})] == ["1.dcm"]


@pytest.mark.parametrize(
    "name", ["case_seg.nii.gz", "case.nrrd", "case.mha", "case_seg.nhdr", "case.NII.GZ", "case_mask.nii"]
)
def test_truths_of_any_format_and_ending_are_scored(tmp_path, truth, name):
    (tmp_path / "labels").mkdir()
    path = tmp_path / "labels" / name
    if path.suffix in (".nrrd", ".mha", ".nhdr"):
        sitk.WriteImage(as_sitk(truth, AFFINE), str(path))
    else:
        path.write_bytes(save(tmp_path / f"x.nii{'.gz' * name.lower().endswith('.gz')}", truth).read_bytes())
    assert dice(tmp_path, tmp_path / "labels")[0] == 1.0


@pytest.mark.parametrize("axes", [(2, 0, 1), (1, 0, 2), (2, 1, 0)])
@pytest.mark.parametrize("kind", ["map", "masks"])
def test_a_truth_with_other_axes_of_the_same_space_is_scored_voxel_by_voxel(tmp_path, truth, axes, kind):
    turned = np.ascontiguousarray(truth.transpose(axes)[::-1])
    affine = AFFINE[:, [*axes, 3]].copy()
    affine[:3, 3] += affine[:3, 0] * (turned.shape[0] - 1)
    affine[:3, 0] *= -1
    label = str(save(tmp_path / "labels" / "case.nii.gz", turned, affine))
    assert dice(tmp_path, tmp_path / "labels")[0] == 1.0
    if kind == "masks":
        table = LabelTable({"liver": {}}, [{"name": "one", "labels": {"liver": "liver"}}])
        items = [{"label": {"liver": label}, "case": "case"}]
        summary = evaluate_folder(tmp_path / "out", items, table, tmp_path / "masks")
        assert summary["datasets"]["one"]["liver"]["dice"]["mean"] == 1.0
    moved = affine.copy()
    moved[:3, 3] += 1.0
    save(tmp_path / "labels" / "case.nii.gz", turned, moved)
    with pytest.raises(ValueError, match=r"case: affines put a corner 1.73 mm apart"):
        dice(tmp_path, tmp_path / "labels")


def test_a_prediction_in_another_format_is_found(tmp_path, truth):
    (tmp_path / "out" / "case_seg.nii.gz").unlink()
    sitk.WriteImage(as_sitk(truth, AFFINE), str(tmp_path / "out" / "case_pred.mha"))
    save(tmp_path / "labels" / "case.nii.gz", truth)
    assert dice(tmp_path, tmp_path / "labels")[0] == 1.0


@pytest.mark.parametrize(("extra", "channels"), [((1, 2), 2), ((2, 1), 2), ((1,), 1), ((1, 1, 3), 3), ((), 1)])
def test_channels_are_counted_as_they_are_read(tmp_path, extra, channels):
    array = np.broadcast_to(HU.reshape(*SHAPE, *[1] * len(extra)), (*SHAPE, *extra)).copy()
    array[..., -1] += 7
    path = str(save(tmp_path / "a.nii.gz", array))
    pool = type("Pool", (), {"entries": {"one": {}}, "cases": [{"image": path}], "kept_in": None})
    assert count_channels(pool) == read_grid(path).channels == len(read_volume(path).array) == channels
    np.testing.assert_array_equal(read_volume(path).array[-1], array.reshape(*SHAPE, -1)[..., -1])
    refused(save(tmp_path / "b.nii", np.zeros((4, 4, 4, 2, 2), np.uint8)), "4x4x4x2x2 voxels; expected a 3D volume")
