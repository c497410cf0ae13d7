"""What a training has seen of images, for the weights to carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ignite.engine import Engine, Events
from torch import nn

from ..patches.store import CaseStore
from ..preparation.familiar import features, ranges, together
from .run_state import unwrap

LIMIT = 64
"""Cases per modality that are looked at, evenly among the training's: a minute at most for large CTs."""


class DescribeImages:
    """Handler: when the run starts, writes the ranges of the training images' statistics into the network's description.

    They replace those of the weights that a run starts from: a fine-tuned network knows its own data, prepared by its own
    rules. Where the description has some by then (`describe_network`: label maps from a server go on from weights for the same
    targets), theirs are widened; weights that know nothing of what they saw stay so, since a few cases would not stand for it.

    The rest of the description is that of this run again, if a handler before this one loaded weights with theirs (MONAI Label's
    `CheckpointLoader`).

    Args:
        network: its description is completed (``familiar``).
        store: the prepared cases.
        items: the training items.
    """

    def __init__(self, network: nn.Module, store: CaseStore, items: Sequence[Mapping[str, Any]]) -> None:
        self.network, self.store, self.items = network, store, list(items)
        self.description = dict(unwrap(network).description)

    def attach(self, engine: Engine) -> None:
        """Connect to the trainer."""
        engine.add_event_handler(Events.STARTED, self.describe)

    def describe(self, engine: Any = None) -> None:
        """Modality -> statistic -> smallest and largest."""
        default = self.store.preparation.default_modality
        kinds: dict[str, list[Mapping[str, Any]]] = {}
        for item in self.items:
            kinds.setdefault(item.get("modality") or default, []).append(item)
        familiar = {
            modality: ranges([self._features(item) for item in items[:: -(-len(items) // LIMIT)]])
            for modality, items in sorted(kinds.items())
        }
        before = self.description.get("familiar")
        if before is not None:
            familiar = together((before, familiar)) if before else {}
        network = unwrap(self.network)
        network.description = {**self.description, "network": network.description["network"], "familiar": familiar}

    def _features(self, item: Mapping[str, Any]) -> dict[str, float]:
        case = self.store.open(item)
        return features(case.read_image(), case.properties)
