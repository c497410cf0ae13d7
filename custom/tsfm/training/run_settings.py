"""What makes a run this run: the record that is kept with its state, and how another record differs from it, in words."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import nn

from ..errors import changes
from ..network.description import as_options, differences
from ..options import config_files, overrides
from .checkpoint import EXTRA_STATE, decode_description, table_of

NO_SETTINGS = {"lr", "fused", "foreach", "capturable", "differentiable"}
"""Options of an optimizer with which it takes the same steps, or that have a setting of their own."""

PLACES = {"pool", "pretrained", "initial_weights"}
"""Settings that are paths: another spelling of the same place, also from another working folder, is no difference."""

ADDED = ("labels", "loss")
"""What earlier versions did not write down, and is not compared with theirs."""

RECIPE = (
    *("network_def", "loss", "parameters", "optimizer", "lr_scheduler", "train#preprocessing", "train#dataset"),
    *("train#sampler", "train#inferer", "train#step", "train#trainer"),
)
"""Sections of ``train.json`` of which any change is one of what the network learns."""

FREE = {
    *("network_def#checkpointing", "train#dataset#data", "train#trainer#max_epochs", "train#trainer#device"),
    *(f"optimizer#{name}" for name in NO_SETTINGS),
}
"""Except for these: the same arithmetic, a longer run, and what the settings say in other words."""

SHOWN = 6
"""Places of a recipe that a message names."""


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
        "recipe": recipe(sys.argv),
        "folder": os.getcwd(),
    }
    if "learning_rate" in settings:  # an overlay may give the optimizer another
        found["learning_rate"] = optimizer.defaults.get("lr", settings["learning_rate"])
    return json.loads(json.dumps(found, default=str))


def recipe(arguments: Sequence[str]) -> dict[str, Any]:
    """Place -> value of all that the configs of a command line say in `RECIPE`, and in what overlays define for it.

    References stay as they are: what the first config defines besides, the settings have. Empty where no config is named (a
    run from Python).
    """
    if not (paths := config_files(arguments)):
        return {}
    own, parser = ConfigParser.load_config_file(paths[0]), ConfigParser()
    parser.read_config(paths)
    parser.update(overrides(arguments))
    found: dict[str, Any] = {}
    places = list(RECIPE)
    for place in places:
        values = dict(_values(place, parser.get(place)))
        named = re.findall(r"[@%]([A-Za-z_]\w*)", str(list(values.values())))
        places += [name for name in dict.fromkeys(named) if name not in own and name not in places]
        found |= values
    return found


def _values(place: str, content: Any) -> Iterator[tuple[str, Any]]:
    """Places and plain values in a config's content, but for what is `FREE` and descriptions."""
    if place in FREE or place.endswith("#_desc_"):
        return
    if isinstance(content, dict | list):
        for key, inner in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _values(f"{place}#{key}", inner)
    else:
        yield place, content


def changed(state: Mapping[str, Any], settings: Mapping[str, Any], network: nn.Module) -> str:
    """What differs between the settings of a run and those in a state, in words; empty where nothing does."""
    before = dict(state["settings"])
    now = {key: value for key, value in settings.items() if key in before or key not in ADDED}
    there, here = before.pop("folder", now["folder"]), now.pop("folder")
    for key in before.keys() & now.keys() & PLACES:
        if _place(there, before[key]) == _place(here, now[key]):
            before[key] = now[key]
    recipes = before.pop("recipe", {}), now.pop("recipe", {})
    theirs, ours = (known.get("network", {}) for known in (description_of(state), getattr(network, "description", {})))
    found = changes(before, now)
    words = {
        "cases": "cases were added, removed or renamed",
        "labels": "ids of the labels stand for other targets",
        "network": "; ".join(filter(None, [*differences(theirs, ours), as_options(theirs, ours)])),
    }
    said = [word for key, word in words.items() if word and f"{key}: was" in found]
    return "; ".join(filter(None, [found, *said, _changed_recipe(*recipes) if all(recipes) else ""]))


def _changed_recipe(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    places = [place for place in {**before, **now} if before.get(place) != now.get(place)]
    shown = changes(*({place: recipe.get(place) for place in places[:SHOWN]} for recipe in (before, now)))
    return f"{shown}; and {len(places) - SHOWN} more" if len(places) > SHOWN else shown


def description_of(state: Mapping[str, Any], path: str = "the run's state") -> dict[str, Any]:
    """What the weights of a state, whole or in shares, say of themselves. CheckpointError where that is damaged."""
    return decode_description((state["model"] if "model" in state else state["shares"]["model"]).get(EXTRA_STATE), path)


def _place(folder: str, path: Any) -> str:
    return os.path.realpath(os.path.join(folder, os.path.expanduser(str(path))))


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
