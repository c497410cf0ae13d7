"""What the audit says: findings, and the numbers from which on something is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SEVERITIES = ("error", "warning", "note")

FEW = 8
"""Cases below which a data set says nothing about what is usual in it."""


@dataclass
class Finding:
    """One suspicion: its `kind` (a heading of the page), how bad it is, where, and what to do about it.

    cases: keys (data set, case) of those it is about. place: a voxel (S, P, L) of the first one's picture.
    """

    kind: str
    severity: str
    message: str
    dataset: str = ""
    cases: list[tuple[str, str]] = field(default_factory=list)
    target: str = ""
    place: Sequence[int] | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)


def robust_z(values: Sequence[float], floor: float) -> np.ndarray:
    """How far each value lies from the median, in standard deviations estimated from the middle half, at least `floor`."""
    values = np.asarray(values, float)
    low, middle, high = np.percentile(values, (25, 50, 75))
    return (values - middle) / max((high - low) / 1.349, floor)
