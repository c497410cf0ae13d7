"""A DICOM series goes in, a SEG comes out: dcmqi, which has nothing in common with highdicom, reads it back."""

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT
from monai.data import MetaTensor
from tsfm.cases.folders import find_images
from tsfm.cases.volumes import read_volume
from tsfm.errors import CaseError, CaseWarning
from tsfm.inference.dicom_seg import ABNORMAL, KINDS, LESION, SIDES, STRUCTURE, TISSUE, source_slices, write_seg
from tsfm.inference.prediction import CaseDataset, write_label_map
from tsfm.inference.saving import SaveResultsd
from tsfm.labels import as_table
from tsfm.schema import FileError

pydicom = pytest.importorskip("pydicom", "3", reason="pip install -r requirements-dicom.txt")
hd = pytest.importorskip("highdicom", reason="pip install -r requirements-dicom.txt")

POOL = as_table(str(ROOT / "bundles/tsfm_pretrain/configs/pool.json"))

SHAPE = (20, 16, 6)

UPRIGHT = ((1, 0, 0), (0, 1, 0))

TURNED = ((0.8, 0.6, 0), (0, 0, -1))

SHOWN = ("liver", "kidney_left", "portal_and_splenic_vein", "prostate_or_uterus", "liver_tumor")


def write_series(folder, axes=UPRIGHT, step=(0, 0, 3), start=(-5, 7, 11), leave_out=()):
    """A CT series as a scanner writes it, one file per slice, named against the order of the slices."""
    folder.mkdir(parents=True)
    study, series, frame = (pydicom.uid.generate_uid() for _ in range(3))
    for number in range(SHAPE[2]):
        one = pydicom.Dataset()
        one.SOPClassUID, one.SOPInstanceUID = pydicom.uid.CTImageStorage, pydicom.uid.generate_uid()
        one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = study, series, frame
        one.Modality, one.PatientName, one.PatientID, one.SeriesNumber = "CT", "Müller^Zoë", "7", 4
        one.SpecificCharacterSet = "ISO_IR 100"
        one.PatientBirthDate, one.PatientSex, one.StudyDate, one.StudyTime = "19700101", "F", "20260102", "120000"
        one.AccessionNumber, one.StudyID, one.ReferringPhysicianName = "", "1", ""
        one.ImageOrientationPatient = [float(x) for x in np.ravel(axes)]
        one.ImagePositionPatient = [round(float(x), 4) for x in np.array(start) + number * np.array(step)]
        one.PixelSpacing, one.SliceThickness, one.InstanceNumber = [0.7, 0.8], 5.0, number + 1
        one.Columns, one.Rows = SHAPE[:2]
        one.SamplesPerPixel, one.PhotometricInterpretation, one.PixelRepresentation = 1, "MONOCHROME2", 1
        one.BitsAllocated, one.BitsStored, one.HighBit = 16, 16, 15
        one.RescaleSlope, one.RescaleIntercept = 1, -1024
        one.PixelData = np.full(SHAPE[1::-1], 1000 + number, np.int16).tobytes()
        for name in leave_out:
            delattr(one, name)
        one.file_meta = pydicom.dataset.FileMetaDataset()
        one.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        one.save_as(folder / f"{SHAPE[2] - number}.dcm", enforce_file_format=True)
    return folder


def label_map_on(folder, seed=0, shown=SHOWN):
    """A label map of boxes on the grid of a series, as the inference would hand it over."""
    volume = read_volume(folder)
    values = np.zeros(volume.array.shape[1:], np.uint8)
    rng = np.random.default_rng(seed)
    for name in shown:
        low = [rng.integers(0, side // 2) for side in SHAPE]
        box = tuple(slice(a, a + side // 3 + 1) for a, side in zip(low, SHAPE, strict=True))
        values[box] = POOL.names.index(name) + 1
    meta = {"filename_or_obj": str(folder)}
    return MetaTensor(torch.from_numpy(values[None]), affine=torch.from_numpy(volume.affine), meta=meta)


def read_with_dcmqi(path, folder):
    """Segment label -> a NIfTI image of its voxels, of what segimage2itkimage writes."""
    tool = pytest.importorskip("dcmqi", reason="pip install -r requirements-dev.txt")
    program = Path(tool.__file__).parent / "bin/segimage2itkimage"
    folder.mkdir()
    done = subprocess.run(
        [program, "--inputDICOM", path, "--outputDirectory", folder, "--outputType", "nii", "--prefix", "seg"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    described = json.loads((folder / "seg-meta.json").read_text())["segmentAttributes"]
    images = {}
    for number, segments in enumerate(described, start=1):
        image = nib.load(folder / f"seg-{number}.nii.gz")
        for segment in segments:
            mask = np.asarray(image.dataobj) == segment["labelID"]
            images[segment["SegmentLabel"]] = nib.Nifti1Image(mask.astype(np.uint8), image.affine)
    return images


def on_grid(image, grid):
    """Bool voxels of an image that lies on part of another one's grid, its axes turned or not."""
    places = np.argwhere(np.asarray(image.dataobj) > 0)
    found = nib.affines.apply_affine(np.linalg.inv(grid.affine) @ image.affine, places)
    np.testing.assert_allclose(found, np.rint(found), atol=1e-2)
    mask = np.zeros(grid.shape, bool)
    mask[tuple(np.rint(found).astype(int).T)] = True
    return mask


@pytest.mark.parametrize(
    ("axes", "step"),
    [(UPRIGHT, (0, 0, 3)), (UPRIGHT, (0, 0, -3)), (TURNED, 3 * np.cross(*TURNED)), (UPRIGHT, (0, 1, 3))],
    ids=["upright", "feet first", "turned", "tilted"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_dcmqi_reads_the_voxels_of_the_nifti_output_at_the_same_places(tmp_path, kind, axes, step):
    source = write_series(tmp_path / "ct", axes, step)
    label_map = label_map_on(source)
    write_label_map(label_map, tmp_path / "map.nii.gz")
    write_seg(label_map, tmp_path / "seg.dcm", POOL, kind)
    written = nib.load(tmp_path / "map.nii.gz")
    if step[1] == 1:  # dcmqi stacks tilted slices straight: their places are the next test's
        written.affine[1, 2] = 0
    images = read_with_dcmqi(tmp_path / "seg.dcm", tmp_path / "read")
    assert images.keys() == {POOL.channel_def()[str(value)] for value in np.unique(written.dataobj) if value}
    for value, name in POOL.channel_def().items():
        if name in images:
            np.testing.assert_array_equal(on_grid(images[name], written), np.asarray(written.dataobj) == int(value))


def test_every_frame_of_a_tilted_series_lies_on_the_slice_that_it_refers_to(tmp_path):
    source = write_series(tmp_path / "ct", TURNED, 3 * np.cross(*TURNED) + (0.24, 0.18, 0.5))
    label_map = label_map_on(source)
    write_seg(label_map, tmp_path / "seg.dcm", POOL, "LABELMAP")
    slices = {one.SOPInstanceUID: one for one in map(pydicom.dcmread, source.iterdir())}
    to_ras = np.diag([-1, -1, 1])
    for plane, frame in zip(*frames_of(tmp_path / "seg.dcm"), strict=True):
        one = slices[frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID]
        assert frame.PlanePositionSequence[0].ImagePositionPatient == one.ImagePositionPatient
        corner = np.linalg.inv(label_map.affine.numpy()) @ np.array([*(to_ras @ one.ImagePositionPatient), 1])
        np.testing.assert_allclose(corner[:2], 0, atol=1e-3)
        np.testing.assert_array_equal(plane, label_map[0, :, :, round(corner[2])].numpy().T)


def frames_of(path):
    """(frames, what is said of each) of a multi-frame file."""
    seg = pydicom.dcmread(path)
    return seg.pixel_array.reshape(-1, seg.Rows, seg.Columns), seg.PerFrameFunctionalGroupsSequence


def test_segments_carry_codes_colors_and_tracking_ids_and_the_study_is_that_of_the_source(tmp_path):
    source = write_series(tmp_path / "ct")
    label_map = label_map_on(source)
    for name in ("first.dcm", "second.dcm"):
        write_seg(label_map, tmp_path / name, POOL)
    first, second = (hd.seg.segread(tmp_path / name) for name in ("first.dcm", "second.dcm"))
    ct = pydicom.dcmread(source / "1.dcm")
    assert [str(first.PatientName), first.PatientID] == ["Müller^Zoë", "7"]
    assert (first.StudyInstanceUID, first.FrameOfReferenceUID) == (ct.StudyInstanceUID, ct.FrameOfReferenceUID)
    assert first.ReferencedSeriesSequence[0].SeriesInstanceUID == ct.SeriesInstanceUID
    assert first.SOPInstanceUID != second.SOPInstanceUID
    assert first.get_tracking_ids() == second.get_tracking_ids()
    assert len(first.get_tracking_ids()) == len(SHOWN)
    segments = {one.SegmentLabel: one for one in first.SegmentSequence}
    kidney, tumor, vague = segments["left kidney"], segments["liver_tumor"], segments["prostate_or_uterus"]
    assert kidney.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Kidney"
    assert kidney.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    assert tumor.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Neoplasm"
    assert tumor.AnatomicRegionSequence[0].CodeMeaning == "Liver"
    assert vague.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Tissue"
    assert len({tuple(one.RecommendedDisplayCIELabValue) for one in first.SegmentSequence}) == len(SHOWN)


def test_every_code_is_one_of_the_standard_with_its_meaning():
    concepts = pytest.importorskip("pydicom.sr._concepts_dict").concepts["SCT"]
    known = {(code, meaning): groups for entry in concepts.values() for code, (meaning, groups) in entry.items()}
    declared = [POOL.entry(name)["snomed"] for name in POOL.names if "snomed" in POOL.entry(name)]
    for codes in [*declared, {"type": TISSUE}, {"type": LESION}]:
        assert 7151 in known[tuple(codes["type"].split(" ", 1))], codes
        if "site" in codes:
            assert {4, 4030} & set(known[tuple(codes["site"].split(" ", 1))]), codes
    for text, group in ((STRUCTURE, 7150), (ABNORMAL, 7150), (TISSUE, 7150), *((side, 244) for side in SIDES.values())):
        assert group in known[tuple(text.split(" ", 1))]


def test_save_names_the_segs_beside_the_label_map_and_images_without_a_series_are_refused_at_once(tmp_path):
    series = write_series(tmp_path / "scans" / "ct")
    (item,) = find_images(series.parent, tmp_path / "out", save=["label_map", "dicom_seg"])
    with pytest.raises(ValueError, match="a table names the segments of dicom_seg"):
        SaveResultsd("pred", tmp_path / "out", save="dicom_seg")
    save = SaveResultsd("pred", tmp_path / "out", "overwrite", ["label_map", "dicom_seg", "dicom_labelmap"], POOL)
    save({**item, "pred": label_map_on(series)})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ct.labelmap.dcm", "ct.nii.gz", "ct.seg.dcm"]
    numbers = [POOL.names.index(name) + 1 for name in sorted(SHOWN, key=POOL.names.index)]
    assert hd.seg.segread(tmp_path / "out/ct.labelmap.dcm").segment_numbers[-len(SHOWN) :] == numbers
    (series.parent / "b.nii.gz").touch()
    with pytest.raises(FileError, match=r"1 of 2 images are no folder .*b\.nii\.gz, and dicom_seg refers to one"):
        find_images(series.parent, tmp_path / "out", save="dicom_seg")


def test_nothing_found_is_one_empty_frame(tmp_path):
    source = write_series(tmp_path / "ct")
    write_seg(label_map_on(source, shown=()), tmp_path / "seg.dcm", POOL)
    frames, _ = frames_of(tmp_path / "seg.dcm")
    assert frames.shape == (1, *SHAPE[1::-1])
    assert not frames.any()


def test_headers_that_leave_out_what_may_be_left_out_will_do(tmp_path):
    leave_out = ("AccessionNumber", "StudyID", "PatientSex", "SliceThickness", "SeriesNumber")
    source = write_series(tmp_path / "ct", leave_out=leave_out)
    write_seg(label_map_on(source), tmp_path / "seg.dcm", POOL)
    assert hd.seg.segread(tmp_path / "seg.dcm").number_of_segments == len(SHOWN)


def test_in_the_folder_of_a_study_a_seg_refers_to_the_series_that_was_read(tmp_path):
    source = write_series(tmp_path / "ct")
    wanted = [str(one.SOPInstanceUID) for one in source_slices(str(source))]
    write_seg(label_map_on(source), tmp_path / "seg.dcm", POOL)
    scout = pydicom.dcmread(write_series(tmp_path / "scout", axes=TURNED) / "1.dcm")
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    scout.save_as(source / "0.dcm")
    (tmp_path / "seg.dcm").rename(source / "earlier.dcm")
    with pytest.warns(CaseWarning, match=r"left out beside the series.*TSFM segmentation"):
        assert [str(one.SOPInstanceUID) for one in source_slices(str(source))] == wanted
        write_seg(label_map_on(source), tmp_path / "seg.dcm", POOL)
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    (referred,) = seg.ReferencedSeriesSequence
    assert {str(one.ReferencedSOPInstanceUID) for one in referred.ReferencedInstanceSequence} <= set(wanted)


def test_what_cannot_become_a_seg_is_refused_with_the_reason(tmp_path, monkeypatch):
    source = write_series(tmp_path / "ct", leave_out=["FrameOfReferenceUID"])
    with pytest.raises(CaseError, match=r"dcm: has no FrameOfReferenceUID"):
        write_seg(label_map_on(source), tmp_path / "seg.dcm", POOL)
    (case,) = CaseDataset([{"image": str(source), "case": "ct"}], pytest.fail, save="dicom_seg")
    assert "has no FrameOfReferenceUID" in str(case["error"])  # before it is read
    good = write_series(tmp_path / "good")
    with pytest.raises(CaseError, match=r"not on the grid of the series: affines put a corner 5 mm apart"):
        label_map = label_map_on(write_series(tmp_path / "other", start=(0, 7, 11)))
        label_map.meta["filename_or_obj"] = str(good)
        write_seg(label_map, tmp_path / "seg.dcm", POOL)
    with pytest.raises(CaseError, match=r"a.nii.gz: a DICOM SEG refers to the slices of a DICOM series"):
        source_slices("a.nii.gz")
    (good / "3.dcm").unlink()
    with pytest.raises(CaseError, match=r"1 slices of the DICOM series are missing"):
        source_slices(str(good))
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(ImportError, match=r"pip install -r requirements-dicom\.txt"):
        source_slices(str(source))
