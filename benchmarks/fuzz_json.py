"""Mutated JSON files and weight files: what the package makes of each. The last column but one has to stay empty.

    python benchmarks/fuzz_json.py --json 500 --checkpoints 300 --seed 0

Every mutation has a known right outcome: the result of the file as it was (``same``), or an error made for the user that
names the file (``refused``). Another result is ``silent``, another error ``unhelpful``, more than `LIMIT_S` ``hanging``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

OUTCOMES = ("same", "refused", "silent", "unhelpful", "hanging")
LIMIT_S = 10
MEMORY_BYTES = 4 * 2**30  # beyond what is in use at the start
ROOT = Path(__file__).parents[1]
HOSTILE = (
    "$__import__('os').system('touch hacked')",
    "@bundle_root",
    "%train",
    "_target_",
    "../../etc/passwd",
    "a\n| b |",
)


class Hanging(BaseException):
    """A mutation that took longer than `LIMIT_S`."""


def judge(use: Callable[[str], Any], path: Path, expected: Any) -> tuple[str, str]:
    """(outcome, what to show) of using the mutated file at `path`."""

    def stop(*_: Any) -> None:
        raise Hanging

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    try:
        result = use(str(path))
    except Hanging:
        return "hanging", ""
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        is_ours = type(error).__module__.startswith("tsfm") or isinstance(error, OSError)
        is_named = path.name in text or path.parent.name in text
        return "refused" if is_ours and is_named else "unhelpful", text
    finally:
        signal.alarm(0)
    return ("same", "") if result == expected else ("silent", f"{result}"[:300])


def run(name: str, cases: Iterator[tuple[str, Callable[[str], Any], Path, Any]], shown: int = 10) -> dict[str, Any]:
    """Judge (what was done, use, path, expected result) one after the other; a row of the table."""
    counts, slowest, failures = Counter(), 0.0, []
    for done, use, path, expected in cases:
        start = time.perf_counter()
        outcome, text = judge(use, path, expected)
        slowest = max(slowest, time.perf_counter() - start)
        counts[outcome] += 1
        if outcome in OUTCOMES[2:]:
            failures.append(f"{outcome}: {path.name}: {done}: {text}")
    for line in failures[:shown]:
        print(line, file=sys.stderr)
    return {
        "input": name,
        "mutations": sum(counts.values()),
        **{key: counts[key] for key in OUTCOMES},
        "slowest": slowest,
    }


# ---- JSON --------------------------------------------------------------------------------------------------------

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
OVERLAY = {"epochs": 3, "amp": False, "learning_rate": 0.1, "patch_size": [16, 16, 16], "mirror_axes": "SP", "num_workers": 0, "val_interval": 2, "checkpointing": False}  # fmt: skip
FREE_KEYS = {"liver", "tumor", "own", "default", "c3", "0", "1", "2", "3"}  # names of the user's own


def plain_items(items: list[dict[str, Any]], root: str) -> list[Any]:
    return json.loads(json.dumps(items).replace(root, ""))


def use_pool(path: str) -> Any:
    from tsfm.cases.pool import DatasetPool

    pool = DatasetPool(path, os.path.dirname(path))
    folds = [[item["case"] for item in pool.val_items(fold)] for fold in range(5)]
    return [plain_items(pool.cases, os.path.dirname(path)), pool.table.to_dict(), folds]


def use_dataset(path: str) -> Any:
    from tsfm.planning.own_data import dataset_pool

    pool = dataset_pool(os.path.dirname(path))
    return [plain_items(pool.cases, os.path.dirname(path)), pool.table.to_dict()["targets"]]


def use_datalist(path: str) -> Any:
    from tsfm.cases.folders import find_images

    items = find_images(path)
    for item in items:
        os.stat(item["image"])  # a case whose image is not there is reported by its own error
    return plain_items(items, os.path.dirname(path))


def use_splits(path: str) -> Any:
    from tsfm.cases.pool import DatasetPool

    declared = {**POOL, "datasets": [{**POOL["datasets"][0], "patient": {"pattern": "."}}]}
    pool = DatasetPool(declared, os.path.dirname(path), splits_file=path)
    return [[item["case"] for item in part] for part in pool.split(0)]


def use_overlay(path: str) -> Any:
    """What of the overlay has an effect: the ids that train.json has."""
    from tsfm.options import check_options
    from tsfm.schema import read_json

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


def mistype(word: str, draw: random.Random) -> str:
    """`word` with one letter dropped, doubled, swapped or replaced; never `word` itself."""
    while True:
        i = draw.randrange(len(word))
        slips = (word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:], word[:i] + "q" + word[i + 1 :],
                 word[:i] + word[i + 1 : i + 2] + word[i] + word[i + 2 :])  # fmt: skip
        if (slip := draw.choice(slips)) not in (word, ""):
            return slip


def mutate_json(content: Any, draw: random.Random) -> tuple[str, bytes]:
    """(what was done, the file's bytes) of one mutation."""
    copy = json.loads(json.dumps(content))
    everywhere = list(places(copy))
    keyed = [place for place in everywhere if isinstance(place[-1], str) and place[-1] not in FREE_KEYS]
    how = draw.choice(["type", "type", "type", "mistype", "mistype", "repeat", "cut", "bytes", "bom", "text"])
    if how == "type":
        place = draw.choice(everywhere)
        parent = at(copy, place[:-1])
        parent[place[-1]] = another_type(parent[place[-1]], draw)
        return f"{place} became {parent[place[-1]]!r}", json.dumps(copy).encode()
    if how == "mistype":
        place = draw.choice(keyed)
        parent = at(copy, place[:-1])
        name = mistype(place[-1], draw)
        parent[name] = parent.pop(place[-1])
        return f"key {place} became {name!r}", json.dumps(copy).encode()
    text = json.dumps(copy)
    if how == "repeat":
        place = draw.choice([place for place in everywhere if isinstance(place[-1], str)])
        whole = json.dumps({place[-1]: at(copy, place)})[1:-1]
        return f"key {place} twice", text.replace(whole, f"{whole}, {whole}", 1).encode()
    if how == "cut":
        return "cut", text[: draw.randrange(len(text))].encode()
    if how == "bytes":
        position = draw.randrange(len(text))
        return "a byte that is no text", text[:position].encode() + b"\xff" + text[position:].encode()
    if how == "bom":
        return "a byte order mark and other line ends", "\ufeff".encode() + json.dumps(copy, indent=1).replace(
            "\n", "\r\n"
        ).encode()
    slip = draw.choice([lambda t: t.replace('"', "'"), lambda t: t[:-1] + ",}", lambda t: "// note\n" + t, lambda t: t + t,
                        lambda t: "[" * 20_000 + t, lambda t: "", lambda t: "null", lambda t: "[]", lambda t: '"text"'])  # fmt: skip
    return "not this JSON", slip(text).encode()


def json_mutations(count: int, seed: int, folder: Path) -> Iterator[tuple[str, Callable[[str], Any], Path, Any]]:
    """`count` mutated files of all kinds, each in a folder with the images that the good one names."""
    draw = random.Random(seed)
    for part in ("img", "lab", "own/img", "own/lab"):
        (folder / part).mkdir(parents=True)
        for n in range(6):
            (folder / part / f"c{n}.nii.gz").touch()
    expected = {}
    for name, (content, use) in KINDS.items():
        (folder / name).write_text(json.dumps(content))
        expected[name] = use(str(folder / name))
    for _ in range(count):
        name = draw.choice(list(KINDS))
        content, use = KINDS[name]
        done, data = mutate_json(content, draw)
        (folder / name).write_bytes(data)
        yield done, use, folder / name, expected[name]
        (folder / name).write_text(json.dumps(content))


# ---- weight files ------------------------------------------------------------------------------------------------


def weights(folder: Path) -> tuple[Any, dict[str, Any]]:
    """A small network with everything that a description can hold, and the content of its ``last.pt``."""
    import torch
    from tsfm.cases.cases import Preparation
    from tsfm.labels import LabelTable
    from tsfm.network.tsfm_net import TSFM
    from tsfm.training.checkpoint import describe_network

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


def read_weights(path: str) -> Any:
    from tsfm.training.checkpoint import read_state

    tensors, description = read_state(path)
    return [
        description,
        {name: [str(t.dtype), list(t.shape), t.float().flatten().tolist()] for name, t in tensors.items()},
    ]


def read_last(path: str) -> Any:
    from tsfm.training.run_state import _read_run

    state = _read_run(path)
    model = {name: [str(t.dtype), list(t.shape), t.float().flatten().tolist()] for name, t in state["model"].items()}
    return [{key: state[key] for key in ("epoch", "curve", "best", "settings")}, model]


def damage(content: bytes, draw: random.Random) -> tuple[str, bytes]:
    """(what was done, the file's bytes) of one accident of disks, copies and downloads."""
    size, position = len(content), draw.randrange(len(content))
    how = draw.choice(["bit", "bit", "bit", "zeros", "cut", "tail", "block"])
    if how == "bit":
        return f"bit {position}", content[:position] + bytes([content[position] ^ 1 << draw.randrange(8)]) + content[
            position + 1 :
        ]
    if how == "zeros":
        end = min(size, position + draw.choice([1, 16, 512]))
        return f"zeros {position}-{end}", content[:position] + bytes(end - position) + content[end:]
    if how == "cut":
        return f"cut at {position}", content[:position]
    if how == "tail":
        return "a tail", content + draw.randbytes(draw.choice([1, 100, 5000]))
    other = draw.randrange(size)
    return f"block {other} at {position}", (
        content[:position] + content[other : other + 64] + content[position + 64 :]
    )[:size]


def hostile(description: dict[str, Any], draw: random.Random) -> tuple[str, dict[str, Any]]:
    """(what was done, the description) with a text that configs would run, or another type, at any place."""
    copy = json.loads(json.dumps(description))
    place = draw.choice(list(places(copy)))
    parent = at(copy, place[:-1])
    if draw.random() < 0.5:
        parent[place[-1]] = draw.choice(HOSTILE)
    elif isinstance(place[-1], str) and draw.random() < 0.3:
        parent[draw.choice(HOSTILE)] = parent.pop(place[-1])
    else:
        parent[place[-1]] = another_type(parent[place[-1]], draw)
    return f"description {place}", copy


def checkpoint_mutations(count: int, seed: int, folder: Path) -> Iterator[tuple[str, Callable[[str], Any], Path, Any]]:
    """`count` mutated weight files: ``model.pt``, ``model.safetensors`` and a run's ``last.pt``, one in three hostile."""
    import torch
    from tsfm.training.checkpoint import EXTRA_STATE, encode_description, save_weights
    from tsfm.training.weight_files import write_pt

    draw = random.Random(seed)
    network, last = weights(folder)
    description = json.loads(bytes(network.get_extra_state().tolist()))
    save_weights(network, folder / "model.pt")
    save_weights(network, folder / "model.safetensors")
    write_pt(last, str(folder / "last.pt"))
    uses = {"model.pt": read_weights, "model.safetensors": read_weights, "last.pt": read_last}
    good = {name: (folder / name).read_bytes() for name in uses}
    expected = {name: use(str(folder / name)) for name, use in uses.items()}
    for number in range(count):
        name = draw.choice(list(uses))
        path = folder / f"{number}_{name}"
        if number % 3:
            done, data = damage(good[name], draw)
            path.write_bytes(data)
        else:
            done, evil = hostile(description, draw)
            state = {**network.state_dict(), EXTRA_STATE: encode_description(evil)}
            if name == "last.pt":
                torch.save({**last, "model": state}, path)
            else:
                save_weights(state, path)
        yield done, uses[name], path, expected[name]
        path.unlink()


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [f"| input | mutations | {' | '.join(OUTCOMES)} | slowest |", f"|---|{'---:|' * (len(OUTCOMES) + 2)}"]
    for row in rows:
        cells = [row["input"], row["mutations"], *(row[key] for key in OUTCOMES), f"{row['slowest']:.2f} s"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=int, default=500)
    parser.add_argument("--checkpoints", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import torch  # noqa: F401  (its address space does not count)

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
    folder = Path(tempfile.mkdtemp(prefix="fuzz_"))
    (folder / "weights").mkdir()
    try:
        rows = [
            run("JSON", json_mutations(options.json, options.seed, folder / "json")),
            run("weights", checkpoint_mutations(options.checkpoints, options.seed, folder / "weights")),
        ]
    finally:
        shutil.rmtree(folder)
    print(table(rows))
    sys.exit(any(row[key] for row in rows for key in OUTCOMES[2:]))


if __name__ == "__main__":
    main()
