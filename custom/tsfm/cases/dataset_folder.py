"""One data set's folder becomes datalist items.

How a data set's folder is read is declared, not coded:

* ``"format": "msd"``: the ``training`` list of a ``dataset.json`` (Medical Segmentation Decathlon);
* ``"image"`` and ``"label"`` patterns relative to the folder, where ``{case}`` stands for the case's name (``*`` is a
  wildcard): ``"{case}/imaging.nii.gz"``. A list of image patterns is one case with one file per channel; a label
  pattern with ``{structure}`` is one mask file per structure, and ``labels`` then maps structure names.
"""

from __future__ import annotations

import fnmatch
import glob
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..labels import LabelTable, as_table
from ..names import case_names, counted, listed, modality_name, plain_name, plain_names, unknown_names
from ..schema import read_json
from .folders import SUFFIXES, PoolError, legible, paths_of, stem

logger = logging.getLogger(__name__)

IGNORE = "ignore"  # nnU-Net's name of the label whose voxels enter no loss


def check_entry(source: str, entry: Mapping[str, Any]) -> None:
    """Raise PoolError where what a pool file says about a data set makes no sense; no folder is looked at."""
    where = f"{source}, data set '{entry['name']}'"
    if entry.get("unlabelled") not in (None, "skip"):
        raise PoolError(f'{where}: "unlabelled" is {entry["unlabelled"]!r}; the only choice is "skip"')
    kind = entry.get("format", "patterns")
    if kind not in ("msd", "patterns"):
        raise PoolError(f"{where}: format {kind!r} is neither 'msd' nor 'patterns'")
    if kind == "patterns" and not {"image", "label"} <= set(entry):
        raise PoolError(f'{where}: give "format": "msd", or "image" and "label" patterns')
    for part in ("image", "label") if kind == "patterns" else ():
        for pattern in paths_of(entry[part]):
            if "{case}" not in pattern:  # all cases would share one file
                raise PoolError(f"{where}: the {part} pattern {pattern!r} has no {{case}}")
    pattern = entry.get("patient", {}).get("pattern", "")
    try:
        re.compile(pattern)
    except re.error as error:
        raise PoolError(f"{where}: the patient pattern {pattern!r} is no regular expression ({error})") from None
    modality = _modalities(entry)
    if "default" not in modality:
        raise PoolError(f'{where}: "modality" {modality} has no "default"')
    for name in modality.values():
        try:
            modality_name(name)
        except ValueError as error:
            raise PoolError(f"{where}: {error}") from None


def read_dataset(
    dataset_dir: str, entry: Mapping[str, Any], source: str, recorded: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Datalist items of one data set: ``image``, ``label``, ``dataset``, ``modality``, ``case``, ``licence`` if declared.

    Args:
        dataset_dir: holds the folder that `entry` names.
        entry: the data set as a pool file declares it.
        source: how messages call the pool file.
        recorded: case -> its ``image`` and ``label``, in place of a look at the folder, whose files may be gone.

    Raises:
        PoolError: a folder that is not there, files that are missing, no case.
    """
    folder = os.fspath(Path(dataset_dir, entry.get("folder", "")))
    excluded = set(entry.get("exclude", ()))
    if recorded is None:
        cases = _cases_in(folder, entry, excluded)
    else:
        cases = [(case, one["image"], one["label"]) for case, one in recorded.items() if case not in excluded]
    if not cases:
        layout = "dataset.json" if _is_msd(entry) else f"image {entry['image']}, label {entry['label']}"
        raise PoolError(f"folder {folder} holds no case in the layout {layout}")
    licence, modalities, items = declared_licence(dataset_dir, entry), _modalities(entry), []
    for case, image, label in sorted(cases, key=lambda one: one[0]):
        modality = modality_name(modalities[next(iter(_fitting(modalities, case)), "default")], source)
        item = {"image": image, "label": label, "dataset": entry["name"], "modality": modality, "case": case}
        items.append(item | {"licence": licence} if licence else item)
    return items


def _cases_in(folder: str, entry: Mapping[str, Any], excluded: set[str]) -> list[tuple[str, Any, Any]]:
    """(case, image, label) of the cases in a data set's folder that are to be used."""
    if not os.path.isdir(folder):
        raise PoolError(f"folder {folder} does not exist")
    pairs = _msd_pairs(folder) if _is_msd(entry) else _pattern_pairs(folder, entry)
    names = [case for case, _, _ in pairs]
    unknown = unknown_names(sorted(excluded), names)
    if unknown:
        raise PoolError(f'{folder}: "exclude" names cases that are not there: {unknown}')
    # in one folder "{case}.nii.gz" fits the labels of "{case}_seg.nii.gz", too
    labels = {os.path.normpath(path) for *_, label in pairs for path in paths_of(label)}
    cases = [pair for pair in pairs if pair[0] not in excluded and os.path.normpath(paths_of(pair[1])[0]) not in labels]
    if entry.get("unlabelled") == "skip":
        wanted = len(cases)
        cases = [one for one in cases if any(map(os.path.exists, paths_of(one[2])))]
        if len(cases) < wanted:
            logger.info("%s: left out without a label file: %s", entry["name"], counted(wanted - len(cases), "case"))
    files = [path for _, *both in cases for one in both for path in paths_of(one)]
    absent = [path for path in files if not os.path.exists(path)]
    if absent:
        shown = listed(absent, between="\n    ")
        raise PoolError(f"{len(absent)} files named by {folder} are missing, the first:\n    {shown}")
    _warn_of_unused_modalities(entry, names)
    if not _is_msd(entry):
        _warn_of_unused_files(folder, entry, pairs)
    return cases


def _is_msd(entry: Mapping[str, Any]) -> bool:
    return entry.get("format") == "msd"


def declared_licence(dataset_dir: str, entry: Mapping[str, Any]) -> str | Mapping[str, Any] | None:
    """A data set's licence as the pool file declares it, else as its own ``dataset.json`` does, else None."""
    if entry.get("licence"):
        return entry["licence"]
    path = os.fspath(Path(dataset_dir, entry.get("folder", ""), "dataset.json"))
    content = read_json(path, error=PoolError) if os.path.isfile(path) else {}
    found = (content.get("licence") or content.get("license")) if isinstance(content, Mapping) else None
    return found if isinstance(found, str) else None


def label_table(path: str) -> LabelTable:
    """The label table of a pool file, or of a ``dataset.json`` (MSD, nnU-Net), whose labels are the targets."""
    content = read_json(path)
    if not isinstance(content, Mapping) or "labels" not in content or "targets" in content:
        return as_table(path)
    labels, targets, ignored = declared_labels(content, path)
    name = plain_name(os.path.basename(os.path.dirname(os.path.abspath(path)))) or "data"
    table = LabelTable(targets, [{"name": name, "labels": labels, "ignore": ignored}])
    table.advice = f'Name them in "labels" of {path}.'
    return table


def declared_labels(content: Mapping[str, Any], path: str) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """(raw id -> target or targets, targets with their tree, ids to ignore).

    MSD has ``{"1": name}``, nnU-Net ``{name: 1}`` or, for regions, ``{name: [1, 2]}``: an id then belongs to every region
    that lists it, and a region lies inside the smallest one that holds all its ids.
    """
    named = _named_ids(content.get("labels"), path)
    ignored = named.pop(IGNORE, [])
    order = content.get("regions_class_order")
    if order is not None and len(order) != len(named):
        raise PoolError(f'{path}: "regions_class_order" is {order}; expected one entry for each of {list(named)}')
    by_id = {raw: [name for name, ids in named.items() if raw in ids] for ids in named.values() for raw in ids}
    label_ids = {str(raw): names[0] if len(names) == 1 else names for raw, names in sorted(by_id.items())}
    return label_ids, {name: _relation(name, named) for name in named}, ignored


def _named_ids(labels: Any, path: str) -> dict[str, list[int]]:
    """Plain name -> raw ids, of the "labels" of a ``dataset.json``; background is left out."""
    if not isinstance(labels, Mapping) or not labels:
        raise PoolError(f'{path} has no "labels"')
    named: dict[str, list[int]] = {}
    if all(str(key).isdigit() for key in labels):
        for raw, name in plain_names({raw: name for raw, name in labels.items() if int(raw) != 0}, path).items():
            named.setdefault(name, []).append(int(raw))
        return named
    ids = {name: list(value) if isinstance(value, list | tuple) else [value] for name, value in labels.items()}
    if not all(isinstance(raw, int) for values in ids.values() for raw in values):
        raise PoolError(
            f'{path}: "labels" is {dict(labels)}; expected {{"0": "background", "1": name, ...}}, or nnU-Net\'s '
            '{"background": 0, name: 1, ...} with a list of ids for a region'
        )
    foreground = {name: values for name, values in ids.items() if values != [0]}
    return {plain: foreground[name] for name, plain in plain_names({name: name for name in foreground}, path).items()}


def _relation(name: str, named: Mapping[str, Sequence[int]]) -> dict[str, str]:
    own = set(named[name])
    around = [other for other, ids in named.items() if own < set(ids)]
    return {"inside": min(around, key=lambda other: len(named[other]))} if around else {}


def _msd_pairs(folder: str) -> list[tuple[str, Any, str]]:
    """(case, image, label) of a ``dataset.json``'s "training" list; what is listed twice, which folds would tear apart, once."""
    path = os.path.join(folder, "dataset.json")
    declared = read_json(path, "dataset.json", PoolError).get("training", [])
    once: dict[str, tuple[list[str], list[str]]] = {}
    sidecars = []
    for entry in declared:
        pair = tuple(
            [os.path.normpath(os.path.join(folder, one)) for one in paths_of(entry[key])] for key in ("image", "label")
        )
        first = pair[0][0]
        if os.path.basename(first).startswith("._"):
            sidecars.append(first)
        elif once.setdefault(first, pair) != pair:
            raise PoolError(f"{path} lists {first} twice, as {once[first]} and as {pair}: leave out one of them")
    if sidecars:
        logger.warning("%d files of macOS, %s for one, are no images and left out", len(sidecars), sidecars[0])
    repeated = len(declared) - len(sidecars) - len(once)
    if repeated:
        logger.warning("%s lists %s twice: once counts", path, counted(repeated, "case"))
    names = case_names([stem(first) for first in once], [os.path.relpath(first, folder) for first in once])
    return [
        (name, images if len(images) > 1 else images[0], label)
        for name, (images, [label]) in zip(names, once.values(), strict=True)
    ]


def _pattern_pairs(folder: str, entry: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    images = paths_of(entry["image"])
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
        pairs.append((legible(case), channels if isinstance(entry["image"], list) else first, label))
    return pairs


def _warn_of_unused_modalities(entry: Mapping[str, Any], cases: Sequence[str]) -> None:
    """Name the patterns of "modality" that fit no case: those that were meant have the modality of the others."""
    modalities = _modalities(entry)
    fitting = {pattern for case in cases for pattern in _fitting(modalities, case)}
    lone = [pattern for pattern in modalities if pattern not in {"default", *fitting}]
    if lone and cases:
        logger.warning(
            "%s: the modality patterns %s fit no case; the cases have names like %s", entry["name"], lone, cases[0]
        )


def _warn_of_unused_files(folder: str, entry: Mapping[str, Any], pairs: Sequence[tuple[str, Any, Any]]) -> None:
    """Name the images beside the cases' own, and the label files of no image, that nothing uses; patterns whose folder or
    label file is not one are not looked at."""
    known = {os.path.normpath(path) for _, image, label in pairs for path in (*paths_of(image), *paths_of(label))}
    folders = {os.path.join(folder, os.path.dirname(pattern)) for pattern in paths_of(entry["image"])}
    beside = (path for one in sorted(folders) for path in sorted(glob.glob(os.path.join(glob.escape(one), "*"))))
    images = [path for path in beside if path.lower().endswith(SUFFIXES)]
    pattern, labels = entry["label"], {}
    if "{case}" in pattern and "{structure}" not in pattern and "*" not in pattern:
        labels = _match(folder, pattern)
    named = " + ".join(paths_of(entry["image"]))
    for what, paths in (("labels without an image", labels.values()), ("images of other names", images)):
        lone = [path for path in map(os.path.normpath, paths) if path not in known]
        if lone:
            logger.warning("%s: %s (%s) are not used: %s", entry["name"], what, named, listed(lone))
            known.update(lone)


def _match(folder: str, pattern: str) -> dict[str, str]:
    """Case name -> path of every file that fits `pattern`, which is relative to `folder` or absolute."""
    pattern, root = Path(pattern).as_posix(), Path(folder).as_posix() + "/"  # without "./", "//", and "/" at its end
    head, *rest = pattern.split("{case}")
    expression = re.escape(head) + "(?P<case>[^/]+?)" + "(?P=case)".join(re.escape(part) for part in rest)
    expression = expression.replace(r"\*", "[^/]*")
    found: dict[str, str] = {}
    for path in sorted(glob.glob(_wildcards(folder, pattern, "*"))):
        match = re.fullmatch(expression, Path(path).as_posix().removeprefix("" if os.path.isabs(pattern) else root))
        if match is None or os.path.basename(path).startswith("."):
            continue
        case = match.group("case")
        if case in found:
            raise PoolError(f"two files fit {pattern!r} for case '{case}': {found[case]} and {path}")
        found[case] = path
    return found


def _wildcards(folder: str, pattern: str, case: str) -> str:
    """What glob looks for: of the pattern's characters only ``*`` is a wildcard."""
    return os.path.join(glob.escape(folder), glob.escape(pattern).replace("[*]", "*").replace("{case}", case))


def _resolve(folder: str, pattern: str, case: str) -> str:
    path = os.path.join(folder, pattern.replace("{case}", case))
    if "*" not in pattern:
        return os.path.normpath(path)
    matches = sorted(glob.glob(_wildcards(folder, pattern, glob.escape(case))))
    if len(matches) > 1:
        raise PoolError(f"{len(matches)} files fit {path}: {matches[:3]}")
    return matches[0] if matches else path


def _modalities(entry: Mapping[str, Any]) -> dict[str, str]:
    """Pattern of case names -> modality, and that of all other cases under ``default``."""
    declared = entry.get("modality", "CT")
    return {"default": declared} if isinstance(declared, str) else dict(declared)


def _fitting(modalities: Mapping[str, str], case: str) -> list[str]:
    """The patterns that a case's name fits."""
    return [pattern for pattern in modalities if pattern != "default" and fnmatch.fnmatch(case, pattern)]
