"""What a staged bundle's README says about its weights, and the licences of their data.

A part stands between two comments, ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``; in a source bundle there is what
holds without weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsfm.cases.licences import licence_facts, weights_terms
from tsfm.schema import FileError, read_json
from tsfm.training.checkpoint import image_channels, table_of, trained_targets

from .fitting import merge_overlay


def write_readme(path: str, name: str, version: str, parts: Mapping[str, str]) -> None:
    """Fill the README's `parts` (name -> Markdown); where it has no place for the weights' table, append a section.

    Its commands get the release's `name` and `version` in place of those by which they unzip a bundle.
    """
    text = Path(path).read_text(encoding="utf-8") if os.path.isfile(path) else ""
    if unzipped := re.search(r"\b(\w+)_v\d\.\d\.\d\.zip", text):
        before = unzipped[1]
        text = re.sub(rf"\b{before}_v\d\.\d\.\d\b", f"{name}_v{version}", text)
        text = re.sub(rf"\b{before}\b", name, text)
    for part, content in parts.items():
        begin, end = f"<!-- {part}: begin -->", f"<!-- {part}: end -->"
        if begin in text and end in text:
            text = f"{text[: text.index(begin)]}{begin}\n{content}\n{text[text.index(end) :]}"
        elif part == "weights":
            text = f"{text.rstrip()}\n\n## The weights in this release\n\n{begin}\n{content}\n{end}\n"
    Path(path).write_text(text, encoding="utf-8")


def weights_table(
    description: Mapping[str, Any],
    metadata: Mapping[str, Any],
    parameters: int,
    licences: Mapping[str, Mapping[str, Any]],
    trained_on: str | None = None,
) -> str:
    """What the weights are: network, patch, preparation, data, and one row per target with those that annotated it for them."""
    table, preparation = table_of(description), description["preparation"]
    facts = {
        "version": metadata["version"],
        "network": _network(description["network"]),
        "parameters": f"{parameters:,}",
        "input": f"{image_channels(description)} channel(s), {', '.join(description.get('modalities', []))}",
        "patch (S, P, L)": " x ".join(map(str, description["patch_size"])),
        "voxel spacing in mm (S, P, L)": " x ".join(f"{mm:g}" for mm in preparation["spacing_mm"]),
        "normalization": _normalization(preparation),
        "trained on": trained_on or ", ".join(description.get("trained_on", [])),
        "licences of that data": weights_terms(licences),
        "taken after epoch": description.get("epoch", "unknown"),
    }
    scores, trained = _scores(metadata), trained_targets(description)
    seen = [name for name in table.datasets if name in description.get("trained_on", ())] or table.datasets
    rows = []
    for value, target in enumerate(table.names, start=1):
        annotators = ", ".join(name for name in seen if target in table.annotated(name))
        score = scores.get(target, "not evaluated" if target in trained else "not trained")
        rows.append((value, target, table.parent(target) or "", annotators, score))
    heads = ("value", "target", "lies in", "annotated by", "Dice")
    return f"{_table(('', ''), facts.items())}\n\n{_table(heads, rows)}"


def training_table(train: Mapping[str, Any], description: Mapping[str, Any], checkpoint: str) -> str:
    """How the staged train.json trains, and how these weights were trained, as far as a ``run.json`` beside them says."""
    here, there = training_facts(train), _facts_of_run(checkpoint)
    text = f"These weights were taken after epoch {description.get('epoch')} of their training. " * (
        "epoch" in description
    )
    if not there:
        text += (
            "How they were trained is not recorded beside them; `configs/train.json`, which trains on from them, says:"
        )
        return f"{text}\n\n{_table(('', 'configs/train.json'), here.items())}"
    text += "How these weights were trained, and what `configs/train.json`, which trains on from them, says:"
    rows = [(key, there.get(key, ""), here.get(key, "")) for key in {**there, **here}]
    return f"{text}\n\n{_table(('', 'these weights', 'configs/train.json'), rows)}"


def training_facts(train: Mapping[str, Any]) -> dict[str, str]:
    """What a train.json says about its training, in words; ids that it lacks are left out."""
    parts, step = train.get("train", {}), train.get("train", {}).get("step", {})
    transforms = parts.get("preprocessing", {}).get("transforms", [])
    found = {
        "optimizer": _component(train.get("optimizer"), ("params", "lr", "fused")),
        "learning rate": train.get("learning_rate"),
        "schedule": _component(train.get("lr_scheduler"), ("optimizer", "epochs", "t_total")),
        "epochs": train.get("epochs"),
        "iterations per epoch": train.get("iterations_per_epoch"),
        "batch size": train.get("batch_size"),
        "patch (S, P, L)": train.get("patch_size"),
        "loss": _component(train.get("loss"), ("table",)),
        "gradient clipped at": step.get("clip_norm"),
        "autocast": train.get("amp_dtype") if train.get("amp") else None,
        "mirrored along": train.get("mirror_axes"),
        "augmentation": ", ".join(_name(transform) for transform in transforms),
    }
    return {key: _text(value) for key, value in found.items() if value not in (None, "")}


def _facts_of_run(checkpoint: str) -> dict[str, str]:
    """`training_facts` of the run that left the checkpoint in its folder; empty where there is no record of one."""
    try:
        record = read_json(os.path.join(os.path.dirname(os.path.abspath(checkpoint)), "run.json"))
        config: dict[str, Any] = {}
        for content in record["configs"].values():
            config = merge_overlay(config, content)
        settings = record["settings"]
        config |= {key: settings[key] for key in settings if key in config} | {"epochs": record["epochs"]}
        config["amp"], config["amp_dtype"] = settings["amp"] != "off", settings["amp"]
        return training_facts(config) if "train" in config else {}
    except (FileError, OSError, KeyError, TypeError, AttributeError):
        return {}


def performance(metadata: Mapping[str, Any], metrics_of: str = "") -> str:
    """The scores that the release was given, and of what, or that it was given none."""
    scores = _scores(metadata)
    if not scores:
        return "These weights were not evaluated: `release --metrics summary.json` puts an evaluation's Dice here."
    mean = sum(map(float, scores.values())) / len(scores)
    return (
        f"Mean Dice over {len(scores)} targets: {mean:.3f}, in the evaluation that this release was made with; each target's "
        f"stands in the table above, the mean of its data sets' means. {metrics_of}".rstrip()
    )


def system_table(parameters: int, patch_size: Any) -> str:
    """Memory of these weights, by arithmetic: float32, without activations."""
    copies = {
        "weights in float32, for inference": 1,
        "weights, gradients and an optimizer's one moment (SGD)": 3,
        "with two moments (AdamW)": 4,
    }
    rows = [(what, f"{4e-6 * count * parameters:,.1f} MB") for what, count in copies.items()]
    window = " x ".join(map(str, patch_size))
    return f"{_table(('work', 'needs'), rows)}\n\nThe activations of windows of {window} voxels come on top."


def licences_seen(description: Mapping[str, Any], configs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Data set -> facts of its licence, as they travel with the weights; for older ones as the bundle's configs know them."""
    pools = [configs.get("pool.json", {}), *(config.get("pool_file") for config in configs.values())]
    known = {entry["name"]: entry for pool in pools if isinstance(pool, Mapping) for entry in pool.get("datasets", ())}
    seen = {name: licence_facts(known.get(name, {}).get("licence")) for name in description.get("trained_on", ())}
    return description.get("licences") or seen


def _scores(metadata: Mapping[str, Any]) -> dict[str, str]:
    found = metadata.get("eval_metrics", {})
    return {target: f"{dice:.3f}" for target, dice in found.items() if isinstance(dice, int | float)}


def _component(block: Any, without: tuple[str, ...]) -> str:
    """A config's component in words: its name, and its plain arguments."""
    if not isinstance(block, Mapping):
        return ""
    plain = {key: value for key, value in block.items() if key not in without and not key.startswith("_")}
    said = [f"{key} {_text(value)}" for key, value in plain.items() if not str(value).startswith(("@", "$", "%"))]
    return ", ".join([block["_target_"].split(".")[-1], *said])


def _name(transform: Any) -> str:
    """A transform of a config, by its class, and the one within it."""
    if not isinstance(transform, Mapping):
        return re.sub(r"^\$.*?(\w+)\(.*", r"\1", str(transform))
    name = str(transform.get("_target_", "")).split(".")[-1]
    return f"{name} ({_name(transform['transform'])})" if "transform" in transform else name


def _text(value: Any) -> str:
    return " x ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(head: Any, rows: Any) -> str:
    lines = [[_cell(value) for value in line] for line in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    """A value in one line, and in one column."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _network(arguments: Mapping[str, Any]) -> str:
    """Which network it is; several folds' are counted."""
    members = arguments.get("count")
    name = arguments.get("network", arguments).get("name", "tsfm")
    return ("TSFM" if name == "tsfm" else name) + (f", {members} folds whose logits are averaged" if members else "")


def _normalization(preparation: Mapping[str, Any]) -> str:
    ranges = [
        f"{modality}: clip to [{rule['lower']:g}, {rule['upper']:g}], minus {rule['mean']:g}, over {rule['sd']:g}"
        for modality, rule in (preparation.get("intensity") or {}).items()
    ]
    schemes = [f"channel {i}: {rule['scheme']}" for i, rule in enumerate(preparation.get("channels") or ())]
    others = "every other modality: " * bool(ranges)
    return "; ".join(schemes or [*ranges, f"{others}z-score per image and channel"])
