"""Label maps that a server hands in (bare ``{image, label}`` items): which targets each of them annotates.

A map that somebody corrected shows the targets that were looked at; that another is not drawn does not mean that it is
not there. So a map annotates the targets that it holds, and those that are named beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import CaseError
from ..labels import LABEL_MAP, LabelTable
from ..names import unknown_names
from .volumes import read_labels

logger = logging.getLogger(__name__)

DRAWN, ALL = "drawn", "all"


def table_with_maps(
    table: LabelTable, items: Sequence[Mapping[str, Any]], annotated: str | Sequence[str] = DRAWN
) -> LabelTable:
    """`table` with what the label map of each bare item annotates; the table itself where no item is bare.

    Where the table's only data set has other raw ids than 1..N, bare items are files of that data set.
    A target that a map does not annotate gets no gradient from it; one that it annotates and does not hold is absent.

    Args:
        table: label maps hold its values 1..N, value i + 1 for target i.
        items: of training and validation; one may name targets under "annotated", besides those that its map holds.
        annotated: "drawn": what a map holds; "all": every target; names of targets: these too, in every map.

    Raises:
        CaseError: a map that cannot be read or holds other values; a name that is no target; maps that say nothing at all.
    """
    bare = [item for item in items if "dataset" not in item] if _reads_maps(table) else []
    named = named_targets(annotated, table.names)
    maps = {}
    for item in bare:
        drawn = {*named, *named_targets(item.get("annotated", ()), table.names)}
        if len(drawn) < len(table.names):
            drawn |= set(drawn_targets(item["label"], table.names))
        maps[str(item["label"])] = tuple(name for name in table.names if name in drawn)
        if not drawn:
            logger.warning("%s: an empty label map, which says nothing as long as no target is named", item["label"])
    if bare and not any(maps.values()):
        raise CaseError(
            f"the {len(bare)} label maps hold no target at all, so there is nothing to learn from them; draw one, or name "
            "the targets that are absent where they are not drawn (annotated)"
        )
    return table.with_maps(maps) if maps else table


def _reads_maps(table: LabelTable) -> bool:
    """Whether bare items of this table are label maps: their values mean what 1..N mean."""
    bare = table.bare_dataset
    return table.local_ids(bare) == table.local_ids(LABEL_MAP) and np.array_equal(
        table.rows(bare), table.rows(LABEL_MAP)
    )


def named_targets(choice: str | Sequence[str], targets: Sequence[str]) -> tuple[str, ...]:
    """The targets that are named: none ("drawn"), "all", names in a list, or in a text with commas.

    Raises:
        CaseError: a name that is no target, with the nearest one.
    """
    names = [name.strip() for name in choice.split(",")] if isinstance(choice, str) else list(choice)
    names = [name for name in names if name not in ("", DRAWN)]
    if ALL in names:
        return tuple(targets)
    unknown = unknown_names(names, targets)
    if unknown:
        raise CaseError(f"annotated: no target named {unknown}; expected '{DRAWN}', '{ALL}' or some of {list(targets)}")
    return tuple(names)


def drawn_targets(path: str, targets: Sequence[str]) -> tuple[str, ...]:
    """The targets whose values 1..N a label map holds.

    Raises:
        CaseError: a file that cannot be read, or other values.
    """
    raw = read_labels(path)
    values = np.unique(raw.array).tolist()
    wrong = [value for value in values if not 0 <= value <= len(targets)]
    if wrong:
        raise CaseError(
            f"{raw.source}: holds the values {wrong}; expected 0 (background) to {len(targets)}, as channel_def in "
            "configs/metadata.json names them"
        )
    return tuple(targets[value - 1] for value in values if value)
