"""TSFM: a residual U-Net with a Transformer at its lowest level, in the paper's six blocks (section 2.2, figure 1).

| paper | here                  | what it does                                                                            |
|-------|-----------------------|-----------------------------------------------------------------------------------------|
| A     | Stem                  | 3x3x3 convolution from the image's channels to the first width                          |
| B     | ResBlock              | IN-LeakyReLU-Conv twice plus the input (pre-activation); several are stacked per level   |
| C     | Down                  | a ResBlock with stride: the sides halve, the channels double                             |
| D     | TransformerBottleneck | ViT-Base on the voxels of the lowest level                                              |
| E     | Up                    | interpolation and a 1x1x1 convolution that halves the channels, beside the skip          |
| F     | Head                  | IN-LeakyReLU and a 1x1x1 convolution to one logit per target                             |

The paper leaves open, and this file chooses:
- A and F are not described: A is one convolution; F ends the pre-activation stream, so it normalizes first.
- Skips are concatenated (`skip`), as in nnU-Net and STU-Net. Added, as in SegResNet, the first convolution of each decoder
  level costs half as much (6.8 instead of 7.6 TMAC for the paper's patch, 1.596 instead of 1.636 billion parameters);
  docs/results.md compares them.
- The shortcut of C is a convolution whose kernel is its stride, so that no voxel of the stream is skipped.
- D adds its output to its input: without it (`bottleneck=False`) the convolutional weights keep their meaning.
- E interpolates with `interpolation` ("nearest" by default). Its 1x1x1 convolution comes first: it mixes channels only and
  interpolation mixes voxels only, so both orders give the same numbers and this one costs an eighth.
- Only what matters has a bias: a constant per channel in the stream is removed by the next instance normalization.

The network traces (which is what torch.jit.script makes of it), exports (torch.export, ONNX) and compiles.

Shapes: B batch, C channels, SPL voxels to superior, posterior, left (the patch as the paper prints it), N tokens, H hidden.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import log, prod

import torch
import torch.nn.functional as F
from monai.networks.blocks import TransformerBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .cpu import instance_norm, is_eager_on_cpu
from .described import DescribedNetwork, Parts, check_levels

LEAKY_SLOPE = 0.01  # nnU-Net's LeakyReLU

SKIPS = ("add", "concat")

DEFAULT_SKIP = "concat"  # of new networks; weights that say nothing were trained with "add"

INITIAL_PROBABILITY = 0.1  # of every target in an untrained network: most voxels are in no target

PARTS = Parts(
    encoder=r"stem\.|encoder\.|down\.|bottleneck\.",
    head=r"heads\.",
    heads=r"heads\.\d+\.conv\.",
    optional=r"bottleneck\.|heads\.[1-9]\d*\.",
    inputs=r"stem\.weight$",
)

CUBE = (3, 3, 3)


def same(kernel_size: Sequence[int]) -> tuple[int, ...]:
    """The padding with which an odd kernel keeps the size."""
    return tuple(side // 2 for side in kernel_size)


class Conv(nn.Conv3d):
    """A 3D convolution; He initialization for the activation before it (slope 1: none)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        stride=1,
        slope: float = LEAKY_SLOPE,
        bias=False,
        padding=0,
    ):
        self.slope = slope
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=padding, bias=bias)

    def reset_parameters(self) -> None:
        """Keep the variance of the input: gain 1 on linear input (slope 1), 2 / (1 + slope^2) after LeakyReLU."""
        nn.init.kaiming_normal_(self.weight, a=self.slope)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class NormAct(nn.Module):
    """Instance normalization with scale and shift, then LeakyReLU: (B,C,S,P,L) -> the same; statistics in float32."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.at_least_float32(self.weight), self.at_least_float32(self.bias)
        norm = instance_norm if is_eager_on_cpu(x) else F.instance_norm
        return F.leaky_relu_(norm(x, weight=weight, bias=bias, eps=self.eps), LEAKY_SLOPE)

    @staticmethod
    def at_least_float32(parameter: Tensor) -> Tensor:
        """The parameter in the type that PyTorch then keeps the statistics in."""
        return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


class Stem(Conv):
    """Block A: (B,in,S,P,L) -> (B,features,S,P,L)."""

    def __init__(self, in_channels: int, features: int, kernel_size: Sequence[int] = CUBE):
        super().__init__(in_channels, features, kernel_size, slope=1.0, padding=same(kernel_size))


class ResBlock(nn.Module):
    """Block B: two IN-LeakyReLU-Conv layers plus the input; with a stride it is the body of block C."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: Sequence[int] = (1, 1, 1),
        dropout: float = 0.0,
        kernel_size: Sequence[int] = CUBE,
    ):
        super().__init__()
        stride, kernel_size = tuple(stride), tuple(kernel_size)
        self.norm1 = NormAct(in_channels)
        self.conv1 = Conv(in_channels, out_channels, kernel_size, stride, padding=same(kernel_size))
        self.norm2 = NormAct(out_channels)
        self.dropout = nn.Dropout3d(dropout) if dropout else nn.Identity()
        self.conv2 = Conv(out_channels, out_channels, kernel_size, padding=same(kernel_size))
        self.shortcut = nn.Identity()
        if in_channels != out_channels or prod(stride) > 1:
            self.shortcut = Conv(in_channels, out_channels, stride, stride, slope=1.0)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv1(self.norm1(x))
        branch = self.conv2(self.dropout(self.norm2(branch)))
        return branch.add_(self.shortcut(x))


class Down(ResBlock):
    """Block C: (B,C,S,P,L) -> (B,2C,S/2,P/2,L/2) for stride 2 (any stride and width are possible)."""


class TransformerBottleneck(nn.Module):
    """Block D: (B,C,S,P,L) -> the same; every voxel is a token, ViT-Base by default (12 layers, 768, 12 heads, MLP 3072).

    The position embedding (1,H,S,P,L) belongs to `grid` and is interpolated when the input has another one.
    """

    def __init__(
        self,
        features: int,
        grid: Sequence[int],
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        dropout: float,
    ):
        super().__init__()
        self.norm_in = nn.LayerNorm(features)
        self.project_in = nn.Linear(features, hidden_size)
        self.position_embedding = nn.Parameter(torch.zeros(1, hidden_size, *grid))
        self.dropout = nn.Dropout(dropout)
        # MONAI's flash attention drops in evaluation too, so it serves networks without dropout only.
        self.layers = nn.ModuleList(
            TransformerBlock(hidden_size, mlp_dim, num_heads, dropout, qkv_bias=True, use_flash_attention=not dropout)
            for _ in range(num_layers)
        )
        for layer in self.layers:  # unused parameters would stop distributed training
            layer.norm_cross_attn = nn.Identity()
        self.norm_out = nn.LayerNorm(hidden_size, bias=False)
        self.project_out = nn.Linear(hidden_size, features, bias=False)
        self.checkpointing = False
        nn.init.trunc_normal_(self.position_embedding, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)  # ViT's
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[2:]
        x_BNC = x.flatten(2).transpose(1, 2)
        positions = interpolate_positions(self.position_embedding, grid).flatten(2).transpose(1, 2)
        tokens_BNH = self.dropout(self.project_in(self.norm_in(x_BNC)) + positions)
        for layer in self.layers:
            tokens_BNH = run(layer, tokens_BNH, self.checkpointing and self.training)
        out_BNC = self.project_out(self.norm_out(tokens_BNH))
        return x + out_BNC.transpose(1, 2).unflatten(2, grid)


class Up(nn.Module):
    """Block E and the skip: (B,2C,S/2,P/2,L/2) and the encoder's (B,C,S,P,L) -> (B,C,S,P,L), or (B,2C,...) with "concat"."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: Sequence[int],
        interpolation: str = "nearest",
        skip: str = DEFAULT_SKIP,
    ):
        super().__init__()
        self.conv = Conv(in_channels, out_channels, 1, slope=1.0)
        self.stride = tuple(stride)
        self.interpolation = interpolation
        self.concatenates = skip == "concat"

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(self.conv(x), scale_factor=tuple(map(float, self.stride)), mode=self.interpolation)
        return torch.cat([skip, x], 1) if self.concatenates else skip + x


class Head(nn.Module):
    """Block F: (B,C,S,P,L) -> logits (B,targets,S,P,L)."""

    def __init__(self, features: int, out_channels: int):
        super().__init__()
        self.norm = NormAct(features)
        self.conv = Conv(features, out_channels, 1, slope=1.0, bias=True)
        nn.init.constant_(self.conv.bias, log(INITIAL_PROBABILITY / (1 - INITIAL_PROBABILITY)))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))


class TSFM(DescribedNetwork):
    """The network: (B,in_channels,S,P,L) -> logits (B,out_channels,S,P,L), one per target (sigmoid outside).

    In training with `deep_supervision` the output is a list of logits, finest first, one per decoder level; else one tensor.
    The defaults are the paper's 1.6 billion parameters and 7x5x6 = 210 tokens for its patch.

    Args:
        features: channels of each level, finest first; block C doubles them in the paper.
        depths_down: stacked ResBlocks of each level of the encoder, the lowest level included.
        depths_up: stacked ResBlocks of each decoder level, finest first (one entry fewer than `features`).
        strides: per step down, one factor per axis (one entry fewer than `features`).
        kernel_sizes: per level, an odd size per axis for its convolutions (stem: the first); None is 3x3x3 everywhere.
        img_size: the training patch (S,P,L) in voxels: gives the position embedding its grid; other sizes interpolate it.
        hidden_size, num_layers, num_heads, mlp_dim: the Transformer's.
        dropout: of the Transformer (elements) and between the convolutions of each ResBlock (channels).
        bottleneck: False replaces the Transformer by the identity (ablation).
        deep_supervision: False builds the finest head only.
        checkpointing: recompute the blocks' activations in the backward pass; numbers do not change.
        interpolation: of block E, "nearest" or "trilinear".
        skip: "add" or "concat": the first ResBlock of a decoder level then takes both, and there has to be one.

    Raises:
        ValueError: lists that do not fit together, or an input whose size the strides do not divide (says what would fit).
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 31,
        features: Sequence[int] = (64, 128, 256, 512, 1024, 2048),
        depths_down: Sequence[int] = (2, 2, 2, 2, 2, 4),
        depths_up: Sequence[int] = (2, 2, 2, 2, 3),
        strides: Sequence[Sequence[int]] = ((2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2)),
        img_size: Sequence[int] = (112, 160, 192),
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        mlp_dim: int = 3072,
        dropout: float = 0.0,
        bottleneck: bool = True,
        deep_supervision: bool = True,
        checkpointing: bool = False,
        interpolation: str = "nearest",
        kernel_sizes: Sequence[Sequence[int]] | None = None,
        skip: str = DEFAULT_SKIP,
    ):
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        kernels = [tuple(size) for size in kernel_sizes or [CUBE] * len(features)]
        check_levels("TSFM", features, depths_down, depths_up, strides, kernels)
        if skip not in SKIPS:
            raise ValueError(f"TSFM: skip is {skip!r}; expected one of {SKIPS}")
        if skip == "concat" and min(depths_up) < 1:
            raise ValueError(
                f"TSFM: depths_up is {tuple(depths_up)}; with concatenated skips it is at least 1 per level"
            )
        super().__init__(arguments, strides, PARTS)
        self.deep_supervision = deep_supervision
        self.checkpointing = checkpointing
        self.check_size(img_size)
        grid = [size // stride for size, stride in zip(img_size, self.total_stride, strict=True)]

        def stack(level: int, depth: int, in_channels: int) -> nn.ModuleList:
            widths = [in_channels, *[features[level]] * depth]
            return nn.ModuleList(
                ResBlock(*pair, dropout=dropout, kernel_size=kernels[level]) for pair in pairwise(widths)
            )

        levels = range(len(strides))
        self.stem = Stem(in_channels, features[0], kernels[0])
        self.encoder = nn.ModuleList(stack(level, depth, features[level]) for level, depth in enumerate(depths_down))
        self.down = nn.ModuleList(
            Down(features[i], features[i + 1], strides[i], dropout, kernels[i + 1]) for i in levels
        )
        self.bottleneck = nn.Identity()
        if bottleneck:
            self.bottleneck = TransformerBottleneck(
                features[-1], grid, hidden_size, num_layers, num_heads, mlp_dim, dropout
            )
            self.bottleneck.checkpointing = checkpointing
        self.up = nn.ModuleList(Up(features[i + 1], features[i], strides[i], interpolation, skip) for i in levels)
        wide = 2 if skip == "concat" else 1
        self.decoder = nn.ModuleList(stack(i, depth, wide * features[i]) for i, depth in enumerate(depths_up))
        self.heads = nn.ModuleList(Head(features[i], out_channels) for i in levels[: None if deep_supervision else 1])

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if not torch.jit.is_tracing():
            self.check_size(x.shape[2:], x.shape)
        recompute = self.checkpointing and self.training
        x = self.stem(x)
        if is_eager_on_cpu(x):  # where convolutions take half the time in this layout
            x = x.contiguous(memory_format=torch.channels_last_3d)
        skips = []
        for level, blocks in enumerate(self.encoder):
            if level:
                x = run(self.down[level - 1], x, recompute)
            for block in blocks:
                x = run(block, x, recompute)
            skips.append(x)
        x = self.bottleneck(skips.pop())
        outputs: list[Tensor] = []
        for level in reversed(range(len(self.up))):
            x = self.up[level](x, skips.pop())
            for block in self.decoder[level]:
                x = run(block, x, recompute)
            if level == 0 or (self.training and self.deep_supervision):
                outputs.insert(0, self.heads[level](x))
        return outputs if self.training and self.deep_supervision else outputs[0]


def interpolate_positions(position_embedding: Tensor, grid: Sequence[int]) -> Tensor:
    """A position embedding (1,H,S,P,L) on another `grid` (trilinear); on its own grid it is returned as it is."""
    if tuple(position_embedding.shape[2:]) == tuple(grid):
        return position_embedding
    resized = F.interpolate(position_embedding.float(), size=tuple(grid), mode="trilinear", align_corners=False)
    return resized.to(position_embedding.dtype)


def run(block: nn.Module, x: Tensor, recompute: bool) -> Tensor:
    """`block(x)`, its activations kept or recomputed in the backward pass."""
    return checkpoint(block, x, use_reentrant=False) if recompute else block(x)
