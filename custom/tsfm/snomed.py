"""Codes of SNOMED CT, which DICOM names targets by: enters a text, leaves whether it is one. It knows no terms, only the
check digit that every code ends in."""

from __future__ import annotations

from typing import Any

TURN = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)
"""Verhoeff's permutation: a digit is turned once per place."""


def is_snomed(text: Any) -> bool:
    """Whether `text` is a code, right by its check digit (Verhoeff's), a space and a meaning: "10200004 Liver"."""
    code, _, meaning = str(text).partition(" ")
    check = 0
    for place, digit in enumerate(reversed(code) if code.isdecimal() and meaning else "1"):
        value = int(digit)
        for _ in range(place % 8):
            value = TURN[value]
        check = (check + (value if check < 5 else -value)) % 5 + 5 * ((check < 5) != (value < 5))
    return check == 0
