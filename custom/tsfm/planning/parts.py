"""Encoder, decoder and heads of a network: which of them train, and how fast."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ..names import listed
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
    parts = _parts(network)
    if what != "none" and not {"encoder", "heads"} <= {part for part, *_ in parts}:
        raise ValueError(f"freeze={what!r} needs a network with the parts of TSFM; {type(network).__name__} lacks them")
    fresh, drawn = getattr(unwrap(network), "fresh", ()), []
    for part, name, parameter in parts:
        is_frozen = part != "heads" if what == "all_but_heads" else part == what
        parameter.requires_grad_(not is_frozen)
        if is_frozen and name in fresh:
            drawn.append(name)
    if drawn:
        raise ValueError(
            f"freeze is {what!r}, but nothing pretrained fills {listed(drawn, 1)}: they would stay "
            "as they were drawn at random. Give weights that have them (--pretrained), or leave --freeze out"
        )
    return network


def part_of(name: str, parts: Parts = PARTS) -> str:
    """``"encoder"``, ``"decoder"`` or ``"heads"``: the part of the network that a parameter's `name` belongs to."""
    return "encoder" if re.match(parts.encoder, name) else "heads" if re.match(parts.head, name) else "decoder"


def _parts(network: nn.Module) -> list[tuple[str, str, nn.Parameter]]:
    """Part, name and parameter, of a network wrapped or not; by TSFM's parts where it declares none."""
    own = unwrap(network)
    known = getattr(own, "parts", PARTS)
    return [(part_of(name, known), name, parameter) for name, parameter in own.named_parameters()]


def parameter_groups(
    network: nn.Module, head_lr: float | None = None, encoder_lr: float | None = None
) -> list[dict[str, Any]]:
    """Groups for the optimizer, each with its own learning rate; frozen parameters and empty groups are left out.

    The decoder has the optimizer's ``lr``, and so have heads and encoder unless `head_lr` and `encoder_lr` are given.

    Raises:
        ValueError: a negative rate, or nothing left to train.
    """
    rates = {"encoder": encoder_lr, "decoder": None, "heads": head_lr}
    if any(rate is not None and rate < 0 for rate in rates.values()):
        raise ValueError(f"learning rates are {rates}; expected none below 0")
    groups: dict[str, list[nn.Parameter]] = {part: [] for part in rates}
    for part, _, parameter in _parts(network):
        if parameter.requires_grad:
            groups[part].append(parameter)
    if not any(groups.values()):
        raise ValueError(
            f"{type(network).__name__} has no parameter that requires a gradient: nothing would be trained"
        )
    own = {part: {} if rate is None else {"lr": rate} for part, rate in rates.items()}
    return [{"params": group, **own[part], "name": part} for part, group in groups.items() if group]
