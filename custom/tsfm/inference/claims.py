"""Cases shared among processes that write to one folder: who begins a case claims it first."""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # elsewhere than on Unix: parts keep processes apart, claims do not
    fcntl = None

logger = logging.getLogger(__name__)


class Claims:
    """Claims of this process on the cases of one output folder.

    A claim is a lock on the file ``.CASE.claim``, so it ends with its process, however that ends; the file is removed
    with the claim, and a folder made for it that is still empty. On a file system without locks every claim succeeds, with a warning.
    """

    def __init__(self, output_dir: str | os.PathLike) -> None:
        self.folder, self.held, self.is_ours = Path(output_dir), {}, False

    def take(self, case: str) -> bool:
        """Claim a case; False where another process has it."""
        if fcntl is None or case in self.held:
            return True
        while True:
            self.is_ours |= not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                file = os.open(self._path(case), os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # who made the folder had nothing to put into it
                continue
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                return False
            except OSError as error:
                logger.warning(
                    "%s knows no locks (%s): give each process a --part of its own", self.folder, error.strerror
                )
            if self._is_at(file, case):
                self.held[case] = file
                return True
            os.close(file)  # who had the claim removed the file in between

    def free(self, case: str) -> None:
        """Give a claim up; nothing where there is none."""
        file = self.held.pop(case, None)
        if file is not None:
            self._path(case).unlink(missing_ok=True)
            os.close(file)
        if self.is_ours and not self.held:
            with suppress(OSError):  # it holds something
                self.folder.rmdir()

    def _path(self, case: str) -> Path:
        return self.folder / f".{case}.claim"

    def _is_at(self, file: int, case: str) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self._path(case)))
        except FileNotFoundError:
            return False


def ended(failed: bool) -> None:
    """Under torchrun: say that this process is done with its cases, and where some `failed` wait until all processes are.

    torchrun ends the others as soon as one ends with an error.
    """
    said = os.environ
    if said.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    from torch.distributed import TCPStore

    key = f"tsfm/ended/{said['TORCHELASTIC_RESTART_COUNT']}"
    with suppress(RuntimeError):  # of several machines the first, which holds the store, may be done and gone
        store = TCPStore(said["MASTER_ADDR"], int(said["MASTER_PORT"]), is_master=False, wait_for_workers=False)
        store.add(key, 1)
        while failed and store.add(key, 0) < int(said["WORLD_SIZE"]):
            time.sleep(0.5)
