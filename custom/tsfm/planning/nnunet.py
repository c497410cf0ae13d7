"""A trained nnU-Net model folder (version 2 or 1) as what these bundles know: weights by name, and their description.

Nothing of nnU-Net is imported. Whatever would make the result differ from nnU-Net's own is refused by name: trainers that
change the network, readers that turn axes otherwise, other resampling, two-dimensional and cascaded configurations.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._version import __version__
from ..cases.cases import Preparation
from ..labels import LabelTable
from ..names import listed, plain_name
from ..network.networks import create_network
from ..schema import read_json
from ..training.weight_files import CheckpointError, load_file, misfits

# Trainers of nnU-Net 2.8.1 that change how is trained, not what: loss, augmentation, optimizer, length, sampling.
TRAINER = re.compile(
    r"nnUNetTrainer(Vanilla)?(Adam|Adan)?(1en1|1en3|3en4)?(CosAnneal)?(Benchmark)?(DA5|DA5ord0|DA5Segord0|NoDA)?"
    r"((Dice|CE|Topk10|DiceTopK10|DiceCE)Loss(LS01|_noSmooth)?)?(NoMirroring|NoDeepSupervision)?(_\d+ep(och)?s?)?"
    r"(_noDataLoading|_noDummy2DDA|_warmup|_DASegOrd0)?(_onlyMirror01(_1500ep|_DA5|_DASegOrd0)?)?"
    r"(_probabilisticOversampling(_\d+)?)?(_NoMirroring)?"
)

ORIENTATIONS = {"SimpleITKIO": "kji", "NibabelIO": "kji", "NibabelIOWithReorient": "SAR"}

SCHEMES = {
    "CTNormalization": "ct",
    "ZScoreNormalization": "zscore",
    "NoNormalization": "none",
    "RescaleTo01Normalization": "01",
    "RGBTo01Normalization": "rgb",
}

RESAMPLING = {"order_z": (0,), "force_separate_z": (None,), "is_seg": (False,)}

ORDERS = {"data": 3, "probabilities": 1}

KINDS = {"PlainConvUNet": "n_conv_per_stage", "ResidualEncoderUNet": "n_blocks_per_stage"}

FIXED = {  # arguments of the network that nnU-Net never changes, and what this package builds
    "conv_op": ("torch.nn.modules.conv.Conv3d", "torch.nn.Conv3d"),
    "norm_op": ("torch.nn.modules.instancenorm.InstanceNorm3d", "torch.nn.InstanceNorm3d"),
    "norm_op_kwargs": ({"eps": 1e-5, "affine": True},),
    "nonlin": ("torch.nn.LeakyReLU", "torch.nn.modules.activation.LeakyReLU"),
    "nonlin_kwargs": ({"inplace": True},),
    "dropout_op": (None,),
    "dropout_op_kwargs": (None, {}),
    "nonlin_first": (False,),
    "block": (None, "dynamic_network_architectures.building_blocks.residual.BasicBlockD"),
    "bottleneck_channels": (None,),
    "stem_channels": (None,),
    "deep_supervision": (True, False),
}


class Model(NamedTuple):
    """Tensors of each fold, named as `create_network` names them, and the description of one fold's network."""

    folds: dict[str, dict[str, Tensor]]
    description: dict[str, Any]


def read_model(
    folder: str, folds: Sequence[int | str] | None = None, checkpoint: str = "checkpoint_final.pth", trainer: str = ""
) -> Model:
    """The model in `folder`, which holds ``plans.json``, ``dataset.json`` and ``fold_X/checkpoint_final.pth``.

    Args:
        folds: which; by default all that are there (``fold_all`` only where there are no others).
        checkpoint: name of the file in each fold's folder.
        trainer: a trainer of your own that leaves plans' network, preprocessing and labels as they are.

    Raises:
        CheckpointError: no such model, a missing fold, tensors that do not fit the plans, or anything that is done
            differently here than it was there.
    """
    plans, dataset = (_read_json(folder, name) for name in ("plans.json", "dataset.json"))
    description, weights = None, {}
    for fold, path in find_folds(folder, folds, checkpoint).items():
        content = load_file(path)
        if description is None:
            description = describe(content, plans, dataset, path, trainer)
        weights[fold] = rename(content["network_weights"], description["network"], path)
    return Model(weights, description)


def find_folds(folder: str, folds: Sequence[int | str] | int | str | None, checkpoint: str) -> dict[str, str]:
    """Name of each fold to read, and its checkpoint; version 1 keeps that of all cases in ``all``, not in ``fold_all``."""
    present = {
        name.removeprefix("fold_"): os.path.join(folder, name, checkpoint)
        for name in sorted(os.listdir(folder))
        if (name == "all" or name.startswith("fold_")) and os.path.isfile(os.path.join(folder, name, checkpoint))
    }
    asked = [folds] if isinstance(folds, int | str) else folds
    wanted = [fold for fold in present if fold != "all"] or present if asked is None else [str(fold) for fold in asked]
    missing = [fold for fold in wanted if fold not in present]
    if missing or not wanted:
        raise CheckpointError(
            f"{folder}: no {checkpoint} in {', '.join(f'fold_{fold}' for fold in missing) or 'any fold'}; "
            f"found folds: {', '.join(present) or 'none'}"
        )
    return {fold: present[fold] for fold in wanted}


def describe(
    content: Mapping[str, Any],
    plans: Mapping[str, Any],
    dataset: Mapping[str, Any],
    source: str,
    trainer: str = "",
) -> dict[str, Any]:
    """The description of a version 2 checkpoint's network, with its plans and data set."""
    missing = {"network_weights", "trainer_name", "init_args"} - set(content)
    if missing:
        raise CheckpointError(f"{source} is no checkpoint of nnU-Net 2: it lacks {sorted(missing)}")
    name = content["trainer_name"]
    check_trainer(name, TRAINER, trainer, source)
    configuration = _configuration(plans, content["init_args"]["configuration"], source)
    channels = list((dataset.get("channel_names") or dataset.get("modality") or {}).values())
    table, softmax = _labels(dataset, plans.get("dataset_name", "nnunet"), source)
    outputs = len(table["targets"]) + softmax
    network = _network(configuration, len(channels), outputs, source)
    preparation = _preparation(plans, configuration, channels, source)
    mirrored = content.get("inference_allowed_mirroring_axes") or ()
    return {
        **whole_description(network, table, preparation),
        "mirror_axes": "".join("SPL"[axis] for axis in mirrored),
        "epoch": content.get("current_epoch"),
        "trained_by": f"nnU-Net 2, {name}",
        "activation": "softmax" if softmax else "regions",
    }


def check_trainer(name: str, known: re.Pattern, trusted: str, source: str) -> None:
    """CheckpointError for a trainer that may have changed more than the training."""
    if name != trusted and not known.fullmatch(name):
        raise CheckpointError(
            f"{source}: trainer '{name}' is unknown, so its network and preprocessing may be its own; if it only trains "
            f"otherwise, say so: --trainer {name}"
        )


def whole_description(
    network: Mapping[str, Any], table: Mapping[str, Any], preparation: Mapping[str, Any]
) -> dict[str, Any]:
    """What is said of imported weights, whatever version trained them."""
    return {
        "format": 1,
        "version": __version__,
        "network": network,
        **table,
        "preparation": preparation,
        "patch_size": network["img_size"],
        "modalities": [preparation["default_modality"]],
        "trained_on": [table["dataset_labels"][0]["name"]],
    }


def rename(state: Mapping[str, Tensor], network: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The tensors of nnU-Net's network by the names that `create_network` gives them.

    Raises:
        CheckpointError: tensors that are missing, superfluous, of another shape, or two of one thing that differ.
    """
    found, problems = {}, []
    for name, value in state.items():
        name = name.removeprefix("module.").removeprefix("_orig_mod.").replace("decoder.encoder.", "encoder.")
        name = "net." + name.replace(".conv.", ".all_modules.0.").replace(".norm.", ".all_modules.1.")
        if name in found and not torch.equal(found[name], value):
            problems.append(f"{name}: stored twice, with different values")
        found[name] = value
    with torch.device("meta"):
        own = create_network(**network).state_dict()
    own.pop("_extra_state")
    problems += misfits(found, own)
    if problems:
        shown = listed(problems, between="\n  ")
        raise CheckpointError(f"{source} does not fit the plans ({len(problems)} tensors):\n  {shown}")
    return found


def _read_json(folder: str, name: str) -> dict[str, Any]:
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        raise CheckpointError(
            f"{os.path.abspath(folder)} is no model folder of nnU-Net 2: it has no {name}; expected "
            "DatasetNNN_NAME/TRAINER__PLANS__CONFIGURATION with plans.json, dataset.json and fold_0/checkpoint_final.pth, or "
            "a weight file (model.pt)"
        )
    return read_json(path, error=CheckpointError)


def _configuration(plans: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    """The configuration `name` with what it inherits, checked for what is not done here."""
    found = plans["configurations"].get(name)
    if found is None:
        raise CheckpointError(
            f"{source}: configuration '{name}' is not in plans.json; it has {list(plans['configurations'])}"
        )
    if "inherits_from" in found:
        found = {**_configuration(plans, found["inherits_from"], source), **found}
    if len(found["patch_size"]) != 3:
        raise CheckpointError(f"{source}: configuration '{name}' is two-dimensional; only 3D networks can be imported")
    if found.get("previous_stage"):
        raise CheckpointError(f"{source}: configuration '{name}' is the second stage of a cascade; import 3d_fullres")
    if found.get("preprocessor_name", "DefaultPreprocessor") != "DefaultPreprocessor":
        raise CheckpointError(
            f"{source}: preprocessor '{found['preprocessor_name']}' is unknown; expected DefaultPreprocessor"
        )
    for what, order in ORDERS.items():
        function = found.get(f"resampling_fn_{what}", "resample_data_or_seg_to_shape")
        options = found.get(f"resampling_fn_{what}_kwargs", {})
        allowed = {**RESAMPLING, "order": (order,)}
        strange = {key: value for key, value in options.items() if value not in allowed.get(key, ())}
        if function != "resample_data_or_seg_to_shape" or strange:
            raise CheckpointError(f"{source}: resampling of {what} by {function} {strange or ''} is not done here")
    return found


def _network(configuration: Mapping[str, Any], inputs: int, outputs: int, source: str) -> dict[str, Any]:
    """Arguments of `create_network` out of the plan's architecture; plans older than 2.3.1 spell it otherwise."""
    if "architecture" in configuration:
        kind = configuration["architecture"]["network_class_name"].rsplit(".", 1)[-1]
        given = dict(configuration["architecture"]["arch_kwargs"])
    elif "UNet_class_name" in configuration:
        kind, encoder = configuration["UNet_class_name"], configuration["n_conv_per_stage_encoder"]
        base, most = configuration["UNet_base_num_features"], configuration["unet_max_num_features"]
        given = {
            "n_stages": len(encoder),
            "features_per_stage": [min(base * 2**level, most) for level in range(len(encoder))],
            "kernel_sizes": configuration["conv_kernel_sizes"],
            "strides": configuration["pool_op_kernel_sizes"],
            KINDS.get(kind, ""): encoder,
            "n_conv_per_stage_decoder": configuration["n_conv_per_stage_decoder"],
            "conv_bias": True,
        }
    else:
        raise CheckpointError(
            f"{source}: plans.json says nothing of the network: neither architecture nor UNet_class_name"
        )
    if kind not in KINDS:
        raise CheckpointError(f"{source}: network '{kind}' cannot be imported; expected one of {list(KINDS)}")
    levels = given.pop("n_stages")

    def per_level(key: str, count: int = levels, axes: bool = False) -> list:
        value = given.pop(key)
        value = value if isinstance(value, list) else [value] * count
        return [row if isinstance(row, list) or not axes else [row] * 3 for row in value]

    strides = per_level("strides", axes=True)
    arguments = {
        "name": "nnunet",
        "in_channels": inputs,
        "out_channels": outputs,
        "img_size": list(configuration["patch_size"]),
        "features": per_level("features_per_stage"),
        "strides": strides[1:],
        "kernel_sizes": per_level("kernel_sizes", axes=True),
        "depths_down": per_level(KINDS[kind]),
        "depths_up": per_level("n_conv_per_stage_decoder", levels - 1)[::-1],
        "residual": kind == "ResidualEncoderUNet",
        "bias": given.pop("conv_bias", False),
    }
    strange = {key: value for key, value in given.items() if value not in FIXED.get(key, ())}
    if strange or any(side != 1 for side in strides[0]):
        raise CheckpointError(f"{source}: a {kind} with {strange or {'strides': strides}} is not built here")
    return {**arguments, "deep_supervision": True, "checkpointing": False}


def _labels(dataset: Mapping[str, Any], name: str, source: str) -> tuple[dict[str, Any], bool]:
    """Targets and data set of a label table, and whether the network ends in a softmax (background first)."""
    labels = {key: ids for key, ids in dataset["labels"].items() if key != "ignore"}
    regions = any(isinstance(ids, list) and len(ids) > 1 for ids in labels.values())
    sets = {plain_name(key): {int(i) for i in (ids if isinstance(ids, list) else [ids])} for key, ids in labels.items()}
    sets = {key: ids for key, ids in sets.items() if ids != {0}}
    if len(sets) != len(labels) - 1 or any(0 in ids for ids in sets.values()):
        raise CheckpointError(f"{source}: labels {dict(labels)}; expected background 0 and names that differ")
    if not regions:
        sets = dict(sorted(sets.items(), key=lambda item: min(item[1])))
    raw_ids = sorted(set().union(*sets.values()))
    entry = {
        "name": plain_name(name),
        "labels": {str(i): [key for key, ids in sets.items() if i in ids] for i in raw_ids},
        **({"ignore": [int(dataset["labels"]["ignore"])]} if "ignore" in dataset["labels"] else {}),
    }
    targets = _nested(sets)
    if LabelTable(targets, [entry]).paint_order() != tuple(range(len(targets))):
        targets = {key: {} for key in targets}  # nnU-Net paints in the declared order, whatever lies in what
    return {"targets": targets, "dataset_labels": [entry]}, not regions


def _nested(sets: Mapping[str, set[int]]) -> dict[str, dict[str, str]]:
    """Targets, each inside the smallest earlier one that holds its ids."""
    targets: dict[str, dict[str, str]] = {}
    for name, ids in sets.items():
        around = [other for other in targets if ids < sets[other]]
        targets[name] = {"inside": min(around, key=lambda other: len(sets[other]))} if around else {}
    return targets


def _preparation(
    plans: Mapping[str, Any], configuration: Mapping[str, Any], channels: Sequence[str], source: str
) -> dict[str, Any]:
    reader = plans.get("image_reader_writer", "SimpleITKIO")
    if reader not in ORIENTATIONS:
        raise CheckpointError(f"{source}: reader '{reader}' is unknown; expected one of {list(ORIENTATIONS)}")
    schemes = configuration["normalization_schemes"]
    unknown = [scheme for scheme in schemes if scheme not in SCHEMES]
    if unknown or len(schemes) != len(channels):
        raise CheckpointError(
            f"{source}: normalization {unknown or schemes} for channels {channels}; expected one of {list(SCHEMES)} for each"
        )
    statistics = plans.get("foreground_intensity_properties_per_channel") or {}
    rules = [
        channel_rule(SCHEMES[scheme], statistics.get(str(index)), configuration["use_mask_for_norm"][index])
        for index, scheme in enumerate(schemes)
    ]
    orientation = "".join(ORIENTATIONS[reader][axis] for axis in plans["transpose_forward"])
    spacing, count = configuration["spacing"], len(channels)
    return Preparation(spacing, in_channels=count, orientation=orientation, **by_modality(rules)).to_dict()


def channel_rule(scheme: str, statistics: Mapping[str, Any], masked: Any) -> dict[str, Any]:
    """A rule of `Preparation.channels`; the spread is named ``std`` in version 2, ``sd`` in version 1."""
    if scheme == "ct":
        lower, upper, mean = (float(statistics[key]) for key in ("percentile_00_5", "percentile_99_5", "mean"))
        sd = float(statistics["std"] if "std" in statistics else statistics["sd"])
        return {"scheme": scheme, "lower": lower, "upper": upper, "mean": mean, "sd": sd}
    return {"scheme": scheme, "masked": bool(masked)} if scheme == "zscore" else {"scheme": scheme}


def by_modality(rules: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rules of all channels as a `Preparation` says them: one for the modality, where that is enough."""
    first = rules[0]
    if len(rules) == 1 and first["scheme"] == "ct":
        numbers = {key: value for key, value in first.items() if key != "scheme"}
        return {"default_modality": "CT", "intensity": {"CT": numbers}}
    if all(rule == first for rule in rules) and first["scheme"] == "zscore":
        return {"default_modality": "MR", "masked": {"MR": first["masked"]}}
    return {"default_modality": "MR", "channels": [dict(rule) for rule in rules]}
