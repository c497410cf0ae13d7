"""Encoder, decoder and heads of a network: which of them train, and how fast."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ..network.described import Parts
from ..network.tsfm_net import PARTS
from ..training.run_state import unwrap

FREEZE = ("none", "encoder", "all_but_heads")


def freeze(network: nn.Module, what: str) -> nn.Module:
    """Switch training off for ``"encoder"`` (stem, encoder, down, Transformer), for ``"all_but_heads"``, or ``"none"``.

    Raises:
        ValueError: another word, a network without parts of these names, or parts that start anew (its ``fresh``).
    """
    if what not in FREEZE:
        raise ValueError(f"freeze is {what!r}; expected one of {', '.join(FREEZE)}")
    parts = [part_of(name, parts_of(network)) for name, _ in network.named_parameters()]
    if what != "none" and not {"encoder", "heads"} <= set(parts):
        raise ValueError(f"freeze={what!r} needs a network with the parts of TSFM; {type(network).__name__} lacks them")
    for part, parameter in zip(parts, network.parameters(), strict=True):
        frozen = part != "heads" if what == "all_but_heads" else part == what
        parameter.requires_grad_(not frozen)
    frozen = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
    if drawn := [name for name in frozen if name in getattr(network, "fresh", ())]:
        raise ValueError(
            f"freeze is {what!r}, but nothing pretrained fills {drawn[0]}{f' and {len(drawn) - 1} more' * (len(drawn) > 1)}: they "
            "would stay as they were drawn at random. Give weights that have them (--pretrained), or leave --freeze out"
        )
    return network


def part_of(name: str, parts: Parts = PARTS) -> str:
    """``"encoder"``, ``"decoder"`` or ``"heads"``: the part of the network that a parameter's `name` belongs to."""
    for wrapper in ("module.", "_orig_mod."):
        name = name.removeprefix(wrapper)
    return "encoder" if re.match(parts.encoder, name) else "heads" if re.match(parts.head, name) else "decoder"


def parts_of(network: nn.Module) -> Parts:
    """The parts of a network, wrapped or not; TSFM's where it declares none."""
    return getattr(unwrap(network), "parts", PARTS)


def parameter_groups(
    network: nn.Module,
    learning_rate: float | None = None,
    head_lr: float | None = None,
    encoder_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Groups for the optimizer, each with its own learning rate; frozen parameters and empty groups are left out.

    `head_lr` and `encoder_lr` are `learning_rate` unless given, and that (None) the optimizer's own ``lr``.

    Raises:
        ValueError: a negative rate, or nothing left to train.
    """
    rates = {"encoder": encoder_lr, "decoder": learning_rate, "heads": head_lr}
    rates = {part: learning_rate if rate is None else rate for part, rate in rates.items()}
    if min(rate for rate in (*rates.values(), 0) if rate is not None) < 0:
        raise ValueError(f"learning rates are {rates}; expected none below 0")
    groups: dict[str, list[nn.Parameter]] = {part: [] for part in rates}
    parts = parts_of(network)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups[part_of(name, parts)].append(parameter)
    if not any(groups.values()):
        raise ValueError(
            f"{type(network).__name__} has no parameter that requires a gradient: nothing would be trained"
        )
    own = {part: {} if rate is None else {"lr": rate} for part, rate in rates.items()}
    return [{"params": group, **own[part], "name": part} for part, group in groups.items() if group]
