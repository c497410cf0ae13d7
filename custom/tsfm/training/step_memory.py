"""What one training step holds on the device, known before it runs, and whether to recompute activations.

The step is walked through on the meta device, which computes shapes only: in a second, without memory, for a network of
any make. What weights, gradients, optimizer state and their copies add is arithmetic, and depends on how the processes
share them. The workspace of the convolutions and the fragments of the allocator are not known beforehand: MARGIN is for them.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..network.cpu import computes_in
from ..network.networks import create_network
from ..network.sharding import UNITS, is_sharded
from .run_state import unwrap

logger = logging.getLogger(__name__)

MARGIN = 0.1
"""Share of the device's memory that is left to convolution workspaces, fragments and other programs."""


SWITCHES = ("checkpointing", "use_checkpoint")
"""What a module is told to recompute its activations by: these networks' own, and MONAI's (SwinUNETR)."""


class Moment(NamedTuple):
    """A moment of the walk: bytes of activations, weights whose gradient is there, and whether it is the forward pass."""

    activations: int
    done: int
    forward: bool


class Walk(NamedTuple):
    """The moments of one step, the number of weights, of those that are trained, and of those of the largest unit."""

    moments: tuple[Moment, ...]
    weights: int
    trained: int
    largest: int


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.known = 0, weakref.WeakKeyDictionary()
        self.after_each = lambda: None

    def _forget(self, size: int) -> None:
        self.bytes -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage()) not in self.known:
                self.known[storage] = size = storage.nbytes()
                self.bytes += size
                weakref.finalize(storage, self._forget, size)
        self.after_each()
        return result


def walk(
    network: nn.Module, in_channels: int, patch_size: Sequence[int], batch_size: int, checkpointing: bool, half: bool
) -> Walk:
    """Walk through forward and backward pass of `network` (its weights are not touched), in 16 bits if `half`."""
    kind = torch.bfloat16 if half else torch.float32
    network = _shell(network, kind)
    _let_recompute(network, checkpointing)
    moments, state, live = [], {"done": 0, "forward": True}, _Live()

    def gathered(weight: Tensor) -> None:
        state["done"] += weight.numel()
        weight.grad = None  # counted by `done`

    for weight in network.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(gathered)
    live.after_each = lambda: moments.append(Moment(live.bytes, state["done"], state["forward"]))
    with live:
        outputs = network(torch.empty(batch_size, in_channels, *patch_size, dtype=kind, device="meta"))
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        state["forward"] = False
        torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
        live.after_each()  # the last gradient comes after the last operation
    units = [sum(p.numel() for p in m.parameters()) for m in network.modules() if isinstance(m, UNITS)]
    sizes = [(p.numel(), p.requires_grad) for p in network.parameters()]
    weights, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
    return Walk(tuple(moments), weights, trained, max(units, default=weights))


def _let_recompute(network: nn.Module, on: bool) -> None:
    for module in network.modules():
        for switch in SWITCHES:
            if hasattr(module, switch):
                setattr(module, switch, on)


def _shell(network: nn.Module, kind: torch.dtype) -> nn.Module:
    """A copy of `network` in training mode whose weights are on the meta device; a sharded one is built anew."""
    if is_sharded(network):
        with torch.device("meta"):
            return create_network(**network.description["network"]).to(kind).train()
    empty = partial(torch.empty, device="meta")
    shapes = {id(p): nn.Parameter(empty(p.shape, dtype=kind), p.requires_grad) for p in network.parameters()}
    shapes |= {id(b): empty(b.shape, dtype=b.dtype) for b in network.buffers()}
    return copy.deepcopy(network, shapes).train()  # which takes these in place of the weights


def peak_bytes(
    steps: Walk,
    checkpointing: bool,
    amp: bool = True,
    weight_bytes: int = 4,
    state_bytes: int = 4,
    processes: int = 1,
    sharded: bool = False,
    fused: bool = True,
) -> int:
    """The most bytes that one process holds during a step.

    Args:
        steps: of :func:`walk`.
        amp: autocast to 16 bits: a copy of float32 weights lives from the forward pass to its use in the backward pass
            (in the forward pass only with `checkpointing`, which casts again).
        weight_bytes: per weight and gradient. state_bytes: optimizer state per weight (momentum: as the weights).
        processes, sharded: DDP holds all gradients all the time; FSDP a share of everything, and two units whole.
        fused: an optimizer that is not fused copies all gradients.
    """
    share = processes if sharded else 1
    copied = 2 if amp and weight_bytes == 4 else 0
    held = (steps.weights * weight_bytes + steps.trained * state_bytes) // share
    all_gradients = steps.trained * weight_bytes // share
    unit = steps.largest * (2 * (copied or weight_bytes) + weight_bytes) if sharded else 0
    peak = held + all_gradients * (1 if fused else 2)
    for activations, done, forward in steps.moments:
        gradients = all_gradients if processes > 1 and not sharded else done * weight_bytes // share
        waiting = steps.weights - done if forward or not checkpointing else 0
        copies = 0 if sharded else copied * waiting
        peak = max(peak, held + gradients + copies + unit + activations)
    return peak


def device_bytes(device: torch.device) -> int:
    """All memory of a GPU; of the machine for other devices."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    return psutil.virtual_memory().total


def fit_memory(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    patch_size: Sequence[int],
    batch_size: int,
    checkpointing: bool | str = "auto",
    amp: bool = True,
    amp_dtype: str = "bfloat16",
    device: torch.device | str = "cpu",
    processes: int = 1,
    compile: bool = False,
) -> dict[str, Any]:
    """Decide whether `network` recomputes its activations, and set it so; refuse a step that cannot fit.

    Args:
        checkpointing: True or False as it is, or "auto": recompute where a step would not fit without.
        compile: hand the network to torch.compile, once that is decided.

    Returns:
        what was decided: ``checkpointing``, ``gb`` of the step and ``device_gb``.

    Raises:
        ValueError: a step whose weights, gradients, optimizer state and activations exceed the device's memory.
    """
    if checkpointing not in (True, False, "auto"):
        raise ValueError(f"checkpointing is {checkpointing!r}; expected true, false or 'auto'")
    inner, device = unwrap(network), torch.device(device)
    kind = next(inner.parameters()).dtype
    half = kind != torch.float32 or (amp and computes_in(device.type, getattr(torch, amp_dtype)))
    weight_bytes = kind.itemsize
    states = 2 if isinstance(optimizer, torch.optim.Adam) else int(bool(optimizer.defaults.get("momentum")))
    options = {
        "amp": half, "weight_bytes": weight_bytes, "state_bytes": states * weight_bytes, "processes": processes,
        "sharded": is_sharded(inner), "fused": bool(optimizer.defaults.get("fused")),
    }  # fmt: skip
    room, in_channels = device_bytes(device), getattr(inner, "in_channels", 1)
    can = any(hasattr(module, switch) for module in inner.modules() for switch in SWITCHES)
    for choice in (False, True) if checkpointing == "auto" and can else (checkpointing is True,):
        needed = peak_bytes(walk(inner, in_channels, patch_size, batch_size, choice, half), choice, **options)
        if needed <= (1 - MARGIN) * room:
            break
    if needed > room:
        raise ValueError(_refusal(inner, needed, room, device, patch_size, batch_size, choice, processes))
    _let_recompute(inner, choice)
    if compile:
        inner.compile()
    found = {"checkpointing": choice, "gb": round(needed / 1e9, 2), "device_gb": round(room / 1e9, 1)}
    logger.info(
        "a step needs about %s of %s (%s); %s", _memory(needed), _memory(room), device,
        "activations are recomputed" if choice else "activations are kept",
    )  # fmt: skip
    return found


def _memory(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _refusal(inner, needed, room, device, patch_size, batch_size, choice, processes) -> str:
    weights = sum(p.numel() for p in inner.parameters())
    advice = ["a smaller --batch_size or --patch_size", "--param_dtype bfloat16", "a smaller network"]
    advice = [*([] if choice else ["--checkpointing auto"]), *advice]
    if not is_sharded(inner):
        advice.append("several GPUs with configs/fsdp_train.json")
    return (
        f"one training step needs about {_memory(needed)}, {device} has {_memory(room)}: {weights / 1e6:.3g} million "
        f"weights, batch {batch_size} of {'x'.join(map(str, patch_size))} voxels, activations "
        f"{'recomputed' if choice else 'kept'}, {processes} process(es). Try {', '.join(advice)}"
    )
