"""The store: every case prepared once, in a folder `<store>/<data set>/<case>-<key>` (see `stored_case`).

The key is made of the input files' identity, the preparation, the data set's own label rules and `FORMAT`; whatever changes
leads to a new folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from ..cases.cases import Preparation, file_identity
from ..cases.pool import complete_items
from ..errors import CaseError
from ..files import is_abandoned
from ..labels import LabelTable
from ..preparation.parallel import WorkerDied, run_all
from ..preparation.preprocessing import prepare_case
from .stored_case import _VERIFIED, FORMAT, StoredCase, files_of, folder_bytes, read_index, write_folder

COMPARED_BYTES = 2**31
"""Of stored cases whose checksums `prepare` compares before a run starts, a few seconds of reading; the rest of a larger
store is compared case by case when it is first read."""

CASES_PER_WORKER = 2
"""A worker process takes some seconds to start: about one CT."""


@dataclass
class PrepareReport:
    """What `CaseStore.prepare` did: counts, cases whose label map is empty, and (item, message) of each failure."""

    prepared: int = 0
    reused: int = 0
    empty_labels: list[str] = field(default_factory=list)
    failed: list[tuple[Mapping[str, Any], str]] = field(default_factory=list)

    def add(self, item: Mapping[str, Any], outcome: Any, count: str = "") -> None:
        """Count an item by its ``case.json``, or take down the error that it ended with."""
        if isinstance(outcome, (ValueError, WorkerDied)):
            self.failed.append((item, str(outcome)))
            return
        setattr(self, count, getattr(self, count) + 1)
        if outcome["properties"]["empty_label"]:
            self.empty_labels.append("{dataset}/{case}".format(**outcome["properties"]))

    def __str__(self) -> str:
        lines = [
            f"{self.prepared} cases prepared, {self.reused} reused, {len(self.failed)} failed, "
            f"{len(self.empty_labels)} with an empty label map"
        ]
        return "\n".join([*lines, *(f"  failed: {message}" for _, message in self.failed)])

    def raise_failures(self) -> None:
        """Raise one CaseError that lists every failure, if there is any."""
        if self.failed:
            raise CaseError(str(self))


class CaseStore:
    """Prepared cases under one folder; cheap to pickle, so workers and processes share it."""

    def __init__(self, store_dir: str | os.PathLike, table: LabelTable, preparation: Preparation) -> None:
        self.store_dir = os.path.abspath(os.fspath(store_dir))
        self.table, self.preparation = table, preparation

    def key(self, item: Mapping[str, Any]) -> str:
        """Hex digest of everything that decides an item's stored bytes. Raises CaseError for a missing file."""
        item = self._complete(item)
        label = item.get("label")
        facts = {
            "format": FORMAT,
            "files": file_identity(item),
            "structures": list(label) if isinstance(label, Mapping) else None,
            "modality": item["modality"],
            "preparation": self.preparation.to_dict(),
            "labels": self.table.label_rules(item["dataset"]),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]

    def path(self, item: Mapping[str, Any]) -> str:
        """Folder of an item, whether it exists or not."""
        item = self._complete(item)
        return os.path.join(self.store_dir, _plain(item["dataset"]), f"{_plain(item['case'])}-{self.key(item)}")

    def open(self, item: Mapping[str, Any]) -> StoredCase:
        """The stored case; prepares it on first touch.

        Raises:
            CaseError: the item cannot be prepared.
            StoreError: the store cannot be written.
        """
        return StoredCase(self._ensure(self._complete(item))[0], self.table)

    def prepare(self, items: Sequence[Mapping[str, Any]], num_workers: int = 0, progress: bool = True) -> PrepareReport:
        """Prepare all items that are not stored yet. A bad case is reported at the end; the others go on.

        Raises:
            StoreError: the store cannot be written (at once, since every other case would fail too).
        """
        self._sweep()
        report, missing, compared = PrepareReport(), [], 0
        with tqdm(total=len(items), desc="prepare", disable=not progress) as bar:
            for item in items:
                try:
                    path = self.path(item)
                    if not os.path.isdir(path):
                        missing.append(item)
                        continue
                    report.add(item, read_index(path, compare=compared < COMPARED_BYTES), "reused")
                    compared += folder_bytes(path)
                except ValueError as error:
                    report.add(item, error)
                bar.update()
            jobs = [(self, item) for item in missing]
            workers = min(num_workers, -(-len(jobs) // CASES_PER_WORKER))
            for index, outcome in run_all(_prepare_one, jobs, workers):
                bar.update()
                if isinstance(outcome, tuple):
                    path, outcome, was_there = outcome
                    _VERIFIED.add(path)  # in a worker, too: those of a loader begin as copies of this process
                    report.add(missing[index], outcome, "reused" if was_there else "prepared")
                else:
                    report.add(missing[index], outcome)
        report.empty_labels.sort()
        return report

    def _complete(self, item: Mapping[str, Any]) -> dict[str, Any]:
        return complete_items([item], self.table, self.preparation.default_modality)[0]

    def _ensure(self, item: Mapping[str, Any]) -> tuple[str, bool]:
        """Path of the stored case, and whether it was there before."""
        path = self.path(item)
        if os.path.isdir(path):
            return path, True
        prepared = prepare_case(item, self.table, self.preparation)
        write_folder(self.store_dir, path, files_of(prepared))
        _VERIFIED.add(path)
        return path, False

    def _sweep(self) -> None:
        """Remove what processes of this host that no longer live, or of any host a day ago, left half-written."""
        scratch = os.path.join(self.store_dir, ".writing")
        for name in os.listdir(scratch) if os.path.isdir(scratch) else []:
            path = os.path.join(scratch, name)
            if is_abandoned(path):
                shutil.rmtree(path, ignore_errors=True)


def _prepare_one(store: CaseStore, item: Mapping[str, Any]) -> tuple[str, dict[str, Any], bool]:
    """Prepare one item: its folder, what its ``case.json`` holds, and whether another process had stored it already."""
    path, was_there = store._ensure(store._complete(item))
    return path, read_index(path), was_there


def _plain(name: str) -> str:
    """A name that any file system takes."""
    return re.sub(r"[^\w.-]+", "_", str(name)).strip(".") or "_"
