"""What lies on disk: files and folders become datalist items, for training and inference alike."""

from __future__ import annotations

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..inference.prediction import SUFFIXES

OUTPUT_SUFFIX = ".nii.gz"

EXISTING = ("error", "skip", "overwrite")


class PoolError(ValueError):
    """A pool file or a data set folder that cannot be used, with everything that is wrong at once."""


def _read_json(path: str | os.PathLike) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise PoolError(f"file {os.path.abspath(path)} does not exist") from None
    except json.JSONDecodeError as error:
        raise PoolError(f"{path} is not valid JSON: {error}") from None


def _paths(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else [value]


def _msd_pairs(folder: str) -> list[tuple[str, str, str]]:
    declared = _read_json(os.path.join(folder, "dataset.json"))
    pairs = []
    for entry in declared.get("training", []):
        image, label = (os.path.normpath(os.path.join(folder, entry[key])) for key in ("image", "label"))
        pairs.append((re.sub(r"\.nii(\.gz)?$", "", os.path.basename(image)), image, label))
    return pairs


def _pattern_pairs(folder: str, entry: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    images = _paths(entry["image"])
    found = _match(folder, images[0])
    pairs = []
    for case, first in found.items():
        channels = [first, *(_resolve(folder, pattern, case) for pattern in images[1:])]
        if "{structure}" in entry["label"]:
            label: Any = {
                structure: _resolve(folder, entry["label"].replace("{structure}", structure), case)
                for structure in entry["labels"]
            }
        else:
            label = _resolve(folder, entry["label"], case)
        pairs.append((case, channels if isinstance(entry["image"], list) else first, label))
    return pairs


def _match(folder: str, pattern: str) -> dict[str, str]:
    """Case name -> path of every file below `folder` that fits `pattern`."""
    head, *rest = pattern.split("{case}")
    expression = re.escape(head) + "(?P<case>[^/]+?)" + "(?P=case)".join(re.escape(part) for part in rest)
    expression = expression.replace(r"\*", "[^/]*")
    found: dict[str, str] = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), pattern.replace("{case}", "*")))):
        relative = os.path.relpath(path, folder).replace(os.sep, "/")
        match = re.fullmatch(expression, relative)
        if match is None or os.path.basename(path).startswith("."):
            continue
        case = match.group("case")
        if case in found:
            raise PoolError(f"two files fit {pattern!r} for case '{case}': {found[case]} and {path}")
        found[case] = path
    return found


def _resolve(folder: str, pattern: str, case: str) -> str:
    path = os.path.join(folder, pattern.replace("{case}", case))
    if "*" not in path:
        return os.path.normpath(path)
    matches = sorted(glob.glob(path))
    if len(matches) > 1:
        raise PoolError(f"{len(matches)} files fit {path}: {matches[:3]}")
    return matches[0] if matches else path


def find_images(
    source: str | os.PathLike | Sequence[Any], output_dir: str | os.PathLike | None = None, existing: str = "error"
) -> list[dict[str, Any]]:
    """Datalist items, each with "image" and a "case" name that no other has, for what the user points at.

    Args:
        source: an image file, a DICOM folder, a folder (searched with its subfolders), a pattern with ``*``, a JSON
            datalist (paths are relative to it), or a list of such things or of items.
        output_dir: where label maps will be written; with it, results that are already there are looked for.
        existing: what to do with cases whose result is there: "error", "skip" them, or "overwrite".

    Raises:
        FileNotFoundError: nothing there, or no image in it.
        FileExistsError: results are already there and `existing` is "error".
    """
    if existing not in EXISTING:
        raise ValueError(f"existing is {existing!r}, expected one of {list(EXISTING)}")
    sources = [source] if isinstance(source, (str, os.PathLike, Mapping)) else list(source)
    items = [item for one in sources for item in _items(one)]
    if not items:
        raise FileNotFoundError(f"no image in {source}: looked for {', '.join(SUFFIXES)} and DICOM folders")
    for item, name in zip(items, _case_names(items), strict=True):
        item["case"] = name
    if output_dir is None or existing == "overwrite":
        return items
    done = [item for item in items if output_path(output_dir, item["case"]).exists()]
    if done and existing == "error":
        raise FileExistsError(
            f"{len(done)} of {len(items)} results are already in {output_dir}, for example {done[0]['case']}: set "
            '"existing" to "skip" to keep them and do the rest, or to "overwrite"'
        )
    return [item for item in items if item not in done]


def output_path(output_dir: str | os.PathLike, case: str) -> Path:
    """Where the label map of a case is written."""
    return Path(output_dir) / f"{case}{OUTPUT_SUFFIX}"


def _items(source: Any) -> list[dict[str, Any]]:
    """Items for one source."""
    if isinstance(source, Mapping):
        return [dict(source)]
    path = os.path.expanduser(os.fspath(source))
    if os.path.isdir(path):
        return [{"image": found, "root": path} for found in _in_folder(path)]
    if os.path.isfile(path):
        return _from_datalist(path) if path.lower().endswith(".json") else [{"image": path}]
    found = sorted(glob.glob(path, recursive=True))
    if not found:
        raise FileNotFoundError(f"{source}: no such file or folder, and no file matches it as a pattern")
    return [item for one in found for item in _items(one)]


def _in_folder(folder: str) -> list[str]:
    """Image files and DICOM folders in a folder and below it, hidden ones left out."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        visible = sorted(name for name in files if not name.startswith("."))
        images = [os.path.join(parent, name) for name in visible if name.lower().endswith(SUFFIXES)]
        found += images or ([parent] if any(_is_dicom(os.path.join(parent, name)) for name in visible) else [])
    return found


def _is_dicom(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def _from_datalist(path: str) -> list[dict[str, Any]]:
    """Items of a JSON list, or of the part of a Decathlon-like file that is to be tested."""
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    if isinstance(content, Mapping):
        keys = [key for key in ("testing", "test", "validation", "training") if content.get(key)]
        if not keys:
            raise ValueError(f'{path}: no list under "testing", "validation" or "training"; it has {list(content)}')
        content = content[keys[0]]
    base = os.path.dirname(os.path.abspath(path))
    items = []
    for number, entry in enumerate(content):
        item = dict(entry) if isinstance(entry, Mapping) else {"image": entry}
        if not item.get("image"):
            raise ValueError(f'{path}: entry {number} has no "image"; it has {list(item)}')
        image = item["image"]
        several = isinstance(image, (list, tuple))
        item["image"] = [os.path.join(base, one) for one in image] if several else os.path.join(base, image)
        items.append(item)
    return items


def _case_names(items: Sequence[dict[str, Any]]) -> list[str]:
    """A file name for each item: its own, with its folders where that is not unique, numbered where even that is not."""
    roots = [item.pop("root", None) for item in items]
    firsts = [_first(item["image"]) for item in items]
    names = [str(item.get("case") or _stem(path)) for item, path in zip(items, firsts, strict=True)]
    names = [name.replace("/", "_").replace(os.sep, "_") for name in names]
    taken = Counter(names)
    for i, (path, root) in enumerate(zip(firsts, roots, strict=True)):
        if taken[names[i]] > 1:
            parent = os.path.relpath(os.path.dirname(path), root or os.path.dirname(os.path.dirname(path)) or ".")
            parts = [part for part in parent.split(os.sep) if part not in (".", "..", "")]
            names[i] = "_".join([*parts, names[i]])
    seen: Counter[str] = Counter()
    for i, name in enumerate(names):
        seen[name] += 1
        names[i] = name if seen[name] == 1 else f"{name}_{seen[name]}"
    return names


def _first(image: Any) -> str:
    return os.path.abspath(os.fspath(image[0] if isinstance(image, (list, tuple)) else image))


def _stem(path: str) -> str:
    """File name without what marks it as an image."""
    name = os.path.basename(os.path.normpath(path))
    ending = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(ending)]
