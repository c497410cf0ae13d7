"""The store: every case prepared once, in a folder `<store>/<data set>/<case>-<key>` (see `stored_case`).

The key is made of the input files' bytes, the preparation, the data set's own label rules and `FORMAT`; whatever changes
leads to a new folder, and where the files lie does not matter.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from ..cases.cases import Preparation
from ..cases.pool import complete_items
from ..cases.sources import Sources, dataset_folder, file_identity, folder_name, missing_in
from ..errors import CaseError
from ..files import sweep
from ..labels import LabelTable
from ..names import counted
from ..preparation.fingerprint import kept_codes, kept_path
from ..preparation.parallel import WorkerDied, run_all
from ..preparation.preprocessing import prepare_case
from .stored_case import _VERIFIED, FORMAT, UNFINISHED, StoredCase, files_of, folder_bytes, read_index, write_folder

logger = logging.getLogger(__name__)

COMPARED_BYTES = 2**31
"""Of stored cases whose checksums `prepare` compares before a run starts, a few seconds of reading; the rest of a larger
store is compared case by case when it is first read."""

KEY_DIGITS = 24

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
            f"{counted(self.prepared, 'case')} prepared, {self.reused} reused, {len(self.failed)} failed, "
            f"{len(self.empty_labels)} with an empty label map"
        ]
        return "\n".join([*lines, *(f"  failed: {message}" for _, message in self.failed)])

    def raise_failures(self) -> None:
        """Raise one CaseError that lists every failure, if there is any."""
        if self.failed:
            raise CaseError(str(self))


class CaseStore:
    """Prepared cases under one folder; cheap to pickle, so workers and processes share it.

    An object looks at the files behind an item once. `raw_data` False: not even that; they may be gone (see `Sources`).
    """

    def __init__(
        self, store_dir: str | os.PathLike, table: LabelTable, preparation: Preparation, raw_data: bool = True
    ) -> None:
        self.store_dir = os.path.abspath(os.fspath(store_dir))
        self.table, self.preparation = table, preparation
        self.sources = Sources(store_dir, raw_data)
        self._paths: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_paths": {}}

    def _key(self, item: Mapping[str, Any], files: Sequence[Any]) -> str:
        """Hex digest of everything that decides a complete item's stored bytes, with what identifies its files."""
        label, preparation = item.get("label"), self.preparation.to_dict()
        if preparation["resample_first"]:
            preparation["mask"] = "resampled"  # told apart from what was stored when it was taken afterwards
        facts = {
            "format": FORMAT,
            "files": files,
            "structures": list(label) if isinstance(label, Mapping) else None,
            "modality": item["modality"],
            "preparation": preparation,
            "labels": self.table.label_rules(item["dataset"]),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]

    def path(self, item: Mapping[str, Any]) -> str:
        """Folder of an item, whether it exists or not. Raises CaseError for a missing file."""
        item = self._complete(item)
        known_as = repr([item.get(part) for part in ("dataset", "case", "modality", "image", "label")])
        if known_as not in self._paths:
            self._paths[known_as] = self._path(item, self.sources.identity(item))
        return self._paths[known_as]

    def _path(self, item: Mapping[str, Any], files: Sequence[Any]) -> str:
        name = f"{folder_name(item['case'])}-{self._key(item, files)}"
        return os.path.join(self.store_dir, dataset_folder(item["dataset"]), name)

    def open(self, item: Mapping[str, Any]) -> StoredCase:
        """The stored case; prepares it on first touch.

        Raises:
            CaseError: the item cannot be prepared.
            StoreError: the store cannot be written.
        """
        path = self.path(item)
        if not os.path.isdir(path):
            self._store(item, path, self._kept(item))
        return StoredCase(path, self.table)

    def prepare(self, items: Sequence[Mapping[str, Any]], num_workers: int = 0, progress: bool = True) -> PrepareReport:
        """Prepare all items that are not stored yet. A bad case is reported at the end; the others go on.

        Raises:
            StoreError: the store cannot be written (at once, since every other case would fail too).
        """
        sweep(os.path.join(self.store_dir, UNFINISHED))
        report, missing, compared, taken_over = PrepareReport(), [], 0, 0
        with tqdm(total=len(items), desc="prepare", disable=not progress) as bar:
            for item in items:
                try:
                    path = self.path(item)
                    if not os.path.isdir(path):
                        if not self._take_over(item, path):
                            missing.append(item)
                            continue
                        taken_over += 1
                    report.add(item, read_index(path, compare=compared < COMPARED_BYTES), "reused")
                    compared += folder_bytes(path)
                except ValueError as error:
                    report.add(item, error)
                bar.update()
            self._name_others(missing, taken_over)
            jobs = [(self, item, self.path(item), self._kept(item)) for item in missing]
            workers = min(num_workers, -(-len(jobs) // CASES_PER_WORKER)) if self.sources.raw_data else 0
            for index, outcome in run_all(_prepare_one, jobs, workers):
                bar.update()
                count = ""
                if isinstance(outcome, tuple):
                    path, outcome, count = outcome
                    _VERIFIED.add(path)  # in a worker, too: those of a loader begin as copies of this process
                report.add(missing[index], outcome, count)
        report.empty_labels.sort()
        return report

    def _complete(self, item: Mapping[str, Any]) -> dict[str, Any]:
        return complete_items([item], self.table, self.preparation.default_modality)[0]

    def _kept(self, item: Mapping[str, Any]) -> str:
        """Where the fingerprint may have kept the label codes of an item, so that its label is not read twice."""
        return kept_path(self.sources, self._complete(item), self.table, self.preparation)

    def _store(self, item: Mapping[str, Any], path: str, kept: str) -> None:
        """Prepare an item into its folder."""
        if not self.sources.raw_data:
            item = self._complete(item)
            raise CaseError(
                f"case '{item['case']}' of data set '{item['dataset']}', prepared with these settings, "
                f"{missing_in(self.store_dir)}"
            )
        prepared = prepare_case(item, self.table, self.preparation, kept_codes(kept))
        write_folder(self.store_dir, path, files_of(prepared))
        _VERIFIED.add(path)

    def _take_over(self, item: Mapping[str, Any], path: str) -> bool:
        """Whether the case lay under the key of earlier versions, which had path and time in it; its folder is renamed."""
        if not self.sources.raw_data or not os.path.isdir(os.path.dirname(path)):
            return False
        item = self._complete(item)
        earlier = self._path(item, file_identity(item))
        if os.path.isdir(earlier):
            with contextlib.suppress(OSError):  # another process was faster, or the store may only be read
                os.rename(earlier, path)
        return os.path.isdir(path)

    def _name_others(self, missing: Sequence[Mapping[str, Any]], taken_over: int) -> None:
        """A line about what an earlier version stored, and one about cases that are stored, but not as they are wanted."""
        if taken_over:
            logger.warning("%s: %d cases that an earlier version stored are taken over", self.store_dir, taken_over)
        paths = [self.path(item) for item in missing]
        folders = filter(os.path.isdir, {os.path.dirname(path) for path in paths})
        stored = {os.path.join(folder, name)[:-KEY_DIGITS] for folder in folders for name in os.listdir(folder)}
        others = sum(path[:-KEY_DIGITS] in stored for path in paths)
        if others and self.sources.raw_data:
            logger.warning(
                "%s: %d of the %d cases to prepare are stored, but with other settings, labels or files, or by an earlier "
                "version from another place: they are prepared anew; folders that no run needs any more may be deleted",
                self.store_dir, others, len(missing),
            )  # fmt: skip


def _prepare_one(store: CaseStore, item: Mapping[str, Any], path: str, kept: str) -> tuple[str, dict[str, Any], str]:
    """Prepare one item: its folder, what its ``case.json`` holds, and what it counts as (another process may be faster)."""
    if os.path.isdir(path):
        return path, read_index(path), "reused"
    store._store(item, path, kept)
    return path, read_index(path), "prepared"
