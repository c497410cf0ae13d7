"""Weight files: what they hold, what travels with them, and how they are read without executing anything.

A network's description (its constructor arguments, targets, label table, preparation, patch) is part of its state dict
as ``_extra_state``, a uint8 tensor of JSON. So one plain ``model.pt`` or ``model.safetensors`` is enough to rebuild the
network, prepare an image for it and name its outputs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .._version import __version__
from ..cases.licences import all_licences, check_weights, inherited_licences, licences_of
from ..cases.raw_ids import raw_values
from ..cases.splits import case_digests
from ..files import atomic_write
from ..labels import LabelTable
from ..network.clicks import CLICK_CHANNELS
from ..network.described import DescribedNetwork, check_described
from ..network.description import as_options, check_description, differences, fill_in
from ..network.networks import create_network
from .folds import combine
from .weight_files import CheckpointError, load_file, misfits, write_state

EXTRA_STATE = "_extra_state"

NESTED_KEYS = ("model", "state_dict", "network", "network_weights")


PREFIXES = ("module.", "_orig_mod.", "network.")

Weights = str | os.PathLike | Sequence[str | os.PathLike]
"""A weight file, or a list of folds' weight files, whose logits are averaged."""


def read_state(path: Weights) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and description of a weight file, or of several folds' as one; those of ``.pt`` files are mapped, not copied.

    Reads a plain state dict, a training checkpoint (``{"model": ...}``), ``{"state_dict": ...}``-style files and
    safetensors; prefixes of wrappers (``module.``) are dropped. The description is empty where the file has none.

    Raises:
        CheckpointError: no such file, not a weight file, or a pickle that holds more than tensors and plain values; folds
            that do not fit together.
    """
    if not isinstance(path, str | os.PathLike):
        return combine([(os.fspath(one), *read_state(one)) for one in path])
    state = load_file(os.fspath(path))
    for key in NESTED_KEYS:
        if isinstance(state.get(key), Mapping):
            state = state[key]
            break
    while prefix := next((p for p in PREFIXES if state and all(str(key).startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    extra = tensors.pop(EXTRA_STATE, None)
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors (keys: {list(state)[:8]}); expected a state dict")
    return tensors, decode_description(extra, os.fspath(path))


def read_description(path: Weights) -> dict[str, Any]:
    """What travels with the weights in `path`.

    Raises:
        CheckpointError: as `read_state`, and for a file without a description (not written by these bundles).
    """
    description = read_state(path)[1]
    if "network" not in description:
        raise CheckpointError(
            f"{path}: the weights carry no description of their network, so nothing can be built from them alone. "
            "Use a model.pt that tsfm's bundles wrote, or load_pretrained() into a network that you declare."
        )
    return description


def encode_description(description: Mapping[str, Any]) -> torch.Tensor:
    """JSON as a uint8 tensor, so that every weight format can hold it."""
    return torch.frombuffer(bytearray(json.dumps(description).encode()), dtype=torch.uint8)


def decode_description(extra: torch.Tensor | None, source: str = "the weights") -> dict[str, Any]:
    """Inverse of `encode_description`; empty where there is none.

    Raises:
        CheckpointError: bytes that are no JSON, or more than plain data of the declared keys and types.
    """
    if extra is None:
        return {}
    try:
        description = json.loads(extra.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    except (ValueError, TypeError, RuntimeError, RecursionError) as error:
        raise CheckpointError(
            f"{source}: the description in the file is damaged ({type(error).__name__}); download or copy it again"
        ) from None
    check_description(description, source, CheckpointError)
    fill_in(description)
    return description


def describe_network(
    network: DescribedNetwork,
    table: LabelTable,
    preparation: Any,
    patch_size: Sequence[int],
    items: Sequence[Mapping[str, Any]] = (),
    mirror_axes: str = "SPL",
) -> DescribedNetwork:
    """Give `network` the description that travels with its weights.

    `items` are the training items: their modalities, data sets, digests, annotated targets and licences are written down, beside the
    digests and licences of what the weights that `network` starts from have seen. Label maps from a server (bare items) add to what weights
    for the same targets say of themselves (`goes_on`). `mirror_axes` are those along which training mirrors, and inference may.

    Raises:
        CheckpointError: a network whose outputs or inputs do not fit the label table or the preparation; `mirror_axes` that
            are none.
    """
    arguments = network.description["network"]
    if arguments["out_channels"] != len(table.names):
        raise CheckpointError(
            f"the network has {arguments['out_channels']} outputs, the label table {len(table.names)} targets"
        )
    if image_channels(network.description) != preparation.in_channels:
        clicks = " (and two for clicks)" if network.description.get("click_sigma") else ""
        raise CheckpointError(
            f"the network takes {image_channels(network.description)} channels{clicks}, the preparation makes "
            f"{preparation.in_channels}"
        )
    declared, before = table.to_dict(), network.description
    seen = network.description.pop("familiar", None)
    if list(before.get("targets", ())) != list(table.names) or all("dataset" in item for item in items):
        before, seen = {key: before[key] for key in ("licences", "trained_cases") if key in before}, None
    datasets = {table.dataset_of(item) for item in items}
    taught = {name for dataset in datasets if table.knows(dataset) for name in table.annotated(dataset)}
    taught.update(before.get("trained_targets", ()))
    network.description.update(
        format=1,
        version=__version__,
        targets=declared["targets"],
        dataset_labels=declared["datasets"] or before.get("dataset_labels", []),
        preparation=preparation.to_dict(),
        patch_size=[int(size) for size in patch_size],
        modalities=_more(before, "modalities", (item.get("modality", preparation.default_modality) for item in items)),
        trained_on=_more(before, "trained_on", (item.get("dataset", table.bare_dataset) for item in items)),
        trained_targets=[name for name in table.names if name in taught],
        trained_cases=_more(before, "trained_cases", filter(None, case_digests(items))),
        mirror_axes=mirror_axes,
        licences=all_licences(before.get("licences", {}), licences_of(items)),
    )
    if seen is not None:
        network.description["familiar"] = seen
    check_description(network.description, "this run", CheckpointError)
    return network


def _more(before: Mapping[str, Any], key: str, names: Iterable[str]) -> list[str]:
    """The names, and those that were there before, sorted."""
    return sorted({*names, *before.get(key, ())})


def start_from(network: DescribedNetwork, path: str | os.PathLike | None, licence: str = "any") -> DescribedNetwork:
    """`network` with the weights in `path`, which have to fit, and what they say they saw; none leaves it as it is.

    Raises:
        CheckpointError: as `load_weights`.
        PoolError: weights that saw data whose licences are not known to permit the use that `licence` names.
    """
    check_described(network)
    if path:
        description = load_weights(network, path)
        check_weights(path, description, licence, '--initial_weights ""')
        network.description["licences"] = inherited_licences(description)
        goes_on(network, description)
    return network


def goes_on(network: DescribedNetwork, description: Mapping[str, Any]) -> None:
    """Let `network` remember what the weights that it starts from were trained on, for `describe_network` to add to."""
    if {"targets", "dataset_labels"} <= description.keys():
        network.description.update(
            targets=description["targets"],
            dataset_labels=description["dataset_labels"],
            modalities=description.get("modalities", []),
            trained_on=description.get("trained_on", []),
            trained_targets=trained_targets(description),
            trained_cases=description.get("trained_cases", []),
            familiar=description.get("familiar", {}),
        )


def table_of(description: Mapping[str, Any]) -> LabelTable:
    """The label table that travels with the weights."""
    return LabelTable(description["targets"], description["dataset_labels"])


def trained_targets(description: Mapping[str, Any], raw_ids: str | None = None) -> list[str]:
    """Targets that the data of the training annotates: what the weights can be asked for, in the table's order.

    A pool may declare more than the training found (``--allow_missing``); all targets where the data is not known.
    With `raw_ids`, a data set, those of them that one of its ids stands for.

    Raises:
        CheckpointError: weights that know no target of that data set.
    """
    table = table_of(description)
    seen = set(description.get("trained_targets", ())) or {
        name for dataset in description.get("trained_on", ()) if dataset in table.datasets
        for name in table.annotated(dataset)
    }  # fmt: skip
    seen = seen or set(table.names)
    if raw_ids is not None:
        own = {table.names[value - 1] for value in raw_values(table, raw_ids)}
        if not own & seen:
            raise CheckpointError(
                f"raw_ids is '{raw_ids}', whose ids stand for {sorted(own)}; the weights were trained on none of them, "
                f"but on {sorted(seen)}: name a data set whose targets they know"
            )
        seen = seen & own
    return [name for name in table.names if name in seen]


def matching_table(description: Mapping[str, Any], pool_table: LabelTable) -> LabelTable:
    """`pool_table`, once it is sure that the weights' outputs are its targets, in its order.

    Raises:
        CheckpointError: weights that were trained for other targets.
    """
    trained = tuple(description["targets"])
    if trained != pool_table.names:
        raise CheckpointError(
            f"the weights were trained for the targets {list(trained)}, the labels are declared for "
            f"{list(pool_table.names)}: use the pool file (or label_ids) that the weights were trained with"
        )
    return pool_table


def image_channels(description: Mapping[str, Any]) -> int:
    """Channels of the images that the weights take: a promptable network has two more, for clicks."""
    return description["network"]["in_channels"] - (CLICK_CHANNELS if description.get("click_sigma") else 0)


def known_modalities(description: Mapping[str, Any]) -> list[str]:
    """Modalities that the weights were trained on, the one of images that name none first."""
    first = description["preparation"].get("default_modality", "CT")
    return list(dict.fromkeys([first, *description.get("modalities", ())]))


def build_network(description: Mapping[str, Any], **overrides: Any) -> DescribedNetwork:
    """The network that `description` names, without its weights; `overrides` change constructor arguments (dropout).

    Raises:
        CheckpointError: `overrides` that name another network.
    """
    arguments = {"name": "tsfm", **description["network"]}
    name = overrides.pop("name", None) or arguments["name"]
    if name != arguments["name"]:
        raise CheckpointError(
            f"the weights are those of a network '{arguments['name']}', the configuration asks for '{name}': leave its "
            "overlay out, or give other weights (--pretrained)"
        )
    network = create_network(**{**arguments, **overrides})
    network.description = {**description, "network": network.description["network"]}
    return network


class WeightLoader:
    """Handler: loads a weight file strictly when the engine starts; nothing is ever loaded in part.

    Args:
        path: weight file or several folds' (any format that `read_state` takes).
        network: the network to fill.

    Raises:
        CheckpointError: tensors that are missing, superfluous or of another shape, with their names.
    """

    def __init__(self, path: Weights, network: nn.Module) -> None:
        self.path, self.network = path, network

    def attach(self, engine: Any) -> None:
        """Load when `engine` starts."""
        from ignite.engine import Events

        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Any = None) -> None:
        """Load now."""
        load_weights(self.network, self.path)


def load_weights(network: nn.Module, path: Weights) -> dict[str, Any]:
    """Fill `network` with the weights in `path`, return their description; every tensor has to fit, or nothing is changed.

    Raises:
        CheckpointError: what is missing, superfluous or of another shape.
    """
    tensors, description = read_state(path)
    own = {key: value for key, value in network.state_dict().items() if key != EXTRA_STATE}
    if problems := misfits(tensors, own):
        theirs, ours = (known.get("network", {}) for known in (description, getattr(network, "description", {})))
        shown = "\n  ".join([*differences(theirs, ours), *problems[:12]])
        declared = as_options(theirs, ours)
        raise CheckpointError(
            f"{path} does not fit the network ({len(problems)} tensors differ); nothing was loaded:\n  {shown}\n"
            f"{f'A training makes the network of the file with {declared}. ' if declared else ''}"
            "Build the network from the file itself (tsfm.training.checkpoint.build_network), or adapt with load_pretrained()."
        )
    network.load_state_dict(tensors, strict=False)
    return description


def save_weights(network: nn.Module | Mapping[str, torch.Tensor], path: str | os.PathLike) -> None:
    """Write a network's (or its state's) plain state dict, description included, to ``.pt`` or ``.safetensors``, atomically."""
    path = os.fspath(path)
    state = network.state_dict() if isinstance(network, nn.Module) else network
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    atomic_write(path, lambda temporary: write_state(state, temporary, path.endswith(".safetensors")))


def bundled_weights(path: Weights) -> Weights:
    """`path` where there is a file, or else the weights of the bundle that this package lies in, if it lies in one.

    `monai.bundle.load` builds the network without saying where the bundle is, so that a released config's relative
    path leads nowhere from another working folder.
    """
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    beside = os.path.join(os.path.dirname(package), "models", "model.pt")
    is_gone = isinstance(path, str | os.PathLike) and not os.path.isfile(path)
    return beside if is_gone and os.path.isfile(beside) else path
