"""Does the GPU compute what the CPU computes? Convolutions, loss, network, checkpointing, loss scaling, sliding window.

python benchmarks/gpu/checks.py
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from record import DEVICE, attempt, record
from steps import TARGETS, engine, keep_channels_last, table
from tsfm.inference.windows import SlabInferer
from tsfm.network.loss import PartialLabelLoss
from tsfm.network.tsfm_net import TSFM
from tsfm.training.steps import TrainStep

SIZE = (16, 32, 32)
ARGUMENTS = {
    "in_channels": 1, "out_channels": TARGETS, "features": (16, 32, 64), "depths_down": (1, 1, 1), "depths_up": (1, 1),
    "strides": ((2, 2, 2), (2, 2, 2)), "img_size": SIZE, "hidden_size": 48, "num_layers": 2, "num_heads": 4, "mlp_dim": 96,
}  # fmt: skip


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||, in float64 on the CPU."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm())


def verdict(what: str, error: float, bound: float) -> None:
    """One row; NaN fails."""
    record("checks", what=what, relative_error=f"{error:.1e}", bound=f"{bound:.0e}", holds=bool(error <= bound))


def convolutions() -> None:
    """Gradients of 3x3x3 convolutions of volumes that are one to four voxels deep, in bfloat16 against float64."""
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        worst = 0.0
        for depth in (1, 2, 3, 4):
            for stride in (1, (1, 2, 2)):
                torch.manual_seed(depth)
                x, w = torch.randn(2, 64, depth, 10, 12), torch.randn(64, 64, 3, 3, 3) / 40
                results = []
                for device, kind in ((DEVICE, torch.bfloat16), ("cpu", torch.float64)):
                    xs = x.bfloat16().to(device, kind).contiguous(memory_format=layout).requires_grad_()
                    ws = w.bfloat16().to(device, kind).contiguous(memory_format=layout).requires_grad_()
                    y = F.conv3d(xs, ws, stride=stride, padding=1)
                    y.backward(torch.ones_like(y) * torch.linspace(-1, 1, y.shape[-1], device=device).to(kind))
                    results.append((y, xs.grad, ws.grad))
                worst = max(worst, *(apart(a, b) for a, b in zip(*results, strict=True)))
        name = "channels-last" if layout == torch.channels_last_3d else "channels-first"
        verdict(f"bfloat16 convolutions 1 to 4 voxels deep, gradients, {name}", worst, 1e-2)


def data(device) -> dict[str, torch.Tensor]:
    """Two random patches with codes of both data sets."""
    torch.manual_seed(1)
    labels = table()
    codes = [torch.randint(len(labels.local_ids(d)), (1, *SIZE)) + labels.offset(d) for d in labels.datasets]
    image = torch.randn(2, 1, *SIZE)
    return {"image": image.to(device), "label": torch.stack(codes).to(device, torch.int32)}


def gradients(network, device, layout=None, amp: bool = False) -> tuple[float, torch.Tensor]:
    """Loss and all gradients in one vector."""
    network = copy.deepcopy(network).to(device).train()
    if layout:
        network = network.to(memory_format=layout)
    batch = data(device)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
        outputs = network(batch["image"])
    loss = PartialLabelLoss(table())(outputs, batch["label"])
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().cpu() for p in network.parameters()])


def network_and_loss() -> None:
    """The same loss and gradients on both devices, with and without recomputing, in both layouts."""
    torch.manual_seed(0)
    network = TSFM(**ARGUMENTS)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    value, expected = gradients(network, "cpu")
    found, plain = gradients(network, DEVICE)
    verdict("loss, float32, GPU and CPU", abs(found - value) / abs(value), 1e-4)
    verdict("gradients, float32, GPU and CPU", apart(plain, expected), 1e-3)
    network.checkpointing = network.bottleneck.checkpointing = True
    verdict("gradients with and without recomputing", apart(gradients(network, DEVICE)[1], plain), 1e-4)
    network.checkpointing = network.bottleneck.checkpointing = False
    keep_channels_last(True)
    verdict("gradients, channels-last", apart(gradients(network, DEVICE, torch.channels_last_3d)[1], expected), 1e-3)
    keep_channels_last(False)
    verdict("gradients, bfloat16 autocast", apart(gradients(network, DEVICE, amp=True)[1], expected), 0.2)


def loss_scaling() -> None:
    """float16: eight steps; steps that overflow are skipped, the others change the weights, and the loss falls."""
    torch.manual_seed(0)
    network = TSFM(**ARGUMENTS).to(DEVICE)
    trainer = engine(network, 2, "foreach")
    for group in trainer.optimizer.param_groups:
        group["lr"], group["momentum"] = 1e-2, 0.9
    step = TrainStep(amp=DEVICE.type == "cuda", amp_dtype="float16")
    before, losses = [p.detach().clone() for p in network.parameters()], []
    for i in range(8):
        trainer.state.iteration = i + 1
        losses.append(float(step(trainer, data(DEVICE))[0]["loss"]))
    moved = sum(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    finite = all(bool(p.isfinite().all()) for p in network.parameters())
    record(
        "checks", what=f"float16 with loss scaling, 8 steps: loss {losses[0]:.2f} to {losses[-1]:.2f}, scale {step.scaler.get_scale():g}, "
        f"{moved} of {len(before)} tensors changed", holds=finite and losses[-1] < losses[0],
    )  # fmt: skip


def window() -> None:
    """The same label map from both devices, in float32, mirrored along one axis."""
    torch.manual_seed(0)
    network = TSFM(**{**ARGUMENTS, "deep_supervision": False}).eval()
    image = torch.randn(1, 1, 24, 40, 48)
    inferer = SlabInferer(
        SIZE,
        [f"t{i}" for i in range(TARGETS)],
        mirror="S",
        threshold=0.1,
        activation="regions",
        amp=False,
        progress=False,
    )
    with torch.no_grad():
        maps = [inferer(image, network.to(device)).cpu() for device in ("cpu", DEVICE)]
    verdict(f"label map, {len(maps[0].unique()) - 1} targets painted: share of other voxels",
            float((maps[0] != maps[1]).float().mean()), 1e-3)  # fmt: skip


def main() -> None:
    for check in (convolutions, network_and_loss, loss_scaling, window):
        attempt("checks", check.__name__, check)


if __name__ == "__main__":
    main()
