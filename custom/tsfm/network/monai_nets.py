"""Segmentation networks of MONAI by the name of their class, with the arguments that MONAI's own documentation lists."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .adapted import Adapted, NetworkError, given
from .described import Parts

NETS = (
    "AttentionUnet", "BasicUNet", "DynUNet", "HighResNet", "MedNeXt", "SegResNet", "SegResNetDS", "UNet", "VNet",
)  # fmt: skip
"""Classes of `monai.networks.nets` that a weight file may name: from an image to logits on its grid, at any size."""

LARGEST_STRIDE = 64

ENCODER = r"net\.(convInit|conv_0|input_block|in_tr|stem|enc|down|bottleneck)"
"""Where these classes keep the way down; UNet and AttentionUnet, which are nested, and HighResNet have no such part."""

NONE = r"(?!)"  # a pattern that matches nothing


class MONAINet(Adapted):
    """A network of MONAI.

    Args:
        img_size: the training patch (S,P,L), which the network's strides have to divide.
        net: one of `NETS`.
        arguments: of its constructor (plain JSON); ``spatial_dims``, ``in_channels`` and ``out_channels`` are filled in.
        strides: what divides the sizes that it takes; None: found out.

    Raises:
        NetworkError: another class, arguments that it does not take, a patch that it does not take (says which would fit).
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 31,
        img_size: Sequence[int] = (64, 64, 64),
        net: str = "SegResNet",
        arguments: Mapping[str, Any] | None = None,
        strides: Sequence[Sequence[int]] | None = None,
    ):
        if net not in NETS:
            raise NetworkError(f"monai: net is {net!r}; expected one of {', '.join(NETS)}")
        arguments = dict(arguments or {})
        described = {"name": "monai", **given(MONAINet, locals()), "deep_supervision": False}
        build = _builder(net, arguments)
        described["strides"] = strides = strides or [
            _stride(build(in_channels, out_channels, "meta"), in_channels, net)
        ]
        usual = _shapes(build(in_channels, out_channels, "meta"))
        head, rows = _changed(usual, _shapes(build(in_channels, out_channels + 1, "meta")), 0)
        _, inputs = _changed(usual, _shapes(build(in_channels + 1, out_channels, "meta")), 1)
        parts = Parts(ENCODER, _pattern(head), _pattern(rows) if head == rows else NONE, NONE, _pattern(inputs))
        super().__init__(described, build(in_channels, out_channels), strides, parts)
        if problem := _problem(build(in_channels, out_channels, "meta"), in_channels, img_size):
            raise NetworkError(f"monai: {net} does not take a patch of {list(img_size)} (--patch_size): {problem}")


def _builder(net: str, arguments: Mapping[str, Any]) -> Callable[..., nn.Module]:
    """A function of channels in and out, and a device, that builds the network."""
    from monai.networks import nets

    make = getattr(nets, net)
    known = inspect.signature(make).parameters

    def build(in_channels: int, out_channels: int, device: str | torch.device | None = None) -> nn.Module:
        fixed = {"spatial_dims": 3, "in_channels": in_channels, "out_channels": out_channels}
        try:
            with torch.device(device or torch.get_default_device()):
                return make(**{**arguments, **{key: value for key, value in fixed.items() if key in known}})
        except (TypeError, ValueError, KeyError, AssertionError, NotImplementedError) as error:
            raise NetworkError(f"monai: {net} does not take these arguments: {error}") from None

    return build


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in network.named_parameters()}


def _changed(
    usual: Mapping[str, torch.Size], other: Mapping[str, torch.Size], axis: int
) -> tuple[list[str], list[str]]:
    """Names of tensors of another shape, and those of them in which this axis alone is another."""
    names = [name for name, shape in usual.items() if shape != other[name]]
    cut = lambda shape: (*shape[:axis], *shape[axis + 1 :])  # noqa: E731
    return names, [name for name in names if cut(usual[name]) == cut(other[name])]


def _pattern(names: Sequence[str]) -> str:
    return rf"net\.({'|'.join(map(re.escape, names))})$" if names else NONE


def _stride(network: nn.Module, in_channels: int, net: str) -> list[int]:
    """Per axis, the smallest power of two whose multiples the network takes as sizes; nothing is computed."""
    whole = [2 * LARGEST_STRIDE] * 3
    if problem := _problem(network, in_channels, whole):
        raise NetworkError(f"monai: {net} gives no logits on the grid of its image: {problem}")

    def takes(axis: int, more: int) -> bool:
        size = list(whole)
        size[axis] += more
        return not _problem(network, in_channels, size)

    powers = [2**step for step in range(LARGEST_STRIDE.bit_length())]
    return [next((power for power in powers if takes(axis, power)), 2 * LARGEST_STRIDE) for axis in range(3)]


def _problem(network: nn.Module, in_channels: int, size: Sequence[int]) -> str:
    """Why the network gives no logits on the grid of an image of this size; empty where it does."""
    try:
        with torch.no_grad():
            output = network.train()(torch.empty(1, in_channels, *size, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        return str(error)
    finest = output[0] if isinstance(output, list | tuple) else output
    return "" if tuple(finest.shape[2:]) == tuple(size) else f"of {tuple(size)} it makes {tuple(finest.shape)}"
