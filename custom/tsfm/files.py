"""Files written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
"""Is in the names of files that are being written: ``.HOST_PROCESS_NUMBER.partial``, and a suffix where one is needed."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

ABANDONED_S = 86400
"""Age at which an unfinished file is taken for abandoned where its process cannot be asked for, in seconds."""

ASKS = os.name != "nt"
"""Whether a signal 0 asks if a process lives; on Windows it is a Ctrl-C."""


class FullDisk(OSError):
    """A disk or quota that is full, with the path, what was written and what is free."""


def atomic_write(path: str | os.PathLike, write: Callable[[str], None], suffix: str = "") -> None:
    """Call ``write(temporary)`` and move the result to `path`; on any failure nothing is left and `path` is as before.

    What earlier processes left unfinished in the folder is removed. `suffix` ends the temporary name, for writers that
    look at it.

    Raises:
        OSError: the folder cannot be written; FullDisk: its disk is full.
    """
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    sweep(folder)
    temporary = unfinished(folder, suffix)
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        written = os.path.getsize(temporary) if os.path.exists(temporary) else 0
        Path(temporary).unlink(missing_ok=True)
        if is_full(error):
            raise FullDisk(errno.ENOSPC, full_message(path, written)) from error
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 as `atomic_write` does."""
    atomic_write(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def write_json(path: str | os.PathLike, content: Any, **options: Any) -> None:
    """Write JSON, indented by 4, as `atomic_write` does; `options` are those of `json.dumps`."""
    write_text(path, json.dumps(content, indent=4, **options) + "\n")


def write_first(path: str | os.PathLike, write: Callable[[str], None]) -> None:
    """As `atomic_write`, but what is at `path` stays: of processes that begin at once the first decides what all read."""
    own = Path(unfinished(os.path.dirname(os.path.abspath(path))))
    atomic_write(own, write)
    try:
        os.link(own, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        os.replace(own, path)
    finally:
        own.unlink(missing_ok=True)


@contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Hold a lock that other processes on this folder wait for; none where the system or the file system has no such lock."""
    try:
        import fcntl  # absent on Windows
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # NFS locks what is open for writing, which a folder cannot be
            os.close(handle)
            handle = os.open(os.path.join(folder, ".lock"), os.O_RDWR | os.O_CREAT)
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def full_message(path: str | os.PathLike, written: int) -> str:
    """What to do about a full disk, with sizes; call it after what was written is removed."""
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free
    return (
        f"No space left on device (or on your quota) for {os.path.abspath(path)}: writing stopped after "
        f"{_size(written)}, {_size(free)} are free now that these are removed. What was there before is untouched: free "
        "some space and give the same command again, or choose another folder"
    )


def is_full(error: BaseException | None) -> bool:
    """Whether `error`, or what it was raised in the wake of, says that a disk or quota is full.

    safetensors raises an error of its own with the system's number in its text, torch one about positions in the file.
    """
    if error is None:
        return False
    texts = [f"(os error {number})" for number in FULL]
    own = (isinstance(error, OSError) and error.errno in FULL) or any(text in str(error) for text in texts)
    return own or is_full(error.__context__)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"


@lru_cache
def _numbering() -> str:
    """Eight digits that processes share which number processes alike: the running kernel's, and the container's.

    Containers may have one host name; what the system does not tell is left out.
    """
    facts = []
    with suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        facts.append(os.readlink("/proc/self/ns/pid"))
    return f"{zlib.crc32(' '.join(facts).encode()):08x}" if facts else ""


def scratch_name() -> str:
    """A name for something unfinished that says whose it is (see `is_abandoned`)."""
    return f"{socket.gethostname()}_{os.getpid()}_{'-'.join(filter(None, (_numbering(), uuid.uuid4().hex)))}"


def unfinished(folder: str | os.PathLike, suffix: str = "") -> str:
    """A new path in `folder`, which `sweep` removes once the process is gone."""
    return os.path.join(folder, f".{scratch_name()}{PARTIAL}{suffix}")


def is_abandoned(path: str | os.PathLike) -> bool:
    """Whether what lies at `path` under a `scratch_name` belongs to a process of this host that no longer lives, or is
    a day old and another host's or container's, or from before a restart (on Windows: or this one's)."""
    parts = os.path.basename(path).lstrip(".").split(".partial")[0].rsplit("_", 2)
    try:
        own = len(parts) == 3 and parts[0] == socket.gethostname() and parts[1].isdigit()
        if ASKS and own and parts[2].rpartition("-")[0] in ("", _numbering()):
            return not _alive(int(parts[1]))
        return time.time() - os.path.getmtime(path) > ABANDONED_S
    except OSError:  # gone already: another process sweeps too
        return False


def sweep(folder: str | os.PathLike) -> None:
    """Remove what was left unfinished in `folder`, under a `scratch_name`, when its process was killed."""
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        path = os.path.join(folder, name)
        if name.startswith(".") and PARTIAL in name and is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True) if os.path.isdir(path) else Path(path).unlink(missing_ok=True)


def check_writable(folder: str | os.PathLike, option: str) -> None:
    """Try whether `folder`, or where it does not exist yet the nearest one that holds it, can be written; leaves nothing.

    Raises:
        OSError: it cannot; the message names the folder and the `option` that chooses another.
    """
    nearest = os.path.abspath(folder)
    while not os.path.lexists(nearest) and os.path.dirname(nearest) != nearest:
        nearest = os.path.dirname(nearest)
    trial = unfinished(nearest)
    try:
        Path(trial).write_bytes(bytes(4096))  # a full disk still takes names
    except OSError as error:
        raise OSError(
            f"{os.path.abspath(folder)} cannot be written ({error.strerror or error}); choose another folder ({option})"
        ) from None
    finally:
        with suppress(OSError):
            os.remove(trial)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:  # another user's may not be asked, but lives
        return not isinstance(error, ProcessLookupError)
    return True
