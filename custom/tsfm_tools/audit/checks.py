"""Checks of the cases of one data set against each other, and of each case alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from tsfm.evaluation.scores import is_lesion
from tsfm.labels import LabelTable

from .findings import FEW, Finding, robust_z

Record = Mapping[str, Any]

VOLUME_Z = 5.0
"""In the logarithm of the volume, whose standard deviation is taken as 0.1 at least."""

MANY_SPECKS = 3

STRAY = 0.02
"""Share of an organ outside its largest piece below which nobody is asked to look."""

STRAY_Z = 6.0

USUAL = 0.95
"""A target is missed where this share of the other cases has it."""

OUTSIDE_VOXELS = 4

RANGE_FACTOR = 10.0
"""Intensities this many times the data set's median, or this part of it, are of another unit."""

GRID_Z = 8.0

APART_MM, DECIDED = 15.0, 0.9
"""Two targets lie on a side of each other where the medians are so far apart and this share of the cases agrees."""

AXES = ("inferior-superior", "anterior-posterior", "left-right")


def check_dataset(records: Sequence[Record], table: LabelTable) -> list[Finding]:
    """All findings about the cases of one data set."""
    checks = (_reading, _labels, _volumes, _fragments, _outside, _intensities, _grids, _sides)
    return [finding for check in checks for finding in check(records, table)]


def _about(record: Record, kind: str, severity: str, message: str, target: str = "", **more: Any) -> Finding:
    place = more.pop("place", None) or (record["targets"].get(target) or {}).get("place")
    key = (record["dataset"], record["case"])
    return Finding(kind, severity, message, record["dataset"], [key], target, place, more)


def _reading(records: Sequence[Record], table: LabelTable) -> Iterator[Finding]:
    for record in records:
        for text in record["warnings"]:
            kind = "units" if "Hounsfield" in text else "header and voxels"
            yield _about(record, kind, "warning", text)
        if record["complaint"]:
            text = record["complaint"].split(": ", 1)[-1]
            yield _about(record, "label ids", "error", text if len(text) < 400 else f"{text[:300]} [...] {text[-150:]}")


def _labels(records: Sequence[Record], table: LabelTable) -> Iterator[Finding]:
    shares = {name: len(found) / len(records) for name, found in _by_target(records)}
    usual = {name: share for name, share in shares.items() if share >= USUAL and len(records) >= FEW}
    for record in records:
        present = [name for name, one in record["targets"].items() if one["ml"] > 0]
        if not present:
            yield _about(record, "empty labels", "warning", "no voxel of any target")
            continue
        for name in (name for name in usual if name not in present):
            text = f"no voxel of {name}, which {usual[name]:.0%} of the data set's cases have"
            yield _about(record, "empty labels", "warning", text, name)


def _by_target(records: Sequence[Record]) -> Iterator[tuple[str, list[Record]]]:
    """Each target, and the records of the cases that show it."""
    for name in records[0]["targets"]:
        yield name, [record for record in records if record["targets"][name]["ml"] > 0]


def _volumes(records: Sequence[Record], table: LabelTable) -> Iterator[Finding]:
    for name, found in _by_target(records):
        if len(found) < FEW:
            continue
        volumes = [record["targets"][name]["ml"] for record in found]
        for record, ml, z in zip(found, volumes, robust_z(np.log(volumes), 0.1), strict=True):
            if abs(z) > VOLUME_Z:
                text = f"{name} measures {ml:.3g} ml; half of the data set's lie between " + " and ".join(
                    f"{limit:.3g}" for limit in np.percentile(volumes, (25, 75))
                )
                yield _about(record, "volumes", "warning", text, name, ml=ml, z=float(z))


def _fragments(records: Sequence[Record], table: LabelTable) -> Iterator[Finding]:
    for name, found in _by_target(records):
        stray = [record["targets"][name]["stray"] for record in found]
        usual = len(found) >= FEW and not is_lesion(table, name)
        scores = robust_z(stray, 0.005) if usual else [0.0] * len(found)
        for record, share, z in zip(found, stray, scores, strict=True):
            one = record["targets"][name]
            if one["specks"] >= MANY_SPECKS:
                text = f"{name} has {one['specks']} specks of up to 3 voxels among its {one['pieces']} pieces"
                yield _about(record, "fragments", "warning", text, name, specks=one["specks"])
            elif share > STRAY and z > STRAY_Z:
                text = f"{share:.1%} of {name} lie outside its largest piece ({one['pieces']} pieces)"
                yield _about(record, "fragments", "warning", text, name, stray=share, z=float(z))


def _outside(records: Sequence[Record], table: LabelTable) -> Iterator[Finding]:
    for record in records:
        for name in dict.fromkeys(one["target"] for one in record["outside"]):
            pieces = [one for one in record["outside"] if one["target"] == name and one["voxels"] >= OUTSIDE_VOXELS]
            if pieces:
                largest = max(pieces, key=lambda one: one["ml"])
                number = "a piece" if len(pieces) == 1 else f"{len(pieces)} pieces"
                text = f"{number} of {name} without contact to any voxel of {largest['parent']}, the largest of "
                text += f"{largest['ml']:.3g} ml"
                yield _about(record, "outside the parent", "warning", text, name, place=largest["place"])


def _intensities(records: Sequence[Record], table: LabelTable) -> Iterator[Finding]:
    """Of other modalities than CT, whose units are checked when a case is read."""
    for modality in dict.fromkeys(record["modality"] for record in records if record["modality"] != "CT"):
        found = [record for record in records if record["modality"] == modality]
        for record in found:
            low, _, median, high, top = record["intensity"][0]
            if low <= -900 and 100 < high < 4000 and median < 200:
                text = f"declared {modality}, but intensities from {low:g} to {top:g} look like Hounsfield units"
                yield _about(record, "units", "warning", text)
        tops = np.array([max(record["intensity"][0][3], 1e-9) for record in found])
        if len(found) < FEW:
            continue
        usual = float(np.median(tops))
        odd = [i for i in np.argsort(-tops) if not usual / RANGE_FACTOR <= tops[i] <= usual * RANGE_FACTOR]
        for i in odd:
            text = f"99.5 % of the intensities lie below {tops[i]:.4g}, the data set's median is {usual:.4g}; largest value "
            text += f"{found[i]['intensity'][0][4]:.4g}: another unit or scaling (each case's z-score takes it out)"
            yield _about(found[i], "units", "warning", text, factor=float(tops[i] / usual))
        if odd:
            tops_all = [record["intensity"][0][4] for record in found]
            text = (
                f"{modality} intensities reach from {min(tops_all):.4g} to {max(tops_all):.4g} at their largest from case "
                f"to case, {len(odd)} of {len(found)} beyond {RANGE_FACTOR:g} times the usual: never normalize them together"
            )
            yield Finding("units", "note", text, records[0]["dataset"])


def _grids(records: Sequence[Record], table: LabelTable) -> Iterator[Finding]:
    if len(records) < FEW:
        return
    axes, count = Counter(record["axes"] for record in records).most_common(1)[0]
    if count >= 0.9 * len(records):
        for record in records:
            if record["axes"] != axes:
                text = f"stored with the axes {record['axes']}, {count} of {len(records)} cases with {axes}: fine if the header "
                yield _about(record, "orientation", "note", text + "is right, else the image is turned")
    for what, floor, values in (
        ("voxel of {:.3g} mm3", 0.1, [float(np.prod(record["spacing_mm"])) for record in records]),
        ("largest side of {:.4g} mm", 0.1, [max(np.multiply(r["spacing_mm"], r["shape"])) for r in records]),
    ):
        for record, value, z in zip(records, values, robust_z(np.log(values), floor), strict=True):
            if abs(z) > GRID_Z:
                text = f"a {what.format(value)}; the data set's median is {np.median(values):.4g}"
                yield _about(record, "header and voxels", "note", text, z=float(z))


def _sides(records: Sequence[Record], table: LabelTable) -> Iterator[Finding]:
    """Cases whose targets lie the other way round than in the rest of the data set: a header that is wrong, or labels."""
    votes: dict[tuple[int, int], list[tuple[bool, str]]] = {}
    for first, second in combinations(records[0]["targets"], 2):
        both = [i for i, r in enumerate(records) if r["targets"][first]["ml"] > 0 and r["targets"][second]["ml"] > 0]
        if len(both) < FEW:
            continue
        centers = [[records[i]["targets"][name]["center_mm"] for i in both] for name in (first, second)]
        apart = np.subtract(*centers)
        for axis in range(3):
            side = np.sign(np.median(apart[:, axis]))
            agreed = (np.sign(apart[:, axis]) == side).mean() >= DECIDED
            if agreed and abs(np.median(apart[:, axis])) >= APART_MM:
                for i, mm in zip(both, apart[:, axis], strict=True):
                    if abs(mm) >= APART_MM / 2:
                        votes.setdefault((i, axis), []).append((np.sign(mm) != side, f"{first} and {second}"))
    for (i, axis), cast in votes.items():
        against = [pair for wrong, pair in cast if wrong]
        if len(against) > len(cast) / 2:
            text = f"along {AXES[axis]} {len(against)} of {len(cast)} pairs of targets lie the other way round than in the rest "
            text += f"of the data set ({', '.join(against[:3])}): a flipped image, or exchanged labels"
            yield _about(records[i], "orientation", "warning", text)
