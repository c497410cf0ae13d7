"""Binary cross-entropy and batch Dice over the targets that each voxel's data set annotates (paper section 2.1, MultiTalent).

Shape suffixes: B samples, T targets, C codes, N voxels of one sample.

With s = sigmoid(-x) on voxels that are the target and s = sigmoid(x) on those that are not (s is the error probability),
everything is simple and stable: BCE is softplus(+-x), fp and fn are sums of s, tp is the number of positive voxels minus
fn, and the gradient is +-s * (a + k * (1 - s)) with one pair of scalars (a, k) per target. Value and gradient are computed
block by block of voxels and target by target, so that nothing as large as a one-hot volume ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

DICE_FLOOR = 1e-7

SURE_BACKGROUND = -30.0
"""A logit whose sigmoid and cross-entropy are below 1e-12."""

# Voxels handled at once: on a CPU all targets of a block fit its cache, also where the logits are channels-last; a GPU is
# better off with few launches, each over a whole target of the paper's patch.
BLOCK_VOXELS = {"cpu": 1 << 15, "cuda": 1 << 22}


class PartialLabelLoss(nn.Module):
    """BCE + batch Dice per target; voxels whose data set does not annotate a target give it exactly zero gradient.

    Per level: BCE is the mean over the annotated voxels of a (sample, target) pair, then summed ("sum", MultiTalent) or
    averaged ("mean") over the pairs that hold an annotated voxel. Dice is ``-2tp / clip(2tp + fp + fn, 1e-7)`` with
    tp, fp, fn summed over the batch, then summed or averaged over the targets annotated anywhere in it.

    While training in several processes, the batch is that of all processes: the value is the same everywhere, and each
    process's gradient is scaled so that the average DDP (or FSDP) takes is the gradient of one process with the whole
    batch. Every process then has to call the loss equally often; without gradients (validation) nothing is exchanged.

    Args:
        table: a `LabelTable`; only ``table.targets`` is used, int8 (codes, targets) of 1 is, 0 is not, -1 not annotated.
        weights: weight per level, finest first; by default 1/2^i, the lowest 0, normalised to sum 1. A level of weight 0
            is not computed, but its logits get a gradient of zeros, so DDP finds no unused parameters.
        reduction: "sum" or "mean".

    Raises:
        ValueError: unknown reduction; logits, codes and weights that do not fit each other; a code outside the table.
    """

    def __init__(self, table: Any, weights: Sequence[float] | None = None, reduction: str = "sum") -> None:
        super().__init__()
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction is {reduction!r}; expected 'sum' or 'mean'")
        self.targets_CT = np.asarray(table.targets, np.int8)
        self.weights = None if weights is None else tuple(float(weight) for weight in weights)
        self.reduction = reduction

    def forward(self, logits: Tensor | Sequence[Tensor], codes: Tensor) -> Tensor:
        """Scalar loss from `logits` (B, T, *spatial), or one such tensor per level, and `codes` (B, 1, *spatial)."""
        levels, weights, codes = self.levels(logits, codes)
        plans = [
            _plan(self.targets_CT, _nearest(codes, level.shape[2:])) if weight else None
            for level, weight in zip(levels, weights, strict=True)
        ]
        training = torch.is_grad_enabled() and any(level.requires_grad for level in levels)
        processes = dist.get_world_size() if training and dist.is_available() and dist.is_initialized() else 1
        flat_BTN = [level.flatten(2) for level in levels]  # a view, channels-last or not
        return _PartialLabel.apply(plans, weights, self.reduction, processes, *flat_BTN)

    def levels(self, logits: Tensor | Sequence[Tensor], codes: Tensor) -> tuple[list[Tensor], Sequence[float], Tensor]:
        """Logits (B, T, *spatial) per level, their weights, and codes (B, *spatial) as the smallest type that holds them.

        Raises:
            ValueError: logits, codes, weights and table that do not fit each other.
        """
        levels = [logits] if isinstance(logits, Tensor) else list(logits)
        levels = [level.as_subclass(Tensor) for level in levels]  # MetaTensors pay for every operation
        weights = level_weights(len(levels)) if self.weights is None else self.weights
        if len(weights) != len(levels):
            raise ValueError(f"{len(levels)} levels of logits but {len(weights)} deep-supervision weights")
        for level in levels:
            if level.shape[1] != self.targets_CT.shape[1]:
                raise ValueError(
                    f"logits have {level.shape[1]} channels; the label table has {self.targets_CT.shape[1]} targets"
                )
            if codes.ndim != level.ndim or codes.shape[:2] != (level.shape[0], 1):
                raise ValueError(
                    f"codes have shape {tuple(codes.shape)}, logits {tuple(level.shape)}; "
                    "expected codes (B, 1, *spatial) for logits (B, T, *spatial)"
                )
        return levels, weights, self._narrow(codes.as_subclass(Tensor))

    def _narrow(self, codes: Tensor) -> Tensor:
        """Codes (B, *spatial) as the smallest integer type that holds them; transforms may have made them float."""
        num_codes = len(self.targets_CT)
        if codes.dtype not in (torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64):
            codes = codes.to(torch.int32)
        low, high = (int(value) for value in torch.aminmax(codes))
        if low < 0 or high >= num_codes:
            raise ValueError(
                f"label volume holds the code {low if low < 0 else high}; the label table has the codes 0 to {num_codes - 1}. "
                "Pass codes (LabelTable.encode + offset), not raw label ids"
            )
        return codes[:, 0].to(torch.uint8 if num_codes <= 256 else torch.int32)


class PerTarget(nn.Module):
    """A loss of one channel of logits and its 0/1 truth (MONAI's DiceCELoss, FocalLoss, ...), averaged over the targets.

    Targets that a batch does not annotate are left out, samples that do not annotate a target are left out of its batch, and
    single voxels that do not are shown to the loss as background that the network is sure of, so their gradient is exactly
    zero. In several processes each has the loss of its own patches.

    Args:
        loss: (B', 1, *spatial) logits and truth -> scalar, B' the samples that annotate the target.
        table, weights: as for `PartialLabelLoss`.

    Raises:
        ValueError: a loss that does not take logits of one channel; what `PartialLabelLoss` refuses.
    """

    def __init__(self, loss: nn.Module, table: Any, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        name = type(loss).__name__
        if hasattr(loss, "weight_mode"):
            raise ValueError(f"{name}: give the loss inside it alone; levels are weighted by PerTarget's weights")
        if isinstance(loss, nn.CrossEntropyLoss):
            raise ValueError(f"{name} is always 0 of a single channel, and each target has one; give BCEWithLogitsLoss")
        for part in loss.modules():
            wants = ("softmax", "use_softmax", "to_onehot_y")
            if wrong := [key for key in wants if getattr(part, key, False)]:
                raise ValueError(f"{name}: {wrong[0]} is true, but each target has a sigmoid of its own; leave it out")
            if getattr(part, "sigmoid", True) is False and getattr(part, "other_act", None) is None:
                raise ValueError(f'{name}: the network gives logits, and without "sigmoid": true this loss takes none')
        self.loss, self.shape = loss, PartialLabelLoss(table, weights)

    def forward(self, logits: Tensor | Sequence[Tensor], codes: Tensor) -> Tensor:
        """Scalar loss; arguments as for `PartialLabelLoss`."""
        levels, weights, codes = self.shape.levels(logits, codes)
        return sum(
            weight * self._level(level, _nearest(codes, level.shape[2:])) if weight else 0 * level.float().mean()
            for level, weight in zip(levels, weights, strict=True)
        )

    def _level(self, logits: Tensor, codes: Tensor) -> Tensor:
        values = []
        for target, row in enumerate(torch.as_tensor(self.shape.targets_CT.T, device=codes.device)):
            truth = row[codes.long()][:, None]
            known = (truth >= 0).flatten(1).any(1)
            if known.any():
                truth = truth[known]
                one = logits[known, target, None].to(torch.promote_types(logits.dtype, torch.float32))
                one = one.masked_fill(truth < 0, SURE_BACKGROUND)
                values.append(self.loss(one, (truth == 1).to(one.dtype)))
        return torch.stack(values).mean() if values else 0 * logits.float().mean()


def on_targets(loss: nn.Module, table: Any) -> nn.Module:
    """`loss` as it is, or `PerTarget` around a loss of MONAI or PyTorch, which knows nothing of codes."""
    return PerTarget(loss, table) if type(loss).__module__.split(".")[0] in ("monai", "torch") else loss


def level_weights(levels: int) -> tuple[float, ...]:
    """Deep-supervision weights, finest first: 1/2^i, lowest 0, sum 1 (nnU-Net v1, MultiTalent); (1,) for one level."""
    raw = [0.5**i for i in range(levels)]
    if levels > 1:
        raw[-1] = 0.0
    return tuple(weight / sum(raw) for weight in raw)


class _Work(NamedTuple):
    """A target of which a sample holds annotated voxels, and the codes in this sample that decide its voxels."""

    target: int
    positive: tuple[int, ...]
    skipped: tuple[int, ...]


@dataclass(frozen=True)
class _Plan:
    """What the codes of one level say before any voxel of the logits is looked at."""

    codes_BN: Tensor
    work: list[list[_Work]]  # per sample
    annotated_BT: np.ndarray  # number of annotated voxels
    positive_T: np.ndarray  # number of positive voxels in the batch


def _nearest(codes: Tensor, shape: Sequence[int]) -> Tensor:
    """`codes` (B, *spatial) at another grid by the nearest voxel center (as F.interpolate's nearest-exact, any dtype)."""
    for axis, (old, new) in enumerate(zip(codes.shape[1:], shape, strict=True), start=1):
        if old != new:
            index = torch.arange(new, device=codes.device)
            codes = codes.index_select(axis, ((2 * index + 1) * old) // (2 * new))
    return codes


def _plan(targets_CT: np.ndarray, codes: Tensor) -> _Plan:
    codes_BN = codes.flatten(1)
    # One histogram per sample gives all voxel counts exactly, and with them which comparisons are needed at all.
    histogram = torch.stack([torch.bincount(row, minlength=len(targets_CT)) for row in codes_BN])
    voxels_BC = histogram.cpu().numpy()
    annotated_BT = voxels_BC @ (targets_CT >= 0)
    work: list[list[_Work]] = [[] for _ in voxels_BC]
    for sample, target in np.argwhere(annotated_BT > 0).tolist():
        present = np.flatnonzero(voxels_BC[sample])
        row = targets_CT[present, target]
        work[sample].append(_Work(target, tuple(present[row == 1].tolist()), tuple(present[row == -1].tolist())))
    return _Plan(codes_BN, work, annotated_BT, (voxels_BC @ (targets_CT == 1)).sum(0))


def _any_of(codes: Tensor, members: tuple[int, ...]) -> Tensor | None:
    """Bool mask of the voxels whose code is one of `members`; None where there are none."""
    mask = None
    for code in members:
        mask = codes == code if mask is None else mask.logical_or_(codes == code)
    return mask


def _blocks(logits_BTN: Tensor, plan: _Plan) -> Iterator[tuple[int, int, slice, Tensor, Tensor | None, Tensor | None]]:
    """Walk over the batch: sample, target, voxels, signed logits (-x on the target), positive mask, mask to leave out."""
    size = BLOCK_VOXELS.get(logits_BTN.device.type, BLOCK_VOXELS["cuda"])
    precise = torch.promote_types(logits_BTN.dtype, torch.float32)
    for sample, works in enumerate(plan.work):
        for start in range(0, logits_BTN.shape[2], size):
            block = slice(start, start + size)
            codes = plan.codes_BN[sample, block]
            for target, positive_codes, skipped_codes in works:
                signed = logits_BTN[sample, target, block].to(precise)
                positive = _any_of(codes, positive_codes)
                if positive is not None:
                    signed = torch.where(positive, -signed, signed)
                yield sample, target, block, signed, positive, _any_of(codes, skipped_codes)


def _statistics(logits_BTN: Tensor, plan: _Plan) -> Tensor:
    """(5, T) float64 sums over the batch: mean BCE per pair, pairs, fp, fn, positive voxels."""
    device = logits_BTN.device
    totals = torch.zeros(3, *logits_BTN.shape[:2], dtype=torch.float64, device=device)  # BCE, fp + fn, fn
    for sample, target, _, signed, positive, skipped in _blocks(logits_BTN, plan):
        entropy, error = F.softplus(signed), signed.sigmoid()
        if skipped is not None:
            entropy.masked_fill_(skipped, 0)
            error.masked_fill_(skipped, 0)
        totals[0, sample, target] += entropy.sum()
        totals[1, sample, target] += error.sum()
        if positive is not None:
            totals[2, sample, target] += error.mul_(positive).sum()
    voxels_BT = torch.as_tensor(plan.annotated_BT, device=device)
    entropy_BT, errors_BT, missed_BT = totals
    return torch.stack(
        [
            (entropy_BT / voxels_BT.clamp(min=1)).sum(0),
            (voxels_BT > 0).sum(0).double(),
            (errors_BT - missed_BT).sum(0),
            missed_BT.sum(0),
            torch.as_tensor(plan.positive_T, dtype=torch.float64, device=device),
        ]
    )


def _gradient(logits_BTN: Tensor, plan: _Plan, scale_BT: Tensor, off_T: Tensor, on_T: Tensor) -> Tensor:
    """d loss / d logits: +-s * (a + k * (1 - s)), in the memory format of the logits.

    `scale_BT` is a, the weight of one voxel's BCE; `off_T` and `on_T` are k of voxels that are not and that are the target.
    """
    result_BTN = torch.zeros_like(logits_BTN)
    for sample, target, block, signed, positive, skipped in _blocks(logits_BTN, plan):
        error = signed.sigmoid()
        k = off_T[target] if positive is None else torch.where(positive, on_T[target], off_T[target])
        slope = (1 - error).mul_(k).add_(scale_BT[sample, target]).mul_(error)
        if positive is not None:
            slope = torch.where(positive, -slope, slope)
        if skipped is not None:
            slope.masked_fill_(skipped, 0)
        result_BTN[sample, target, block] = slope
    return result_BTN


class _PartialLabel(torch.autograd.Function):
    """Value over all levels, statistics exchanged once; the gradient is computed from the logits again, not stored."""

    @staticmethod
    def forward(ctx, plans, weights, reduction, processes, *levels):
        ctx.plans, ctx.weights, ctx.processes = plans, weights, processes
        ctx.save_for_backward(*levels)
        empty = torch.zeros(5, levels[0].shape[1], dtype=torch.float64, device=levels[0].device)
        stats = torch.stack(
            [empty if plan is None else _statistics(x, plan) for x, plan in zip(levels, plans, strict=True)]
        )
        if processes > 1:
            dist.all_reduce(stats)
        entropy, pairs, fp, fn, positive = stats.unbind(1)  # each (levels, T)
        tp = positive - fn
        denominator = (2 * tp + fp + fn).clamp(min=DICE_FLOOR)
        dice = -2 * tp / denominator
        if reduction == "mean":
            per_pair = 1 / pairs.sum(1, keepdim=True).clamp(min=1)
            per_target = 1 / (pairs > 0).sum(1, keepdim=True).double().clamp(min=1)
        else:
            per_pair = per_target = torch.ones_like(pairs[:, :1])
        # d dice / d p is 2tp/den^2 off the target and that minus 2/den on it, where s falls as p rises: hence the signs.
        k_off = per_target * 2 * tp / denominator**2
        ctx.factors = per_pair, k_off, per_target * 2 / denominator - k_off
        level_loss = (per_pair * entropy).sum(1) + (per_target * dice).sum(1)
        weight = torch.as_tensor(weights, dtype=torch.float64, device=level_loss.device)
        return (weight * level_loss).sum().to(torch.promote_types(levels[0].dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        gradients = []
        for i, (logits, plan, weight) in enumerate(zip(ctx.saved_tensors, ctx.plans, ctx.weights, strict=True)):
            if plan is None:
                gradients.append(logits.new_zeros(()).expand(logits.shape))
                continue
            # DDP will divide by the number of processes, but the value above is already that of the whole batch.
            outer = grad_output.double() * weight * ctx.processes
            precise = torch.promote_types(logits.dtype, torch.float32)
            voxels_BT = torch.as_tensor(plan.annotated_BT, device=logits.device).clamp(min=1)
            per_pair, k_off, k_on = (outer * factor[i] for factor in ctx.factors)
            gradients.append(
                _gradient(logits, plan, (per_pair / voxels_BT).to(precise), k_off.to(precise), k_on.to(precise))
            )
        return None, None, None, None, *gradients
