"""Fully sharded training (torch's FSDP2, under torchrun) for networks whose state no single device holds.

Weights, gradients and optimizer state are split over the processes. The state can be gathered whole, for the files that one
process writes, or taken in the shares that the processes have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.networks.blocks import TransformerBlock
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from .cpu import computes_in
from .tsfm_net import ResBlock

UNITS = (ResBlock, TransformerBlock)
"""What is gathered whole, one at a time; networks without such modules are one unit."""


def shard(network: nn.Module, gather_dtype: str | None = None) -> nn.Module:
    """Split `network` over all processes: every ResBlock and Transformer layer is a unit, the rest is one more.

    With `gather_dtype` ("bfloat16", of autocast), where the device computes in it, units are gathered in this type: half
    the traffic and memory. Gradients are added up in float32.
    """
    device = next(network.parameters()).device.type
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if gather_dtype and computes_in(device, getattr(torch, gather_dtype)):
        policy = MixedPrecisionPolicy(param_dtype=getattr(torch, gather_dtype), reduce_dtype=torch.float32)
    for module in network.modules():
        if isinstance(module, UNITS):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    return fully_shard(network, mesh=mesh, mp_policy=policy)


def is_sharded(network: nn.Module) -> bool:
    """Whether `shard` was applied."""
    return isinstance(network, FSDPModule)


def gather_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """(network state, optimizer state), whole; of a sharded network on the CPU, for which all processes have to call it and
    the first gets the result."""
    if not is_sharded(network):
        return network.state_dict(), optimizer.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(network, options=options), get_optimizer_state_dict(network, optimizer, options=options)


def gather_model(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the network's state, whole and on the CPU; all processes have to call it, the first gets the result."""
    state = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return state if is_sharded(network) else {name: value.clone() for name, value in state.items()}


def take_shares(network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, everything else) of network and optimizer, of each process its share; the names are those of any number."""
    state, tensors = get_optimizer_state_dict(network, optimizer), {}
    others: dict[str, Any] = {"groups": state["param_groups"], "model": {}, "optimizer": {}}
    for name, value in get_model_state_dict(network).items():
        if name.endswith("_extra_state"):  # of another size in another epoch
            others["model"][name] = value
        else:
            tensors[f"model.{name}"] = value
    for weight, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{weight}.{key}"] = value
            else:
                others["optimizer"].setdefault(weight, {})[key] = value
    return tensors, others


def set_shares(
    network: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], others: Mapping[str, Any]
) -> None:
    """Inverse of `take_shares`, in as many processes as there are now."""
    model, state = dict(others["model"]), {weight: dict(entries) for weight, entries in others["optimizer"].items()}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "model":
            model[rest] = value
        else:
            weight, _, key = rest.rpartition(".")
            state.setdefault(weight, {})[key] = value
    set_model_state_dict(network, model)
    set_optimizer_state_dict(network, optimizer, {"state": state, "param_groups": list(others["groups"])})


def scatter_state(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    model_state: Mapping[str, Any],
    optimizer_state: Mapping[str, Any],
) -> None:
    """Inverse of `gather_state`: every process passes the whole and, of a sharded network, keeps its part."""
    if not is_sharded(network):
        network.load_state_dict(model_state)
        optimizer.load_state_dict(optimizer_state)
        return
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(network, dict(model_state), options=options)
    set_optimizer_state_dict(network, optimizer, dict(optimizer_state), options=options)
