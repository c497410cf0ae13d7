"""The network and the preparation that a released bundle's inference.json declares, beside what its weights say.

Declared, they can be read and built without the weights. Weights that a training put into ``models/`` may be of another
network or preparation; they have the last word, so that inference never prepares an image otherwise than training did.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from ..network.described import DescribedNetwork
from ..network.description import check_description
from ..network.networks import create_network
from .checkpoint import Weights, build_network, bundled_weights, read_state

logger = logging.getLogger(__name__)

FREE = {"name": "tsfm", "dropout": 0.0, "checkpointing": False}
"""Arguments that change no tensor of a network, and (like its name) need not be in a description."""


def released_network(path: Weights, **arguments: Any) -> DescribedNetwork:
    """The network that `arguments` declare (see `create_network`), without its weights.

    Where the weights at `path` are those of another network, that one is built.

    Raises:
        NetworkError, ValueError: arguments that make no network.
    """
    description = _of_weights(path)
    own = description.get("network", arguments)
    changed = [key for key in {**own, **arguments} if _value(own, key) != _value(arguments, key)]
    if set(changed) - {"dropout", "checkpointing"}:
        logger.warning("%s holds another network than the config declares (%s): it is built", path, ", ".join(changed))
        return build_network(description, **{key: arguments[key] for key in FREE if key in arguments and key != "name"})
    network = create_network(**arguments)
    network.description = {**description, **network.description}
    return network


def released_description(path: Weights, **declared: Any) -> dict[str, Any]:
    """What travels with the weights at `path`; without weights, what is `declared`: targets, preparation, patch size, ...

    Raises:
        CheckpointError: as `read_state`.
        ValueError: `declared` entries that no description has.
    """
    check_description(declared, "inference.json")
    found = _of_weights(path)
    changed = [key for key, value in declared.items() if found and key in found and found[key] != value]
    if changed:
        logger.warning("%s says otherwise than the config about %s: the weights are right", path, ", ".join(changed))
    return found or {"dataset_labels": [], **declared}


def _of_weights(path: Weights) -> dict[str, Any]:
    """The description in the weights at `path`, or in the bundle that this package lies in; empty without a file."""
    path = bundled_weights(path)
    is_gone = isinstance(path, str | os.PathLike) and not os.path.isfile(path)
    return {} if is_gone else read_state(path)[1]


def _value(arguments: Mapping[str, Any], key: str) -> Any:
    return arguments.get(key, FREE.get(key))
