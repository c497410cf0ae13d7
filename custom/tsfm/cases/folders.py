"""What lies on disk: files and folders become datalist items, for training and inference alike."""

from __future__ import annotations

import glob
import json
import logging
import os
import re
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..files import check_writable
from ..names import case_names
from ..schema import FileError, nearest, read_json

logger = logging.getLogger(__name__)

OUTPUT_SUFFIX = ".nii.gz"

OUTPUTS = {
    "label_map": OUTPUT_SUFFIX,
    "probabilities": "_probabilities.b2nd",
    "uncertainty": "_uncertainty.nii.gz",
    "dicom_seg": ".seg.dcm",
    "dicom_labelmap": ".labelmap.dcm",
}
"""What a run can write of a case (``--save``), and what follows the case's name in the name of its file."""

REPORT = "report.json"
"""In a folder of results: what is known of each case."""

JOURNAL = ".report.jsonl"
"""Beside it: a line ``{case: row}`` for each row that it lacks yet, while a run is at it or after one that was killed."""

EXISTING = ("error", "skip", "overwrite")

NIFTI = (".nii.gz", ".nii")

SUFFIXES = (*NIFTI, ".nrrd", ".nhdr", ".mha", ".mhd")
"""Endings of files that the reader takes; DICOM is told by its content."""

UNREAD = (".img", ".hdr", ".mgz", ".mgh", ".mnc", ".gipl", ".nii.bz2", ".nii.zst", ".nii.xz", ".nii.zip")
"""Endings of images that are named where they are left out: the reader does not take them."""

DICOM = (".dcm", ".ima")


def legible(name: str) -> str:
    r"""A file's name as text that any file and screen takes: of other encodings, ``\xe9`` stands for a byte."""
    return os.fsencode(name).decode(errors="backslashreplace")


def stem(path: str | os.PathLike) -> str:
    """Legible name of a file or DICOM folder without what marks it as an image; other dots stay."""
    name = os.path.basename(os.path.normpath(os.fspath(path)))
    ending = next((suffix for suffix in (*SUFFIXES, *DICOM) if name.lower().endswith(suffix)), "")
    return legible(name[: len(name) - len(ending)])


def paths_of(value: Any) -> list[Any]:
    """The paths of an item's ``image`` or ``label``: one, one per channel, or one per structure."""
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else [value]


class PoolError(ValueError):
    """A pool file or a data set folder that cannot be used, with everything that is wrong at once."""


def find_images(
    source: str | os.PathLike | Sequence[Any],
    output_dir: str | os.PathLike | None = None,
    existing: str = "error",
    save: str | Sequence[str] = "label_map",
    clicks: Mapping[str, Mapping[str, Any]] | None = None,
    part: int = 0,
    parts: int = 1,
) -> list[dict[str, Any]]:
    """Datalist items, each with "image" and a "case" name that no other has, for what the user points at.

    Args:
        source: an image file, a DICOM folder, a folder (searched with its subfolders), a pattern with ``*``, a JSON
            datalist (paths are relative to it), or a list of such things or of items. In folders and patterns the results
            of earlier runs, by their ``report.json``, are no images.
        output_dir: where results will be written; with it, those that are already there are looked for. Where it lies
            inside of `source`, it is not searched for images.
        existing: what to do with cases whose result is there: "error", "skip" them (once all of `save` is there), or
            "overwrite".
        save: what will be written of each case, one or several of `OUTPUTS`.
        clicks: case -> more entries of its item, in a form that `tsfm.inference.clicks.ReadClicksd` reads.
        part, parts: of so many equal parts, the one to give (from 0): each process takes one.

    Raises:
        ValueError: clicks for a case that is not there.
        FileNotFoundError: nothing there, or no image in it.
        FileExistsError: results are already there and `existing` is "error"; a result would take an image's place.
        FileError: DICOM shall be written of images that are no DICOM series; an item without an "image".
        OSError: `output_dir` cannot be written.
    """
    if existing not in EXISTING:
        raise ValueError(f"existing is {existing!r}, expected one of {list(EXISTING)}")
    as_dicom = dicom_outputs(save)
    if not 0 <= part < parts:
        raise ValueError(f"part is {part} of {parts} parts; expected a number from 0 to parts - 1")
    sources = [source] if isinstance(source, (str, os.PathLike, Mapping)) else list(source)
    items = [item for one in sources for item in _items(one, output_dir)]
    if not items:
        raise FileNotFoundError(
            f"no image in {source}: looked for {', '.join(SUFFIXES)} and DICOM folders; check that it is what you meant"
        )
    _check_series(items, as_dicom)
    clicks, names = clicks or {}, _case_names(items)
    for item, name in zip(items, names, strict=True):
        item.update({"case": name, **clicks.get(name, {})})
    for name in clicks:
        if name not in names:
            raise ValueError(f"clicks for a case {name!r}, which is not in {source}{nearest(name, names)}")
    if output_dir is None:
        return items[part::parts]
    check_writable(output_dir, "--output_dir")
    _check_apart(items, output_dir, save)
    return _to_do(items[part::parts], output_dir, existing, save)


def output_path(output_dir: str | os.PathLike, case: str) -> Path:
    """Where the label map of a case is written."""
    return Path(output_dir) / f"{case}{OUTPUT_SUFFIX}"


def output_paths(output_dir: str | os.PathLike, case: str, save: str | Sequence[str] = "label_map") -> list[Path]:
    """Where what `save` names is written of a case, in its order."""
    return [Path(output_dir) / f"{case}{OUTPUTS[name]}" for name in saved_outputs(save)]


def saved_outputs(save: str | Sequence[str]) -> list[str]:
    """The names in `save`, one or several of `OUTPUTS`; ValueError for others, and for none."""
    names = [save] if isinstance(save, str) else list(dict.fromkeys(save))
    unknown = [name for name in names if name not in OUTPUTS]
    if unknown or not names:
        raise ValueError(
            f"save is {save!r}, expected one or several of {list(OUTPUTS)}{nearest(unknown[0], OUTPUTS) if unknown else ''}"
        )
    return names


def dicom_outputs(save: str | Sequence[str]) -> list[str]:
    """Those names in `save` whose outputs refer to the slices of a DICOM series; ValueError as `saved_outputs`."""
    return [name for name in saved_outputs(save) if name.startswith("dicom")]


def _check_series(items: Sequence[Mapping[str, Any]], as_dicom: Sequence[str]) -> None:
    """FileError where an output refers to a DICOM series and an image is none."""
    others = [item["image"] for item in items if not os.path.isdir(os.fspath(paths_of(item["image"])[0]))]
    if as_dicom and others:
        raise FileError(
            f"{len(others)} of {len(items)} images are no folder with a DICOM series, for example {others[0]}, and "
            f"{as_dicom[0]} refers to one: leave it out of --save, or give those images a run of their own"
        )


def _to_do(
    items: list[dict[str, Any]], output_dir: str | os.PathLike, existing: str, save: Any
) -> list[dict[str, Any]]:
    """The items whose results are not there yet, or are to be overwritten; FileExistsError where some are there."""
    if existing == "overwrite":
        return items
    enough = all if existing == "skip" else any
    cases = [item["case"] for item in items]
    done = {case for case in cases if enough(path.exists() for path in output_paths(output_dir, case, save))}
    found = f"{len(done)} of {len(items)} results are in {output_dir}"
    if done and existing == "error":
        raise FileExistsError(
            f'{found}, for example {min(done)}: set "existing" to "skip" to keep them and do the rest, or to "overwrite"'
        )
    if done:
        logger.info("%s and stay, whatever weights and options made them", found)
    return [item for item in items if item["case"] not in done]


def _check_apart(items: Sequence[Mapping[str, Any]], output_dir: str | os.PathLike, save: str | Sequence[str]) -> None:
    """FileExistsError where a result would be written over an image, a label or the result of another case."""
    given = [path for item in items for key in ("image", "label") for path in paths_of(item.get(key))]
    taken = {os.path.realpath(path) for path in given if isinstance(path, str | os.PathLike)}
    for path in (path for item in items for path in output_paths(output_dir, item["case"], save)):
        place = os.path.realpath(path)
        if place in taken:
            raise FileExistsError(
                f"{path} is an image, a label or the result of another case, and a result of this name would be written "
                "over it: choose another --output_dir, or rename the image"
            )
        taken.add(place)


def _items(source: Any, output_dir: str | os.PathLike | None = None) -> list[dict[str, Any]]:
    """Items for one source; `output_dir` is left out where it lies below what is searched."""
    if isinstance(source, Mapping):
        if not source.get("image"):
            raise FileError(f'an item has no "image"; it has {list(source)}')
        return [dict(source)]
    path = os.path.expanduser(os.fspath(source))
    if os.path.isdir(path):
        return [{"image": found, "root": path} for found in _in_folder(path, output_dir)]
    if os.path.isfile(path):
        return _from_datalist(path) if path.lower().endswith(".json") else [{"image": path}]
    found = sorted(glob.glob(path, recursive=True))
    if not found:
        raise FileNotFoundError(f"{source}: no such file or folder, and no file matches it as a pattern")
    searched = os.path.dirname(re.split(r"[*?[]", path)[0]) or "."
    if output_dir is not None and os.path.realpath(output_dir) != os.path.realpath(searched):
        found = [one for one in found if not (_lies_in(one, output_dir) and _lies_in(output_dir, searched))]
    results = {folder: results_in(folder) for folder in {os.path.dirname(one) for one in found}}
    found = [one for one in found if os.path.basename(one) not in results[os.path.dirname(one)]]
    items = [item for one in found for item in _items(one, output_dir)]
    return list({str(item["image"]): item for item in items}.values())  # "**/*" finds a folder and what is in it


def _lies_in(path: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """Whether a path is a folder or lies below it, links followed."""
    path, folder = (os.path.join(os.path.realpath(one), "") for one in (path, folder))
    return path.startswith(folder)


def _in_folder(folder: str, output_dir: str | os.PathLike | None = None) -> list[str]:
    """Image files and DICOM folders in a folder and below it, hidden ones and `output_dir` left out.

    Links to folders are followed, and each folder is searched once. A folder that cannot be listed is among what is found,
    so that it is reported as a case that fails; other files that cannot be read are warned of.
    """
    found, closed = [], []
    seen = {os.path.realpath(one) for one in (output_dir,) if one is not None} - {os.path.realpath(folder)}

    def close(error: OSError) -> None:
        closed.append(os.fspath(error.filename))

    for parent, folders, files in os.walk(folder, onerror=close, followlinks=True):
        if (place := os.path.realpath(parent)) in seen:
            folders[:] = []
            continue
        seen.add(place)
        links = {name: os.path.islink(os.path.join(parent, name)) for name in folders if not name.startswith(".")}
        # links last: a folder goes by its own name, if it has one here
        folders[:] = sorted(links, key=lambda name: (links[name], name))
        results = results_in(parent) if {REPORT, JOURNAL} & set(files) else set()
        visible = sorted(name for name in files if not name.startswith(".") and name not in results)
        images = [os.path.join(parent, name) for name in visible if name.lower().endswith(SUFFIXES)]
        others = [os.path.join(parent, name) for name in visible if not name.lower().endswith(SUFFIXES)]
        unread = [name for name in visible if name.lower().endswith(UNREAD)]
        if unread:
            logger.warning(
                "%d files in %s are left out, for example %s: such files are not read, convert them to NIfTI",
                len(unread), parent, unread[0],
            )  # fmt: skip
        series = any(is_dicom(path) for path in others)
        if images and series:
            logger.warning("%s holds image files and a DICOM series: both are segmented", parent)
        found += images + [parent] * series
    return found + closed


def results_in(folder: str | os.PathLike, besides: str = "") -> set[str]:
    """Names of the files that an inference writes into a folder, by its report, those of the output `besides` left out."""
    try:
        cases = read_report(folder)
    except (OSError, ValueError):  # another file of this name
        return set()
    found = {f"{case}{ending}" for case in cases for ending in OUTPUTS.values()}
    left_out = {f"{case}{OUTPUTS[besides]}" for case in cases if besides}  # a case may be named like another's output
    return {REPORT, *(found - left_out)}


def read_report(output_dir: str | os.PathLike) -> dict[str, Mapping[str, Any]]:
    """Case -> what the report of the inferences into a folder says; nothing where there is none.

    Raises:
        FileError: another file of this name.
    """
    path, lines = Path(output_dir, REPORT), []
    with suppress(FileNotFoundError):  # before the report, into which a process that is at it moves them
        lines = Path(output_dir, JOURNAL).read_text("utf-8").splitlines()
    content = read_json(path) if path.is_file() else {"cases": {}}
    if not isinstance(content, dict) or not isinstance(content.get("cases"), dict):
        raise FileError(
            f'{path} is no report of segmented cases, expected {{"cases": {{...}}}}: move it, or choose another --output_dir'
        )
    for line in lines:
        with suppress(ValueError):  # a process may have been killed amid a line; the next one begins anew
            content["cases"].update(json.loads(line))
    return content["cases"]


def is_dicom(path: str) -> bool:
    """Whether a file says that it is DICOM; a dead link, a pipe or a file without rights is none, with a warning.

    The table of contents of a CD, DICOMDIR, is no image.
    """
    if os.path.basename(path).upper() == "DICOMDIR":
        return False
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("neither a file nor a folder")
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM" or path.lower().endswith(DICOM)
    except OSError as error:
        logger.warning("%s is left out: %s", path, error.strerror or error)
        return False


def _from_datalist(path: str) -> list[dict[str, Any]]:
    """Items of a JSON list, or of the part of a Decathlon-like file that is to be tested."""
    content = read_json(path, "datalist")
    if isinstance(content, Mapping):
        keys = [key for key in ("testing", "test", "validation", "training") if content.get(key)]
        if not keys:
            near = "".join(nearest(key, ("testing", "validation", "training")) for key in list(content)[:1])
            raise FileError(
                f'{path}: no list under "testing", "validation" or "training"; it has {list(content)}{near}'
            )
        content = content[keys[0]]
    base = os.path.dirname(os.path.abspath(path))
    items = []
    for number, entry in enumerate(content):
        item = dict(entry) if isinstance(entry, Mapping) else {"image": entry}
        if not item.get("image"):
            raise FileError(f'{path}: entry {number} has no "image"; it has {list(item)}')
        for key in ("image", "label"):
            if isinstance(item.get(key), list):
                item[key] = [os.fspath(Path(base, one)) for one in item[key]]
            elif isinstance(item.get(key), str):
                item[key] = os.fspath(Path(base, item[key]))
        items.append(item)
    return items


def _case_names(items: Sequence[dict[str, Any]]) -> list[str]:
    """A file name for each item: its own, with its folders where that is not unique, numbered where even that is not."""
    roots = [item.pop("root", None) for item in items]
    firsts = [os.path.abspath(os.fspath(paths_of(item["image"])[0])) for item in items]
    names = [str(item.get("case") or stem(path)) for item, path in zip(items, firsts, strict=True)]
    names = [name.replace("/", "_").replace(os.sep, "_") for name in names]
    parents = [root or os.path.dirname(os.path.dirname(path)) or "." for root, path in zip(roots, firsts, strict=True)]
    return case_names(names, [os.path.relpath(path, parent) for path, parent in zip(firsts, parents, strict=True)])
