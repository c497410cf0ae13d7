"""nnU-Net's rule for patch, strides, kernels and batch, for networks of any make; pure arithmetic, no data.

What nnU-Net 2.8.1 gives for PlainConvUNet and ResidualEncoderUNet is what `plan` gives for ``nnunet`` and
``nnunet_resenc_m/l/xl`` (tests/fixtures/nnunet_plans.json holds both sides). TSFM's sizes ``tsfm_s/b/l/h`` follow the
same rule with their own cost: bytes on a GPU, seconds on a CPU. All axes are (S, P, L).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np

from .families import FAMILIES, MIN_EDGE, SIZES, TRANSFORMER, Cost, Family, Topology, step_cost

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
        if not self.features:  # another network than the planner's
            return {"name": self.network}
        family, own = FAMILIES[self.network], self.to_dict()
        arguments = {"name": self.network.partition("_")[0], "img_size": own["patch_size"]}
        if self.network == "swinunetr":
            return arguments
        arguments |= {"features": own["features"], "depths_down": own["blocks_down"], "strides": own["strides"]}
        if family.kind == "fixed":
            return arguments
        arguments["depths_up"] = own["blocks_up"]
        if family.kind == "tsfm":
            arguments |= zip(TRANSFORMER, family.transformer, strict=True)
            return arguments | {"kernel_sizes": self.kernels_if_any_is_flat()}
        return arguments | {"kernel_sizes": own["kernel_sizes"], "residual": family.kind == "residual"}


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
    network: str | Family = "auto",
    budget: Budget | None = None,
    cases: int = 1,
    in_channels: int = 1,
    out_channels: int = 1,
    patch_size: Sequence[int] | None = None,
    batch_size: int | None = None,
    checkpointing: bool | str = False,
) -> Plan:
    """The plan for cases of `median_shape` voxels (S, P, L) once they are resampled to `spacing_mm`.

    Args:
        network: a name of `FAMILIES`, a family that it does not hold (weights), or "auto": the largest TSFM with which
            nnU-Net's own default patch for this data fits into the budget, the smallest where none does.
        budget: default: the family's own (nnU-Net: 8 GB, ResEnc L 24, XL 40; TSFM: 8).
        cases: training cases: a batch holds at most 5% of their voxels (ResEnc: all).
        out_channels: the network's outputs (with softmax the background too).
        patch_size, batch_size: as asked for, instead of the rule's. The rule's patch for a family with strides of its own
            is the family's, no larger than the case.
        checkpointing: TSFM recomputes activations, "auto": where a GPU's memory asks for it. Seconds are those of a step that
            keeps them.

    Raises:
        PlanError: an unknown network, data of a single slice, a budget that the smallest patch exceeds, a patch that the
            strides do not divide.
    """
    if len(median_shape) != 3 or min(median_shape) < 2 or min(spacing_mm) <= 0:
        raise PlanError(
            f"cases of {shown(median_shape)} voxels (S, P, L) at {shown(spacing_mm)} mm: expected three axes of at least "
            "two voxels; single slices are two-dimensional data, for which there is no network here: stack the slices of "
            "each patient into one volume"
        )
    if network == "auto":
        options = {"cases": cases, "in_channels": in_channels, "out_channels": out_channels}
        options |= {"patch_size": patch_size, "batch_size": batch_size, "checkpointing": checkpointing}
        return _largest(median_shape, spacing_mm, budget, options)
    if isinstance(network, str) and network not in FAMILIES:
        raise PlanError(f"network is {network!r}; expected 'auto' or one of {', '.join(FAMILIES)}")
    family = FAMILIES[network] if isinstance(network, str) else network
    budget = budget or Budget(memory_gb=family.reference_gb)

    def cost(found: Topology) -> Cost:
        return step_cost(family, found, in_channels, out_channels, checkpointing)

    if patch_size:
        found = _given(family, spacing_mm, patch_size)
    elif family.strides:
        found = family.lay_out(spacing_mm, [min(int(n), m) for n, m in zip(median_shape, family.patch, strict=True)])
    else:
        inverse = 1 / np.asarray(spacing_mm, float)
        largest = [round(n) for n in inverse * (INITIAL_VOXELS / np.prod(inverse)) ** (1 / 3)]
        found = family.lay_out(spacing_mm, [min(n, m) for n, m in zip(largest, median_shape, strict=True)])
        while _room(family, cost(found), budget) < MIN_BATCH:
            found = _shrink(family, found, median_shape, spacing_mm, budget)
    price = cost(found)
    if batch_size is None and family.kind == "fixed":
        batch_size = MIN_BATCH
    elif batch_size is None:
        share = round(float(np.prod(median_shape, dtype=float)) * cases * family.dataset_share / prod(found.patch_size))
        batch_size = max(min(round(_room(family, price, budget)), share), MIN_BATCH)
    levels = len(found.kernel_sizes)
    down, up = family.depths(levels)
    one_gb, fixed_gb = _memory_gb(family, price)
    return Plan(
        family.name, tuple(map(float, spacing_mm)), tuple(map(float, median_shape)), found.patch_size, int(batch_size),
        found.strides, found.kernel_sizes, family.features(levels), down, up, price.parameters,
        round(fixed_gb + batch_size * one_gb, 2), round(batch_size * _seconds(price), 3),
    )  # fmt: skip


def plan_patch(
    patch_size: Sequence[int],
    spacing_mm: Sequence[float],
    network: str | Family | None = "tsfm_h",
    batch_size: int = MIN_BATCH,
    **options: Any,
) -> Plan | None:
    """The plan for a patch that is given, whatever it costs; without a `network` there is none. `options`: those of `plan`."""
    return network and plan(
        patch_size, spacing_mm, network, Budget(), patch_size=patch_size, batch_size=batch_size, **options
    )


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


def _given(family: Family, spacing_mm: Sequence[float], patch_size: Sequence[int]) -> Topology:
    found = family.lay_out(spacing_mm, patch_size)
    if list(found.patch_size) != [int(n) for n in patch_size]:
        raise PlanError(
            f"patch {shown(patch_size)} (S, P, L): the strides of {family.name} for it, {shown(found.total_stride)} together, "
            f"do not divide it, or leave a single voxel; {shown(found.patch_size)} would fit"
        )
    return found


def _shrink(family: Family, found: Topology, median_shape, spacing_mm, budget: Budget) -> Topology:
    """nnU-Net's next smaller patch: the side that is largest for its case, less what its strides then divide."""
    patch, smaller = list(found.patch_size), list(found.patch_size)
    # of equally large ones nnU-Net takes the last, and has the thickest axis first
    thick = int(np.argmax(spacing_mm))
    axis = max(range(3), key=lambda a: (patch[a] / median_shape[a], a != thick, a))
    smaller[axis] -= found.total_stride[axis]
    if smaller[axis] < MIN_EDGE:
        raise PlanError(
            f"{family.name}: nothing fits into {budget}: even a patch of {shown(patch)} voxels exceeds it; raise the budget "
            "(--memory_gb, --step_seconds), or take a smaller network or a coarser --spacing_mm"
        )
    patch[axis] -= family.lay_out(spacing_mm, smaller).total_stride[axis]
    return family.lay_out(spacing_mm, patch)


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
    patch, shape = fine.patch_size, fine.median_shape
    while prod(patch) / prod(shape) < SEEN_SHARE:
        is_fine = spacing.max() / spacing > 2
        spacing = np.where(is_fine, spacing * COARSER, spacing) if is_fine.any() else spacing * COARSER
        shape = tuple(np.asarray(fine.spacing_mm) / spacing * fine.median_shape)
        if not options.get("patch_size"):
            patch = plan([round(n) for n in shape], spacing.tolist(), **options).patch_size
    return tuple(spacing.tolist()) if prod(fine.median_shape) / prod(shape) >= 2 else fine.spacing_mm


def shown(numbers: Sequence[float], digits: int = 4) -> str:
    """Lengths along the axes, for a message: ``1.5x1x1``."""
    return "x".join(f"{float(number):.{digits}g}" for number in numbers)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list | tuple) else value
