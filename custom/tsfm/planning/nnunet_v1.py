"""A trained model folder of nnU-Net 1 in the terms of nnunet.py: its plain U-Net is nnU-Net 2's with some biases of 0.

Its decoder has on each level the kernel of the next deeper one. Where the two differ (1x3x3 and 3x3x3) the level's kernels
are as large as the larger, the smaller with zeros around.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cases.cases import Preparation
from ..training.safe_pickle import read_pickle
from ..training.weight_files import CheckpointError, load_file
from .nnunet import Model, by_modality, channel_rule, check_trainer, find_folds, rename, whole_description

CHECKPOINT = "model_final_checkpoint.model"

TRAINER = re.compile(r"nnUNetTrainerV2(_noMirroring|_DA5|_insaneDA|_noDataAugmentation|_SGD_.*|_Adam.*|_Loss_.*)?")

SCHEMES = {"CT": "ct", "nonCT": "zscore", "noNorm": "none"}

PREPROCESSOR = "GenericPreprocessor"

EXPORT = {"force_separate_z": None, "interpolation_order": 1, "interpolation_order_z": 0}
"""How version 1 resamples its results, where plans say nothing of it."""


def read_model(
    folder: str, folds: Sequence[int | str] | None = None, checkpoint: str = CHECKPOINT, trainer: str = ""
) -> Model:
    """The model in `folder`, which holds ``plans.pkl`` and ``fold_X/model_final_checkpoint.model`` with its ``.pkl``, or
    ``all/...``.

    Raises:
        CheckpointError: as `nnunet.read_model`.
    """
    description, weights = None, {}
    for fold, path in find_folds(folder, folds, checkpoint).items():
        weights[fold], described = read_checkpoint(path, trainer)
        description = description or described
    return Model(weights, description)


def read_checkpoint(path: str, trainer: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of one ``.model`` file with its ``.model.pkl``."""
    information = read_pickle(path + ".pkl")
    name, plans = information["name"], information["plans"]
    check_trainer(name, TRAINER, trainer, path)
    stage = _trained_stage(information, path)
    if stage and name.endswith("CascadeFullRes"):
        raise CheckpointError(f"{path} is the second stage of a cascade; import 3d_fullres")
    _check_plans(plans, path)
    state = load_file(path)["state_dict"]
    description = describe(state, plans, plans["plans_per_stage"][stage], name, path)
    tensors = _padded(_as_version_2(state), _kernels(plans["plans_per_stage"][stage]))
    return rename(tensors, description["network"], path), description


def _trained_stage(information: Mapping[str, Any], path: str) -> int:
    """Which of the plans' stages: the sixth of the trainer's arguments, left out where the plans have one only."""
    stages, arguments = information["plans"]["plans_per_stage"], information.get("init") or ()
    stage = arguments[5] if len(arguments) > 5 else None
    if stage is None and len(stages) == 1:
        (stage,) = stages
    if stage not in list(stages):
        raise CheckpointError(
            f"{path}.pkl: the plans have the stages {sorted(stages)}, and the one that was trained is {stage}; expected one "
            'of them as the sixth entry of "init", where nnU-Net keeps its trainer\'s arguments'
        )
    return stage


def _check_plans(plans: Mapping[str, Any], path: str) -> None:
    """CheckpointError for preprocessing or resampling that is not done here."""
    if (name := plans.get("preprocessor_name") or PREPROCESSOR) != PREPROCESSOR:
        raise CheckpointError(f"{path}.pkl: preprocessor '{name}' is unknown; expected {PREPROCESSOR}")
    if (options := {**EXPORT, **plans.get("segmentation_export_params", {})}) != EXPORT:
        raise CheckpointError(f"{path}.pkl: resampling of results by {options} is not done here; expected {EXPORT}")


def describe(
    state: Mapping[str, Tensor], plans: Mapping[str, Any], stage: Mapping[str, Any], trainer: str, source: str
) -> dict[str, Any]:
    """The description of a version 1 checkpoint's network."""
    patch = [int(side) for side in stage["patch_size"]]
    if len(patch) != 3:
        raise CheckpointError(f"{source}: patch {patch} is two-dimensional; only 3D networks can be imported")
    strides = _strides(stage)
    levels = len(strides) + 1
    kernels = _kernels(stage)
    heads = state[f"seg_outputs.{len(strides) - 1}.weight"]
    features = [_first_conv(state, level).shape[0] for level in range(levels)]
    depth = int(plans.get("conv_per_stage", 2))
    network = {
        "name": "nnunet",
        "in_channels": int(_first_conv(state, 0).shape[1]),
        "out_channels": len(heads),
        "img_size": patch,
        "features": features,
        "strides": strides,
        "kernel_sizes": [*map(_larger, kernels, kernels[1:]), kernels[-1]],
        "depths_down": [depth] * levels,
        "depths_up": [depth] * (levels - 1),
        "residual": False,
        "bias": True,
        "deep_supervision": True,
        "checkpointing": False,
    }
    rules = _rules(plans, network["in_channels"], source)
    preparation = Preparation(
        [float(mm) for mm in stage["current_spacing"]],
        in_channels=network["in_channels"],
        orientation="".join("kji"[int(axis)] for axis in plans.get("transpose_forward", (0, 1, 2))),
        resample_first=True,
        **by_modality(rules),
    ).to_dict()
    names = [f"label_{value}" for value in range(1, len(heads))]
    labels = {str(value): [name] for value, name in enumerate(names, 1)}
    table = {"targets": {name: {} for name in names}, "dataset_labels": [{"name": "nnunet", "labels": labels}]}
    return {
        **whole_description(network, table, preparation),
        "mirror_axes": "" if re.search("noMirroring|noDataAugmentation", trainer) else "SPL",
        "activation": "probabilities",
        "trained_by": f"nnU-Net 1, {trainer}",
    }


def _strides(stage: Mapping[str, Any]) -> list[list[int]]:
    """Strides of all levels but the first; older plans only count how often each axis is halved."""
    if "pool_op_kernel_sizes" in stage:
        return [[int(n) for n in row] for row in stage["pool_op_kernel_sizes"]]
    pools = stage["num_pool_per_axis"]
    return [[1 + (max(pools) - n <= level) for n in pools] for level in range(max(pools))]


def _kernels(stage: Mapping[str, Any]) -> list[list[int]]:
    """Kernel of each level of the encoder; older plans do not say that it is 3x3x3."""
    return [[int(n) for n in row] for row in stage.get("conv_kernel_sizes", [[3, 3, 3]] * (len(_strides(stage)) + 1))]


def _larger(one: Sequence[int], other: Sequence[int]) -> list[int]:
    return [max(pair) for pair in zip(one, other, strict=True)]


def _padded(state: Mapping[str, Tensor], kernels: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Tensors named as version 2's, kernels (as the plans have them) with zeros around where their level has larger ones."""
    found = dict(state)
    for name, value in state.items():
        match = re.fullmatch(r"(encoder|decoder)\.stages\.(\d+)\..*\.conv\.weight", name)
        level = match and (int(match[2]) if match[1] == "encoder" else len(kernels) - 2 - int(match[2]))
        if not match or not 0 <= level < len(kernels) - 1:
            continue
        own = kernels[level + (match[1] == "decoder")]
        if list(value.shape[2:]) == list(own):  # else it does not fit, and is said to
            wanted = _larger(kernels[level], kernels[level + 1])
            sides = [(new - old) // 2 for old, new in zip(own, wanted, strict=True)]
            found[name] = torch.nn.functional.pad(value, [side for side in sides[::-1] for _ in range(2)])
    return found


def _rules(plans: Mapping[str, Any], channels: int, source: str) -> list[dict[str, Any]]:
    schemes = [plans["normalization_schemes"][channel] for channel in range(channels)]
    if unknown := [scheme for scheme in schemes if scheme not in SCHEMES]:
        raise CheckpointError(f"{source}: normalization '{unknown[0]}' is unknown; expected one of {list(SCHEMES)}")
    statistics = plans.get("dataset_properties", {}).get("intensityproperties") or {}
    return [
        channel_rule(SCHEMES[scheme], statistics.get(channel), plans["use_mask_for_norm"][channel])
        for channel, scheme in enumerate(schemes)
    ]


def _first_conv(state: Mapping[str, Tensor], level: int) -> Tensor:
    """The first kernel of a level; the lowest one is a Sequential of two stacks."""
    name = f"conv_blocks_context.{level}.blocks.0.conv.weight"
    return state[name] if name in state else state[f"conv_blocks_context.{level}.0.blocks.0.conv.weight"]


def _as_version_2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Version 1's names in version 2's; transposed convolutions and heads get biases of 0, which they lack there."""
    found, counts = {}, {}
    for name, value in state.items():
        name = name.removeprefix("module.")
        block = re.fullmatch(
            r"conv_blocks_(context|localization)\.(\d+)\.(?:(\d+)\.)?blocks\.(\d+)\.(conv|instnorm)\.(\w+)", name
        )
        if block:
            where, level, stack, index, what, kind = block.groups()
            base = f"encoder.stages.{level}.0" if where == "context" else f"decoder.stages.{level}"
            first = counts.setdefault(f"{base}.{stack}", _blocks_before(state, where, level, stack))
            what = "norm" if what == "instnorm" else "conv"
            found[f"{base}.convs.{first + int(index)}.{what}.{kind}"] = value
        elif match := re.fullmatch(r"(tu|seg_outputs)\.(\d+)\.(weight|bias)", name):
            part = "transpconvs" if match[1] == "tu" else "seg_layers"
            found[f"decoder.{part}.{match[2]}.{match[3]}"] = value
        else:
            found[name] = value  # named in the error
    for name in [name for name in found if re.fullmatch(r"decoder\.(transpconvs|seg_layers)\.\d+\.weight", name)]:
        outputs = found[name].shape[1 if "transpconvs" in name else 0]
        found.setdefault(name.removesuffix("weight") + "bias", torch.zeros(outputs))
    return found


def _blocks_before(state: Mapping[str, Tensor], where: str, level: str, stack: str | None) -> int:
    """Convolutions of the stacks before this one on the same level."""
    pattern = re.compile(rf"(?:module\.)?conv_blocks_{where}\.{level}\.(\d+)\.blocks\.\d+\.conv\.weight")
    before = [match for name in state if (match := pattern.fullmatch(name)) and int(match[1]) < int(stack or 0)]
    return len(before)
