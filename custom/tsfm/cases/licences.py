"""What the licences of data sets permit, and hence what may be done with weights that were trained on them.

A judgement by name, for choosing data; the licence's own text decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..names import plain_punctuation
from ..schema import LONGEST_NAME
from .folders import PoolError

USES = ("any", "commercial", "permissive")
"""What a run may choose data sets by: all of them; those that permit commercial use; those without share-alike too."""

NON_COMMERCIAL = r"\bNC\b|NON ?COMMERCIAL|NOT FOR COMMERCIAL|RESEARCH (ONLY|USE|PURPOSE)|ACADEMIC"

FREE = r"\bCC ?0\b|PUBLIC DOMAIN|\bCC BY( SA)?\b(?! ?(NC|ND|SA NC))|\bAPACHE\b|\bMIT\b|\bBSD\b"

NEUTRAL = (
    r"\bV?\d+(\.\d+)*\b|\b(THE|VERSION|LICEN[CS]ES?|CREATIVE COMMONS|ATTRIBUTION|SHARE ?ALIKE|INTERNATIONAL|UNPORTED|GENERIC"
    r"|UNIVERSAL|DEED|DEDICATION|CLAUSE|REPOSITORY|TCGA IMAGES)\b|[\s().:]"
)
"""What may stand beside the name of a free licence without changing what it permits."""


def licence_facts(declared: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """``{"name", "commercial", "share_alike"}`` of a licence as a pool file or a ``dataset.json`` declares it.

    `declared`: a name ("CC BY-SA 4.0"), or ``{"name", "commercial", "share_alike"}`` for terms that no name tells. True,
    False, or None where it is not known: a name with any words that are not `NEUTRAL` ("Not CC0") is not known. Of several
    licences in one text every one has to permit.
    """
    if isinstance(declared, Mapping):
        given = {key: declared.get(key) for key in ("commercial", "share_alike")}
        return {**licence_facts(declared["name"]), **{key: value for key, value in given.items() if value is not None}}
    name = plain_punctuation(declared) if isinstance(declared, str) else ""
    if not name:
        return {"name": "not declared", "commercial": None, "share_alike": None}
    text = re.sub(r"[-_\s]+", " ", str(declared).upper())
    parts = [part for part in re.split(r";|,| AND ", text) if part.strip()]
    known = all(_is_free(part) or re.search(NON_COMMERCIAL, part) for part in parts)
    commercial = False if re.search(NON_COMMERCIAL, text) else True if known else None
    share_alike = True if re.search(r"\bSA\b|SHARE ?ALIKE|\bGPL\b", text) else False if known else None
    return {"name": name, "commercial": commercial, "share_alike": share_alike}


def _is_free(part: str) -> bool:
    """Whether a text in capitals is the name of a free licence, perhaps with its version and neutral words, and no more."""
    rest, names = re.subn(FREE, " ", part)
    return names > 0 and not re.sub(NEUTRAL, "", rest)


def permits(licence: Mapping[str, Any], use: str) -> bool:
    """Whether data under `licence` (see `licence_facts`) may be used so; what is not known is not permitted.

    Raises:
        ValueError: a use that is none of `USES`.
    """
    if use not in USES:
        raise ValueError(f"licence is {use!r}; expected one of {list(USES)}")
    free = licence["commercial"] is True
    return use == "any" or (free and (use == "commercial" or licence["share_alike"] is False))


def licences_of(items: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Data set -> the facts of its licence, for the datalist items of a pool."""
    return {str(item["dataset"]): licence_facts(item.get("licence")) for item in items if "dataset" in item}


def inherited_licences(description: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Data set -> the facts of its licence, of all that weights with this description saw; it binds what is trained on."""
    known = description.get("licences", {})
    seen = description.get("trained_on") or ([] if known else ["pretrained weights"])
    return {**{name: licence_facts(None) for name in seen}, **known}


def all_licences(*seen: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Data set -> the facts of its licence, of several such; one that is there twice permits what both permit.

    So weights stay bound by what they saw, also where a data set of the same name is free.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, licence in (pair for licences in seen for pair in licences.items()):
        found[name] = _both(found[name], licence) if name in found else dict(licence)
    return found


def _both(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of two licences that bind the same weights; their names beside each other, if there is room."""
    names = first["name"].split(" and ")
    joined = " and ".join([*names, *(name for name in second["name"].split(" and ") if name not in names)])
    stricter = min(first, second, key=lambda one: _order(one["commercial"]))
    return {
        "name": joined if len(joined) <= LONGEST_NAME else stricter["name"],
        "commercial": stricter["commercial"],
        "share_alike": max(first["share_alike"], second["share_alike"], key=_order),
    }


def _order(fact: bool | None) -> int:
    return (False, None, True).index(fact)


def check_weights(source: Any, description: Mapping[str, Any], use: str, without: str) -> None:
    """Raise a PoolError unless the weights in `source` saw only data that permit the use; `without` says how to do without."""
    licences = inherited_licences(description)
    if not all(permits(one, use) for one in licences.values()):
        raise PoolError(
            f"{source}: these weights are not known to permit {use} use. {weights_terms(licences)} Give others, or train "
            f"from nothing ({without})"
        )


def weights_terms(licences: Mapping[str, Mapping[str, Any]]) -> str:
    """What weights that saw these data sets inherit from them, in a sentence or two."""
    if not licences:
        return "The data sets of these weights, and so their licences, are not known."
    groups = {
        "commercial use is excluded by": [name for name, one in licences.items() if one["commercial"] is False],
        "commercial use is not known to be permitted by": [
            name for name, one in licences.items() if one["commercial"] is None
        ],
        "the same licence (share-alike) is asked for by": [
            name for name, one in licences.items() if one["share_alike"]
        ],
    }
    found = "; ".join(f"{what} {', '.join(names)}" for what, names in groups.items() if names)
    if not found:
        return "All data sets permit commercial use and none asks for the same licence."
    return f"{found[0].upper()}{found[1:]}."


def licence_list(licences: Mapping[str, Mapping[str, Any]]) -> str:
    """``data_license.txt`` of weights that saw these data sets."""
    lines = [f"- {name}: {one['name']}" for name, one in sorted(licences.items())]
    head = "The weights of this release were trained on these data sets, whose licences they may be bound by:"
    return "\n".join([head, "", *lines, "", weights_terms(licences), "No data is part of this bundle."]) + "\n"
