"""The curve of a run: loss, Dice and learning rate per epoch, as CSV."""

from __future__ import annotations

import csv
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import Timer
from monai.utils import CommonKeys as Keys

from ..files import atomic_write

logger = logging.getLogger(__name__)

METRIC = "val_mean_dice"
"""Name of the validation metric in the evaluator's state."""

MEMORY = 0.9
"""Weight of the past in the moving average: nnU-Net's."""


class Curve:
    """Handler: one row per epoch (loss, learning rate, validation Dice, its moving average, seconds, waiting for data).

    It writes ``curve.csv`` whole after each epoch and logs a line. `RunState` attaches it, after validation.

    Args:
        output_dir: where ``curve.csv`` goes.
        evaluator: the validation engine, None without validation.
        per_target: the metric object whose ``per_target`` dict gets a column per target.
    """

    def __init__(
        self, output_dir: str, evaluator: Engine | None = None, per_target: Any = None, write: bool = True
    ) -> None:
        self.path = os.path.join(output_dir, "curve.csv")
        self.evaluator, self.per_target, self.write = evaluator, per_target, write
        self.rows: list[dict[str, Any]] = []
        self.losses: list[torch.Tensor] = []
        self.started, self.waiting = time.perf_counter(), Timer()
        self.validated = False

    def attach(self, engine: Engine) -> None:
        """Collect losses and times of every iteration of `engine`, write at the end of its epochs."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        self.waiting.attach(
            engine, Events.EPOCH_STARTED, pause=Events.GET_BATCH_COMPLETED, resume=Events.GET_BATCH_STARTED
        )
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        if self.evaluator is not None:
            self.evaluator.add_event_handler(Events.COMPLETED, self._mark)

    def _start(self, engine: Engine) -> None:
        self.losses, self.validated, self.started = [], False, time.perf_counter()
        self.learning_rate = float(engine.optimizer.param_groups[0]["lr"])  # the schedule steps at the epoch's end

    def _collect(self, engine: Engine) -> None:
        self.losses.append(engine.state.output[0][Keys.LOSS])
        self.iterated = time.perf_counter()

    def _mark(self, engine: Engine) -> None:
        self.validated = True

    @property
    def average(self) -> float | None:
        """Moving average of the validation metric so far."""
        return next((row["ema"] for row in reversed(self.rows) if row["ema"] is not None), None)

    def __call__(self, engine: Any) -> None:
        """Add this epoch's row."""
        training_s = max(self.iterated - self.started, 1e-9)
        row: dict[str, Any] = {
            "epoch": engine.state.epoch,
            "lr": self.learning_rate,
            "loss": float(torch.stack(self.losses).float().mean()),
            METRIC: None,
            "ema": None,
            "train_s": round(training_s, 3),
            "data_wait_s": round(self.waiting.value(), 3),
        }
        if self.validated:
            value = float(self.evaluator.state.metrics[METRIC])
            before = self.average
            row[METRIC] = value
            row["ema"] = value if before is None else MEMORY * before + (1 - MEMORY) * value
            row |= {f"dice_{name}": score for name, score in getattr(self.per_target, "per_target", {}).items()}
        self.rows.append(row)
        if not self.write:
            return
        write_csv(self.path, self.rows)
        dice = f", {METRIC} {row[METRIC]:.4f} (average {row['ema']:.4f})" if self.validated else ""
        share = 100 * row["data_wait_s"] / training_s
        logger.info(
            "epoch %d/%d: loss %.4f%s, lr %.2e, %.1f s, %.1f%% of it waiting for data",
            row["epoch"], engine.state.max_epochs, row["loss"], dice, row["lr"], training_s, share,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"rows": self.rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.rows = [dict(row) for row in state["rows"]]


def write_csv(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows (their keys together are the columns) atomically; None becomes an empty cell."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def write(temporary: str) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    atomic_write(path, write)
