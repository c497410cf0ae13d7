"""What may travel with weights: plain data of declared types, since a weight file can come from anyone.

The description goes into configs (which MONAI runs), pages and names of files. So it holds known keys only, and every text
in it is a name or a word by an alphabet without ``$``, ``@``, ``%``, ``#``, quotes, slashes or line breaks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..cases.cases import Preparation
from ..schema import KINDS, NAME, NAME_RULE, SNOMED, check, is_plain_name, kind, nearest


def _list(description: str, items: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return kind("array", description, items=items, **more)


def _map(description: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Any names, all with such values."""
    return kind("object", description, additionalProperties=values)


def _object(description: str, properties: Mapping[str, Any], required: Sequence[str] = ()) -> dict[str, Any]:
    """These names and no others."""
    return kind("object", description, additionalProperties=False, required=list(required), properties=properties)


LARGEST = 2**20

COUNT = kind("integer", "a whole number from 0 to a million", minimum=0, maximum=LARGEST)

COUNTS = _list("a list of whole numbers", COUNT, maxItems=64)

THREE_COUNTS = _list("three whole numbers (S, P, L)", COUNT, minItems=3, maxItems=3)

STRIDES = _list("a list of three whole numbers per level", THREE_COUNTS, maxItems=64)

STRIDES_OR_NONE = {**STRIDES, "type": ["array", "null"]}

NUMBER = kind("number", "a number")

SHARE = kind("number", "a number from 0 to 1", minimum=0, maximum=1)

FLAG = kind("boolean", "true or false")

YES_NO_UNKNOWN = kind(["boolean", "null"], "true, false or null")

WORD = kind("string", "a word of small letters, digits, - and _", pattern=r"\A[a-z][a-z0-9_-]{0,39}\Z")

COMMON = {
    "in_channels": COUNT,
    "out_channels": COUNT,
    "img_size": THREE_COUNTS,
    "deep_supervision": FLAG,
    "checkpointing": FLAG,
}

LEVELS = {
    "features": COUNTS,
    "depths_down": COUNTS,
    "depths_up": COUNTS,
    "strides": STRIDES,
    "kernel_sizes": STRIDES_OR_NONE,
}

NETWORKS: dict[str, dict[str, Any]] = {
    "tsfm": {
        **COMMON,
        **LEVELS,
        **dict.fromkeys(("hidden_size", "num_layers", "num_heads", "mlp_dim"), COUNT),
        "dropout": SHARE,
        "bottleneck": FLAG,
        "interpolation": WORD,
        "skip": kind("string", "add or concat", enum=["add", "concat"]),
    },
    "nnunet": {**COMMON, **LEVELS, "residual": FLAG, "bias": FLAG},
    "swinunetr": {**COMMON, "feature_size": COUNT, "dropout": SHARE, "use_v2": FLAG},
    "stunet": {**COMMON, **LEVELS, "size": NAME},
    "sam_med3d": {**COMMON, **dict.fromkeys(("width", "depth", "num_heads"), COUNT), "global_layers": COUNTS},
    "monai": {
        **COMMON,
        "net": NAME,
        "arguments": kind(["object", "null"], "an object of the constructor's arguments"),
        "strides": STRIDES_OR_NONE,
    },
    "ensemble": {**COMMON, "count": COUNT, "network": kind("object", "an object with a network's arguments")},
}
"""Arguments, and their types, of each network that a description may name (``"name"``; without it: tsfm)."""

THREE_MM = _list(
    "three numbers of millimetres (S, P, L)", kind("number", "millimetres above 0", exclusiveMinimum=0, maximum=1000),
    minItems=3, maxItems=3,
)  # fmt: skip

NAMES = _list("a list of names", NAME)

STATISTICS = dict.fromkeys(("lower", "upper", "mean", "sd"), NUMBER)

RULE = _object("an object with a scheme", {"scheme": NAME, "masked": FLAG, **STATISTICS}, ["scheme"])

PREPARATION = {
    "spacing_mm": THREE_MM,
    "intensity": _map(
        "an object from modalities to lower, upper, mean and sd",
        _object("an object with the numbers lower, upper, mean and sd", STATISTICS, list(STATISTICS)),
    ),
    "in_channels": COUNT,
    "default_modality": NAME,
    "masked": _map("an object from modalities to true or false", FLAG),
    "channels": _list("a list of rules, one per channel", RULE),
    "orientation": kind("string", "three letters", pattern=r"\A[A-Za-z]{3}\Z"),
    "resample_first": FLAG,
}

TARGET = _object(
    "an object with relations of a target",
    {
        "part_of": NAME,
        "inside": NAME,
        "lesion": FLAG,
        "tolerance_mm": kind("number", "millimetres above 0", exclusiveMinimum=0),
        "display": NAME,
        "snomed": SNOMED,
    },
)

LABELS = _object(
    "an object with a data set's name and labels",
    {
        "name": NAME,
        "labels": _map("an object from raw ids to lists of targets", NAMES),
        "ignore": _list("a list of raw ids", kind("integer", "a raw id (whole number)")),
        "others": kind("string", '"background"', enum=["background"]),
    },
    ["name", "labels"],
)

LICENCE = _object(
    "an object with a licence's name and what it permits",
    {"name": NAME, "commercial": YES_NO_UNKNOWN, "share_alike": YES_NO_UNKNOWN},
    ["name", "commercial", "share_alike"],
)

RANGE = _list("two numbers", NUMBER, minItems=2, maxItems=2)

DESCRIPTION = _object(
    "an object",
    {
        "format": COUNT,
        "version": NAME,
        "epoch": kind(["integer", "null"], "a whole number from 0", minimum=0),
        "network": kind("object", "an object with a network's arguments"),
        "targets": _map("an object from target names to their relations", TARGET),
        "dataset_labels": _list("a list of data sets' labels", LABELS),
        "preparation": _object(
            "an object with what Preparation takes",
            {field.name: PREPARATION.get(field.name, {}) for field in fields(Preparation)},
            ["spacing_mm"],
        ),
        "patch_size": THREE_COUNTS,
        "modalities": NAMES,
        "trained_on": NAMES,
        "trained_targets": NAMES,
        "trained_cases": NAMES,
        "trained_by": NAME,
        "licences": _map("an object from data sets to their licences", LICENCE),
        "familiar": _map(
            "an object from modalities to statistics of the images that were seen",
            _map("an object from statistics to smallest and largest", RANGE),
        ),
        "activation": WORD,
        "click_sigma": kind("number", "voxels above 0", exclusiveMinimum=0, maximum=1000),
        "mirror_axes": kind("string", "some of the letters S, P, L", pattern=r"\A(?!.*(.).*\1)[SPL]*\Z"),
    },
)

KINDS["description"] = DESCRIPTION

SHAPING = ("features", "depths_down", "depths_up", "skip", "bottleneck", "hidden_size", "num_layers", "mlp_dim")
"""Arguments of TSFM that decide whether weights fit, whatever the channels, targets, patch and strides are."""

KINDS |= {f"network {name}": _object("an object of arguments", arguments) for name, arguments in NETWORKS.items()}


def check_description(description: Any, source: str, error: type[ValueError] = ValueError) -> None:
    """Raise `error` unless `description` is plain data with the keys and types that are declared here.

    Raises:
        error: naming `source` and what is wrong with its place.
    """
    what = f"{source}: what the file says about its weights is refused: it must be plain names and numbers"
    found = _first_text(description, ())
    if found is not None:
        place, text = found
        raise error(f"{what}, but {'/'.join(place) or 'the whole'} is {text[:80]!r}; expected {NAME_RULE}")
    check(description, "description", what, error)
    network = description.get("network")
    while network is not None:
        name, arguments = split_network(network)
        if name not in NETWORKS:
            raise error(f"{what}. It names the network {name!r}{nearest(name, NETWORKS)}; known: {sorted(NETWORKS)}")
        check(arguments, f"network {name}", f"{what}; network", error)
        network = arguments.get("network")  # of an ensemble


def fill_in(description: dict[str, Any]) -> None:
    """Say what descriptions of earlier versions did not: TSFM's skips were added, nnU-Net's regions painted in order."""
    if str(description.get("trained_by")).startswith("nnU-Net 2"):
        description.setdefault("activation", "regions")
    network = description.get("network")
    while isinstance(network, dict):
        if network.get("name", "tsfm") == "tsfm":
            network.setdefault("skip", "add")
        network = network.get("network")  # of an ensemble


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """In what two networks differ, in words: what is in a checkpoint, and what is here."""
    return [f"{key}: checkpoint {theirs[key]}, network {ours[key]}" for key in _differing(theirs, ours)]


def as_options(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Options of a training with which our network becomes theirs; empty where `differences` finds none."""
    quotes = {key: '"' if isinstance(theirs[key], list) else "" for key in _differing(theirs, ours)}
    return " ".join(f"--network_def#{key} {quote}{theirs[key]}{quote}" for key, quote in quotes.items())


def _differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    return [key for key in SHAPING if key in theirs and key in ours and theirs[key] != ours[key]]


def split_network(network: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(name, arguments) of a description's network: ``{"name": name, argument: value, ...}``; without a name: tsfm."""
    arguments = {key: value for key, value in network.items() if key != "name"}
    return str(network.get("name", "tsfm")), arguments


def _first_text(value: Any, place: tuple[str, ...]) -> tuple[tuple[str, ...], str] | None:
    """Place and text of the first key or value that is no plain name, however deep (None: there is none)."""
    if isinstance(value, str):
        return None if value == "" or is_plain_name(value) else (place, value)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not is_plain_name(str(key).removeprefix("-")):  # raw ids may be negative
                return (*place, "(a key)"), str(key)
            if (found := _first_text(inner, (*place, str(key)))) is not None:
                return found
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            if (found := _first_text(inner, (*place, str(number)))) is not None:
                return found
    return None
