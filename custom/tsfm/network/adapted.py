"""Networks of other packages behind the interface of `DescribedNetwork`: what the adapters share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .described import DescribedNetwork, Parts
from .tsfm_net import run

INSTALL = {
    "dynamic_network_architectures": "pip install --no-deps dynamic-network-architectures==0.4.4",
    "medim": "pip install --no-deps medim==0.1.2 && pip install appdirs requests",
}

REQUIRED = {
    "nnunet": ("dynamic-network-architectures", "0.4.4"),
    **dict.fromkeys(("stunet", "sam_med3d"), ("medim", "0.1.2")),
}
"""Packages that a network's bundle needs beside the others, for its metadata."""


class NetworkError(ValueError):
    """An unknown network or argument, or a package that is not installed."""


class Adapted(DescribedNetwork):
    """A network of another package as `net`; in training with `deep_supervision` its outputs as a list, finest first."""

    def __init__(self, arguments: Mapping[str, Any], net: nn.Module, strides: Sequence, parts: Parts) -> None:
        super().__init__(arguments, strides, parts)
        self.net = net
        self.deep_supervision = bool(arguments["deep_supervision"])
        self.check_size(arguments["img_size"])
        self.train()

    def train(self, mode: bool = True) -> Adapted:
        """As any module's; deep supervision is for training."""
        super().train(mode)
        if hasattr(self.net, "decoder"):
            self.net.decoder.deep_supervision = mode and self.deep_supervision
        return self

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if not torch.jit.is_tracing():
            self.check_size(x.shape[2:], x.shape)
        outputs = self.net(x)
        return list(outputs) if isinstance(outputs, list | tuple) else outputs


def package(module: str) -> Any:
    """Import a module of an optional package.

    Raises:
        NetworkError: it is not installed; says how to.
    """
    try:
        return import_module(module)
    except ImportError as error:
        root = module.split(".")[0]
        raise NetworkError(f"this network needs the package {root} ({error}): {INSTALL[root]}") from None


def given(network: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments out of its `locals()`."""
    return {key: values[key] for key in inspect.signature(network).parameters}


def drop_duplicates(net: nn.Module) -> None:
    """Take out, in place, what dynamic-network-architectures registers twice: tensors shared by several names.

    Every convolution block is also in its `all_modules`, which computes, and the encoder is also in the decoder.
    """
    del net.decoder.encoder
    for block in [module for module in net.modules() if hasattr(module, "all_modules")]:
        for name in [name for name in block._modules if name != "all_modules"]:
            delattr(block, name)


def only_finest(heads: nn.ModuleList) -> None:
    """Without deep supervision the heads of the lower levels (the first ones) would be parameters that nothing trains."""
    for level in range(len(heads) - 1):
        heads[level] = nn.Identity()


def recompute(modules: Sequence[nn.Module], checkpointing: bool) -> None:
    """Let these modules recompute their activations in the backward pass where they have `checkpointing` on (it may be changed).

    Names and numbers do not change.
    """
    for module in modules:
        module.checkpointing = checkpointing
        module.forward = partial(_recomputed, module)


def _recomputed(module: nn.Module, x: Tensor) -> Tensor:
    return run(partial(type(module).forward, module), x, module.checkpointing and module.training)
