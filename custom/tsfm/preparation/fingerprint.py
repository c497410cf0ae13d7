"""The fingerprint of a data set: what nnU-Net's planning needs to know of its cases."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import blosc2
import cc3d
import numpy as np
from tqdm import tqdm

from ..cases.cases import Preparation, load_case
from ..cases.pool import complete_items
from ..cases.sources import Sources, missing_in
from ..errors import CaseError
from ..files import atomic_write
from ..labels import LabelTable
from .parallel import run_all
from .preprocessing import MASKED_BELOW, crop_box
from .resampling import ANISOTROPY, new_shape

FINGERPRINT_VOXELS = 10**7
"""Foreground voxels that a fingerprint draws over all cases (nnU-Net draws 1e8; the percentiles agree to 1e-3)."""

DAMAGED = (ValueError, OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)

PACKED = {"codec": blosc2.Codec.ZSTD, "clevel": 1, "nthreads": 1}

KEPT_VOXELS = 20_000
"""Foreground voxels that are kept of a case at least, so that a pool of 500 cases or more need not measure it again."""

SEED = 1234

FOLDER = "fingerprints"
"""In the store: what was measured of each case."""

CASE_FORMAT = 1

ALONE_S = 10.0
"""Seconds for which cases are measured before worker processes are started for the rest."""


@dataclass
class Fingerprint:
    """What nnU-Net's planning needs to know of some cases.

    intensity: modality -> mean, median, sd, min, max, lower (0.5 percentile), upper (99.5 percentile) over foreground
    voxels, an equal number per case. shapes and spacings_mm: per case after cropping, (S, P, L). masked: modality ->
    whether its median crop kept less than three quarters. failed: (item, message) of cases that could not be read.
    extents_mm: data set -> raw id -> how large its structure is, (S, P, L): per axis the smallest over the cases of the
    largest connected piece; an id that is in no case is absent.
    """

    intensity: dict[str, dict[str, float]]
    shapes: list[tuple[int, int, int]]
    spacings_mm: list[tuple[float, float, float]]
    masked: dict[str, bool]
    failed: list[tuple[Mapping[str, Any], str]]
    extents_mm: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    @property
    def median_spacing_mm(self) -> tuple[float, ...]:
        return tuple(np.median(self.spacings_mm, axis=0).tolist())

    def median_prepared_shape(self, spacing_mm: Sequence[float]) -> tuple[float, ...]:
        """Median shape of the cases once they are resampled to this spacing."""
        shapes = [new_shape(n, s, spacing_mm) for n, s in zip(self.shapes, self.spacings_mm, strict=True)]
        return tuple(np.median(shapes, axis=0).tolist())


class Measured(NamedTuple):
    """What one case says: its modality, its foreground intensities (the `whole` or a sample), its shape after the crop, its
    spacing, the share that the crop kept, and raw id -> extent in mm."""

    modality: str
    values: np.ndarray
    whole: bool
    shape: Sequence[int]
    spacing_mm: Sequence[float]
    kept: float
    extents_mm: dict[str, list[float]]

    def drawn(self, voxels: int) -> np.ndarray | None:
        """A sample of `voxels` intensities, drawn with replacement; None where the kept one is too short."""
        if not len(self.values):
            return self.values
        if self.whole:
            return np.random.RandomState(SEED).choice(self.values, voxels, replace=True)
        return self.values[:voxels] if len(self.values) >= voxels else None  # a longer sample begins with a shorter one


def fingerprint(
    items: Sequence[Mapping[str, Any]],
    table: LabelTable,
    preparation: Preparation | None = None,
    num_workers: int = 0,
    progress: bool = True,
    sources: Sources | None = None,
) -> Fingerprint:
    """Read all items once and gather nnU-Net 2's fingerprint. `preparation` gives in_channels, orientation and default modality.

    With `sources` what was measured of a case is kept in the store (``fingerprints/``), also when the process is killed,
    and a case with the same bytes is not measured again. Workers start when it takes more than some seconds.

    Raises:
        CaseError: no item could be read (all messages are listed).
    """
    preparation = preparation or Preparation((1.0, 1.0, 1.0))
    voxels = max(1, FINGERPRINT_VOXELS // max(1, len(items)))
    found: dict[int, Measured] = {}
    failed: dict[int, str] = {}
    jobs: dict[int, tuple] = {}
    for index, item in enumerate(items):
        try:
            path = None if sources is None else kept_path(sources, complete_items([item], table)[0], table, preparation)
            kept = None if path is None else _read_kept(path, voxels)
            if kept is not None:
                found[index] = kept
            elif sources is not None and not sources.raw_data:
                raise CaseError(f"the fingerprint of case '{item['case']}' {missing_in(sources.store_dir)}")
            else:
                jobs[index] = (item, table, preparation, voxels, path)
        except CaseError as error:
            failed[index] = str(error)
    with tqdm(total=len(items), desc="fingerprint", disable=not progress) as bar:
        bar.update(len(items) - len(jobs))
        for index, outcome in _run_jobs(jobs, num_workers):
            bar.update()
            if isinstance(outcome, Measured):
                found[index] = outcome
            else:
                failed[index] = str(outcome)
    if not found:
        listed = "\n".join(failed.values())
        raise CaseError(f"no case could be read for the fingerprint; found {len(items)} items:\n{listed}")
    rows = [(items[index].get("dataset", ""), found[index]) for index in sorted(found)]
    return _summary(rows, voxels, [(items[index], failed[index]) for index in sorted(failed)])


def _run_jobs(jobs: dict[int, tuple], num_workers: int) -> Iterator[tuple[int, Any]]:
    """(index, result) of each job: in this process for a while, then in workers, which take some seconds to start."""
    began, waiting = time.monotonic(), list(jobs)
    while waiting and (num_workers < 2 or time.monotonic() < began + ALONE_S):
        index = waiting.pop(0)
        ((_, outcome),) = run_all(_look_at_case, [jobs[index]])
        yield index, outcome
    for number, outcome in run_all(_look_at_case, [jobs[index] for index in waiting], num_workers):
        yield waiting[number], outcome


def _summary(rows: Sequence[tuple[str, Measured]], voxels: int, failed: list) -> Fingerprint:
    """The fingerprint of (data set, measured case), with so many voxels drawn of each."""
    intensity, masked = {}, {}
    for name in dict.fromkeys(case.modality for _, case in rows):
        own = [case for _, case in rows if case.modality == name]
        masked[name] = bool(np.median([case.kept for case in own]) < MASKED_BELOW)
        pooled = np.concatenate([case.drawn(voxels) for case in own])
        if pooled.size:
            intensity[name] = _statistics(pooled)
    smallest: dict[str, dict[str, list[float]]] = {}
    for dataset, case in rows:
        known = smallest.setdefault(dataset, {})
        for raw, extent in case.extents_mm.items():
            known[raw] = [min(pair) for pair in zip(known.get(raw, extent), extent, strict=True)]
    shapes, spacings = [tuple(case.shape) for _, case in rows], [tuple(case.spacing_mm) for _, case in rows]
    return Fingerprint(intensity, shapes, spacings, masked, failed, smallest)


def _look_at_case(item, table: LabelTable, preparation: Preparation, voxels: int, path: str | None) -> Measured:
    """Measure one item, and keep the result at `path`."""
    case = load_case(item, table, preparation)
    crop = tuple(slice(*span) for span in crop_box(case.image))
    image, codes = case.image[(slice(None), *crop)], case.codes
    values, extents = np.empty(0, np.float32), {}
    if codes is not None:
        extents = _extents_mm(codes, table.local_ids(case.dataset), case.spacing_mm)
        foreground = (codes[crop] != 0) & ~np.isin(codes[crop], table.ignored(case.dataset))
        values = image[:, foreground].ravel()
    wanted = max(voxels, KEPT_VOXELS)
    whole = values.size <= wanted
    if not whole:
        values = np.random.RandomState(SEED).choice(values, wanted, replace=True)
    kept = image[0].size / case.image[0].size
    measured = Measured(case.modality, values, whole, image.shape[1:], case.spacing_mm, kept, extents)
    if path is not None:
        arrays = {"values": values, "plain": json.dumps(measured._replace(values=None))}
        if codes is not None:
            arrays["codes"] = np.frombuffer(blosc2.asarray(codes, cparams=PACKED).to_cframe(), np.uint8)
        atomic_write(path, lambda name: np.savez_compressed(name, **arrays), ".npz")
    return measured


def _extents_mm(codes: np.ndarray, ids: Sequence[int | str], spacing_mm: Sequence[float]) -> dict[str, list[float]]:
    """Raw id -> box (S, P, L) around its largest connected piece, in mm."""
    pieces = cc3d.connected_components(codes)
    found = cc3d.statistics(pieces)
    left = set(np.unique(codes).tolist()) - {0}
    extents = {}
    for number in np.argsort(found["voxel_counts"])[::-1]:
        if not left:
            break
        box = found["bounding_boxes"][number]
        if number == 0 or box is None:
            continue
        code = int(codes[box][pieces[box] == number][0])
        if code in left:
            left.remove(code)
            extents[str(ids[code])] = [(b.stop - b.start) * mm for b, mm in zip(box, spacing_mm, strict=True)]
    return extents


def kept_path(sources: Sources, item: Mapping[str, Any], table: LabelTable, preparation: Preparation) -> str:
    """Where a complete item's `Measured` and label codes are kept: a name made of all that they depend on."""
    label = item.get("label")
    structures = list(label) if isinstance(label, Mapping) else None
    rules = table.label_rules(item["dataset"])
    facts = [CASE_FORMAT, sources.identity(item), item["modality"], structures, rules, preparation.in_channels]
    if preparation.orientation != "SPL":
        facts.append(preparation.orientation)
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    return os.path.join(sources.store_dir, FOLDER, f"{name}.npz")


def kept_codes(path: str) -> np.ndarray | None:
    """The label codes on the source grid, in the preparation's orientation, that were read when the case was measured; None where none are kept."""
    try:
        with np.load(path) as file:
            return blosc2.ndarray_from_cframe(file["codes"].tobytes())[:]
    except DAMAGED:
        return None


def _read_kept(path: str, voxels: int) -> Measured | None:
    """What was measured before, if its sample has so many voxels."""
    if not os.path.isfile(path):
        return None
    try:
        with np.load(path) as file:
            values, plain = file["values"], json.loads(str(file["plain"]))
    except DAMAGED:  # measured again
        return None
    kept = Measured(*plain)._replace(values=values)
    return None if kept.drawn(voxels) is None else kept


def _statistics(values: np.ndarray) -> dict[str, float]:
    lower, median, upper = np.percentile(values, (0.5, 50.0, 99.5))
    numbers = {"lower": lower, "upper": upper, "mean": values.mean(dtype=float), "sd": values.std(dtype=float)}
    numbers |= {"median": median, "min": values.min(), "max": values.max()}
    return {name: float(value) for name, value in numbers.items()}


def plan_spacing(spacings_mm: Sequence[Sequence[float]], shapes: Sequence[Sequence[int]]) -> tuple[float, float, float]:
    """nnU-Net's target spacing: the median per axis, finer along one axis that is far thicker than the others.

    Where the worst axis' median spacing is more than 3 times the others' and its median size less than a third of
    theirs, that axis takes its 10th percentile, but stays coarser than the others.
    """
    spacings_mm = np.asarray(spacings_mm, float)
    target, size = np.median(spacings_mm, axis=0), np.median(np.asarray(shapes, float), axis=0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    coarsest = max(target[others])
    if target[worst] > ANISOTROPY * coarsest and size[worst] * ANISOTROPY < min(size[others]):
        finer = np.percentile(spacings_mm[:, worst], 10)
        target[worst] = finer if finer >= coarsest else coarsest + 1e-5
    return tuple(target.tolist())
