"""Several folds' weight files as one: an ensemble, whose logits are the mean of theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..cases.licences import all_licences
from ..network.description import split_network
from ..network.networks import create_network
from ..preparation.familiar import together
from .weight_files import CheckpointError

ALIKE = ("targets", "dataset_labels", "preparation", "patch_size", "activation", "mirror_axes", "click_sigma")

OF_TRAINING = ("checkpointing", "deep_supervision", "dropout")
"""Arguments of a network that inference does not depend on."""


def combine(
    folds: Sequence[tuple[str, Mapping[str, torch.Tensor], Mapping[str, Any]]],
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, description) of the ensemble of these (path, tensors, description); heads that only train are left out.

    Raises:
        CheckpointError: no fold, weights without a description, or folds that do not fit together, with the path, what
            differs and how.
    """
    if not folds:
        raise CheckpointError("the list of checkpoints is empty; name one weight file per fold")
    first, _, expected = folds[0]
    for path, tensors, description in folds:
        name = description.get("network", {}).get("name", "tsfm")
        if "network" not in description or name == "ensemble":
            what = "is an ensemble already" if name == "ensemble" else "carries no description of its network"
            raise CheckpointError(f"{path} {what}, so it cannot be averaged with others; name single folds' weights")
        for key in ("network", *ALIKE):
            values = [_shown(one.get(key)) for one in (expected, description)]
            if values[0] != values[1]:
                raise CheckpointError(
                    f"{path} and {first} cannot be averaged: their {key} differ: {_difference(values[1], values[0])}; "
                    "name the folds of one cross-validation"
                )
        _check_names(path, tensors, description)
    name, arguments = split_network(expected["network"])
    arguments = {**arguments, "deep_supervision": False, "checkpointing": False, "name": name}
    kept = _names(arguments)
    tensors = {
        f"members.{number}.{key.removeprefix('net.')}": value
        for number, (_, tensors, _) in enumerate(folds)
        for key, value in tensors.items()
        if key in kept
    }
    shape = {key: expected["network"][key] for key in ("in_channels", "out_channels")}
    network = {"name": "ensemble", **shape, "count": len(folds), "network": arguments}
    return tensors, {**expected, **_history([description for _, _, description in folds], first), "network": network}


def _history(descriptions: Sequence[Mapping[str, Any]], first: str) -> dict[str, Any]:
    """What all folds have seen; of the targets those that every one was trained on: the mean of a head and of one that
    nobody taught says nothing."""
    found: dict[str, Any] = {
        key: sorted({name for one in descriptions for name in one.get(key, ())})
        for key in ("modalities", "trained_on", "trained_cases")
    }
    found["familiar"] = together(one.get("familiar", {}) for one in descriptions)
    found["licences"] = all_licences(*(one.get("licences", {}) for one in descriptions))
    taught = [one["trained_targets"] for one in descriptions if one.get("trained_targets")]
    found["trained_targets"] = [name for name in next(iter(taught), ()) if all(name in names for names in taught)]
    if taught and not found["trained_targets"]:
        raise CheckpointError(
            f"{first} and the others cannot be averaged: no target is among the trained_targets of all; name the folds of one "
            "cross-validation"
        )
    return {key: value for key, value in found.items() if value}


def _names(arguments: Mapping[str, Any]) -> set[str]:
    """Names of a network's tensors."""
    with torch.device("meta"):
        state = create_network(**arguments).state_dict()
    return {key for key in state if not key.endswith("_extra_state")}


def _check_names(path: str, tensors: Mapping[str, torch.Tensor], description: Mapping[str, Any]) -> None:
    """CheckpointError unless a file holds the tensors of its network, all of them and no others."""
    wrong = sorted(_names(description["network"]) ^ tensors.keys())
    if wrong:
        raise CheckpointError(f"{path} does not fit its own network: missing or unexpected {wrong[:6]}")


def _shown(value: Any) -> Any:
    """`value` without what inference does not depend on."""
    is_network = isinstance(value, Mapping) and "out_channels" in value
    return {key: value[key] for key in value if key not in OF_TRAINING} if is_network else value


def _difference(one: Any, other: Any) -> str:
    """Two values as text, of mappings only the entries that differ."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
        one, other = ({key: side.get(key, "absent") for key in keys} for side in (one, other))
    return f"{str(one)[:200]} and {str(other)[:200]}"
