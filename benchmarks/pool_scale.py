"""How a pool grows from 280 to 2779 tiny cases in the layouts of the ten data sets: seconds, memory, files.

Each part is a process of its own, forked from one that has imported everything, with one thread;
seconds are of the wall and, in brackets, of the processor. The cases are a few voxels large, so the figures are what a case
costs beside its voxels. Then, in a store of which a fifth of the cases was taken away again, a whole run is killed with
SIGKILL while it measures and while it prepares, goes on, and trains; then its raw data are taken away.

    python benchmarks/pool_scale.py --work /tmp/pool_scale --output /tmp/pool_scale.md
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from sides import ROOT, bundle_run
from torch.utils.data import DataLoader
from tsfm.cases.pool import DatasetPool
from tsfm.patches.dataset import Draw, PatchDataset, PoolSampler
from tsfm.patches.store import CaseStore
from tsfm.planning.plan import plan_preparation, prepare
from tsfm_tools.phantoms import layouts, scans

BUNDLE = ROOT / "bundles/tsfm_pretrain"

CASES = {
    "msd_liver": 131, "msd_lung": 64, "msd_pancreas": 281, "msd_hepaticvessel": 303, "msd_colon": 126, "kits21": 300,
    "breast_dce": 100, "amos22": 240, "btcv": 30, "totalsegmentator": 1204,
}  # fmt: skip
"""Cases of the paper's pool, 2779."""

SIZE, PATCH, SPACING_MM = (8, 10, 12), (16, 16, 16), [40.0, 38.0, 32.0]
TINY = {
    "network_def#features": [4, 8], "network_def#depths_down": [1, 1], "network_def#depths_up": [1],
    "network_def#strides": [[2, 2, 2]], "network_def#hidden_size": 12, "network_def#num_layers": 1,
    "network_def#num_heads": 2, "network_def#mlp_dim": 24, "patch_size": list(PATCH), "spacing_mm": SPACING_MM,
    "epochs": 2, "iterations_per_epoch": 4, "val_iterations": 2, "batch_size": 2, "num_workers": 1, "device": "cpu",
    "checkpointing": False,
}  # fmt: skip
DRAWS, DRAWINGS = 200, 16


# ---- parts, each in a process of its own ---------------------------------------------------------------------------


def write(data: str, share: str) -> dict:
    """Draw the pool, of each data set one in `share` cases; a drawing, and its file, serve several cases."""
    drawn, save, written = functools.lru_cache(None)(layouts.draw_case), scans.save, {}
    layouts.draw_case = lambda name, index, *how, **more: drawn(name, index % DRAWINGS, *how, **more)

    def save_or_link(array: np.ndarray, spacing_mm, axes: str, path: str, *how, **more) -> None:
        key = (array.tobytes(), array.dtype, array.shape, tuple(spacing_mm), axes, how, tuple(more.items()))
        os.link(written[key], path) if key in written else save(array, spacing_mm, axes, path, *how, **more)
        written.setdefault(key, path)

    layouts.save = scans.save = save_or_link
    for name, count in CASES.items():
        layouts.write_pool(data, max(1, round(count / int(share))), SIZE, 0, [name])
    return {}


def opened(data: str, store: str):
    """Pool, its preparation by the fingerprint, and the store."""
    pool = DatasetPool(BUNDLE / "configs/pool.json", data)
    return pool, CaseStore(store, pool.table, plan_preparation(pool, store, SPACING_MM, "fingerprint"))


def fingerprint(data: str, store: str) -> dict:
    pool, _ = opened(data, store)
    return {"cases": len(pool.cases)}


def preparation(data: str, store: str) -> dict:
    pool, cases = opened(data, store)
    report = cases.prepare(pool.cases, progress=False)
    report.raise_failures()
    return {"prepared": report.prepared, "reused": report.reused}


def start(data: str, store: str) -> dict:
    """Everything of a run before its first patch is there, but for imports and the network."""
    pool, cases = opened(data, store)
    train, val = pool.split(0)
    prepare(cases, train + val)
    draws = PoolSampler(train, batch_size=2, iterations=1)
    assert PatchDataset(train, cases, pool.table, PATCH)[next(iter(draws))]["image"].shape[1:] == PATCH
    return {}


def draw(data: str, store: str) -> dict:
    """Milliseconds per patch: of cases that this process had not opened, and of the same again; files it looks at."""
    pool, cases = opened(data, store)
    patches = PatchDataset(pool.cases, cases, pool.table, PATCH)
    chosen = np.random.default_rng(0).permutation(len(pool.cases))[:DRAWS]
    stat, looked, found = os.stat, [0], {}
    patches[Draw(int(chosen[0]), 0, False)]
    for name in ("first", "again"):
        began = time.process_time()
        for index in chosen:
            patches[Draw(int(index), 0, False)]
        found[name] = (time.process_time() - began) / len(chosen) * 1000
    os.stat = lambda *call, **how: looked.__setitem__(0, looked[0] + 1) or stat(*call, **how)
    for index in chosen:
        patches[Draw(int(index), 1, False)]
    return {**found, "looked": looked[0] / len(chosen)}


def worker(data: str, store: str) -> dict:
    """MiB that a loader's worker holds for itself after it drew a thousand patches."""
    pool, cases = opened(data, store)
    cases.prepare(pool.cases, progress=False)
    sampler = PoolSampler(pool.cases, batch_size=2, iterations=500)
    loader = DataLoader(
        PatchDataset(pool.cases, cases, pool.table, PATCH), 2, sampler=sampler, num_workers=1, persistent_workers=True
    )
    for _ in loader:
        pass
    pid = loader._iterator._workers[0].pid
    rows = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    own = sum(int(rows[name].split()[0]) for name in ("Private_Clean", "Private_Dirty"))
    return {"own": own / 1024, "all": int(rows["Rss"].split()[0]) / 1024}


# ---- the parts together ----------------------------------------------------------------------------------------------


def timed(part: Callable[..., dict], *arguments: str) -> dict:
    """What a part answers, with its seconds."""
    began, used = time.perf_counter(), time.process_time()
    answer = part(*arguments)
    return {"wall": time.perf_counter() - began, "cpu": time.process_time() - used, **answer}


def run(part: Callable[..., dict], *arguments: object) -> dict:
    """A part in a process of its own, forked from this one, which has imported everything."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as process:
        answer = process.submit(timed, part, *map(str, arguments)).result()
    print(part.__name__, *arguments, {key: round(value, 3) for key, value in answer.items()}, flush=True)
    return answer


def train(work: Path, data: Path, kill: Callable[[], bool] | None = None, **options: object) -> None:
    """The bundle's run, killed as soon as `kill` says so."""
    (work / "tiny.json").write_text(json.dumps(TINY))
    command = bundle_run(
        BUNDLE, ["train.json", str((work / "tiny.json").resolve())], dataset_dir=data, store_dir=work / "store",
        output_dir=work / "run", ckpt_dir="none", **options,
    )  # fmt: skip
    with (work / "log.txt").open("w") as log:
        started = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        while kill and started.poll() is None and not kill():
            time.sleep(0.05)
        if kill:
            os.killpg(started.pid, signal.SIGKILL)
        code = started.wait()
    if code != (-signal.SIGKILL if kill else 0):
        sys.exit(f"the run ended with {code}:\n{(work / 'log.txt').read_text()[-3000:]}")


def whole_run(work: Path, data: Path, cases: int) -> list[str]:
    """Killed while it measures, killed while it prepares, gone on, and gone on without raw data; a line about each."""
    store, lines, taken = work / "store", [], cases // 5
    shutil.rmtree(work / "run", ignore_errors=True)
    for pattern in ("fingerprints/*.npz", "*/*/case.json"):
        for path in sorted(store.glob(pattern))[:taken]:
            path.unlink() if path.suffix == ".npz" else shutil.rmtree(path.parent)
    for path in store.glob("fingerprints/pool-*.json"):
        path.unlink()

    def count(pattern: str) -> int:
        return sum(1 for _ in store.glob(pattern))

    for what, pattern in (("measured", "fingerprints/*.npz"), ("prepared", "*/*/case.json")):
        enough = count(pattern) + taken // 2  # cases with the same bytes share a measurement
        train(work, data, kill=lambda pattern=pattern, enough=enough: count(pattern) > enough)
        lines.append(f"killed with {count(pattern)} of {cases} cases {what}")
    kept = {path: path.stat().st_mtime_ns for path in store.glob("*/*/case.json")}
    began = time.perf_counter()
    train(work, data)
    same = all(path.stat().st_mtime_ns == then for path, then in kept.items())
    lines.append(
        f"the same command prepared the other {count('*/*/case.json') - len(kept)}, left those as they were ({same}), and "
        f"trained {TINY['epochs']} epochs: {time.perf_counter() - began:.0f} s"
    )
    data.rename(work / "gone")
    began = time.perf_counter()
    train(work, data, epochs=TINY["epochs"] + 1, raw_data=False)
    lines.append(f"one more epoch without raw data (`--raw_data False`): {time.perf_counter() - began:.0f} s in all")
    return lines


def figures(work: Path, share: int) -> dict[str, str]:
    """The table's column for one size of the pool."""
    data, store = work / "data", work / "store"
    run(write, data, share)

    def seconds(answer: dict) -> str:
        return f"{answer['wall']:.1f} s ({answer['cpu']:.1f})"

    measured = run(fingerprint, data, store)
    rows = {"cases": str(measured["cases"]), "files in the pool": str(sum(len(files) for *_, files in os.walk(data)))}
    rows["fingerprint"] = seconds(measured)
    rows["preparation"] = seconds(run(preparation, data, store))
    rows["files in the store"] = str(sum(len(files) for *_, files in os.walk(store)))
    size = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    rows["size of the store"] = f"{size / 2**20:.0f} MiB"
    rows["start-up with a prepared store"] = seconds(run(start, data, store))
    shutil.copytree(data, work / "elsewhere", copy_function=shutil.copyfile)
    moved = run(preparation, work / "elsewhere", store)
    rows["the same from a copy of the pool"] = f"{seconds(moved)}, {moved['prepared']:.0f} cases prepared anew"
    shutil.rmtree(work / "elsewhere")
    drawn = run(draw, data, store)
    rows["a patch of a case that is new to the process"] = f"{drawn['first']:.2f} ms"
    rows["a patch of a case that is not"] = f"{drawn['again']:.2f} ms, {drawn['looked']:.0f} calls of stat"
    held = run(worker, data, store)
    rows["memory of a worker"] = f"{held['own']:.0f} MiB of its own, {held['all']:.0f} with what it shares"
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/pool_scale"))
    parser.add_argument("--output", type=Path, help="where the table goes, too")
    parser.add_argument("--shares", type=int, nargs="*", default=[10, 1])
    parser.add_argument("--no_run", action="store_true", help="leave the whole run out")
    options = parser.parse_args()
    work = options.work / "pool"  # a folder of its own: what else lies in --work stays
    shutil.rmtree(work, ignore_errors=True)
    columns = [figures(work / str(share), share) for share in options.shares]
    lines = [f"| {name} | {' | '.join(column[name] for column in columns)} |" for name in columns[0]]
    lines.insert(1, "|---" * (len(columns) + 1) + "|")
    if not options.no_run:
        last = work / str(options.shares[-1])
        lines += ["", *(f"- {line}" for line in whole_run(last, last / "data", int(columns[-1]["cases"])))]
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
