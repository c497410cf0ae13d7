"""A word of doubt about one image: how far the versions of a network agree, and how sure their mean is.

The versions are mirrored windows, several folds, or both; windows that overlap count as often as they cover a voxel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..preparation.resampling import label_box
from .painting import Slab, highest_logits


class Quality:
    """Collects, for one image, what `report` says of each target.

    ``agreement`` is the Dice of two versions, over all pairs of versions together: 2 sum |A and B| / sum (|A| + |B|). With
    n of K versions painting a voxel that is sum n (n - 1) / ((K - 1) sum n), so counting is enough. None with one version.
    ``entropy`` is the mean binary entropy in bits of the averaged probability, over the voxels where the target exceeds its
    threshold; of a softmax network against the background. Targets that no version paints are left out.

    Args:
        targets: target -> (number among the network's outputs, number among a slab's channels).
        levels: target -> threshold as a logit.
        exclusive: softmax: the largest output wins, channel 0 of both is the background.
        box: the part (S, P, L) of every window that lies in the image; the rest is padding, and counts nowhere.
    """

    def __init__(
        self,
        targets: Mapping[str, tuple[int, int]],
        levels: Mapping[str, float],
        exclusive: bool = False,
        box: Sequence[slice] = (slice(None),) * 3,
    ) -> None:
        self.targets, self.levels, self.exclusive, self.box = dict(targets), levels, exclusive, tuple(box)
        self.pairs = {name: [0, 0] for name in targets}  # sum n (n - 1), sum (K - 1) n
        self.bits = {name: [0.0, 0] for name in targets}
        self._votes: dict[str, Tensor] = {}
        self._winners: list[Tensor] = []
        self._done = 0

    def watch(self, number: int, count: int, logits: Tensor) -> None:
        """Take in what version `number` of `count` says of some windows: (B, T, S, P, L); 0 begins them, perhaps again."""
        if count == 1:
            return
        logits = logits[(slice(None), slice(None), *self.box)]
        if number == 0:
            self._votes, self._winners = {}, []
        if self.exclusive:
            self._winners.append(logits.argmax(1).to(torch.int16))
        else:
            for name, (output, _) in self.targets.items():
                votes = (logits[:, output] > self.levels[name]).to(torch.uint8)
                self._votes[name] = self._votes[name].add_(votes) if number else votes
            self._versions = count

    def keep(self) -> None:
        """Count the windows whose last version was seen: all or, where memory runs out, none."""
        for name, (shared, possible) in (self._of_winners() if self._winners else self._of_votes()).items():
            self.pairs[name][0] += shared
            self.pairs[name][1] += possible
        self._votes, self._winners = {}, []

    def _of_votes(self) -> dict[str, tuple[int, int]]:
        """Target -> sum n (n - 1) and (K - 1) sum n over the windows; n of K versions paint a voxel."""
        found = {}
        for name, votes in self._votes.items():
            voxels = torch.bincount(votes.flatten(), minlength=self._versions + 1).cpu()
            n = torch.arange(len(voxels))
            found[name] = int((n * (n - 1) * voxels).sum()), int((self._versions - 1) * (n * voxels).sum())
        return found

    def _of_winners(self) -> dict[str, tuple[int, int]]:
        """The same of a softmax, for all its targets at once: pairs of versions are few, its outputs may be a hundred."""
        size, others = 1 + max(output for output, _ in self.targets.values()), len(self._winners) - 1

        def histogram(winners: Tensor) -> Tensor:
            return torch.bincount(winners.flatten(), minlength=size)[:size]

        shared = 2 * sum(histogram(a[a == b]) for a, b in itertools.combinations(self._winners, 2))
        possible = others * sum(map(histogram, self._winners))
        return {name: (int(shared[output]), int(possible[output])) for name, (output, _) in self.targets.items()}

    def see(self, slab: Slab) -> None:
        """Take in averaged logits; the first slices may have come before. All or, where memory runs out, nothing counts."""
        logits, seen = slab.logits[:, max(self._done - slab.start, 0) :], {}
        peaks = highest_logits(logits, self.exclusive)
        for name, (_, channel) in self.targets.items():
            level = 0.0 if self.exclusive else self.levels[name]
            box = label_box((peaks[channel] > level).cpu().numpy())
            if box is None:
                continue
            where = (slice(None), *(slice(*side) for side in box))  # to look at a target everywhere takes long
            found = logits[channel][where].float()
            found = found - logits[0][where].float() if self.exclusive else found
            found = found[found > level]
            seen[name] = float(binary_entropy(found).sum()), found.numel()
        for name, (bits, voxels) in seen.items():
            self.bits[name] = [self.bits[name][0] + bits, self.bits[name][1] + voxels]
        self._done = slab.stop

    def report(self) -> dict[str, dict[str, float | None]]:
        """Target -> ``agreement`` and ``entropy``."""
        result = {}
        for name, (shared, possible) in self.pairs.items():
            bits, voxels = self.bits[name]
            if possible or voxels:
                agreement = shared / possible if possible else None
                result[name] = {"agreement": agreement, "entropy": bits / voxels if voxels else 1.0}
        return result


def binary_entropy(logits: Tensor) -> Tensor:
    """Entropy in bits of the probabilities that logits stand for."""
    return (softplus(logits) - torch.sigmoid(logits) * logits) / math.log(2)


def doubt(report: Mapping[str, Mapping[str, Any]]) -> float:
    """One number for a case, the larger the more doubtful: 1 - mean agreement, or mean entropy where there is one version.

    Of the targets that some version paints, even where their mean does not; 0 where none does.
    """
    rows = list(report.values())
    if not rows:
        return 0.0
    if any(row["agreement"] is None for row in rows):
        return sum(row["entropy"] for row in rows) / len(rows)
    return 1 - sum(row["agreement"] for row in rows) / len(rows)
