"""Training runs killed with SIGKILL at random moments and resumed, against the same run that nobody killed.

Compared, bit for bit, after every kill: the hash of each batch, each step's loss, the hash of the weights after each
step, and the final weights and optimizer state. Each process fills the memory that it is given, and that it gives back,
with a byte of its own (glibc's M_PERTURB), so that a number read from uninitialised memory shows as a difference.
The runs are phantoms' (`tsfm_pretrain`, a tiny network), in processes forked from one that has imported everything.

    python benchmarks/kill_campaign.py --runs 30 --work /tmp/kills
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import monai.bundle  # noqa: F401  the children are to find everything imported
import torch
from ignite import distributed as idist
from ignite.engine import Events
from sides import ROOT
from tsfm.training.run_state import RunState, unwrap
from tsfm_tools.paper.grids import run_bundle
from tsfm_tools.phantoms import layouts as phantoms

BUNDLE = ROOT / "bundles/tsfm_pretrain"
M_PERTURB = -6
EPOCHS, STEPS = 4, 4
SETTINGS = {
    "allow_missing": True, "epochs": EPOCHS, "iterations_per_epoch": STEPS, "val_iterations": 1, "batch_size": 1,
    "patch_size": [16, 32, 32], "spacing_mm": [10.0, 8.0, 8.0], "learning_rate": 0.01, "checkpointing": False,
    "device": "cpu", "network_def#features": [8, 16, 32], "network_def#depths_down": [1, 1, 1],
    "network_def#depths_up": [1, 1], "network_def#strides": [[2, 2, 2], [2, 2, 2]], "network_def#hidden_size": 24,
    "network_def#num_layers": 1, "network_def#num_heads": 2, "network_def#mlp_dim": 48, "network_def#dropout": 0.1,
}  # fmt: skip
KINDS = {"no workers": (0, 1), "two workers": (2, 1), "two processes": (0, 2), "two processes, a worker each": (1, 2)}
"""(num_workers, processes)"""


def trace_steps(folder: Path) -> None:
    """From now on this process's run appends a line per step to a file: iteration, hash of the batch, loss, of the weights."""
    attach = RunState.attach

    def attach_both(self: RunState, engine) -> None:
        attach(self, engine)
        path = folder / f"trace_{idist.get_rank()}.txt"

        def write() -> None:
            output = engine.state.output[0]
            batch, weights = digest([output["image"], output["label"]]), digest(unwrap(self.network).parameters())
            with path.open("a") as file:  # one short line: written whole or not at all
                file.write(f"{engine.state.iteration} {batch} {float(output['loss']).hex()} {weights}\n")

        engine.add_event_handler(Events.ITERATION_COMPLETED, write)

    RunState.attach = attach_both


def digest(tensors) -> str:
    """Hash of tensors' bytes."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(torch.as_tensor(tensor).detach().contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()[:16]


def train(folder: Path, data: Path, store: Path, workers: int, rank: int, processes: int, port: int, fill: int) -> None:
    """One process of a run; runs in a child, which leads a process group of its own."""
    os.setsid()
    log = os.open(folder / f"log_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    ctypes.CDLL(None).mallopt(M_PERTURB, fill)
    rendezvous = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in rendezvous.items()}})
    trace_steps(folder)
    configs = ["train.json", *(["multi_gpu_train.json"] if processes > 1 else [])]
    run_bundle(BUNDLE, configs, **SETTINGS, dataset_dir=str(data), store_dir=str(store), output_dir=str(folder),
               ckpt_dir="none", num_workers=workers)  # fmt: skip


def start(folder: Path, data: Path, store: Path, kind: str, rng: random.Random, fill: int) -> list:
    """The processes of one run."""
    workers, processes = KINDS[kind]
    folder.mkdir(parents=True, exist_ok=True)
    port = rng.randrange(20000, 32000)
    fork = multiprocessing.get_context("fork")
    started = [
        fork.Process(target=train, args=(folder, data, store, workers, rank, processes, port, fill))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    return started


def finish(started: list, limit_s: float | None = None) -> str:
    """Wait; past `limit_s` kill the process groups: 'killed', 'ended', or 'failed' with what the first left."""
    deadline = time.monotonic() + (600 if limit_s is None else limit_s)
    while time.monotonic() < deadline and any(p.is_alive() for p in started):
        time.sleep(0.005)
    alive = [p for p in started if p.is_alive()]
    for process in alive:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it had not come to lead a group
            process.kill()
    for process in started:
        process.join()
    if alive:
        return "killed" if limit_s is not None else "hanging"
    return "ended" if all(p.exitcode == 0 for p in started) else "failed"


def attack(folder: Path, data: Path, store: Path, kind: str, rng: random.Random, longest_s: float) -> tuple[str, int]:
    """Kill a run one to three times within `longest_s`, and let it end: what came of it, and how often it was killed."""
    killed = 0
    for _ in range(rng.randint(1, 3)):
        result = finish(start(folder, data, store, kind, rng, rng.randrange(1, 256)), rng.random() * longest_s)
        if result != "killed":
            break
        killed += 1
    if result in ("killed", "ended"):
        result = finish(start(folder, data, store, kind, rng, rng.randrange(1, 256)))
    return result, killed


def read_traces(folder: Path) -> dict[tuple[str, int], set[str]]:
    """(file, iteration) -> all that was written for it, by all processes that came to it."""
    found = defaultdict(set)
    for path in sorted(folder.glob("trace_*.txt")):
        for line in path.read_text().splitlines():
            found[path.name, int(line.split()[0])].add(line)
    return found


def compare(folder: Path, reference: Path) -> str:
    """'equal', or the first thing that differs."""
    expected, found = read_traces(reference), read_traces(folder)
    for key in sorted(expected, key=lambda key: key[1]):
        different = found[key] - expected[key]
        if different or not found[key]:
            names = ("step", "batch", "loss", "weights")
            pairs = zip(names, next(iter(expected[key])).split(), (*different, "- - - -")[0].split(), strict=True)
            return f"{key[0]} step {key[1]}: " + ", ".join(f"{n} {a} != {b}" for n, a, b in pairs if a != b)
    first, second = (torch.load(f / "last.pt", weights_only=True) for f in (reference, folder))
    for part in ("model", "parts"):
        if digest_tree(first[part]) != digest_tree(second[part]):
            return f"last.pt: {part}"
    return "equal"


def digest_tree(value) -> str:
    """Hash of nested dicts and lists of tensors and numbers."""
    if isinstance(value, torch.Tensor):
        return digest([value])
    if isinstance(value, dict):
        return hashlib.sha256(repr([(key, digest_tree(value[key])) for key in value]).encode()).hexdigest()
    if isinstance(value, (list, tuple)):
        return hashlib.sha256(repr([digest_tree(part) for part in value]).encode()).hexdigest()
    return repr(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("/tmp/kill_campaign"))
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    options = parser.parse_args()
    work = options.work / "campaign"  # a folder of its own: what else lies in --work stays
    shutil.rmtree(work, ignore_errors=True)
    data = work / "phantoms"
    phantoms.write_pool(str(data), cases_per_dataset=2, size=(32, 48, 48), seed=0)
    rng = random.Random(options.seed)
    shared_store = work / "store"
    seconds, outcomes, kills = {}, defaultdict(Counter), Counter()
    for kind in options.kinds:
        began = time.monotonic()
        outcome = finish(start(work / f"whole {kind}", data, shared_store, kind, rng, 0))
        if outcome != "ended":
            sys.exit(f"the run that is not killed {outcome} ({kind}): see {work}/whole {kind}/log_0.txt")
        seconds[kind] = time.monotonic() - began
        print(f"{kind}: {seconds[kind]:.0f} s unkilled", flush=True)
    for run in range(options.runs):
        kind = options.kinds[run % len(options.kinds)]
        folder = work / f"run {run}"
        store = folder / "store" if rng.random() < 0.25 else shared_store  # a quarter is killed while preparing, too
        result, done = attack(folder, data, store, kind, rng, seconds[kind])
        result = compare(folder, work / f"whole {kind}") if result == "ended" else result
        outcomes[kind][result == "equal"] += 1
        kills[kind] += done
        print(f"run {run}, {kind}, killed {done} times: {result}", flush=True)
        if result == "equal":
            shutil.rmtree(folder)
    print("\n| kind | runs | kills | equal | different |\n|---|---:|---:|---:|---:|")
    for kind, count in outcomes.items():
        print(f"| {kind} | {count.total()} | {kills[kind]} | {count[True]} | {count[False]} |")
    sys.exit(any(count[False] for count in outcomes.values()))


if __name__ == "__main__":
    main()
