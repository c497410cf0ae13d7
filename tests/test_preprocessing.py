"""Preparation gives nnU-Net 2.8.1's numbers (stored by benchmarks/make_nnunet_fixtures.py), and there is a way back."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, LoadImaged, Orientationd
from scipy import ndimage
from tsfm.cases.cases import Preparation
from tsfm.cases.volumes import Reader
from tsfm.errors import CaseError
from tsfm.labels import LabelTable
from tsfm.preparation.fingerprint import fingerprint, plan_spacing
from tsfm.preparation.preprocessing import PrepareImaged, crop_box, prepare_case, prepare_image
from tsfm.preparation.resampling import (
    AxisResampler,
    label_box,
    nearest,
    new_shape,
    resample,
    resample_labels,
    resize_axis,
    thick_axis,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*Hounsfield")
NNUNET = np.load(Path(__file__).parent / "fixtures" / "nnunet_preparation.npz")
TABLE = LabelTable(
    {"a": {}, "b": {}, "c": {}}, [{"name": "set", "labels": {"1": "a", "2": "b", "3": "c"}, "modality": "CT"}]
)
CT = Preparation((1.5, 1.0, 1.0), {"CT": {"lower": 450, "upper": 1900, "mean": 400, "sd": 300}})
AXES = {
    "LPS": np.diag([-0.7, -0.7, 1.5, 1.0]),
    "RAS": np.diag([0.7, 0.7, 1.5, 1.0]),
    "permuted": np.array([[0, 0, 0.7, 3], [0, -0.7, 0, 5], [1.5, 0, 0, -7], [0, 0, 0, 1.0]]),
    "oblique": np.array([[0.69, 0.12, 0.1, 3], [-0.1, 0.66, 0.3, 5], [0.04, -0.2, 1.47, -7], [0, 0, 0, 1.0]]),
}


def save(path, array_SPL):
    nib.save(nib.Nifti1Image(np.ascontiguousarray(array_SPL.transpose(2, 1, 0)), AXES["LPS"]), path)
    return str(path)


@pytest.fixture
def island(tmp_path):
    """The fixture's case as files whose axes run to left, posterior and superior."""
    image = save(tmp_path / "image.nii.gz", NNUNET["island"])
    return {"image": image, "label": save(tmp_path / "label.nii.gz", NNUNET["island_labels"]), "dataset": "set"}


# ---- resampling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(NNUNET["spacings"])))
def test_resampling_gives_nnunets_image_and_labels(number):
    old, new = NNUNET["spacings"][number].tolist()
    image, labels = NNUNET["image"].astype(np.float32), NNUNET["labels"]
    shape, thick = new_shape(image.shape, old, new), thick_axis(old, new)
    expected = NNUNET[f"image_{number}"]
    assert shape == expected.shape
    assert np.abs(resample(image, shape, 3, thick) - expected).max() < 1e-5 * np.ptp(image)
    wrong = resample_labels(labels, shape, thick) != NNUNET[f"labels_{number}"]
    assert wrong.mean() <= 1e-4


def test_the_thick_axis_is_resampled_apart_only_where_one_axis_alone_is_thick():
    assert thick_axis((5, 1, 1), (1, 1, 1)) == 0
    assert thick_axis((1, 1, 1), (1, 4, 1)) == 1
    assert thick_axis((3, 1, 1), (1, 1, 1)) is None
    assert thick_axis((0.2, 1.2, 1.2), (1, 1, 4)) is None
    assert thick_axis((1.25, 0.3, 1.25 + 1e-7), (1, 1, 1)) is None


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("sizes", [(17, 5), (17, 40), (1, 6), (2, 1), (300, 7)])
def test_one_axis_is_scipys_zoom(order, sizes):
    n_in, n_out = sizes
    line = np.random.default_rng(0).normal(size=(3, n_in, 2))
    expected = ndimage.zoom(line, (1, n_out / n_in, 1), order=order, mode="nearest", grid_mode=True)
    found = resize_axis(torch.from_numpy(line), 1, n_out, order).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_part_of_the_rows_needs_only_a_part_of_the_input():
    axis = AxisResampler(200, 90, 3)
    x = torch.randn(4, 200, 3, dtype=torch.float64)
    low, high = axis.needed(30, 50)
    assert high - low < 80
    whole, part = axis.apply(x, 1), axis.apply(x[:, low:high], 1, 30, 50, offset=low)
    torch.testing.assert_close(part, whole[:, 30:50])


def test_labels_stay_labels_and_empty_maps_stay_empty():
    labels = np.zeros((6, 9, 9), np.uint8)
    assert not resample_labels(labels, (5, 4, 7)).any()
    labels[2:4, 3:6, 3:6] = 200
    labels[0, 0, 0] = 7
    assert set(np.unique(resample_labels(labels, (13, 20, 17)))) == {0, 7, 200}
    assert label_box(labels) == ((0, 4), (0, 6), (0, 6))


def test_the_number_of_threads_does_not_change_a_bit():
    x = torch.randn(40, 70, 60)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = resample(x, (40, 51, 90))
        torch.set_num_threads(2)
        assert torch.equal(one, resample(x, (40, 51, 90)))
    finally:
        torch.set_num_threads(threads)


def test_order_two_is_refused():
    with pytest.raises(ValueError, match="order is 2"):
        resample(np.zeros((4, 4, 4), np.float32), (3, 3, 3), order=2)


# ---- the whole preparation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ct", "z", "z_masked"])
def test_a_case_comes_out_as_nnunet_prepares_it(island, name):
    preparation = CT if name == "ct" else Preparation(CT.spacing_mm, masked={"MR": name == "z_masked"})
    found = prepare_case({**island, "modality": "CT" if name == "ct" else "MR"}, TABLE, preparation)
    expected = NNUNET[f"{name}_image"]
    assert found.properties["crop"] == NNUNET[f"{name}_crop"].tolist()
    assert found.image.dtype == np.float32 and found.image.shape == (1, *expected.shape)
    assert np.abs(found.image[0] - expected).max() < 1e-4 * np.ptp(expected)
    assert (found.codes != NNUNET[f"{name}_labels"]).mean() <= 1e-3


def test_the_mask_is_used_where_cropping_removed_more_than_a_quarter(island):
    image = np.pad(NNUNET["island"], 8)
    preparation = Preparation(CT.spacing_mm)
    tensor = torch.from_numpy(image[None].astype(np.float32))
    found, grid = prepare_image(tensor, (1.5, 0.7, 0.7), preparation, "MR")
    assert np.prod(grid.cropped_shape) < 0.75 * np.prod(image.shape)
    np.testing.assert_allclose(found[0], NNUNET["z_masked_image"], atol=1e-4 * np.ptp(NNUNET["z_masked_image"]))
    assert torch.equal(tensor[0], torch.from_numpy(image.astype(np.float32))), "the input was overwritten"


def test_resampled_before_it_is_normalised_a_masked_channel_is_nnunet_1s():
    """Against its rule: the mask is resampled, too (linear, from a half on), and what is outside of it is 0."""
    image = NNUNET["island"].astype(np.float32)
    preparation = Preparation(CT.spacing_mm, masked={"MR": True}, resample_first=True)
    found, grid = prepare_image(torch.from_numpy(image)[None], (1.5, 0.7, 0.7), preparation, "MR")
    cropped = image[tuple(slice(*side) for side in grid.crop)].astype(float)
    zoom = {"zoom": np.divide(grid.shape, cropped.shape), "mode": "nearest", "grid_mode": True}
    mask = ndimage.zoom(ndimage.binary_fill_holes(cropped).astype(float), order=1, **zoom) >= 0.5
    resampled = ndimage.zoom(cropped, order=3, **zoom).clip(cropped.min(), cropped.max())
    expected = np.where(mask, (resampled - resampled[mask].mean()) / resampled[mask].std(), 0)
    np.testing.assert_allclose(found[0], expected, atol=1e-4 * np.ptp(expected))


def test_channels_share_one_crop_and_are_normalised_apart():
    image = np.zeros((2, 10, 10, 10), np.float32)
    image[0, 2:5, 3:6, 4:7] = np.random.default_rng(0).normal(100, 20, (3, 3, 3))
    image[1, 4:9, 3:6, 4:7] = np.random.default_rng(1).normal(5, 1, (5, 3, 3))
    assert crop_box(image) == ((2, 9), (3, 6), (4, 7))
    found, _ = prepare_image(torch.from_numpy(image), (1, 1, 1), Preparation((1, 1, 1), in_channels=2), "MR")
    mask = (image != 0).any(0)[2:9, 3:6, 4:7]
    for channel in found.numpy():
        assert abs(channel[mask].mean()) < 1e-5 and abs(channel[mask].std() - 1) < 1e-4


def test_preparation_survives_json():
    preparation = Preparation((1.5, 1, 1), CT.intensity, 2, "MR", {"MR": True})
    assert Preparation.from_dict(json.loads(json.dumps(preparation.to_dict()))) == preparation
    with pytest.raises(ValueError, match="spacing_mm"):
        Preparation((1, 1, 0))
    with pytest.raises(ValueError, match="lacks"):
        Preparation((1, 1, 1), {"CT": {"mean": 0}})


# ---- the transform -----------------------------------------------------------------------------------------------


def chain(preparation):
    return Compose(
        [
            LoadImaged("image", reader=Reader(), ensure_channel_first=True),
            Orientationd("image", axcodes="SPL", labels=None),
            PrepareImaged("image", preparation),
        ]
    )


def written(tmp_path, axes, array):
    path = tmp_path / f"{axes}.nii.gz"
    nib.save(nib.Nifti1Image(array, AXES[axes]), path)
    return str(path)


@pytest.mark.parametrize("axes", AXES)
def test_the_transform_gives_the_same_numbers_as_prepare_case(tmp_path, axes):
    path = written(tmp_path, axes, NNUNET["island"])
    found = chain(CT)({"image": path})["image"]
    expected = prepare_case({"image": path, "modality": "CT"}, None, CT)
    np.testing.assert_array_equal(found.numpy(), expected.image)
    assert nib.aff2axcodes(found.affine.numpy()) == ("S", "P", "L")


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("grid", ["prepared", "cropped"])
def test_invertd_returns_to_the_files_own_grid(tmp_path, axes, grid):
    """A landmark seen in the prepared image comes back to the voxel of the file where it was."""
    array = np.zeros((22, 20, 14), np.float32)
    array[3:20, 2:18, 1:12] = 100
    array[9:13, 10:14, 5:9] = 1000
    path = written(tmp_path, axes, array)
    preprocessing = chain(Preparation((0.75, 0.5, 0.5)))
    data = preprocessing({"image": path, "image_path": "a string, as MONAI Label adds it"})
    image = data["image"]
    if grid == "prepared":
        seen = image > image.max() * 0.5
    else:
        record = image.applied_operations[-1]["extra_info"]
        crop = tuple(slice(*span) for span in record["crop"])
        oriented = Compose(preprocessing.transforms[:2])({"image": path})["image"]
        seen = oriented[(slice(None), *crop)] > 500
    data["pred"] = MetaTensor(seen.as_tensor().to(torch.uint8))
    back = Invertd("pred", transform=preprocessing, orig_keys="image", nearest_interp=True, to_tensor=True)(data)[
        "pred"
    ]
    assert back.dtype == torch.uint8 and back.shape == (1, *array.shape)
    np.testing.assert_allclose(back.affine, AXES[axes], atol=1e-5)
    np.testing.assert_array_equal(back[0].numpy() > 0, array > 500)


def test_the_prepared_affine_points_at_the_same_place(tmp_path):
    array = np.zeros((40, 36, 30), np.float32)
    array[5:35, 6:30, 3:27] = 1
    array[20:24, 12:16, 9:13] = 200
    path = written(tmp_path, "oblique", array)
    found = chain(Preparation((1.1, 0.9, 0.8)))({"image": path})["image"]
    seen = np.argwhere(found[0].numpy() > found[0].numpy().max() / 2).mean(0)
    truth = np.argwhere(array == 200).mean(0)
    apart = (found.affine.numpy() @ [*seen, 1] - AXES["oblique"] @ [*truth, 1])[:3]
    assert np.linalg.norm(apart) < 0.3


def test_an_image_that_says_nothing_of_itself_is_taken_at_one_millimetre():
    image = torch.rand(1, 6, 8, 10) + 1
    prepared = PrepareImaged("image", Preparation((1, 1, 1)), modality="MR")({"image": image})["image"]
    assert prepared.shape == image.shape and abs(float(prepared.mean())) < 1e-5


def test_a_bad_image_is_named(tmp_path):
    path = written(tmp_path, "LPS", np.zeros((6, 6, 6), np.float32))
    with pytest.raises(RuntimeError) as raised:
        chain(CT)({"image": path})
    assert "LPS.nii.gz: every voxel is zero" in str(raised.value.__cause__)


def test_a_prediction_on_a_foreign_grid_is_refused():
    transform = PrepareImaged("image", CT, modality="MR")
    odd = MetaTensor(torch.zeros(1, 9, 9, 9))
    odd.applied_operations = transform({"image": torch.rand(1, 6, 6, 6)})["image"].applied_operations
    with pytest.raises(ValueError, match="expected the prepared grid"):
        transform.inverse({"image": odd})


# ---- planning ----------------------------------------------------------------------------------------------------


def fingerprint_items(tmp_path):
    items = []
    for i in range(3):
        image = save(tmp_path / f"f{i}.nii", NNUNET[f"case_{i}"])
        items.append(
            {"image": image, "label": save(tmp_path / f"l{i}.nii", NNUNET[f"case_labels_{i}"]), "dataset": "set"}
        )
    return items


def test_the_fingerprint_is_nnunets(tmp_path):
    found = fingerprint(fingerprint_items(tmp_path), TABLE, progress=False)
    expected = json.loads(str(NNUNET["statistics"]))
    span = expected["upper"] - expected["lower"]
    assert set(found.intensity) == {"CT"} and not found.failed
    for name, value in expected.items():
        assert abs(found.intensity["CT"][name] - value) < 0.005 * span, name
    assert tuple(np.median(found.shapes, axis=0)) == (8, 14, 12)
    np.testing.assert_allclose(found.median_spacing_mm, (1.5, 0.7, 0.7), rtol=1e-6)


def test_a_case_that_cannot_be_read_is_reported_by_the_fingerprint(tmp_path):
    items = fingerprint_items(tmp_path)
    items[1]["label"] = str(tmp_path / "gone.nii.gz")
    found = fingerprint(items, TABLE, progress=False)
    assert len(found.shapes) == 2 and "gone.nii.gz" in found.failed[0][1]
    with pytest.raises(CaseError, match="no case could be read"):
        fingerprint(items[1:2], TABLE, progress=False)


@pytest.mark.parametrize("name", json.loads(str(NNUNET["planned"])))
def test_the_target_spacing_is_nnunets(name):
    spacings, shapes, expected = json.loads(str(NNUNET["planned"]))[name]
    assert plan_spacing(spacings, shapes) == pytest.approx(expected, rel=1e-9)


def test_nearest_keeps_type_and_leading_axes():
    labels = torch.arange(2 * 4 * 4 * 4, dtype=torch.uint8).reshape(2, 4, 4, 4)
    assert torch.equal(nearest(nearest(labels, (8, 8, 8)), (4, 4, 4)), labels)
