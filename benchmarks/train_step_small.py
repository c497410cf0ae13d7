"""Whole training steps on small patches: TSFM's beside nnU-Net 2.8.1's, the same network, one process and one thread each.

The network is nnU-Net's plain U-Net for hippocampus (patch 40x56x40). A step is all that an iteration takes: read and
augment a batch, forward, loss, backward, clip, optimizer; each side with its own loader, augmentation, loss and trainer's
step, from synthetic cases. The third side is TSFM S. They run in turn, round by round; the table gives medians.

    python benchmarks/train_step_small.py --peer .venv-bench/bin/python
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import torch
from load_augment import batches_nnunet, batches_tsfm, calls, prepare_nnunet, prepare_tsfm, tsfm_store
from sides import PEER, in_turn, serve

PATCH, SHAPE, LABELS = (40, 56, 40), (48, 64, 48), 4
SIDES = ("nnunet", "tsfm", "tsfm_s")
TSFM_S = {
    "features": (16, 32, 64, 128), "depths_down": (1, 1, 1, 1), "depths_up": (1, 1, 1), "strides": ((2, 2, 2),) * 3,
    "hidden_size": 96, "num_layers": 2, "num_heads": 4, "mlp_dim": 192,
}  # fmt: skip


def plain_unet(classes):
    """nnU-Net's plan for hippocampus: four stages, 32 to 256 channels, deep supervision."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from dynamic_network_architectures.initialization.weight_init import InitWeights_He
    from torch import nn

    network = PlainConvUNet(
        1, 4, (32, 64, 128, 256), nn.Conv3d, 3, (1, 2, 2, 2), 2, classes, 2, True,
        nn.InstanceNorm3d, {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU, {"inplace": True}, True,
    )  # fmt: skip
    return network.apply(InitWeights_He(1e-2))


# ---- this project -----------------------------------------------------------------------------------------------


def steps_tsfm(folder, batch_size, own_network):
    """An iterator; each `next` is one iteration of MONAI's trainer with the bundle's step."""
    from monai.engines import SupervisedTrainer
    from tsfm.network.loss import PartialLabelLoss
    from tsfm.network.tsfm_net import TSFM
    from tsfm.training.steps import TrainStep

    network = TSFM(1, LABELS, img_size=PATCH, **TSFM_S) if own_network else plain_unet(LABELS)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.99, nesterov=True, weight_decay=3e-5)
    step, table = TrainStep(), tsfm_store(folder)[0].table
    trainer = SupervisedTrainer(
        device=torch.device("cpu"), max_epochs=1, train_data_loader=[None], network=network, optimizer=optimizer,
        loss_function=PartialLabelLoss(table), iteration_update=step, decollate=False,
    )  # fmt: skip
    for batch in batches_tsfm(folder, PATCH, batch_size):
        step(trainer, batch)
        yield


# ---- nnU-Net ----------------------------------------------------------------------------------------------------


def steps_nnunet(folder, batch_size):
    """An iterator; each `next` is a batch and `nnUNetTrainer.train_step` with it, as on a CPU."""
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    network = plain_unet(LABELS + 1)
    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss = DC_and_CE_loss(dice, {}, weight_ce=1, weight_dice=1, dice_class=MemoryEfficientSoftDiceLoss)
    weights = np.array([1, 1 / 2, 0])
    trainer = SimpleNamespace(
        device=torch.device("cpu"), network=network, grad_scaler=None,
        loss=DeepSupervisionWrapper(loss, weights / weights.sum()),
        optimizer=torch.optim.SGD(network.parameters(), 0.01, momentum=0.99, nesterov=True, weight_decay=3e-5),
    )  # fmt: skip
    scales = [[1 / side] * 3 for side in (1, 2, 4)]
    for batch in batches_nnunet(folder, PATCH, batch_size, scales):
        nnUNetTrainer.train_step(trainer, batch)
        yield


# ---- measuring --------------------------------------------------------------------------------------------------


def answer_rounds(side, folder, batch, steps):
    """One side's process: seconds of work of each round of steps."""
    torch.set_num_threads(1)
    stream = steps_nnunet(folder, batch) if side == "nnunet" else steps_tsfm(folder, batch, side == "tsfm_s")
    for _ in range(2):
        next(stream)

    def work():
        start = time.process_time()
        for _ in range(steps):
            next(stream)
        return time.process_time() - start

    serve(work)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", default=PEER, help="Python with nnunetv2 2.8.1")
    parser.add_argument("--batch", type=int, nargs="+", default=(2, 9))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="steps per round")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prepare:
        return (
            prepare_nnunet(args.folder, SHAPE, PATCH) if args.prepare == "nnunet" else prepare_tsfm(args.folder, SHAPE)
        )
    if args.serve:
        return answer_rounds(args.serve, args.folder, args.batch[0], args.steps)
    print(
        "| batch | side | patches per second of processor time (lowest to highest round) | times nnU-Net |\n|---|---|---|---|"
    )
    for batch in args.batch:
        pythons = {side: args.peer if side == "nnunet" else sys.executable for side in SIDES}
        with tempfile.TemporaryDirectory() as folder:
            found = in_turn(calls(__file__, folder, pythons, "--batch", batch, "--steps", args.steps), args.rounds)
        rates = {side: [batch * args.steps / seconds for seconds in rounds] for side, rounds in found.items()}
        base = statistics.median(rates["nnunet"])
        for side, each in rates.items():
            rate = statistics.median(each)
            print(
                f"| {batch} | {side} | {rate:.2f} ({min(each):.2f} to {max(each):.2f}) | {rate / base:.2f} |",
                flush=True,
            )
    return None


if __name__ == "__main__":
    main()
