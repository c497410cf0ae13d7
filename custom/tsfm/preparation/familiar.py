"""Simple statistics of prepared images: what weights have seen travels with them, so that a case far from it is named.

They tell a head from a torso, a field of view or voxels of another kind, and intensities that no training image had. That a
case passes does not say that the weights suit it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..names import modality_name

FEATURES = {
    **{f"extent_{axis}": f"mm along {axis}" for axis in "SPL"},
    **{f"voxel_{axis}": f"mm of voxel along {axis}" for axis in "SPL"},
    **{f"p{share}": f"as the {share}th percentile of its prepared intensities" for share in (5, 50, 95)},
}
"""Name of a statistic -> what its number is. Lengths are the field of view (without empty borders) and the file's own voxels."""

VOXELS = 200_000
"""About how many voxels percentiles are taken from."""


def features(image: np.ndarray, grid: Mapping[str, Any]) -> dict[str, float]:
    """The statistics of a prepared image (C, S, P, L); `grid` has the sides in mm before and after resampling.

    Percentiles are of the first channel.
    """
    found = {}
    for number, axis in enumerate("SPL"):
        found[f"extent_{axis}"] = float(image.shape[1 + number] * grid["spacing_mm"][number])
        found[f"voxel_{axis}"] = float(grid["source_spacing_mm"][number])
    step = max(1, round((image[0].size / VOXELS) ** (1 / 3)))
    shares = np.percentile(image[0][::step, ::step, ::step], (5, 50, 95))
    return found | {f"p{share}": float(value) for share, value in zip((5, 50, 95), shares, strict=True)}


def ranges(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Smallest and largest of each statistic, to four digits."""
    return {name: [float(f"{edge(row[name] for row in rows):.4g}") for edge in (min, max)] for name in FEATURES if rows}


def together(sides: Iterable[Mapping[str, Mapping[str, Sequence[float]]]]) -> dict[str, dict[str, list[float]]]:
    """What several weights or trainings have seen as one: of each modality's statistics the smallest and the largest."""
    known: dict[str, dict[str, list[float]]] = {}
    for side in sides:
        for modality, statistics in side.items():
            found = known.setdefault(modality, {})
            for name, (low, high) in statistics.items():
                lowest, highest = found.get(name, (low, high))
                found[name] = [min(low, lowest), max(high, highest)]
    return known


def unfamiliar(seen: Mapping[str, Sequence[float]], found: Mapping[str, float]) -> list[str]:
    """What of `found` lies far outside of what was `seen`, as sentences.

    Far is half the range beyond its ends; lengths moreover by a third, intensities by half a standard deviation.
    """
    lines = []
    for name, (low, high) in seen.items():
        if name not in found or name not in FEATURES:
            continue
        room = (high - low) / 2
        lower, upper = low - room - 0.5, high + room + 0.5
        if not name.startswith("p"):
            lower, upper = min(low - room, low / 1.33), max(high + room, high * 1.33)
        if not lower <= found[name] <= upper:
            lines.append(f"{found[name]:.3g} {FEATURES[name]}; the weights saw {low:.3g} to {high:.3g}")
    return lines


class Familiar:
    """Asks of each prepared image whether weights have seen its like.

    Args:
        known: modality -> statistic -> (smallest, largest), as weights carry it; None or nothing: nothing is known.
        modality: of all images; None: what the item says, else `default`.
        default: modality of items that name none.
    """

    def __init__(
        self, known: Mapping[str, Any] | None = None, modality: str | None = None, default: str = "CT"
    ) -> None:
        self.known, self.modality, self.default = dict(known or {}), modality, default

    def warnings(self, image: np.ndarray, grid: Mapping[str, Any], modality: str | None = None) -> list[str]:
        """Sentences for a person; empty where the image is like those of the training, or nothing is known."""
        if not self.known:
            return []
        given = self.modality or modality
        modality = modality_name(given) if given else self.default
        if modality not in self.known:
            return [f"it is {modality}; the weights saw {', '.join(sorted(self.known))}"]
        return unfamiliar(self.known[modality], features(image, grid))
