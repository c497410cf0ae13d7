"""What users write in JSON, checked when it is read: one schema per kind of file, and names of an allowed alphabet.

Kinds: ``pool`` (a pool file), ``dataset.json`` (Medical Segmentation Decathlon or nnU-Net), ``datalist`` (images to
segment), ``splits`` (folds). An error names the file, every place in it, what is there, what was expected, and for a
mistyped key the nearest known one.
"""

from __future__ import annotations

import difflib
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from .snomed import is_snomed

PUNCTUATION = " _.,+-()&'"

LONGEST_NAME = 100

NAME_RULE = (
    f"a name: up to {LONGEST_NAME} letters and digits of any script and of {PUNCTUATION!r}, a letter or digit first"
)

SHOWN = 10  # problems that one message lists


class FileError(ValueError):
    """A JSON file that cannot be read or does not hold what it should."""


def is_plain_name(text: Any) -> bool:
    """Whether `text` is a name by `NAME_RULE`: nothing that a config, a table or a path could take for more than text."""
    if not isinstance(text, str) or not 0 < len(text) <= LONGEST_NAME or not text[0].isalnum():
        return False
    return all(letter.isalnum() or letter in PUNCTUATION or unicodedata.category(letter)[0] == "M" for letter in text)


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`` (did you mean 'x'?)``, or nothing where no known word is near."""
    close = difflib.get_close_matches(str(word), [str(name) for name in known], 1, cutoff)
    return f" (did you mean '{close[0]}'?)" if close else ""


def read_json(path: str | os.PathLike, kind: str | None = None, error: type[ValueError] = FileError) -> Any:
    """The content of a JSON file in UTF-8, with or without a byte order mark, checked where a `kind` is given.

    Raises:
        error: no such file, not JSON, a key that is there twice, or what `check` finds; always with the file's path.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file, object_pairs_hook=_without_repeats)
    except FileNotFoundError:
        raise error(f"file {os.path.abspath(path)} does not exist") from None
    except OSError as reason:
        raise error(
            f"{os.path.abspath(path)} cannot be read ({reason.strerror}): give a file that you may read"
        ) from None
    except UnicodeDecodeError as reason:
        raise error(f"{path} is not text in UTF-8 ({reason}): save it as UTF-8") from None
    except json.JSONDecodeError as reason:
        raise error(f"{path} is not valid JSON: {reason}; correct it there, or put a whole copy in its place") from None
    except RecursionError:
        raise error(
            f"{path} is not valid here: it is nested too deeply; check that it is the file that is meant"
        ) from None
    except ValueError as reason:  # a key that is there twice
        raise error(f"{path}: {reason}") from None
    if kind is not None:
        check(content, kind, os.fspath(path), error)
    return content


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(
            f"the keys {repeated} are there twice in one place; JSON readers keep the last one only: leave out the others"
        )
    return content


def check(content: Any, kind: str, source: str, error: type[ValueError] = FileError) -> None:
    """Hold `content` against the schema of its `kind`.

    Raises:
        error: everything that is wrong, each with its place.
    """
    plain = json.loads(json.dumps(content, default=os.fspath))  # tuples are lists, ids are strings
    found = _validator(kind).iter_errors(plain)
    problems = list(dict.fromkeys(text for one in found for text in _problem(one, plain)))
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise error(f"{source}: " + "; ".join([*problems[:SHOWN], *more]))


def _problem(error: Any, content: Any) -> Iterator[str]:
    place = _place(list(error.absolute_path), content)
    colon = f"{place}: " if place else ""
    if error.validator == "additionalProperties" and isinstance(error.instance, Mapping):
        known = sorted(error.schema["properties"])
        unknown = sorted(set(error.instance) - set(known))
        named = ", ".join(f"'{key}'{nearest(key, known)}" for key in unknown)
        yield f"{colon}unknown fields {named}; known: {known}"
    elif error.validator == "required":
        yield f"{colon}lacks {[key for key in error.schema['required'] if key not in error.instance]}"
    elif error.validator == "mistyped":
        yield f"{colon}{error.message}"
    elif error.validator == "format" and "description" not in error.schema:  # a key
        yield f"{colon}{error.instance!r} is not {NAME_RULE}"
    else:
        shown = json.dumps(error.instance, ensure_ascii=False)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        yield f"{place or 'the file'} is {shown}, expected {error.schema.get('description', error.message)}"


def _place(path: list[Any], content: Any) -> str:
    """``data set 'a', labels, '3'`` for a path into a pool file; indices count from 0."""
    words: list[str] = []
    for depth, step in enumerate(path):
        content = content[step]
        if depth == 1 and path[0] == "datasets" and isinstance(content, Mapping) and "name" in content:
            words = [f"data set '{content['name']}'"]
        elif depth == 1 and path[0] == "targets":
            words = [f"target '{step}'"]
        else:
            words.append(f"entry {step}" if isinstance(step, int) else f'"{step}"')
    return ", ".join(words)


@lru_cache
def _validator(name: str) -> Any:
    """The validator of one kind. jsonschema takes a tenth of a second to import."""
    import jsonschema
    from jsonschema import FormatChecker, ValidationError
    from jsonschema.validators import extend

    # MONAI Label's environment has jsonschema 3: there the places of a list (prefixItems) are not looked at
    newest = getattr(jsonschema, "Draft202012Validator", jsonschema.Draft7Validator)

    def mistyped(validator: Any, known: list[str], instance: Any, schema: Any) -> Iterator[Any]:
        """Files of others hold keys that mean nothing here; one that is nearly a known, absent key is a slip."""
        if isinstance(instance, Mapping):
            absent = [key for key in known if key not in instance]
            for key in instance:
                hint = "" if key in known else nearest(key, absent, 0.75)
                if hint:
                    yield ValidationError(f"unknown key '{key}'{hint}")

    names = FormatChecker(())
    names.checks("name")(is_plain_name)
    names.checks("snomed")(lambda text: is_snomed(text) and is_plain_name(text))
    # JSON's integer may be 2.0, which counts nothing in Python
    types = newest.TYPE_CHECKER.redefine("int", lambda _, one: isinstance(one, int) and not isinstance(one, bool))
    return extend(newest, {"mistyped": mistyped}, type_checker=types)(KINDS[name], format_checker=names)


def kind(types: str | Sequence[str], description: str, **more: Any) -> dict[str, Any]:
    """A JSON schema with the words that an error says it in."""
    return {"type": types, "description": description, **more}


TEXT = kind("string", "a text", minLength=1)

NOTE: dict[str, Any] = {}

NAME = kind("string", NAME_RULE, format="name")

TEXTS = kind("array", 'a list of texts, like ["a", "b"]', items=TEXT)

CASES = kind("array", 'a list of case names, like ["case_1", "case_2"]', items=TEXT)

PATHS = kind(["string", "array"], "a path, or a list of paths (one per channel)", minLength=1, minItems=1, items=TEXT)

CODE = kind("string", 'a SNOMED CT code and its meaning, "10200004 Liver" (the last digit is a check)', format="snomed")

SNOMED = kind(
    "object",
    'an object like {"type": "10200004 Liver"}, if needed with "site" and "side"',
    required=["type"],
    additionalProperties=False,
    properties={"type": CODE, "site": CODE, "side": kind("string", '"left" or "right"', enum=["left", "right"])},
)

TARGET = kind(
    "object",
    'an object like {"inside": "liver"}',
    additionalProperties=False,
    properties={
        "part_of": TEXT,
        "inside": TEXT,
        "lesion": kind("boolean", "true or false"),
        "tolerance_mm": kind("number", "millimetres above 0", exclusiveMinimum=0),
        "display": NAME,
        "snomed": SNOMED,
        "_desc_": NOTE,
    },
)

LICENCE = kind(
    ["string", "object"],
    'a licence\'s name, or {"name": ..., "commercial": true or false, "share_alike": true or false}',
    minLength=1,
    required=["name"],
    additionalProperties=False,
    properties={
        "name": TEXT,
        **dict.fromkeys(("commercial", "share_alike"), kind("boolean", "true or false")),
        "_desc_": NOTE,
    },
)

DATASET = kind(
    "object",
    "an object that declares a data set",
    required=["name", "labels"],
    additionalProperties=False,
    properties={
        "name": NAME,
        "folder": kind("string", "a path relative to the folder of all data sets"),
        "format": TEXT,
        "image": PATHS,
        "label": TEXT,
        "modality": kind(
            ["string", "object"],
            'a modality, or patterns of case names with a default: {"default": "CT", "amos_05*": "MR"}',
            minLength=1,
            additionalProperties=TEXT,
        ),
        "labels": kind(
            "object",
            'an object from raw ids (or structure names) to targets, like {"1": "liver"}',
            propertyNames={"format": "name"},
            additionalProperties=kind(
                ["string", "array"], "the name of a target, or a list of them", minLength=1, items=TEXT
            ),
        ),
        "ignore": kind("array", "a list of raw ids (whole numbers)", items=kind("integer", "a raw id (whole number)")),
        "others": kind("string", '"background"', enum=["background"]),
        "exclude": CASES,
        "patient": kind(
            "object",
            'an object with a "pattern", and a "group" where patients are shared between data sets',
            required=["pattern"],
            additionalProperties=False,
            properties={"group": TEXT, "pattern": TEXT},
        ),
        "unlabelled": kind("string", '"skip"'),
        "reference": NOTE,
        "licence": LICENCE,
        "labels_by": kind("string", '"experts", "model", or "both"', enum=["experts", "model", "both"]),
        "origin": TEXTS,
        "_desc_": NOTE,
    },
)

POOL = kind(
    "object",
    'an object with "targets" and "datasets"',
    required=["targets", "datasets"],
    additionalProperties=False,
    properties={
        "targets": kind(
            "object",
            'an object from target names to their relations, like {"liver": {}}',
            propertyNames={"format": "name"},
            additionalProperties=TARGET,
        ),
        "datasets": kind("array", "a list of data sets", items=DATASET),
        "_desc_": NOTE,
    },
)

CHANNELS = kind(["object", "array", "string"], 'channel names, like {"0": "CT"}', additionalProperties=TEXT, items=TEXT)

DATASET_JSON = kind(
    "object",
    'an object with "labels", and "training" or "file_ending"',
    mistyped=["training", "labels", "modality", "channel_names", "file_ending", "regions_class_order"],
    properties={
        "training": kind(
            "array",
            'a list of {"image": path, "label": path}',
            items=kind(
                "object",
                'an object with the paths "image" and "label"',
                required=["image", "label"],
                properties={"image": PATHS, "label": TEXT},
            ),
        ),
        "labels": kind(
            "object",
            'an object like {"0": "background", "1": "liver"}',
            additionalProperties=kind(
                ["string", "integer", "array"], "a name, a raw id, or a list of raw ids",
                items=kind(["string", "integer"], "a name or a raw id"),
            ),
        ),
        "modality": CHANNELS,
        "channel_names": CHANNELS,
        "file_ending": TEXT,
    },
)  # fmt: skip

ITEM = kind(
    ["string", "array", "object"],
    'the path of an image, or an object with an "image"',
    minLength=1,
    items=TEXT,
    mistyped=["image", "label", "case", "modality", "dataset"],
    properties={"image": PATHS, "case": kind("string", "the case's name", minLength=1), "modality": TEXT},
)

LISTED = kind("array", "a list of images", items=ITEM)

DATALIST = kind(
    ["array", "object"],
    'a list of images, or an object with such a list under "testing"',
    items=ITEM,
    properties=dict.fromkeys(("testing", "test", "validation", "training"), LISTED),
)

FOLD = kind(
    "object",
    'an object with the case names of "train" and "val"',
    required=["train", "val"],
    additionalProperties=False,
    properties={"train": CASES, "val": CASES},
)

FOLDS = kind("array", 'a list of folds, like [{"train": ["a"], "val": ["b"]}]', items=FOLD)

SPLITS = kind(
    ["array", "object"], "folds, or an object from data sets to their folds", items=FOLD, additionalProperties=FOLDS
)

KINDS = {"pool": POOL, "dataset.json": DATASET_JSON, "datalist": DATALIST, "splits": SPLITS}
