"""Pretrained weights into a network of another shape (paper section 2.3), with a report of what went where.

| tensor                                   | where shapes differ                                                                 |
|------------------------------------------|-------------------------------------------------------------------------------------|
| stem, to other input channels            | the sum over the old channels, spread evenly over the new ones                      |
| stem, channels for clicks                | taken over from such channels, else their start: zero without clicks                |
| kernel of a Down's shortcut (its stride) | the same along each axis whose stride differs                                       |
| another kernel size                      | from 3 to 1 the sum along the axis, from 1 to 3 in the middle of zeros              |
| position embedding                       | interpolated to the new token grid                                                  |
| heads                                    | taken over per target that both sides know by *name*; the others keep their start   |
| heads of MONAI's UNet, VNet, MedNeXt     | taken over as a whole for the same targets, else they keep their start              |
| Transformer or coarser heads             | may be missing as a whole on either side: then they start anew, or stay unused      |
| anything else                            | an error; the network is as it was before                                           |

The rule for stem and shortcut keeps the sum of activations: an image repeated in all channels gives the same features
whether there is one channel or several (from one to n: weight / n repeated; from several to one: their sum).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from ..names import listed
from ..network.clicks import CLICK_CHANNELS
from ..network.described import DescribedNetwork, Parts
from ..network.description import differences
from ..network.monai_nets import NONE, MONAINet
from ..network.tsfm_net import interpolate_positions
from ..training.checkpoint import EXTRA_STATE
from ..training.weight_files import CheckpointError
from .public_weights import read_pretrained
from .transfer_report import SHOWN, Entry, TransferReport
from .turns import rank

CONVOLUTIONS = ("stem.", "encoder.", "down.", "decoder.")


def load_pretrained(
    network: DescribedNetwork,
    checkpoint: str | os.PathLike,
    report_path: str | os.PathLike | None = None,
    task: Mapping[str, Any] | None = None,
) -> TransferReport:
    """Put the weights of `checkpoint` into `network`, whose channels, targets, patch or strides may differ.

    Target names, spacing, normalization and modality of the checkpoint are compared with those of the new task; what
    differs is named in the report and stops nothing.

    Args:
        network: its ``description["targets"]`` names the outputs; not yet wrapped for several processes.
        checkpoint: any weight file or folder that `public_weights.read_pretrained` takes.
        report_path: JSON file for the report; a ``.txt`` goes beside it.
        task: description of the new task where the network does not carry one yet: ``targets`` (names in order),
            ``preparation``, ``modalities``. Its entries go before those of ``network.description``.

    Raises:
        CheckpointError: an unreadable or unsafe file, or weights that do not fit; the network is then unchanged.
    """
    path = os.fspath(checkpoint)
    read = read_pretrained(path)
    found, theirs, parts = read.tensors, read.description, network.parts
    if theirs.get("activation") in ("softmax", "probabilities"):  # a sigmoid head is one relative to the background's
        found = {key: value[1:] - value[:1] if re.match(parts.heads, key) else value for key, value in found.items()}
    ours = {**network.description, **(task or {})}
    own = {name: value for name, value in network.state_dict().items() if not name.endswith(EXTRA_STATE)}
    names, absent = [list(side.get("targets", ())) for side in (theirs, ours)], read.absent
    # a head of which no rows are the targets is taken over as a whole, or not at all
    if isinstance(network, MONAINet) and parts.heads == NONE and names[0] != names[1]:
        names[0], absent = [], parts.head
        found = {key: value for key, value in found.items() if not re.match(parts.head, key)}
    heads = _HeadMap(*names)
    clicks = tuple(bool(side.get("click_sigma")) for side in (theirs, ours))

    entries, values = [], {}
    missing = _lacking(found, own, parts, absent)
    problems = [f"{name} {tuple(own[name].shape)}: not in the checkpoint" for name in missing]
    for name, current in own.items():
        if name not in found:
            entries.append(Entry(name, tuple(current.shape), "new", 0, current.numel()))
        elif adapted := _adapt(parts, name, found[name], current, heads, clicks):
            entry, values[name] = adapted
            entries.append(entry)
        else:
            problems.append(f"{name}: checkpoint {tuple(found[name].shape)}, network {tuple(current.shape)}")
    unused = {name: tuple(value.shape) for name, value in found.items() if values.get(name) is None}
    superfluous = _lacking(own, found, parts, read.unused)
    problems += [f"{name} {unused[name]}: not in the network" for name in superfluous]
    if not any(entry.reused for entry in entries):
        problems.insert(0, "not a single tensor fits")
    if problems:
        raise CheckpointError(_misfit(path, problems, theirs, ours))

    with torch.no_grad():
        for name, value in values.items():
            if value is not None:
                own[name].copy_(value)  # entries of a state dict share the network's memory
    notes = [*_none_shared(parts, heads, entries), *read.notes, *_mismatches(theirs, ours)]
    parameters = sum(value.numel() for value in found.values())
    report = TransferReport(path, entries, unused, parameters, heads.summary(), notes)
    if rank() == 0:
        print(report, flush=True)
        if report_path is not None:
            report.save(report_path)
    return report


class _HeadMap:
    """Which output of the checkpoint becomes which output of the network, by the names of the targets."""

    def __init__(self, theirs: list[str], ours: list[str]) -> None:
        self.theirs, self.ours = theirs, ours
        shared = [name for name in ours if name in theirs]
        self.from_index = [theirs.index(name) for name in shared]
        self.to_index = [ours.index(name) for name in shared]

    def take(self, source: Tensor, current: Tensor) -> tuple[Tensor | None, int]:
        """`current` with the rows of the shared targets replaced (None where there are none), and the values replaced."""
        if not self.to_index:
            return None, 0
        value = current.detach().clone()
        value[self.to_index] = source[self.from_index].to(value)
        return value, len(self.to_index) * current[0].numel()

    def fits(self, source: Tensor, current: Tensor) -> bool:
        """Whether both tensors have one row per target of their side, where that side names its targets."""
        rows = (not self.theirs or len(source) == len(self.theirs)) and (
            not self.ours or len(current) == len(self.ours)
        )
        return rows and source.shape[1:] == current.shape[1:]

    def summary(self) -> dict[str, list[str]]:
        return {
            "taken over": [self.ours[i] for i in self.to_index],
            "new": [name for name in self.ours if name not in self.theirs],
            "unused": [name for name in self.theirs if name not in self.ours],
        }


def _adapt(
    parts: Parts,
    name: str,
    source: Tensor,
    current: Tensor,
    heads: _HeadMap,
    clicks: tuple[bool, bool] = (False, False),
) -> tuple[Entry, Tensor | None] | None:
    """The entry and the value for one tensor of the network (value None: keep the start); None where it cannot fit.

    `clicks`: whether the checkpoint and the network have channels for clicks.
    """
    shape, size = tuple(current.shape), current.numel()
    if source.ndim != current.ndim:
        return None
    if re.match(parts.inputs, name) and clicks != (False, False):
        return _adapt_prompted(parts, name, source, current, heads, clicks)
    if re.match(parts.heads, name) and not (heads.theirs == heads.ours and source.shape == current.shape):
        if not heads.fits(source, current):
            return None
        value, reused = heads.take(source, current)
        note = f"{len(heads.to_index)} of {len(current)} targets by name"
        return Entry(name, shape, "adapted" if reused else "new", reused, size - reused, note), value
    if source.shape == current.shape:
        return Entry(name, shape, "loaded", size, 0), source
    before = tuple(source.shape)
    if re.match(parts.inputs, name) and before[0] == shape[0] and before[1] != shape[1]:
        note = f"{before[1]} to {shape[1]} input channels"
        value = _spread(_fit_kernel(source, (*before[:2], *shape[2:])), shape)
    elif before[:2] != shape[:2]:
        return None
    elif name.startswith("down.") and ".shortcut." in name:
        note, value = f"stride {before[2:]} to {shape[2:]}", _spread(source, shape)
    elif name.startswith(CONVOLUTIONS) and name.endswith(".weight"):
        note, value = f"kernel {before[2:]} to {shape[2:]}", _fit_kernel(source, shape)
    elif name == "bottleneck.position_embedding":
        note, value = f"token grid {before[2:]} to {shape[2:]}", interpolate_positions(source, shape[2:])
    else:
        return None
    return Entry(name, shape, "adapted", size, 0, note), value


def _adapt_prompted(
    parts: Parts, name: str, source: Tensor, current: Tensor, heads: _HeadMap, clicks: tuple[bool, bool]
) -> tuple[Entry, Tensor] | None:
    """A stem of which one side or both have channels for clicks (the last ones): those of the images as without clicks."""
    theirs, ours = (
        weight.split([weight.shape[1] - CLICK_CHANNELS * has, CLICK_CHANNELS * has], 1)
        for weight, has in zip((source, current), clicks, strict=True)
    )
    adapted = _adapt(parts, name, theirs[0], ours[0], heads)
    if adapted is None or (clicks == (True, True) and theirs[1].shape != ours[1].shape):
        return None
    entry, value = adapted
    if all(clicks):
        own, fresh, how, what = theirs[1], 0, entry.how, "loaded"
    else:
        own, how, what = ours[1].detach(), "adapted", "new" if clicks[1] else "left out"
        fresh = own.numel()
    note = "; ".join(filter(None, [entry.note, f"click channels {what}"]))
    found = Entry(name, tuple(current.shape), how, current.numel() - fresh, fresh, note)
    return found, torch.cat([value.to(own), own], 1)


def _spread(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """`weight` in another shape with the same sum along every axis that differs: summed, then divided evenly."""
    weight = weight.double()
    for axis, (old, new) in enumerate(zip(weight.shape, shape, strict=True)):
        if old != new:
            weight = weight.sum(axis, keepdim=True) / new
    return weight.expand(*shape)


def _fit_kernel(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """A kernel of other odd sides: in the middle of zeros where it grows, what falls outside added to the middle else."""
    weight = weight.double()
    for axis in (2, 3, 4):
        old, new = weight.shape[axis], shape[axis]
        margin = abs(old - new) // 2
        if new > old:
            fitted = weight.new_zeros(*weight.shape[:axis], new, *weight.shape[axis + 1 :])
            fitted.narrow(axis, margin, old).copy_(weight)
            weight = fitted
        elif new < old:
            fitted = weight.narrow(axis, margin, new).clone()
            outside = weight.sum(axis, keepdim=True) - fitted.sum(axis, keepdim=True)
            fitted.narrow(axis, new // 2, 1).add_(outside)
            weight = fitted
    return weight


def _lacking(side: Mapping[str, Any], names: Iterable[str], parts: Parts, allowed: str) -> list[str]:
    """The `names` that a side lacks, but those `allowed` and groups that may be absent as a whole (Transformer, a head)."""

    def is_absent_as_a_whole(name: str) -> bool:
        group = re.match(parts.optional, name)
        return group is not None and not any(key.startswith(group[0]) for key in side)

    missing = [name for name in names if name not in side and not re.match(allowed, name)]
    return [name for name in missing if not is_absent_as_a_whole(name)]


def _misfit(path: str, problems: list[str], theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    differ = differences(theirs.get("network", {}), ours.get("network", {}))
    shown = listed([*differ, *problems], len(differ) + SHOWN, between="\n  ")
    return (
        f"{path} does not fit the network ({len(problems)} problems); the network was not changed:\n  {shown}\n"
        "Declare the network with the checkpoint's features, depths and skip (its channels, targets, patch and strides may "
        "differ)."
    )


def _none_shared(parts: Parts, heads: _HeadMap, entries: Sequence[Entry]) -> list[str]:
    """Where both sides name their targets and share none: what is kept all the same, in words."""
    if not heads.theirs or not heads.ours or heads.to_index:
        return []
    body = [entry for entry in entries if not re.match(parts.head, entry.name)]
    reused, whole = (sum(counts) for counts in zip(*((e.reused, e.reused + e.new) for e in body), strict=True))
    return [
        f"no target is shared: the body of the network (all but its heads) keeps what was pretrained, {reused / whole:.0%} of "
        f"its parameters; its heads, one output per target, start anew for {', '.join(heads.ours)}"
    ]


def _mismatches(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """In words, what the checkpoint was trained on and the new task does differently."""
    if "network" not in theirs:
        return ["the checkpoint carries no description: targets, spacing and normalization could not be compared"]
    found = []
    if ours.get("targets") and not theirs.get("targets"):
        found.append("the checkpoint does not name its targets: all heads start anew")
    if theirs.get("version") not in (None, __version__):
        found.append(f"the checkpoint was written by tsfm {theirs['version']}, this is {__version__}")
    was, now = theirs["network"], ours.get("network", {})
    meanings = {
        "in_channels": "input channels",
        "img_size": "patch (S, P, L)",
        "strides": "strides",
        "kernel_sizes": "kernels",
    }
    pairs = [(meaning, was[key], now[key]) for key, meaning in meanings.items() if key in was and key in now]
    before, after = theirs.get("preparation") or {}, ours.get("preparation") or {}
    modalities = {*(ours.get("modalities") or [after[key] for key in ("default_modality",) if key in after])}
    if before and after:
        pairs += _preparations((before, after), sorted(modalities))
    found += [f"{meaning}: {old} in the checkpoint, {new} now" for meaning, old, new in pairs if old != new]
    unseen = sorted(modalities - {*theirs.get("modalities", ())})
    if unseen and theirs.get("modalities"):
        found.append(f"modality {', '.join(unseen)} is new: the checkpoint saw {', '.join(theirs['modalities'])}")
    return found


def _preparations(
    sides: tuple[Mapping[str, Any], Mapping[str, Any]], modalities: Sequence[str]
) -> list[tuple[str, Any, Any]]:
    """(what is prepared, how it was, how it is now)."""
    rules = [", ".join(map(_rule_in_words, side.get("channels", ()))) or "by modality" for side in sides]
    pairs = [
        ("spacing (S, P, L)", *(f"{[float(mm) for mm in side['spacing_mm']]} mm" for side in sides)),
        ("orientation of the axes", *(side.get("orientation", "SPL") for side in sides)),
        ("resampled before it is normalized", *(side.get("resample_first", False) for side in sides)),
        ("normalization of the channels", *rules),
    ]
    for modality in modalities if rules == ["by modality"] * 2 else ():
        values = (side.get("intensity", {}).get(modality, "z-score per case") for side in sides)
        pairs.append((f"normalization of {modality}", *values))
    return pairs


def _rule_in_words(rule: Mapping[str, Any]) -> str:
    return " ".join([rule["scheme"], *(f"{key} {value}" for key, value in rule.items() if key != "scheme")])
