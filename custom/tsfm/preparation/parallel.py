"""Running one function over many jobs in worker processes that may die."""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

from ..errors import CaseError


class WorkerDied(RuntimeError):
    """A worker process ended without an answer; most often the system killed it for its memory."""


class UnguardedScript(RuntimeError):
    """The script that was started would be run again, whole, by every worker process."""


def available_workers() -> int:
    """Worker processes for this process, 1 to 12: the cores that it may use, shared with torchrun's other processes here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(12, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def run_all(function: Callable, jobs: Sequence[tuple], num_workers: int = 0) -> Iterator[tuple[int, Any]]:
    """(index, result) of `function(*jobs[index])` as they come; a ValueError raised by a job is its result, and so is a
    CaseError where memory does not suffice for it.

    With workers (one thread each) a job whose worker dies gets a WorkerDied, and the others go on: whatever
    was in flight is tried again, one process per job, to find the one that kills. Other errors end the whole run.
    On an interrupt the workers are ended before it is passed on.

    Raises:
        UnguardedScript: before any worker starts.
    """
    if num_workers <= 0:
        for index, job in enumerate(jobs):
            yield index, _guarded(function, job)
        return
    check_guard()
    waiting = deque(range(len(jobs)))
    while waiting:
        suspects = yield from _run_pool(function, jobs, waiting, num_workers)
        for index in suspects:
            if (yield from _run_pool(function, jobs, deque([index]), 1)):
                died = f"the worker process died on {_name(jobs[index])} (out of memory?)"
                yield index, WorkerDied(f"{died}: try fewer workers, or look at this case")


def check_guard() -> None:
    """Raise an UnguardedScript where the workers, which begin by importing this process's script, would run all of it."""
    path = getattr(sys.modules["__main__"], "__file__", None) or ""
    if path.endswith(".py") and os.path.isfile(path) and "__main__" not in Path(path).read_text(errors="replace"):
        raise UnguardedScript(
            f"{path} prepares cases in worker processes, and each of these runs the script again from its top: put what it "
            'does below a line `if __name__ == "__main__":`, or set num_workers to 0'
        )


def _name(job: tuple) -> str:
    """What a job is about: a case by its image, else its first argument."""
    case = next((part for part in job if isinstance(part, Mapping) and "image" in part), None)
    return repr(job[0]) if case is None else f"case {case.get('case', '')} ({case['image']})"


def _run_pool(
    function: Callable, jobs: Sequence[tuple], waiting: deque[int], workers: int
) -> Generator[tuple[int, Any], None, list[int]]:
    """Run what waits until all is done or a worker dies; returns what was in flight then."""
    pool = ProcessPoolExecutor(min(workers, len(waiting)), mp_context=_context(), initializer=_start_worker)
    flight: dict[Future, int] = {}
    try:
        while waiting or flight:
            while waiting and len(flight) < workers:
                future = pool.submit(_guarded, function, jobs[waiting[0]])
                flight[future] = waiting.popleft()
            done, _ = wait(flight, return_when=FIRST_COMPLETED)
            finished = [(flight.pop(future), future.result()) for future in done if future.exception() is None]
            yield from finished
            for future in done & flight.keys():
                future.result()  # raises
        return []
    except BrokenProcessPool:
        return sorted(flight.values())
    except BaseException:
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _context():
    """Workers begin from a clean server that has imported this package once (fork would copy torch's locks)."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["tsfm.patches.store"])
    return context


def _start_worker() -> None:
    """Workers leave interrupts to the main process, and share the cores among themselves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    torch.set_num_threads(1)


def _guarded(function: Callable, job: tuple) -> Any:
    try:
        return function(*job)
    except ValueError as error:
        return error
    except MemoryError as error:
        return CaseError(
            f"{_name(job)} does not fit into memory ({error or 'out of memory'}): free some, try fewer workers, or look at "
            "this case"
        )
