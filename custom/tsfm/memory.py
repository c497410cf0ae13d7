"""Cheaper memory for large tensors on the CPU: huge pages, and freed blocks kept for the next tensor.

glibc gives each freed block above 32 MiB back to the system, and a new one comes page by page, each at the price of a
fault: for a network's activations, which come and go at every layer, that is a third of the time on some machines.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM, _MMAP = -1, -3
_KEEP = {_MMAP: 2**28, _TRIM: 2**31 - 1}
"""Blocks up to 256 MiB are kept; larger ones still come and go, so that gaps between them can't add up."""

_USUAL = {_MMAP: 2**25, _TRIM: 2**26}
"""Where glibc's own thresholds settle once a large block was freed."""

_SMALL = 2**22
"""Room that small blocks take instead of the place behind a large one, where each would keep it from growing again."""

_lock = threading.Lock()
_users = 0
_guard: int | None = None


def use_huge_pages() -> None:
    """Ask torch to back tensors of 2 MiB and more with huge pages (Linux); its first large tensor fixes the choice."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@contextmanager
def reused_memory() -> Iterator[None]:
    """Within the block, freed memory stays with the process; afterwards what is free goes back to the system.

    Blocks may nest and overlap between threads. Without glibc 2.35 or newer nothing changes.
    """
    libc = _glibc()
    _enter(libc)
    try:
        yield
    finally:
        _leave(libc)


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
    if not (hasattr(libc, "mallopt") and hasattr(libc, "gnu_get_libc_version")):
        return None
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    return libc


def _enter(libc: ctypes.CDLL | None) -> None:
    global _users, _guard
    with _lock:
        _users += 1
        if libc and _users == 1:
            for option, value in _KEEP.items():
                libc.mallopt(option, value)
            # The upper of the two stays, untouched, so that the lower one does not melt into the heap's free end.
            room, _guard = sorted((libc.malloc(_SMALL), libc.malloc(_SMALL)))
            libc.free(room)


def _leave(libc: ctypes.CDLL | None) -> None:
    global _users, _guard
    with _lock:
        _users -= 1
        if libc and not _users:
            libc.free(_guard)
            _guard = None
            for option, value in _USUAL.items():
                libc.mallopt(option, value)
            libc.malloc_trim(0)
