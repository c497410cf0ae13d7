"""Folds as a splits file declares them (nnU-Net's ``splits_final.json``, or one such list per data set)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..names import listed
from ..schema import nearest
from .folders import PoolError

Items = list[dict[str, Any]]


def declared_split(splits: Any, source: str, fold: int, datasets: Mapping[str, Items]) -> tuple[Items, Items]:
    """(training items, validation items) of one fold; a case that a part lists twice is there once.

    Args:
        splits: data set -> list of folds, each with the case names under "train" and "val"; or one such list.
        source: how messages call the splits file.
        datasets: the items of each data set; one without any is passed over.

    Raises:
        PoolError: nothing about a data set, no such fold, cases that do not exist or are in both parts.
    """
    parts: dict[str, Items] = {"train": [], "val": []}
    for name, own in datasets.items():
        items = {item["case"]: item for item in own}
        if not items:
            continue
        folds: Sequence[Any] = splits.get(name, []) if isinstance(splits, Mapping) else splits
        if isinstance(splits, Mapping) and name not in splits:
            raise PoolError(f"{source} says nothing about data set '{name}'; it names {list(splits)}")
        if not 0 <= fold < len(folds):
            raise PoolError(f"{source} has {len(folds)} folds for data set '{name}', fold {fold} was asked for")
        shared = set(folds[fold]["train"]) & set(folds[fold]["val"])
        unknown = sorted((set(folds[fold]["train"]) | set(folds[fold]["val"])) - set(items))
        if shared or unknown:
            near = "".join(nearest(case, items) for case in unknown[:1])
            raise PoolError(
                f"{source}, data set '{name}', fold {fold}: cases in both parts {sorted(shared)}, cases that do not exist "
                f"{unknown}{near}"
            )
        for part, chosen in parts.items():
            chosen += [items[case] for case in dict.fromkeys(folds[fold][part])]
    return parts["train"], parts["val"]


def check_patients(train: Iterable[tuple[str, str]], val: Iterable[tuple[str, str]], source: str) -> None:
    """PoolError where a patient, (group, name), is in both parts."""
    shared = sorted(set(train) & set(val))
    if shared:
        named = listed(f"{patient} of {group}" for group, patient in shared)
        raise PoolError(
            f'{source}: patients in both parts, by the pool file\'s "patient": {named}; put all cases of a patient '
            'into one part, or take "patient" out of the pool file'
        )


def case_digests(items: Iterable[Mapping[str, Any]]) -> list[str]:
    """What tells each item's case by its data set and name, without saying them; empty for a bare item.

    A data set's name in front of a case's, as files may have it (`DatasetPool.evaluation_items`), does not count.
    """
    found = []
    for item in items:
        dataset, case = item.get("dataset"), item.get("case")
        text = f"{dataset}/{str(case).removeprefix(f'{dataset}_')}"
        found.append(hashlib.blake2b(text.encode(), digest_size=6).hexdigest() if dataset and case else "")
    return found
