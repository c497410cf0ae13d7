"""Windows, painting and the way back to the image's own grid, against nnU-Net's numbers and naive whole volumes."""

import itertools
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace

import blosc2
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import logits_of
from ignite.engine import Events
from monai.data import MetaTensor, ThreadDataLoader
from monai.transforms import Compose, EnsureTyped, Invertd, LoadImaged, Orientationd, SaveImaged
from skimage.transform import resize
from torch.distributed import TCPStore
from tsfm.cases import folders
from tsfm.cases.cases import Preparation
from tsfm.cases.folders import find_images
from tsfm.cases.raw_ids import from_raw_ids, in_raw_ids, raw_values
from tsfm.cases.volumes import Reader
from tsfm.inference.claims import Claims, ended
from tsfm.inference.painting import Painter, Slab
from tsfm.inference.passes import CPU, amp_type, free_bytes
from tsfm.inference.prediction import CaseDataset, CaseEvaluator, FailedCases
from tsfm.inference.probabilities import Probabilities
from tsfm.inference.quality import Quality, binary_entropy
from tsfm.inference.saving import WRITERS, SaveResultsd
from tsfm.inference.windows import RollingAverage, SlabInferer, gaussian_weights, window_starts
from tsfm.labels import LabelError, LabelTable
from tsfm.preparation.preprocessing import PrepareImaged
from tsfm.preparation.resampling import thick_axis
from tsfm.training.checkpoint import trained_targets
from tsfm.training.weight_files import CheckpointError

pytestmark = pytest.mark.convolutions

NNUNET = np.load(Path(__file__).parent / "fixtures" / "inference.npz")
EXPORTS = sorted(name.removesuffix("_regions") for name in NNUNET if name.endswith("_regions"))
TREE = LabelTable(
    {"tumor": {"inside": "kidney"}, "kidney_left": {"part_of": "kidney"}, "kidney": {}},
    [{"name": "one", "labels": {"1": "kidney", "2": "tumor", "3": "kidney_left"}}],
)

RIVALS = LabelTable({"tumor": {"inside": "liver"}, "liver": {}, "spleen": {}}, [])


def full_in(number, function):
    """(`function`, whose call of this number runs out of memory; the list of its calls)."""
    calls = []

    def scarce(*arguments):
        calls.append(arguments)
        if len(calls) == number:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return function(*arguments)

    return scarce, calls


class Fake(torch.nn.Module):
    """A network whose logits are a fixed linear function of the voxel, so that windows cannot disagree."""

    def __init__(self, scales=(1.0,), shifts=(0.0,)):
        super().__init__()
        self.scales = torch.nn.Parameter(torch.tensor(scales).view(1, -1, 1, 1, 1))
        self.shifts = torch.tensor(shifts).view(1, -1, 1, 1, 1)
        self.seen = []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        return x[:, :1] * self.scales + self.shifts


def convolution(channels=3, seed=0):
    """A network with context, so that the place of a window matters."""
    torch.manual_seed(seed)
    network = torch.nn.Sequential(
        torch.nn.Conv3d(1, 8, 5, padding=2), torch.nn.Tanh(), torch.nn.Conv3d(8, channels, 3, padding=1)
    )
    return network.eval()


def naive_logits(image, network, patch, mirror=()):
    """Gaussian mean over all windows in float64, whole volume in memory: (T, S, P, L)."""
    pad = [max(p - n, 0) for n, p in zip(image.shape[1:], patch, strict=True)]
    low = [n // 2 for n in pad]
    padded = np.pad(image, [(0, 0), *((a, n - a) for a, n in zip(low, pad, strict=True))])
    weight, total, count = gaussian_weights(patch).numpy().astype(float), 0.0, np.zeros(padded.shape[1:])
    flips = [axes for n in range(len(mirror) + 1) for axes in itertools.combinations(mirror, n)]
    for corner in itertools.product(*(window_starts(n, p) for n, p in zip(padded.shape[1:], patch, strict=True))):
        box = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
        window = torch.from_numpy(padded[(slice(None), *box)])[None]
        with torch.no_grad():
            logits = sum(network(window.flip(axes)).flip(axes) for axes in flips)[0].double().numpy() / len(flips)
        if isinstance(total, float):
            total = np.zeros((len(logits), *padded.shape[1:]))
        total[(slice(None), *box)] += logits * weight
        count[box] += weight
    kept = tuple(slice(a, a + n) for a, n in zip(low, image.shape[1:], strict=True))
    return (total / count)[(slice(None), *kept)]


def naive_resize(logits, shape, thick=None):
    """scikit-image, order 1, each channel; along `thick` the nearest slice."""
    if thick is None:
        return np.stack([resize(c.astype(float), shape, 1, mode="edge", anti_aliasing=False) for c in logits])
    slices = np.moveaxis(logits, thick + 1, 1).astype(float)
    plane = [n for axis, n in enumerate(shape) if axis != thick]
    near = np.floor((np.arange(shape[thick]) + 0.5) * logits.shape[thick + 1] / shape[thick]).astype(int)
    resized = [[resize(s, plane, 1, mode="edge", anti_aliasing=False) for s in channel] for channel in slices]
    return np.moveaxis(np.array(resized)[:, near], 1, thick + 1)


def naive_paint(logits, table, threshold=0.5):
    painted, probabilities = np.zeros(logits.shape[1:], np.uint8), 1 / (1 + np.exp(-logits))
    for tier in sorted({table.paint_depth(target) for target in range(len(table.names))}):
        rivals = [target for target in range(len(table.names)) if table.paint_depth(target) == tier]
        surest = np.array(rivals)[probabilities[rivals].argmax(0)]
        above = probabilities[rivals].max(0) > threshold
        painted[above] = surest[above] + 1
    return painted


def export_logits(logits, source_shape, thick=None, exclusive=False, depth=32):
    """A whole volume of logits (T, S, P, L) painted `depth` slices at a time, regions in their order."""
    logits = torch.as_tensor(logits)
    values = [(channel, channel + 1 - exclusive) for channel in range(exclusive, len(logits))]
    tiers = [values] if exclusive else [[one] for one in values]
    painter = Painter(logits.shape[1:], source_shape, tiers, [0.0] * len(logits), thick, exclusive)
    for start in range(0, logits.shape[1], depth):
        first = max(start - 1, 0)
        painter.add(Slab(logits[:, first : start + depth], first))
    return painter.label_map


def prepared(shape, source_shape, spacing=(1.5, 1, 1), source_spacing=(1.5, 1, 1), seed=0, batched=True):
    """A random prepared image (1, 1, S, P, L) with the record that PrepareImaged leaves."""
    image = MetaTensor(torch.from_numpy(np.random.default_rng(seed).normal(size=(1, 1, *shape))).float())
    grid = {"shape": list(shape), "cropped_shape": list(source_shape), "spacing_mm": list(spacing)}
    grid |= {"crop": [(0, n) for n in source_shape], "source_shape": list(source_shape), "source_affine": np.eye(4)}
    record = {"class": "PrepareImaged", "extra_info": {**grid, "source_spacing_mm": list(source_spacing)}}
    image.applied_operations = [[record]] if batched else [record]
    return image


class TestNnunetNumbers:
    @pytest.mark.parametrize("key", [key for key in NNUNET if key.startswith("steps")])
    def test_window_positions(self, key):
        size, patch, *starts = NNUNET[key].tolist()
        assert window_starts(size, patch) == starts

    def test_windows_closer_than_voxels_are_each_there_once(self):
        assert window_starts(9, 4, 0.9) == [0, 1, 2, 3, 4, 5]

    def test_gaussian(self):
        expected = NNUNET["gaussian"]
        np.testing.assert_allclose(gaussian_weights(expected.shape), expected, rtol=1e-6)
        assert gaussian_weights(expected.shape).min() > 0

    @pytest.mark.parametrize("name", EXPORTS)
    @pytest.mark.parametrize("depth", [1, 4, 100])
    def test_export_of_regions_and_of_classes(self, name, depth):
        logits, (spacing, source_spacing) = NNUNET[f"{name}_logits"], NNUNET[f"{name}_spacings"]
        thick = thick_axis(spacing, source_spacing)
        for exclusive, kind in ((False, "regions"), (True, "argmax")):
            expected = NNUNET[f"{name}_{kind}"]
            result = export_logits(logits, expected.shape, thick=thick, exclusive=exclusive, depth=depth)
            assert result.dtype == torch.uint8
            assert len(np.unique(expected)) >= 4
            assert (result.numpy() != expected).mean() < 1e-4


class TestSlabInferer:
    @pytest.mark.parametrize("shape", [(40, 20, 25), (16, 12, 9), (5, 30, 7), (1, 40, 3), (33, 1, 1), (17, 13, 11)])
    def test_logits_are_the_gaussian_mean_over_all_windows(self, shape):
        image = prepared(shape, shape)
        result = logits_of(SlabInferer((16, 12, 10), TREE, amp=False, progress=False), image, convolution())
        np.testing.assert_allclose(result[0], naive_logits(image[0].numpy(), convolution(), (16, 12, 10)), atol=1e-5)

    @pytest.mark.parametrize("mirror, dimensions", [(True, (2, 3, 4)), ("SP", (2, 3)), ("L", (4,)), (False, ())])
    def test_mirroring_is_the_mean_over_the_flips_of_its_axes(self, mirror, dimensions):
        image = prepared((14, 13, 12), (14, 13, 12))
        result = logits_of(SlabInferer((8, 8, 8), TREE, mirror=mirror, amp=False, progress=False), image, convolution())
        expected = naive_logits(image[0].numpy(), convolution(), (8, 8, 8), dimensions)
        np.testing.assert_allclose(result[0], expected, atol=1e-5)

    def test_an_axis_that_is_none_is_refused(self):
        with pytest.raises(ValueError, match="expected True, False, or some of the axes"):
            SlabInferer((8, 8, 8), TREE, mirror="XY")

    def test_a_float16_buffer_neither_overflows_nor_loses_the_corners(self, monkeypatch):
        monkeypatch.setattr("tsfm.inference.windows.FULL_PRECISION_BYTES", 0)
        image = prepared((40, 20, 25), (40, 20, 25))
        inferer = SlabInferer((16, 12, 10), ["a", "b"], amp=False, progress=False)
        expected = torch.cat([(20000 * image).clamp(-32000, 32000), 0.01 * image], 1)
        result = logits_of(inferer, image, Fake((20000.0, 0.01), (0.0, 0.0)))
        torch.testing.assert_close(result, expected.as_tensor(), rtol=4e-3, atol=1e-5)

    @pytest.mark.parametrize(
        ("shape", "source_shape", "spacing", "source_spacing"),
        [
            ((40, 20, 25), (63, 31, 17), (1.5, 1, 1), (0.95, 0.65, 1.47)),
            ((40, 20, 25), (23, 31, 25), (1.5, 1, 1), (2.6, 0.65, 1)),
            ((30, 20, 25), (9, 40, 50), (1.5, 1, 1), (5.0, 0.5, 0.5)),
            ((9, 20, 25), (14, 40, 20), (5.0, 1, 1), (3.2, 0.5, 1.25)),
            ((20, 25, 7), (30, 20, 3), (1.5, 1, 1), (1.0, 1.25, 8.0)),
            ((3, 4, 5), (2, 9, 10), (1.5, 1, 1), (2.25, 0.45, 0.5)),
            ((1, 30, 30), (1, 60, 60), (10, 1, 1), (10, 0.5, 0.5)),
            ((17, 13, 11), (17, 13, 11), (1.5, 1, 1), (1.5, 1, 1)),
        ],
    )
    @pytest.mark.parametrize(("table", "batched"), [(TREE, True), (TREE, False), (RIVALS, True)])
    def test_label_map_equals_resizing_the_whole_volume(
        self, shape, source_shape, spacing, source_spacing, table, batched
    ):
        image = prepared(shape, source_shape, spacing, source_spacing, batched=batched)
        network = convolution()
        result = SlabInferer((16, 12, 10), table, threshold=0.52, amp=False, progress=False)(image, network)
        logits = naive_logits(image[0].numpy(), network, (16, 12, 10))
        expected = naive_resize(logits, source_shape, thick_axis(spacing, source_spacing))
        expected = naive_paint(expected, table, 0.52)
        assert set(np.unique(expected)) == {0, 1, 2, 3} or expected.size < 500
        assert result.shape == (1, 1, *source_shape) and result.dtype == torch.uint8
        assert (result[0, 0].numpy() != expected).sum() <= 1e-4 * expected.size

    def test_plain_tensors_stay_on_their_own_grid(self):
        image = torch.randn(1, 1, 9, 8, 7)
        result = SlabInferer((8, 8, 8), ["a"], amp=False, progress=False)(image, Fake())
        assert type(result) is torch.Tensor
        torch.testing.assert_close(result, (image > 0).byte())

    def test_what_is_inside_is_painted_last(self):
        image = torch.ones(1, 1, 4, 4, 4)
        inferer = SlabInferer((4, 4, 4), TREE, amp=False, progress=False)
        assert inferer(image, Fake((1.0, 1.0, 1.0), (0.0, 0.0, 0.0))).unique().tolist() == [1]
        assert inferer(image, Fake((-1.0, 1.0, 1.0), (0.0, 0.0, 0.0))).unique().tolist() == [2]

    def test_of_equally_deep_targets_the_one_furthest_above_its_threshold_is_painted(self):
        organs = LabelTable(
            {"liver": {}, "spleen": {}, "tumor": {"inside": "liver"}, "cyst": {"inside": "liver"}, "lung": {}}, []
        )

        def painted(*logits, **settings):
            network = Fake(tuple(0.0 for _ in logits), tuple(map(float, logits)))
            inferer = SlabInferer((4, 4, 4), organs, amp=False, progress=False, **settings)
            (value,) = inferer(torch.ones(1, 1, 4, 4, 4), network).unique().tolist()
            return value

        assert painted(1, 3, -1, -1, 2) == 2 and painted(4, 3, -1, -1, 2) == 1 and painted(1, 3, -1, -1, 4) == 5
        assert painted(4, 3, 1, -1, 2) == 3 and painted(4, 3, 1, 2, 2) == 4, "what is inside is painted over all others"
        assert painted(4, 3, -1, -1, 2, threshold={"liver": 0.95}) == 2, "3 is further above 0 than 4 above 2.94"
        assert painted(1, 3, -1, -1, 2, targets=["liver", "lung"]) == 5
        assert painted(4, 3, 2, 1, 2, activation="regions") == 5, "nnU-Net's regions are painted in their order"

    @pytest.mark.parametrize("source_spacing", [(1.5, 1, 4), (1.5, 4, 4)], ids=["thick", "coarse"])
    def test_what_lies_between_the_voxels_of_a_coarser_grid_is_painted_as_by_resizing_the_whole(self, source_spacing):
        shape = (6, 40, 40)
        source = tuple(round(n * a / b) for n, a, b in zip(shape, (1.5, 1, 1), source_spacing, strict=True))
        for column in range(0, 40, 3):
            logits = np.full((1, *shape), -5, np.float32)
            logits[0, 3, column, 39 - column] = 50
            thick = thick_axis((1.5, 1, 1), source_spacing) if source_spacing[1] == 1 else None
            painted = export_logits(logits, source, thick=thick)
            expected = naive_resize(logits, source, thick)[0] > 0
            assert np.array_equal(painted.numpy() > 0, expected)

    def test_targets_limit_what_is_painted_and_keep_their_values(self):
        image = prepared((9, 20, 25), (14, 40, 20))
        every = SlabInferer((16, 12, 10), TREE, amp=False, progress=False)(image, convolution())
        one = SlabInferer((16, 12, 10), TREE, targets=["tumor"], amp=False, progress=False)(image, convolution())
        assert torch.equal(one == 1, every == 1) and one.unique().tolist() == [0, 1]

    def test_a_restricted_inferer_paints_those_of_its_targets_alone(self):
        image = torch.ones(1, 1, 4, 4, 4)
        both = SlabInferer((4, 4, 4), ["a", "b"], amp=False, progress=False)
        network = Fake((5.0, 0.0), (0.0, 6.0))
        assert both(image, network).unique().tolist() == [2], "b is surer than a"
        assert both.restricted_to(["a"])(image, network).unique().tolist() == [1]
        assert both.restricted_to(["a"]).restricted_to(["b"])(image, network).unique().tolist() == [0]

    @pytest.mark.parametrize(("targets", "expected"), [(["a", "b"], [2]), (["b"], [2]), (["a"], [0]), ([], [0])])
    def test_of_a_softmax_all_outputs_compete_whichever_are_painted(self, targets, expected):
        image, network = torch.ones(1, 1, 4, 4, 4), Fake((1.0, 0.0, 0.0), (0.0, 2.0, 3.0))
        both = SlabInferer((4, 4, 4), ["a", "b"], activation="softmax", amp=False, progress=False)
        assert both.restricted_to(targets)(image, network).unique().tolist() == expected

    def test_threshold_per_target(self):
        image = torch.linspace(-3, 3, 64).view(1, 1, 4, 4, 4)
        settings = {"threshold": {"b": 0.9}, "activation": "regions", "amp": False, "progress": False}
        inferer = SlabInferer((4, 4, 4), ["a", "b"], **settings)
        result = inferer(image, Fake((1.0, 1.0), (0.0, 0.0)))
        torch.testing.assert_close(result, (image > 0).byte() + (torch.sigmoid(image) > 0.9).byte())

    def test_several_windows_per_pass_change_nothing(self):
        image, network = prepared((40, 20, 25), (40, 20, 25)), Fake()
        maps = [
            SlabInferer((16, 12, 10), ["a"], sw_batch_size=n, amp=False, progress=False)(image, network) for n in (1, 5)
        ]
        assert torch.equal(*maps) and (5, 1, 16, 12, 10) in network.seen

    @pytest.mark.parametrize("memory", [9, 2, 1, 0])
    def test_out_of_memory_takes_fewer_windows_then_the_buffer_then_the_network(self, memory, monkeypatch, caplog):
        """A fake GPU ("cpu:0") that holds `memory` windows, one less while the buffer is on it."""
        gpu, cpu = torch.device("cpu", 0), torch.device("cpu")
        network, places, averages = convolution(), [gpu], []

        def forward(batch):
            room = memory - any(average.device == gpu for average in averages)
            if places[-1] == gpu and len(batch) > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return plain(batch)

        def spy(*args):
            averages[:] = [RollingAverage(*args)]
            return averages[0]

        plain = network.forward
        image, inferer = (
            prepared((20, 12, 25), (20, 12, 25)),
            SlabInferer((8, 8, 8), TREE, sw_batch_size=8, amp=False, progress=False),
        )
        expected = logits_of(inferer, image, network)
        monkeypatch.setattr("tsfm.inference.windows.RollingAverage", spy)
        monkeypatch.setattr("tsfm.inference.windows.network_device", lambda *_: gpu)
        monkeypatch.setattr(network, "to", lambda place=None, **_: places.append(place) if place else None)
        monkeypatch.setattr(network, "forward", forward)
        result = logits_of(inferer, image, network)
        torch.testing.assert_close(result, expected)
        said = [record.message.split(": ")[1].split(" (")[0] for record in caplog.records]
        halved = [f"{size} window" for size in (4, 2, 1)]
        steps = [*halved, "the buffer of averaged windows moves to the CPU"]
        last = "the network moves to the CPU for the rest of this image"
        found = {9: [], 2: halved, 1: steps, 0: [*steps, last]}[memory]
        assert [text.split("(s)")[0] if "window(s)" in text else text for text in said] == found[: len(said)] == found
        assert places == ([gpu, cpu, gpu] if memory == 0 else [gpu]), "the next image begins on the GPU again"

    def test_what_no_memory_is_enough_for_is_the_networks_own_error(self):
        def network(batch):
            raise torch.OutOfMemoryError("too large")

        with pytest.raises(torch.OutOfMemoryError, match="too large"):
            SlabInferer((8, 8, 8), ["a"], progress=False)(torch.zeros(1, 1, 8, 8, 8), network)

    @pytest.mark.parametrize("place", [(Painter, "add"), (Quality, "see")])
    def test_painting_and_doubting_go_to_the_cpu_where_memory_runs_out(self, place, monkeypatch):
        scarce, calls = full_in(2, getattr(*place))
        image = prepared((40, 20, 25), (63, 31, 17))
        inferer = SlabInferer((16, 12, 10), TREE, amp=False, progress=False, doubts=True)
        expected, quality = inferer(image, convolution()), inferer.quality
        monkeypatch.setattr(*place, scarce)
        assert torch.equal(inferer(image, convolution()), expected) and len(calls) > 3
        assert inferer.quality == quality

    @pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
    def test_uncertainty_goes_on_on_the_cpu_where_memory_runs_out(self, activation, monkeypatch):
        (scarce, calls), image = full_in(2, binary_entropy), prepared((40, 20, 25), (63, 31, 17))
        inferer = SlabInferer((16, 12, 10), ["a", "b"], amp=False, progress=False, activation=activation)
        network = convolution(3 if activation == "softmax" else 2)
        expected = inferer.uncertainty(image, network)
        monkeypatch.setattr("tsfm.inference.windows.binary_entropy", scarce)
        assert inferer.uncertainty(image, network) == expected > 0 and len(calls) > 3

    def test_an_image_that_a_gpu_does_not_hold_stays_on_the_cpu(self, monkeypatch, caplog):
        """Moving it, and padding it to a window: the fake GPU ("cpu:0") takes windows alone."""
        gpu, moved = torch.device("cpu", 0), []
        scarce, padded = full_in(1, torch.nn.functional.pad)

        def prepare(batch, device, non_blocking=False, **kwargs):
            moved.append(device)
            if device == gpu:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return batch["image"].to(device), None

        image, network = prepared((6, 20, 25), (6, 20, 25)), convolution()
        inferer = SlabInferer((16, 12, 10), TREE, amp=False, progress=False)
        expected, maps = inferer(image, network), []
        engine = CaseEvaluator(
            device=gpu, val_data_loader=[{"image": image, "case": ["one"]}], network=network, inferer=inferer, table=TREE,
            prepare_batch=prepare, decollate=False,
        )  # fmt: skip
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: maps.append(engine.state.output["pred"]))
        monkeypatch.setattr(torch.nn.functional, "pad", scarce)
        engine.run()
        assert torch.equal(maps[0], expected) and moved == [gpu, CPU] and len(padded) == 2
        said = [record.message for record in caplog.records if "out of memory" in record.message]
        assert len(said) == 2 and all("the image is left to the CPU" in text for text in said)

    def test_entropy_that_runs_out_of_memory_half_way_counts_once(self, monkeypatch):
        slab, (full, _) = Slab(torch.randn(2, 4, 8, 8), 0), full_in(2, binary_entropy)
        plain, scarce = (Quality({"a": (0, 0), "b": (1, 1)}, {"a": 0.0, "b": 0.0}) for _ in range(2))
        plain.see(slab)
        monkeypatch.setattr("tsfm.inference.quality.binary_entropy", full)
        with pytest.raises(torch.OutOfMemoryError):
            scarce.see(slab)
        scarce.see(slab)
        assert scarce.report() == plain.report()

    @pytest.mark.parametrize("limit", [2**30, 0])
    def test_averaging_goes_to_the_cpu_where_memory_runs_out_amid_a_window(self, limit, monkeypatch):
        monkeypatch.setattr("tsfm.inference.windows.FULL_PRECISION_BYTES", limit)
        scarce, calls = full_in(
            4, torch.Tensor.clamp
        )  # the fake GPU ("cpu:0") is full in the first window's fourth slice
        plain, moved = (RollingAverage(2, (12, 8, 8), (8, 8, 8), place) for place in (CPU, torch.device("cpu", 0)))
        windows = torch.randn(2, 3, 8, 8, 8)
        for logits in windows:
            plain.add(logits, (0, 0, 0), [0, 2])
        monkeypatch.setattr(torch.Tensor, "clamp", scarce)
        for logits in windows:
            moved.add(logits, (0, 0, 0), [0, 2])
        assert torch.equal(moved.mean, plain.mean) and torch.equal(moved.total, plain.total)
        assert moved.device == CPU and len(calls) == 17

    def test_free_memory_counts_what_torch_keeps(self, monkeypatch):
        figures = {"mem_get_info": (10, 100), "memory_reserved": 50, "memory_allocated": 20}
        for name, value in figures.items():
            monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
        assert free_bytes(torch.device("cuda")) == 40

    def test_mixed_precision_is_bfloat16_or_on_older_gpus_float16(self, monkeypatch):
        gpu, cpu = torch.device("cuda"), torch.device("cpu")
        for has_bfloat16, expected in ((True, torch.bfloat16), (False, torch.float16)):
            monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has_bfloat16, **_: has)
            assert amp_type(gpu, "auto") == expected and amp_type(cpu, "auto") == torch.bfloat16
        assert amp_type(gpu, "float16") == torch.float16
        with pytest.raises(ValueError, match=r"amp_dtype is 'half', expected one of .*float16"):
            SlabInferer((8, 8, 8), ["a"], amp_dtype="half")

    def test_numbers_that_float16_cannot_hold_are_computed_in_float32(self, monkeypatch, caplog):
        class Half(Fake):
            def forward(self, x):
                y = super().forward(x)
                return y.half() if torch.is_autocast_enabled("cpu") else y

        monkeypatch.setattr("tsfm.network.cpu.computes_in", lambda *_: True)
        image, inferer = (
            prepared((9, 9, 9), (9, 9, 9)),
            SlabInferer((8, 8, 8), ["a"], amp_dtype="float16", progress=False),
        )
        result = logits_of(inferer, image, Half((1e5,)))
        torch.testing.assert_close(result, (1e5 * image).clamp(-32000, 32000).as_tensor())
        assert [record.message for record in caplog.records] == [
            "the network's numbers exceed float16: computing in float32"
        ]

    def test_every_version_is_shown_before_they_are_averaged(self):
        """What an estimate of quality needs: all folds' mirrored versions of each window, in one pass."""
        seen = []
        image, networks = prepared((14, 13, 12), (14, 13, 12)), [convolution(seed=seed) for seed in (0, 1)]
        ensemble = torch.nn.Module()
        ensemble.count, ensemble.versions = 2, lambda x: (network(x) for network in networks)
        inferer = SlabInferer((8, 8, 8), TREE, mirror="SP", amp=False, progress=False)
        inferer._observer = SimpleNamespace(
            watch=lambda number, count, logits: seen.append((number, count, logits.clone())),
            keep=lambda: seen.append("kept"),
        )
        result = logits_of(inferer, image, ensemble)
        expected = [naive_logits(image[0].numpy(), network, (8, 8, 8), (2, 3)) for network in networks]
        np.testing.assert_allclose(result[0], np.mean(expected, 0), atol=1e-5)
        windows = [seen[start : start + 9] for start in range(0, len(seen), 9)]
        assert len(windows) == np.prod([len(window_starts(n, 8)) for n in image.shape[2:]])
        assert all(versions.pop() == "kept" for versions in windows)
        assert all([version[:2] for version in versions] == [(n, 8) for n in range(8)] for versions in windows)
        first = torch.stack([logits for _, _, logits in windows[0]]).mean(0)
        torch.testing.assert_close(first[0, :, 0, 0, 0], result[0, :, 0, 0, 0])

    def test_a_batch_whose_versions_memory_does_not_suffice_to_compare_is_computed_anew(self, monkeypatch):
        image, network, keep, short = prepared((20, 12, 9), (20, 12, 9)), convolution(), Quality.keep, [1, 1]
        options = {"sw_batch_size": 4, "mirror": "S", "amp": False, "progress": False, "doubts": True}
        inferer = SlabInferer((8, 8, 8), TREE, **options)
        inferer(image, network)
        expected = inferer.quality

        def fails_twice(quality):
            if short:
                short.pop()
                raise torch.OutOfMemoryError
            keep(quality)

        monkeypatch.setattr(Quality, "keep", fails_twice)
        inferer(image, network)
        assert not short and inferer.quality == {name: pytest.approx(row) for name, row in expected.items()}

    def test_the_buffer_does_not_grow_with_the_number_of_slices(self, monkeypatch):
        sizes = []

        class Spy(RollingAverage):
            def __init__(self, *args):
                super().__init__(*args)
                sizes.append(self.mean.numel())

        monkeypatch.setattr("tsfm.inference.windows.RollingAverage", Spy)
        for slices in (16, 300):
            SlabInferer((8, 8, 8), ["a"], amp=False, progress=False)(torch.zeros(1, 1, slices, 8, 8), Fake())
        assert sizes[0] == sizes[1]

    def test_uncertainty_is_one_bit_at_even_odds_and_little_where_sure(self):
        inferer = SlabInferer((8, 8, 8), ["a"], amp=False, progress=False)
        image = torch.full((1, 1, 20, 8, 8), 1e-4)
        image[:, :, :10] = -5
        assert inferer.uncertainty(image, Fake()) == pytest.approx(1, abs=1e-4)
        assert inferer.uncertainty(image, Fake((1e5,))) == pytest.approx(0.0005, abs=1e-3)
        assert inferer.uncertainty(-image.abs(), Fake()) == 0

    def test_errors_say_what_is_wrong(self):
        image = torch.zeros(1, 1, 8, 8, 8)
        with pytest.raises(ValueError, match=r"unknown targets \['liver'\].*kidney_left"):
            SlabInferer((8, 8, 8), TREE, targets=["liver"])
        with pytest.raises(ValueError, match=r"1 outputs.*3 targets"):
            SlabInferer((8, 8, 8), TREE, amp=False, progress=False)(image, Fake())
        with pytest.raises(ValueError, match="NaN"):
            SlabInferer((8, 8, 8), ["a"], amp=False, progress=False)(image, Fake((float("nan"),)))
        with pytest.raises(ValueError, match="one image"):
            SlabInferer((8, 8, 8), ["a"], amp=False, progress=False)(image.expand(2, -1, -1, -1, -1), Fake())
        with pytest.raises(ValueError, match="between 0 and 1"):
            SlabInferer((8, 8, 8), ["a"], threshold=1.0)
        with pytest.raises(ValueError, match="overlap"):
            SlabInferer((8, 8, 8), ["a"], overlap=1.0)
        with pytest.raises(ValueError, match="sw_batch_size is 0"):
            SlabInferer((8, 8, 8), ["a"], sw_batch_size=0)


# ---- from file to file ------------------------------------------------------------------------------------------

TABLE = LabelTable({"blob": {}}, [{"name": "one", "labels": {"1": "blob"}}])
COSINE, SINE = np.cos(0.3), np.sin(0.3)
AFFINES = {
    "RAS": np.diag([1, 1.2, 1.5, 1.0]),
    "LPS": np.diag([-1, -1.2, 1.5, 1.0]),
    "permuted": np.array([[0, 0, -1, 30], [0, 1.2, 0, -7], [-1.5, 0, 0, 90], [0, 0, 0, 1.0]]),
    "oblique": np.array([[COSINE, -1.2 * SINE, 0, 4], [SINE, 1.2 * COSINE, 0, -50], [0, 0, -1.5, 9], [0, 0, 0, 1.0]]),
}


def write_blob(path, affine, shape=(30, 26, 22)):
    """A CT with a lopsided blob inside some air; returns where the blob is."""
    blob = np.zeros(shape, bool)
    blob[4:15, 9:21, 12:18] = True
    blob[4:8, 3:12, 12:14] = True
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.where(blob, 200, -900).astype(np.int16), affine), path)
    return blob


def chain(output_dir, spacing, existing="error", save="label_map"):
    """inference.json's preprocessing, inferer and postprocessing, for a network that thresholds at -350 HU."""
    preparation = Preparation(spacing, {"CT": {"lower": -1000, "upper": 1000, "mean": -350, "sd": 550}})
    before = Compose(
        [
            LoadImaged("image", reader=Reader(), ensure_channel_first=True),
            Orientationd("image", axcodes="SPL", labels=None),
            PrepareImaged("image", preparation),
            EnsureTyped("image"),
        ]
    )
    kept = Probabilities(output_dir) if save != "label_map" else None
    saver = SaveResultsd("pred", str(output_dir), existing, save, TABLE, probabilities=kept)
    after = Compose([Invertd("pred", transform=before, orig_keys="image"), saver])
    return before, SlabInferer((16, 16, 16), TABLE, amp=False, progress=False, probabilities=kept), after


def evaluator(source, output_dir, spacing=(1.5, 1.2, 1.0), existing="error", save="label_map", **kwargs):
    before, inferer, after = chain(output_dir, spacing, existing, save)
    items = find_images(source, output_dir, existing, save)
    dataset = CaseDataset(items, before, output_dir, existing, save)
    loader = ThreadDataLoader(dataset, batch_size=1, num_workers=0)
    return CaseEvaluator(
        torch.device("cpu"), loader, network=Fake(), inferer=inferer, postprocessing=after, table=TABLE, **kwargs
    )


@pytest.mark.filterwarnings("ignore:.*Hounsfield", "ignore:Setting affine")
class TestFiles:
    @pytest.mark.parametrize("name", AFFINES)
    def test_a_blob_comes_back_to_the_voxel(self, name, tmp_path):
        """Prepared at the image's own spacing; the permuted file's axes have other spacings than the grid's."""
        affine = AFFINES[name]
        blob = write_blob(tmp_path / "a.nii.gz", affine)
        evaluator(tmp_path / "a.nii.gz", tmp_path / "out").run()
        result = nib.load(tmp_path / "out" / "a.nii.gz")
        np.testing.assert_allclose(result.affine, affine, atol=1e-5)
        assert result.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(np.asarray(result.dataobj), blob)

    @pytest.mark.parametrize("name", AFFINES)
    def test_a_resampled_blob_stays_in_place(self, name, tmp_path):
        """Another spacing moves the border by half a voxel at most, and the center of mass hardly."""
        blob = write_blob(tmp_path / "a.nii.gz", AFFINES[name])
        evaluator(tmp_path / "a.nii.gz", tmp_path / "out", spacing=(1.1, 1.0, 1.3)).run()
        result = np.asarray(nib.load(tmp_path / "out" / "a.nii.gz").dataobj)
        assert 2 * (result * blob).sum() / (result.sum() + blob.sum()) > 0.93
        center, expected = (np.argwhere(mask).mean(0) for mask in (result, blob))
        np.testing.assert_allclose(center, expected, atol=0.15)

    def test_cropped_zeros_are_background_in_place(self, tmp_path):
        blob = write_blob(tmp_path / "a.nii", AFFINES["LPS"])
        image = nib.load(tmp_path / "a.nii")
        voxels = np.where(np.arange(30)[:, None, None] < 3, 0, np.asarray(image.dataobj))
        nib.save(nib.Nifti1Image(voxels, image.affine), tmp_path / "a.nii")
        evaluator(tmp_path / "a.nii", tmp_path / "out").run()
        np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "out" / "a.nii.gz").dataobj), blob)

    def test_form_codes_are_the_images(self, tmp_path):
        write_blob(tmp_path / "a.nii", AFFINES["oblique"])
        image = nib.load(tmp_path / "a.nii")
        image.set_sform(image.affine, 4)
        image.set_qform(image.affine, 1)
        nib.save(image, tmp_path / "b.nii")
        evaluator(tmp_path / "b.nii", tmp_path / "out").run()
        header = nib.load(tmp_path / "out" / "b.nii.gz").header
        assert (int(header["sform_code"]), int(header["qform_code"])) == (4, 1)
        np.testing.assert_allclose(header.get_qform(), image.affine, atol=1e-4)

    def test_one_bad_file_is_reported_and_the_rest_goes_on(self, tmp_path, capsys):
        for name in ("a", "c"):
            write_blob(tmp_path / f"{name}.nii.gz", AFFINES["RAS"])
        (tmp_path / "b.nii.gz").write_bytes((tmp_path / "a.nii.gz").read_bytes()[:300])
        engine = evaluator(tmp_path, tmp_path / "out")
        with pytest.raises(FailedCases, match=r"1 of 3 cases failed:\n  b: .*b\.nii\.gz"):
            engine.run()
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.nii.gz", "c.nii.gz"]
        printed = capsys.readouterr().out
        volume = engine.results[0]["ml"]["blob"]
        assert volume == pytest.approx((11 * 12 * 6 + 4 * 6 * 2) * 1.8 / 1000)
        assert "FAILED" in printed and f"blob {volume:.1f} ml" in printed

    def test_a_failure_in_the_network_is_a_case_that_failed(self, tmp_path):
        write_blob(tmp_path / "a.nii", AFFINES["RAS"])
        engine = evaluator(tmp_path / "a.nii", tmp_path / "out")
        engine.network.forward = lambda x: x * float("nan")
        with pytest.raises(FailedCases, match="a: the network's output is NaN"):
            engine.run()
        assert not (tmp_path / "out").exists()

    def test_an_item_without_a_data_set_is_painted_with_all_after_one_of_a_data_set_that_annotates_nothing(
        self, tmp_path
    ):
        table = LabelTable(TABLE.to_dict()["targets"], [*TABLE.to_dict()["datasets"], {"name": "none", "labels": {}}])
        items = [{"image": str(tmp_path / f"{name}.nii"), "case": name} for name in ("a", "b")]
        for item in items:
            write_blob(Path(item["image"]), AFFINES["RAS"])
        engine = evaluator([{**items[0], "dataset": "none"}, items[1]], tmp_path / "out")
        engine.annotated = {name: table.annotated(name) for name in table.datasets}
        engine.run()
        assert [list(row["ml"]) for row in engine.results] == [[], ["blob"]]

    def test_results_that_are_there_are_not_destroyed(self, tmp_path):
        for name in ("a", "b"):
            write_blob(tmp_path / f"{name}.nii", AFFINES["RAS"])
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a.nii.gz").write_text("precious")
        sources = [tmp_path / "a.nii", tmp_path / "b.nii"]
        with pytest.raises(FileExistsError, match=r'1 of 2 results.*"skip"'):
            evaluator(sources, tmp_path / "out")
        evaluator(sources, tmp_path / "out", existing="skip").run()
        assert (tmp_path / "out" / "a.nii.gz").read_text() == "precious" and (tmp_path / "out" / "b.nii.gz").exists()
        evaluator(sources, tmp_path / "out", existing="overwrite").run()
        assert nib.load(tmp_path / "out" / "a.nii.gz").shape == (30, 26, 22)

    def test_what_save_names_is_written_and_what_is_there_is_kept(self, tmp_path, monkeypatch):
        monkeypatch.setitem(folders.OUTPUTS, "note", ".txt")
        monkeypatch.setitem(WRITERS, "note", lambda result, path: path.write_text(" ".join(result.table.names)))
        label_map = torch.ones(1, 2, 2, 2, dtype=torch.uint8)
        (tmp_path / "a.nii.gz").write_text("precious")
        for existing, kept in (("skip", True), ("overwrite", False)):
            SaveResultsd("pred", tmp_path, existing, ["label_map", "note"], TABLE)({"pred": label_map, "case": "a"})
            assert (tmp_path / "a.txt").read_text() == "blob"
            assert ((tmp_path / "a.nii.gz").read_bytes() == b"precious") == kept
        write_blob(tmp_path / "in/a.nii", AFFINES["RAS"])
        assert find_images(tmp_path / "in", tmp_path, "skip", ["label_map", "note"]) == []
        (tmp_path / "a.txt").unlink()
        assert [item["case"] for item in find_images(tmp_path / "in", tmp_path, "skip", ["label_map", "note"])] == ["a"]

    def test_an_output_that_is_none_is_refused_before_the_work(self, tmp_path):
        (tmp_path / "a.nii").touch()
        with pytest.raises(ValueError, match=r"label_map.*did you mean 'label_map'"):
            find_images(tmp_path, save="labelmap")

    def test_no_result_takes_the_place_of_another_or_of_a_listed_label(self, tmp_path):
        for name in ("in/a.nii", "in/a_uncertainty.nii", "labels/a.nii.gz"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        for part in range(2):
            with pytest.raises(FileExistsError, match=r"out.a_uncertainty.nii.gz is an image, a label or the result"):
                find_images(tmp_path / "in", tmp_path / "out", save=["label_map", "uncertainty"], part=part, parts=2)
        (tmp_path / "list.json").write_text(json.dumps({"test": [{"image": "in/a.nii", "label": "labels/a.nii.gz"}]}))
        with pytest.raises(FileExistsError, match=r"labels.a.nii.gz is an image, a label"):
            find_images(tmp_path / "list.json", tmp_path / "labels", "overwrite")
        with pytest.raises(ValueError, match="expected one or several"):
            SaveResultsd("pred", save=[])

    def test_monai_label_can_leave_the_saver_out(self):
        assert isinstance(SaveResultsd("pred"), SaveImaged)


class TestSharing:
    def test_a_claim_is_one_processs_until_it_is_freed_or_killed(self, tmp_path):
        first, second = Claims(tmp_path), Claims(tmp_path)
        assert first.take("a") and not second.take("a") and second.take("b")
        first.free("a")
        assert second.take("a")
        second.free("a"), second.free("b")
        assert list(tmp_path.iterdir()) == []
        if (process := os.fork()) == 0:
            first.take("c")
            (tmp_path / "taken").touch()
            signal.pause()
        while not (tmp_path / "taken").exists():
            time.sleep(0.01)
        assert not second.take("c")
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        assert second.take("c")

    def test_with_a_failed_case_a_process_of_torchrun_waits_for_the_others(self, monkeypatch, tmp_path):
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        said = {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port, "WORLD_SIZE": 2}
        said |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
        for key, value in said.items():
            monkeypatch.setenv(key, str(value))
        (tmp_path / "in").mkdir()
        (tmp_path / "in/a.nii.gz").touch()
        with ThreadPoolExecutor() as pool:
            running = pool.submit(evaluator(tmp_path / "in", tmp_path / "out").run)
            assert not wait([running], 2).done, "torchrun would end the others"
            ended(False)
            with pytest.raises(FailedCases):
                running.result(60)

    @pytest.mark.parametrize("existing", ["error", "skip"])
    def test_processes_that_begin_together_share_a_folder(self, existing, tmp_path):
        for number in range(6):
            write_blob(tmp_path / f"in/{number}.nii", AFFINES["RAS"])
        engines = [evaluator(tmp_path / "in", tmp_path / "out", existing=existing) for _ in range(3)]
        threads = [threading.Thread(target=engine.run) for engine in engines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rows = [row for engine in engines for row in engine.results]
        assert sorted(row["case"] for row in rows if "left" not in row) == list("012345")
        assert not any(engine.failed for engine in engines)
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{n}.nii.gz" for n in range(6)]

    def test_parts_are_disjoint_and_all_there_is(self, tmp_path):
        for number in range(7):
            (tmp_path / f"{number}.nii").touch()
        parts = [[item["case"] for item in find_images(tmp_path, part=part, parts=3)] for part in range(3)]
        assert sorted(itertools.chain(*parts)) == list("0123456") and [len(part) for part in parts] == [3, 2, 2]
        with pytest.raises(ValueError, match="part is 3 of 3 parts"):
            find_images(tmp_path, part=3, parts=3)


@pytest.mark.filterwarnings("ignore:.*Hounsfield", "ignore:Setting affine")
class TestProbabilities:
    def saved(self, folder, path, spacing=(1.5, 1.2, 1.0)):
        evaluator(path, folder / "out", spacing, save=["label_map", "probabilities"]).run()
        assert sorted(file.name for file in (folder / "out").iterdir()) == ["a.nii.gz", "a_probabilities.b2nd"]
        return blosc2.open(str(folder / "out/a_probabilities.b2nd")), nib.load(folder / "out/a.nii.gz")

    def test_the_uncertainty_is_the_entropy_of_the_probabilities(self, tmp_path):
        write_blob(tmp_path / "a.nii", AFFINES["permuted"])
        save = ["probabilities", "uncertainty", "label_map"]
        evaluator(tmp_path / "a.nii", tmp_path / "out", (1.1, 1.0, 2.3), save=save).run()
        p = np.clip(blosc2.open(str(tmp_path / "out/a_probabilities.b2nd"))[:].astype(float), 1e-9, 1 - 1e-9)
        found = nib.load(tmp_path / "out/a_uncertainty.nii.gz")
        expected = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
        np.testing.assert_allclose(found.get_fdata(), expected.max(0), atol=1e-5)
        np.testing.assert_allclose(found.affine, nib.load(tmp_path / "a.nii").affine, atol=1e-5)
        evaluator(tmp_path / "a.nii", tmp_path / "alone", save="uncertainty").run()
        assert [file.name for file in (tmp_path / "alone").iterdir()] == ["a_uncertainty.nii.gz"]

    @pytest.mark.parametrize("name", AFFINES)
    def test_they_lie_on_the_images_own_grid(self, name, tmp_path):
        """The network's logits are 1 in the blob and -1 outside; zeros at one end are cropped."""
        blob = write_blob(tmp_path / "a.nii", AFFINES[name])
        image = nib.load(tmp_path / "a.nii")
        voxels = np.asarray(image.dataobj).copy()
        voxels[:3], voxels[:, :, -2:] = 0, 0
        nib.save(nib.Nifti1Image(voxels, image.affine), tmp_path / "a.nii")
        array, label_map = self.saved(tmp_path, tmp_path / "a.nii")
        assert array.dtype == np.float16 and array.schunk.vlmeta["targets"] == ["blob"]
        np.testing.assert_allclose(array.schunk.vlmeta["affine"], AFFINES[name], atol=1e-5)
        expected = np.where(voxels == 0, 0, 1 / (1 + np.exp(np.where(blob, -1, 1))))
        np.testing.assert_allclose(array[0], expected, atol=1e-3)
        assert np.array_equal(array[0] > 0.5, np.asarray(label_map.dataobj) > 0)

    def test_resampled_ones_are_what_the_label_map_was_cut_from(self, tmp_path):
        write_blob(tmp_path / "a.nii", AFFINES["permuted"])
        array, label_map = self.saved(tmp_path, tmp_path / "a.nii", (1.1, 1.0, 2.3))
        differ = (array[0] > 0.5) != (np.asarray(label_map.dataobj) > 0)
        assert np.abs(array[0][differ].astype(float) - 0.5).max(initial=0) < 1e-3

    @pytest.mark.parametrize("activation", ["sigmoid", "softmax", "probabilities"])
    @pytest.mark.parametrize(("shape", "source_shape"), [((40, 20, 25), (63, 31, 17)), ((9, 20, 25), (40, 9, 50))])
    def test_they_equal_resizing_the_whole_volume_of_what_is_averaged(self, activation, shape, source_shape, tmp_path):
        image, network, soft = prepared(shape, source_shape), convolution(4), activation != "sigmoid"
        names = ["a", "b", "c"] if soft else ["a", "b", "c", "d"]
        kept = Probabilities(tmp_path)
        inferer = SlabInferer(
            (16, 12, 10), names, amp=False, progress=False, activation=activation, probabilities=kept,
            targets=["a", "c"] if soft else ["b", "d"],
        )  # fmt: skip
        inferer(image, network)
        kept.save(tmp_path / "p.b2nd")
        averaged = torch.nn.Sequential(network, torch.nn.Softmax(1)) if activation == "probabilities" else network
        logits = naive_resize(naive_logits(image[0].numpy(), averaged, (16, 12, 10)), source_shape)
        expected = np.exp(logits) / np.exp(logits).sum(0) if soft else 1 / (1 + np.exp(-logits))
        expected = logits if activation == "probabilities" else expected
        expected = expected[1:] if soft else expected
        expected = expected * np.array([1, 0, 1] if soft else [0, 1, 0, 1]).reshape(-1, 1, 1, 1)
        np.testing.assert_allclose(blosc2.open(str(tmp_path / "p.b2nd"))[:], expected, atol=1e-3)

    def test_a_case_that_fails_leaves_nothing(self, tmp_path):
        write_blob(tmp_path / "a.nii", AFFINES["RAS"])
        engine = evaluator(tmp_path / "a.nii", tmp_path / "out", save="probabilities")
        engine.network.forward = lambda x: x * float("nan")
        with pytest.raises(FailedCases, match="NaN"):
            engine.run()
        engine.every.probabilities.discard()  # as at the process's end, or with the next case
        assert not list((tmp_path / "out").iterdir())

    def test_nobody_keeps_them(self):
        with pytest.raises(ValueError, match="nobody keeps"):
            SaveResultsd("pred", save="probabilities")


class TestRawIds:
    BRATS = LabelTable(
        {"whole": {}, "core": {"inside": "whole"}, "enhancing": {"inside": "core"}},
        [
            {"name": "brats", "labels": {"1": ["whole", "core"], "2": "whole", "4": ["whole", "core", "enhancing"]}},
            {"name": "other", "labels": {"300": "whole"}},
            {"name": "folders", "labels": {"tumor.nii.gz": "whole"}},
        ],
    )

    def test_a_data_sets_own_ids_come_back(self):
        """A map painted from raw ids, with the innermost target of each, is those raw ids again."""
        raw = np.array([0, 1, 2, 4, 4, 2], np.uint8)
        rows = self.BRATS.targets[self.BRATS.offset("brats") + self.BRATS.encode("brats", raw)] == 1
        painted = torch.from_numpy((rows * [1, 2, 3]).max(1)).byte()
        back = in_raw_ids(painted, self.BRATS, "brats")
        assert back.dtype == torch.uint8 and back.tolist() == raw.tolist()
        assert from_raw_ids(back.numpy(), self.BRATS, "brats").tolist() == painted.tolist()
        assert in_raw_ids(painted, self.BRATS, "other").tolist() == [0, 300, 300, 300, 300, 300]

    def test_targets_without_an_id_are_not_painted(self):
        sides = LabelTable(
            {"kidney": {}, "left": {"part_of": "kidney"}, "right": {"part_of": "kidney"}, "spleen": {}},
            [{"name": "amos", "labels": {"1": "left", "2": "right"}}],
        )
        assert raw_values(sides, "amos") == {2: 1, 3: 2}
        description = {"targets": sides.to_dict()["targets"], "dataset_labels": sides.to_dict()["datasets"]}
        assert trained_targets(description, "amos") == ["left", "right"]
        assert trained_targets({**description, "trained_targets": ["kidney", "right"]}, "amos") == ["right"]
        with pytest.raises(CheckpointError, match=r"stand for \['left', 'right'\]; the weights .* but on \['spleen'\]"):
            trained_targets({**description, "trained_targets": ["spleen"]}, "amos")

    def test_an_id_comes_back_as_the_value_that_says_the_least(self):
        sides = LabelTable({"left": {"part_of": "kidney"}, "kidney": {}}, [{"name": "kits", "labels": {"1": "kidney"}}])
        assert raw_values(sides, "kits") == {1: 1, 2: 1}
        assert from_raw_ids(np.array([0, 1]), sides, "kits").tolist() == [0, 2]

    def test_a_data_set_without_ids_is_refused(self):
        with pytest.raises(LabelError, match="names structures"):
            SaveResultsd("pred", table=self.BRATS, raw_ids="folders")
        with pytest.raises(LabelError, match="unknown data set 'brats2020'"):
            SaveResultsd("pred", table=self.BRATS, raw_ids="brats2020")

    def test_the_saved_map_holds_them(self, tmp_path):
        label_map = torch.tensor([0, 1, 2, 3], dtype=torch.uint8).view(1, 4, 1, 1)
        SaveResultsd("pred", tmp_path, table=self.BRATS, raw_ids="brats")({"pred": label_map, "case": "a"})
        assert np.asarray(nib.load(tmp_path / "a.nii.gz").dataobj).ravel().tolist() == [0, 2, 1, 4]


class TestFindImages:
    def touch(self, folder, *names):
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\0" * 128 + b"DICM" if path.suffix == ".dcm" else b"")

    def test_folders_are_searched_and_same_names_kept_apart(self, tmp_path):
        self.touch(
            tmp_path, "p1/ct.nii.gz", "p2/ct.nii.gz", "p2/é ü.mha", "p2/ct.json", "p3/1.dcm", "p3/2.dcm", "._x.nii"
        )
        found = {item["case"]: Path(item["image"]).relative_to(tmp_path).as_posix() for item in find_images(tmp_path)}
        assert found == {"p1_ct": "p1/ct.nii.gz", "p2_ct": "p2/ct.nii.gz", "é ü": "p2/é ü.mha", "p3": "p3"}

    @pytest.mark.parametrize("pattern", ["", "*", "**/*.nii*"])
    def test_results_inside_of_the_images_folder_are_no_images(self, tmp_path, pattern):
        self.touch(tmp_path, "a.nii", "b/c.nii", "out/a.nii.gz", "out/deeper/a_uncertainty.nii.gz")
        source = str(tmp_path / pattern)
        (tmp_path / "results").symlink_to(tmp_path / "out")
        found = find_images(source, tmp_path / "out", "overwrite")
        assert [item["case"] for item in found] == ["a", "c"]
        assert find_images(source, tmp_path / "out", "skip") == found[1:]
        beside = find_images(str(tmp_path / "b" / pattern), tmp_path, "overwrite")
        assert [item["case"] for item in beside] == ["c"], "results go above the images"

    @pytest.mark.parametrize("existing", ["error", "skip", "overwrite"])
    def test_no_result_is_written_over_an_image(self, tmp_path, existing):
        self.touch(tmp_path, "a.nii.gz", "b.nrrd")
        with pytest.raises(FileExistsError, match=r"a\.nii\.gz is an image.*another --output_dir"):
            find_images(tmp_path, tmp_path, existing)
        assert [item["case"] for item in find_images(tmp_path / "b.nrrd", tmp_path, existing)] == ["b"]

    @pytest.mark.parametrize("pattern", ["", "**/*"])
    def test_results_of_earlier_runs_are_no_images(self, tmp_path, pattern):
        self.touch(
            tmp_path, "a.nrrd", "b/ct.nii", "a.nii.gz", "before/ct.nii.gz", "before/ct_uncertainty.nii.gz", "x.nii"
        )
        for folder, case in ((tmp_path, "a"), (tmp_path / "before", "ct")):
            (folder / "report.json").write_text(json.dumps({"cases": {case: {"seconds": 1.0}}}))
        (tmp_path / "b/report.json").write_text("[]")
        for out in (tmp_path, tmp_path / "new"):
            cases = [item["case"] for item in find_images(str(tmp_path / pattern), out, "overwrite")]
            assert sorted(cases) == ["a", "ct", "x"]

    def test_images_of_formats_that_are_not_read_are_named(self, tmp_path, caplog):
        self.touch(tmp_path, "a.nii", "b.img", "b.hdr", "c.mgz", "ages.csv")
        assert [item["case"] for item in find_images(tmp_path)] == ["a"]
        assert "3 files in" in caplog.text and "for example b.hdr" in caplog.text

    def test_links_to_folders_are_followed_and_each_folder_is_searched_once(self, tmp_path):
        self.touch(tmp_path, "in/p1/a.nii", "in/p3/c.nii", "else/b.nii")
        for link, place in (("in/p2", "else"), ("in/p0", "in/p3"), ("in/p1/loop", "in"), ("else/back", "in/p1")):
            (tmp_path / link).symlink_to(tmp_path / place)
        found = {
            item["case"]: Path(item["image"]).relative_to(tmp_path).as_posix() for item in find_images(tmp_path / "in")
        }
        assert found == {"a": "in/p1/a.nii", "c": "in/p3/c.nii", "b": "in/p2/b.nii"}

    def test_the_table_of_contents_of_a_cd_is_no_image(self, tmp_path):
        self.touch(tmp_path, "S1/1.dcm")
        (tmp_path / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
        assert [item["image"] for item in find_images(tmp_path)] == [str(tmp_path / "S1")]

    def test_same_name_with_two_endings(self, tmp_path):
        self.touch(tmp_path, "a.nii", "a.nrrd")
        assert [item["case"] for item in find_images(tmp_path)] == ["a", "a_2"]

    def test_patterns_and_single_files(self, tmp_path):
        self.touch(tmp_path, "a.nii", "b.nii", "c.txt")
        assert [item["case"] for item in find_images(str(tmp_path / "*.nii"))] == ["a", "b"]
        assert [item["case"] for item in find_images(tmp_path / "b.nii")] == ["b"]

    def test_datalists_are_relative_to_their_file_and_keep_their_fields(self, tmp_path):
        content = {
            "training": [{"image": "t.nii"}],
            "testing": ["x/a.nii", {"image": ["b0.nii", "b1.nii"], "modality": "MR"}],
        }
        (tmp_path / "list.json").write_text(json.dumps(content))
        first, second = find_images(tmp_path / "list.json")
        assert first == {"image": str(tmp_path / "x/a.nii"), "case": "a"}
        assert second["image"] == [str(tmp_path / "b0.nii"), str(tmp_path / "b1.nii")]
        assert (second["modality"], second["case"]) == ("MR", "b0")

    def test_nothing_there_is_an_error(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no image in"):
            find_images(tmp_path)
        with pytest.raises(FileNotFoundError, match="no such file"):
            find_images(tmp_path / "missing.nii")
