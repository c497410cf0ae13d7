"""Random transforms that MONAI lacks: rotation with scaling as one resampling, a rule per channel, gamma, a faster blur.

Numbers and order are nnU-Net's (its default trainer, versions 1 and 2.8.1); the list itself stands in a bundle's train.json.
Axes: S, P, L are the voxel axes of a patch, C its channels.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.transforms import AdjustContrast, MapTransform, Randomizable, RandomizableTransform, Transform

THICK_RATIO = 3  # nnU-Net: a patch whose longest side has more than 3 times its slices is augmented slice by slice

SLAB = 8  # output slices resampled at a time: their sampling grid stays in the processor's cache


def thick_patch_axis(patch_size: Sequence[int], spacing_mm: Sequence[float] = (1.0, 1.0, 1.0)) -> int | None:
    """Axis across whose slices a patch is not rotated, scaled or degraded, or None (nnU-Net's rule).

    It is the axis of the thickest voxels (the first of several), which nnU-Net turns to the front, whichever side of the
    patch is the shortest.
    """
    axis = int(np.argmax(spacing_mm))
    return axis if max(patch_size) / patch_size[axis] > THICK_RATIO else None


class RandRotateScale:
    """Draws a rotation and a scaling, independently of each other, as one matrix.

    Args:
        rotation_prob: probability of a rotation, uniform within `rotation_degrees` about each of the three axes.
        rotation_degrees: largest angle. Patches with thick slices turn in their plane only, by up to 180 degrees.
        scale_prob: probability of a scaling, the same along all axes (in the plane only for thick slices).
        scale_range: half of the scalings are uniform in (lower, 1), half in (1, upper). A value over 1 shows more of
            the case, and all of it smaller. Source: nnU-Net 1; version 2.8.1 draws uniformly from the whole range.
    """

    def __init__(
        self,
        rotation_prob: float = 0.2,
        rotation_degrees: float = 30.0,
        scale_prob: float = 0.2,
        scale_range: Sequence[float] = (0.7, 1.4),
    ) -> None:
        if not 0 < scale_range[0] <= 1 <= scale_range[1]:
            raise ValueError(
                f"scale_range is {tuple(scale_range)}; it must hold 1 and be positive, for instance (0.7, 1.4)"
            )
        self.rotation_prob = rotation_prob
        self.rotation_degrees = rotation_degrees
        self.scale_prob = scale_prob
        self.scale_range = tuple(scale_range)

    def draw(
        self, rng: np.random.Generator, patch_size: Sequence[int], spacing_mm: Sequence[float] = (1.0, 1.0, 1.0)
    ) -> np.ndarray | None:
        """Matrix (3, 3) from patch to case voxel offsets about the patch centre, or None where nothing was drawn."""
        rotate, scale = rng.random() < self.rotation_prob, rng.random() < self.scale_prob
        thick = thick_patch_axis(patch_size, spacing_mm)
        matrix = np.eye(3)
        if rotate:
            limit = np.deg2rad(self.rotation_degrees if thick is None else 180.0)
            angles = rng.uniform(-limit, limit, size=3)
            for axis in (0, 1, 2) if thick is None else (thick,):
                matrix = _rotation(axis, angles[axis]) @ matrix
        if scale:
            lower, upper = self.scale_range
            factor = rng.uniform(lower, 1) if rng.random() < 0.5 else rng.uniform(1, upper)
            matrix = matrix @ np.diag([1.0 if axis == thick else factor for axis in range(3)])
        return matrix if rotate or scale else None


def _rotation(axis: int, angle: float) -> np.ndarray:
    """Rotation matrix (3, 3) about one voxel axis, `angle` in radians."""
    first, second = [other for other in range(3) if other != axis]
    matrix = np.eye(3)
    matrix[[first, second], [first, second]] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix


def source_box(matrix: np.ndarray, origin: Sequence[int], patch_size: Sequence[int]) -> np.ndarray:
    """The box (3, 2) of case voxels (first, one past the last) that trilinear sampling of a patch touches.

    `origin` is the patch's first voxel in the case before `matrix` turns it about its centre. Not clipped to the case.
    """
    half = (np.asarray(patch_size) - 1) / 2
    center, reach = np.asarray(origin) + half, np.abs(matrix) @ half
    # The slack keeps voxels that rounding of the float32 sampling grid may touch.
    return np.stack([np.floor(center - reach - 1e-3), np.ceil(center + reach + 1e-3) + 1], axis=1).astype(int)


def resample_patch(
    image: torch.Tensor,
    codes: torch.Tensor,
    box_start: Sequence[int],
    matrix: np.ndarray,
    origin: Sequence[int],
    patch_size: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate and scale in one resampling: image trilinear, codes nearest, zero outside.

    Args:
        image: (C, s, p, l) float32, the part of the case that starts at voxel `box_start`; see :func:`source_box`.
        codes: (s, p, l) integers of the same part.
        matrix, origin: as :func:`source_box` takes them.

    Returns:
        (C, S, P, L) float32 and (1, S, P, L) of the codes' type.
    """
    size = torch.tensor(image.shape[1:], dtype=torch.float64)
    to_grid = 2 / size  # grid_sample's coordinates run from -1 to 1 over the outer faces of the voxels
    columns = torch.from_numpy(matrix) * to_grid[:, None]
    half = (torch.tensor(patch_size, dtype=torch.float64) - 1) / 2
    center = (torch.tensor(origin) + half - torch.tensor(box_start) + 0.5) * to_grid - 1
    s, p, x = (torch.arange(n, dtype=torch.float64) - h for n, h in zip(patch_size, half, strict=True))
    # grid_sample wants a voxel's coordinates in the order (L, P, S).
    plane = (p[:, None, None] * columns[:, 1] + x[None, :, None] * columns[:, 2] + center).flip(-1).float()
    shift = (s[:, None] * columns[:, 0]).flip(-1).float()

    sampled = image.new_empty((len(image), *patch_size))
    labels = codes.new_empty((1, *patch_size))
    codes = codes[None, None].float()
    for start in range(0, patch_size[0], SLAB):
        stop = min(start + SLAB, patch_size[0])
        grid = (plane[None] + shift[start:stop, None, None, :])[None]
        sampled[:, start:stop] = F.grid_sample(image[None], grid, mode="bilinear", align_corners=False)[0]
        labels[:, start:stop] = F.grid_sample(codes, grid, mode="nearest", align_corners=False)[0]
    return sampled, labels


def share_random_state(part: Any, state: np.random.RandomState) -> None:
    """Let a transform (or a list of them) and all that it holds draw from one random state.

    `set_random_state` makes a state for each part instead, which takes 2 ms for the list of the bundles.
    """
    if isinstance(part, (list, tuple)):
        for member in part:
            share_random_state(member, state)
    elif isinstance(part, Transform):
        if isinstance(part, Randomizable):
            part.R = state
        share_random_state(list(vars(part).values()), state)


class RandPerChanneld(RandomizableTransform, MapTransform):
    """Applies an array transform to some channels, each with its own random numbers.

    Args:
        keys: images of shape (C, S, P, L).
        transform: a MONAI array transform that always acts (``prob`` 1 where it has one).
        prob: probability that the image is touched at all.
        channel_prob: then, probability of each channel.
        thick_in_plane: show slices alone, as channels one voxel thick, to the transform where the patch has thick slices
            (by the item's ``spacing_mm``, which `PatchDataset` gives).

    Example:
        ``RandPerChanneld("image", RandSimulateLowResolution(prob=1.0), prob=0.25, channel_prob=0.5)``
    """

    def __init__(
        self,
        keys: KeysCollection,
        transform: Any,
        prob: float = 0.1,
        channel_prob: float = 1.0,
        thick_in_plane: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.transform = transform
        self.channel_prob = channel_prob
        self.thick_in_plane = thick_in_plane

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> RandPerChanneld:
        super().set_random_state(seed, state)
        if isinstance(self.transform, Randomizable):
            self.transform.set_random_state(seed=int(self.R.randint(2**32, dtype=np.uint32)))
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return d
        for key in self.key_iterator(d):
            chosen = self.R.random_sample(len(d[key])) < self.channel_prob
            if chosen.any():
                spacing = d.get("spacing_mm", (1.0, 1.0, 1.0))
                thick = thick_patch_axis(d[key].shape[1:], spacing) if self.thick_in_plane else None
                axis = 0 if thick is None else thick + 1
                channels = list(d[key].split(1))
                for number in np.flatnonzero(chosen):
                    channels[number] = self.transform(channels[number].transpose(0, axis)).transpose(0, axis)
                d[key] = torch.cat(channels)
        return d


class RandGamma(RandomizableTransform):
    """Intensities to the power of gamma, between the image's smallest and largest value; mean and sd are kept.

    Args:
        gamma: half of the draws are uniform in (lower, 1), half in (1, upper). Source: nnU-Net 2.8.1.
        invert_image: raise the negative image instead, which stretches the other end of the intensities.
        prob: probability of the transform.
    """

    def __init__(self, gamma: Sequence[float] = (0.7, 1.5), invert_image: bool = False, prob: float = 1.0) -> None:
        RandomizableTransform.__init__(self, prob)
        if not 0 < gamma[0] <= 1 <= gamma[1]:
            raise ValueError(f"gamma is {tuple(gamma)}; it must hold 1 and be positive, for instance (0.7, 1.5)")
        self.gamma = tuple(gamma)
        self.power = AdjustContrast(1.0, invert_image=invert_image, retain_stats=True)

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        """Image (C, ...) to one of the same shape, all channels with the same gamma."""
        self.randomize(None)
        if not self._do_transform:
            return img
        lower, upper = self.gamma
        return self.power(img, self.R.uniform(lower, 1) if self.R.uniform() < 0.5 else self.R.uniform(1, upper))


class RandGaussianBlur(RandomizableTransform):
    """Gaussian blur with its own sigma per axis; the border is mirrored, as nnU-Net does.

    MONAI's RandGaussianSmooth takes zeros from beyond the border, which draws a frame, and ten times as long.

    Args:
        sigma: range of the standard deviation, in voxels, uniform.
        prob: probability of the blur.
    """

    def __init__(self, sigma: Sequence[float] = (0.5, 1.0), prob: float = 1.0) -> None:
        RandomizableTransform.__init__(self, prob)
        self.sigma = tuple(sigma)

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        """Image (C, ...) to its blurred copy of the same shape."""
        self.randomize(None)
        if self._do_transform:
            for axis in range(1, img.ndim):
                img = blur_axis(img, axis, self.R.uniform(*self.sigma))
        return img


def blur_axis(img: torch.Tensor, axis: int, sigma: float) -> torch.Tensor:
    """One axis blurred by a sampled Gaussian of `sigma` voxels, mirrored at the border (scipy's mode "mirror")."""
    radius = int(4 * sigma + 0.5)  # as scipy.ndimage.gaussian_filter
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).tolist()
    size = img.shape[axis]
    source = torch.from_numpy(np.pad(np.arange(size), radius, mode="reflect"))
    padded = img.index_select(axis, source)
    blurred = padded.narrow(axis, 0, size) * weights[0]
    for step, weight in enumerate(weights[1:], start=1):
        blurred.add_(padded.narrow(axis, step, size), alpha=weight)
    return blurred
