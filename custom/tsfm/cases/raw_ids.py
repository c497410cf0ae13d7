"""Label maps in the ids of one data set: the way back from targets to what its own files hold."""

from __future__ import annotations

import numpy as np
import torch
from monai.data import MetaTensor

from ..labels import LabelError, LabelTable


def raw_values(table: LabelTable, dataset: str) -> dict[int, int]:
    """Label-map value -> raw id of `dataset`, for the values that one of its ids stands for.

    A value stands for its target and all that contain it; the id stands for the same among those that `dataset`
    annotates, as far as the id says it (of several such ids the first).

    Raises:
        LabelError: a data set that the table does not know, or that names structures instead of ids.
    """
    ids, known = table.local_ids(dataset), [table.names.index(name) for name in table.annotated(dataset)]
    if any(isinstance(raw, str) for raw in ids):
        raise LabelError(f"data set '{dataset}' names structures, not ids: its label maps have no raw ids")
    member, found = table.map_membership()[:, known], {}
    rows = table.rows(dataset)[:, known]
    for value in range(1, len(table.names) + 1):
        same = np.flatnonzero(((rows == member[value]) | (rows < 0)).all(1) & (rows == 1).any(1))
        if member[value].any() and same.size:
            found[value] = int(ids[same[0]])
    return found


def from_raw_ids(array: np.ndarray, table: LabelTable, dataset: str) -> np.ndarray:
    """Label-map values of a map in the raw ids of `dataset`, the way back from `in_raw_ids`; other ids become 0.

    Of several values with one id that comes back which says the least: a kidney, not the left one; of several such the first.
    """
    values, claims = np.zeros(np.shape(array), np.min_scalar_type(len(table.names))), table.map_membership().sum(1)
    for value, raw in sorted(raw_values(table, dataset).items(), key=lambda pair: (-claims[pair[0]], -pair[0])):
        values[array == raw] = value
    return values


def in_raw_ids(label_map: torch.Tensor, table: LabelTable, dataset: str) -> torch.Tensor:
    """A label map in the raw ids of `dataset`, with the smallest type that holds them; other values become 0."""
    ids = raw_values(table, dataset)
    kind = np.result_type(*map(np.min_scalar_type, [*ids.values(), 0]))
    kind = {np.dtype(np.uint8): torch.uint8, np.dtype(np.int8): torch.int16}.get(kind, torch.int32)
    lookup = torch.zeros(len(table.names) + 1, dtype=kind)
    lookup[list(ids)] = torch.tensor(list(ids.values()), dtype=kind)
    found = lookup[label_map.detach().cpu().as_subclass(torch.Tensor).long()]
    return MetaTensor(found, meta=label_map.meta) if isinstance(label_map, MetaTensor) else found
