"""Every odd input is either read right or refused with the file's name, what was found and what was expected."""

import errno
import gzip
import os
import sys
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import write_dicom
from monai.data import MetaTensor
from monai.transforms import LoadImaged, Orientation
from tsfm.cases.cases import Preparation, load_case, load_codes
from tsfm.cases.sources import file_identity
from tsfm.cases.volumes import Reader, read_volume, to_spl
from tsfm.errors import CaseError, CaseWarning
from tsfm.inference.prediction import write_label_map
from tsfm.labels import LabelTable

TABLE = LabelTable(
    {"liver": {}, "spleen": {}, "lesion": {"inside": "liver"}},
    [
        {"name": "ids", "labels": {"1": "liver", "2": "lesion"}},
        {"name": "masks", "labels": {"liver": "liver", "spleen": "spleen"}},
    ],
)
CT = Preparation((1.5, 1.0, 1.0))
MR = Preparation((1.5, 1.0, 1.0), default_modality="MR")
AFFINE = np.array([[-0.8, 0, 0, 10], [0, -0.7, 0, 20], [0, 0, 2.0, -30], [0, 0, 0, 1.0]])
SHAPE = (9, 8, 7)
HU = np.random.default_rng(0).integers(-1000, 1500, SHAPE).astype(np.int16)


def save(path, array, affine=AFFINE):
    nib.save(nib.Nifti1Image(array, affine), path)
    return str(path)


@pytest.fixture
def case(tmp_path):
    label = np.zeros(SHAPE, np.uint8)
    label[2:5, 2:5, 2:5] = 1
    label[3, 3, 3] = 2
    image = save(tmp_path / "image.nii.gz", HU)
    return {"image": image, "label": save(tmp_path / "label.nii.gz", label), "dataset": "ids", "modality": "CT"}


# ---- good input, in all its shapes -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.int32, np.float32, np.float64, ">i2"])
@pytest.mark.parametrize("name", ["image.nii", "image.nii.gz", "Fälle 1/ct volume ü.nii.gz"])
def test_voxel_types_compression_and_odd_paths_do_not_matter(tmp_path, dtype, name):
    (tmp_path / "Fälle 1").mkdir()
    array = np.arange(np.prod(SHAPE)).reshape(SHAPE) % 200
    found = read_volume(save(tmp_path / name, array.astype(dtype)))
    np.testing.assert_array_equal(found.array[0], array)
    np.testing.assert_allclose(found.affine, AFFINE)


def test_slope_and_intercept_are_applied(tmp_path):
    image = nib.Nifti1Image(np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE), AFFINE)
    image.header.set_slope_inter(2.0, -1024.0)
    nib.save(image, tmp_path / "image.nii.gz")
    expected = np.asarray(nib.load(tmp_path / "image.nii.gz").dataobj.get_unscaled(), float) * 2 - 1024
    np.testing.assert_allclose(read_volume(tmp_path / "image.nii.gz").array[0], expected, rtol=1e-6)


def test_the_axes_are_turned_as_orientationd_turns_them(tmp_path):
    random = np.random.default_rng(1)
    for permutation in ((0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)):
        affine = np.eye(4)
        affine[:3, :3] = (
            np.eye(3)[list(permutation)] * random.choice([-1, 1], 3) + random.normal(0, 0.1, (3, 3))
        ) * 1.3
        path = save(tmp_path / "image.nii", HU, affine)
        found, turned = to_spl(read_volume(path))
        loaded = LoadImaged("image", reader=Reader(), ensure_channel_first=True)({"image": path})["image"]
        expected = Orientation("SPL", labels=None)(loaded)
        np.testing.assert_array_equal(found, expected.numpy())
        np.testing.assert_allclose(turned, expected.affine.numpy(), atol=1e-5)
        assert nib.aff2axcodes(turned) == ("S", "P", "L")


def test_channels_come_from_a_4d_file_or_from_several_files(tmp_path):
    stacked = np.stack([HU, HU + 1, HU + 2], -1)
    together = read_volume(save(tmp_path / "all.nii.gz", stacked))
    apart = read_volume([save(tmp_path / f"{i}.nii.gz", stacked[..., i]) for i in range(3)])
    assert together.array.shape == (3, *SHAPE)
    np.testing.assert_array_equal(together.array, apart.array)
    item = {"image": str(tmp_path / "all.nii.gz"), "modality": "MR"}
    assert load_case(item, None, Preparation((1, 1, 1), in_channels=3)).image.shape == (3, 7, 8, 9)


def test_one_slice_is_a_volume(tmp_path):
    assert read_volume(save(tmp_path / "slice.nii", HU[:, :, :1])).array.shape == (1, 9, 8, 1)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".nii"])
def test_simpleitk_formats_lie_where_nibabel_puts_them(tmp_path, suffix):
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(HU.transpose(2, 1, 0))
    image.SetSpacing((0.8, 0.7, 2.0))
    image.SetDirection((0, -1, 0, 1, 0, 0, 0, 0, 1))
    image.SetOrigin((-10, -20, -30))
    for name in (f"a{suffix}", "b.nii.gz"):
        sitk.WriteImage(image, str(tmp_path / name))
    first, second = read_volume(tmp_path / f"a{suffix}"), read_volume(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(first.array, second.array)
    np.testing.assert_allclose(first.affine, second.affine, atol=1e-5)


def test_without_simpleitk_and_itk_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.nrrd").write_bytes(b"NRRD0004")
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    monkeypatch.setattr("monai.data.image_reader.has_itk", False)
    with pytest.raises(CaseError, match="pip install SimpleITK"):
        read_volume(tmp_path / "a.nrrd")


def test_a_folder_with_one_dicom_series_is_a_volume(tmp_path):
    write_dicom(tmp_path / "series", HU, (0.8, 0.7, 2.0))
    found = read_volume(tmp_path / "series")
    np.testing.assert_array_equal(found.array[0], HU)
    np.testing.assert_allclose(np.diag(found.affine), [-0.8, -0.7, 2.0, 1])
    assert len(file_identity({"image": tmp_path / "series"})) == SHAPE[2]
    write_dicom(tmp_path / "series", HU, (0.8, 0.7, 2.0), "1.2.826.0.1.3680043.2.1125.2")
    with pytest.raises(CaseError, match="2 DICOM series"):
        read_volume(tmp_path / "series")


@pytest.mark.parametrize("of", ["a folder", "a slice"])
def test_a_name_in_another_encoding_is_refused_before_it_ends_the_process(tmp_path, of):
    name = os.fsdecode(b"m\xfcller")
    write_dicom(tmp_path / "series", np.zeros((4, 5, 3), np.int16), (1.0, 1.0, 2.0))
    if of == "a slice":
        slices = sorted((tmp_path / "series").iterdir())
        slices[0].rename(slices[0].with_name(name))
    folder = (tmp_path / "series").rename(tmp_path / ("series" if of == "a slice" else name))
    with pytest.raises(CaseError, match=r"m.xfcller: a name in another encoding"):
        read_volume(str(folder))


def test_gray_saved_as_rgb_is_read_and_colors_are_refused(tmp_path):
    rgb = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    for name in rgb.dtype.names:
        rgb[name] = np.abs(HU) // 8
    path = save(tmp_path / "rgb.nii.gz", rgb)
    with pytest.warns(CaseWarning, match="RGB"):
        np.testing.assert_array_equal(read_volume(path).array[0], np.abs(HU) // 8)
    rgb["R"][0, 0, 0] += 1
    with pytest.raises(CaseError, match=r"rgb.nii.gz: RGB voxels .* convert it to gray"):
        read_volume(save(path, rgb))


def test_the_sform_wins_over_the_qform_with_a_warning(tmp_path):
    image = nib.Nifti1Image(HU, AFFINE)
    image.set_sform(AFFINE, 1)
    image.set_qform(np.diag([1.0, 1.0, 1.0, 1.0]), 1)
    nib.save(image, tmp_path / "image.nii")
    with pytest.warns(CaseWarning, match="the sform is used"):
        np.testing.assert_allclose(read_volume(tmp_path / "image.nii").affine, AFFINE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_volume(save(tmp_path / "agree.nii", HU))


def test_a_quaternion_that_rounding_made_too_long_is_read_as_itk_reads_it(tmp_path):
    half_turn = np.array([[0, 1, 0], [1, 0, 0], [0, 0, -1.0]])  # about the line between x and y
    image = nib.Nifti1Image(HU, None)
    image.header["pixdim"][:4], image.header["qform_code"], image.header["vox_offset"] = 1, 1, 352

    def write(excess, s_code=0):
        image.header["quatern_b"] = image.header["quatern_c"] = np.sqrt((1 + excess) / 2)
        image.header.set_sform(np.diag([1.0, 1, 1, 1]), s_code)
        (tmp_path / "q.nii").write_bytes(image.header.binaryblock + b"\0" * 4 + HU.tobytes("F"))
        return str(tmp_path / "q.nii")

    for excess in (0, 5e-7, 5e-6):
        volume = read_volume(write(excess))
        np.testing.assert_allclose(volume.affine[:3, :3], half_turn, atol=1e-5)
        grid = MetaTensor(torch.zeros(1, *SHAPE), volume.affine, {"filename_or_obj": volume.source})
        write_label_map(grid, tmp_path / "out.nii.gz")
        np.testing.assert_allclose(nib.load(tmp_path / "out.nii.gz").affine, volume.affine, atol=1e-6)
    with pytest.raises(CaseError, match=r"q.nii: the qform's quaternion .*0.7106.* longer than 1"):
        read_volume(write(0.01))
    with pytest.warns(CaseWarning, match="quaternion .* the sform used"):
        np.testing.assert_array_equal(read_volume(write(0.01, s_code=1)).affine, np.eye(4))


def test_a_header_without_orientation_is_warned_of(tmp_path):
    image = nib.Nifti1Image(HU, None)
    nib.save(image, tmp_path / "image.nii")
    with pytest.warns(CaseWarning, match="neither sform nor qform"):
        read_volume(tmp_path / "image.nii")


def test_structure_masks_merge_into_one_map(tmp_path):
    liver, spleen = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    liver[:3], spleen[3:5] = 1, 255
    item = {
        "image": save(tmp_path / "ct.nii.gz", HU),
        "label": {"spleen": save(tmp_path / "spleen.nii", spleen), "liver": save(tmp_path / "liver.nii", liver)},
        "dataset": "masks",
    }
    codes = load_case(item, TABLE, CT).codes
    assert [int((codes == i).sum()) for i in (1, 2)] == [3 * 56, 2 * 56]
    with pytest.raises(CaseError, match=r"none for \['liver', 'spleen'\], unlisted are \['pancreas'\]"):
        load_case({**item, "label": {"pancreas": item["label"]["liver"]}}, TABLE, CT)
    with pytest.raises(CaseError, match=r"none for \['spleen'\], unlisted are \[\].*would count as absent"):
        load_case({**item, "label": {"liver": item["label"]["liver"]}}, TABLE, CT)


def test_a_mask_does_not_hide_what_lies_in_it(tmp_path):
    """A kidney's mask holds its tumor; listed later it would paint the tumor over, of which the training saw nothing."""
    kidney, tumor = np.zeros((2, 6, 6, 6), np.uint8)
    kidney[1:5], tumor[2] = 1, 1
    files = {name: str(tmp_path / f"{name}.nii.gz") for name in ("kidney", "tumor")}
    for name, mask in (("kidney", kidney), ("tumor", tumor)):
        nib.save(nib.Nifti1Image(mask, np.eye(4)), files[name])
    targets = {"kidney": {}, "tumor": {"inside": "kidney"}}
    for order in (["kidney", "tumor"], ["tumor", "kidney"]):
        table = LabelTable(targets, [{"name": "m", "labels": {name: name for name in order}}])
        if order[0] == "kidney":
            np.testing.assert_array_equal(load_codes(files, table, "m").array[0], kidney + tumor)
            continue
        with pytest.raises(CaseError, match=r"'kidney' covers 36 voxels of 'tumor'.*list 'tumor' after 'kidney'"):
            load_codes(files, table, "m")
        kept = np.where(tumor, 0, kidney)  # masks that share no voxel may come in any order
        nib.save(nib.Nifti1Image(kept.astype(np.uint8), np.eye(4)), files["kidney"])
        np.testing.assert_array_equal(load_codes(files, table, "m").array[0], 2 * kept + tumor)


def test_image_and_label_in_different_axis_order_but_one_place_fit(case, tmp_path):
    label = nib.load(case["label"])
    turned = nib.as_closest_canonical(label)
    assert turned.affine[0, 0] > 0 > label.affine[0, 0]
    nib.save(turned, tmp_path / "turned.nii.gz")
    same = load_case({**case, "label": str(tmp_path / "turned.nii.gz")}, TABLE, CT)
    np.testing.assert_array_equal(same.codes, load_case(case, TABLE, CT).codes)


@pytest.mark.parametrize("degrees", [45, -45, 135])
def test_image_and_label_on_one_grid_halfway_between_two_axes_fit(case, tmp_path, degrees):
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    affine = np.array([[1, 0, 0, -3], [0, c, -2 * s, 5], [0, s, 2 * c, 7], [0, 0, 0, 1]])
    label = np.asarray(nib.load(case["label"]).dataobj)
    image, exact = save(tmp_path / "ct.nii", HU, affine), save(tmp_path / "exact.nii", label, affine)
    expected = load_case({**case, "image": image, "label": exact}, TABLE, CT).codes
    assert expected.any()
    for nudge in (-1e-5, 1e-5):
        nudged = affine.copy()
        nudged[1, 1] += nudge
        near = save(tmp_path / "near.nii", label, nudged)
        found = load_case({**case, "image": image, "label": near}, TABLE, CT).codes
        np.testing.assert_array_equal(found, expected)


def test_whole_numbers_saved_as_floats_are_labels(case, tmp_path):
    floats = np.asarray(nib.load(case["label"]).dataobj).astype(np.float32)
    same = load_case({**case, "label": save(tmp_path / "float.nii", floats)}, TABLE, CT)
    np.testing.assert_array_equal(same.codes, load_case(case, TABLE, CT).codes)


def test_an_empty_label_map_is_a_case(case, tmp_path):
    assert not load_case({**case, "label": save(tmp_path / "no.nii", np.zeros(SHAPE, np.uint8))}, TABLE, CT).codes.any()


# ---- bad input ---------------------------------------------------------------------------------------------------


def refused(item, match, preparation=CT):
    with pytest.raises(CaseError, match=match):
        load_case(item, TABLE, preparation)


def test_a_missing_file(case):
    refused({**case, "image": "/nowhere/ct.nii.gz"}, "/nowhere/ct.nii.gz: no such file")
    refused({**case, "label": "/nowhere/seg.nii.gz"}, "/nowhere/seg.nii.gz: no such file")
    with pytest.raises(CaseError, match="cannot be read"):
        file_identity({"image": "/nowhere/ct.nii.gz"})


def test_a_label_of_another_shape_or_place(case, tmp_path):
    small = save(tmp_path / "small.nii", np.zeros((9, 8, 6), np.uint8))
    found = r"small.nii and .*image.nii.gz: .*shape \(6, 8, 9\) along \(S, P, L\) against \(7, 8, 9\) along \(S, P, L\)"
    refused({**case, "label": small}, found)
    shifted = AFFINE.copy()
    shifted[0, 3] += 0.5
    moved = save(tmp_path / "moved.nii", np.zeros(SHAPE, np.uint8), shifted)
    refused({**case, "label": moved}, r"moved.nii and .*image.nii.gz: .* 0.5 mm apart \(allowed: 0.07 mm")
    shifted[0, 3] = AFFINE[0, 3] + 0.05
    load_case({**case, "label": save(tmp_path / "near.nii", np.zeros(SHAPE, np.uint8), shifted)}, TABLE, CT)


def test_channels_on_different_grids(tmp_path):
    files = [save(tmp_path / "a.nii", HU), save(tmp_path / "b.nii", HU[1:])]
    with pytest.raises(CaseError, match="channels of one case"):
        read_volume(files)


def test_an_unknown_label_id(case, tmp_path):
    label = np.zeros(SHAPE, np.uint8)
    label[:2, 0, 0] = 7
    refused({**case, "label": save(tmp_path / "seven.nii", label)}, r"seven.nii.*7: 2")


def test_label_fractions_and_nan(case, tmp_path):
    label = np.zeros(SHAPE, np.float32)
    label[0, 0, :3] = 0.5
    refused({**case, "label": save(tmp_path / "half.nii", label)}, r"half.nii: 3 voxels are not whole .* 0.5")
    label[:] = np.nan
    refused({**case, "label": save(tmp_path / "nan.nii", label)}, r"nan.nii: 504 voxels are not whole")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_voxels(case, tmp_path, value):
    image = HU.astype(np.float32)
    image[0, 0, :2] = value
    refused({**case, "image": save(tmp_path / "hole.nii", image)}, "hole.nii: 2 voxels are NaN or infinite")


def test_an_all_zero_image(case, tmp_path):
    refused({**case, "image": save(tmp_path / "zero.nii", np.zeros(SHAPE, np.int16))}, "zero.nii: every voxel is zero")


def test_2d_and_wrong_channel_counts(case, tmp_path):
    refused({**case, "image": save(tmp_path / "flat.nii", HU[:, :, 0])}, "flat.nii: 9x8 voxels; expected a 3D volume")
    refused({**case, "image": save(tmp_path / "4d.nii", np.stack([HU, HU], -1))}, r"4d.nii: 2 channel\(s\), expected 1")
    refused(case, r"image.nii.gz: 1 channel\(s\), expected 4", Preparation((1, 1, 1), in_channels=4))
    refused({**case, "label": save(tmp_path / "l4.nii", np.zeros((*SHAPE, 2), np.uint8))}, "2 volumes in a label file")


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
def test_a_truncated_file(case, tmp_path, suffix, keep):
    save(tmp_path / f"whole{suffix}", np.random.default_rng(0).normal(size=(30, 30, 30)))
    whole = (tmp_path / f"whole{suffix}").read_bytes()
    (tmp_path / f"cut{suffix}").write_bytes(whole[: int(len(whole) * keep)])
    refused({**case, "image": str(tmp_path / f"cut{suffix}")}, rf"cut{suffix}: .*(copy or download it again)")


def test_a_file_that_the_disk_or_the_network_does_not_give(case, monkeypatch):
    """A right to read that only the server knows of shows when the file is opened, a dying disk when it is read."""
    real = open

    def refusing(path, *arguments, **options):
        if str(path) == case["image"]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", refusing)
    refused(case, r"image.nii.gz: cannot be read \(Permission denied\); check the disk")


def test_a_file_of_another_kind(case, tmp_path):
    (tmp_path / "page.nii.gz").write_bytes(gzip.compress(b"<html>not found</html>" * 100))
    refused({**case, "image": str(tmp_path / "page.nii.gz")}, "page.nii.gz: not a readable NIfTI")
    pytest.importorskip("SimpleITK")
    (tmp_path / "page.nrrd").write_text("<html>")
    refused({**case, "image": str(tmp_path / "page.nrrd")}, "page.nrrd: SimpleITK cannot read it")


def test_complex_voxels_and_singular_affines(tmp_path):
    with pytest.raises(CaseError, match="complex"):
        read_volume(save(tmp_path / "k.nii", HU.astype(np.complex64)))
    image = nib.Nifti1Image(HU, None)
    image.header.set_sform(np.diag([1.0, 0.0, 1.0, 1.0]), 1)
    image.header["qform_code"] = 0
    nib.Nifti1Image(HU, None, image.header).to_filename(tmp_path / "flat.nii")
    with pytest.raises(CaseError, match="singular"):
        read_volume(tmp_path / "flat.nii")


@pytest.mark.parametrize("scale, offset", [(1 / 3000, 0.3), (1, 1024), (0, 5), (40, 0)])
def test_a_ct_whose_values_cannot_be_hounsfield_units_is_warned_of(case, tmp_path, scale, offset):
    image = (HU * scale + offset).astype(np.float32)
    with pytest.warns(CaseWarning, match="odd.nii: intensities from .* cannot be Hounsfield"):
        load_case({**case, "image": save(tmp_path / "odd.nii", image)}, TABLE, CT)


def test_ct_in_hounsfield_units_and_mr_give_no_warning(case, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_case(case, TABLE, CT)
        load_case({"image": save(tmp_path / "mr.nii", np.abs(HU))}, None, MR)


def test_loadimaged_does_not_hide_our_message(tmp_path):
    path = save(tmp_path / "flat.nii.gz", HU[:, :, 0])
    with pytest.raises(CaseError, match=r"flat.nii.gz: 9x8 voxels"):
        LoadImaged("image", reader=Reader(), ensure_channel_first=True)({"image": path})
