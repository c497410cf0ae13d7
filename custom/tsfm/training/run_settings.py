"""What makes a run this run: the record that is kept with its state, and how another record differs from it, in words."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import changes
from ..network.description import as_options, differences
from .checkpoint import EXTRA_STATE, decode_description, table_of

NO_SETTINGS = {"lr", "fused", "foreach", "capturable", "differentiable"}
"""Options of an optimizer with which it takes the same steps, or that have a setting of their own."""

PLACES = ("pool", "pretrained", "initial_weights")
"""Settings that are paths: another spelling of the same place is no difference."""

ADDED = ("labels", "loss")
"""What earlier versions did not write down, and is not compared with theirs."""


def run_settings(
    settings: Mapping[str, Any],
    items: Sequence[Mapping[str, Any]],
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """`settings` (JSON) and what tells the training items, the meaning of their labels, network and optimizer apart."""
    paths = [[str(item.get("dataset")), str(item.get("case", item["image"]))] for item in items]
    found = {
        **settings,
        "cases": digest(sorted(paths)),
        "labels": _labels(getattr(network, "description", {}), {dataset for dataset, _ in paths}),
        "network": digest([[name, *tensor.shape] for name, tensor in network.named_parameters()]),
        "optimizer": type(optimizer).__name__,
        "optimizer_options": {k: v for k, v in optimizer.defaults.items() if k not in NO_SETTINGS},
    }
    if "learning_rate" in settings:  # an overlay may give the optimizer another
        found["learning_rate"] = optimizer.defaults.get("lr", settings["learning_rate"])
    return json.loads(json.dumps(found, default=str))


def changed(state: Mapping[str, Any], settings: Mapping[str, Any], network: nn.Module) -> str:
    """What differs between the settings of a run and those in a state, in words; empty where nothing does."""
    before = {
        key: settings[key] if key in PLACES and key in settings and _place(value) == _place(settings[key]) else value
        for key, value in state["settings"].items()
    }
    found = changes(before, {key: value for key, value in settings.items() if key in before or key not in ADDED})
    theirs, ours = (known.get("network", {}) for known in (description_of(state), getattr(network, "description", {})))
    words = {
        "cases": "cases were added, removed or renamed",
        "labels": "ids of the labels stand for other targets",
        "network": "; ".join(filter(None, [*differences(theirs, ours), as_options(theirs, ours)])),
    }
    return "; ".join([found, *(word for key, word in words.items() if word and f"{key}: was" in found)])


def description_of(state: Mapping[str, Any], path: str = "the run's state") -> dict[str, Any]:
    """What the weights of a state, whole or in shares, say of themselves. CheckpointError where that is damaged."""
    return decode_description((state["model"] if "model" in state else state["shares"]["model"]).get(EXTRA_STATE), path)


def _place(path: Any) -> str:
    return os.path.realpath(os.path.expanduser(str(path)))


def _labels(description: Mapping[str, Any], datasets: set[str]) -> str | None:
    """A digest of the targets that the ids of these data sets stand for; None where a network does not say."""
    if not {"targets", "dataset_labels"} <= set(description):
        return None
    table = table_of(description)
    rows = zip(table.codes, table.targets.tolist(), strict=True)
    return digest([table.names, [[*code, row] for code, row in rows if code[0] in datasets]])


def digest(value: Any) -> str:
    """Sixteen hex digits of plain JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
