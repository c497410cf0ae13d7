"""Names that are told apart and stay legible: targets, cases, and the kinds of images."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from .schema import LONGEST_NAME, PUNCTUATION, FileError, nearest

MODALITY_WORDS = {
    "CT": {"ct", "cect", "ncct", "cta", "ldct", "cbct", "computed"},
    "MR": {
        "mr", "mri", "mra", "magnetic", "t1", "t1w", "t1c", "t1ce", "t1wce", "t1gd", "t1n", "t2", "t2w", "t2f", "t2s", "flair",
        "dwi", "adc", "dce", "swi", "pd", "pdw", "dixon", "gd",
    },
    "PET": {"pet", "pt", "fdg", "suv", "positron"},
    "US": {"us", "ultrasound", "sonography"},
}  # fmt: skip
"""Words by which a modality is recognised; CT is normalized as Hounsfield units, everything else by z-score."""


def plain_name(name: str) -> str:
    """Lower case with underscores, letters and digits of any script kept; a sign at the end is spelled out (``ER+``)."""
    text = unicodedata.normalize("NFKC", str(name)).lower().strip()
    text = re.sub(r"[+\u207a]$", " plus", re.sub(r"(?<=\w)[-\u2212\u207b]$", " minus", text))
    kept = (letter if letter.isalnum() or unicodedata.category(letter)[0] == "M" else " " for letter in text)
    return "_".join("".join(kept).split())


def plain_names(names: Mapping[str, str], source: str) -> dict[str, str]:
    """Key -> plain name, for the names that a file declares.

    Raises:
        FileError: names that are no text, names of which nothing is left, or that become one; all listed.
    """
    odd = {key: name for key, name in names.items() if not isinstance(name, str)}
    if odd:
        raise FileError(f"{source}: the labels {odd} are no names; expected texts")
    plain = {key: plain_name(name) for key, name in names.items()}
    empty = [str(names[key]) for key, name in plain.items() if not name]
    groups: dict[str, set[str]] = {}
    for key, name in plain.items():
        groups.setdefault(name, set()).add(str(names[key]))
    shared = [f"{sorted(group)} all become '{name}'" for name, group in groups.items() if name and len(group) > 1]
    if empty or shared:
        problems = [f"{empty} have no letter or digit"] * bool(empty) + shared
        raise FileError(
            f"{source}: {'; '.join(problems)}: give them names that differ (in the file, or with label_ids)"
        )
    return plain


def case_names(names: Sequence[str], paths: Sequence[str]) -> list[str]:
    """`names` made unique: those that are there several times get the folders of their relative `paths` in front.

    What is still shared is numbered in order, by numbers that no other name has.
    """
    counts, result = Counter(names), list(names)
    for i, path in enumerate(paths):
        if counts[names[i]] > 1:
            folders = os.path.dirname(path).replace(os.sep, "/").split("/")
            result[i] = "_".join([*(part for part in folders if part not in (".", "..", "")), names[i]])
    seen: set[str] = set()
    taken = set(result)
    for i, name in enumerate(result):
        if name in seen:
            result[i] = next(f"{name}_{n}" for n in range(2, len(result) + 2) if f"{name}_{n}" not in taken)
            taken.add(result[i])
        seen.add(name)
    return result


@lru_cache(maxsize=1024)
def modality_name(text: str, source: str = "") -> str:
    """``CT``, ``MR``, ``PET`` or ``US`` for what people write ("ct", "CT scan", "MRI", "T1w").

    Raises:
        FileError: anything else, with the nearest known word.
    """
    words = re.findall(r"[^\W_]+", str(text).lower())
    kinds = {kind for kind, known in MODALITY_WORDS.items() if known.intersection(words)}
    if len(kinds) == 1:
        return kinds.pop()
    where = f"{source}: " if source else ""
    if kinds:
        raise FileError(f"{where}modality {text!r} names several of {list(MODALITY_WORDS)}: give one")
    nearby = nearest(str(text).upper(), [*MODALITY_WORDS, "MRI"], 0.5)
    raise FileError(f"{where}modality {text!r} is unknown{nearby}; known: {list(MODALITY_WORDS)}")


def counted(number: int, noun: str) -> str:
    """A number of things: ``1 case``, ``2 cases``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(texts: Iterable[object], most: int = 10, between: str = ", ") -> str:
    """Texts in one, after `most` of them how many more there are: ``a, b, and 3 more``."""
    texts = list(map(str, texts))
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return between.join([*texts[:most], *more])


def unknown_names(names: Iterable[str], known: Iterable[str]) -> str:
    """The names that are not `known`, each with the nearest known one; empty where there are none."""
    known = list(known)
    return ", ".join(f"'{name}'{nearest(name, known)}" for name in names if name not in set(known))


def plain_punctuation(text: str) -> str:
    """A text as a name that may travel with weights: signs outside the allowed alphabet become commas, at most 100 letters."""
    kept = "".join(c if c.isalnum() or c in PUNCTUATION or unicodedata.category(c)[0] == "M" else "," for c in text)
    return " ".join(kept.split()).lstrip(PUNCTUATION)[:LONGEST_NAME].rstrip(" ,")
