"""Training of a promptable network: clicks simulated from errors of its own prediction, for some of a batch's samples.

A sample with clicks is about one target: its label codes are exchanged for codes that annotate this target alone, so the
loss looks at no other output. Samples without clicks are those of the automatic network.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..labels import LabelTable
from ..network.clicks import CLICK_CHANNELS, Click, click_channels, simulated_click
from ..network.cpu import autocast
from .steps import EvalStep, TrainStep


class ClickTable:
    """A label table's codes and, after them, for each target two that annotate it alone (is not, is), and one for nothing.

    What `PartialLabelLoss` wants of a table: ``targets``, int8 (codes, targets) of 1 is, 0 is not, -1 not annotated.
    """

    def __init__(self, table: LabelTable) -> None:
        known = np.asarray(table.targets, np.int8)
        codes, targets = known.shape
        alone = np.full((2 * targets + 1, targets), -1, np.int8)
        alone[2 * np.arange(targets), np.arange(targets)] = 0
        alone[2 * np.arange(targets) + 1, np.arange(targets)] = 1
        self.targets = np.concatenate([known, alone])
        own = codes + 2 * np.arange(targets)[:, None]
        by_value = np.where(known.T < 0, codes + 2 * targets, own + (known.T > 0))
        self._alone = torch.from_numpy(by_value.astype(np.int32))  # (targets, codes)

    def only(self, codes: Tensor, target: int) -> Tensor:
        """`codes` of any shape, int32, of which nothing but `target` is annotated any more."""
        return self._alone[target].to(codes.device)[codes.long()]


class ClickTrainStep(TrainStep):
    """`TrainStep` of a network with click channels.

    Args:
        amp, amp_dtype, clip_norm: as for `TrainStep`.
        table: the `ClickTable` of the loss.
        sigma: of a click's Gaussian, in voxels.
        share: of the samples that get clicks; the others are as without this class.
        most: clicks of such a sample, drawn from 1 to `most`; each is put where the prediction with those before is wrong.
        seed: with the iteration it decides on every draw, so that a resumed run makes the same clicks.
    """

    def __init__(
        self,
        amp: bool = True,
        amp_dtype: str = "bfloat16",
        clip_norm: float = 12.0,
        *,
        table: ClickTable,
        sigma: float,
        share: float = 0.5,
        most: int = 3,
        seed: int = 0,
    ) -> None:
        super().__init__(amp, amp_dtype, clip_norm)
        if not 0 <= share <= 1 or most < 1 or sigma <= 0:
            raise ValueError(f"share {share}, most {most}, sigma {sigma}; expected 0 to 1, at least 1, above 0")
        self.table, self.sigma, self.share, self.most, self.seed = table, sigma, share, most, seed

    def batch(self, engine: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """Images with the simulated clicks, and codes of which those with clicks annotate one target."""
        images, codes = super().batch(engine, batch)
        images = with_click_channels(images)
        rng = np.random.default_rng((self.seed, engine.state.iteration))  # the same numbers on every rank
        counts = [int(rng.integers(1, self.most + 1)) if rng.random() < self.share else 0 for _ in images]
        if not any(counts):
            return images, codes
        truth = torch.from_numpy(self.table.targets).to(codes.device)[codes[:, 0].long()].movedim(-1, 1).cpu().numpy()
        chosen: list[int | None] = [None] * len(images)
        clicks: list[list[Click]] = [[] for _ in images]
        engine.network.eval()
        for turn in range(max(counts)):
            rows = [row for row, count in enumerate(counts) if count > turn]
            for row, found in zip(rows, self._found(engine, images[rows]), strict=True):
                if turn == 0:
                    chosen[row] = _wrong_target(truth[row], found, rng)
                target = chosen[row]
                if target is None:
                    continue
                one = truth[row, target]
                click = simulated_click(one == 1, found[target], one >= 0, rng)
                if click is not None:
                    clicks[row].append(click)
                    channels = click_channels(clicks[row], images.shape[2:], self.sigma)
                    images[row, -CLICK_CHANNELS:] = channels.to(images)
        engine.network.train()
        codes = codes.int()
        for row, target in enumerate(chosen):
            if target is not None:
                codes[row] = self.table.only(codes[row], target)
        return images, codes

    def _found(self, engine: Any, images: Tensor) -> np.ndarray:
        """Bool (B, T, S, P, L): where the network finds each target."""
        images = images.contiguous(memory_format=torch.channels_last_3d)
        with torch.no_grad(), autocast(engine.state.device, self.amp, self.amp_dtype):
            logits = engine.inferer(images, engine.network)
        return (logits > 0).cpu().numpy()


class ClickEvalStep(EvalStep):
    """`EvalStep` of a network with click channels: without clicks."""

    def batch(self, engine: Any, batch: Any) -> tuple[Tensor, Tensor]:
        images, codes = super().batch(engine, batch)
        return with_click_channels(images), codes


def with_click_channels(images: Tensor) -> Tensor:
    """Images (B, C, S, P, L) with the channels of no clicks behind theirs."""
    shape = (len(images), images.shape[1] + CLICK_CHANNELS, *images.shape[2:])
    more = torch.zeros(shape, dtype=images.dtype, device=images.device).to(memory_format=torch.channels_last_3d)
    more[:, :-CLICK_CHANNELS] = images
    return more


def _wrong_target(truth: np.ndarray, found: np.ndarray, rng: np.random.Generator) -> int | None:
    """One of the annotated targets (T, S, P, L) that are there or found, by chance; None where there is none."""
    known = [t for t, one in enumerate(truth) if (one == 1).any() or (found[t] & (one >= 0)).any()]
    return int(rng.choice(known)) if known else None
