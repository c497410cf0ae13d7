"""What MONAI's trainer lacks for this recipe: the training step, the run's record, its checkpoints and its curve.

Everything here is a handler or a callable that a bundle config names; the loop itself is MONAI's SupervisedTrainer.
A run's state is written whole after every epoch and every random number is a function of (seed, epoch, position), so a
run that was killed at any moment goes on with the same command and ends with the same weights.
"""

from __future__ import annotations

import csv
import filecmp
import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from ignite import distributed as idist
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys as Keys
from torch import nn
from torch.distributed.tensor import DTensor

from ._version import __version__
from .checkpoint import PARTIAL, CheckpointError, atomic_write, save_weights
from .errors import config_files
from .pool import is_bare
from .precision import autocast
from .sharding import gather_state, is_sharded, scatter_state

logger = logging.getLogger(__name__)

RECORDED_PACKAGES = ("monai", "torch", "numpy", "pytorch-ignite", "nibabel", "blosc2", "scipy")


def unwrap(network: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel or torch.compile."""
    while hasattr(network, "module") or hasattr(network, "_orig_mod"):
        network = network.module if hasattr(network, "module") else network._orig_mod
    return network


class AutocastStep:
    """One iteration under autocast on any device (MONAI's own engines autocast for CUDA only).

    Args:
        amp: mixed precision, on devices that compute in it.
        amp_dtype: ``bfloat16`` (default), or ``float16`` with loss scaling for GPUs without bfloat16.
    """

    def __init__(self, amp: bool = True, amp_dtype: str = "bfloat16") -> None:
        if amp_dtype not in ("bfloat16", "float16"):
            raise ValueError(f"amp_dtype is {amp_dtype!r}; expected 'bfloat16' or 'float16'")
        self.amp, self.amp_dtype = amp, getattr(torch, amp_dtype)

    def forward(self, engine: Any, batch: Any) -> None:
        """Move the batch to the device, run the network, put image, label and prediction into ``state.output``."""
        inputs, targets = engine.prepare_batch(batch, engine.state.device, engine.non_blocking, **engine.to_kwargs)
        parameter = next(engine.network.parameters())
        inputs = inputs.to(dtype=parameter.dtype, memory_format=torch.channels_last_3d)
        engine.state.output = {Keys.IMAGE: inputs, Keys.LABEL: targets}
        with autocast(engine.state.device, self.amp, self.amp_dtype):
            engine.state.output[Keys.PRED] = engine.inferer(inputs, engine.network)
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)


class TrainStep(AutocastStep):
    """One optimisation step: forward, loss, backward, gradient clipping, optimiser (nnU-Net's order).

    A step whose gradient is not finite changes nothing and is counted in ``skipped``.

    Args:
        clip_norm: largest gradient norm (nnU-Net: 12); 0 switches clipping off.
    """

    def __init__(self, amp: bool = True, amp_dtype: str = "bfloat16", clip_norm: float = 12.0) -> None:
        super().__init__(amp, amp_dtype)
        self.clip_norm, self.skipped = clip_norm, 0
        self.scaler = torch.amp.GradScaler(enabled=amp and amp_dtype == "float16")

    def __call__(self, engine: Any, batch: Any) -> list[dict[str, Any]]:
        """The iteration_update of SupervisedTrainer.

        Returns image, label, prediction and loss of the batch, in a list as MONAI's handlers expect of a decollated output.
        """
        engine.network.train()
        engine.optimizer.zero_grad(set_to_none=True)
        self.forward(engine, batch)
        output = engine.state.output
        output[Keys.LOSS] = engine.loss_function(output[Keys.PRED], output[Keys.LABEL])
        engine.fire_event(IterationEvents.LOSS_COMPLETED)
        self.scaler.scale(output[Keys.LOSS]).backward()
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        self.scaler.unscale_(engine.optimizer)
        parameters = [p for group in engine.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.clip_norm or float("inf"))
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self.scaler.is_enabled() or torch.isfinite(norm):
            self.scaler.step(engine.optimizer)
        else:
            self.skipped += 1
            logger.warning("iteration %d: gradient norm is %s, step skipped", engine.state.iteration, float(norm))
        self.scaler.update()
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        output[Keys.LOSS] = output[Keys.LOSS].detach()
        return [output]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"skipped": self.skipped, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.skipped = state["skipped"]
        self.scaler.load_state_dict(state["scaler"])


class EvalStep(AutocastStep):
    """One validation iteration without gradients."""

    def __call__(self, engine: Any, batch: Any) -> dict[str, Any]:
        """The iteration_update of SupervisedEvaluator."""
        engine.network.eval()
        with torch.no_grad():
            self.forward(engine, batch)
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output


def poly_schedule(
    optimizer: torch.optim.Optimizer, epochs: int, power: float = 0.9, warmup_epochs: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """lr (1 - e/E)^0.9 per epoch (nnU-Net), after a linear warm-up over `warmup_epochs` (MultiTalent's fine-tuning)."""

    def factor(epoch: int) -> float:
        if epoch < warmup_epochs:
            return (epoch + 1) / (warmup_epochs + 1)
        return max(1 - (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1), 0.0) ** power

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Curve:
    """Handler: one row per epoch (loss, learning rate, validation Dice, its moving average, seconds, waiting for data).

    It writes ``curve.csv`` whole after each epoch and logs a line. `RunState` attaches it, after validation.

    Args:
        output_dir: where ``curve.csv`` goes.
        metric: name of the validation metric in the evaluator's state.
        evaluator: the validation engine, None without validation.
        alpha: weight of the past in the moving average (nnU-Net: 0.9).
        per_target: the metric object whose ``per_target`` dict gets a column per target.
    """

    def __init__(
        self, output_dir: str, metric: str = "val_mean_dice", evaluator: Engine | None = None, alpha: float = 0.9,
        per_target: Any = None, write: bool = True,
    ) -> None:  # fmt: skip
        self.path = os.path.join(output_dir, "curve.csv")
        self.metric, self.evaluator, self.alpha = metric, evaluator, alpha
        self.per_target, self.write = per_target, write
        self.rows: list[dict[str, Any]] = []
        self.losses: list[torch.Tensor] = []
        self.started = self.waiting_since = time.perf_counter()
        self.waited = 0.0
        self.validated = False

    def attach(self, engine: Engine) -> None:
        """Collect losses and times of every iteration of `engine`, write at the end of its epochs."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._wait)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._got)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        if self.evaluator is not None:
            self.evaluator.add_event_handler(Events.COMPLETED, self._mark)

    def _start(self, engine: Engine) -> None:
        self.losses, self.waited, self.validated, self.started = [], 0.0, False, time.perf_counter()
        self.learning_rate = float(engine.optimizer.param_groups[0]["lr"])  # the schedule steps at the epoch's end

    def _wait(self, engine: Engine) -> None:
        self.waiting_since = time.perf_counter()

    def _got(self, engine: Engine) -> None:
        self.waited += time.perf_counter() - self.waiting_since

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
            self.metric: None,
            "ema": None,
            "train_s": round(training_s, 3),
            "data_wait_s": round(self.waited, 3),
        }
        if self.validated:
            value = float(self.evaluator.state.metrics[self.metric])
            before = self.average
            row[self.metric] = value
            row["ema"] = value if before is None else self.alpha * before + (1 - self.alpha) * value
            row |= {f"dice_{name}": score for name, score in getattr(self.per_target, "per_target", {}).items()}
        self.rows.append(row)
        if not self.write:
            return
        write_csv(self.path, self.rows)
        dice = f", {self.metric} {row[self.metric]:.4f} (average {row['ema']:.4f})" if self.validated else ""
        share = 100 * self.waited / training_s
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


class RunState:
    """Handler: the run's whole state in ``last.pt`` after every epoch, and resuming from it; the best in ``model.pt``.

    Attach it last; it attaches `curve` before itself. Files are replaced atomically. A folder that holds a run with other
    settings, cases, another network or optimizer is refused, a finished run is left as it is. ``model.pt`` is the epoch
    with the best moving average of the validation Dice; without validation, the last epoch.

    Args:
        output_dir: the run's folder.
        network: the network, wrapped or not.
        parts: everything else with ``state_dict`` that has to go on where it stopped: ``optimizer``, schedule, step.
        curve: the run's `Curve`.
        settings: what makes this run this run (JSON); a resumed run must have the same.
        items: the training items; bare ones (MONAI Label) are never resumed: each request is a run of its own.
        ckpt_dir: folder of the bundle's ``model.pt``, replaced when the run ends; an older one is kept as
            ``model_previous.pt``. "none": only `output_dir` gets the weights.
        save_interval: epochs between two writes of ``last.pt``.
        write: False on all ranks but the first.

    Raises:
        CheckpointError: when the run starts in a folder that holds a run with other settings.
    """

    def __init__(
        self,
        output_dir: str,
        network: nn.Module,
        parts: Mapping[str, Any],
        curve: Curve,
        settings: Mapping[str, Any],
        items: Sequence[Mapping[str, Any]] = (),
        ckpt_dir: str | None = None,
        save_interval: int = 1,
        write: bool = True,
    ) -> None:
        self.output_dir, self.network, self.parts, self.curve = output_dir, network, dict(parts), curve
        self.resumable = not is_bare(items)
        paths = [[str(item.get("dataset")), str(item.get("case", item["image"]))] for item in items]
        self.settings = {
            **settings,
            "cases": _digest(sorted(paths)),
            "network": _digest([[name, *tensor.shape] for name, tensor in unwrap(network).named_parameters()]),
            "optimizer": type(self.parts["optimizer"]).__name__,
            "optimizer_options": {key: value for key, value in self.parts["optimizer"].defaults.items() if key != "lr"},
        }
        self.settings = json.loads(json.dumps(self.settings, default=str))
        self.ckpt_dir, self.save_interval, self.write = ckpt_dir, save_interval, write
        self.best: float | None = None

    @property
    def last_path(self) -> str:
        """The file to resume from."""
        return os.path.join(self.output_dir, "last.pt")

    @property
    def model_path(self) -> str:
        """The best weights so far."""
        return os.path.join(self.output_dir, "model.pt")

    def attach(self, engine: Engine) -> None:
        """Resume when `engine` starts; at the end of its epochs complete the curve, then save; publish at its end."""
        self.curve.attach(engine)
        engine.add_event_handler(Events.STARTED, self._sweep)
        engine.add_event_handler(Events.STARTED, self.resume)
        engine.add_event_handler(Events.ITERATION_STARTED, self._seed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)
        engine.add_event_handler(Events.COMPLETED, self.publish)

    def _sweep(self, engine: Any) -> None:
        """Remove half-written files of a run that was killed."""
        if self.write:
            for path in Path(self.output_dir).glob(f".*{PARTIAL}"):
                path.unlink()

    def _seed(self, engine: Any) -> None:
        """Dropout's random numbers follow from (seed, iteration, rank), whether the run was resumed or not."""
        torch.manual_seed(int(_digest([self.settings.get("seed"), engine.state.iteration, idist.get_rank()])[:15], 16))

    def resume(self, engine: Any) -> None:
        """Go on from ``last.pt`` where there is one."""
        if not self.resumable or not os.path.exists(self.last_path):
            return
        state = torch.load(self.last_path, map_location="cpu", weights_only=True)
        changed = {
            key: (state["settings"].get(key), self.settings.get(key))
            for key in {*state["settings"], *self.settings}
            if state["settings"].get(key) != self.settings.get(key)
        }
        if changed:
            listing = "; ".join(f"{key}: was {old}, is {new}" for key, (old, new) in sorted(changed.items()))
            raise CheckpointError(
                f"{self.output_dir} holds a run with other settings ({listing}). Give this run its own --output_dir, "
                "or use the settings of the run that is there to go on with it."
            )
        if state["epoch"] > engine.state.max_epochs:
            raise CheckpointError(
                f"{self.output_dir}: the run there has {state['epoch']} epochs, {engine.state.max_epochs} were asked for"
            )
        parts = dict(self.parts)
        if is_sharded(self.network):
            scatter_state(self.network, parts.pop("optimizer"), state["model"], state["parts"]["optimizer"])
        else:
            unwrap(self.network).load_state_dict(state["model"])
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        self._set_rates()
        self.curve.load_state_dict(state["curve"])
        self.best = state["best"]
        engine.state.epoch = state["epoch"]
        engine.state.iteration = state["epoch"] * engine.state.epoch_length
        done = " (the run is complete)" if state["epoch"] == engine.state.max_epochs else ""
        logger.info(
            "resuming after epoch %d of %d from %s%s", state["epoch"], engine.state.max_epochs, self.last_path, done
        )

    def _set_rates(self) -> None:
        """Learning rates of the epoch to come by this run's schedule, which may be longer than the one that was saved."""
        schedule = self.parts.get("lr_scheduler")
        if schedule is not None:
            groups = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
            for group, base, factor in groups:
                group["lr"] = base * factor(schedule.last_epoch)

    def save(self, engine: Any) -> None:
        """Write ``model.pt`` if this epoch is the best, and ``last.pt``."""
        network = unwrap(self.network)
        network.description["epoch"] = engine.state.epoch
        parts = {name: part.state_dict() for name, part in self.parts.items() if name != "optimizer"}
        if is_sharded(network):
            model, parts["optimizer"] = gather_state(network, self.parts["optimizer"])
        else:
            model, parts["optimizer"] = network.state_dict(), self.parts["optimizer"].state_dict()
        if not self.write:
            return
        average = self.curve.average
        is_best = average is None or (
            self.curve.rows[-1]["ema"] is not None and (self.best is None or average > self.best)
        )
        if is_best:
            self.best = average
            save_weights(model, self.model_path)
        if engine.state.epoch % self.save_interval == 0 or engine.state.epoch == engine.state.max_epochs:
            state = {
                "epoch": engine.state.epoch,
                "model": model,
                "parts": parts,
                "curve": self.curve.state_dict(),
                "best": self.best,
                "settings": self.settings,
            }
            atomic_write(self.last_path, lambda temporary: torch.save(state, temporary))

    def publish(self, engine: Any) -> None:
        """Copy the best weights to the bundle's models folder."""
        if not self.write or self.ckpt_dir in (None, "none") or not os.path.exists(self.model_path):
            return
        target = os.path.join(self.ckpt_dir, "model.pt")
        if os.path.exists(target) and not filecmp.cmp(target, self.model_path, shallow=False):
            atomic_write(
                os.path.join(self.ckpt_dir, "model_previous.pt"), lambda temporary: shutil.copyfile(target, temporary)
            )
        atomic_write(target, lambda temporary: shutil.copyfile(self.model_path, temporary))
        logger.info("weights: %s (copied to %s)", self.model_path, target)


class RunRecord:
    """Handler: writes ``run.json`` when the run starts: command, configs, settings, versions, pool summary.

    Args:
        output_dir: the run's folder; created, and tried for writing, before anything long starts.
        settings: the run's settings.
        pool: the `DatasetPool`, or None.
        items: training items (counted where there is no pool).

    Raises:
        OSError: a folder that cannot be written.
    """

    def __init__(
        self, output_dir: str, settings: Mapping[str, Any], pool: Any = None, items: Sequence[Any] = ()
    ) -> None:
        self.path, self.settings, self.pool, self.items = (
            os.path.join(output_dir, "run.json"),
            dict(settings),
            pool,
            items,
        )
        try:
            os.makedirs(output_dir, exist_ok=True)
            atomic_write(os.path.join(output_dir, ".writable"), lambda temporary: None)
            os.remove(os.path.join(output_dir, ".writable"))
        except OSError as error:
            raise OSError(
                f"output folder {os.path.abspath(output_dir)} cannot be written ({error}); choose another --output_dir"
            ) from None

    def attach(self, engine: Engine) -> None:
        """Write when `engine` starts."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Any) -> None:
        """Write the record; an earlier one of a resumed run is kept in its ``earlier`` list."""
        bare = is_bare(self.items)
        record = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": sys.argv,
            "folder": os.getcwd(),
            "configs": {path: json.loads(Path(path).read_text(encoding="utf-8")) for path in config_files(sys.argv)},
            "settings": self.settings,
            "epochs": engine.state.max_epochs,
            "versions": versions(),
            "pool": None if bare or self.pool is None else self.pool.summary(),
            "training_cases": len(self.items),
        }
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as file:
                before = json.load(file)
            record["earlier"] = [*before.pop("earlier", []), before]
        atomic_write(self.path, lambda temporary: _dump_json(record, temporary))


def versions() -> dict[str, str]:
    """Versions of this package (with its git commit where it is a checkout), Python, the machine and key packages."""
    found = {"tsfm": __version__, "python": platform.python_version(), "machine": platform.platform()}
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        commit = subprocess.run(
            ["git", "-C", folder, "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
        if commit.returncode == 0:
            found["git"] = commit.stdout.strip()
    except OSError:
        pass
    for package in RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_csv(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows (their keys together are the columns) atomically; None becomes an empty cell."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def write(temporary: str) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    atomic_write(path, write)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _dump_json(value: Any, path: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=4, default=str)
