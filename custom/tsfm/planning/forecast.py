"""What a plan costs in time: measured on the run's own first steps, or on a few steps with random numbers."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn

from ..files import check_writable, write_json
from ..names import counted
from ..network.cpu import autocast
from ..options import OptionError
from ..schema import check
from ..training.step_memory import fit_memory
from .own_data import count_channels, dataset_pool
from .plan import describe_images, downstream_network, plan_preparation
from .plan_run import describe_plan, plan_run
from .planner import Plan

logger = logging.getLogger(__name__)

WARM_UP, TIMED = 3, 5  # steps; the first ones reserve memory and choose kernels


class Forecast:
    """Handler: writes the run's plan as ``plan.json`` in `output_dir`, and after a few steps says how long the run takes.

    ``plan.json`` is what ``--plan FILE`` takes back; seconds per step and hours in all join it once they are measured.
    """

    def __init__(self, output_dir: str, plan: Plan, write: bool = True) -> None:
        self.path, self.plan, self.write = os.path.join(output_dir, "plan.json"), plan, write
        self.stamps: list[float] = []

    def attach(self, engine: Engine) -> None:
        """Write when `engine` starts, time its first iterations."""
        engine.add_event_handler(Events.STARTED, self.save)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._stamp)

    def save(self, engine: Any = None, **measured: float) -> None:
        """Write the plan, and what was measured of it."""
        if self.write:
            write_json(self.path, self.plan.to_dict() | measured)

    def _stamp(self, engine: Engine) -> None:
        if len(self.stamps) > TIMED:
            return
        steps = min(engine.state.epoch_length, WARM_UP)
        if len(self.stamps) or engine.state.iteration % engine.state.epoch_length == steps % engine.state.epoch_length:
            self.stamps.append(time.perf_counter())
        if len(self.stamps) == TIMED + 1:
            step = (self.stamps[-1] - self.stamps[0]) / TIMED
            left = engine.state.max_epochs * engine.state.epoch_length - engine.state.iteration
            self.save(measured_step_seconds=step, hours=step * left / 3600)
            if self.write:
                logger.info("%s", in_words(step, engine.state.epoch_length, left))


def in_words(step_seconds: float, iterations: int, steps: int) -> str:
    """Seconds per step and epoch and hours for `steps` steps, validation not included."""
    return (
        f"measured: {step_seconds:.2f} s a step, {step_seconds * iterations:.0f} s an epoch of {counted(iterations, 'step')}, "
        f"{_duration(step_seconds * steps)} for {counted(steps, 'step')} (validation comes on top)"
    )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.2g} min" if seconds < 1800 else f"{seconds / 3600:.2g} h"


def time_steps(
    network: nn.Module, plan: Plan, in_channels: int, device: torch.device, checkpointing: bool | str = "auto"
) -> float:
    """Seconds of one training step of `network` on random images of the plan's patch and batch.

    Raises:
        ValueError: a step that exceeds the device's memory, as `fit_memory`.
    """
    network = network.to(device).train()
    optimizer = torch.optim.SGD(network.parameters(), 1e-6, momentum=0.99, fused=device.type == "cuda")
    fit_memory(network, optimizer, plan.patch_size, plan.batch_size, checkpointing, device=device)
    images = torch.randn(plan.batch_size, in_channels, *plan.patch_size, device=device)
    images = images.to(memory_format=torch.channels_last_3d)
    seconds = []
    for _ in range(WARM_UP):
        start = time.perf_counter()
        with autocast(device):
            outputs = network(images)
        loss = sum(output.float().square().mean() for output in outputs)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def plan(
    dataset_dir: str,
    output_file: str | None = None,
    pretrained: str | None = None,
    spacing_mm: Any = "auto",
    patch_size: Any = "auto",
    batch_size: Any = "auto",
    network_size: str = "auto",
    memory_gb: float | None = None,
    step_seconds: float | None = None,
    device: str | None = None,
    checkpointing: bool | str = "auto",
    epochs: int = 100,
    iterations_per_epoch: int = 250,
    ct_normalization: Any = "fingerprint",
    store_dir: str | None = None,
    timed: bool = True,
    pool_file: str | None = None,
    images: Any = "images",
    labels: str = "labels",
    label_ids: dict[str, Any] | None = None,
    regions: dict[str, Any] | None = None,
    modality: str | None = None,
    licence: str = "any",
) -> None:
    """Show what a fine-tuning run would do with a data set: spacing, patch, network, memory, images, time; nothing is trained.

    The options are the ids of the bundle's train.json.

    Args:
        dataset_dir: the data set; pool_file, images, labels, label_ids, regions, modality and licence say what it is.
        output_file: also write the plan, for ``--plan FILE``.
        memory_gb, step_seconds: the budget: of a GPU, of a CPU core.
        device: "cuda" or "cpu"; default: a GPU where there is one.
        epochs, iterations_per_epoch: for the hours in all.
        store_dir: the run's store, where the data's fingerprint is kept; by default nothing is kept.
        timed: run a few training steps on random numbers.
    """
    given = {
        "spacing_mm": spacing_mm, "patch_size": patch_size, "batch_size": batch_size, "memory_gb": memory_gb,
        "step_seconds": step_seconds, "checkpointing": checkpointing, "epochs": epochs,
        "iterations_per_epoch": iterations_per_epoch, "ct_normalization": ct_normalization, "licence": licence,
        "label_ids": label_ids, "regions": regions,
    }  # fmt: skip
    check(given, "options", "command line", OptionError)
    if output_file:
        check_writable(os.path.dirname(os.path.abspath(output_file)), "--output_file")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pool = dataset_pool(
        dataset_dir, pool_file, images, labels, regions, label_ids, modality, pretrained, licence=licence
    )
    channels = count_channels(pool, pretrained)
    with tempfile.TemporaryDirectory() as folder:
        found = plan_run(
            pool, store_dir or folder, spacing_mm, patch_size, batch_size, network_size, pretrained, memory_gb, step_seconds,
            place, channels, "all", checkpointing,
        )  # fmt: skip
        prepared = plan_preparation(pool, store_dir or folder, found.spacing_mm, ct_normalization, channels, pretrained)
    print(describe_plan(found, pretrained=pretrained))
    if pool.entries:
        print(f"  images    {describe_images(pool, prepared)}")
    if output_file:
        write_json(output_file, found.to_dict())
    if timed:
        network = downstream_network(
            pool, found.patch_size, channels, pretrained, found, checkpointing=checkpointing is True
        )
        step = time_steps(network, found, channels, place, checkpointing=checkpointing)
        print(f"  {in_words(step, iterations_per_epoch, epochs * iterations_per_epoch)}")
