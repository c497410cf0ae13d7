"""Work in processes of its own, one side of a comparison each: commands, what they answer, the memory that they take.

Imported in nnU-Net's environment too, where tsfm cannot be: at its head, the standard library alone.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from tsfm.labels import LabelTable

ROOT = Path(__file__).resolve().parents[1]
PEER = ".venv-bench/bin/python"
"""Python with nnunetv2 2.8.1 (`make bench-env`)."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "nnUNet_compile": "f"}


def peak_gib() -> float:
    """Largest resident memory of this process so far, or since `forget_peak`.

    The system's ru_maxrss would begin with that of the process by which this one was started.
    """
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


def forget_peak() -> float:
    """Let `peak_gib` count anew; what this process holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_gib()


def peak_gib_of(command: Sequence[object]) -> float:
    """Run a command, whose output goes to stderr; the largest resident memory of its process, or of one of its children."""
    between = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr); "
    between += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    return answer(sys.executable, "-c", between, *command) / 2**20


def answer(*command: object) -> Any:
    """Run a command; what it prints in its last line, as JSON."""
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def in_turn(calls: Mapping[str, Sequence[object]], rounds: int) -> dict[str, list]:
    """Side -> what it answers in each round. Each call is a process of one thread that ends with `serve`."""
    environment = {**os.environ, **ONE_THREAD}
    running = {
        side: subprocess.Popen(
            [*map(str, call)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for side, call in calls.items()
    }
    found: dict[str, list] = {side: [] for side in calls}
    for _ in range(rounds):
        for side, process in running.items():
            print("go", file=process.stdin, flush=True)
            found[side].append(json.loads(process.stdout.readline()))
    for process in running.values():
        process.stdin.close()
        process.wait()
    return found


def serve(work: Callable[[], Any]) -> None:
    """The other end of `in_turn`: do `work` once for every line on the input, and answer."""
    for _ in sys.stdin:
        print(json.dumps(work()), flush=True)


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Of two masks; NaN where both are empty."""
    both = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / both if both else float("nan")


def organs(count: int) -> LabelTable:
    """A label table of one data set, "ct", whose ids from 1 on are as many targets."""
    from tsfm.labels import LabelTable

    names = [f"organ_{i}" for i in range(1, count + 1)]
    labels = {str(i): name for i, name in enumerate(names, start=1)}
    return LabelTable({name: {} for name in names}, [{"name": "ct", "labels": labels}])


def bundle_run(
    bundle: str | os.PathLike, configs: Sequence[str], launcher: Sequence[str] = (), **options: object
) -> list[str]:
    """``python -m monai.bundle run`` as a command: `configs` are names in the bundle's configs folder, or whole paths."""
    folder = Path(bundle).resolve() / "configs"
    options = {
        "bundle_root": folder.parent, "meta_file": folder / "metadata.json", "logging_file": folder / "logging.conf",
        **options,
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", *launcher, "-m", "monai.bundle", "run"]
    command += ["--config_file", str([str(folder / name) for name in configs])]
    return command + [word for key, value in options.items() for word in (f"--{key}", str(value))]
