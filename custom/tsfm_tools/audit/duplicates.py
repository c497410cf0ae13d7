"""Which images show the same scan: landmarks that agree, and agree on how one image lies in the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .signature import GRIDS_MM, SIDE

ALIKE = 0.98
"""Correlation of two descriptors from which on they may be the same place."""

AGREEING = 11
"""Landmarks of one image that have to lie in the other where one turn by right angles and a shift puts them. Of 27,966
pairs of different CT and MR scans 6 agreed at most, of 155 of 156 copies that were resampled or turned 13 or more."""

TURNED_SHARE = 0.2
"""Share of the landmarks of the image with fewer that have to agree where the axes differ: bodies are nearly symmetric."""

APART_VOXELS = 1.0
"""How far from there they may lie, in voxels of their grid."""

BLOCK = 4096, 16384  # descriptors that are compared at once: 268 MB


@dataclass(frozen=True)
class Pair:
    """Two images of one scan: indices, agreeing landmarks, and how the second's axes run along the first's.

    turned: (axes, signs) as in `signature.canonical`; (0, 1, 2, 1, 1, 1) is the same orientation.
    """

    first: int
    second: int
    agreeing: int
    turned: tuple[int, ...]

    @property
    def same_orientation(self) -> bool:
        return self.turned == (0, 1, 2, 1, 1, 1)


def find_pairs(signatures: Sequence[Mapping[str, np.ndarray]]) -> list[Pair]:
    """All pairs of images, each given as `signature.describe_image` does, that show the same scan."""
    pairs = {}
    for grid, side_mm in enumerate(GRIDS_MM):
        for pair in _pairs_on(signatures, grid, APART_VOXELS * side_mm):
            known = pairs.get((pair.first, pair.second))
            if known is None or known.agreeing < pair.agreeing:
                pairs[pair.first, pair.second] = pair
    return sorted(pairs.values(), key=lambda pair: (pair.first, pair.second))


def _pairs_on(signatures: Sequence[Mapping[str, np.ndarray]], grid: int, apart_mm: float) -> list[Pair]:
    rows = [np.flatnonzero(one["grids"] == grid) for one in signatures]
    owner = np.concatenate([np.zeros(0, int), *(np.full(len(chosen), i) for i, chosen in enumerate(rows))])
    if not len(owner):
        return []
    parts: dict[str, np.ndarray] = {}
    for key in ("descriptors", "turns", "places_mm"):
        parts[key] = np.concatenate([one[key][chosen] for one, chosen in zip(signatures, rows, strict=True)])
    descriptors = parts["descriptors"].reshape(-1, SIDE**3).astype(np.float32)
    descriptors /= np.maximum(np.linalg.norm(descriptors, axis=1, keepdims=True), 1e-9)
    matches: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for row in range(0, len(owner), BLOCK[0]):
        for column in range(row - row % BLOCK[1], len(owner), BLOCK[1]):
            alike = descriptors[row : row + BLOCK[0]] @ descriptors[column : column + BLOCK[1]].T > ALIKE
            a, b = np.nonzero(alike)
            other = owner[a + row] < owner[b + column]
            for link in zip((a[other] + row).tolist(), (b[other] + column).tolist(), strict=True):
                matches[int(owner[link[0]]), int(owner[link[1]])].append(link)
    found = []
    for (first, second), links in matches.items():
        if len(links) >= AGREEING:
            turned, agreeing = _agreement(np.array(links), parts["turns"], parts["places_mm"], apart_mm)
            pair = Pair(first, second, agreeing, turned or ())
            least = 0 if pair.same_orientation else TURNED_SHARE * min(len(rows[first]), len(rows[second]))
            if agreeing >= max(AGREEING, least):
                found.append(pair)
    return found


def _agreement(links: np.ndarray, turns: np.ndarray, places_mm: np.ndarray, apart_mm: float) -> tuple[Any, int]:
    """The turn and shift that most of the links agree on, and how many landmarks of the first image do."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, (a, b) in enumerate(links):
        groups[_between(turns[a], turns[b])].append(number)
    best: tuple[Any, int] = (None, 0)
    for turned, numbers in groups.items():
        if len(numbers) <= best[1]:
            continue
        a, b = links[numbers].T
        axes, signs = np.array(turned[:3]), np.array(turned[3:])
        shift = places_mm[b] - places_mm[a][:, axes] * signs
        near = (np.abs(shift[:, None] - shift[None]) <= apart_mm).all(-1)
        chosen = near[np.argmax(near.sum(1))]
        agreeing = min(len(set(a[chosen])), len(set(b[chosen])))
        if agreeing > best[1]:
            best = turned, agreeing
    return best


def _between(first: np.ndarray, second: np.ndarray) -> tuple[int, ...]:
    """The turn from the first image to the second where one place has these two canonical turns."""
    axes, signs = np.zeros(3, int), np.zeros(3, int)
    for place in range(3):
        axes[second[place]] = first[place]
        signs[second[place]] = first[3 + place] * second[3 + place]
    return (*axes.tolist(), *signs.tolist())
