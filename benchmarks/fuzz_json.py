"""Damaged JSON files for `fuzz.py`: pool file, dataset.json, datalist, splits file and overlay.

Each damage has a known right outcome: an error that names the file, or what the file as it was gives.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from sides import ROOT
from tsfm.cases.folders import find_images
from tsfm.cases.pool import DatasetPool
from tsfm.cases.volumes import read_volume
from tsfm.options import check_options
from tsfm.planning.own_data import dataset_pool
from tsfm.schema import read_json

COUNT = 500

LAYOUT = {"image": "img/{case}.nii.gz", "label": "lab/{case}.nii.gz"}
POOL = {
    "targets": {"liver": {}, "tumor": {"inside": "liver", "lesion": True, "tolerance_mm": 2.0, "display": "liver tumor"}},
    "datasets": [
        {"name": "own", "folder": "own", "modality": {"default": "CT", "c3": "MR"}, "labels": {"1": "liver", "2": ["tumor"]},
         "ignore": [3], "others": "background", "exclude": ["c5"], "unlabelled": "skip",
         "patient": {"group": "g", "pattern": "c(.)"}, **LAYOUT},
    ],
}  # fmt: skip
DATASET_JSON = {
    "name": "x",
    "modality": {"0": "CT"},
    "labels": {"0": "background", "1": "liver", "2": "tumor"},
    "numTraining": 3,
    "training": [{"image": f"./img/c{n}.nii.gz", "label": f"./lab/c{n}.nii.gz"} for n in range(3)],
}
DATALIST = {"testing": [{"image": "img/c0.nii.gz", "modality": "MR", "case": "first"}, {"image": "img/c1.nii.gz"}]}
SPLITS = {"own": [{"train": ["c0", "c1"], "val": ["c2"]}]}
OVERLAY = {
    "epochs": 3, "amp": False, "amp_dtype": "float16", "learning_rate": 0.1, "patch_size": [16, 16, 16], "spacing_mm": [1, 1, 1],
    "mirror_axes": "SP", "batch_size": 2, "num_workers": 0, "val_interval": 2, "save_interval": 2, "checkpointing": False,
    "fold": 0,
}  # fmt: skip
FREE_KEYS = {"liver", "tumor", "own", "default", "c3", "0", "1", "2", "3"}  # names of the user's own


def plain_items(items: list[dict[str, Any]], root: str) -> list[Any]:
    return json.loads(json.dumps(items).replace(root, ""))


def use_pool(path: str) -> Any:
    pool = DatasetPool(path, os.path.dirname(path))
    folds = [[item["case"] for item in pool.val_items(fold)] for fold in range(5)]
    return [plain_items(pool.cases, os.path.dirname(path)), pool.table.to_dict(), folds]


def use_dataset(path: str) -> Any:
    pool = dataset_pool(os.path.dirname(path))
    return [plain_items(pool.cases, os.path.dirname(path)), pool.table.to_dict()["targets"]]


def use_datalist(path: str) -> Any:
    items = find_images(path)
    for item in items:
        if not os.path.exists(item["image"]):
            read_volume(item["image"])  # says which is not there
    return plain_items(items, os.path.dirname(path))


def use_splits(path: str) -> Any:
    declared = {**POOL, "datasets": [{**POOL["datasets"][0], "patient": {"pattern": "c."}}]}
    pool = DatasetPool(declared, os.path.dirname(path), splits_file=path)
    return [[item["case"] for item in part] for part in pool.split(0)]


def use_overlay(path: str) -> Any:
    """What of the overlay has an effect: the ids that train.json has."""
    base = ROOT / "bundles/tsfm_finetune/configs/train.json"
    check_options(["monai.bundle", "run", "--config_file", str([str(base), path])])
    content, known = read_json(path), read_json(base)
    return {key: value for key, value in content.items() if key.split("#")[0] in known}


KINDS = {
    "pool.json": (POOL, use_pool),
    "dataset.json": (DATASET_JSON, use_dataset),
    "list.json": (DATALIST, use_datalist),
    "splits.json": (SPLITS, use_splits),
    "overlay.json": (OVERLAY, use_overlay),
}


def prepare(folder: Path) -> dict[str, Any]:
    """Write good files with the images that they name; what each of them gives."""
    for part in ("img", "lab", "own/img", "own/lab"):
        (folder / part).mkdir(parents=True)
        for n in range(6):
            (folder / part / f"c{n}.nii.gz").touch()
    whole = {}
    for name, (content, use) in KINDS.items():
        (folder / name).write_text(json.dumps(content))
        whole[name] = use(str(folder / name))
    return whole


def mutate(rng: np.random.Generator, folder: Path, whole: dict[str, Any]) -> tuple[str, Path]:
    draw = random.Random(rng.bytes(8))
    for name, (content, _) in KINDS.items():
        (folder / name).write_text(json.dumps(content))
    name = draw.choice(list(whole))
    kind, data = damage(KINDS[name][0], draw)
    (folder / name).write_bytes(data)
    return kind, folder / name


def judge(path: Path, whole: dict[str, Any]) -> tuple[str, str]:
    found = KINDS[path.name][1](str(path))
    return ("right", "read as it was") if found == whole[path.name] else ("silent", f"{path.name}: {found}")


def places(value: Any, place: tuple = ()) -> Iterator[tuple]:
    """The place of every value inside `value`."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*place, key)
        yield from places(inner, (*place, key))


def at(content: Any, place: tuple) -> Any:
    for step in place:
        content = content[step]
    return content


def another_type(value: Any, draw: random.Random) -> Any:
    """A value of another JSON type than `value`."""
    values = [None, "text", 7.5, -3, [[]], [5], {"a": 1}, True]
    kind = lambda one: "number" if type(one) in (int, float) else type(one).__name__  # noqa: E731
    return draw.choice([one for one in values if kind(one) != kind(value)])


def another_value(value: Any) -> Any:
    """A value of the same JSON type."""
    if isinstance(value, bool):
        return not value
    return value + "_b" if isinstance(value, str) else type(value)() if isinstance(value, dict | list) else value + 1


def mistype(word: str, draw: random.Random) -> str:
    """`word` with one letter dropped, doubled, swapped or replaced; never `word` itself."""
    while True:
        i = draw.randrange(len(word))
        slips = (word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:], word[:i] + "q" + word[i + 1 :],
                 word[:i] + word[i + 1 : i + 2] + word[i] + word[i + 2 :])  # fmt: skip
        if (slip := draw.choice(slips)) not in (word, ""):
            return slip


def damage(content: Any, draw: random.Random) -> tuple[str, bytes]:
    """(kind of damage, the file's bytes) of one mutation."""
    copy = json.loads(json.dumps(content))
    everywhere = list(places(copy))
    keyed = [place for place in everywhere if isinstance(place[-1], str) and place[-1] not in FREE_KEYS]
    how = draw.choice(["type", "type", "type", "mistype", "mistype", "repeat", "cut", "bytes", "bom", "text"])
    if how == "type":
        place = draw.choice(everywhere)
        parent = at(copy, place[:-1])
        parent[place[-1]] = another_type(parent[place[-1]], draw)
        return f"value of another type: {place} became {parent[place[-1]]!r}", json.dumps(copy).encode()
    if how == "mistype":
        place = draw.choice(keyed)
        parent = at(copy, place[:-1])
        name = mistype(place[-1], draw)
        parent[name] = parent.pop(place[-1])
        return f"mistyped key: {place} became {name!r}", json.dumps(copy).encode()
    text = json.dumps(copy)
    if how == "repeat":
        place = draw.choice([place for place in everywhere if isinstance(place[-1], str)])
        whole = json.dumps({place[-1]: at(copy, place)})[1:-1]
        other = json.dumps({place[-1]: another_value(at(copy, place))})[1:-1]
        return f"key twice: {place}", text.replace(whole, f"{whole}, {other}", 1).encode()
    if how == "cut":
        return "cut", text[: draw.randrange(len(text))].encode()
    if how == "bytes":
        position = draw.randrange(len(text))
        return "byte that is no text", text[:position].encode() + b"\xff" + text[position:].encode()
    if how == "bom":
        return "byte order mark", "\ufeff".encode() + json.dumps(copy, indent=1).replace("\n", "\r\n").encode()
    slip = draw.choice([lambda t: t.replace('"', "'"), lambda t: t[:-1] + ",}", lambda t: "// note\n" + t, lambda t: t + t,
                        lambda t: "[" * 20_000 + t, lambda t: "", lambda t: "null", lambda t: "[]", lambda t: '"text"'])  # fmt: skip
    return "other text", slip(text).encode()
