"""Checks between data sets: one scan or one patient in several, licences, and who drew the labels."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from tsfm.cases.dataset_folder import declared_licence
from tsfm.cases.licences import licence_facts
from tsfm.cases.pool import DatasetPool
from tsfm.schema import read_json

from .duplicates import find_pairs
from .findings import Finding

MODEL_WORDS = (
    r"model[- ](output|made|prediction)|output of|predict(ed|ions)|pseudo|fusion of|algorithm|automatic|by a model"
)

SAME_FORM, RADIUS_SHARE = 0.99, 0.03
"""Correlation of two structures' forms, and how far their radii may differ, where they are one structure."""

SHARED_NAMES = 3


@dataclass
class Source:
    """One pool of the audit, and whether it is only what trained weights will be scored on."""

    pool: DatasetPool
    downstream: bool = False


def check_overlaps(records: Sequence[Mapping[str, Any]], sources: Sequence[Source]) -> list[Finding]:
    """Findings about pairs of cases and of data sets. `records`: of all cases that could be measured."""
    entries = {name: source.pool.entries[name] for source in sources for name in source.pool.chosen}
    downstream = {name for source in sources if source.downstream for name in source.pool.chosen}
    pairs = list(_same_scans(records, downstream))
    return [
        *pairs,
        *_same_forms(records, entries, downstream, {tuple(sorted(one.cases)) for one in pairs}),
        *_same_names(records, entries, downstream),
        *_same_origins(sources, entries, downstream),
        *_labels_by(sources),
        *_licences(sources),
    ]


def _severity(first: str, second: str, downstream: set[str], kind: str = "duplicates") -> tuple[str, str]:
    """(kind, severity) of something that two data sets share, of this `kind` unless it is a leak."""
    return ("leaks", "error") if (first in downstream) != (second in downstream) else (kind, "warning")


def _same_scans(records: Sequence[Mapping[str, Any]], downstream: set[str]) -> Iterator[Finding]:
    for pair in find_pairs(records):
        one, other = records[pair.first], records[pair.second]
        kind, severity = _severity(one["dataset"], other["dataset"], downstream)
        text = f"the same scan: {pair.agreeing} landmarks agree"
        if not pair.same_orientation:
            axes = [
                "SPL"[axis] if sign > 0 else "IAR"[axis]
                for axis, sign in zip(pair.turned[:3], pair.turned[3:], strict=True)
            ]
            text += f", once the second's axes (S, P, L) are read as {', '.join(axes)}: one of the headers is wrong"
            severity = "error"
        text += "; exclude one" + (" from the training" if kind == "leaks" else ', or give both a common "patient"')
        keys = [(record["dataset"], record["case"]) for record in (one, other)]
        yield Finding(kind, severity, text, one["dataset"], keys, measured={"landmarks": pair.agreeing})


def _grouped(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether a pool file says already which cases of two data sets are one patient's."""
    groups = [(entry.get("patient") or {}).get("group") for entry in (first, second)]
    return groups[0] is not None and groups[0] == groups[1]


def _same_forms(records, entries, downstream: set[str], known: set[tuple]) -> Iterator[Finding]:
    """One patient's structure in two scans: its form and size agree although the images do not."""
    if not len(records):
        return
    forms = np.stack([record["form"].ravel() for record in records]).astype(np.float32)
    radii = np.array([record["radius_mm"] for record in records])
    for i in range(len(records) - 1):
        alike = (forms[i + 1 :] @ forms[i] > SAME_FORM) & (radii[i] > 0)
        alike &= np.abs(radii[i + 1 :] - radii[i]) <= RADIUS_SHARE * radii[i]
        for j in np.flatnonzero(alike) + i + 1:
            one, other = records[i], records[j]
            keys = [(record["dataset"], record["case"]) for record in (one, other)]
            if one["dataset"] == other["dataset"] or tuple(sorted(keys)) in known:
                continue
            kind, severity = _severity(one["dataset"], other["dataset"], downstream, "same patient")
            if kind != "leaks" and _grouped(entries[one["dataset"]], entries[other["dataset"]]):
                severity = "note"
            text = f"the labels have one form (correlation {float(forms[i] @ forms[j]):.3f}, radii {radii[i]:.1f} and "
            text += f"{radii[j]:.1f} mm) in scans that differ: probably one patient"
            yield Finding(kind, severity, text, one["dataset"], keys)


def _same_names(records, entries, downstream: set[str]) -> Iterator[Finding]:
    """Data sets whose cases share names of their own (not just numbers)."""
    names: dict[str, set[str]] = {}
    for record in records:
        names.setdefault(record["dataset"], set()).add(record["case"])
    for one, other in combinations(names, 2):
        shared = sorted(name for name in names[one] & names[other] if re.search(r"[^\W\d_]{3}", name))
        if len(shared) < SHARED_NAMES:
            continue
        kind, severity = _severity(one, other, downstream, "same patient")
        declared = _grouped(entries[one], entries[other])
        text = f"{len(shared)} of {len(names[one])} and {len(names[other])} cases have the same names ({', '.join(shared[:4])}"
        text += ", ...)" if len(shared) > 4 else ")"
        if declared:
            text += ": declared as one patient's"
        elif kind == "leaks":
            text += ": the same scans? Then exclude them from the training"
        else:
            text += ': one patient in two data sets? Then declare "patient" with one "group" in both, so that folds keep them'
            text += " together"
        yield Finding(kind, "note" if declared else severity, text, one, measured={"other": other, "shared": shared})


def _same_origins(sources: Sequence[Source], entries, downstream: set[str]) -> Iterator[Finding]:
    for one, other in combinations(entries, 2):
        shared = sorted(set(entries[one].get("origin", ())) & set(entries[other].get("origin", ())))
        if shared and not {one, other} <= downstream:
            kind, severity = _severity(one, other, downstream)
            text = f"{one} and {other} both hold scans of {', '.join(shared)} by their declared origin: some may be the same"
            yield Finding(kind, severity, text, one, measured={"other": other, "origin": shared})


def _labels_by(sources: Sequence[Source]) -> Iterator[Finding]:
    for pool in (source.pool for source in sources):
        for name in pool.chosen:
            by, text = pool.entries[name].get("labels_by"), ""
            path = os.path.join(pool.dataset_dir, pool.entries[name].get("folder", ""), "dataset.json")
            content = read_json(path) if by is None and os.path.isfile(path) else None
            if isinstance(content, Mapping):
                words = " ".join(str(content.get(key, "")) for key in ("description", "note", "reference"))
                found = re.search(MODEL_WORDS, words, re.IGNORECASE)
                text = f'dataset.json says "{_around(words, found)}"' if found else ""
            elif by in ("model", "both"):
                text = "the pool file declares it"
            if text:
                made = "partly made" if by == "both" else "made"
                text = f"labels {made} by a model ({text}): scores against them are agreement, not accuracy"
                yield Finding("labels by a model", "note" if by == "both" else "warning", text, name)


def _around(text: str, found: re.Match) -> str:
    start = text.rfind(";", 0, found.start()) + 1
    end = text.find(";", found.end())
    return text[start : end if end > 0 else None].strip()[:160]


def declared_licences(pool: DatasetPool) -> dict[str, dict[str, Any]]:
    """Data set -> facts of its licence, also of those that are not there."""
    return {name: licence_facts(declared_licence(pool.dataset_dir, pool.entries[name])) for name in pool.chosen}


def _licences(sources: Sequence[Source]) -> Iterator[Finding]:
    for source in sources:
        for name, facts in declared_licences(source.pool).items():
            if facts["commercial"] is False:
                text = "no commercial use of what is trained on it"
            elif facts["commercial"] is None:
                text = "whether commercial use is permitted is not known; --licence commercial leaves it out"
            elif facts["share_alike"]:
                text = "share-alike, the weights may have to carry it too"
            else:
                continue
            yield Finding("licences", "note", f"{facts['name']}: {text}", name)
