"""What MONAI's trainer lacks for this recipe: the training step, the run's record, its checkpoints and its curve.

Everything here is a handler or a callable that a bundle config names; the loop itself is MONAI's SupervisedTrainer.
A run's state is written whole after every epoch and every random number is a function of (seed, epoch, position), so a
run that was killed at any moment goes on with the same command and ends with the same weights.
"""

from __future__ import annotations

import filecmp
import logging
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite import distributed as idist
from ignite.engine import Engine, Events
from torch import nn

from ..cases.pool import is_bare
from ..files import PARTIAL, atomic_write, check_writable
from ..names import counted
from ..network.sharding import gather_model, gather_state, scatter_state, set_shares, take_shares
from .checkpoint import save_weights
from .curve import Curve
from .run_settings import changed, description_of, digest, run_settings
from .sharded_state import ShardedStates, read_tensors, read_values
from .weight_files import CheckpointError, load_file, load_pt, write_pt

logger = logging.getLogger(__name__)

WEIGHTS_PER_INTERVAL = 200_000_000

STATE_KEYS = {"epoch", "parts", "curve", "best", "settings"}


class AllStepsSkipped(ArithmeticError):
    """An epoch in which no step had a finite gradient: the run learns nothing any more."""


def unwrap(network: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel or torch.compile."""
    while hasattr(network, "module") or hasattr(network, "_orig_mod"):
        network = network.module if hasattr(network, "module") else network._orig_mod
    return network


class RunState:
    """Handler: the run's whole state in ``last.pt`` after every epoch, and resuming from it; the best in ``model.pt``.

    Attach it last; it attaches `curve` before itself. Files are replaced atomically; the state of the epoch before stays
    as ``last_previous.pt``, from which a run goes on when ``last.pt`` is damaged. A folder that holds a run with other
    settings, cases, another network or optimizer is refused, a finished run is left as it is. ``model.pt`` is the epoch
    with the best moving average of the validation Dice; without validation, the last epoch.

    With `sharded` each process writes its share into a folder of ``last``, while training goes on (`ShardedStates`). A run may
    change from one way to the other, and its number of processes: it goes on from the newest state.

    Args:
        output_dir: the run's folder.
        network: the network, wrapped or not.
        parts: everything else with ``state_dict`` that has to go on where it stopped: ``optimizer``, schedule, step.
        curve: the run's `Curve`.
        settings: what makes this run this run (JSON); a resumed run must have the same.
        items: the training items; bare ones (MONAI Label) are never resumed: each request is a run of its own.
        ckpt_dir: folder of the bundle's ``model.pt``, replaced when the run ends; an older one is kept as
            ``model_previous.pt``, and a ``model.safetensors`` beside it is written anew. "none": only `output_dir` gets
            the weights.
        save_interval: only every n-th epoch (and the last) is written and can be the best; "auto": so many that a network
            of any size writes about as much per epoch (1 up to 200 million weights, 9 for the paper's network).
        write: False on all ranks but the first.
        sharded: write ``last/`` in place of ``last.pt``.

    Raises:
        OSError: a `ckpt_dir` that cannot be written.
        CheckpointError: a folder that holds a run with other settings; when the run starts, a damaged one alone.
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
        save_interval: int | str = 1,
        write: bool = True,
        sharded: bool = False,
    ) -> None:
        self.output_dir, self.network, self.parts, self.curve = output_dir, network, dict(parts), curve
        self.last_path, self.previous_path, self.model_path = (
            os.path.join(output_dir, name) for name in ("last.pt", "last_previous.pt", "model.pt")
        )
        self.resumable = not is_bare(items)
        self.settings = run_settings(settings, items, unwrap(network), self.parts["optimizer"])
        weights = sum(parameter.numel() for parameter in unwrap(network).parameters())
        self.save_interval = -(-weights // WEIGHTS_PER_INTERVAL) if save_interval == "auto" else int(save_interval)
        self.ckpt_dir, self.write = ckpt_dir, write
        self.best: float | None = None
        self.last_is_good, self.sharded = False, sharded
        self.shares = ShardedStates(os.path.join(output_dir, "last"), write)
        if write and ckpt_dir not in (None, "none"):
            check_writable(ckpt_dir, "--ckpt_dir; 'none' for no copy")
        if self.resumable:
            self._refuse_another_run()

    def _refuse_another_run(self) -> None:
        """CheckpointError where the folder holds a run with other settings; whether its states are whole shows later."""
        for path in (self.last_path, self.previous_path, *map(str, self.shares.finished())):
            try:
                state = _read_run(path, checked=True)
            except CheckpointError:
                continue
            return self._check_settings(state)

    def _check_settings(self, state: Mapping[str, Any]) -> None:
        if differs := changed(state, self.settings, unwrap(self.network)):
            raise CheckpointError(
                f"{self.output_dir} holds a run with other settings ({differs}). Give this run its own --output_dir, "
                "or use the settings of the run that is there to go on with it."
            )

    def attach(self, engine: Engine) -> None:
        """Resume when `engine` starts; at the end of its epochs complete the curve, then save; publish at its end."""
        self.curve.attach(engine)
        engine.add_event_handler(Events.STARTED, self._sweep)
        engine.add_event_handler(Events.STARTED, self.resume)
        engine.add_event_handler(Events.ITERATION_STARTED, self._seed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)
        engine.add_event_handler(Events.COMPLETED, lambda: self.shares.finish())
        engine.add_event_handler(Events.COMPLETED, self.publish)
        engine.add_event_handler(Events.COMPLETED, self._report_skipped)

    def _sweep(self, engine: Any) -> None:
        """Remove half-written files of a run that was killed."""
        if self.write:
            for path in Path(self.output_dir).glob(f".*{PARTIAL}"):
                path.unlink()
        self.shares.sweep()

    def _seed(self, engine: Any) -> None:
        """Dropout's random numbers follow from (seed, iteration, rank), whether the run was resumed or not."""
        torch.manual_seed(int(digest([self.settings.get("seed"), engine.state.iteration, idist.get_rank()])[:15], 16))

    def resume(self, engine: Any) -> None:
        """Go on from the newest state that is whole, if there is one."""
        source = self._choose() if self.resumable else None
        if source is None:
            return
        state = _read_run(source, checked=True)
        self._check_settings(state)
        if state["epoch"] > engine.state.max_epochs:
            raise CheckpointError(
                f"{self.output_dir}: the run there has {counted(state['epoch'], 'epoch')}, {engine.state.max_epochs} were asked for: "
                "give at least as many --epochs, or this run its own --output_dir"
            )
        if missing := [name for name in self.parts if name not in {"optimizer", *state["parts"]}]:
            raise CheckpointError(
                f"{self.output_dir}: the run there was without {missing} in its parts, which cannot begin in its middle: give "
                "this run its own --output_dir"
            )
        self.settings["recipe"] = self.settings["recipe"] or state["settings"].get("recipe", {})
        before = state.get("epochs", engine.state.max_epochs)  # what earlier versions wrote does not say it
        self._restore(state, source, other_length=before != engine.state.max_epochs)
        engine.state.epoch = state["epoch"]
        engine.state.iteration = state["epoch"] * engine.state.epoch_length
        done = " (the run is complete)" if state["epoch"] == engine.state.max_epochs else ""
        logger.info("resuming after epoch %d of %d from %s%s", state["epoch"], engine.state.max_epochs, source, done)
        if before != engine.state.max_epochs:
            logger.info(
                "%s of %d asked for before done, %d asked for now: the learning rate goes on as in a run of %d epochs, with %.3g next",
                counted(state["epoch"], "epoch"), before, engine.state.max_epochs, engine.state.max_epochs,
                self.parts["optimizer"].param_groups[0]["lr"],
            )  # fmt: skip

    def _restore(self, state: Mapping[str, Any], source: str, other_length: bool) -> None:
        """Network, parts, curve and best as they were in the state that lies at `source`, of a run of another length or not."""
        network, optimizer = unwrap(self.network), self.parts["optimizer"]
        rates = [group["lr"] for group in optimizer.param_groups] if other_length else None
        if "model" in state:
            scatter_state(network, optimizer, state["model"], state["parts"]["optimizer"])
        else:
            tensors, _ = take_shares(network, optimizer)
            read_tensors(source, tensors)
            set_shares(network, optimizer, tensors, state["shares"])
        for name, part in self.parts.items():
            if name == "lr_scheduler":
                _go_on(part, state["parts"][name], rates)
            elif name != "optimizer":
                part.load_state_dict(state["parts"][name])
        self.curve.load_state_dict(state["curve"])
        self.best = state["best"]

    def _choose(self) -> str | None:
        """Path of the newest state that is whole, which the first process looks for; None where there is none at all."""
        if idist.get_world_size() == 1:
            return self._newest()
        found: list[Any] = [None]
        if idist.get_rank() == 0:
            try:
                found = [self._newest()]
            except CheckpointError as error:
                found = [error]
        torch.distributed.broadcast_object_list(found)
        if isinstance(found[0], CheckpointError):
            raise found[0]
        return found[0]

    def _newest(self) -> str | None:
        files, whole, damaged = [self.last_path, self.previous_path], {}, []
        for paths in (files if any(map(os.path.exists, files)) else [], map(str, self.shares.finished())):
            for path in paths:
                try:
                    whole[path] = _read_run(path)["epoch"]
                    break
                except CheckpointError as error:
                    damaged.append(error)
        self.last_is_good = self.last_path in whole
        if damaged and not whole:
            place = self.last_path if any(map(os.path.exists, files)) else self.shares.folder
            raise CheckpointError(
                f"{damaged[0]}. There is no earlier state to go on from either: remove {place} to begin anew (the "
                f"best weights so far are in {self.model_path}), or give another --output_dir"
            )
        newest = max(whole, key=whole.__getitem__, default=None)
        for error in damaged:
            logger.warning("%s. Going on from %s, after epoch %d", error, newest, whole[newest])
        return newest

    def save(self, engine: Any) -> None:
        """Write ``model.pt`` if this epoch is the best, and ``last.pt``, where it is this epoch's turn."""
        is_last = engine.state.epoch == engine.state.max_epochs or engine.should_terminate  # an EarlyStopHandler's word
        if engine.state.epoch % self.save_interval and not is_last:
            return
        network, optimizer = unwrap(self.network), self.parts["optimizer"]
        network.description["epoch"] = engine.state.epoch
        average = self.curve.average
        validated = any(row["ema"] is not None for row in self.curve.rows[-self.save_interval :])
        is_best = average is None or (validated and (self.best is None or average >= self.best))  # of equals the later
        if is_best:
            self.best = average
        state = {
            "epoch": engine.state.epoch,
            "epochs": engine.state.max_epochs,
            "parts": {name: part.state_dict() for name, part in self.parts.items() if name != "optimizer"},
            "curve": self.curve.state_dict(),
            "best": self.best,
            "settings": self.settings,
        }
        if self.sharded:
            best = gather_model(network) if is_best else {}
            tensors, state["shares"] = take_shares(network, optimizer)
            self.shares.begin(
                engine.state.epoch, tensors, state, lambda: save_weights(best, self.model_path) if best else None
            )
            return
        state["model"], state["parts"]["optimizer"] = gather_state(network, optimizer)
        if not self.write:
            return
        if is_best:
            save_weights(state["model"], self.model_path)
        atomic_write(self.last_path, lambda temporary: self._write_last(state, temporary))

    def _write_last(self, state: Mapping[str, Any], temporary: str) -> None:
        """Write to `temporary`, and only then let the file that it will replace become the previous one."""
        write_pt(state, temporary)
        if self.last_is_good and os.path.exists(self.last_path):
            os.replace(self.last_path, self.previous_path)
        self.last_is_good = True

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
        if os.path.exists(beside := os.path.join(self.ckpt_dir, "model.safetensors")):  # of the weights before
            save_weights(load_file(self.model_path), beside)
        logger.info("weights: %s (copied to %s)", self.model_path, target)

    def _report_skipped(self, engine: Any) -> None:
        """End the run's output with the number of skipped steps, if there were any."""
        skipped = getattr(self.parts.get("step"), "skipped", 0)
        if skipped and self.write:
            logger.warning(
                "%d of %d steps (%.0f%%) were skipped, since their gradient was not finite%s",
                skipped, engine.state.iteration, 100 * skipped / engine.state.iteration,
                "" if skipped < 0.05 * engine.state.iteration else
                ": the weights learned less than they could. Try a lower --learning_rate, or --amp False (float32)",
            )  # fmt: skip


def _read_run(path: str, checked: bool = False) -> dict[str, Any]:
    """What a state holds, but for the tensors in a folder; CheckpointError where it is damaged (unless `checked`) or another."""
    if not os.path.exists(path):
        raise CheckpointError(f"{path} is not there")
    is_folder = os.path.isdir(path)
    state = read_values(path, checked) if is_folder else load_pt(path, mmap=os.name == "posix", checked=checked)
    own = "shares" if is_folder else "model"
    if not isinstance(state, Mapping) or not set(state) >= {*STATE_KEYS, own} or not isinstance(state[own], Mapping):
        raise CheckpointError(f"{path} is no state of a training run")
    description_of(state, path)
    return dict(state)


def _go_on(schedule: Any, saved: Mapping[str, Any], rates: Sequence[float] | None = None) -> None:
    """Let `schedule` go on after the epochs of the saved one, of which it may be a longer version, with its own rates.

    So of a schedule that is a function of the epoch only the counters are taken. One that computes each rate from the one
    before is taken as saved, or, in a run of another length, stepped again from the `rates` with which it begins.
    """
    by_metric = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
    if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        if rates is None or by_metric:
            schedule.load_state_dict(saved)
            return
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the optimizer has taken no step in this process
            for _ in range(saved["last_epoch"]):
                schedule.step()
        return
    schedule.last_epoch, schedule._step_count = saved["last_epoch"], saved["_step_count"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of get_lr, when nothing steps
        schedule._last_lr = schedule.get_lr()
    for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate
