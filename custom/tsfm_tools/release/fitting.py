"""What a checkpoint decides about the bundle that is released around it: its configs and its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.utils import merge_kv
from tsfm.network.adapted import REQUIRED
from tsfm.training.checkpoint import image_channels, table_of, trained_targets

from .rules import ReleaseError

OVERLAY = "released.json"
"""The bundle's own declaration of what a release changes in its configs."""

NO_WORKFLOW = ("metadata.json", "pool.json", OVERLAY)

UNSAID = {"modalities": [], "mirror_axes": "SPL", "activation": "sigmoid"}
"""What older weights leave out of their description."""

SELDOM_SAID = ("click_sigma",)
"""What only some weights have in their description: ``%weights#others``."""

NOT_EVALUATED = {"mean_dice": "not evaluated"}


def fill_configs(configs: dict[str, Any], description: Mapping[str, Any]) -> None:
    """Merge the bundle's ``released.json`` into its ``train.json`` and ``inference.json``, which MONAI Label reads alone.

    The overlay's ``%weights#...`` stand for parts of `description`; the ids that it calls decided are taken out of
    train.json and every other overlay, where they would have no effect, or the weights would not fit.

    Raises:
        ReleaseError: a bundle without this overlay.
    """
    if OVERLAY not in configs:
        raise ReleaseError(f"the bundle has no configs/{OVERLAY}, which says what a release changes in its configs")
    declared = configs[OVERLAY]
    for config in (configs[file] for file in configs if file not in NO_WORKFLOW):
        for key in [key for key in config if _is_decided(key, declared["decided"])]:
            del config[key]
    for file in ("train.json", "inference.json"):
        if file in configs:
            configs[file] = merge_overlay(configs[file], _resolved(declared.get(file, {}), description))
    if "pool.json" in configs:
        configs["pool.json"] = _fitted_pool(configs["pool.json"], description)


def _is_decided(key: str, decided: list[str]) -> bool:
    return any(key.startswith(entry) if entry.endswith("#") else key == entry for entry in decided)


def _resolved(overlay: Mapping[str, Any], description: Mapping[str, Any]) -> dict[str, Any]:
    """An overlay with the parts of the weights' description that its macros name."""
    others = {key: description[key] for key in SELDOM_SAID if key in description}
    parser = ConfigParser({**overlay, "weights": {**UNSAID, **description, "others": others}})
    parser.resolve_macro_and_relative_ids()
    return {key: value for key, value in parser.get().items() if key in overlay}


def merge_overlay(config: dict[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """A config with an overlay's ids, as ``--config_file "['train.json', overlay]"`` would have them."""
    parser = ConfigParser(config)
    for key, value in overlay.items():
        if key != "_desc_":
            merge_kv(parser, key, value)
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
    about = "The targets and data sets that the weights of this release know. A data set of your own is one more entry."
    return {"_desc_": about, "targets": description["targets"], "datasets": datasets}


def fill_metadata(
    metadata: dict[str, Any], description: Mapping[str, Any], name: str, trained_on: str | None, parameters: int
) -> None:
    """Let the metadata, in place, describe these weights; `name` is the one for display."""
    table, network = table_of(description), description["network"]
    modalities = description.get("modalities") or []
    modality, targets = "/".join(modalities or ["image"]), ", ".join(trained_targets(description))
    source = trained_on or ", ".join(description.get("trained_on", ())) or "not recorded"
    _fill_format(metadata["network_data_format"], description, modalities, modality)
    kind = network.get("name", "tsfm")
    method = "TSFM, the Tumor Segmentation Foundation Model," if kind == "tsfm" else f"A network ({kind})"
    if (needed := network.get("network", network).get("name")) in REQUIRED:  # an ensemble's own
        package, version = REQUIRED[needed]
        metadata["required_packages_version"][package] = version
    metadata["name"] = name
    metadata["task"] = f"Segmentation of {targets} in {modality}"
    metadata["description"] = (
        f"{method} of {parameters / 1e6:.3g} million parameters that segments {targets}. Trained on: {source}."
    )
    metadata["data_source"] = f"{source}; see docs/data_license.txt"
    channels = image_channels(description)
    metadata["image_classes"] = f"{channels} channel(s): {modality}, any size, spacing and orientation"
    values = ", ".join(f"{value} is {name}" for value, name in table.channel_def().items())
    metadata["label_classes"] = metadata["pred_classes"] = values


def _fill_format(data: dict[str, Any], description: Mapping[str, Any], modalities: list[str], modality: str) -> None:
    """``network_data_format``: what goes into the network and comes out, window by window."""
    table, channels = table_of(description), description["network"]["in_channels"]
    patch, images = list(description["patch_size"]), image_channels(description)
    names = [modality] if images == 1 else [f"image_{i}" for i in range(images)]
    names += ["clicks inside", "clicks outside"][: channels - images]
    data["inputs"].setdefault("image", {}).update(
        format="hounsfield" if modalities == ["CT"] else "magnitude",
        modality=modality,
        num_channels=channels,
        spatial_shape=patch,
        channel_def={str(i): name for i, name in enumerate(names)},
    )
    data["outputs"].setdefault("pred", {}).update(
        num_channels=len(table.names),
        spatial_shape=patch,
        value_range=[],  # logits
        channel_def=table.channel_def(),
    )


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
