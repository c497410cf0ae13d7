"""What was computed of an image's windows, kept between requests: a server builds a new inferer for each.

It belongs to a network object and goes with it; a key says for which image, weights and settings it holds.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .windows import LARGEST

_LOCK = threading.Lock()


class KeptWindows:
    """Logits of one image's windows, float16 on the processor. `room` is what is free of the memory for all images."""

    def __init__(self, room: list[int] | None = None) -> None:
        self.values: dict[Hashable, tuple[Hashable, torch.Tensor]] = {}
        self.bytes, self.room = 0, room or [0]

    def get(self, corner: Hashable, target: int | None, clicks: Hashable) -> torch.Tensor | None:
        """The logits of the window at `corner` for `target` (None: all) with these clicks, or None."""
        known = self.values.get((corner, target))
        return known[1] if known is not None and known[0] == clicks else None

    def put(self, corner: Hashable, target: int | None, clicks: Hashable, logits: torch.Tensor) -> torch.Tensor:
        """`logits` as they are kept, in place of those with other clicks; where there is no room they are only returned."""
        value = logits.float().clamp(-LARGEST, LARGEST).to("cpu", torch.float16, copy=True).contiguous()
        with _LOCK:
            if before := self.values.pop((corner, target), None):
                self._count(-before[1].nbytes)
            if value.nbytes <= self.room[0]:
                self.values[corner, target] = (clicks, value)
                self._count(value.nbytes)
        return value

    def _count(self, more: int) -> None:
        self.bytes += more
        self.room[0] -= more


class _Images:
    """The images of one network, the last one used last; `room` is shared by them."""

    def __init__(self, limit: int) -> None:
        self.limit, self.room = limit, [limit]
        self.by_key: OrderedDict[Hashable, KeptWindows] = OrderedDict()

    def of(self, key: Hashable) -> KeptWindows:
        """What is kept of one image; for a new one the oldest go until half of the room is free."""
        with _LOCK:
            if key not in self.by_key:
                while self.by_key and self.room[0] < self.limit // 2:
                    _, old = self.by_key.popitem(last=False)
                    self.room[0] += old.bytes
                    old.room = [0]  # whoever still computes it keeps nothing more
                self.by_key[key] = KeptWindows(self.room)
            self.by_key.move_to_end(key)
            return self.by_key[key]


_KEPT: WeakKeyDictionary[nn.Module, _Images] = WeakKeyDictionary()


def kept_windows(image: torch.Tensor, network: Any, settings: Hashable, limit: int) -> KeptWindows:
    """What is kept of `image` (C, S, P, L) for this network, its present weights and `settings`, in `limit` bytes for all.

    The image is known by its values, so that a file that was replaced is another image.
    """
    if limit <= 0 or not isinstance(network, nn.Module):
        return KeptWindows()
    images = _KEPT.get(network)
    if images is None or images.limit != limit:
        images = _KEPT[network] = _Images(limit)
    content = hashlib.blake2b(image.detach().cpu().contiguous().numpy(), digest_size=16).hexdigest()
    weights = tuple(0 if value.is_inference() else value._version for value in network.parameters())
    return images.of((content, tuple(image.shape), hash(weights), repr(settings)))
