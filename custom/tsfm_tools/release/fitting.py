"""What a checkpoint decides about the bundle that is released around it: configs, metadata, and the README's table."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from tsfm.cases.licences import weights_terms
from tsfm.network.adapted import REQUIRED
from tsfm.training.checkpoint import table_of

DECIDED_IDS = ("spacing_mm", "ct_normalization", "network_size", "planned")

README_BLOCK = ("<!-- weights: begin -->", "<!-- weights: end -->")


def fill_configs(
    configs: dict[str, Any], description: Mapping[str, Any], name: str, trained_on: str | None, parameters: int
) -> None:
    """Write the checkpoint's network, targets, preparation and patch into the configs that declare them.

    A config that takes them from the pretrained weights (fine-tuning) keeps doing so: those are the released ones,
    found from any working folder; only a run of the bundle itself writes a report of what was taken over.
    """
    network = {"_target_": "tsfm.network.networks.create_network", "name": "tsfm", **description["network"]}
    preparation = {"_target_": "tsfm.cases.cases.Preparation.from_dict", "values": description["preparation"]}
    train, inference = configs.get("train.json", {}), configs["inference.json"]
    if "description" in inference:
        inference["description"]["_target_"] = "tsfm.training.checkpoint.bundle_description"
    else:
        inference["network_def"] = network
    if train.get("network_def", {}).get("_target_") == "tsfm.network.networks.create_network":
        references = {key: value for key, value in train["network_def"].items() if str(value).startswith("@")}
        references.pop("img_size", None)  # the grid of the position embedding is the weights', whatever the patch
        train["network_def"] = {**network, **references}
        train["preparation"] = preparation
        train["patch_size"] = description["patch_size"]
        train["initial_weights"] = {
            "_target_": "tsfm.training.checkpoint.bundled_weights",
            "path": "$@bundle_root + '/models/model.pt'",
        }
        for config in (train, *(configs[file] for file in configs if file not in ("metadata.json", "pool.json"))):
            _drop_decided(config)
    if train.get("network_def", {}).get("_target_") == "tsfm.planning.plan.downstream_network":
        weights = "$@bundle_root + '/models/model.pt'"
        train["pretrained"] = {"_target_": "tsfm.training.checkpoint.bundled_weights", "path": weights}
        train["loaded_network"]["output_dir"] = "$@output_dir if os.path.isdir(@bundle_root + '/configs') else None"
    if "checkpointing" in train:  # of activations: as the user's device needs it, not as the author's did
        train["checkpointing"] = "auto"
    if "pool.json" in configs:
        configs["pool.json"] = _fitted_pool(configs["pool.json"], description)
    configs["metadata.json"] = _fitted_metadata(configs["metadata.json"], description, name, trained_on)
    network = description["network"].get("name", "tsfm")
    method = "TSFM, the Tumor Segmentation Foundation Model," if network == "tsfm" else f"A network ({network})"
    configs["metadata.json"]["description"] = (
        f"{method} of {parameters / 1e6:.3g} million parameters that segments {', '.join(description['targets'])}. "
        f"Trained on: {trained_on or ', '.join(description['trained_on'])}."
    )


def _drop_decided(config: dict[str, Any]) -> None:
    """Take out of a config, in place, what the weights decide: it would have no effect, or the weights would not fit."""
    for key in [key for key in config if key in DECIDED_IDS or key.startswith("network_def#")]:
        del config[key]


def merge_overlay(config: dict[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """A config with an overlay's ids, as ``--config_file "['train.json', overlay]"`` would have them."""
    from monai.bundle import ConfigParser

    parser = ConfigParser(config)
    for key, value in overlay.items():
        if key != "_desc_":
            parser[key] = value
    return parser.config


def _fitted_pool(pool: Mapping[str, Any], description: Mapping[str, Any]) -> dict[str, Any]:
    """The pool file with the checkpoint's targets and data sets; folder layouts stay where the names are the same.

    A data set that the pool file does not know gets a plain layout, to be edited by whoever has its files.
    """
    known = {entry["name"]: entry for entry in pool["datasets"]}
    modalities = description.get("modalities") or ["CT"]
    datasets = []
    for entry in description["dataset_labels"]:
        labels = {raw: names[0] if len(names) == 1 else names for raw, names in entry["labels"].items()}
        has_ids = all(str(raw).isdigit() for raw in labels)
        layout = {
            "folder": entry["name"],
            "image": "images/{case}.nii.gz" if has_ids else "{case}/image.nii.gz",
            "label": "labels/{case}.nii.gz" if has_ids else "{case}/segmentations/{structure}.nii.gz",
            "modality": modalities[0],
        }
        datasets.append({**known.get(entry["name"], layout), **entry, "labels": labels})
    return {**pool, "targets": description["targets"], "datasets": datasets}


def _fitted_metadata(
    metadata: Mapping[str, Any], description: Mapping[str, Any], name: str, trained_on: str | None
) -> dict[str, Any]:
    table = table_of(description)
    patch, channels = list(description["patch_size"]), description["network"]["in_channels"]
    modalities = description.get("modalities") or []
    modality = "/".join(modalities or ["image"])
    data = {key: dict(value) for key, value in metadata["network_data_format"].items()}
    data["inputs"]["image"] = {
        **data["inputs"].get("image", {}),
        "format": "hounsfield" if modalities == ["CT"] else "magnitude",
        "modality": modality,
        "num_channels": channels,
        "spatial_shape": patch,
        "channel_def": {str(i): modality if channels == 1 else f"image_{i}" for i in range(channels)},
    }
    data["outputs"]["pred"] = {
        **data["outputs"].get("pred", {}),
        "num_channels": len(table.names),
        "spatial_shape": patch,
        "value_range": [0, len(table.names)],
        "channel_def": table.channel_def(),
    }
    network = description["network"].get("network", description["network"])  # an ensemble's own
    if network.get("name") in REQUIRED:
        package, version = REQUIRED[network["name"]]
        metadata = {
            **metadata,
            "required_packages_version": {**metadata["required_packages_version"], package: version},
        }
    filled = {**metadata, "name": name, "network_data_format": data, "label_classes": _classes(table.channel_def())}
    filled["pred_classes"] = filled["label_classes"]
    filled["image_classes"] = f"{channels} channel(s): {modality}, any size, spacing and orientation"
    if trained_on:
        filled["data_source"] = trained_on
    return filled


def _classes(channel_def: Mapping[str, str]) -> str:
    return ", ".join(f"{value} is {name}" for value, name in channel_def.items())


def write_readme(
    bundle: str,
    names: tuple[str, str],
    description: Mapping[str, Any],
    metadata: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    trained_on: str | None,
) -> None:
    """Fill the README's block on the weights (where it has none, append a section).

    `names`: of the source bundle and of the release; the README's commands get the latter, and the version.
    """
    path = os.path.join(bundle, "docs", "README.md")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    text = ""
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            text = file.read()
    before, name = names
    text = re.sub(rf"\b{re.escape(before)}_v\d\.\d\.\d\b", f"{name}_v{metadata['version']}", text)
    text = re.sub(rf"\b{re.escape(before)}\b", name, text)
    begin, end = README_BLOCK
    block = f"{begin}\n{weights_table(description, metadata, tensors, trained_on)}\n{end}"
    if begin in text and end in text:
        text = text[: text.index(begin)] + block + text[text.index(end) + len(end) :]
    else:
        text = f"{text.rstrip()}\n\n## The weights in this release\n\n{block}\n"
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def weights_table(
    description: Mapping[str, Any],
    metadata: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    trained_on: str | None = None,
) -> str:
    """Markdown that says what the weights are: network, patch, preparation, data, and one row per target."""
    table, preparation = table_of(description), description["preparation"]
    annotators = {
        target: [name for name in table.datasets if target in table.annotated(name)] for target in table.names
    }
    facts = {
        "version": metadata["version"],
        "parameters": f"{sum(tensor.numel() for tensor in tensors.values()):,}",
        "input": f"{description['network']['in_channels']} channel(s), {', '.join(description.get('modalities', []))}",
        "patch (S, P, L)": " x ".join(map(str, description["patch_size"])),
        "voxel spacing in mm (S, P, L)": " x ".join(f"{mm:g}" for mm in preparation["spacing_mm"]),
        "normalization": _normalization(preparation),
        "trained on": trained_on or ", ".join(description.get("trained_on", [])),
        "licences of that data": weights_terms(description.get("licences", {})),
        "epochs": description.get("epoch", "unknown"),
    }
    scores = {target: f"{dice:.3f}" for target, dice in metadata.get("eval_metrics", {}).items()}
    lines = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items()), ""]
    lines += ["| value | target | lies in | annotated by | Dice |", "|---|---|---|---|---|"]
    for value, target in enumerate(table.names, start=1):
        row = (value, target, table.parent(target) or "", ", ".join(annotators[target]), scores.get(target, ""))
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def _normalization(preparation: Mapping[str, Any]) -> str:
    ranges = [
        f"{modality}: clip to [{rule['lower']:g}, {rule['upper']:g}], minus {rule['mean']:g}, over {rule['sd']:g}"
        for modality, rule in (preparation.get("intensity") or {}).items()
    ]
    schemes = [f"channel {i}: {rule['scheme']}" for i, rule in enumerate(preparation.get("channels") or ())]
    return "; ".join(schemes or [*ranges, "every other modality: z-score per image and channel"])


def dice_per_target(summary: Mapping[str, Any], path: str) -> dict[str, float]:
    """Mean Dice of every target out of an evaluation's ``summary.json``, over the data sets that annotate it.

    Raises:
        ValueError: a file that is no such summary.
    """
    try:
        parts = [(target, entry["dice"]) for part in summary["datasets"].values() for target, entry in part.items()]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f'{path} is no summary.json of an evaluation: it has no "datasets" with a Dice') from None
    values: dict[str, list[float]] = {}
    for target, dice in parts:
        if dice:
            values.setdefault(target, []).append(dice["mean"])
    return {target: round(sum(found) / len(found), 4) for target, found in values.items()}
