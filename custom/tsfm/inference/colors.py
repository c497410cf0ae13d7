"""The color of each target, the same in pictures and in DICOM segmentations."""

from __future__ import annotations

import itertools

from ..labels import LabelTable, is_lesion

# Far apart from each other and from gray in CIELAB; warm hues are left to the lesions.
ORGAN_COLORS = (
    "#29c2ff", "#57a51a", "#b37aff", "#1a9475", "#c2f0a3", "#1a75f0", "#d1a36b", "#1aff94", "#9429ff", "#f0b3ff",
    "#b3d147", "#1affff", "#946629", "#7566a3", "#1ab31a", "#3857ff", "#b34794", "#a3a366", "#1a75a3", "#47c275",
    "#ffd185", "#c2941a", "#a3ff1a", "#c275ff",
)  # fmt: skip

LESION_COLORS = ("#ff3333", "#ff9a1a", "#ff44cc", "#ffdd33", "#ff8080")


def is_warm(table: LabelTable, target: str) -> bool:
    """Whether a target is drawn and weighted like a lesion: declared or named so, or inside another target."""
    return is_lesion(table, target) or "inside" in table.entry(target)


def colors_of(table: LabelTable) -> dict[int, str]:
    """Label-map value -> color; lesions and what lies inside another target get the warm ones."""
    organs, warm, colors = itertools.cycle(ORGAN_COLORS), itertools.cycle(LESION_COLORS), {}
    for value, name in enumerate(table.names, start=1):
        colors[value] = next(warm if is_warm(table, name) else organs)
    return colors
