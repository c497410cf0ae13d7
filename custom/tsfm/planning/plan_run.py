"""The plan of a fine-tuning run: spacing, patch, strides, batch and network, from the data or from a file.

What the data, the budget and the weights ask of the planner, and what is wrong with them, is found here, before any case is
prepared.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch

from ..cases.folders import PoolError
from ..cases.pool import DatasetPool
from ..network.networks import LEVEL_STRIDES
from ..preparation.fingerprint import Fingerprint, plan_spacing
from ..schema import FileError, read_json
from .families import FAMILIES, TRANSFORMER, Family
from .own_data import pretrained_description
from .plan import pool_fingerprint
from .planner import MIN_BATCH, Budget, Plan, PlanError, coarse_spacing, plan, plan_patch, shown

logger = logging.getLogger(__name__)

CPU_STEP_SECONDS = 1.0

SMALL_SIGHT = 0.25  # of the voxels of nnU-Net's own patch: a patch with fewer shows too little of a case

GPU_SHARE = 0.9  # of a GPU's memory, the rest is for fragments

SEEN_VOXELS = 4  # a structure of fewer voxels along an axis is barely visible to the network

FAR_SPACING = 2.0


def plan_run(
    pool: DatasetPool,
    store_dir: str,
    spacing_mm: Sequence[float] | str = "auto",
    patch_size: Sequence[int] | str = "auto",
    batch_size: int | str = "auto",
    network_size: str = "auto",
    pretrained: str | None = None,
    memory_gb: float | None = None,
    step_seconds: float | None = None,
    device: str | torch.device = "cpu",
    in_channels: int = 1,
    fold: int | str = 0,
    checkpointing: bool | str = False,
    plan_file: str | None = None,
    num_workers: int = 0,
    network_name: str | None = None,
) -> Plan:
    """The plan of a fine-tuning run, by nnU-Net's rule from the data; printed.

    Args:
        spacing_mm: millimetres (S, P, L); ``"auto"``: nnU-Net's target spacing; ``"coarse"``: nnU-Net's spacing of the low
            resolution, where a patch would see less than a quarter of a case; ``"checkpoint"``: the weights'.
        patch_size, batch_size: voxels (S, P, L) and cases, or ``"auto"``. A patch may be ``"checkpoint"``: the weights'
            patch and strides, no larger than the median case.
        network_size: ``"auto"``, or a name of `families.FAMILIES`; TSFM weights bring their own network.
        memory_gb: of a GPU; default: nine tenths of what it has.
        step_seconds: of one CPU core for a training step; default on a CPU: 1.
        plan_file: a ``plan.json``: then nothing is planned. To weights it gives strides and kernels.
        num_workers: processes that read cases where these were not measured before.
        network_name: a network of `create_network` to put in the place of the size's; its patch and batch are as for that.

    Raises:
        PoolError, PlanError: data or a budget for which there is no plan, before anything long.
    """
    if plan_file is not None:
        asked = {
            "spacing_mm": spacing_mm, "patch_size": patch_size, "batch_size": batch_size, "network_size": network_size,
        }  # fmt: skip
        return _read_plan(plan_file, asked, pretrained, network_name)
    by_weights = pretrained is not None or not pool.entries or "checkpoint" in (spacing_mm, patch_size)
    description = pretrained_description(pretrained) if by_weights else None
    patch = None if isinstance(patch_size, str) else [int(side) for side in patch_size]
    batch = None if batch_size == "auto" else int(batch_size)
    if not pool.entries:  # items come from outside (MONAI Label): there is no data to plan by
        spacing = description["preparation"]["spacing_mm"] if isinstance(spacing_mm, str) else spacing_mm
        return plan_patch(patch or description["patch_size"], spacing, weights_family(description), batch or MIN_BATCH)
    orientation = ((description or {}).get("preparation") or {}).get("orientation", "SPL")
    found = pool_fingerprint(pool, store_dir, num_workers, orientation)
    check_data(pool, found, fold)
    if description is None:
        family = FAMILIES.get(network_size)
    else:
        family = weights_family(description, has_strides=patch_size == "checkpoint")
        if network_size != "auto":
            logger.warning(
                "the pretrained weights bring their own network: network_size %s has no effect", network_size
            )
    options = {
        "network": family or network_size, "cases": len(pool.cases), "in_channels": in_channels,
        "out_channels": len(pool.table.names), "patch_size": patch, "batch_size": batch, "checkpointing": checkpointing,
    }  # fmt: skip
    budget = _budget(memory_gb, step_seconds, device, _decided(family, patch, batch))

    def planned(budget: Budget) -> Plan:
        spacing = _spacing(spacing_mm, found, description)
        result = plan(found.median_prepared_shape(spacing), spacing, budget=budget, **options)
        if spacing_mm == "coarse":
            spacing = coarse_spacing(result, budget=budget, **options)
            result = plan(found.median_prepared_shape(spacing), spacing, budget=budget, **options)
        return result

    try:
        result = planned(budget)
    except PlanError:
        if description is None or memory_gb is not None or step_seconds is not None or budget.step_seconds is None:
            raise
        logger.warning("these weights exceed %s on a CPU: planning by nnU-Net's 8 GB instead", budget)
        budget = Budget(memory_gb=8)
        result = planned(budget)
    if spacing_mm == "auto" and patch is None and not (family and family.strides):
        warn_of_small_patch(result, budget, options)
    warn_of_small_structures(pool, found, result.spacing_mm)
    if description is None:
        result = _of_network(result, network_name)
    else:
        warn_of_distance(description, pool, result.spacing_mm)
    logger.info("%s", describe_plan(result, budget, pretrained))
    return result


def _of_network(found: Plan, name: str | None) -> Plan:
    """The plan for another network than its own, of whose levels and cost nothing is known."""
    if name in (None, found.create_arguments()["name"]):
        return found
    unknown = {"features": (), "blocks_down": (), "blocks_up": (), "strides": (), "kernel_sizes": ()}
    return replace(found, network=name, parameters=0, memory_gb=0.0, step_seconds=0.0, **unknown)


def describe_plan(plan: Plan, budget: Budget | None = None, pretrained: str | None = None) -> str:
    """A plan in words, for a terminal."""
    limits = str(budget or "")
    start = f"starts from {pretrained}" if pretrained else "starts from nothing: no pretrained weights were given"
    strides = " ".join("".join(map(str, stride)) for stride in plan.strides)
    kernels = " ".join("".join(map(str, kernel)) for kernel in plan.kernel_sizes)
    levels = f"{len(plan.features)}: features {' '.join(map(str, plan.features))}, strides {strides}, kernels {kernels}"
    size = f", {plan.parameters / 1e6:.3g} million parameters" if plan.parameters else ""
    memory = f"{plan.memory_gb:g} GB" if plan.memory_gb >= 1 else f"{plan.memory_gb * 1000:g} MB"
    cost = f"{memory} on a GPU, {plan.step_seconds:g} s a step on one CPU core" if plan.memory_gb else "none"
    return "\n".join(
        (
            f"plan{limits and f' for {limits}'} (S, P, L):",
            f"  spacing   {shown(plan.spacing_mm)} mm, median case {shown(plan.median_shape)} voxels",
            f"  patch     {shown(plan.patch_size)}, batch {plan.batch_size}",
            f"  network   {plan.network}{size}; {start}",
            f"  levels    {levels if plan.features else 'as network_def says; patch and batch are as for --network_size'}",
            f"  estimate  {cost}",
        )
    )


def weights_family(description: Mapping[str, Any], has_strides: bool = True) -> Family:
    """The network of given weights as the planner wants it. TSFM's strides and kernels may also follow from the data."""
    network = description["network"]
    strides = tuple(map(tuple, network.get("strides", LEVEL_STRIDES)))
    levels = len(strides) + 1
    kernels, patch = network.get("kernel_sizes") or (), description.get("patch_size") or network["img_size"]
    own = {
        "levels": (levels, levels), "widths": tuple(network.get("features", (0,) * levels)), "strides": strides,
        "kernel_sizes": tuple(map(tuple, kernels)), "patch": tuple(patch),
    }  # fmt: skip
    down, up = (tuple(network.get(key, (1,))) for key in ("depths_down", "depths_up"))
    if network.get("name", "tsfm") != "tsfm":
        return Family("weights", "fixed", 0, 0, down, up, **own)
    if not has_strides:
        own |= {"strides": (), "kernel_sizes": ()}
    if network.get("bottleneck", True):
        own["transformer"] = tuple(network[key] for key in TRANSFORMER)
    return Family("weights", "tsfm", 0, 0, down, up, skip=network.get("skip", "add"), **own)


def check_data(pool: DatasetPool, found: Fingerprint, fold: int | str) -> None:
    """Refuse data that cannot be learned from.

    Raises:
        PoolError: a single case of which none is left to validate on, labels that are in no case.
    """
    if len(pool.cases) == 1 and fold != "all":
        raise PoolError(
            f"{pool.source} holds a single case, so that none would be left to validate on: add cases, or train on it "
            "alone with --fold all (the weights will then know this case only)"
        )
    absent = [
        f"{raw} ({meaning})"
        for name, entry in pool.summary()["datasets"].items()
        for raw, meaning in entry["labels"].items()
        if raw in pool.table.label_rules(name)["labels"] and raw not in found.extents_mm.get(name, {})
    ]
    if absent:
        raise PoolError(
            f"{pool.source}: of the {len(pool.cases)} cases none has a voxel of the labels {', '.join(absent)}: nothing could "
            f"be learned of them; check the label files, or take them out of {pool.labels_in}"
        )


def warn_of_small_patch(found: Plan, budget: Budget, numbers: Mapping[str, Any]) -> None:
    """Say where the budget leaves a patch far below nnU-Net's own, and which voxels it would suit; `numbers`: see `plan`."""
    usual = plan(found.median_shape, found.spacing_mm, "nnunet", cases=numbers["cases"]).patch_size
    if prod(found.patch_size) >= SMALL_SIGHT * prod(usual):
        return
    coarse = coarse_spacing(found, budget=budget, **numbers)
    if coarse == found.spacing_mm:
        return
    logger.warning(
        "a patch of %s voxels holds %.1f%% of the median case (nnU-Net's own: %s voxels, for a GPU): larger structures are "
        "never seen whole, and a case takes many windows. --spacing_mm coarse plans for voxels of %s mm, of which a patch "
        "holds a quarter of a case; a larger budget (--step_seconds on a CPU, --memory_gb on a GPU) gives a larger patch",
        shown(found.patch_size), 100 * prod(found.patch_size) / prod(found.median_shape), shown(usual), shown(coarse),
    )  # fmt: skip


def warn_of_small_structures(pool: DatasetPool, found: Fingerprint, spacing_mm: Sequence[float]) -> None:
    """Name structures of which a spacing coarser than the images' leaves fewer than four voxels along an axis."""
    own = found.median_spacing_mm
    coarser = [axis for axis in range(3) if spacing_mm[axis] > 1.05 * own[axis]]
    datasets = pool.summary()["datasets"]
    for name, extents in found.extents_mm.items():
        for raw, extent in extents.items():
            voxels = [mm / spacing for mm, spacing in zip(extent, spacing_mm, strict=True)]
            if any(voxels[axis] < SEEN_VOXELS for axis in coarser):
                logger.warning(
                    "spacing %s mm (S, P, L) is coarse for %s: at its smallest it is %s voxels; the images have %s mm, give "
                    "--spacing_mm auto or finer numbers",
                    shown(spacing_mm, 3), datasets[name]["labels"][raw], shown(voxels, 3), shown(own, 3),
                )  # fmt: skip


def warn_of_distance(description: Mapping[str, Any], pool: DatasetPool, spacing_mm: Sequence[float]) -> None:
    """Say in which way pretrained weights are far from the data: no common target, no common modality, spacing."""
    targets, modalities = list(description.get("targets", ())), list(description.get("modalities", ()))
    if targets and not set(targets) & set(pool.table.names):
        logger.warning(
            "the weights know none of the targets %s: the body of the network is kept, all heads start anew",
            list(pool.table.names),
        )
    new = sorted({item["modality"] for item in pool.cases} - set(modalities))
    if modalities and new:
        logger.warning("the weights saw %s only, the data has %s", ", ".join(modalities), ", ".join(new))
    theirs = (description.get("preparation") or {}).get("spacing_mm")
    if theirs and any(max(a / b, b / a) > FAR_SPACING for a, b in zip(theirs, spacing_mm, strict=True)):
        logger.warning(
            "the weights were trained at %s mm (S, P, L), the plan has %s: structures look to them more than %g times as large "
            "or small; --spacing_mm checkpoint keeps theirs", shown(theirs, 3), shown(spacing_mm, 3), FAR_SPACING,
        )  # fmt: skip


def _spacing(asked: Sequence[float] | str, found: Fingerprint, description: Mapping[str, Any] | None) -> list[float]:
    if not isinstance(asked, str):
        return [float(side) for side in asked]
    if asked == "checkpoint":
        return description["preparation"]["spacing_mm"]
    if asked not in ("auto", "coarse"):
        raise ValueError(f"spacing_mm is {asked!r}; expected 'auto', 'coarse', 'checkpoint' or three numbers (S, P, L)")
    return list(plan_spacing(found.spacings_mm, found.shapes))


def _decided(family: Family | None, patch: Sequence[int] | None, batch_size: int | None) -> str:
    """Why no budget is looked at; empty where one is."""
    if family is not None and family.kind == "fixed":
        return f"{family.name} has a patch of its own, and a batch of {MIN_BATCH}: --patch_size, --batch_size"
    is_given = family is not None and (patch or family.strides) and batch_size
    return "network, patch and batch are given" if is_given else ""


def _budget(memory_gb: float | None, step_seconds: float | None, device: str | torch.device, decided: str) -> Budget:
    """As asked for, else by the device; none where `decided` says why it is not looked at."""
    if decided:
        given = {"memory_gb": memory_gb, "step_seconds": step_seconds}
        if unused := [f"--{name} {value:g}" for name, value in given.items() if value is not None]:
            logger.warning("%s: without effect, since %s", " and ".join(unused), decided)
        return Budget()
    device = torch.device(device)
    if memory_gb is None and device.type == "cuda":
        memory_gb = round(GPU_SHARE * torch.cuda.get_device_properties(device).total_memory / 1e9, 1)
    if memory_gb is None and step_seconds is None:
        step_seconds = CPU_STEP_SECONDS
    return Budget(memory_gb, step_seconds)


def _read_plan(path: str, asked: Mapping[str, Any], pretrained: str | None, network_name: str | None) -> Plan:
    try:
        found = Plan.from_dict(read_json(path))
    except (OSError, FileError) as error:
        raise PlanError(f"the plan {os.path.abspath(path)} cannot be read: {error}") from None
    own = found.to_dict() | {"network_size": found.network}
    other = [f"--{name}" for name, value in asked.items() if value not in ("auto", "coarse", own[name])]
    if other:
        raise PlanError(f"--plan {path} says it all; leave {', '.join(other)} out, or change the file")
    if pretrained is None:
        if found.network not in (FAMILIES if found.features else (network_name,)):
            raise PlanError(
                f"--plan {path} was made for pretrained weights or network_def#name ('{found.network}'): give them as then "
                "(--pretrained FILE), or plan anew"
            )
        found = _of_network(found, network_name)
    else:
        levels, _ = weights_family(pretrained_description(pretrained)).levels
        if levels != len(found.features):
            raise PlanError(
                f"--plan {path} has {len(found.features)} levels, the network of {pretrained} has {levels}: plan with these "
                "weights (leave --plan out)"
            )
    logger.info("%s", f"{describe_plan(found, pretrained=pretrained)}\n  taken from {path}")
    return found
