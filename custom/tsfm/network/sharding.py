"""Fully sharded training (torch's FSDP2, under torchrun) for networks whose state no single device holds.

Weights, gradients and optimizer state are split over the processes; what is saved is the whole, the same files that one
process writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.networks.blocks import TransformerBlock
from torch import nn
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
        if isinstance(module, ResBlock | TransformerBlock):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    return fully_shard(network, mesh=mesh, mp_policy=policy)


def is_sharded(network: nn.Module) -> bool:
    """Whether `shard` was applied."""
    return isinstance(network, FSDPModule)


def gather_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """(network state, optimizer state), whole and on the CPU; all processes have to call it, the first gets the result."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(network, options=options), get_optimizer_state_dict(network, optimizer, options=options)


def scatter_state(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    model_state: Mapping[str, Any],
    optimizer_state: Mapping[str, Any],
) -> None:
    """Inverse of `gather_state`: every process passes the whole and keeps its part."""
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(network, dict(model_state), options=options)
    set_optimizer_state_dict(network, optimizer, dict(optimizer_state), options=options)
