"""One optimisation step and one validation step, and the learning rate over the epochs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.handlers import ValidationHandler
from monai.utils import CommonKeys as Keys
from torch import nn
from torch.distributed.tensor import DTensor

from ..network.cpu import autocast
from .run_state import AllStepsSkipped

logger = logging.getLogger(__name__)


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
        inputs, targets = self.batch(engine, batch)
        engine.state.output = {Keys.IMAGE: inputs, Keys.LABEL: targets}
        with autocast(engine.state.device, self.amp, self.amp_dtype):
            engine.state.output[Keys.PRED] = engine.inferer(inputs, engine.network)
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)

    def batch(self, engine: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Images in the weights' type and codes, on the device."""
        images, codes = engine.prepare_batch(batch, engine.state.device, engine.non_blocking, **engine.to_kwargs)
        kind = next(engine.network.parameters()).dtype
        return images.to(dtype=kind, memory_format=torch.channels_last_3d), codes


class TrainStep(AutocastStep):
    """One optimisation step: forward, loss, backward, gradient clipping, optimiser (nnU-Net's order).

    A step whose gradient is not finite changes nothing and is counted in ``skipped``. Gradients of `accumulation_steps`
    iterations (of the trainer) are averaged before each step of the optimizer, as in MONAI's own iteration.

    Args:
        clip_norm: largest gradient norm (nnU-Net: 12); 0 switches clipping off.

    Raises:
        AllStepsSkipped: at the end of an epoch without a single finite gradient.
    """

    def __init__(self, amp: bool = True, amp_dtype: str = "bfloat16", clip_norm: float = 12.0) -> None:
        super().__init__(amp, amp_dtype)
        self.clip_norm, self.skipped, self.skipped_in_epoch = clip_norm, 0, 0
        place = "cuda" if torch.cuda.is_available() else "cpu"  # on processors some have float16 arithmetic, too
        self.scaler = torch.amp.GradScaler(place, enabled=amp and amp_dtype == "float16")

    def __call__(self, engine: Any, batch: Any) -> list[dict[str, Any]]:
        """The iteration_update of SupervisedTrainer.

        Returns image, label, prediction and loss of the batch, in a list as MONAI's handlers expect of a decollated output.
        """
        together, length = getattr(engine, "accumulation_steps", 1), engine.state.epoch_length
        place = (engine.state.iteration - 1) % length + 1
        engine.network.train()
        if (place - 1) % together == 0:
            engine.optimizer.zero_grad(set_to_none=True)
        self.forward(engine, batch)
        output = engine.state.output
        output[Keys.LOSS] = engine.loss_function(output[Keys.PRED], output[Keys.LABEL])
        engine.fire_event(IterationEvents.LOSS_COMPLETED)
        self.scaler.scale(output[Keys.LOSS] / together).backward()
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        if place % together == 0 or place == length:
            self._step(engine, together)
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        output[Keys.LOSS] = output[Keys.LOSS].detach()
        return [output]

    def _step(self, engine: Any, together: int) -> None:
        """Clip the gradient and let the optimizer take its step, unless the gradient is not finite."""
        self.scaler.unscale_(engine.optimizer)
        parameters = [p for group in engine.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.clip_norm or float("inf"))
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        finite = bool(torch.isfinite(norm))
        if finite or self.scaler.is_enabled():  # the scaler leaves such a step out by itself
            self.scaler.step(engine.optimizer)
        else:
            logger.warning("iteration %d: gradient norm is %s, step skipped", engine.state.iteration, float(norm))
        self.scaler.update()
        self._count(engine.state, finite, together)

    def _count(self, state: Any, finite: bool, together: int) -> None:
        """Count a skipped step; at an epoch's end raise if it had no other, unless a loss scale is still being sought."""
        place = (state.iteration - 1) % state.epoch_length + 1
        self.skipped += not finite
        self.skipped_in_epoch = (0 if place <= together else self.skipped_in_epoch) + (not finite)
        steps = -(-state.epoch_length // together)
        if self.skipped_in_epoch == steps and self.scaler.get_scale() <= 1:
            raise AllStepsSkipped(
                f"all {steps} steps of epoch {state.epoch} were skipped: no gradient was finite (last loss: "
                f"{float(state.output[Keys.LOSS].detach()):.4g}), so nothing is learned. Try a tenth of --learning_rate, or --amp "
                "False (float32), in a new --output_dir; if that fails from the first epoch on, look at the images' values."
            )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"skipped": self.skipped, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.skipped = state["skipped"]
        if state["scaler"]:  # empty where the run began on a device that does not scale
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
    optimizer: torch.optim.Optimizer, epochs: int, power: float = 0.9, warmup_epochs: int | str = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """lr (1 - e/E)^0.9 per epoch (nnU-Net), after a linear warm-up over `warmup_epochs` (MultiTalent's fine-tuning).

    "auto", a schedule's own warm-up, is none.
    """
    warmup_epochs = 0 if warmup_epochs == "auto" else warmup_epochs

    def factor(epoch: int) -> float:
        if epoch < warmup_epochs:
            return (epoch + 1) / (warmup_epochs + 1)
        return max(1 - (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1), 0.0) ** power

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Validate(ValidationHandler):
    """MONAI's ValidationHandler, after the last epoch too where `interval` does not divide it: its weights may be the best."""

    def attach(self, engine: Engine) -> None:
        """Validate after every `interval` epochs of `engine`, and after its last."""
        super().attach(engine)
        last = Events.EPOCH_COMPLETED(
            event_filter=lambda engine, epoch: epoch == engine.state.max_epochs and epoch % self.interval > 0
        )
        engine.add_event_handler(last, self)
