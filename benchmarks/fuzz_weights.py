"""Damaged weight files for `fuzz.py`: `model.pt`, `model.safetensors` and a run's `last.pt`, one in three hostile.

Each has a known right outcome: an error that names the file, or exactly the tensors and the description that were written.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz_json import another_type, at, places
from tsfm.cases.cases import Preparation
from tsfm.labels import LabelTable
from tsfm.network.tsfm_net import TSFM
from tsfm.training.checkpoint import EXTRA_STATE, describe_network, encode_description, read_state, save_weights
from tsfm.training.run_state import _read_run
from tsfm.training.weight_files import write_pt

COUNT = 300
HOSTILE = (
    "$__import__('os').system('touch hacked')",
    "@bundle_root",
    "%train",
    "_target_",
    "../../etc/passwd",
    "a\n| b |",
)


def weights() -> tuple[Any, dict[str, Any]]:
    """A small network with everything that a description can hold, and the content of its ``last.pt``."""
    table = LabelTable(
        {"liver": {}, "肿瘤": {"inside": "liver", "lesion": True}},
        [{"name": "own", "labels": {"1": "liver", "2": "肿瘤"}}],
    )
    ct = {"CT": {"lower": -1000, "upper": 400, "mean": 50, "sd": 200}}
    network = TSFM(1, 2, [4, 8], [1, 1], [1], [[2, 2, 2]], [8, 8, 8], 8, 1, 2, 16)
    network = describe_network(
        network, table, Preparation((3, 2, 2), ct), [8, 8, 8], [{"dataset": "own", "modality": "CT"}]
    )
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    state = {"epoch": 1, "model": network.state_dict(), "parts": {"optimizer": optimizer.state_dict()},
             "curve": {"rows": []}, "best": None, "settings": {}}  # fmt: skip
    return network, state


def plain(tensors: dict[str, torch.Tensor]) -> dict[str, list]:
    return {name: [str(t.dtype), list(t.shape), t.float().flatten().tolist()] for name, t in tensors.items()}


def read_weights(path: str) -> Any:
    tensors, description = read_state(path)
    return [description, plain(tensors)]


def read_last(path: str) -> Any:
    state = _read_run(path)
    return [{key: state[key] for key in ("epoch", "curve", "best", "settings")}, plain(state["model"])]


USES = {"model.pt": read_weights, "model.safetensors": read_weights, "last.pt": read_last}


def damage(content: bytes, draw: random.Random) -> tuple[str, bytes]:
    """(kind of damage, the file's bytes) of one accident of disks, copies and downloads."""
    size, position = len(content), draw.randrange(len(content))
    how = draw.choice(["bit", "bit", "bit", "zeros", "cut", "tail", "block"])
    if how == "bit":
        return "one bit", content[:position] + bytes([content[position] ^ 1 << draw.randrange(8)]) + content[
            position + 1 :
        ]
    if how == "zeros":
        end = min(size, position + draw.choice([1, 16, 512]))
        return "zeros", content[:position] + bytes(end - position) + content[end:]
    if how == "cut":
        return "cut", content[:position]
    if how == "tail":
        return "grown", content + draw.randbytes(draw.choice([1, 100, 5000]))
    other = draw.randrange(size)
    return "misplaced block", (content[:position] + content[other : other + 64] + content[position + 64 :])[:size]


def hostile(description: dict[str, Any], draw: random.Random) -> tuple[str, dict[str, Any]]:
    """(kind of damage, the description) with a text that configs would run, or another type, at any place."""
    copy = json.loads(json.dumps(description))
    place = draw.choice(list(places(copy)))
    parent = at(copy, place[:-1])
    if draw.random() < 0.5:
        parent[place[-1]] = draw.choice(HOSTILE)
        return f"hostile value: {place}", copy
    if isinstance(place[-1], str) and draw.random() < 0.3:
        parent[draw.choice(HOSTILE)] = parent.pop(place[-1])
        return f"hostile key: {place}", copy
    known = parent[place[-1]]
    parent[place[-1]] = another_type(known, draw)
    while known is None and isinstance(parent[place[-1]], bool):  # yes, no, and not known are of one type
        parent[place[-1]] = another_type(known, draw)
    return f"value of another type: {place} became {parent[place[-1]]!r}", copy


def prepare(folder: Path) -> dict[str, Any]:
    """Write good files; the network, its description, the run's state, and what is read from each file."""
    torch.set_num_threads(1)  # a pool of threads doesn't outlive the fork
    network, last = weights()
    save_weights(network, folder / "model.pt")
    save_weights(network, folder / "model.safetensors")
    write_pt(last, str(folder / "last.pt"))
    return {"network": network, "last": last, "read": {name: use(str(folder / name)) for name, use in USES.items()}}


def mutate(rng: np.random.Generator, folder: Path, whole: dict[str, Any]) -> tuple[str, Path]:
    draw = random.Random(rng.bytes(8))
    for old in folder.glob("damaged*"):
        old.unlink()
    name = draw.choice(list(USES))
    path = folder / f"damaged_{draw.randrange(10**9)}_{name}"  # checksums are compared once per path and time
    if draw.random() < 2 / 3:
        kind, data = damage((folder / name).read_bytes(), draw)
        path.write_bytes(data)
        return kind, path
    kind, evil = hostile(json.loads(bytes(whole["network"].get_extra_state().tolist())), draw)
    state = {**whole["network"].state_dict(), EXTRA_STATE: encode_description(evil)}
    if name == "last.pt":
        torch.save({**whole["last"], "model": state}, path)
    else:
        save_weights(state, path)
    return kind, path


def judge(path: Path, whole: dict[str, Any]) -> tuple[str, str]:
    name = path.name.rpartition("_")[2]
    found = USES[name](str(path))
    return ("right", "read as it was") if found == whole["read"][name] else ("silent", f"{path.name}: {found}")
