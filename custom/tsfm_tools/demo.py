"""The main job from end to end on phantoms, in minutes on two cores: what ``make demo`` runs.

Every step is a command that a user would give for real data; it is printed before it runs (in this process, which saves
importing torch eight times).
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from tsfm.cases.pool import DatasetPool

from .paper.grids import run_bundle, transfer_table
from .phantoms import layouts as phantoms

POOL_CASES, DOWNSTREAM_CASES = 6, 6


def demo(output_dir: str = "demo_output", bundles_dir: str = "bundles", seed: int = 0) -> None:
    """Write phantoms, prepare, pretrain, transfer, infer, score and draw pictures, all below `output_dir`.

    Args:
        output_dir: a new folder, or one in which an earlier demo stopped (it goes on there).
        bundles_dir: folder that holds the two bundles.
        seed: of the phantoms and of the training.
    """
    start = time.perf_counter()
    out = Path(output_dir)
    pretrain, finetune = Path(bundles_dir, "tsfm_pretrain"), Path(bundles_dir, "tsfm_finetune")
    pool_data, new_data = out / "pool", out / "kits19"

    _step(start, "1. Phantoms: four data sets with their own ids, spacings and annotated targets, and a downstream one",
          f"python -m tsfm phantoms --output_dir {pool_data}")  # fmt: skip
    if not (new_data / "done").exists():
        phantoms.write_pool(str(pool_data), cases_per_dataset=POOL_CASES, seed=seed)
        phantoms.write_kits19(str(new_data), cases=DOWNSTREAM_CASES, size=phantoms.REFERENCE_SIZE, seed=seed + 1)
        (new_data / "done").touch()

    pool_file = pretrain / "configs/demo_pool.json"
    _step(start, "2. What the pool holds", f"python -m tsfm pool --pool_file {pool_file} --dataset_dir {pool_data}")
    print(DatasetPool(pool_file, pool_data, allow_missing=True).describe())

    settings = {"dataset_dir": pool_data, "store_dir": out / "store", "output_dir": out / "pretrain",
                "ckpt_dir": out / "pretrain/models", "seed": seed}  # fmt: skip
    _bundle_step(start, "3. Prepare and pretrain", pretrain, ["train.json", "small.json", "demo.json"], settings)

    checkpoint = out / "pretrain/model.pt"
    evaluation = {"checkpoint": checkpoint, "output_dir": out / "evaluation", "dataset_dir": pool_data,
                  "pool_file": pool_file, "progress": False}  # fmt: skip
    _bundle_step(start, "4. Segment and score the held-out cases of the pool, with a page of pictures", pretrain,
                 ["inference.json", "evaluate.json"], evaluation)  # fmt: skip

    _step(start, "5. Transfer to a new data set, pretrained and from scratch (the paper's Table 2, in small)",
          f"python -m tsfm transfer_table --pretrained {checkpoint} --dataset_dir {new_data} --output_dir {out / 'transfer'} "
          "--epochs '[1,4]' --overlays \"['kits2019.json']\"")  # fmt: skip
    transfer_table(
        str(checkpoint), str(new_data), str(out / "transfer"), str(finetune), epochs=(1, 4), overlays=["kits2019.json"],
        name="kits19 phantoms", iterations_per_epoch=10, val_iterations=4, num_workers=1, checkpointing=False,
    )  # fmt: skip

    best = out / "transfer/cells/pretrained-4epochs-seed0/model.pt"
    case = sorted(new_data.glob("case_*/imaging.nii.gz"))[0]
    inference = {"checkpoint": best, "dataset_dir": case, "output_dir": out / "predictions",
                 "existing": "overwrite", "progress": False}  # fmt: skip
    _bundle_step(start, "6. Segment an image with the fine-tuned weights", finetune, ["inference.json"], inference)

    scores = (out / "evaluation/scores.md").read_text(encoding="utf-8")
    print(f"\n{scores}\n{(out / 'transfer/table2.md').read_text(encoding='utf-8')}")
    print(f"\nDone in {time.perf_counter() - start:.0f} s. Look at:")
    for path in (
        "evaluation/page.png",
        "evaluation/scores.md",
        "transfer/table2.png",
        "transfer/table2.md",
        "predictions",
    ):
        print(f"  {out / path}")


def _step(start: float, title: str, command: str) -> None:
    print(f"\n[{time.perf_counter() - start:4.0f} s] {title}\n  $ {command}\n", flush=True)


def _bundle_step(start: float, title: str, bundle: Path, configs: list[str], settings: dict[str, Any]) -> None:
    """Print and run one bundle command; MONAI's own listing of its arguments is left out."""
    listed = ",".join(f"'{bundle}/configs/{name}'" for name in configs)
    overrides = " ".join(f'--{key} "{value}"' for key, value in settings.items())
    _step(start, title, f'python -m monai.bundle run --config_file "[{listed}]" --bundle_root {bundle} {overrides}')
    logging.getLogger("monai.bundle").setLevel(logging.WARNING)
    run_bundle(bundle, configs, **{key: str(v) if isinstance(v, Path) else v for key, v in settings.items()})
