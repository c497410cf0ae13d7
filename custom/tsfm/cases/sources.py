"""The files behind a store's cases, by their bytes: the same in a copy of the pool, on another mount, or once they are gone.

``<store>/<data set>/sources.json`` keeps, per case, its files with size, time and digest, so that a digest is computed once.
It also keeps what was declared of the data set, so that a run needs neither files nor folders any more where it is told so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..errors import CaseError
from ..files import write_text
from ..schema import FileError, read_json
from .folders import NIFTI, SUFFIXES, PoolError, paths_of
from .packed import data_files
from .volumes import read_grid

logger = logging.getLogger(__name__)

FORMAT = 1

ENDS = 4096
"""Bytes of a gzip file's beginning and of its end that are looked at."""

THREADS = 16
"""Files that are looked at at once; a network drive answers each after a while."""

LONGEST_FOLDER = 230  # bytes

GZIP, MORE_MEMBERS = b"\x1f\x8b", 4


def file_digest(path: str) -> str:
    """Hex digest of a file's content.

    Of a gzip file its two ends are read: the last bytes are the CRC and the length of all that it holds. One in blocks of
    their own (bgzip, marked in the header) is read whole, as is every other file.
    """
    total = hashlib.blake2b(digest_size=10)
    with open(path, "rb") as file:
        head = file.read(ENDS)
        total.update(head)
        if head[:2] == GZIP and len(head) == ENDS and not head[3] & MORE_MEMBERS:
            file.seek(max(len(head), os.path.getsize(path) - ENDS))
        while piece := file.read(1 << 20):
            total.update(piece)
    return total.hexdigest()


def file_identity(item: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """(absolute path, size, mtime in ns) of every file behind an item: those of a DICOM folder, and those that hold the
    voxels of a header.

    Raises:
        CaseError: a file that does not exist.
    """
    paths = [*paths_of(item["image"]), *paths_of(item.get("label"))]
    found = []
    for path in (os.path.abspath(path) for path in paths if path is not None):
        try:
            for file in _files_behind(path):
                state = os.stat(file)
                found.append((file, state.st_size, state.st_mtime_ns))
        except OSError as error:
            raise CaseError(
                f"{error.filename}: cannot be read ({error.strerror}); check the data folder and the datalist"
            ) from error
    return found


def _files_behind(path: str) -> list[str]:
    if os.path.isdir(path):
        inside = sorted(os.path.join(path, name) for name in os.listdir(path))
        return [file for file in inside if not os.path.isdir(file)]
    return [path, *(data_files(path) if path.lower().endswith(SUFFIXES) and not path.lower().endswith(NIFTI) else ())]


class Sources:
    """What is known of the files behind the cases of one store; cheap to pickle.

    Args:
        store_dir: the store.
        raw_data: False: nothing is read but what was recorded, so the files may be gone.
    """

    def __init__(self, store_dir: str | os.PathLike, raw_data: bool = True) -> None:
        self.store_dir, self.raw_data = os.path.abspath(os.fspath(store_dir)), raw_data
        self._known: dict[str, dict[str, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": {}}

    def identity(self, item: Mapping[str, Any]) -> list[list[Any]]:
        """[name, size, digest] of every file behind a complete item.

        Raises:
            CaseError: a file that does not exist; without raw data, a case that was never recorded.
        """
        return [[os.path.basename(path), size, digest] for path, size, _, digest in self._files(item)]

    def _files(self, item: Mapping[str, Any]) -> list[list[Any]]:
        """[path, size, time in ns, digest] of every file behind an item."""
        cases = self.of(item["dataset"])["cases"]
        kept = cases.get(item["case"], {}).get("files", [])
        if not self.raw_data:
            if not kept:
                raise CaseError(f"case '{item['case']}' of data set '{item['dataset']}' {missing_in(self.store_dir)}")
            return kept
        known = {tuple(row[:3]): row[3] for row in kept}
        try:
            files = [[*row, known.get(row) or file_digest(row[0])] for row in file_identity(item)]
        except OSError as error:
            raise CaseError(f"{error.filename}: cannot be read ({error.strerror})") from error
        cases[item["case"]] = _recorded(item, files)
        return files

    def of(self, dataset: str) -> dict[str, Any]:
        """What is recorded of a data set: ``cases``, and what was ``declared`` of it with its number of ``channels``."""
        if dataset not in self._known:
            self._known[dataset] = self._read(dataset)
        return self._known[dataset]

    def _read(self, dataset: str) -> dict[str, Any]:
        path = self.path(dataset)
        try:
            found = read_json(path) if os.path.isfile(path) else {}
            return found if found.get("format") == FORMAT else {"cases": {}}
        except (FileError, AttributeError) as error:
            logger.warning("what is known of the files of '%s' is damaged (%s): they are read again", dataset, error)
            return {"cases": {}}

    def path(self, dataset: str) -> str:
        """Where a data set's files are recorded."""
        return os.path.join(self.store_dir, dataset_folder(dataset), "sources.json")

    def look_at(self, items: Sequence[Mapping[str, Any]]) -> list[list[list[Any]]]:
        """Find out the identity of many complete items, many files at once; an empty one where files cannot be read."""
        for dataset in {item["dataset"] for item in items}:
            self.of(dataset)  # before threads ask for it
        with ThreadPoolExecutor(THREADS) as threads:
            return list(threads.map(self._try, items))

    def record(
        self, items: Sequence[Mapping[str, Any]], targets: Mapping[str, Any], entries: Mapping[str, Any]
    ) -> None:
        """Keep the identity of all cases of some data sets, `targets` and `entries` (name -> data set) as a pool declares.

        A case whose files cannot be read is left out.
        """
        if not self.raw_data:
            return
        found: dict[str, list[tuple[Mapping[str, Any], list[list[Any]]]]] = {}
        for item, files in zip(items, self.look_at(items), strict=True):
            if files:
                found.setdefault(item["dataset"], []).append((item, files))
        for dataset, own in found.items():
            before, first = self._read(dataset), own[0][0]
            cases = {item["case"]: _recorded(item, files) for item, files in own}
            left_out = entries[dataset].get("exclude", ())  # by this run; another still wants them
            cases = {case: before["cases"][case] for case in left_out if case in before["cases"]} | cases
            licence = {"licence": first["licence"]} if "licence" in first else {}  # may stand in a dataset.json
            declared = {"targets": targets, "entry": licence | dict(entries[dataset])}
            channels = before.get("channels") if before["cases"] == cases else _channels(first)
            content = {"format": FORMAT, "declared": declared, "channels": channels, "cases": cases}
            self._known[dataset] = content
            if before != content:
                try:
                    write_text(self.path(dataset), json.dumps(content, default=os.fspath))
                except OSError as error:  # a store that others may only read serves all the same
                    logger.warning("the files of '%s' are not recorded: %s", dataset, error)

    def _try(self, item: Mapping[str, Any]) -> list[list[Any]]:
        try:
            return self._files(item)
        except CaseError:
            return []


def missing_in(store_dir: str) -> str:
    """How messages go on about something that a store lacks although the raw data are gone."""
    return (
        f"is not known to the store {store_dir}, and the raw data are not to be read (--raw_data False): prepare it once "
        "where its files are (`run prepare` in place of `run`), or leave --raw_data out"
    )


def recorded_pool(store_dir: str | os.PathLike, dataset: str) -> dict[str, Any]:
    """The pool file's content of one data set, as it was recorded with its cases.

    Raises:
        PoolError: nothing was recorded of it.
    """
    declared = Sources(store_dir).of(dataset).get("declared")
    if declared is None:
        raise PoolError(f"data set '{dataset}' {missing_in(os.path.abspath(store_dir))}")
    return {"targets": declared["targets"], "datasets": [declared["entry"]]}


def recorded_cases(
    store_dir: str | os.PathLike | None, dataset: str, exclude: Sequence[str] = ()
) -> dict[str, Any] | None:
    """Case -> its files, of one data set as a store recorded them; None without a store.

    Raises:
        PoolError: nothing was recorded, or not the cases that only the recorded pool excluded.
    """
    if store_dir is None:
        return None
    known = Sources(store_dir).of(dataset)
    left_out = known.get("declared", {}).get("entry", {}).get("exclude", ())
    lacking = [case for case in left_out if case not in known["cases"] and case not in exclude]
    if not known["cases"] or lacking:
        which = f"case '{lacking[0]}', which was excluded when the others were prepared, " if lacking else ""
        raise PoolError(which + missing_in(os.path.abspath(store_dir)))
    return known["cases"]


def with_recorded_licence(store_dir: str | os.PathLike | None, entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """A declared data set, with the licence that its own files declared when a store recorded it."""
    kept = Sources(store_dir).of(entry["name"]).get("declared", {}).get("entry", {}) if store_dir is not None else {}
    return {"licence": kept["licence"], **entry} if kept.get("licence") else entry


def folder_name(name: str) -> str:
    """A name that any file system takes, also with the key of a case at its end: most allow 255 bytes."""
    plain = re.sub(r"[^\w.-]+", "_", str(name)).strip(".") or "_"
    return plain.encode()[:LONGEST_FOLDER].decode(errors="ignore")


def dataset_folder(name: str) -> str:
    """A data set's folder in a store, which no other data set has: where its name had to be changed, a digest tells."""
    plain = folder_name(name)
    return plain if plain == name else f"{plain}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"


def _recorded(item: Mapping[str, Any], files: list[list[Any]]) -> dict[str, Any]:
    return {"image": item["image"], "label": item.get("label"), "files": files}


def _channels(item: Mapping[str, Any]) -> int | None:
    try:
        return read_grid(item["image"]).channels
    except CaseError:
        return None
