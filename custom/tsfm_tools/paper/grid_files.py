"""What a grid file says: the rows of a table, what each of them runs, its columns, and the figures in print.

``table1.json``, ``table2.json`` and ``table3.json`` beside this module are the paper's; their data sets name a pool file or
overlays of the bundles. A row runs once per data set, number of epochs and seed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tsfm.schema import KINDS, TEXT, TEXTS, FileError, check, nearest, read_json


def _list(items: Mapping[str, Any], description: str) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": items, "description": description}


def _object(description: str, required: Sequence[str], properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "description": description,
        "required": list(required),
        "additionalProperties": False,
        "properties": {**properties, "_desc_": {}},
    }


def _named(entry: Mapping[str, Any], description: str) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": entry, "description": description}


COUNTS = _list(
    {"type": "integer", "minimum": 1, "description": "a whole number from 1"}, "a list of whole numbers, like [10, 20]"
)

FIGURE = {
    "type": ["number", "array"],
    "items": {"type": ["number", "null"]},
    "description": "a figure, or one per number of epochs of the row",
}

ROW = _object(
    'an object like {"id": "nnunet", "name": "nnU-Net", "bundle": "tsfm_finetune", "datasets": [...]}',
    ["id", "name", "datasets"],
    {
        **dict.fromkeys(("id", "name", "bundle", "weights"), TEXT),
        **dict.fromkeys(("overlays", "packages", "datasets"), TEXTS),
        "epochs": COUNTS,
        "seeds": _list({"type": "integer"}, "a list of whole numbers"),
        **{key: {"type": "boolean", "description": "true or false"} for key in ("prompted", "zero_shot")},
        "options": {"type": "object", "description": "an object of ids of the bundle's train.json"},
        "paper": _named(FIGURE, "an object from columns to figures"),
    },
)

COLUMN = _object(
    'an object like {"name": "Liver: tumor", "dataset": "msd_liver", "targets": ["liver_tumor"]}',
    ["name"],
    {
        **dict.fromkeys(("name", "block", "dataset"), TEXT),
        **dict.fromkeys(("targets", "mean_of"), TEXTS),
        "epochs": COUNTS,
    },
)

DATASET = _object(
    "an object that says where a data set lies and which targets it has",
    ["name"],
    {"name": TEXT, "folder": TEXT, "pool_file": TEXT, "only": TEXTS, "overlays": TEXTS},
)

WEIGHTS = _object(
    'an object with a "file" that others publish, or the "row" that trains it', [], {"file": TEXT, "row": ROW}
)

KINDS["grid"] = _object(
    'an object with "title", "datasets", "columns" and "rows"',
    ["title", "datasets", "columns", "rows"],
    {
        "title": TEXT,
        "notes": TEXTS,
        "datasets": _named(DATASET, "an object of data sets"),
        "columns": _list(COLUMN, "a list of columns"),
        "weights": _named(WEIGHTS, "an object of weights"),
        "rows": _list(ROW, "a list of rows"),
    },
)


class Column(NamedTuple):
    """A figure per row: the mean Dice over `targets` (all, if None) of a data set, or over the columns `mean_of`."""

    name: str
    block: str
    label: str
    dataset: str | None
    epochs: int | None
    targets: tuple[str, ...] | None
    mean_of: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """One training run and its evaluation; `folder` is its name in the output folder."""

    row: Mapping[str, Any]
    dataset: str
    epochs: int | None
    seed: int
    folder: str


class Grid:
    """A table as declared.

    Args:
        content: the path of a grid file, or what such a file holds.
        bundles_dir: folder of the bundles, for the pool files that data sets name.

    Raises:
        FileError: a file that is no grid, with every place; a data set, column, or weights that are declared nowhere.
    """

    def __init__(self, content: str | os.PathLike | Mapping[str, Any], bundles_dir: str | os.PathLike) -> None:
        self.source = "the grid" if isinstance(content, Mapping) else os.fspath(content)
        if not isinstance(content, Mapping):
            content = read_json(content, "grid")
        else:
            check(content, "grid", self.source)
        self.title: str = content["title"]
        self.notes: list[str] = listed(content.get("notes", ()))
        self.datasets: dict[str, dict[str, Any]] = dict(content["datasets"])
        self.weights: dict[str, dict[str, Any]] = dict(content.get("weights", {}))
        self.rows: list[dict[str, Any]] = list(content["rows"])
        self.columns = [column for entry in content["columns"] for column in _columns(entry)]
        self.bundles_dir = Path(bundles_dir)
        self.pools = {key: self._pool(key) for key in self.datasets}
        """What the pool file of each data set holds, if it has one: with ``only``, these data sets, their targets and parents."""
        self._check(content)

    def _check(self, content: Mapping[str, Any]) -> None:
        names = [entry["name"] for entry in content["columns"]]
        rows = [*self.rows, *(entry["row"] for entry in self.weights.values() if "row" in entry)]
        for kind, found in (("column", names), ("row", [row["id"] for row in self.rows])):
            twice = sorted({name for name in found if found.count(name) > 1})
            if twice:
                raise FileError(f"{self.source}: the {kind}s {twice} are there twice")
        for row in rows:
            for kind, asked, known in (
                ("data set", row["datasets"], self.datasets),
                ("column", row.get("paper", ()), names),
                ("weights", [row["weights"]] if "weights" in row else [], self.weights),
            ):
                self._known(f"row '{row['name']}'", kind, asked, known)
            self._check_row(row, f"{self.source}: row '{row['name']}'")
        covered = {name for key in self.datasets for name in self.covers(key)}
        for entry in content["columns"]:
            if ("dataset" in entry) == ("mean_of" in entry):
                raise FileError(f"{self.source}: column '{entry['name']}' needs either a 'dataset' or 'mean_of'")
            named = (
                ("column", entry["mean_of"], names) if "mean_of" in entry else ("data set", [entry["dataset"]], covered)
            )
            self._known(f"column '{entry['name']}'", *named)
        means = {entry["name"]: set(entry.get("mean_of", ())) for entry in content["columns"]}
        for name, reached in means.items():
            while more := set().union(*(means[other] for other in reached)) - reached:
                reached |= more
            if name in reached:
                raise FileError(f"{self.source}: column '{name}' is a mean of itself")

    def _check_row(self, row: Mapping[str, Any], where: str) -> None:
        if not is_published(row) and not {"bundle", "epochs"} <= set(row):
            raise FileError(f"{where} lacks a 'bundle' or its 'epochs'")
        if is_published(row) and not all(self.pools[key] for key in row["datasets"]):
            raise FileError(f"{where} is scored by a pool's labels: its data sets need a 'pool_file'")
        if is_published(row) and "file" not in self.weights.get(row.get("weights", ""), {}):
            raise FileError(f"{where} needs 'weights' that are declared with a 'file'")
        epochs = row.get("epochs", [])
        for name, figures in row.get("paper", {}).items():
            if isinstance(figures, list) and len(figures) != len(epochs):
                raise FileError(f"{where} has {len(figures)} figures of {name} for epochs {epochs}")

    def _known(self, where: str, kind: str, asked: Sequence[str], known: Any) -> None:
        for name in asked:
            if name not in known:
                raise FileError(
                    f"{self.source}: {where} names the {kind} '{name}', which is declared nowhere{nearest(name, known)}"
                )

    def _pool(self, dataset: str) -> dict[str, Any] | None:
        entry = self.datasets[dataset]
        if "pool_file" not in entry:
            return None
        path = self.bundles_dir / entry["pool_file"]
        pool = read_json(path, "pool")
        if "only" not in entry:
            return pool
        kept = [found for found in pool["datasets"] if found["name"] in entry["only"]]
        absent = sorted(set(entry["only"]) - {found["name"] for found in kept})
        if absent:
            raise FileError(f"{self.source}: data set '{dataset}' asks for {absent}, which {path} does not hold")
        wanted = {name for found in kept for names in found["labels"].values() for name in listed(names)}
        links = ("part_of", "inside")
        while more := {pool["targets"][name].get(link) for name in wanted for link in links} - wanted - {None}:
            wanted |= more
        targets = {name: target for name, target in pool["targets"].items() if name in wanted}
        return {"targets": targets, "datasets": kept}

    def covers(self, dataset: str) -> list[str]:
        """The data sets that a run on `dataset` scores."""
        pool = self.pools[dataset]
        return [dataset] if pool is None else [entry["name"] for entry in pool["datasets"]]

    def runs(self, row: Mapping[str, Any]) -> Iterator[Run]:
        """The runs of a row, short ones first."""
        for epochs in sorted(row.get("epochs", [None]), key=lambda number: number or 0):
            for dataset in row["datasets"]:
                for seed in row.get("seeds", (0,)):
                    parts = [row["id"], dataset if len(self.datasets) > 1 else "", f"{epochs}epochs" if epochs else ""]
                    yield Run(row, dataset, epochs, seed, "-".join([*filter(None, parts), f"seed{seed}"]))

    def in_print(self, row: Mapping[str, Any], column: Column) -> float | None:
        """The paper's figure."""
        figures = row.get("paper", {}).get(column.name)
        if not isinstance(figures, list):
            return figures
        return dict(zip(row["epochs"], figures, strict=True)).get(column.epochs)


def is_published(row: Mapping[str, Any]) -> bool:
    """Whether a row's weights are taken as others published them, and nothing is trained."""
    return bool(row.get("prompted") or row.get("zero_shot"))


def _columns(entry: Mapping[str, Any]) -> Iterator[Column]:
    targets = tuple(entry["targets"]) if "targets" in entry else None
    for epochs in entry.get("epochs", [None]):
        label = f"{epochs} epochs" if epochs else entry["name"]
        block, mean_of = entry.get("block", ""), tuple(entry.get("mean_of", ()))
        yield Column(entry["name"], block, label, entry.get("dataset"), epochs, targets, mean_of)


def listed(values: Any) -> list[Any]:
    """One text or number, or several of them, as a list."""
    return [values] if isinstance(values, str | int) else list(values)
