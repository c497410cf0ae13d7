"""One optimisation step of the paper's 1.6 B network through tsfm_pretrain/configs/train.json, on this machine.

Phantoms are prepared at the paper's spacing, one patch of 112x160x192 is drawn, and one step is taken with activation
checkpointing. On a CPU weights, gradients and momentum are bfloat16 (9.6 GB instead of 19.2 GB), so that 24 GiB are
enough; on a GPU pass ``--param_dtype float32 --batch_size 2`` for the paper's own setting. Prints seconds and peak memory.

usage: python benchmarks/full_train_step.py [--folder /tmp/full_step] [--batch_size 1] [--param_dtype bfloat16] [--iterations 1]
"""

import argparse
import csv
import shutil
import time
from pathlib import Path

import torch
from sides import ROOT, bundle_run, peak_gib_of
from tsfm_tools.phantoms import layouts as phantoms


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", default="/tmp/full_step")
    parser.add_argument("--batch_size", default="1")
    parser.add_argument("--param_dtype", default="bfloat16")
    parser.add_argument("--iterations", default="1")
    arguments = parser.parse_args()
    folder = Path(arguments.folder)
    shutil.rmtree(folder / "output", ignore_errors=True)  # a run that is finished would not take a step
    phantoms.write_pool(str(folder / "data"), cases_per_dataset=2, datasets=["msd_liver"])
    command = bundle_run(
        ROOT / "bundles/tsfm_pretrain", ["train.json"], dataset_dir=folder / "data", datasets="['msd_liver']",
        store_dir=folder / "store", output_dir=folder / "output", ckpt_dir="none", epochs=1, val_interval=2, num_workers=0,
        iterations_per_epoch=arguments.iterations, checkpointing=True, batch_size=arguments.batch_size,
        param_dtype=arguments.param_dtype,
    )  # fmt: skip
    start = time.perf_counter()
    peak = peak_gib_of(command)
    wall = time.perf_counter() - start
    rows = list(csv.DictReader((folder / "output/curve.csv").open()))
    print(
        f"loss {rows[-1]['loss']}, training {rows[-1]['train_s']} s for {arguments.iterations} step(s), whole run {wall:.0f} s"
    )
    print(torch.cuda.get_device_name() if torch.cuda.is_available() else f"peak memory {peak:.1f} GiB")


if __name__ == "__main__":
    main()
