"""nnU-Net's validation Dice on patches, over annotated targets only."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced, sync_all_reduce

from ..labels import LabelTable

logger = logging.getLogger(__name__)


class PooledDice(Metric):
    """Dice of all validation patches taken together (nnU-Net's pseudo-Dice), over annotated voxels only.

    tp, fp and fn of each target are summed over all patches and processes before the ratio. A voxel counts for the
    targets that its data set annotates. `compute` returns the mean over the targets that are present in the truth, and
    leaves the parts as attributes:

    - ``per_target``: target -> Dice, present targets only;
    - ``per_dataset``: data set -> target -> Dice, the same from that data set's voxels alone;
    - ``absent``: targets that were annotated but never present; they are in no mean.

    Args:
        table: the label table; channel ``i`` of the logits is ``table.names[i]``.
        output_transform: turns the engine's output into ``(logits, codes)``, as for any ignite metric; logits
            (B, T, S, P, L) and codes (B, 1, S, P, L), or lists of such without the batch axis.
    """

    def __init__(self, table: LabelTable, output_transform: Any = lambda x: x) -> None:
        self.table = table
        self._rows = torch.from_numpy(table.targets)
        super().__init__(output_transform, device="cpu")

    @reinit__is_reduced
    def reset(self) -> None:
        """Forget all patches."""
        targets, codes = len(self.table.names), self.table.num_codes
        # Voxels per code, and how many of them each target's output claims: tp, fp and fn follow from these two.
        self._voxels = torch.zeros(codes, dtype=torch.int64)
        self._claimed = torch.zeros(targets, codes, dtype=torch.int64)
        self.per_target: dict[str, float] = {}
        self.per_dataset: dict[str, dict[str, float]] = {}
        self.absent: tuple[str, ...] = ()

    @reinit__is_reduced
    def update(self, output: Sequence[Any]) -> None:
        """Add one batch.

        Raises:
            ValueError: logits whose channels are not the table's targets, or whose grid is not the codes' grid.
        """
        logits, codes = output
        if isinstance(logits, torch.Tensor):
            self._add(logits, codes)
            return
        for one, its_codes in zip(logits, codes, strict=True):
            self._add(one[None], its_codes[None])

    def _add(self, logits: torch.Tensor, codes: torch.Tensor) -> None:
        expected = (codes.shape[0], len(self.table.names), *codes.shape[2:])
        if tuple(logits.shape) != expected or codes.shape[1] != 1:
            raise ValueError(
                f"logits {tuple(logits.shape)} and codes {tuple(codes.shape)} do not fit: expected logits {expected} "
                "(one channel per target of the label table) and codes with one channel"
            )
        logits, number = torch.as_tensor(logits.detach()).as_subclass(torch.Tensor), self.table.num_codes
        codes = codes.as_subclass(torch.Tensor)[:, 0].long()
        voxels = torch.bincount(codes.flatten(), minlength=number).cpu()
        if len(voxels) > number:
            raise ValueError(f"codes go up to {len(voxels) - 1}, the label table has {number} (0 to {number - 1})")
        self._voxels += voxels
        annotated = (self._rows[voxels > 0] >= 0).any(0)
        for target in annotated.nonzero().flatten().tolist():
            claimed = codes[logits[:, target] > 0]
            self._claimed[target] += torch.bincount(claimed, minlength=number).cpu()

    @sync_all_reduce("_voxels", "_claimed")
    def compute(self) -> float:
        """Mean Dice over the targets present; 0.0, with a warning, when there is none."""
        everything = np.arange(self.table.num_codes)
        self.per_target, self.absent = self._dice(everything)
        owner = np.array([dataset for dataset, _ in self.table.codes])
        parts = {name: self._dice(everything[owner == name])[0] for name in self.table.datasets}
        self.per_dataset = {name: part for name, part in parts.items() if part}
        if not self.per_target:
            logger.warning("Validation patches hold no annotated target at all: the mean Dice is given as 0.")
            return 0.0
        return float(np.mean(list(self.per_target.values())))

    def _dice(self, codes: np.ndarray) -> tuple[dict[str, float], tuple[str, ...]]:
        """Dice of every target that is present in the voxels with these codes, and the annotated ones that are not."""
        rows, voxels = self.table.targets[codes], self._voxels.numpy()[codes]
        claimed = self._claimed.numpy()[:, codes]
        found, absent = {}, []
        for target, name in enumerate(self.table.names):
            positive, negative = rows[:, target] == 1, rows[:, target] == 0
            size = int(voxels[positive].sum())
            tp, fp = int(claimed[target, positive].sum()), int(claimed[target, negative].sum())
            if size:
                found[name] = 2 * tp / (tp + fp + size)
            elif voxels[negative].any():
                absent.append(name)
        return found, tuple(absent)

    def completed(self, engine: Engine, name: str) -> None:
        """Besides the mean, put the mean of each data set into the engine's metrics, for whoever logs them."""
        super().completed(engine, name)
        for dataset in self.table.datasets:
            key = f"{name}_{dataset}"
            engine.state.metrics.pop(key, None)
            if dataset in self.per_dataset:
                engine.state.metrics[key] = float(np.mean(list(self.per_dataset[dataset].values())))
