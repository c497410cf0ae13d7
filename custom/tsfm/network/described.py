"""What the package asks of any network: to say what it is, which sizes fit, which of its tensors do what, and to export."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

AXES = "SPL"


class FixedPatch(nn.Module):
    """A traced network, which knows one size of window, with that size: TorchScript that refuses any other.

    (B,C,S,P,L) -> logits (B,T,S,P,L), B free; `patch_size` can be read from the file, too.

    Raises:
        ValueError: (torch.jit.Error in a file that was read) an input of another size.
    """

    def __init__(self, network: nn.Module, patch_size: Sequence[int]) -> None:
        super().__init__()
        self.patch_size = [int(side) for side in patch_size]
        parameter = next(network.parameters())
        example = torch.zeros(2, network.in_channels, *self.patch_size, dtype=parameter.dtype, device=parameter.device)
        with torch.no_grad():
            self.network = torch.jit.trace(network, example, check_trace=False)

    def forward(self, x: Tensor) -> Tensor:
        if list(x.shape[2:]) != self.patch_size:
            raise ValueError(
                f"this network was exported for windows of {self.patch_size} voxels (S, P, L) and takes no other; the "
                f"input has shape {x.shape}. Slide a window of that size, or export again with another patch_size"
            )
        return self.network(x)


class Parts(NamedTuple):
    """A network's tensors by what they do: patterns (`re`) that match the beginning of their names.

    head: all of the heads. heads: of these, weights and biases with one row per target. optional: what may be missing in a
    checkpoint as a whole: all that shares what the pattern matches. inputs: kernels with one slice (axis 1) per image channel.
    """

    encoder: str
    head: str
    heads: str
    optional: str
    inputs: str


class DescribedNetwork(nn.Module):
    """(B,in_channels,S,P,L) -> logits (B,out_channels,S,P,L), one per target; a list, finest first, in deep supervision.

    Args:
        arguments: what rebuilds the network (plain JSON), with its ``in_channels`` and ``out_channels``; part of
            `description`, which travels with the weights.
        strides: per step down, one factor per axis.
        parts: see `Parts`.
    """

    def __init__(self, arguments: Mapping[str, Any], strides: Sequence[Sequence[int]], parts: Parts) -> None:
        super().__init__()
        self._arguments = json.loads(json.dumps(arguments))
        self.description: dict[str, Any] = {"network": self._arguments}
        self.in_channels = arguments["in_channels"]
        self.total_stride = tuple(prod(axis) for axis in zip(*strides, strict=True))
        self.parts = parts

    def check_size(self, size: Sequence[int], shape: Sequence[int] | None = None) -> None:
        """Raise a ValueError when the strides do not divide `size` (S,P,L); with an input's `shape`, check that too."""
        name = type(self).__name__
        if shape is not None and (len(shape) != 5 or shape[1] != self.in_channels):
            raise ValueError(
                f"{name}: the input has shape {tuple(shape)}; expected (batch, {self.in_channels}, S, P, L): "
                f"set in_channels to the number of image channels"
            )
        for axis, voxels, stride in zip(AXES, size, self.total_stride, strict=True):
            if voxels % stride or voxels < stride:
                below = voxels // stride * stride
                fits = f"{below} or {below + stride}" if below else f"{stride}"
                raise ValueError(
                    f"{name}: axis {AXES.index(axis)} ({axis}) has {voxels} voxels, which {stride} (the product of its "
                    f"strides) does not divide; {fits} would fit"
                )
        if all(voxels == stride for voxels, stride in zip(size, self.total_stride, strict=True)):
            raise ValueError(
                f"{name}: {tuple(size)} leaves a single voxel at the lowest level, of which instance normalization leaves "
                f"nothing; double at least one axis, for example {(size[0], size[1], 2 * size[2])}, or use fewer strides"
            )

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script, and so MONAI's ckpt_export, makes TorchScript of: a trace for the training's window."""
        arguments = self._arguments.get("network", self._arguments)  # an ensemble's own
        return FixedPatch(self, self.description.get("patch_size") or arguments["img_size"])

    def get_extra_state(self) -> Tensor:
        """`description` as a uint8 tensor of JSON, so that it travels with the weights in any tensor file."""
        text = json.dumps({**self.description, "network": self._arguments})
        return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the description of loaded weights; the constructor's own arguments stay."""
        text = bytes(state.cpu().tolist()).decode()
        self.description = {**json.loads(text), "network": self._arguments}


def check_described(network: nn.Module) -> None:
    """Raise a TypeError, which says what to do, for a module that cannot say to its weights what it is."""
    if not isinstance(network, DescribedNetwork):
        raise TypeError(
            f"network_def makes a {type(network).__name__}, and its weights could not say what network they are of. Name a "
            'network of MONAI: "network_def#name": "monai", "network_def#net": "SegResNet", "network_def#arguments": {...} '
            "(docs/changes.md); one of your own becomes an entry of NETWORKS in tsfm/network/networks.py"
        )


def check_levels(
    network: str,
    features: Sequence,
    depths_down: Sequence,
    depths_up: Sequence,
    strides: Sequence,
    kernel_sizes: Sequence,
) -> None:
    """Raise a ValueError that names the `network` and the argument whose length does not fit the number of levels."""
    levels = len(features)
    expected = {
        "depths_down": (depths_down, levels),
        "depths_up": (depths_up, levels - 1),
        "strides": (strides, levels - 1),
        "kernel_sizes": (kernel_sizes, levels),
    }
    for name, (value, length) in expected.items():
        if len(value) != length:
            raise ValueError(
                f"{network}: {name} has {len(value)} entries, expected {length} for the {levels} levels of features"
            )
    if levels < 2 or any(len(stride) != 3 or min(stride) < 1 for stride in strides):
        raise ValueError(
            f"{network}: strides {strides} must hold three positive factors (S, P, L) for each step down, at least one"
        )
    if any(len(kernel) != 3 or min(kernel) < 1 or any(side % 2 == 0 for side in kernel) for kernel in kernel_sizes):
        raise ValueError(
            f"{network}: kernel_sizes {list(kernel_sizes)} must hold three odd sizes (S, P, L) for each level"
        )
