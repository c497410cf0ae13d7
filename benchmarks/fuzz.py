"""Damaged inputs by the thousand: each is refused by name with what to do, or read as the file itself says.

    python benchmarks/fuzz.py [--seed 0] [--parts NIfTI JSON weights] [--count 100] [--show 5]

One mutated input after the other goes through the package in a process of its own, with a limit on memory and time.
What comes of it is one of

* refused: an error of the package that names the file and says what to do;
* right: read exactly as an independent parser reads the bytes, or as the file was before;
* silent: read without error or warning although the bytes contradict themselves, or read as something else;
* hanging: no answer within the time limit (the process is killed);
* unhelpful: another exception than the package's own, or one without the file's name or without an advice.

The exit status is 1 unless all are refused or right. The same seed gives the same inputs. A part is a module with
`COUNT`, `prepare(folder)`, which makes what all its inputs need, `mutate(rng, folder, prepared)`, which writes one damaged
input and gives ("kind of damage: detail", path), and `judge(path, prepared)`, which gives (outcome, detail) or raises.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import fuzz_json
import fuzz_nifti
import fuzz_weights
import numpy as np

PARTS = {"NIfTI": fuzz_nifti, "JSON": fuzz_json, "weights": fuzz_weights}
OUTCOMES = ("refused", "right", "silent", "hanging", "unhelpful")
SECONDS = 20
MEMORY_BYTES = 2**30  # beyond what the imports take
IMPORTS = "SimpleITK", "jsonschema", "scipy.ndimage", "monai.data"  # what the package imports as late as it can
ADVICE = (
    "download", "correct", "convert", "rename", "check", "repair", "give", "leave out", "replace", "save", "put",
    "resample", "install", "name", "set", "expected", "did you mean", "known:",
)  # fmt: skip


class Result(NamedTuple):
    """What came of one input."""

    part: str
    kind: str
    outcome: str
    detail: str
    seconds: float


def run_part(name: str, seed: int, count: int, folder: Path) -> list[Result]:
    """All inputs of a part; a process that hangs or dies is replaced, and the next input is its successor's first."""
    prepared = PARTS[name].prepare(folder)
    results: list[Result] = []
    context = multiprocessing.get_context("fork")
    while len(results) < count:
        ours, theirs = context.Pipe()
        arguments = (name, seed, len(results), count, folder, prepared, theirs)
        worker = context.Process(target=_work, args=arguments, daemon=True)
        worker.start()
        theirs.close()
        kind = "?"
        try:
            while len(results) < count:
                if not ours.poll(SECONDS):
                    text = f"input {len(results)}: no answer within {SECONDS} s"
                    results.append(Result(name, kind, "hanging", text, SECONDS))
                    break
                answer = ours.recv()
                if isinstance(answer, str):
                    kind = answer
                else:
                    results.append(answer)
        except EOFError:
            results.append(Result(name, kind, "unhelpful", f"input {len(results)}: the process died", 0))
        worker.kill()
        worker.join()
    return results


def _work(name: str, seed: int, first: int, count: int, folder: Path, prepared: Any, pipe: Any) -> None:
    """Inputs `first` to `count`: the kind of damage is sent before the work, what came of it after."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # ITK, nibabel and logging print beside what is raised
    for index in range(first, count):
        kind, path = PARTS[name].mutate(np.random.default_rng((seed, index)), folder, prepared)
        pipe.send(kind)
        start = time.perf_counter()
        try:
            outcome, detail = PARTS[name].judge(path, prepared)
        except Exception as error:
            outcome, detail = refusal(error, path)
        pipe.send(Result(name, kind, outcome, f"input {index}: {detail}", time.perf_counter() - start))


def refusal(error: Exception, path: Path) -> tuple[str, str]:
    """Outcome of an error: is it the package's own, does it name the file, does it say what to do?"""
    message = f"{type(error).__name__}: {error}"
    if not (type(error).__module__.startswith("tsfm") or isinstance(error, OSError)):
        return "unhelpful", f"not the package's: {message}"
    if path.name not in message and str(path.parent) not in message:
        return "unhelpful", f"does not name the file: {message}"
    if "memory" in message or not any(word in message for word in ADVICE):  # the files are small
        return "unhelpful", f"says nothing to do: {message}"
    return "refused", message


def table(results: list[Result]) -> str:
    """Markdown: a row per part and kind of damage, a column per outcome."""
    counts = Counter((one.part, _kind(one), one.outcome) for one in results)
    lines = [f"| input | damage | inputs | {' | '.join(OUTCOMES)} |", "|---|---|" + "---:|" * (len(OUTCOMES) + 1)]
    parts = dict.fromkeys(one.part for one in results)
    rows = [
        (part, kind) for part in parts for kind in [*sorted({_kind(one) for one in results if one.part == part}), "all"]
    ]
    for part, kind in rows:
        row = [
            sum(n for (p, k, o), n in counts.items() if p == part and kind in (k, "all") and o == outcome)
            for outcome in OUTCOMES
        ]
        lines.append(f"| {part} | {kind} | {sum(row)} | {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def _kind(one: Result) -> str:
    return one.kind.partition(":")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="inputs per part, in place of the usual number")
    parser.add_argument("--show", type=int, default=5, help="examples of each outcome that is not wanted, per part")
    options = parser.parse_args()
    for module in IMPORTS:  # before the fork: neither their time nor their memory counts
        importlib.import_module(module)

    start, results = time.perf_counter(), []
    for name in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            found = run_part(name, options.seed, options.count or PARTS[name].COUNT, Path(folder))
        results += found
        for outcome in OUTCOMES[2:]:
            for one in [one for one in found if one.outcome == outcome][: options.show]:
                print(f"{outcome}: {name}: {one.kind}: {one.detail[:400]}")
    slowest = max(results, key=lambda one: one.seconds)
    print(f"\n{table(results)}\n\nSeed {options.seed}, {time.perf_counter() - start:.0f} s; the slowest input took "
          f"{slowest.seconds:.1f} s ({slowest.part}, {_kind(slowest)})")  # fmt: skip
    sys.exit(any(one.outcome in OUTCOMES[2:] for one in results))


if __name__ == "__main__":
    main()
