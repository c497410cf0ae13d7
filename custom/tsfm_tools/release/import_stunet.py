"""STU-Net's public weights become a bundle that infers, evaluates, fine-tunes and serves as the others do."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from tsfm.network.described import DescribedNetwork
from tsfm.planning.public_weights import read_pretrained
from tsfm.training.checkpoint import build_network, encode_description, save_weights
from tsfm.training.weight_files import CheckpointError

from .import_nnunet import TEMPLATE, bundle_of

TRAINED_ON = "TotalSegmentator (1204 CT, 104 structures; CC BY 4.0); STU-Net's published weights"


def import_stunet(
    weights: str,
    output_dir: str,
    name: str = "stunet",
    trained_on: str = TRAINED_ON,
    bundle_dir: str = TEMPLATE,
) -> str:
    """Make a bundle of STU-Net's weights: their 104 structures, prepared as STU-Net does.

    Args:
        weights: ``small_ep4k.model``, ``base_ep4k.model``, ``large_ep4k.model`` or ``huge_ep4k.model``.
        output_dir: the bundle goes below it, as `name`.
        name: of the bundle.
        trained_on: a sentence on what the weights were trained on, for metadata and README.
        bundle_dir: the bundle whose configs are taken.

    Returns:
        the bundle's folder.

    Raises:
        CheckpointError: no such file, or weights of another network or of other structures.
        ReleaseError: `output_dir` holds something else under this name.
    """
    state, description = read_stunet(weights)
    bundle = bundle_of(state, description, output_dir, name, trained_on, bundle_dir)
    print(f"{bundle}: {len(description['targets'])} targets")
    return bundle


def read_network(path: str, name: str, expected: str) -> tuple[DescribedNetwork, dict[str, Tensor], dict[str, Any]]:
    """The network `name` that others published, not filled yet, its tensors and its description.

    Raises:
        CheckpointError: weights of another network, or not all that it needs.
    """
    found = read_pretrained(path)
    kind = found.description.get("network", {}).get("name", "no known network")
    if kind != name:
        raise CheckpointError(f"{path} holds {kind}; expected {expected}")
    network = build_network(found.description)
    wrong = sorted({key for key in network.state_dict() if not key.endswith("_extra_state")} ^ set(found.tensors))
    if wrong:
        raise CheckpointError(f"{path}: {len(wrong)} tensors are missing or superfluous, {wrong[0]} for one")
    return network, found.tensors, found.description


def read_stunet(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of STU-Net's published weights."""
    expected = "STU-Net's weights for the 104 structures of TotalSegmentator (*_ep4k.model)"
    _, tensors, description = read_network(path, "stunet", expected)
    if not description.get("targets"):
        raise CheckpointError(f"{path} holds stunet with 0 named targets; expected {expected}")
    return tensors, description


def write_stunet(path: str, target: str) -> str:
    """Write STU-Net's published weights as this project's own, for inference.json; returns `target`."""
    state, description = read_stunet(path)
    save_weights({**state, "_extra_state": encode_description(description)}, target)
    return target
