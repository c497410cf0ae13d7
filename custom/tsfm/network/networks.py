"""The networks that the bundles train, by name: TSFM, and the paper's baselines from the packages that keep them.

| name      | network                          | package                                                              |
|-----------|----------------------------------|----------------------------------------------------------------------|
| tsfm      | `TSFM`                           | this one                                                             |
| nnunet    | nnU-Net's plain or residual U-Net | dynamic-network-architectures 0.4.4, `pip install --no-deps`        |
| swinunetr | SwinUNETR                        | MONAI                                                                |
| stunet    | STU-Net                          | medim 0.1.2, `pip install --no-deps`, with appdirs and requests      |
| sam_med3d | SAM-Med3D, which needs clicks    | medim                                                                |
| monai     | MONAI's UNet, SegResNet, ...: `monai_nets.NETS` | MONAI                                                 |
| ensemble  | the mean of several, all alike   |                                                                      |

The name and the arguments travel with the weights, so that a weight file names nothing but an entry of this list: no
file can have anything else imported or called. Packages are imported when their network is built.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .adapted import Adapted, NetworkError, drop_duplicates, given, only_finest, package, recompute
from .described import DescribedNetwork, Parts, check_levels
from .monai_nets import MONAINet
from .prompted import SAMMed3D
from .tsfm_net import TSFM

logger = logging.getLogger(__name__)

LEVEL_STRIDES = ((2, 2, 2),) * 5

STUNET_STRIDES = (*((2, 2, 2),) * 4, (1, 1, 2))

STUNET_SIZES = {"S": (16, 1), "B": (32, 1), "L": (64, 2), "H": (96, 3)}  # first width, blocks per level


class NNUNet(Adapted):
    """nnU-Net's U-Net: plain, or with residual blocks in the encoder (`residual`).

    Args:
        img_size: the training patch (S,P,L); only checked.
        features: channels of each level, finest first; by default 32, doubled up to 320.
        strides: per step down, one factor per axis.
        kernel_sizes: one per level, 3x3x3 by default.
        depths_down: convolutions (blocks, if residual) of each level; 2 by default, of residual blocks 1, 3, 4, 6, 6...
        depths_up: convolutions of each decoder level, finest first; 2 by default, 1 if residual.
        bias: of convolutions.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 31,
        img_size: Sequence[int] = (128, 128, 128),
        features: Sequence[int] | None = None,
        strides: Sequence[Sequence[int]] = LEVEL_STRIDES,
        kernel_sizes: Sequence[Sequence[int]] | None = None,
        depths_down: Sequence[int] | None = None,
        depths_up: Sequence[int] | None = None,
        residual: bool = False,
        bias: bool = True,
        deep_supervision: bool = True,
        checkpointing: bool = False,
    ):
        levels = len(strides) + 1
        features = features or [min(32 * 2**level, 320) for level in range(levels)]
        kernel_sizes = kernel_sizes or [[3, 3, 3]] * levels
        depths_down = depths_down or ([1, 3, 4, *[6] * levels][:levels] if residual else [2] * levels)
        depths_up = depths_up or [1 if residual else 2] * (levels - 1)
        arguments = {"name": "nnunet", **given(NNUNet, locals())}
        check_levels("nnunet", features, depths_down, depths_up, strides, kernel_sizes)
        unet = package("dynamic_network_architectures.architectures.unet")
        build = unet.ResidualEncoderUNet if residual else unet.PlainConvUNet
        net = build(
            in_channels, levels, list(features), nn.Conv3d, kernel_sizes, [[1, 1, 1], *map(list, strides)], list(depths_down),
            out_channels, list(depths_up)[::-1], conv_bias=bias, norm_op=nn.InstanceNorm3d,
            norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
            deep_supervision=True,
        )  # fmt: skip
        net.apply(net.initialize)
        drop_duplicates(net)
        if not deep_supervision:
            only_finest(net.decoder.seg_layers)
        stem = r"encoder\.stem\.convs\.0" if residual else r"encoder\.stages\.0\.0\.convs\.0"
        finest = len(strides) - 1
        parts = Parts(
            r"net\.encoder\.",
            r"net\.decoder\.seg_layers\.",
            r"net\.decoder\.seg_layers\.",
            rf"net\.decoder\.seg_layers\.(?!{finest}\.)\d+\.",
            rf"net\.{stem}\.all_modules\.0\.weight$",
        )
        super().__init__(arguments, net, strides, parts)
        recompute([*net.encoder.stages, *net.decoder.stages], checkpointing)


class SwinUNETR(Adapted):
    """MONAI's SwinUNETR; every side of the patch a multiple of 32. "Base" in the paper's tables is `feature_size` 48.

    It has no deep supervision. `window_size`, `depths` and `num_heads` as MONAI has them.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 31,
        img_size: Sequence[int] = (96, 96, 96),
        feature_size: int = 48,
        dropout: float = 0.0,
        use_v2: bool = False,
        deep_supervision: bool = False,
        checkpointing: bool = False,
    ):
        from monai.networks.nets import SwinUNETR as Swin

        arguments = {"name": "swinunetr", **given(SwinUNETR, locals()), "deep_supervision": False}
        device = torch.get_default_device()
        with torch.device("cpu"):  # it computes its drop path rates, which the meta device cannot
            net = Swin(
                in_channels, out_channels, feature_size=feature_size, drop_rate=dropout, use_checkpoint=checkpointing,
                use_v2=use_v2,
            )  # fmt: skip
        net.to(device)
        inputs = r"net\.(swinViT\.patch_embed\.proj|encoder1\.layer\.conv[13]\.conv)\.weight$"
        parts = Parts(r"net\.swinViT\.", r"net\.out\.", r"net\.out\.", r"(?!)", inputs)
        super().__init__(arguments, net, LEVEL_STRIDES, parts)


class STUNet(Adapted):
    """STU-Net; its sizes S, B, L and H differ in width and depth.

    Args:
        img_size: the training patch (S,P,L); only checked.
        size: "S" (14.6 million parameters), "B" (58), "L" (440) or "H" (1457); not looked at where `features` are given.
        features, depths_down: channels and residual blocks of each level, finest first.
        strides: per step down, one factor per axis.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 31,
        img_size: Sequence[int] = (128, 128, 128),
        size: str = "B",
        features: Sequence[int] | None = None,
        depths_down: Sequence[int] | None = None,
        strides: Sequence[Sequence[int]] = STUNET_STRIDES,
        deep_supervision: bool = True,
        checkpointing: bool = False,
    ):
        if size not in STUNET_SIZES:
            raise NetworkError(f"stunet: size is {size!r}; expected one of {list(STUNET_SIZES)}")
        width, depth = STUNET_SIZES[size]
        levels = len(strides) + 1
        depths_down = depths_down or [depth if features is None else 1] * levels
        features = features or [min(width * 2**level, 16 * width) for level in range(levels)]
        arguments = {"name": "stunet", **given(STUNet, locals())}
        net = package("medim.models.stu_net").STUNet(
            in_channels, out_channels, list(depths_down), list(features), [list(stride) for stride in strides],
            [[3, 3, 3]] * levels, enable_deep_supervision=True,
        )  # fmt: skip
        net.final_nonlin = nn.Identity()  # lambdas do not pickle
        net.upscale_logits_ops = [nn.Identity()] * (levels - 2)
        finest = len(strides) - 1
        parts = Parts(
            r"net\.conv_blocks_context\.",
            r"net\.seg_outputs\.",
            r"net\.seg_outputs\.",
            rf"net\.seg_outputs\.(?!{finest}\.)\d+\.",
            r"net\.conv_blocks_context\.0\.0\.conv[13]\.weight$",
        )
        if not deep_supervision:
            only_finest(net.seg_outputs)
        super().__init__(arguments, net, strides, parts)
        recompute([*net.conv_blocks_context, *net.conv_blocks_localization], checkpointing)


class Ensemble(DescribedNetwork):
    """The mean of the logits of several networks that are alike but for their weights: folds of a cross-validation.

    Args:
        count: how many.
        network: the arguments of each, name included.
    """

    def __init__(self, in_channels: int, out_channels: int, count: int, network: Mapping[str, Any]):
        members = [create_network(**{**network, "deep_supervision": False}) for _ in range(count)]
        super().__init__({"name": "ensemble", **given(Ensemble, locals())}, [members[0].total_stride], members[0].parts)
        self.count = count
        self.members = nn.ModuleList(getattr(member.eval(), "net", member) for member in members)
        self.register_state_dict_post_hook(_without_descriptions)

    def versions(self, x: Tensor) -> Iterator[Tensor]:
        """The logits of one member after the other, so that only one is in memory."""
        if not torch.jit.is_tracing():
            self.check_size(x.shape[2:], x.shape)
        return (member(x) for member in self.members)

    def forward(self, x: Tensor) -> Tensor:
        return sum(self.versions(x)) / self.count


def _without_descriptions(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Members that are described networks say nothing of themselves: the ensemble's description says it all."""
    for key in [key for key in state if key.startswith(f"{prefix}members.") and key.endswith("_extra_state")]:
        del state[key]


NETWORKS: dict[str, type[DescribedNetwork]] = {
    "tsfm": TSFM,
    "nnunet": NNUNet,
    "swinunetr": SwinUNETR,
    "stunet": STUNet,
    "sam_med3d": SAMMed3D,
    "monai": MONAINet,
    "ensemble": Ensemble,
}
"""Every network by its name."""


def create_network(name: str | None = None, plan: Any = None, **arguments: Any) -> DescribedNetwork:
    """The network `name` with its `arguments`; those that only other networks know are left out, so overlays combine.

    `plan`: a `planner.Plan`, which decides what `name` (else TSFM) and `arguments` do not.

    Raises:
        NetworkError: an unknown network, an argument that no network knows, a package that is not installed.
    """
    planned = plan.create_arguments() if plan is not None else {}
    name = name or planned.get("name", "tsfm")
    if name != planned.get("name", name):
        logger.warning(
            "network: %s, as network_def says; the plan and its estimate are those of %s", name, plan.network
        )
    if planned.pop("name", name) == name:
        both = arguments.keys() & planned.keys()
        if changed := [key for key in both if not np.array_equal(arguments[key], planned[key])]:
            logger.warning(
                "network: %s are as the configs give them (network_def), not as the plan for %s has them",
                ", ".join(sorted(changed)), plan.network,
            )  # fmt: skip
        arguments = {**planned, **arguments}
    if name not in NETWORKS:
        raise NetworkError(f"network {name!r} is unknown; expected one of {', '.join(NETWORKS)}")
    known = {key: inspect.signature(network).parameters for key, network in NETWORKS.items()}
    unknown = [key for key in arguments if not any(key in parameters for parameters in known.values())]
    if unknown:
        raise NetworkError(f"no network has the argument(s) {unknown}; {name} has {list(known[name])}")
    return NETWORKS[name](**{key: value for key, value in arguments.items() if key in known[name]})
