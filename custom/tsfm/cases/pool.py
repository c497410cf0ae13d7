"""The data set pool: a pool file and folders become one datalist with data set, modality, folds and sampling weights.

Paper section 2.1: ten data sets, one label table, a sampling probability per case proportional to 1/sqrt(n).
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..labels import RELATIONS, LabelError, LabelTable
from ..names import case_names, counted, modality_name, unknown_names
from ..schema import check, nearest, read_json
from .dataset_folder import check_entry, declared_licence, read_dataset
from .folders import PoolError, paths_of, stem
from .licences import licence_facts, licences_of, permits, weights_terms
from .sources import recorded_cases, with_recorded_licence
from .splits import check_patients, declared_split

logger = logging.getLogger(__name__)

SPLIT_SEED = 12345  # nnU-Net's


class DatasetPool:
    """Ten data sets (or one) as a single datalist.

    Args:
        pool_file: path of a pool file, or its content: ``targets`` and ``datasets`` (see `LabelTable`), each data set
            with ``folder`` (relative to `dataset_dir`), its layout (see `dataset_folder`), ``modality`` (a name, or name
            patterns of cases with a ``default``), optionally ``exclude`` (case names), ``"unlabelled": "skip"`` (cases
            without a label file are left out, not missed) and ``patient`` (``{"group", "pattern"}``: cases
            of the same patient, also across the data sets of a group, stay in one fold).
        dataset_dir: folder that holds the data sets' folders.
        datasets: use only these (their names); default all.
        allow_missing: go on with the data sets that are there; otherwise missing ones are one error that lists them.
        folds: number of folds for cross-validation (nnU-Net: 5).
        kept_in: a store: the cases are those that it recorded, and their files may be gone.
        licence: "commercial" leaves out data sets whose licence does not permit commercial use or is not known to,
            "permissive" those that ask for the same licence (share-alike) too; "any" leaves out none.
        splits_file: JSON ``{data set: [{"train": [case, ...], "val": [...]}, ...]}`` in place of drawn folds.
        source, labels_in: how messages call what was declared, and where its labels were, if not in a pool file.

    Raises:
        PoolError: unknown fields or formats at once; missing folders and files when the cases are first needed.
    """

    def __init__(
        self,
        pool_file: str | os.PathLike | Mapping[str, Any],
        dataset_dir: str | os.PathLike = ".",
        datasets: Sequence[str] | str | None = None,
        allow_missing: bool = False,
        folds: int = 5,
        splits_file: str | None = None,
        kept_in: str | os.PathLike | None = None,
        licence: str = "any",
        source: str | None = None,
        labels_in: str | None = None,
    ) -> None:
        self.source, declared = _read_pool(pool_file, source)
        self.dataset_dir = os.path.abspath(os.path.expanduser(os.fspath(dataset_dir)))
        self.allow_missing, self.folds, self.kept_in = allow_missing, folds, kept_in
        try:
            self.table = LabelTable(declared["targets"], declared["datasets"])
        except LabelError as error:
            raise LabelError(f"{self.source}: {error}") from None
        self.labels_in = labels_in or f'"labels" in {self.source}'
        if labels_in:
            self.table.advice = (
                f"Name them in {labels_in}, or leave ids out by a pool file (--pool_file, docs/datasets.md)."
            )
        self.entries = {entry["name"]: with_recorded_licence(kept_in, entry) for entry in declared["datasets"]}
        chosen = [datasets] if isinstance(datasets, str) else list(dict.fromkeys(datasets or self.entries))
        unknown = unknown_names(chosen, self.entries)
        if unknown:
            raise PoolError(f"{self.source}: no data sets named {unknown}; there are {list(self.entries)}")
        self.chosen = self._permitted(chosen, licence)
        for name in chosen:
            check_entry(self.source, self.entries[name])
        self.splits_file = splits_file
        self.splits = read_json(splits_file, "splits", PoolError) if splits_file else None

    def _permitted(self, chosen: list[str], use: str) -> list[str]:
        """The data sets whose declared licence permits the use; the others are named in a warning."""
        facts = {name: licence_facts(declared_licence(self.dataset_dir, self.entries[name])) for name in chosen}
        kept = [name for name in chosen if permits(facts[name], use)]
        left = ", ".join(f"{name} ({facts[name]['name']})" for name in chosen if name not in kept)
        if left and not kept:
            raise PoolError(
                f'{self.source}: no data set has a licence that is known to permit {use} use: {left}; declare them ("licence")'
            )
        if left:
            logger.warning("licence %s: trained without %s", use, left)
        return kept

    # ---- cases ------------------------------------------------------------------------------------------------

    @cached_property
    def scan(self) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
        """(items per data set found, reason per data set missing)."""
        found, missing = {}, {}
        for name in self.chosen:
            try:
                entry = self.entries[name]
                recorded = recorded_cases(self.kept_in, name, entry.get("exclude", ()))
                found[name] = read_dataset(self.dataset_dir, entry, self.source, recorded)
            except PoolError as error:
                missing[name] = str(error)
        return found, missing

    @cached_property
    def cases(self) -> list[dict[str, Any]]:
        """All items: ``image``, ``label``, ``dataset``, ``modality``, ``case``.

        Raises:
            PoolError: missing data sets, all in one message, unless `allow_missing`; no case at all.
        """
        found, missing = self.scan
        listing = "\n".join(f"  {name}: {reason}" for name, reason in missing.items())
        if missing and not self.allow_missing:
            if len(self.entries) == 1:
                raise PoolError(
                    f"{listing.strip()}\nPut the files in place, or move away the images that have no label; a pool file "
                    '(--pool_file, docs/datasets.md) can leave cases out: "exclude" with their names, or "unlabelled": "skip"'
                )
            raise PoolError(
                f"{len(missing)} of {len(self.chosen)} data sets of {self.source} are not there:\n{listing}\n"
                "Put them in place, name the ones to use (--datasets \"['a','b']\"), or ask for training on those that "
                "are there (--allow_missing True)."
            )
        if missing:
            logger.warning("going on without %s:\n%s", counted(len(missing), "data set"), listing)
        cases = [item for items in found.values() for item in items]
        if not self.entries:
            raise PoolError(
                f"{self.dataset_dir} holds no data set: neither dataset.json (Medical Segmentation Decathlon) nor folders "
                "of images and labels, and no pool file or item was given; check --dataset_dir"
            )
        if not cases:
            raise PoolError(f"{self.source}: no case found below {self.dataset_dir}\n{listing}")
        return cases

    # ---- folds ------------------------------------------------------------------------------------------------

    def split(self, fold: int | str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """(training items, validation items) of one fold by nnU-Net's rule, drawn per data set (per patient group).

        ``"all"`` trains on everything and validates on nothing. A data set with a single case has no validation case.

        Raises:
            PoolError: a fold that does not exist; a splits file that names unknown cases or shares a case or a patient.
        """
        if fold == "all":
            return list(self.cases), []
        if self.splits is not None:
            return self._declared_split(int(fold))
        if not 0 <= int(fold) < self.folds:
            raise PoolError(f"fold {fold} does not exist: folds are 0..{self.folds - 1}, or 'all'")
        groups: dict[str, set[str]] = {}
        for item in self.cases:
            group, patient = self._patient(item)
            groups.setdefault(group, set()).add(patient)
        validation = {group: _fold_keys(sorted(keys), int(fold), self.folds) for group, keys in groups.items()}
        train, val = [], []
        for item in self.cases:
            group, patient = self._patient(item)
            (val if patient in validation[group] else train).append(item)
        return train, val

    def train_items(self, fold: int | str = 0) -> list[dict[str, Any]]:
        """Training items of one fold."""
        return self.split(fold)[0]

    def val_items(self, fold: int | str = 0) -> list[dict[str, Any]]:
        """Validation items of one fold."""
        return self.split(fold)[1]

    def evaluation_items(self, fold: int | str = 0) -> list[dict[str, Any]]:
        """Validation items of one fold, for files named by their cases: a case name that several data sets of the pool
        share gets its data set's name in front."""
        keys = [(item["dataset"], item["case"]) for item in self.cases]
        names = case_names([case for _, case in keys], ["/".join(key) for key in keys])
        unique = dict(zip(keys, names, strict=True))
        return [{**item, "case": unique[item["dataset"], item["case"]]} for item in self.val_items(fold)]

    def _patient(self, item: Mapping[str, Any]) -> tuple[str, str]:
        rule = self.entries[item["dataset"]].get("patient")
        if rule is None:
            return item["dataset"], item["case"]
        match = re.search(rule["pattern"], item["case"])
        if match is None:
            raise PoolError(
                f"data set '{item['dataset']}': patient pattern {rule['pattern']!r} does not fit {item['case']!r}"
            )
        return rule.get("group", item["dataset"]), match.group(match.lastindex or 0)

    def _declared_split(self, fold: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        items = {name: [item for item in self.cases if item["dataset"] == name] for name in self.chosen}
        train, val = declared_split(self.splits, str(self.splits_file), fold, items)
        check_patients(map(self._patient, train), map(self._patient, val), f"{self.splits_file}, fold {fold}")
        return train, val

    # ---- what was found ---------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """What was found, as plain JSON: cases, modalities, labels and sampling share per data set; who annotates what."""
        found, missing = self.scan
        items = [item for name in found for item in found[name]]
        shares = Counter()
        for item, weight in zip(items, sampling_weights(items), strict=True):
            shares[item["dataset"]] += float(weight)
        datasets = {
            name: {
                "cases": len(found[name]),
                "modalities": dict(Counter(item["modality"] for item in found[name])),
                "labels": self._meanings(name),
                "annotated": list(self.table.annotated(name)),
                "sampling_share": shares[name],
                "licence": licences_of(found[name][:1])[name],
            }
            for name in found
        }
        targets = {name: [other for other in found if name in self.table.annotated(other)] for name in self.table.names}
        return {"datasets": datasets, "missing": missing, "targets": targets, "cases": len(items)}

    def describe(self) -> str:
        """The summary as text for a terminal."""
        summary = self.summary()
        number = f"{counted(summary['cases'], 'case')} in {counted(len(summary['datasets']), 'data set')}"
        lines = [f"{self.source}: {number} below {self.dataset_dir}", ""]
        lines.append(f"{'data set':<24}{'cases':>6}  {'modality':<16}{'share':>6}  labels")
        for name, entry in summary["datasets"].items():
            modalities = ", ".join(f"{count} {modality}" for modality, count in entry["modalities"].items())
            labels = ", ".join(f"{raw} {target}" for raw, target in entry["labels"].items() if raw != "0")
            lines.append(f"{name:<24}{entry['cases']:>6}  {modalities:<16}{entry['sampling_share']:>6.3f}  {labels}")
        lines += ["", f"{counted(len(self.table.names), 'target')}, annotated in:"]
        for value, (target, where) in enumerate(summary["targets"].items(), start=1):
            kinds = [key for key in RELATIONS if key in self.table.entry(target)]
            relation = f" ({kinds[0]} {self.table.parent(target)})" if kinds else ""
            lines.append(f"{value:>4} {target + relation:<48}{', '.join(where) or '-'}")
        licences = {name: entry["licence"] for name, entry in summary["datasets"].items()}
        if licences:
            listed = ", ".join(f"{name} {one['name']}" for name, one in licences.items())
            lines += ["", f"licences: {listed}", f"what weights inherit: {weights_terms(licences)}"]
        if summary["missing"]:
            lines += ["", f"missing ({len(summary['missing'])}):"]
            lines += [f"  {name}: {reason}" for name, reason in summary["missing"].items()]
        return "\n".join(lines)

    def _meanings(self, dataset: str) -> dict[str, str]:
        """Raw id -> the innermost targets that it stands for."""
        found = {}
        for raw, row in zip(self.table.local_ids(dataset), self.table.rows(dataset), strict=True):
            positive = np.flatnonzero(row == 1)
            inner = [i for i in positive if not any(i in self.table.ancestors(j) for j in positive)]
            found[str(raw)] = " + ".join(self.table.names[i] for i in inner) or "ignored"
        return {**found, "0": "background"}


def sampling_weights(items: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Sampling probability of every item, float64, sum 1: proportional to 1/sqrt(n), n the cases of its data set.

    Source: paper section 2.1. A data set's share of the draws is therefore proportional to sqrt(n).
    """
    counts = Counter(item.get("dataset") for item in items)
    weights = np.array([counts[item.get("dataset")] ** -0.5 for item in items], np.float64)
    return weights / weights.sum() if len(weights) else weights


def complete_items(items: Sequence[Mapping[str, Any]], table: LabelTable, modality: str = "CT") -> list[dict[str, Any]]:
    """Datalist items with `dataset`, `modality` and `case` filled in where they are bare ``{image, label}`` pairs.

    Raises:
        PoolError: an item without an image, or of a data set that the table does not know.
    """
    completed = []
    for item in items:
        if "image" not in item:
            raise PoolError(f"a datalist item has no 'image': {dict(item)}")
        dataset, first = table.dataset_of(item), paths_of(item["image"])[0]
        if not table.knows(dataset):
            near = nearest(dataset, table.datasets)
            known = f"the table knows {list(table.datasets)}"
            raise PoolError(f"item {item['image']}: unknown data set '{dataset}'{near}; {known}")
        kind = modality_name(item["modality"], f"item {first}") if item.get("modality") else modality
        completed.append({**item, "modality": kind, "dataset": dataset, "case": item.get("case") or stem(first)})
    return completed


def is_bare(items: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the items were handed in from outside (MONAI Label) instead of coming from a pool."""
    return any("dataset" not in item for item in items)


def _read_pool(pool_file: str | os.PathLike | Mapping[str, Any], source: str | None) -> tuple[str, Mapping[str, Any]]:
    """(how messages call it, its checked content)."""
    is_path = isinstance(pool_file, str | os.PathLike)
    source = source or (os.path.basename(os.fspath(pool_file)) if is_path else "the pool declaration")
    declared = read_json(pool_file, error=PoolError) if is_path else pool_file
    check(declared, "pool", source, PoolError)
    return source, declared


def _fold_keys(keys: list[str], fold: int, folds: int) -> set[str]:
    """Validation keys of one fold: scikit-learn's KFold(folds, shuffle=True, random_state=12345) over sorted keys.

    With fewer keys than folds each fold holds out one key, and folds beyond their number hold out none.
    """
    count = min(folds, len(keys))
    if len(keys) < 2 or fold >= count:
        return set()
    order = np.arange(len(keys))
    np.random.RandomState(SPLIT_SEED).shuffle(order)
    return {keys[index] for index in np.array_split(order, count)[fold]}
