"""Weights that were trained for other targets than a pool's, scored on the pool as they are."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

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
    (a kidney, and the left one), the part. What the weights paint inside of a shared target (a tumor in a kidney) belongs to it.

    Args:
        keys: label maps.
        trained: the weights' label table.
        shared: what `shared_targets` found.
        table: the label table of the truths.
    """

    def __init__(
        self, keys: KeysCollection, trained: LabelTable, shared: Mapping[str, Sequence[str]], table: LabelTable
    ) -> None:
        super().__init__(keys)
        self.table, self.numbers = table, {}
        for dataset in table.datasets:
            own = {
                part: target + 1
                for target in table.paint_order()
                if table.names[target] in shared and table.names[target] in table.annotated(dataset)
                for part in shared[table.names[target]]
            }
            chains = [(target, *trained.ancestors(target)) for target in range(len(trained.names))]
            found = [[own[trained.names[link]] for link in chain if trained.names[link] in own] for chain in chains]
            self.numbers[dataset] = torch.tensor(
                [0, *(values[0] if values else 0 for values in found)], dtype=torch.uint8
            )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        numbers = self.numbers[data.get("dataset") or self.table.datasets[0]]
        for key in self.key_iterator(result):
            found = result[key]
            renumbered = numbers.to(found.device)[found.as_subclass(torch.Tensor).long()]
            result[key] = MetaTensor(renumbered, meta=found.meta, applied_operations=found.applied_operations)
        return result
