"""A run's state as torch's distributed checkpoints: every process writes its share, in the background, into one folder.

``last/epoch_8`` is the state after epoch 8. It is written under another name and renamed once it is whole, and the one before
is removed only then: a run that is killed at any moment finds a whole state. Any number of processes can go on from it. The
tensors lie in torch's ``.distcp`` files, everything else in ``run.pt``; nothing that is read can execute anything.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException

from ..files import PARTIAL, full_message, is_full
from .weight_files import CheckpointError, load_pt, write_pt

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process alone may write so, too

RUN = "run.pt"

KEPT = 2  # states: the last, and the one before in case that is damaged


class ShardedStates:
    """The states of a run in a folder that all processes reach. Every process makes one, and calls the same methods.

    Args:
        folder: of the states.
        write: False on all processes but the first, which alone renames and removes folders.
    """

    def __init__(self, folder: str | os.PathLike, write: bool = True) -> None:
        self.folder, self.write = Path(folder), write
        self._pending: list[Future] = []
        self._group = None
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="commit") if write else None

    def finished(self) -> list[Path]:
        """Whole states, the newest first."""
        found = [path for path in self.folder.glob("epoch_*") if path.is_dir() and path.name[6:].isdigit()]
        return sorted(found, key=epoch_of, reverse=True)

    def sweep(self) -> None:
        """Remove what a killed run left unfinished."""
        if self.write:
            for path in self.folder.glob(f".*{PARTIAL}"):
                shutil.rmtree(path, ignore_errors=True)

    def begin(
        self, epoch: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any], first: Callable[[], None]
    ) -> None:
        """Copy `tensors` (of each process its share) and write them while training goes on.

        `values` (plain) and what `first` writes (the first process calls it) are there before the state counts as written.

        Raises:
            OSError, CheckpointError: what went wrong with the write before, which is waited for.
        """
        self.finish()
        if dist.is_initialized() and self._group is None:  # of its own: the thread must not meet the steps' messages
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".epoch_{epoch}{PARTIAL}"
        if self.write:
            shutil.rmtree(partial, ignore_errors=True)
        future = dcp.async_save(
            dict(tensors), storage_writer=filesystem.FileSystemWriter(partial), process_group=self._group
        )
        self._pending = [future]
        if self._committer is not None:
            content = {"values": copy.deepcopy(dict(values))}
            self._pending.append(self._committer.submit(self._commit, future, partial, epoch, content, first))

    def _commit(self, future: Future, partial: Path, epoch: int, content: dict, first: Callable[[], None]) -> None:
        """In the background: once all shares are there write the rest, rename, and only then remove what is older."""
        try:
            future.result()
            first()
            write_pt(content, str(partial / RUN))
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            causes = [failure for failure, _ in getattr(error, "failures", {}).values()]
            if any(map(is_full, [error, *causes])):
                raise OSError(full_message(self.folder / f"epoch_{epoch}", 0)) from error
            raise
        later = [path for path in self.finished() if epoch_of(path) >= epoch]  # damaged: the run went on from before
        self._remove(later)
        os.replace(partial, self.folder / f"epoch_{epoch}")
        self._remove(self.finished()[KEPT:])

    def _remove(self, paths: Sequence[Path]) -> None:
        for path in paths:
            aside = path.with_name(f".old_{path.name}{PARTIAL}")  # half removed it would look whole
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
            shutil.rmtree(aside, ignore_errors=True)

    def finish(self) -> None:
        """Wait until what `begin` started is written.

        Raises:
            OSError, CheckpointError: it could not be written; the states before are still there.
        """
        pending, self._pending = self._pending, []
        for future in reversed(pending):  # the commit says best what is wrong
            try:
                future.result()
            except (OSError, CheckpointError):
                raise
            except (Exception, CheckpointException) as error:
                raise CheckpointError(f"{self.folder}: the run's state could not be written: {error}") from error


def epoch_of(state: Path) -> int:
    """The epoch after which a state was written."""
    return int(state.name.partition("_")[2])


def read_values(path: str | os.PathLike, checked: bool = False) -> dict[str, Any]:
    """What a state holds besides tensors, the checksums of all its files compared first (unless they are `checked`).

    Raises:
        CheckpointError: a damaged state.
    """
    content = load_pt(os.path.join(path, RUN), mmap=False)
    if not isinstance(content, Mapping) or not isinstance(content.get("values"), Mapping):
        raise CheckpointError(f"{os.path.join(path, RUN)} is no state of a training run")
    if not checked:
        _verify(Path(path))
    return dict(content["values"])


def read_tensors(path: str | os.PathLike, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` (of each process its share, however many there are) from a state, as far as they are in it.

    Raises:
        CheckpointError: a state with tensors of another name or shape.
    """
    reader = _Reader(path)
    known = reader.read_metadata().state_dict_metadata
    superfluous = sorted(set(known) - set(tensors))
    other = [name for name in tensors if name in known and getattr(known[name], "size", None) != tensors[name].shape]
    if superfluous or other:
        raise CheckpointError(f"{path} does not fit this run: {', '.join([*superfluous, *other][:8])} differ")
    found = {name: tensor for name, tensor in tensors.items() if name in known}
    dcp.load(found, storage_reader=reader, planner=_TensorsOnly())


class _TensorsOnly(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn} is no tensor")


class _Unpickler(pickle.Unpickler):
    """Reads torch's ``.metadata``: names, shapes and places of tensors."""

    def find_class(self, module: str, name: str) -> Any:
        own = (module == metadata.__name__ and name in (*metadata.__all__, "_MEM_FORMAT_ENCODING")) or (
            (module, name) == (filesystem.__name__, "_StorageInfo")
        )
        if own or (module, name) in (("torch", "Size"), ("torch.serialization", "_get_layout")):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.split(".")[0] == "pathlib":
            return lambda *parts: "/".join(parts)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """As torch's, without executing anything."""
        path = Path(self.path, ".metadata")
        try:
            found = _Unpickler(io.BytesIO(path.read_bytes())).load()
            found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
            return found
        except Exception as error:  # damaged bytes mislead the unpickler in any way
            raise CheckpointError(f"{path} is damaged, or no list of tensors ({error})") from None


def _verify(folder: Path) -> None:
    """Compare the checksums that torch writes with each tensor, and does not read."""
    for index, place in _Reader(folder).read_metadata().storage_data.items():
        path = folder / os.path.basename(place.relative_path)
        try:
            with path.open("rb") as file:
                file.seek(place.offset)
                content = file.read(place.length)
            damaged = len(content) != place.length or zipfile.ZipFile(io.BytesIO(content)).testzip() is not None
        except (OSError, zipfile.BadZipFile):
            damaged = True
        if damaged:
            raise CheckpointError(f"{path} is damaged ({index.fqn})")
