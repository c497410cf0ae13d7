"""What networks of each family look like on given data, and what a training step costs them; pure arithmetic.

`topology` is nnU-Net 2.8.1's rule for strides and kernels; `unet_cost` its estimate of memory, `tsfm_cost` TSFM's own.
All axes are (S, P, L).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf, prod

from ..network.networks import LEVEL_STRIDES, STUNET_SIZES, STUNET_STRIDES
from ..network.tsfm_net import DEFAULT_SKIP

MIN_EDGE = 4
"""No side of the lowest level gets shorter by a stride than this many voxels (nnU-Net)."""


@dataclass(frozen=True)
class Topology:
    """strides: per step down, a factor per axis. kernel_sizes: per level, finest first. patch_size: what they divide."""

    strides: tuple[tuple[int, int, int], ...]
    kernel_sizes: tuple[tuple[int, int, int], ...]
    patch_size: tuple[int, int, int]

    @property
    def total_stride(self) -> tuple[int, ...]:
        return tuple(prod(axis) for axis in zip((1, 1, 1), *self.strides, strict=True))

    def sizes(self) -> list[tuple[int, ...]]:
        """The patch on every level, finest first."""
        found = [self.patch_size]
        for stride in self.strides:
            found.append(tuple(n // s for n, s in zip(found[-1], stride, strict=True)))
        return found


def topology(spacing_mm: Sequence[float], patch_size: Sequence[float], least: int = 1, most: float = inf) -> Topology:
    """nnU-Net's strides and kernels: an axis is halved once its spacing is within a factor 2 of the finest.

    Until then its kernel and stride are 1. At least `least` levels, of which those that the rule has not have stride 1, and
    at most `most`.
    """
    spacing, size = [float(s) for s in spacing_mm], [float(n) for n in patch_size]
    strides, kernels, kernel = [], [], [1, 1, 1]
    while len(strides) < most - 1:
        axes = [a for a in range(3) if size[a] >= 2 * MIN_EDGE]
        finest = min((spacing[a] for a in axes), default=0)
        axes = [a for a in axes if spacing[a] / finest < 2]
        if not axes or (len(axes) == 1 and size[axes[0]] < 3 * MIN_EDGE):
            break
        kernel = [3 if k == 3 or s / min(spacing) < 2 else 1 for k, s in zip(kernel, spacing, strict=True)]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if a in axes else 1 for a in range(3)))
        for a in axes:
            spacing[a], size[a] = spacing[a] * 2, ceil(size[a] / 2)
    more = max(0, least - 1 - len(strides))
    strides, kernels = strides + [(1, 1, 1)] * more, kernels + [(3, 3, 3)] * (more + 1)
    return fitted(strides, kernels, patch_size)


def fitted(strides: Sequence, kernel_sizes: Sequence, patch_size: Sequence[float]) -> Topology:
    """The smallest patch that `strides` divide and that is not smaller than `patch_size`, with them.

    The lowest level keeps more than one voxel, which instance normalization cannot do without.
    """
    divisor = [prod(axis) for axis in zip((1, 1, 1), *strides, strict=True)]
    patch = [int(-(-n // d) * d) for n, d in zip(patch_size, divisor, strict=True)]
    if patch == divisor:
        patch[max(range(3), key=lambda axis: patch_size[axis])] *= 2
    return Topology(tuple(strides), tuple(kernel_sizes), tuple(patch))


TRANSFORMER = ("hidden_size", "num_layers", "num_heads", "mlp_dim")


@dataclass(frozen=True)
class Family:
    """A network that can be as deep as the data asks.

    base, cap: channels of the finest level, doubled per level up to cap. blocks_down, blocks_up: per level, finest first;
    the last entry goes on; `bottom` replaces it at the lowest level. kind: ``plain``, ``residual``, ``tsfm`` or ``fixed``.
    reference, reference_gb: nnU-Net's currency: so many feature map values of one sample fill so many GB with a batch of 2.
    dataset_share: a batch holds at most this share of the data set's voxels. levels: at least, at most. widths: the channels, where
    they follow no rule (weights). strides, kernel_sizes: where they are given, with the patch that is theirs; ``fixed``
    networks have them. transformer: TSFM's arguments `TRANSFORMER`. skip: TSFM's.
    """

    name: str
    kind: str
    base: int
    cap: int
    blocks_down: tuple[int, ...]
    blocks_up: tuple[int, ...]
    reference: float = 1.0
    reference_gb: float = 8.0
    dataset_share: float = 0.05
    bottom: int | None = None
    levels: tuple[int, float] = (1, inf)
    transformer: tuple[int, int, int, int] = (0, 0, 0, 0)
    skip: str = DEFAULT_SKIP
    widths: tuple[int, ...] | None = None
    strides: tuple[tuple[int, ...], ...] = ()
    kernel_sizes: tuple[tuple[int, ...], ...] = ()
    patch: tuple[int, ...] = ()

    def features(self, levels: int) -> tuple[int, ...]:
        return self.widths or tuple(min(self.cap, self.base * 2**level) for level in range(levels))

    def depths(self, levels: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Blocks per level of the encoder (the lowest level included) and of the decoder, finest first."""
        down = [self.blocks_down[min(i, len(self.blocks_down) - 1)] for i in range(levels)]
        if self.bottom is not None:
            down[-1] = self.bottom
        return tuple(down), tuple(self.blocks_up[min(i, len(self.blocks_up) - 1)] for i in range(levels - 1))

    def lay_out(self, spacing_mm: Sequence[float], patch_size: Sequence[float]) -> Topology:
        """Its own strides, else those of nnU-Net's rule, and the smallest patch from `patch_size` that they divide."""
        if self.strides:
            kernels = self.kernel_sizes or ((3, 3, 3),) * (len(self.strides) + 1)
            return fitted(self.strides, kernels, patch_size)
        return topology(spacing_mm, patch_size, *self.levels)


def _stunet(size: str) -> Family:
    width, depth = STUNET_SIZES[size]
    name, patch = f"stunet_{size.lower()}", (128, 128, 128)
    return Family(name, "fixed", width, 16 * width, (depth,), (depth,), strides=STUNET_STRIDES, patch=patch)


FAMILIES = {
    family.name: family
    for family in (
        Family("nnunet", "plain", 32, 320, (2,), (2,), 560e6),
        Family("nnunet_resenc_m", "residual", 32, 320, (1, 3, 4, 6), (1,), 680e6, 8, 1.0),
        Family("nnunet_resenc_l", "residual", 32, 320, (1, 3, 4, 6), (1,), 2100e6, 24, 1.0),
        Family("nnunet_resenc_xl", "residual", 32, 320, (1, 3, 4, 6), (1,), 3600e6, 40, 1.0),
        Family("tsfm_s", "tsfm", 8, 80, (1,), (1,), levels=(2, 6), transformer=(48, 2, 3, 96)),
        Family("tsfm_b", "tsfm", 32, 320, (1,), (1,), levels=(2, 6), transformer=(192, 6, 6, 768)),
        Family("tsfm_l", "tsfm", 48, 1024, (2,), (2,), levels=(2, 6), transformer=(576, 12, 12, 2304)),
        Family(
            "tsfm_h", "tsfm", 64, 2048, (2,), (2, 2, 2, 2, 3), bottom=4, levels=(2, 6), transformer=(768, 12, 12, 3072)
        ),
        Family("swinunetr", "fixed", 48, 768, (2,), (1,), strides=LEVEL_STRIDES, patch=(96, 96, 96)),
        *map(_stunet, STUNET_SIZES),
    )
}
"""Networks that `plan` knows by name; tsfm_h is the paper's."""

SIZES = ("tsfm_h", "tsfm_l", "tsfm_b", "tsfm_s")


@dataclass(frozen=True)
class Cost:
    """What one sample of a patch costs. values: feature map values, in nnU-Net's currency or, for TSFM, those that the
    backward pass keeps; macs: multiply-adds forward; parameters: of the network; computed: `values` if all were kept."""

    values: int
    macs: int
    parameters: int
    computed: int


def step_cost(
    family: Family, found: Topology, in_channels: int, out_channels: int, checkpointing: bool | str = False
) -> Cost:
    """Of any family; of a ``fixed`` one nothing is known: zeros."""
    if family.kind == "fixed":
        return Cost(0, 0, 0, 0)
    if family.kind == "tsfm":
        return tsfm_cost(family, found, in_channels, out_channels, checkpointing)
    return unet_cost(family, found, in_channels, out_channels)


def unet_cost(family: Family, found: Topology, in_channels: int, out_channels: int) -> Cost:
    """nnU-Net's estimate of PlainConvUNet and ResidualEncoderUNet; `out_channels` counts the background."""
    sizes, levels = [prod(size) for size in found.sizes()], len(found.kernel_sizes)
    features, (down, up) = family.features(levels), family.depths(levels)
    kernels = [prod(kernel) for kernel in found.kernel_sizes]
    values = macs = parameters = 0

    def convolve(inputs: int, outputs: int, kernel: int, voxels: int) -> None:
        nonlocal values, macs, parameters
        values += outputs * voxels
        macs += inputs * outputs * kernel * voxels
        parameters += inputs * outputs * kernel + 3 * outputs  # bias and norm

    before = in_channels
    if family.kind == "residual":
        convolve(in_channels, features[0], kernels[0], sizes[0])
        before = features[0]
    for level, width in enumerate(features):
        has_stride = level > 0 and max(found.strides[level - 1]) > 1
        for number in range(down[level]):
            convolve(before, width, kernels[level], sizes[level])
            if family.kind == "residual":
                convolve(width, width, kernels[level], sizes[level])
                if number == 0 and before != width:
                    convolve(before, width, 1, sizes[level])
                    parameters -= width  # this convolution has no bias
                elif number == 0 and has_stride:
                    values += width * sizes[level]  # nnU-Net counts the pooled shortcut as well
            before = width
    for level in range(levels - 1):
        width, stride = features[level], prod(found.strides[level])
        convolve(features[level + 1], width, stride, sizes[level])
        macs -= features[level + 1] * width * (stride - 1) * sizes[level]
        parameters -= 2 * width  # a transposed convolution has no norm
        for number in range(up[level]):
            convolve(width if number else 2 * width, width, kernels[level], sizes[level])
        parameters += width * out_channels + out_channels
    values += out_channels * sizes[0]
    return Cost(values, macs, parameters, values)


def tsfm_cost(
    family: Family, found: Topology, in_channels: int, out_channels: int, checkpointing: bool | str = False
) -> Cost:
    """What TSFM keeps for its backward pass; with `checkpointing` (True, or "auto") each block keeps its input only."""
    sizes, levels = [prod(size) for size in found.sizes()], len(found.kernel_sizes)
    features, (down, up) = family.features(levels), family.depths(levels)
    kernels, strides = [prod(k) for k in found.kernel_sizes], [prod(s) for s in found.strides]
    maps = [width * voxels for width, voxels in zip(features, sizes, strict=True)]
    kept = 1 if checkpointing else 4
    parameters = in_channels * features[0] * kernels[0]
    macs, values = parameters * sizes[0], in_channels * sizes[0]
    for level, width in enumerate(features):
        blocks = down[level] + (up[level] if level < levels - 1 else 0)
        weights = 2 * width * width * kernels[level]
        parameters, macs = parameters + blocks * (weights + 4 * width), macs + blocks * weights * sizes[level]
        values += blocks * kept * maps[level]
        if level == levels - 1:
            break
        wider = features[level + 1]
        weights = (width + wider) * wider * kernels[level + 1] + width * wider * strides[level]
        parameters += weights + 2 * (width + wider) + width * wider + 2 * width + (width + 1) * out_channels
        macs += weights * sizes[level + 1] + width * wider * sizes[level + 1] + width * out_channels * sizes[level]
        values += (1 if checkpointing else 2) * (maps[level] + maps[level + 1]) + maps[level + 1]  # down and up
        values += 2 * maps[level] + 4 * out_channels * sizes[level]  # the head and the loss
        if family.skip == "concat":  # the first block takes twice the width, and has a shortcut
            parameters += width * width * (kernels[level] + 1 + 1) + 2 * width
            macs += width * width * (kernels[level] + 1 + 1) * sizes[level]
            values += (1 if checkpointing else 3) * maps[level]
    if checkpointing:
        values += 6 * maps[0]  # one block of the finest level, recomputed
    hidden, layers, _, mlp = family.transformer
    tokens, width = sizes[-1], features[-1]
    layer = 4 * hidden * hidden + 2 * hidden * mlp
    parameters += 2 * width + 2 * width * hidden + 2 * hidden + hidden * tokens
    parameters += layers * (layer + 9 * hidden + mlp)
    macs += tokens * (2 * width * hidden + layers * (layer + 2 * tokens * hidden))
    values += tokens * (2 * width + 2 * hidden + (1 if checkpointing else 12) * layers * hidden)
    computed = tsfm_cost(family, found, in_channels, out_channels).computed if checkpointing else int(values)
    return Cost(int(values), int(macs), int(parameters), computed)
