"""Files written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from typing import Any

PARTIAL = ".partial"  # ends the names of files that are being written


def atomic_write(path: str | os.PathLike, write: Any, suffix: str = PARTIAL) -> None:
    """Call ``write(temporary)`` and move the result to `path`; on any failure nothing is left and `path` is as before.

    `suffix` ends the temporary name, for writers that look at it.
    """
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=suffix, dir=folder)
    os.close(handle)
    try:
        write(temporary)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
