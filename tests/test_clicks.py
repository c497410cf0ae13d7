"""Clicks: drawn, simulated, brought from a file's voxels to windows, learned from, and refused where they cannot be meant."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import logits_of
from monai.inferers import SimpleInferer
from monai.transforms import Compose, Invertd, LoadImaged
from scipy import ndimage
from tsfm.cases.cases import Preparation
from tsfm.cases.folders import find_images
from tsfm.cases.volumes import Reader
from tsfm.inference.clicks import ClickInferer, ReadClicksd
from tsfm.inference.windows import SlabInferer, window_starts
from tsfm.labels import LabelTable
from tsfm.network.clicks import Click, ClickError, click_channels, simulated_click
from tsfm.network.loss import PartialLabelLoss
from tsfm.preparation.preprocessing import OrientImaged, PrepareImaged
from tsfm.training.clicks import ClickEvalStep, ClickTable, ClickTrainStep, with_click_channels

pytestmark = pytest.mark.convolutions

TREE = LabelTable(
    {"kidney": {"display": "Left Kidney"}, "tumor": {"inside": "kidney"}, "spleen": {}},
    [
        {"name": "one", "labels": {"1": "kidney", "2": "tumor", "3": "spleen"}},
        {"name": "two", "labels": {"1": "spleen"}},
    ],
)
SIGMA = 2.0
PATCH = (16, 16, 16)


class Obedient(torch.nn.Module):
    """Finds each target where the image lies above its level, and does as it is told within some voxels of a click."""

    def __init__(self, levels=(0.0, 10.0, 10.0)):
        super().__init__()
        self.levels = torch.nn.Parameter(torch.tensor(levels).view(1, -1, 1, 1, 1))
        self.windows = 0

    def forward(self, x):
        self.windows += len(x)
        image, inside, outside = x[:, :1], x[:, -2:-1], x[:, -1:]
        return (image - self.levels).clamp(-1, 1) + 40 * (inside > 0.3) - 40 * (outside > 0.3)


def write_image(path, shape=(40, 36, 20), seed=0):
    """Noise around 1 with an empty border, stored with axes that point to P, I and L, voxels of 1.2 x 2.5 x 0.9 mm."""
    voxels = np.zeros(shape, np.float32)
    rng = np.random.default_rng(seed)
    voxels[3:-4, 5:-2, 2:-3] = 1 + rng.normal(0, 0.05, tuple(n - m for n, m in zip(shape, (7, 7, 5), strict=True)))
    affine = np.array([[0, 0, -0.9, 30], [-1.2, 0, 0, 12], [0, -2.5, 0, -80], [0, 0, 0, 1.0]])
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return str(path)


def pipeline(sigma=SIGMA):
    preparation = Preparation((1.5, 1.0, 1.0), channels=[{"scheme": "none"}], default_modality="MR")
    return Compose(
        [
            LoadImaged("image", reader=Reader(), ensure_channel_first=True),
            ReadClicksd("image", TREE, sigma),
            OrientImaged("image", preparation),
            PrepareImaged("image", preparation),
        ]
    )


def ask(path, network, clicks, keep_gb=1.0, **options):
    """What a server does with a request: a label map on the file's own grid."""
    prepare = pipeline()
    data = prepare({"image": path, **clicks})
    options = {"click_sigma": SIGMA, "keep_gb": keep_gb, "amp": False, "progress": False, "doubts": True} | options
    inferer = ClickInferer(PATCH, TREE, **options)
    data["pred"] = inferer(data["image"][None], network)[0]
    return np.asarray(Invertd("pred", prepare, orig_keys="image", nearest_interp=True)(data)["pred"])[0]


def test_a_click_is_a_gaussian_of_its_voxel_and_of_nothing_far_away():
    clicks = [Click((3, 4, 5), True), Click((9, 4, 5), True), Click((-3, 8, 2), False), Click((-30, 8, 2), False)]
    grid = np.stack(np.meshgrid(*map(np.arange, (12, 10, 9)), indexing="ij"), -1)
    expected = np.zeros((2, 12, 10, 9))
    for click in clicks:
        away = grid - np.array(click.voxel)
        bell = np.exp(-(away**2).sum(-1) / (2 * SIGMA**2)) * (np.abs(away) <= 3 * SIGMA).all(-1)
        channel = 0 if click.inside else 1
        expected[channel] = np.maximum(expected[channel], bell)
    np.testing.assert_allclose(click_channels(clicks, (12, 10, 9), SIGMA), expected, atol=1e-6)
    assert expected[1].any() and not click_channels(clicks[3:], (12, 10, 9), SIGMA).any()


@pytest.mark.parametrize("seed", range(5))
def test_a_user_clicks_in_the_middle_of_the_largest_mistake(seed):
    rng = np.random.default_rng(seed)
    truth, found = (ndimage.gaussian_filter(rng.normal(size=(20, 24, 18)), 3) > 0.02 for _ in range(2))
    known = rng.random(truth.shape) > 0.02
    click = simulated_click(truth, found, known)
    pieces = [
        (np.count_nonzero(piece == n), piece == n)
        for wrong in (truth & ~found & known, found & ~truth & known)
        for piece, count in [ndimage.label(wrong, np.ones((3, 3, 3)))]
        for n in range(1, count + 1)
    ]
    largest = max(pieces, key=lambda piece: piece[0])[1]
    depth = ndimage.distance_transform_edt(np.pad(largest, 1))[1:-1, 1:-1, 1:-1]
    assert depth[click.voxel] == depth.max() > 0 and click.inside == truth[click.voxel]
    drawn = [simulated_click(truth, found, known, rng) for _ in range(20)]
    assert all(truth[c.voxel] != found[c.voxel] and known[c.voxel] and c.inside == truth[c.voxel] for c in drawn)
    assert len({c.voxel for c in drawn}) > 5
    assert simulated_click(truth, truth) is None


@pytest.mark.parametrize("voxel", [(10, 12, 8), (33, 6, 3), (20, 33, 16)])
def test_a_clicked_voxel_of_the_file_is_where_the_target_appears(voxel, tmp_path):
    path, network = write_image(tmp_path / "a.nii.gz"), Obedient((10.0, 10.0, 10.0))
    assert not ask(path, network, {}).any()
    for clicks in ({"label": "tumor", "foreground": [list(voxel)], "background": []}, {"tumor": [list(voxel)]}):
        found = ask(path, network, clicks)
        assert set(np.unique(found)) == {0, 2} and found[voxel] == 2
        inner = all(6 < n < side - 7 for n, side in zip(voxel, found.shape, strict=True))
        if inner:  # the ball is whole: its middle is the click, to half a voxel of either grid
            np.testing.assert_allclose(ndimage.center_of_mass(found), voxel, atol=0.8)


def test_with_clicks_it_is_what_the_sliding_window_gives_for_an_image_with_the_clicks_in_two_more_channels():
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv3d(3, 6, 5, padding=2), torch.nn.Tanh(), torch.nn.Conv3d(6, 1, 3, padding=1)
    )
    image = torch.randn(1, 1, 30, 21, 16)
    clicks = [Click((4, 5, 3), True), Click((25, 18, 8), False)]
    whole = torch.cat([image, click_channels(clicks, image.shape[2:], SIGMA)[None]], 1)
    options = {"amp": False, "progress": False, "mirror": "SP"}
    expected = logits_of(SlabInferer(PATCH, ["a"], **options), whole, network)
    inferer = ClickInferer(PATCH, ["a"], click_sigma=SIGMA, **options)
    torch.testing.assert_close(logits_of(inferer, image, network, prompt={0: clicks}), expected, atol=2e-3, rtol=0)
    automatic = logits_of(SlabInferer(PATCH, ["a"], **options), with_click_channels(image), network)
    torch.testing.assert_close(logits_of(inferer, image, network), automatic, atol=2e-3, rtol=0)
    assert (expected - automatic).abs().max() > 0.05


def test_only_windows_that_a_click_reaches_are_computed_again(tmp_path):
    path, network = write_image(tmp_path / "a.nii.gz"), Obedient()
    shape = pipeline()({"image": path})["image"].shape[1:]
    corners = list(itertools.product(*(window_starts(n, 16) for n in shape)))
    automatic = ask(path, network, {})
    assert network.windows == len(corners)
    assert np.array_equal(ask(path, network, {}), automatic) and network.windows == len(corners)

    voxel = (12, 12, 8)
    prepared = pipeline()({"image": path, "tumor": [voxel]})["image"]
    at = np.linalg.inv(prepared.affine.numpy()) @ nib.load(path).affine @ [*voxel, 1]
    reached = [c for c in corners if all(-6 <= round(a) - n < 16 + 6 for a, n in zip(at[:3], c, strict=True))]
    network.windows = 0
    one = {"label": "tumor", "foreground": [voxel]}
    first = ask(path, network, one)
    assert 0 < network.windows == len(reached) < len(corners)
    network.windows = 0
    assert np.array_equal(ask(path, network, one), first) and network.windows == 0
    more = {"label": "tumor", "foreground": [voxel, [32, 30, 14]]}
    second = ask(path, network, more)
    assert 0 < network.windows < len(corners) and not np.array_equal(first, second)
    for keep in (0, 1e-5):  # nothing is kept, or what fits
        assert np.array_equal(ask(path, network, more, keep_gb=keep), second)

    with torch.no_grad():
        network.levels += 5  # other weights: nothing of what was kept holds
    network.windows = 0
    assert not ask(path, network, {}).any() and network.windows == len(corners)


def test_a_click_for_one_of_several_targets_says_what_the_label_map_shall_show_there(tmp_path):
    path, network = write_image(tmp_path / "a.nii.gz"), Obedient()  # kidney everywhere
    here, there, third = (12, 12, 8), (24, 24, 10), (30, 12, 12)
    found = ask(path, network, {"tumor": [here], "background": [there], "spleen": [third], "left kidney": []})
    assert (found[here], found[there], found[third], found[20, 12, 8]) == (2, 0, 3, 1)
    one = ask(path, network, {"label": "Left Kidney", "foreground": [], "background": [here]})
    assert one[here] == 0 and one[there] == 1  # only the named target
    both = ask(path, network, {"tumor": [here], "kidney": [there]})
    assert both[here] == 2 and both[there] == 1
    with pytest.raises(ClickError, match=r"clicks for tumor, but only \['kidney'\] are computed"):
        ask(path, network, {"tumor": [here]}, targets=["kidney"])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"tumor": [[40, 3, 3]]}, r"a\.nii\.gz: a click for tumor at voxel \[40, 3, 3\] lies outside of .* 40x36x20"),
        ({"label": "tumor", "foreground": [[3, -2, 3]]}, "lies outside"),
        ({"label": "tumour", "foreground": [[3, 3, 3]]}, "'tumour', which is no target of these weights.*'tumor'"),
        ({"liver": [[3, 3, 3]]}, "'liver', which is no target of these weights.*kidney"),
        ({"label": None, "foreground": [[3, 3, 3]]}, "None, which is no target"),
        ({"tumor": [[3, 3]]}, r"is \[3, 3\]; expected a voxel of the image, \[i, j, k\]"),
        ({"tumor": [["a", 1, 2]]}, "expected a voxel of the image"),
        ({"tumor": [[3, float("nan"), 3]]}, "expected a voxel of the image"),
    ],
)
def test_clicks_that_cannot_be_meant_are_refused_before_any_work(request_, message, tmp_path):
    path = write_image(tmp_path / "a.nii.gz")
    with pytest.raises(Exception) as caught:
        pipeline()({"image": path, **request_})
    cause = caught.value.__cause__ or caught.value
    assert isinstance(cause, ClickError)
    with pytest.raises(ClickError, match=message):
        raise cause


def test_clicks_for_weights_without_click_channels_are_refused_and_settings_that_are_no_clicks_are_not(tmp_path):
    path = write_image(tmp_path / "a.nii.gz")
    with pytest.raises(RuntimeError) as caught:
        pipeline(sigma=None)({"image": path, "tumor": [[3, 3, 3]]})
    assert "these weights have no click channels" in str(caught.value.__cause__)
    settings = {
        "device": ["cpu"],
        "model_filename": ["model.pt"],
        "roi": [1, 2, 3, 4, 5, 6],
        "tumor": [],
        "background": [],
    }
    assert "clicks" not in pipeline(sigma=None)({"image": path, **settings})["image"].meta


def test_clicks_on_a_command_line_are_for_cases_that_are_there(tmp_path):
    path = write_image(tmp_path / "a.nii.gz")
    (item,) = find_images(path, clicks={"a": {"tumor": [[3, 3, 3]]}})
    assert "clicks" in pipeline()(item)["image"].meta
    with pytest.raises(ValueError, match=r"clicks for a case 'b', which is not in .*a\.nii\.gz"):
        find_images(path, clicks={"b": {"tumor": [[3, 3, 3]]}})


# ---- training ------------------------------------------------------------------------------------------------------


def test_the_loss_of_a_sample_with_clicks_looks_at_the_clicked_target_alone():
    table, rng = ClickTable(TREE), np.random.default_rng(0)
    codes = torch.from_numpy(rng.integers(0, TREE.num_codes, (2, 1, 6, 6, 6)))
    known = TREE.targets[codes[:, 0].numpy()]
    for target in range(3):
        only = table.targets[table.only(codes, target)[:, 0].numpy()]
        assert np.array_equal(only[..., target], known[..., target])
        assert (np.delete(only, target, -1) == -1).all()
    logits = torch.randn(2, 3, 6, 6, 6, requires_grad=True)
    mixed = codes.int()
    mixed[0] = table.only(codes[0], 1)
    PartialLabelLoss(table, reduction="mean")(logits, mixed).backward()
    assert not logits.grad[0, [0, 2]].any() and logits.grad[0, 1].any() and logits.grad[1].any()


def engine(network, iteration=1):
    state = SimpleNamespace(device=torch.device("cpu"), iteration=iteration)
    return SimpleNamespace(
        state=state, network=network, inferer=SimpleInferer(), non_blocking=False, to_kwargs={},
        prepare_batch=lambda batch, *_, **__: (batch["image"], batch["label"]),
    )  # fmt: skip


def test_clicks_are_made_where_the_network_is_wrong_and_are_the_same_in_a_resumed_run():
    table, network = ClickTable(TREE), Obedient((0.0, 10.0, 10.0))
    codes = torch.zeros(4, 1, 16, 16, 16, dtype=torch.uint8)
    codes[:, :, 4:12, 4:12, 4:12] = 2  # a tumor in a kidney that is nothing but tumor
    batch = {"image": torch.ones(4, 1, 16, 16, 16), "label": codes}  # and the network finds kidney everywhere
    step = ClickTrainStep(table=table, sigma=SIGMA, share=1.0, most=3, seed=7)
    images, narrowed = step.batch(engine(network, 3), batch)
    assert images.shape == (4, 3, 16, 16, 16) and torch.equal(images[:, :1], batch["image"]) and network.training
    for image, codes_after in zip(images, narrowed, strict=True):
        rows = table.targets[codes_after.numpy()]
        (target,) = np.flatnonzero((rows >= 0).any((0, 1, 2, 3)))
        assert target in (0, 1)  # never the spleen, which is neither there nor found
        inside, outside = image[1] == 1, image[2] == 1
        assert 1 <= int(inside.sum() + outside.sum()) <= 3
        truth = rows[0, ..., target] == 1
        assert not outside.numpy()[truth].any() and not inside.numpy()[~truth].any()
        assert (outside if target == 0 else inside).any()
    again = ClickTrainStep(table=table, sigma=SIGMA, share=1.0, most=3, seed=7).batch(engine(network, 3), batch)
    other = step.batch(engine(network, 4), batch)
    assert torch.equal(again[0], images) and torch.equal(again[1], narrowed) and not torch.equal(other[0], images)

    never = ClickTrainStep(table=table, sigma=SIGMA, share=0.0)
    for plain in (never, ClickEvalStep()):
        images, after = plain.batch(engine(network), batch)
        assert torch.equal(after, codes) and torch.equal(images, with_click_channels(batch["image"]))


def test_voxels_that_the_data_set_does_not_annotate_are_never_clicked():
    table = ClickTable(TREE)
    codes = torch.full(
        (2, 1, 16, 16, 16), TREE.offset("two"), dtype=torch.uint8
    )  # annotates the spleen, and there is none
    step = ClickTrainStep(table=table, sigma=SIGMA, share=1.0)
    images, after = step.batch(
        engine(Obedient((0.0, 0.0, 10.0))), {"image": torch.ones(2, 1, 16, 16, 16), "label": codes}
    )
    assert not images[:, 1:].any() and torch.equal(after, codes.int())
