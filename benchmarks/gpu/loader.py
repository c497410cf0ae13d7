"""Patches per second of the real loader on this machine's cores: store, rotation and scaling, all of train.json's transforms.

Two synthetic CTs of 300x360x360 voxels, patch 112x160x192, batch 2, as in benchmarks/load_augment.py.

    python benchmarks/gpu/loader.py
"""

from __future__ import annotations

import os
import tempfile
import time

import torch

from record import DEVICE, TINY, record  # isort: skip  (it lets load_augment be found)
from load_augment import BATCH, ROOT, prepare_tsfm, tsfm_store

PATCH, SHAPE = ((32, 32, 32), (48, 64, 64)) if TINY else ((112, 160, 192), (300, 360, 360))


def loader(folder: str, workers: int, batches: int):
    """The bundle's own data loader, but for the number of workers."""
    from monai.bundle import ConfigParser
    from torch.utils.data import DataLoader
    from tsfm.patches.augmentation import RandRotateScale
    from tsfm.patches.dataset import PatchDataset, PoolSampler

    store, items = tsfm_store(folder)
    config = ConfigParser(ConfigParser.load_config_file(ROOT / "bundles/tsfm_pretrain/configs/train.json"))
    transform = config.get_parsed_content("train#preprocessing")
    dataset = PatchDataset(items, store, store.table, PATCH, transform, RandRotateScale())
    sampler = PoolSampler(items, BATCH, iterations=batches)
    return DataLoader(dataset, BATCH, sampler=sampler, num_workers=workers, pin_memory=DEVICE.type == "cuda")


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        prepare_tsfm(folder, SHAPE)
        for workers in (1,) if TINY else (12, cores):
            batches = iter(loader(folder, workers, 10 * workers + 3))
            for _ in range(4 * workers):  # all workers are up, and their first batches, made in advance, are used
                next(batches)
            start, count = time.perf_counter(), 0
            for batch in batches:
                batch["image"].to(DEVICE, non_blocking=True)
                count += 1
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            took = time.perf_counter() - start
            record("loader", workers=workers, cores=cores, patches_per_s=round(count * BATCH / took, 1),
                   per_worker=round(count * BATCH / took / workers, 2))  # fmt: skip


if __name__ == "__main__":
    main()
