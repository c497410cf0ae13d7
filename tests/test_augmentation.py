"""The augmentation list of the bundles has nnU-Net's distribution: probability, range, order and rule per channel.

Statistics over many draws of the very list that train.json declares, each drawn as PatchDataset draws it: the whole list
is seeded anew for every sample. Bounds are 4.5 standard deviations; the seeds are fixed.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose, RandScaleIntensityFixedMean, RandSimulateLowResolution
from scipy import ndimage, stats
from scipy.spatial.transform import Rotation
from tsfm.patches.augmentation import (
    RandGamma,
    RandGaussianBlur,
    RandPerChanneld,
    RandRotateScale,
    blur_axis,
    resample_patch,
    share_random_state,
    source_box,
    thick_patch_axis,
)
from tsfm.patches.dataset import plain_tensors

FIXTURES = Path(__file__).parent / "fixtures"
LIST = json.loads((FIXTURES / "augmentation.json").read_text())
NNUNET = np.load(FIXTURES / "nnunet_augmentation.npz")  # from nnU-Net 2.8.1, by fixtures/make_augmentation.py
DRAWS = 4000
CONFIG = {"imports": ["$import monai"], "mirror_axes": "SPL", "list": LIST}
NOISE, BLUR, BRIGHTNESS, CONTRAST, LOW_RESOLUTION, GAMMA_INVERTED, GAMMA, *MIRRORS = range(10)


@pytest.fixture(scope="module")
def probe():
    return torch.from_numpy(NNUNET["probe"])


@pytest.fixture(scope="module")
def outputs(probe):
    """Per transform of the list: {draw: output image} for the draws in which it did something to the probe."""
    compose = Compose(ConfigParser(CONFIG).get_parsed_content("list"))
    changed = [{} for _ in LIST]
    rng = np.random.default_rng(1)
    with plain_tensors():
        for draw in range(DRAWS):
            share_random_state(compose, np.random.RandomState(int(rng.integers(2**32))))
            for found, transform in zip(changed, compose.transforms, strict=True):
                image = transform({"image": probe.clone(), "label": probe[:1] > 0})["image"]
                if not torch.equal(image, probe):
                    found[draw] = image
    return changed


def assert_rate(count, probability, draws=DRAWS):
    spread = np.sqrt(draws * probability * (1 - probability))
    assert abs(count - draws * probability) < 4.5 * spread, f"{count} of {draws}, expected {draws * probability:.0f}"


def assert_uniform(values, lower, upper):
    values = np.asarray(values)
    assert len(values) > 100 and lower <= values.min() and values.max() <= upper
    assert stats.kstest(values, stats.uniform(lower, upper - lower).cdf).pvalue > 1e-3


def assert_halves(values, lower, upper):
    """Half of the values uniform in (lower, 1), half in (1, upper)."""
    values = np.asarray(values)
    assert_rate((values < 1).sum(), 0.5, len(values))
    assert_uniform(values[values < 1], lower, 1)
    assert_uniform(values[values >= 1], 1, upper)


def assert_like_nnunet(name, values):
    """The values' distribution is that of the parameters which nnU-Net's own transform drew."""
    quantiles, levels = NNUNET[f"{name}_quantiles"], NNUNET["levels"]
    assert stats.kstest(values, lambda value: np.interp(value, quantiles, levels)).pvalue > 1e-3


def assert_unrelated(first, second):
    assert abs(np.corrcoef(first, second)[0, 1]) < 4.5 / np.sqrt(len(first))


# ---- the list ---------------------------------------------------------------------------------------------------


def test_the_order_is_nnunets():
    transforms = ConfigParser(CONFIG).get_parsed_content("list")
    kinds = [one.transform if isinstance(one, RandPerChanneld) else one for one in transforms]
    gamma = ["RandGamma", "RandGamma"]
    assert [type(kind).__name__ for kind in kinds] == ["RandGaussianNoised", "RandGaussianBlur", "RandScaleIntensityd", "RandScaleIntensityFixedMeand",
                     "RandSimulateLowResolution", *gamma, "RandFlipd", "RandFlipd", "RandFlipd"]  # fmt: skip
    assert [kinds[number].power.invert_image for number in (GAMMA_INVERTED, GAMMA)] == [True, False]


def test_each_transform_has_its_probability(outputs):
    declared = [0.1, 0.2, 0.15, 0.15, 0.25, 0.1, 0.3, 0.5, 0.5, 0.5]
    assert [transform.prob for transform in ConfigParser(CONFIG).get_parsed_content("list")] == declared
    # how often nnU-Net's own changed this image; the square root of 2 is for its own spread
    for found, probability in zip(outputs, [*NNUNET["probability"], *NNUNET["mirror_probability"]], strict=True):
        assert_rate(len(found) / np.sqrt(2), probability / np.sqrt(2))


def test_the_transforms_are_drawn_independently_of_each_other(outputs):
    happened = np.array([[draw in found for draw in range(DRAWS)] for found in outputs], float)
    related = np.abs(np.corrcoef(happened) - np.eye(len(outputs)))
    assert related.max() < 4.5 / np.sqrt(DRAWS)


def test_half_of_the_channels_are_blurred_and_degraded_each_by_itself(outputs, probe):
    for number, probability in ((BLUR, 0.2), (LOW_RESOLUTION, 0.25)):
        hit = np.array(
            [[not torch.equal(a, b) for a, b in zip(i, probe, strict=True)] for i in outputs[number].values()]
        )
        # a zoom that rounds to the image's own size changes nothing
        probability *= 1 if number == BLUR else 0.9
        assert_rate(hit[:, 0].sum(), probability / 2)
        assert_rate(hit[:, 1].sum(), probability / 2)
        assert_rate(hit.all(1).sum(), probability / 4 * (1 if number == BLUR else 0.9))


# ---- what each does ---------------------------------------------------------------------------------------------


def test_noise_has_one_uniform_standard_deviation_for_all_channels(outputs, probe):
    noise = torch.stack([image - probe for image in outputs[NOISE].values()])
    sd = noise.flatten(2).std(2).numpy()
    assert_uniform(noise.flatten(1).std(1).numpy(), 0, 0.1 * 1.08)  # 8% more for the sample's own spread
    assert_like_nnunet("noise", noise.flatten(1).std(1).numpy())
    assert np.allclose(sd[:, 0], sd[:, 1], rtol=0.2)
    assert_unrelated(noise[:, 0].flatten().numpy(), noise[:, 1].flatten().numpy())


def test_blur_draws_a_sigma_per_axis_and_channel():
    impulse = torch.zeros(1, 21, 21, 21)
    impulse[0, 10, 10, 10] = 1
    blur, offset = RandGaussianBlur((0.5, 1.0)), torch.arange(21) - 10.0
    blur.set_random_state(seed=0)
    sigmas = []
    for _ in range(400):
        image = blur(impulse)[0]
        profiles = [image.sum(axes) for axes in ((1, 2), (0, 2), (0, 1))]
        # a sampled Gaussian's neighbours: w(1) / w(0) = exp(-1 / (2 sigma^2))
        sigmas.append([float((-0.5 / torch.log(profile[11] / profile[10])).sqrt()) for profile in profiles])
        assert np.isclose(float(image.sum()), 1, atol=1e-5) and all(abs(float(p @ offset)) < 1e-5 for p in profiles)
    sigmas = np.array(sigmas)
    for axis in range(3):
        assert_uniform(sigmas[:, axis], 0.5 - 1e-4, 1 + 1e-4)
        assert_unrelated(sigmas[:, axis], sigmas[:, axis - 1])
        assert_like_nnunet("blur", sigmas[:, axis])


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_blur_is_scipys_gaussian_filter_with_mirrored_border(probe, axis):
    expected = ndimage.gaussian_filter1d(probe.numpy().astype(np.float64), 0.8, axis, mode="mirror", truncate=4)
    assert np.allclose(blur_axis(probe, axis, 0.8), expected, atol=1e-6)


def test_blur_leaves_a_single_slice_alone_along_its_thickness():
    image = torch.rand(1, 1, 8, 8)
    assert torch.allclose(blur_axis(image, 1, 1.0), image)


def test_brightness_multiplies_each_channel(outputs, probe):
    factors = torch.stack([image / probe for image in outputs[BRIGHTNESS].values()]).flatten(2)
    assert torch.allclose(factors.amax(2), factors.amin(2), rtol=1e-4)
    first, second = factors[..., 0].T.numpy()
    assert_uniform(first, 0.75 - 1e-5, 1.25 + 1e-5)
    assert_uniform(second, 0.75 - 1e-5, 1.25 + 1e-5)
    assert_like_nnunet("brightness", first)
    assert_unrelated(first, second)


def test_contrast_scales_about_each_channels_mean_within_its_range(outputs, probe):
    factors = []
    for image in outputs[CONTRAST].values():
        row = []
        for out, channel in zip(image.double(), probe.double(), strict=True):
            mean, pick = channel.mean(), (channel - channel.mean() - 0.5).abs().argmin()
            factor = (out - mean).flatten()[pick] / (channel - mean).flatten()[pick]
            expected = (mean + factor * (channel - mean)).clamp(channel.min(), channel.max())
            assert torch.allclose(out, expected, atol=1e-5)
            row.append(float(factor))
        factors.append(row)
    first, second = np.array(factors).T
    assert_uniform(first, 0.75 - 1e-5, 1.25 + 1e-5)
    assert_like_nnunet("contrast", first)
    assert_unrelated(first, second)


def low_resolution(image, zoom_sizes):
    """Nearest voxel (centres aligned) down to `zoom_sizes`, linear back up, by numpy, one axis at a time."""
    for axis, small in enumerate(zoom_sizes):
        size = image.shape[axis]
        down = np.take(image, np.floor((np.arange(small) + 0.5) * size / small).astype(int), axis)
        where = np.clip((np.arange(size) + 0.5) * small / size - 0.5, 0, small - 1)
        image = np.apply_along_axis(lambda line, w=where: np.interp(w, np.arange(len(line)), line), axis, down)
    return image


def test_low_resolution_zooms_all_axes_alike_nearest_down_and_linear_up(outputs, probe):
    zooms = np.linspace(0.5, 1, 401)
    sizes = [tuple(np.round(np.array(probe.shape[1:]) * zoom).astype(int)) for zoom in zooms]
    table = {size: low_resolution(probe[0].numpy().astype(np.float64), size) for size in set(sizes)}
    found = []
    for image in outputs[LOW_RESOLUTION].values():
        if torch.equal(image[0], probe[0]):
            continue
        size, error = min(((s, np.abs(image[0].numpy() - t).max()) for s, t in table.items()), key=lambda pair: pair[1])
        assert error < 1e-4
        found.append(size)
    # the zoom is uniform, so each triple of sizes is as frequent as zooms that round to it
    share = np.array(
        [[sizes.count(s) / len(sizes), found.count(s) / len(found)] for s in table if s != tuple(probe.shape[1:])]
    )
    assert np.abs(share[:, 0] - share[:, 1]).max() < 0.06


@pytest.mark.parametrize("number", [GAMMA_INVERTED, GAMMA])
def test_gamma_keeps_mean_and_sd_and_draws_half_below_and_half_above_one(outputs, probe, number):
    sign = -1 if number == GAMMA_INVERTED else 1
    gammas = []
    for image in outputs[number].values():
        for out, channel in zip(sign * image, sign * probe, strict=True):
            assert torch.isclose(out.mean(), channel.mean(), atol=1e-4) and torch.isclose(
                out.std(), channel.std(), rtol=1e-4
            )
            relative = (channel - channel.min()) / (channel.max() - channel.min())
            pick = (relative - 0.5).abs().argmin()
            shown = (out.flatten()[pick] - out.min()) / (out.max() - out.min())
            gammas.append(float(torch.log(shown) / torch.log(relative.flatten()[pick])))
    gammas = np.array(gammas).reshape(-1, 2)
    assert_halves(gammas.ravel().clip(0.7, 1.5), 0.7, 1.5)
    assert_like_nnunet("gamma_inverted" if number == GAMMA_INVERTED else "gamma", gammas.ravel())
    assert np.all((gammas > 0.699) & (gammas < 1.501))
    assert_unrelated(*gammas.T)


def test_each_axis_is_mirrored_with_its_label(outputs, probe):
    for axis, number in enumerate(MIRRORS):
        assert all(torch.equal(image, probe.flip(axis + 1)) for image in outputs[number].values())
        flipped = ConfigParser(CONFIG).get_parsed_content(f"list#{number}")
        flipped.prob = 1.0
        assert torch.equal(flipped({"image": probe, "label": probe[:1]})["label"], probe[:1].flip(axis + 1))


def test_thick_slices_are_degraded_in_their_plane_only():
    transform = RandPerChanneld(
        "image", RandSimulateLowResolution(prob=1.0, zoom_range=(0.5, 0.5)), 1.0, thick_in_plane=True
    )
    per_slice = torch.arange(5.0)[None, :, None, None].expand(1, 5, 16, 16)
    assert torch.allclose(transform({"image": per_slice})["image"], per_slice)
    sagittal = per_slice.transpose(1, 3)
    assert torch.allclose(transform({"image": sagittal, "spacing_mm": (1.0, 1.0, 4.0)})["image"], sagittal)
    slab = sagittal.expand(1, 16, 16, 5)  # as few voxels, none of them thicker than others: nnU-Net degrades it in 3D
    assert not torch.allclose(transform({"image": slab, "spacing_mm": (1.0, 1.0, 1.0)})["image"], slab)
    cube = torch.arange(16.0)[None, :, None, None].expand(1, 16, 16, 16)
    assert not torch.allclose(transform({"image": cube})["image"], cube)


# ---- rotation and scaling ---------------------------------------------------------------------------------------


def spatial_draws(patch_size, count=20000, spacing_mm=(1.0, 1.0, 1.0)):
    rng, spatial = np.random.default_rng(2), RandRotateScale()
    return [spatial.draw(rng, patch_size, spacing_mm) for _ in range(count)]


def test_rotation_and_scaling_are_drawn_independently_as_one_matrix():
    draws = spatial_draws((112, 160, 192))
    assert_rate(sum(matrix is not None for matrix in draws), 1 - 0.8**2, len(draws))
    matrices = np.array([np.eye(3) if matrix is None else matrix for matrix in draws])
    scales = np.cbrt(np.linalg.det(matrices))
    turns = matrices / scales[:, None, None]
    assert np.allclose(turns @ turns.transpose(0, 2, 1), np.eye(3))  # one scale for all axes, no shear
    scaled, turned = np.abs(scales - 1) > 1e-9, np.abs(turns - np.eye(3)).max((1, 2)) > 1e-9
    assert_rate(scaled.sum(), 0.2, len(draws))
    assert_rate(turned.sum(), 0.2, len(draws))
    assert_unrelated(scaled.astype(float), turned.astype(float))
    assert_halves(scales[scaled], 0.7, 1.4)
    turns = turns[turned]
    # nnU-Net's order of the axes, R2 @ R1 @ R0, taken apart
    angles = [
        np.arctan2(turns[:, 2, 1], turns[:, 2, 2]),
        np.arcsin(-turns[:, 2, 0]),
        np.arctan2(turns[:, 1, 0], turns[:, 0, 0]),
    ]
    for angle in angles:
        assert_uniform(np.rad2deg(angle), -30, 30)
        assert_like_nnunet("angle", np.rad2deg(angle))
    assert_unrelated(angles[0], angles[1])
    assert_unrelated(angles[1], angles[2])


def test_patches_with_thick_slices_turn_and_scale_in_their_plane_only():
    matrices = np.array([matrix for matrix in spatial_draws((20, 64, 64)) if matrix is not None])
    assert np.all(matrices[:, 0] == [1, 0, 0]) and np.all(matrices[:, :, 0] == [1, 0, 0])
    turned = matrices[np.abs(matrices[:, 1, 2]) > 1e-9]
    assert_uniform(np.rad2deg(np.arctan2(turned[:, 2, 1], turned[:, 2, 2])), -180, 180)
    assert_rate(len(turned), 0.2, 20000)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_slices_may_lie_along_any_axis(axis):
    patch = np.insert([160, 112], axis, 32)
    spacing = np.insert([1.0, 1.0], axis, 5.0)
    matrices = np.array([matrix for matrix in spatial_draws(patch, 2000, spacing) if matrix is not None])
    alone = np.eye(3)[axis]
    assert np.allclose(matrices[:, axis], alone) and np.allclose(matrices[:, :, axis], alone)
    assert np.abs(matrices - np.eye(3)).max() > 0.9


@pytest.mark.parametrize(
    ("patch", "spacing", "axis"),
    [
        ((160, 160, 40), (1, 1, 1), None), ((224, 48, 224), (1.2, 0.8, 0.8), None), ((40, 160, 160), (1, 1, 1), 0),
        ((20, 64, 64), (5, 1, 1), 0), ((64, 20, 64), (1, 5, 1), 1), ((28, 64, 64), (5, 1, 1), None),
    ],
)  # fmt: skip
def test_slices_are_thick_by_their_voxels_and_not_by_the_side_that_is_short(patch, spacing, axis):
    """nnU-Net: ``max(patch) / patch[0] > 3`` after the axis of the largest spacing was turned to the front."""
    assert thick_patch_axis(patch, spacing) == axis


@pytest.mark.parametrize("seed", range(4))
def test_a_turned_and_scaled_patch_is_one_resampling_of_the_case(seed):
    """Against scipy's affine_transform of the whole case: trilinear once, nearest codes, zero outside."""
    rng = np.random.default_rng(seed)
    case, codes = rng.normal(size=(2, 30, 34, 38)).astype(np.float32), rng.integers(0, 5, (30, 34, 38)).astype(np.uint8)
    patch, origin = (14, 16, 20), np.array([rng.integers(-4, 14), 9, rng.integers(8, 22)])
    matrix = RandRotateScale(1.0, 30, 1.0).draw(rng, patch)
    box = np.clip(source_box(matrix, origin, patch), 0, np.array(codes.shape)[:, None])
    read = tuple(slice(*side) for side in box)
    image, label = resample_patch(
        torch.from_numpy(case[(slice(None), *read)]), torch.from_numpy(codes[read]), box[:, 0], matrix, origin, patch
    )
    half = (np.array(patch) - 1) / 2
    offset = origin + half - matrix @ half
    for shown, channel in zip(image, case, strict=True):
        expected = ndimage.affine_transform(
            channel.astype(np.float64), matrix, offset, patch, order=1, mode="grid-constant"
        )
        assert np.abs(shown.numpy() - expected).max() < 1e-4
    nearest = ndimage.affine_transform(codes, matrix, offset, patch, order=0, mode="grid-constant")
    assert (label[0].numpy() != nearest).mean() < 1e-3 and label.dtype == torch.uint8


# ---- for the same parameters, the same voxels as nnU-Net -------------------------------------------------------


class Fixed:
    """Stands in for a transform's random state: gives the next of some numbers, whatever is asked."""

    def __init__(self, *numbers):
        self.numbers = iter(numbers)

    def uniform(self, *_, **__):
        return next(self.numbers)

    rand = uniform


@pytest.mark.parametrize(
    ("name", "transform", "drawn"),
    [
        ("contrast", RandScaleIntensityFixedMean(1.0, 0.25, preserve_range=True), (0, 0.2)),
        ("low_resolution", RandSimulateLowResolution(1.0, "nearest-exact", "trilinear", (0.5, 1)), (0, 0.6)),
        ("gamma", RandGamma((0.7, 1.5)), (0, 0.6, 1.3)),
        ("gamma_inverted", RandGamma((0.7, 1.5), invert_image=True), (0, 0.6, 1.3)),
    ],
)
def test_for_nnunets_parameters_the_voxels_are_nnunets(probe, name, transform, drawn):
    transform.R = Fixed(*drawn)
    with plain_tensors():
        assert np.abs(transform(probe[:1])[0].numpy() - NNUNET[f"{name}_output"]).max() < 1e-5


def test_blur_gives_nnunets_voxels_but_for_its_longer_tail(probe):
    """nnU-Net 2 cuts the kernel at about 3 sigma, version 1 and this at 4."""
    blurred = probe[:1]
    for axis, sigma in enumerate((0.6, 0.8, 1.0), start=1):
        blurred = blur_axis(blurred, axis, sigma)
    assert np.abs(blurred[0].numpy() - NNUNET["blur_output"]).max() < 0.02


def test_a_turned_and_scaled_patch_is_nnunets():
    matrix = Rotation.from_euler("xyz", NNUNET["angles"]).as_matrix() * NNUNET["scale"]
    source, labels = NNUNET["source"], NNUNET["source_labels"]
    image, label = resample_patch(
        torch.from_numpy(source), torch.from_numpy(labels[0]), (0, 0, 0), matrix, (5, 5, 5), (8, 9, 10)
    )
    assert np.abs(image.numpy() - NNUNET["turned"]).max() < 1e-4
    # nearest here, argmax of linearly interpolated labels there
    assert (label.numpy() == NNUNET["turned_labels"]).mean() > 0.97


def test_a_range_without_one_is_refused():
    with pytest.raises(ValueError, match="scale_range"):
        RandRotateScale(scale_range=(1.1, 1.4))
    with pytest.raises(ValueError, match="gamma"):
        RandGamma((0.2, 0.9))
