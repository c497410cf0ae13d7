"""nnU-Net's rule for patch, strides, kernels and batch, for networks of any make; pure arithmetic, no data.

What nnU-Net 2.8.1 gives for PlainConvUNet and ResidualEncoderUNet is what `plan` gives for ``nnunet`` and
``nnunet_resenc_m/l/xl`` (tests/fixtures/nnunet_plans.json holds both sides). TSFM's sizes ``tsfm_s/b/l/h`` follow the
same rule with their own cost: bytes on a GPU, seconds on a CPU. All axes are (S, P, L).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import numpy as np

from .families import FAMILIES, MIN_EDGE, SIZES, Cost, Family, Topology, fitted, topology, tsfm_cost, unet_cost

MIN_BATCH = 2

INITIAL_VOXELS = 256**3

COARSER = 1.03  # nnU-Net's step towards a spacing at which a patch sees a quarter of the case

SEEN_SHARE = 0.25


class PlanError(ValueError):
    """Data or a budget for which there is no plan."""


@dataclass(frozen=True)
class Plan:
    """What a run needs to know of its geometry. Lengths in voxels (S, P, L); `network` names a `Family`.

    strides has one entry per step down, kernel_sizes, features and blocks_down one per level, finest first.
    memory_gb and step_seconds are estimates for one training step (a GPU's memory; one CPU core's time); 0: none is known.
    """

    network: str
    spacing_mm: tuple[float, ...]
    median_shape: tuple[float, ...]
    patch_size: tuple[int, ...]
    batch_size: int
    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    features: tuple[int, ...]
    blocks_down: tuple[int, ...]
    blocks_up: tuple[int, ...]
    parameters: int
    memory_gb: float
    step_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """Inverse of `to_dict`; keys that are no field (what a run has measured) are left out.

        Raises:
            PlanError: naming the fields that are missing.
        """
        given = values if isinstance(values, Mapping) else {}  # a file may hold anything
        missing = [name for name in cls.__dataclass_fields__ if name not in given]
        if missing:
            raise PlanError(f"the plan lacks {missing}; expected what `python -m tsfm plan` or a run's plan.json holds")
        return cls(**{name: _tuples(values[name]) for name in cls.__dataclass_fields__})

    def kernels_if_any_is_flat(self) -> list[list[int]] | None:
        """`kernel_sizes` as TSFM takes them: None where all are 3x3x3."""
        is_flat = any(min(kernel) == 1 for kernel in self.kernel_sizes)
        return [list(kernel) for kernel in self.kernel_sizes] if is_flat else None

    def create_arguments(self) -> dict[str, Any]:
        """Name and arguments of `networks.create_network` that the plan decides."""
        family, own = FAMILIES[self.network], self.to_dict()
        if self.network == "swinunetr":
            return {"name": "swinunetr", "img_size": own["patch_size"]}
        names = {"patch_size": "img_size", "features": "features", "blocks_down": "depths_down", "strides": "strides"}
        arguments = {name: own[field] for field, name in names.items()}
        if family.kind == "fixed":
            return {"name": "stunet", **arguments}
        arguments["depths_up"] = own["blocks_up"]
        if family.kind == "tsfm":
            transformer = dict(
                zip(("hidden_size", "num_layers", "num_heads", "mlp_dim"), family.transformer, strict=True)
            )
            return {"name": "tsfm", **arguments, "kernel_sizes": self.kernels_if_any_is_flat(), **transformer}
        arguments["kernel_sizes"] = own["kernel_sizes"]
        return {"name": "nnunet", **arguments, "residual": family.kind == "residual"}


@dataclass(frozen=True)
class Budget:
    """What a training step may cost. memory_gb: of a GPU. step_seconds: of one CPU core. None: no such limit."""

    memory_gb: float | None = None
    step_seconds: float | None = None

    def __str__(self) -> str:
        limits = {"GB": self.memory_gb, "s a step": self.step_seconds}
        return " and ".join(f"{limit:g} {unit}" for unit, limit in limits.items() if limit is not None)


GPU_BYTES_PER_VALUE, GPU_BYTES_PER_PARAMETER, GPU_FIXED_GB = 2.5, 16, 0.8

CPU_SECONDS_PER_VALUE, CPU_SECONDS_PER_MAC = 9e-9, 6e-12
"""One step of a sample, forward and backward, in bfloat16 on one core with AVX-512."""


def plan(
    median_shape: Sequence[float],
    spacing_mm: Sequence[float],
    network: str = "auto",
    budget: Budget | None = None,
    cases: int = 1,
    in_channels: int = 1,
    out_channels: int = 1,
    patch_size: Sequence[int] | None = None,
    batch_size: int | None = None,
    levels: int | None = None,
    checkpointing: bool | str = False,
    family: Family | None = None,
) -> Plan:
    """The plan for cases of `median_shape` voxels (S, P, L) once they are resampled to `spacing_mm`.

    Args:
        network: a name of `FAMILIES`, or "auto": the largest TSFM with which nnU-Net's own default patch for this data
            fits into the budget, the smallest where none does.
        budget: default: the family's own (nnU-Net: 8 GB, ResEnc L 24, XL 40; TSFM: 8).
        cases: training cases: a batch holds at most 5% of their voxels (ResEnc: all).
        out_channels: the network's outputs (with softmax the background too).
        patch_size, batch_size: as asked for, instead of the rule's.
        levels: so many levels, as given weights have.
        checkpointing: TSFM recomputes activations, "auto": where a GPU's memory asks for it. Seconds are those of a step that
            keeps them.
        family: a network that `FAMILIES` does not hold (weights); `network` is then ignored.

    Raises:
        PlanError: an unknown network, data of a single slice, a budget that the smallest patch exceeds, a patch that the
            strides do not divide.
    """
    options = {"cases": cases, "in_channels": in_channels, "out_channels": out_channels, "levels": levels}
    options |= {"patch_size": patch_size, "batch_size": batch_size, "checkpointing": checkpointing}
    if len(median_shape) != 3 or min(median_shape) < 2 or min(spacing_mm) <= 0:
        raise PlanError(
            f"cases of {shown(median_shape)} voxels (S, P, L) at {shown(spacing_mm)} mm: expected three axes of at least "
            "two voxels; single slices are two-dimensional data, for which there is no network here: stack the slices of "
            "each patient into one volume"
        )
    if family is None and network == "auto":
        return _largest(median_shape, spacing_mm, budget, options)
    if family is None and network not in FAMILIES:
        raise PlanError(f"network is {network!r}; expected 'auto' or one of {', '.join(FAMILIES)}")
    family = family or FAMILIES[network]
    budget = budget or Budget(memory_gb=family.reference_gb)
    if family.kind == "fixed":
        return _plan_fixed(family, median_shape, spacing_mm, patch_size, batch_size)
    # nnU-Net puts the thickest axis first, which decides between sides that are equally long for their case.
    thick = int(np.argmax(spacing_mm))
    order = [thick, *(axis for axis in range(3) if axis != thick)]

    def turn(rows: Iterable[Sequence[Any]], axes: Sequence[int]) -> tuple[tuple[Any, ...], ...]:
        return tuple(tuple(row[a] for a in axes) for row in rows)

    median, spacing, *patches = turn([median_shape, spacing_mm, *([patch_size] if patch_size else [])], order)
    family = replace(family, strides=turn(family.strides, order), kernel_sizes=turn(family.kernel_sizes, order))
    found = _plan_ordered(family, median, spacing, budget, **options | {"patch_size": patches[0] if patches else None})
    back = [order.index(axis) for axis in range(3)]
    spacing, shape, patch = turn((found.spacing_mm, found.median_shape, found.patch_size), back)
    strides, kernels = turn(found.strides, back), turn(found.kernel_sizes, back)
    return replace(
        found, spacing_mm=spacing, median_shape=shape, patch_size=patch, strides=strides, kernel_sizes=kernels
    )


def plan_patch(
    patch_size: Sequence[int],
    spacing_mm: Sequence[float],
    network: str | None = "tsfm_h",
    batch_size: int = MIN_BATCH,
    **options: Any,
) -> Plan | None:
    """The plan for a patch that is given, whatever it costs; without a `network` there is none. `options`: those of `plan`."""
    return network and plan(
        patch_size, spacing_mm, network, Budget(), patch_size=patch_size, batch_size=batch_size, **options
    )


def _plan_fixed(family: Family, median_shape, spacing_mm, patch_size, batch_size) -> Plan:
    """The plan of a network whose levels are given: a patch that they divide, no larger than the case or its own one."""
    levels = len(family.strides) + 1
    divisor = [prod(axis) for axis in zip(*family.strides, strict=True)]
    patch = [int(n) for n in patch_size or (min(n, m) for n, m in zip(median_shape, family.patch, strict=True))]
    fits = [-(-n // d) * d for n, d in zip(patch, divisor, strict=True)]
    if fits == divisor:  # a single voxel at the lowest level
        fits[int(np.argmax(median_shape))] *= 2
    if patch_size and fits != patch:
        raise PlanError(
            f"patch {shown(patch)} (S, P, L): {family.name} halves the axes until {shown(divisor)} voxels are one, so a side "
            f"is a multiple of that; {shown(fits)} would fit"
        )
    down, up = family.depths(levels)
    return Plan(
        family.name, tuple(map(float, spacing_mm)), tuple(map(float, median_shape)), tuple(fits), int(batch_size or MIN_BATCH),
        family.strides, family.kernel_sizes or ((3, 3, 3),) * levels, family.features(levels), down, up, 0, 0.0, 0.0,
    )  # fmt: skip


def _largest(median_shape, spacing_mm, budget: Budget | None, options: Mapping[str, Any]) -> Plan:
    """The largest TSFM whose patch is no smaller than nnU-Net's default one."""
    sight = plan(median_shape, spacing_mm, "nnunet", cases=options["cases"], in_channels=options["in_channels"])
    for name in SIZES[:-1]:
        try:
            found = plan(median_shape, spacing_mm, name, budget, **options)
        except PlanError:
            continue
        if prod(found.patch_size) >= prod(sight.patch_size) or options["patch_size"]:
            return found
    return plan(median_shape, spacing_mm, SIZES[-1], budget, **options)


def _plan_ordered(
    family: Family, median_shape, spacing_mm, budget: Budget, cases, in_channels, out_channels, patch_size, batch_size,
    levels, checkpointing,
) -> Plan:  # fmt: skip
    def lay_out(patch: Sequence[float]) -> Topology:
        if family.strides:
            return fitted(family.strides, family.kernel_sizes, patch)
        found = topology(spacing_mm, patch, levels)
        most, least = family.levels or 99, 2 if family.kind == "tsfm" else 1
        deep = len(found.kernel_sizes)
        return found if levels or least <= deep <= most else topology(spacing_mm, patch, min(max(deep, least), most))

    def cost(found: Topology) -> Cost:
        if family.kind == "tsfm":
            return tsfm_cost(family, found, in_channels, out_channels, checkpointing)
        return unet_cost(family, found, in_channels, out_channels)

    if patch_size:
        found = lay_out(patch_size)
        if list(found.patch_size) != [int(n) for n in patch_size]:
            raise PlanError(
                f"patch {shown(patch_size)}: the strides that fit it, {found.total_stride} together, do not divide it; "
                f"{shown(found.patch_size)} would fit (axes: thickest first)"
            )
    else:
        inverse = 1 / np.asarray(spacing_mm, float)
        largest = [round(n) for n in inverse * (INITIAL_VOXELS / np.prod(inverse)) ** (1 / 3)]
        found = lay_out([min(n, m) for n, m in zip(largest, median_shape, strict=True)])
        while _room(family, cost(found), budget) < MIN_BATCH:
            found = _shrink(found, median_shape, lay_out, budget, family)
    price = cost(found)
    room = _room(family, price, budget)
    if batch_size is None:
        share = round(float(np.prod(median_shape, dtype=float)) * cases * family.dataset_share / prod(found.patch_size))
        batch_size = max(min(round(room), share), MIN_BATCH)
    levels = len(found.kernel_sizes)
    down, up = family.depths(levels)
    one_gb, fixed_gb = _memory_gb(family, price)
    return Plan(
        family.name, tuple(map(float, spacing_mm)), tuple(map(float, median_shape)), found.patch_size, int(batch_size),
        found.strides, found.kernel_sizes, family.features(levels), down, up, price.parameters,
        round(fixed_gb + batch_size * one_gb, 2), round(batch_size * _seconds(price), 3),
    )  # fmt: skip


def _shrink(found: Topology, median_shape, lay_out, budget: Budget, family: Family) -> Topology:
    """nnU-Net's next smaller patch: the side that is largest for its case, less what its strides then divide."""
    patch, smaller = list(found.patch_size), list(found.patch_size)
    axis = int(np.argsort([n / m for n, m in zip(patch, median_shape, strict=True)])[-1])
    smaller[axis] -= found.total_stride[axis]
    if smaller[axis] < MIN_EDGE:
        raise PlanError(
            f"{family.name}: nothing fits into {budget}: even a patch of {shown(patch)} voxels exceeds it; raise the budget "
            "(--memory_gb, --step_seconds), or take a smaller network or a coarser --spacing_mm"
        )
    patch[axis] -= lay_out(smaller).total_stride[axis]
    return lay_out(patch)


def _memory_gb(family: Family, price: Cost) -> tuple[float, float]:
    """GB of one sample, and of what does not depend on the batch."""
    if family.kind != "tsfm":
        return price.values / family.reference * family.reference_gb / 2, 0.0
    return price.values * GPU_BYTES_PER_VALUE / 1e9, price.parameters * GPU_BYTES_PER_PARAMETER / 1e9 + GPU_FIXED_GB


def _seconds(price: Cost) -> float:
    return price.computed * CPU_SECONDS_PER_VALUE + price.macs * CPU_SECONDS_PER_MAC


def _room(family: Family, price: Cost, budget: Budget) -> float:
    """How many samples of this cost the budget holds."""
    rooms = [float("inf")]
    if budget.memory_gb is not None:
        one_gb, fixed_gb = _memory_gb(family, price)
        rooms.append((budget.memory_gb - fixed_gb) / one_gb)
    if budget.step_seconds is not None:
        rooms.append(budget.step_seconds / _seconds(price))
    return min(rooms)


def coarse_spacing(fine: Plan, **options: Any) -> tuple[float, ...]:
    """nnU-Net's spacing of the low resolution: coarser in steps of 3% until a patch sees a quarter of the median case.

    `options` are those of `plan` with which `fine` was made. The spacing of `fine` where its patch sees that much, or
    where fewer than half of the voxels would go.
    """
    spacing = np.asarray(fine.spacing_mm, float)
    whole, found, shape = prod(fine.median_shape), fine, fine.median_shape
    while prod(found.patch_size) / prod(shape) < SEEN_SHARE:
        is_fine = spacing.max() / spacing > 2
        spacing = np.where(is_fine, spacing * COARSER, spacing) if is_fine.any() else spacing * COARSER
        shape = tuple(np.asarray(fine.spacing_mm) / spacing * fine.median_shape)
        found = plan([round(n) for n in shape], spacing.tolist(), **options)
    return tuple(spacing.tolist()) if whole / prod(shape) >= 2 else fine.spacing_mm


def shown(numbers: Sequence[float], digits: int = 4) -> str:
    """Lengths along the axes, for a message: ``1.5x1x1``."""
    return "x".join(f"{float(number):.{digits}g}" for number in numbers)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list | tuple) else value
