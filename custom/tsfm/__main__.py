"""The command line, ``python -m tsfm COMMAND``: what is not a bundle run. ``python -m tsfm COMMAND --help`` explains one."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import fire


def pool(
    pool_file: str,
    dataset_dir: str = ".",
    datasets: Sequence[str] | None = None,
    fold: int | str | None = None,
    output_file: str | None = None,
) -> None:
    """Print what a pool file finds below `dataset_dir`: data sets, cases, modalities, labels, targets, shares, missing.

    Args:
        pool_file: the pool file.
        dataset_dir: folder that holds the data sets' folders.
        datasets: only these.
        fold: also print how many cases of each data set train and validate in this fold.
        output_file: also write the summary as JSON.
    """
    from .pool import DatasetPool

    found = DatasetPool(pool_file, dataset_dir, datasets, allow_missing=True)
    print(found.describe())
    if fold is not None:
        train, val = found.split(fold)
        for name in found.scan[0]:
            counts = [sum(item["dataset"] == name for item in part) for part in (train, val)]
            print(f"fold {fold}, {name}: {counts[0]} training and {counts[1]} validation cases")
    if output_file:
        _write_json(output_file, found.summary())


def phantoms(output_dir: str, cases_per_dataset: int = 6, seed: int = 0, layouts: str = "demo") -> None:
    """Write a pool of CT-like and MR-like phantoms as NIfTI files in the layouts of the real data sets.

    Args:
        output_dir: folder for the data sets.
        cases_per_dataset: cases of each.
        seed: the same seed gives the same files.
        layouts: "demo" (four data sets), "all_ten" (every layout of the paper's pool) or "downstream" (BraTS2020,
            KiTS2019 and AbdomenCT-1K).
    """
    from . import phantoms as writers

    if layouts == "demo":
        writers.write_pool(output_dir, cases_per_dataset=cases_per_dataset, seed=seed)
    elif layouts == "all_ten":
        writers.write_all_ten(output_dir)
    elif layouts == "downstream":
        writers.write_brats2020(output_dir, cases=cases_per_dataset, seed=seed)
        writers.write_kits19(output_dir, cases=cases_per_dataset, seed=seed)
        writers.write_abdomenct1k(output_dir, cases=cases_per_dataset, seed=seed)
    else:
        raise ValueError(f"layouts is {layouts!r}; expected 'demo', 'all_ten' or 'downstream'")
    print(f"phantoms written below {os.path.abspath(output_dir)}")


def describe(checkpoint: str) -> None:
    """Print what travels with a weight file: network, targets, preparation, patch, what it was trained on."""
    import json

    from .checkpoint import read_description

    print(json.dumps(read_description(checkpoint), indent=4))


def _write_json(path: str, content: Any) -> None:
    import json

    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=4)


COMMANDS = {"pool": pool, "phantoms": phantoms, "describe": describe}


def main() -> None:
    """Run one command; an error the user can mend is one message, not a traceback."""
    try:
        fire.Fire(COMMANDS, name="tsfm")
    except (ValueError, OSError) as error:
        sys.exit(f"tsfm: {error}")


if __name__ == "__main__":
    main()
