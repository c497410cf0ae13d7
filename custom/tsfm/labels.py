"""The label table: which target each raw id of each data set stands for (paper section 2.1, "label remapping table").

Every (data set, raw id) pair, the data set's background included, owns one small integer, its *code*. A voxel's code
therefore says which data set it came from and what that data set annotated there; `LabelTable.targets[code]` is a row
over all targets with 1 (is), 0 (is not) or -1 (this data set does not annotate it).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .schema import NAME_RULE, is_plain_name, nearest, read_json

RELATIONS = ("part_of", "inside")

LABEL_MAP = "label_map"

LESION_ENDINGS = ("tumor", "tumour", "lesion", "cyst", "cancer", "metastasis")


class LabelError(ValueError):
    """A label table that contradicts itself, or a label map that holds an id the table does not list."""


class Rules(NamedTuple):
    """What one data set declares: raw id (or structure name) -> targets, ids whose voxels enter no loss, what others are."""

    labels: dict[int | str, tuple[str, ...]]
    ignore: tuple[int, ...]
    others: str | None


class LabelTable:
    """Targets, their tree, and each data set's raw ids.

    Args:
        targets: name -> ``{}``, ``{"part_of": parent}`` or ``{"inside": parent}``, optionally with ``"lesion"``,
            ``"tolerance_mm"``, ``"display"`` (viewers' name for it) and ``"snomed"`` (its codes in DICOM). The declared
            order is the order of the network's outputs; in a label map target ``i`` has the value ``i + 1``. A parent's
            parts make it up together; what is inside lies in it.
        datasets: one mapping per data set: ``name``, ``labels`` (raw id, or structure name, -> target or list of
            targets), ``ignore`` (raw ids whose voxels enter no loss), ``others`` (``"background"``: ids that are
            listed nowhere count as background; without it they are an error).

    Raises:
        LabelError: an unknown parent or target, a cycle, a name used twice, or an id listed twice.
    """

    def __init__(self, targets: Mapping[str, Mapping[str, Any] | None], datasets: Sequence[Mapping[str, Any]]) -> None:
        self.names: tuple[str, ...] = tuple(targets)
        self._entries = {name: dict(entry or {}) for name, entry in targets.items()}
        self._datasets = {entry["name"]: _dataset_rules(entry) for entry in datasets}
        if len(self._datasets) != len(datasets):
            raise LabelError(f"two data sets share a name: {[entry['name'] for entry in datasets]}")
        self.datasets: tuple[str, ...] = tuple(self._datasets)  # as declared, in order
        self._maps: dict[str, str] = {}
        values = {str(i + 1): name for i, name in enumerate(self.names)}
        self._datasets.setdefault(LABEL_MAP, _dataset_rules({"name": LABEL_MAP, "labels": values}))
        self._check_names()
        self._check_targets()
        self._build_codes()

    advice = 'Add them to its "labels", or in a pool file name them under "ignore", or set "others": "background".'
    """What to do about ids that a data set does not list; where labels are declared elsewhere, a pool says so here."""

    # ---- targets and their tree -------------------------------------------------------------------------------

    def entry(self, name: str) -> dict[str, Any]:
        """What the table declares of one target (its relation, ``lesion``, ``tolerance_mm``)."""
        return self._entries[name]

    def parent(self, name: str) -> str | None:
        """The target that `name` is part of or lies inside, or None."""
        return next((self._entries[name][key] for key in RELATIONS if key in self._entries[name]), None)

    def ancestors(self, target: int) -> tuple[int, ...]:
        """Indices of the targets that contain target number `target`, nearest first."""
        found = [target]
        while (parent := self.parent(self.names[found[-1]])) is not None:
            found.append(self.names.index(parent))
        return tuple(found[1:])

    def parts(self, name: str) -> tuple[str, ...]:
        """The targets declared ``part_of`` `name`; together they make it up."""
        return tuple(child for child, entry in self._entries.items() if entry.get("part_of") == name)

    def paint_order(self) -> tuple[int, ...]:
        """Target indices in painting order: parents first, parts next, what is inside last; else as declared."""
        return tuple(sorted(range(len(self.names)), key=lambda target: (*self.paint_depth(target), target)))

    def paint_depth(self, target: int) -> tuple[int, int]:
        """How deep a target lies: deeper ones are painted over others, of equally deep ones the surest is."""
        chain = (target, *self.ancestors(target))
        return sum("inside" in self._entries[self.names[link]] for link in chain), len(chain)

    def map_membership(self) -> np.ndarray:
        """Bool (targets + 1, targets): does a voxel with this label-map value belong to this target?

        A painted map shows the innermost target only; its ancestors contain the voxel too.
        """
        membership = np.zeros((len(self.names) + 1, len(self.names)), bool)
        for target in range(len(self.names)):
            membership[target + 1, [target, *self.ancestors(target)]] = True
        return membership

    def channel_def(self) -> dict[str, str]:
        """The label map's table as bundle metadata and MONAI Label want it: ``{"0": "background", "1": ...}``.

        Names are the targets' ``display`` ("right kidney"), by which 3D Slicer and OHIF choose colors, or their own.
        """
        shown = [str(self._entries[name].get("display", name)).lower() for name in self.names]
        return {"0": "background", **{str(i + 1): name for i, name in enumerate(shown)}}

    # ---- data sets and codes ----------------------------------------------------------------------------------

    @property
    def bare_dataset(self) -> str:
        """The data set that bare ``{image, label}`` items belong to.

        It is the only declared one; where several (or none) are declared it is ``label_map``, which every table has:
        label maps that hold the values 1..N of :meth:`channel_def`, as MONAI Label sends them.
        """
        return self.datasets[0] if len(self.datasets) == 1 else LABEL_MAP

    def with_maps(self, annotated: Mapping[str, Sequence[str]]) -> LabelTable:
        """This table for certain label maps: file -> the targets it says something about; about others it says nothing.

        Maps that say something about the same targets are one more data set, which does not travel with the weights.
        """
        table = copy.deepcopy(self)
        for path, names in annotated.items():
            values = {str(i + 1): name for i, name in enumerate(self.names) if name in names}
            dataset = LABEL_MAP if len(values) == len(self.names) else "_".join([LABEL_MAP, *(values or "0")])
            table._datasets[dataset] = _dataset_rules({"name": dataset, "labels": values})
            table._maps[path] = dataset
        table._build_codes()
        return table

    def knows(self, dataset: str) -> bool:
        """Whether `dataset` is declared here, or label maps belong to it."""
        return dataset in self._datasets

    def dataset_of(self, item: Mapping[str, Any]) -> str:
        """The data set that a datalist item names or, being bare, belongs to."""
        return item.get("dataset") or self._maps.get(str(item.get("label")), self.bare_dataset)

    def annotated(self, dataset: str) -> tuple[str, ...]:
        """Targets that `dataset` annotates: those it names, and those all of whose parts it annotates."""
        known = {target for targets in self._rules(dataset).labels.values() for target in targets}
        while True:
            composed = {name for name in self.names if self.parts(name) and known.issuperset(self.parts(name))}
            if composed <= known:
                return tuple(name for name in self.names if name in known)
            known |= composed

    def local_ids(self, dataset: str) -> tuple[int | str, ...]:
        """Raw ids (or structure names) of `dataset` in the order of their codes, background (0) first."""
        rules = self._rules(dataset)
        return (0, *rules.labels, *rules.ignore)

    def offset(self, dataset: str) -> int:
        """The code of `dataset`'s background; its other codes follow without a hole."""
        self._rules(dataset)
        return self._offsets[dataset]

    def rows(self, dataset: str) -> np.ndarray:
        """`targets` of the local codes of `dataset`, (codes, targets): 1 is, 0 is not, -1 not annotated or ignored."""
        return self.targets[self.offset(dataset) :][: len(self.local_ids(dataset))]

    def ignored(self, dataset: str) -> tuple[int, ...]:
        """Local codes of `dataset` whose voxels enter no loss."""
        ids = self.local_ids(dataset)
        return tuple(ids.index(raw) for raw in self._rules(dataset).ignore)

    def label_rules(self, dataset: str) -> dict[str, Any]:
        """What decides the stored codes of `dataset` (raw ids in order, ids to ignore, ids to take as background)."""
        rules = self._rules(dataset)
        return {
            "labels": [str(raw) for raw in rules.labels],
            "ignore": list(rules.ignore),
            "others": rules.others,
        }

    def encode(self, dataset: str, raw: np.ndarray, source: str = "") -> np.ndarray:
        """Raw ids of any shape -> local codes (0 is background); add :meth:`offset` for the table-wide code.

        Raises:
            LabelError: an id that the table does not list, with the file, the id and how many voxels hold it.
        """
        ids = self.local_ids(dataset)
        if any(isinstance(raw_id, str) for raw_id in ids):
            raise LabelError(f"data set '{dataset}' names structures, not ids: merge its masks first ({source})")
        raw = np.asarray(raw)
        if raw.size and raw.min() >= 0 and raw.max() < 65536:  # counted, which is faster than sorting
            index = raw.astype(np.uint16, copy=False)
            counts = np.bincount(index.ravel())
            values = range(len(counts))
        else:
            found, index, counts = np.unique(raw, return_inverse=True, return_counts=True)
            index, values = index.reshape(raw.shape), found.tolist()
        counts = dict(zip(values, counts.tolist(), strict=True))
        unknown = {int(value): count for value, count in counts.items() if count and value not in ids}
        if unknown and self._rules(dataset).others != "background":
            shown, rest = dict(list(unknown.items())[:8]), len(unknown) - 8
            more = f" and {rest} more (an image in place of a label map?)" if rest > 0 else ""
            raise LabelError(
                f"{source or 'label map'}: holds the ids {shown}{more} (id: voxels), which the label table of data set "
                f"'{dataset}' does not list; it lists {list(ids)}. {self.advice}"
            )
        local = {value: code for code, value in enumerate(ids)}
        return np.array([local.get(value, 0) for value in counts], self.code_dtype)[index]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON from which :meth:`from_dict` builds the same table."""
        datasets = []
        for name in self.datasets:
            rules = self.label_rules(name)
            labels = {str(raw): list(names) for raw, names in self._datasets[name].labels.items()}
            more = {key: rules[key] for key in ("ignore", "others") if rules[key]}
            datasets.append({"name": name, "labels": labels, **more})
        plain = {name: {k: v for k, v in entry.items() if k != "_desc_"} for name, entry in self._entries.items()}
        return {"targets": plain, "datasets": datasets}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> LabelTable:
        """The table that :meth:`to_dict` wrote, or a whole pool file's content."""
        return cls(table["targets"], table["datasets"])

    def __repr__(self) -> str:
        return f"LabelTable({len(self.names)} targets, {len(self.datasets)} data sets, {self.num_codes} codes)"

    # ---- building ---------------------------------------------------------------------------------------------

    def _rules(self, dataset: str) -> Rules:
        if dataset not in self._datasets:
            raise LabelError(f"unknown data set '{dataset}'; the label table knows {list(self.datasets)}")
        return self._datasets[dataset]

    def _check_names(self) -> None:
        """LabelError for names that could not travel with the weights."""
        if "background" in self._entries:
            raise LabelError("'background' cannot be a target: it is what no target claims")
        wrong = [name for name in (*self.names, *self.datasets) if not is_plain_name(name)]
        if wrong:
            raise LabelError(f"{wrong} cannot be names of targets or data sets; expected {NAME_RULE}")

    def _check_targets(self) -> None:
        for name, entry in self._entries.items():
            if sum(key in entry for key in RELATIONS) > 1:
                raise LabelError(f"target '{name}' is both part_of and inside; choose one")
            seen = [name]
            while (parent := self.parent(seen[-1])) is not None:
                if parent not in self._entries:
                    near = nearest(parent, self.names)
                    raise LabelError(f"target '{seen[-1]}' refers to '{parent}', which is not among the targets{near}")
                seen.append(parent)
                if parent in seen[:-1]:
                    raise LabelError(f"targets refer to each other in a circle: {' -> '.join(seen)}")
        shown = list(self.channel_def().values())
        if len(set(shown)) < len(shown):
            raise LabelError(f'two targets have one name, or are shown under one ("display"): {sorted(shown)}')
        for dataset, rules in self._datasets.items():
            for raw, names in rules.labels.items():
                missing = [name for name in names if name not in self._entries]
                if missing:
                    near = nearest(missing[0], self.names)
                    raise LabelError(f"data set '{dataset}' maps {raw!r} to {missing}, not among the targets{near}")

    def _build_codes(self) -> None:
        codes: list[tuple[str, int | str]] = []
        self._offsets: dict[str, int] = {}
        for dataset in self._datasets:
            self._offsets[dataset] = len(codes)
            codes += [(dataset, raw) for raw in self.local_ids(dataset)]
        self.codes: tuple[tuple[str, int | str], ...] = tuple(codes)
        self.num_codes = len(codes)
        self.code_dtype = np.uint8 if self.num_codes <= 256 else np.uint16
        self.targets = np.full((self.num_codes, len(self.names)), -1, np.int8)
        for code, (dataset, raw) in enumerate(codes):
            rules = self._datasets[dataset]
            if raw in rules.ignore:
                continue
            annotated = {self.names.index(name) for name in self.annotated(dataset)}
            named = [self.names.index(name) for name in rules.labels.get(raw, ())]
            positive = {one for target in named for one in (target, *self.ancestors(target))}
            self.targets[code, sorted(annotated - self._left_open(positive))] = 0
            self.targets[code, sorted(annotated & positive)] = 1

    def _left_open(self, positive: set[int]) -> set[int]:
        """Parts of what a target lies inside, where none of them is named: a tumor of the kidney may be in either."""
        hosts = [self._entries[self.names[target]].get("inside") for target in positive]
        groups = [{self.names.index(part) for part in self._all_parts(host)} for host in hosts if host]
        return {part for group in groups if not group & positive for part in group}

    def _all_parts(self, name: str) -> list[str]:
        return [one for part in self.parts(name) for one in (part, *self._all_parts(part))]


def _dataset_rules(entry: Mapping[str, Any]) -> Rules:
    """Normalise one data set's declaration: ids as integers where they are numbers, targets as tuples."""
    name, labels = entry["name"], {}
    for raw, targets in entry["labels"].items():
        is_number = str(raw).lstrip("-").isdigit()
        if is_number and not str(raw).removeprefix("-").isdecimal():
            raise LabelError(f"data set '{name}': the raw id {str(raw)!r} is no whole number; write it like \"2\"")
        key = int(raw) if is_number else str(raw)
        if key == 0:
            if targets == "background":
                continue
            raise LabelError(f"data set '{name}': raw id 0 is the background and cannot stand for {targets!r}")
        if key in labels:
            raise LabelError(f"data set '{name}' lists the id {key} twice")
        labels[key] = (targets,) if isinstance(targets, str) else tuple(targets)
    if any(isinstance(key, str) for key in labels) and any(isinstance(key, int) for key in labels):
        raise LabelError(f"data set '{name}' mixes raw ids and structure names: {list(labels)}")
    ignore = tuple(int(raw) for raw in entry.get("ignore", ()))
    if set(ignore) & {0, *labels}:
        raise LabelError(f"data set '{name}' both uses and ignores {sorted(set(ignore) & {0, *labels})}")
    return Rules(labels, ignore, entry.get("others"))


def is_lesion(table: LabelTable, target: str) -> bool:
    """Whether a target is counted lesion by lesion: as its entry's ``"lesion"`` says, else by the end of its name."""
    return bool(table.entry(target).get("lesion", target.lower().endswith(LESION_ENDINGS)))


def as_table(table: LabelTable | Mapping[str, Any] | str | Path) -> LabelTable:
    """A label table from itself, its dict, or the path of a JSON file with ``targets`` and ``datasets``."""
    if isinstance(table, LabelTable):
        return table
    return LabelTable.from_dict(table if isinstance(table, Mapping) else read_json(table, "pool"))
