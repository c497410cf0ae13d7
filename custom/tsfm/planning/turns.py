"""Whose turn it is, of several processes under torchrun: what one of them does for all, the others wait for."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed as dist

logger = logging.getLogger(__name__)

REMIND_S = 600

_TURNS = itertools.count()  # every process takes the same turns in the same order


class FirstFailed(RuntimeError):
    """The first process could not do what the others wait for; it says why."""


def rank() -> int:
    """Of this process under torchrun; 0 without."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@contextmanager
def first_process_first(doing: str = "prepares the data") -> Iterator[None]:
    """Under torchrun: the first process goes through the block alone, the others after it (and find its results).

    They wait as long as it takes, whatever time the process group allows for a message, and say for what.

    Raises:
        FirstFailed: in the others, where the first left the block with an error.
    """
    if not (dist.is_available() and dist.is_initialized()):
        yield
        return
    store, turn = dist.distributed_c10d._get_default_store(), f"tsfm/turn/{next(_TURNS)}"
    if rank() > 0:
        _wait(store, turn, doing)
        yield
        return
    try:
        yield
    except BaseException:
        store.set(turn, "failed")
        raise
    store.set(turn, "done")


def _wait(store: dist.Store, turn: str, doing: str) -> None:
    """Ask again and again; a barrier would end with the process group's timeout, and keep a GPU busy."""
    began, reminders = time.monotonic(), 0
    while not store.check([turn]):
        waited = time.monotonic() - began
        if waited > max(1, reminders * REMIND_S):
            reminders += 1
            logger.info("process %d waits while the first process %s (%d min so far)", rank(), doing, waited // 60)
        time.sleep(min(0.2 + waited / 100, 2))
    if store.get(turn) != b"done":
        raise FirstFailed(f"the first process, which {doing} for all, stopped with an error: see its output")
