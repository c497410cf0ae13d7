"""The main job from end to end on phantoms, in minutes on two cores: what ``make demo`` runs.

Every step is a command that a user would give for real data; it is printed before it runs (in this process, which saves
importing torch eight times).
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import torch
from tsfm.cases.pool import DatasetPool
from tsfm.evaluation.tables import format_scores
from tsfm.network.cpu import computes_in

from .narration import Narrator
from .paper.commands import transfer_table
from .paper.grids import run_bundle
from .phantoms import layouts as phantoms

SIZE = (56, 64, 76)
"""Voxels of a phantom along (S, P, L): about 6 x 5 x 5 mm, so that the smallest tumor is four voxels wide."""

POOL_CASES, DOWNSTREAM_CASES = 10, 10

EPOCHS, OVERLAYS = (1, 4), ["kits2019.json", "demo.json"]


def demo(output_dir: str = "demo_output", bundles_dir: str = "bundles", seed: int = 0) -> None:
    """Write phantoms, prepare, pretrain, transfer, infer, score and draw pictures, all below `output_dir`.

    The screen shows each step's command, a bar and its result; everything else is in ``demo.log`` in `output_dir`.

    Args:
        output_dir: a new folder, or one in which an earlier demo stopped (it goes on there).
        bundles_dir: folder that holds the two bundles.
        seed: of the phantoms and of the training.
    """
    out = Path(output_dir)
    pretrain, finetune = Path(bundles_dir, "tsfm_pretrain"), Path(bundles_dir, "tsfm_finetune")
    pool_data, new_data, pool_file = out / "pool", out / "kits19", pretrain / "configs/demo_pool.json"
    checkpoint = out / "pretrain/model.pt"
    screen = Narrator(out / "demo.log")
    with screen.quiet():
        fast = computes_in("cpu", torch.bfloat16)
    if not fast:
        torch.set_num_threads(min(2, os.cpu_count() or 1))  # float32 gains from a second one, bfloat16 hardly does
        screen.say(f"This processor has no bfloat16 arithmetic: float32, on {torch.get_num_threads()} threads.")

    made = 'python -m tsfm phantoms --output_dir {} --cases_per_dataset {} --size "{}" --seed {} --layouts {}'
    screen.step("Phantoms: a pool of four data sets, each with its own ids, voxels and targets, and a new data set",
                made.format(pool_data, POOL_CASES, SIZE, seed, "demo"))  # fmt: skip
    screen.say(f"$ {made.format(new_data, DOWNSTREAM_CASES, SIZE, seed + 1, 'kits19')}")
    if not (new_data / "done").exists():
        phantoms.write_pool(str(pool_data), POOL_CASES, SIZE, seed)
        phantoms.write_kits19(str(new_data), DOWNSTREAM_CASES, SIZE, seed + 1)
        (new_data / "done").touch()

    screen.step("What the pool holds", f"python -m tsfm pool --pool_file {pool_file} --dataset_dir {pool_data}")
    screen.say(DatasetPool(pool_file, pool_data, allow_missing=True).describe())

    settings = {"dataset_dir": pool_data, "store_dir": out / "store", "output_dir": out / "pretrain",
                "ckpt_dir": out / "pretrain/models", "seed": seed}  # fmt: skip
    _bundle_step(screen, "Prepare and pretrain", pretrain, ["train.json", "small.json", "demo.json"], settings)
    last = list(csv.DictReader((out / "pretrain/curve.csv").open(encoding="utf-8")))[-1]
    screen.say(
        f"{last['epoch']} epochs, Dice {float(last['val_mean_dice']):.2f} on patches of held-out cases: {checkpoint}"
    )

    evaluation = {"checkpoint": checkpoint, "output_dir": out / "evaluation", "dataset_dir": pool_data,
                  "pool_file": pool_file, "run_dir": out / "pretrain"}  # fmt: skip
    _bundle_step(screen, "Segment and score the pool's held-out cases whole, with a page of pictures", pretrain,
                 ["inference.json", "evaluate.json"], evaluation)  # fmt: skip
    screen.say(format_scores(json.loads((out / "evaluation/summary.json").read_text(encoding="utf-8"))))

    screen.step("Transfer to the new data set, pretrained and from scratch (the paper's Table 2, in small)",
                f"python -m tsfm transfer_table --pretrained {checkpoint} --dataset_dir {new_data} "
                f"--output_dir {out / 'transfer'} --bundle_dir {finetune} --epochs \"{list(EPOCHS)}\" "
                f"--overlays \"{OVERLAYS}\" --name \"kits19 phantoms\" --seeds \"[{seed}]\"")  # fmt: skip
    with screen.quiet():
        table = transfer_table(
            str(checkpoint), str(new_data), str(out / "transfer"), str(finetune), EPOCHS, overlays=OVERLAYS,
            name="kits19 phantoms", seeds=(seed,),
        )  # fmt: skip
    screen.say(table)

    best = out / f"transfer/cells/pretrained-{max(EPOCHS)}epochs-seed{seed}/model.pt"
    case = sorted(new_data.glob("case_*/imaging.nii.gz"))[0]
    inference = {"checkpoint": best, "dataset_dir": case, "output_dir": out / "predictions", "existing": "overwrite"}
    _bundle_step(screen, "Segment an image with the fine-tuned weights", finetune, ["inference.json"], inference)

    shown = ("pretrain/index.html", "evaluation/scores.md", "transfer/table2.png", "predictions", "demo.log")
    screen.end("Look at " + ", ".join(str(out / path) for path in shown))


def _bundle_step(screen: Narrator, title: str, bundle: Path, configs: list[str], settings: dict[str, Any]) -> None:
    """Show and run one bundle command."""
    listed = ",".join(f"'{bundle}/configs/{name}'" for name in configs)
    overrides = " ".join(f'--{key} "{value}"' for key, value in settings.items())
    screen.step(title, f'python -m monai.bundle run --config_file "[{listed}]" --bundle_root {bundle} {overrides}')
    with screen.quiet():
        run_bundle(bundle, configs, **{key: str(v) if isinstance(v, Path) else v for key, v in settings.items()})
