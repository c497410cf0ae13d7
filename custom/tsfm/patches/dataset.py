"""Patches for training: which case and where (`PoolSampler`), and the patch itself, read in part (`PatchDataset`).

Every random number follows from (seed, epoch, position in the epoch), so that the number of workers, resuming and the
number of processes change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import get_track_meta, set_track_meta
from monai.transforms import Compose
from torch.utils.data import Dataset, DistributedSampler

from ..cases.pool import complete_items, sampling_weights
from ..preparation.preprocessing import channel_rules
from .augmentation import RandRotateScale, resample_patch, share_random_state, source_box


class Draw(NamedTuple):
    """One sample to be made: the case's index, the seed of all its random numbers, and whether it shows foreground."""

    case: int
    seed: int
    foreground: bool


class PoolSampler(DistributedSampler):
    """Draws cases with replacement, by weight; a third of the samples are to show foreground.

    Use it as the ``sampler`` of a loader with the same `batch_size`. It is a DistributedSampler so that MONAI's trainer
    tells it the epoch by itself; elsewhere call :meth:`set_epoch`. With `fixed` every epoch is the same, whoever tells it: for validation.

    Args:
        data: datalist items, weighted by :func:`tsfm.cases.pool.sampling_weights`.
        batch_size: samples per process.
        iterations: batches per epoch.
        foreground_fraction: the last samples of a batch, from ``round(batch * (1 - fraction))`` on, are forced to show
            foreground (nnU-Net's rule; one of two). A batch of one is forced with this probability.
        rank, world_size: this process and their number; the batches of all ranks together are those that one process
            with the `world_size`-fold `batch_size` would draw.
        allow_empty: without any case, draw nothing instead of raising a ValueError (a fold without validation cases).
        fixed: draw the same samples in every epoch.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        batch_size: int = 2,
        iterations: int = 250,
        seed: int = 0,
        foreground_fraction: float = 1 / 3,
        rank: int = 0,
        world_size: int = 1,
        allow_empty: bool = False,
        fixed: bool = False,
    ) -> None:
        if not len(data) and not allow_empty:
            raise ValueError("no cases to draw from")
        super().__init__(data, num_replicas=world_size, rank=rank, shuffle=False, seed=seed)
        self.batch_size = batch_size
        self.iterations = iterations if len(data) else 0
        self.foreground_fraction = foreground_fraction
        self.fixed = fixed
        weights = sampling_weights(data)
        self._cumulative = np.cumsum(weights) / weights.sum()

    def set_epoch(self, epoch: int) -> None:
        """Other samples in every epoch, unless the sampler is `fixed`."""
        if not self.fixed:
            super().set_epoch(epoch)

    def __len__(self) -> int:
        return self.iterations * self.batch_size

    def __iter__(self) -> Iterator[Draw]:
        for iteration in range(self.iterations):
            for row in range(self.batch_size):
                yield self._draw(iteration, self.rank * self.batch_size + row)

    def _draw(self, iteration: int, row: int) -> Draw:
        """The sample in row `row` of global batch `iteration` of this epoch."""
        global_batch = self.batch_size * self.num_replicas
        rng = np.random.Generator(np.random.Philox(key=(self.seed, self.epoch), counter=(0, 0, row, iteration)))
        case = min(int(np.searchsorted(self._cumulative, rng.random(), side="right")), len(self._cumulative) - 1)
        seed, chance = int(rng.integers(2**63)), rng.random()
        if global_batch == 1:
            return Draw(case, seed, bool(chance < self.foreground_fraction))
        return Draw(case, seed, row >= round(global_batch * (1 - self.foreground_fraction)))


class PatchDataset(Dataset):
    """Patches of prepared cases; only the voxels a patch needs are read, so memory does not grow with the pool.

    Index it with a :class:`Draw`, as :class:`PoolSampler` gives. A plain integer gives that case's one fixed patch,
    around foreground: the same every epoch.

    Args:
        data: datalist items; bare ``{"image", "label"}`` items belong to the table's only data set.
        store: a :class:`tsfm.patches.store.CaseStore`; cases it lacks are prepared on first touch.
        table: the :class:`tsfm.labels.LabelTable`.
        patch_size: (S, P, L) in voxels.
        transform: random transforms of ``{"image", "label"}``, a MONAI transform or a list of them.
        spatial: rotation and scaling; None for neither.
        seed: for plain integer indices only.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        store: Any,
        table: Any,
        patch_size: Sequence[int],
        transform: Callable | Sequence[Callable] | None = None,
        spatial: RandRotateScale | None = None,
        seed: int = 0,
    ) -> None:
        self.data = complete_items(data, table, store.preparation.default_modality)
        self.store = store
        self.table = table
        self.patch_size = tuple(int(size) for size in patch_size)
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise ValueError(f"patch_size is {self.patch_size}; expected three positive numbers of voxels (S, P, L)")
        self.transform = transform if isinstance(transform, Compose) or transform is None else Compose(transform)
        self.spatial = spatial
        self.seed = seed
        self.spacing_mm = tuple(store.preparation.spacing_mm)
        # torch knows few operations for uint16
        self.label_dtype = torch.uint8 if np.dtype(table.code_dtype) == np.uint8 else torch.int32

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Draw | int) -> dict[str, Any]:
        """``{"image": (C, S, P, L) float32, "label": (1, S, P, L) table-wide codes, "dataset": str, "case": str}``."""
        draw = index if isinstance(index, Draw) else Draw(int(index), self.seed + int(index), True)
        item = self.data[draw.case]
        rng = np.random.default_rng(draw.seed)
        case = self.store.open(item)
        matrix = None if self.spatial is None else self.spatial.draw(rng, self.patch_size, self.spacing_mm)
        origin = patch_origin(case.shape, self.patch_size, case.foreground if draw.foreground else {}, rng)
        image, codes = self._read(case, origin, matrix)
        label = codes.to(self.label_dtype) + self.table.offset(item["dataset"])
        sample = {"image": image, "label": label, "dataset": item["dataset"], "case": item["case"]}
        if self.transform is None:
            return sample
        share_random_state(self.transform, np.random.RandomState(int(rng.integers(2**32))))
        return self._transformed(sample, item["modality"], case)

    def _transformed(self, sample: dict[str, Any], modality: str, case: Any) -> dict[str, Any]:
        """Transform a sample; channels that were z-scored inside a mask stay 0 outside of it (nnU-Net's MaskImageTransform).

        A 0 was stored within half a step of it. The masks go through the flips as further channels of the label.
        """
        image, label = sample["image"], sample["label"]
        rules = channel_rules(self.store.preparation, modality, len(image), case.cropped_share)
        masked = [channel for channel, rule in enumerate(rules) if rule.get("masked")]
        if masked:
            zero = torch.stack([image[channel].abs() <= 0.51 * case.steps[channel] for channel in masked])
            sample = {**sample, "label": torch.cat([label, zero.to(label.dtype)])}
        with plain_tensors():
            made = dict(self.transform({**sample, "spacing_mm": self.spacing_mm}))
        del made["spacing_mm"]
        for channel, outside in zip(masked, made["label"][1:], strict=True):
            made["image"][channel].masked_fill_(outside.bool(), 0)
        made["label"] = made["label"][:1]
        return made

    def _read(self, case: Any, origin: np.ndarray, matrix: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Image (C, S, P, L) and local codes (1, S, P, L) of a patch; 0 and background (code 0) outside the case."""
        if matrix is None:
            wanted = np.stack([origin, origin + self.patch_size], axis=1)
        else:
            wanted = source_box(matrix, origin, self.patch_size)
        inside = np.clip(wanted, 0, np.asarray(case.shape)[:, None])
        box = tuple((int(start), int(stop)) for start, stop in inside)
        image = torch.from_numpy(np.ascontiguousarray(case.read_image(box), np.float32))
        codes = np.ascontiguousarray(case.read_codes(box))
        codes = torch.from_numpy(codes.astype(np.int32) if codes.dtype == np.uint16 else codes)
        if matrix is not None:
            return resample_patch(image, codes, inside[:, 0], matrix, origin, self.patch_size)
        edges = np.abs(wanted - inside)[::-1].ravel().tolist()  # the last axis first, as `pad` wants them
        return F.pad(image, edges), F.pad(codes[None], edges)


def patch_origin(
    shape: Sequence[int], patch_size: Sequence[int], foreground: Mapping[int, np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    """First voxel (3,) of a patch; negative where the patch begins before the case (nnU-Net 2's rule).

    With `foreground` (code -> (n, 3) voxels) a code of the case is drawn, then one of its voxels as the patch centre;
    such a patch is moved to begin inside the case, but may end beyond it. Otherwise every position inside is as likely.
    """
    shape, patch_size = np.asarray(shape, np.int64), np.asarray(patch_size, np.int64)
    missing = np.maximum(patch_size - shape, 0)
    lowest = -((missing + 1) // 2)
    highest = shape + missing // 2 + missing % 2 - patch_size
    present = [code for code in sorted(foreground) if len(foreground[code])]
    if not present:
        return rng.integers(lowest, highest + 1)
    voxels = foreground[present[rng.integers(len(present))]]
    center = np.asarray(voxels[rng.integers(len(voxels))], np.int64)
    return np.maximum(lowest, center - patch_size // 2)


@contextmanager
def plain_tensors() -> Iterator[None]:
    """MONAI transforms give plain tensors within: a patch has no affine to track, and tracking is slow."""
    tracked = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(tracked)
