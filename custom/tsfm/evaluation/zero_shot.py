"""Weights that were trained for other targets than a pool's, scored on the pool as they are."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from ..labels import LabelTable


def shared_targets(
    trained: Sequence[str], table: LabelTable, unions: Mapping[str, Sequence[str]] | None = None
) -> dict[str, tuple[str, ...]]:
    """Target of `table` -> the trained targets that make it up: those of `unions`, else the one of the same name.

    Raises:
        ValueError: `unions` with a target that is not there; nothing in common.
    """
    unions = {name: tuple(parts) for name, parts in (unions or {}).items() if name in table.names}
    absent = sorted({part for parts in unions.values() for part in parts} - set(trained))
    if absent:
        raise ValueError(f"the weights were not trained for {absent}, which 'unions' names; they know {list(trained)}")
    found = {name: unions.get(name) or (name,) for name in table.names if name in unions or name in trained}
    if not found:
        raise ValueError(
            f"the weights' targets {list(trained)} have no name in common with the pool's {list(table.names)}: "
            "give 'unions', like {'kidney': ['kidney_left', 'kidney_right']}"
        )
    return found


class RenumberTargetsd(MapTransform):
    """Label maps (1, X, Y, Z) in the weights' numbers become label maps in the table's; what is not shared becomes 0.

    A case keeps the targets that its data set ("dataset" in the item) annotates; where two hold the same trained target
    (a kidney, and the left one), the later one in the table: it is the part.

    Args:
        keys: label maps.
        trained: the weights' targets, in the order of their numbers.
        shared: what `shared_targets` found.
        table: the label table of the truths.
    """

    def __init__(
        self,
        keys: KeysCollection,
        trained: Sequence[str],
        shared: Mapping[str, Sequence[str]],
        table: LabelTable,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.table, self.numbers = table, {}
        for dataset in table.datasets:
            numbers = np.zeros(len(trained) + 1, np.uint8)
            for value, name in enumerate(table.names, start=1):
                if name in shared and name in table.annotated(dataset):
                    numbers[[list(trained).index(part) + 1 for part in shared[name]]] = value
            self.numbers[dataset] = torch.from_numpy(numbers)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        numbers = self.numbers[data.get("dataset") or self.table.datasets[0]]
        for key in self.key_iterator(result):
            found = result[key]
            renumbered = numbers.to(found.device)[found.as_subclass(torch.Tensor).long()]
            if isinstance(found, MetaTensor):
                renumbered = MetaTensor(renumbered, meta=found.meta, applied_operations=found.applied_operations)
            result[key] = renumbered
        return result
