"""What the Model Zoo and MONAI Label want of a bundle's name, version and weights."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from monai.bundle import ConfigParser
from tsfm.training.checkpoint import EXTRA_STATE, read_state

# MONAI Label takes them for other kinds of app
FORBIDDEN_NAMES = ("detection", "classification", "deepedit", "deepgrow")


class ReleaseError(ValueError):
    """A bundle or checkpoint that cannot be released, with what to change."""


PROMPTABLE = "deepedit"
"""In the name of bundles to which MONAI Label's clients send clicks."""


def named_for_clicks(name: str, takes_clicks: bool) -> str:
    """`name`, with "_deepedit" where weights take clicks and it does not say so."""
    return f"{name}_{PROMPTABLE}" if takes_clicks and PROMPTABLE not in name.lower() else name


def check_name(name: str, takes_clicks: bool = False) -> None:
    """Raise ReleaseError for a name that MONAI Label could not serve; that of weights with click channels holds "deepedit"."""
    wrong = [word for word in FORBIDDEN_NAMES if word in name.lower() and not (takes_clicks and word == PROMPTABLE)]
    if (fitting := named_for_clicks(name, takes_clicks)) != name:
        raise ReleaseError(
            f"bundle name {name!r}: these weights take clicks, which MONAI Label sends only to bundles with '{PROMPTABLE}' in "
            f"their name: use {fitting}"
        )
    if wrong or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
        raise ReleaseError(
            f"bundle name {name!r}: use letters, digits and underscores, and none of {FORBIDDEN_NAMES}, by which MONAI "
            "Label recognizes other kinds of bundles"
        )


def check_version(metadata: Mapping[str, Any]) -> None:
    """Version and changelog as the Model Zoo wants them, the version first in the changelog.

    Raises:
        ReleaseError: a version that is not three one-digit parts (the zoo sorts versions as strings), or a changelog
            that does not begin with it.
    """
    version, changelog = metadata.get("version", ""), metadata.get("changelog", {})
    if not re.fullmatch(r"\d\.\d\.\d", version):
        raise ReleaseError(f"metadata.json: version {version!r}; expected three parts of one digit each, like 0.1.0")
    if version not in changelog:
        raise ReleaseError(
            f"metadata.json: the changelog is stale: it knows {list(changelog)}, not {version}. Add an entry that says "
            "what is new, or give --changelog."
        )
    if max(changelog) != version:
        raise ReleaseError(f"metadata.json: the changelog already holds {max(changelog)}, newer than {version}")


def check_weights(bundle: str) -> dict[str, int]:
    """Hold the weight files against the network that ``inference.json`` defines, key by key.

    Returns:
        number of tensors and parameters.

    Raises:
        ReleaseError: tensors that are missing, superfluous, of another shape, or differ between the two files.
    """
    with torch.device("meta"):  # no memory, whatever its size
        network = built(bundle, "inference.json", "network_def")
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items() if key != EXTRA_STATE}
    first, _ = read_state(os.path.join(bundle, "models", "model.pt"))
    paths = [os.path.join(bundle, "models", file) for file in ("model.pt", "model.safetensors")]
    for path in filter(os.path.isfile, paths):
        tensors, _ = read_state(path)
        found = {key: tuple(value.shape) for key, value in tensors.items()}
        pairs = {key: (found.get(key), expected.get(key)) for key in {**expected, **found}}
        wrong = [f"{key}: {one}, network_def has {other}" for key, (one, other) in pairs.items() if one != other]
        wrong = wrong or [f"{key}: differs from model.pt" for key in tensors if not tensors[key].equal(first[key])]
        if wrong:
            raise ReleaseError(f"{path} does not fit network_def of inference.json ({len(wrong)} tensors): {wrong[:5]}")
    return {"tensors": len(expected), "parameters": sum(value.numel() for value in first.values())}


def built(bundle: str, file: str, name: str) -> Any:
    """What the entry `name` of a bundle's config file builds."""
    parser = ConfigParser()
    parser.read_config(os.path.join(bundle, "configs", file))
    parser["bundle_root"] = bundle
    return parser.get_parsed_content(name)
