"""The rows that the parts of run_all.sh leave, one JSON line each as soon as it is known, and the page made of them.

python benchmarks/gpu/record.py FOLDER      writes FOLDER/gpu.md from FOLDER/rows.jsonl
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the modules beside this folder

TINY = os.environ.get("TSFM_GPU_TINY") == "1"
"""Tiny sizes, on the CPU where there is no GPU: to try every part before time on a GPU is spent."""

OUT = Path(os.environ.get("OUT", "/tmp/tsfm_gpu"))
OUT.mkdir(parents=True, exist_ok=True)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TITLES = {
    "checks": "Does it compute the same?",
    "runs": "Whole runs through monai.bundle, a small network on phantoms",
    "steps": "One training step",
    "shares": "Where the time of one step goes",
    "window": "Sliding window to the label map",
    "loader": "Does the loader keep up?",
    "paper": "train.json as it stands: 1.6 B parameters, batch 2",
}


def record(part: str, **row: Any) -> None:
    """Add one row to the table of `part`."""
    with open(OUT / "rows.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"part": part, **row}) + "\n")
    print(
        f"{time.strftime('%H:%M:%S')} {part}: " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True
    )


def attempt(part: str, what: str, function, *args: Any) -> Any:
    """`function(*args)`; an error becomes a row, and the other rows go on."""
    try:
        return function(*args)
    except Exception as error:
        record(
            part, what=what, failed=f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
        )
        return None
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


def seconds() -> float:
    """A clock that waits for the GPU."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def page(folder: Path) -> str:
    """The tables of all parts, in Markdown."""
    file = folder / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    lines = ["# On a GPU", "", machine(), "", "`benchmarks/gpu/run_all.sh` wrote this page.", ""]
    for part, title in TITLES.items():
        table = [{key: value for key, value in row.items() if key != "part"} for row in rows if row["part"] == part]
        if not table:
            lines += [f"## {title}", "", "Not run: its time was over before it began, or it failed at the start.", ""]
            continue
        columns = list(dict.fromkeys(key for row in table for key in row))
        lines += [f"## {title}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in table] + [""]
    return "\n".join(lines)


def machine() -> str:
    """Card, driver, versions and cores in one sentence."""
    software = f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} processor cores"
    if DEVICE.type != "cuda":
        return f"No GPU at hand; {software}."
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    memory = torch.cuda.get_device_properties(DEVICE).total_memory / 2**30
    return (
        f"{torch.cuda.get_device_name()}, {memory:.0f} GiB, driver {driver}, cuDNN {torch.backends.cudnn.version()}, "
        f"{software}."
    )


if __name__ == "__main__":
    target = Path(sys.argv[1])
    (target / "gpu.md").write_text(page(target), encoding="utf-8")
