"""Whole folders of images to label maps: one broken case is reported and the rest goes on.

In inference.json: `dataset` is a :class:`CaseDataset` over :func:`find_images`, `postprocessing` ends with
:class:`SaveLabelMapd`, `evaluator` is a :class:`CaseEvaluator`; everything else is MONAI's.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.transforms import SaveImaged

from .checkpoint import atomic_write
from .errors import first_cause
from .labels import LabelTable

logger = logging.getLogger(__name__)

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
OUTPUT_SUFFIX = ".nii.gz"
EXISTING = ("error", "skip", "overwrite")


class FailedCases(RuntimeError):
    """Some cases of a run failed; the others are done. The message lists them."""


# ---- what to predict --------------------------------------------------------------------------------------------


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


# ---- running ----------------------------------------------------------------------------------------------------


class CaseDataset(Dataset):
    """MONAI's Dataset, but a case whose transforms fail gives ``{"case", "error"}`` in place of an exception.

    So it gets through a DataLoader's worker, and :class:`CaseEvaluator` reports it.
    """

    def _transform(self, index: int) -> Any:
        item = self.data[index]
        try:
            return super()._transform(index)
        except Exception as error:
            case = item.get("case") or _stem(_first(item["image"]))
            logger.debug("case %s", case, exc_info=True)
            return {"case": case, "error": root_cause(error)}


class CaseEvaluator(SupervisedEvaluator):
    """SupervisedEvaluator that survives a bad case, says how each went, and fails at the end if one did.

    Handlers see an empty list in ``state.batch`` and ``state.output`` for a case that failed. ``results`` holds one
    dict per case: case, seconds (waiting for it included), and ml per target or error.

    Args:
        table: label table or target names, to name the label map's values in the summary.
        summary: print the table of cases at the end.
        others: as for SupervisedEvaluator; batches of one case. `amp` belongs to the inferer.

    Raises:
        FailedCases: by `run`, after the last case, if some failed.
    """

    def __init__(
        self, *args: Any, table: LabelTable | Sequence[str] | None = None, summary: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.names = table.names if isinstance(table, LabelTable) else tuple(table or ())
        self.summary = summary
        self.results: list[dict[str, Any]] = []

    def run(self, global_epoch: int = 1) -> None:
        self.results, self._mark = [], time.perf_counter()
        super().run(global_epoch)
        if self.summary and self.results:
            print(format_results(self.results))
        failed = [row for row in self.results if "error" in row]
        if failed:
            listed = "\n".join(f"  {row['case']}: {row['error']}" for row in failed)
            raise FailedCases(f"{len(failed)} of {len(self.results)} cases failed:\n{listed}")

    def _iteration(self, engine: SupervisedEvaluator, batchdata: dict[str, Any]) -> Any:
        case = _case_of(batchdata, len(self.results) + 1)
        row: dict[str, Any] = {"case": case}
        try:
            if "error" in batchdata:
                row["error"] = batchdata["error"][0]
            else:
                output = super()._iteration(engine, batchdata)
                prediction = output[0].get("pred") if isinstance(output, list) and output else None
                row["ml"] = {} if prediction is None else volumes_ml(prediction, self.names)
        except Exception as error:
            logger.debug("case %s", case, exc_info=True)
            row["error"] = root_cause(error)
        if "error" in row:
            logger.error("%s: %s", case, row["error"])
            engine.state.batch = output = []
        now = time.perf_counter()
        row["seconds"], self._mark = now - self._mark, now
        self.results.append(row)
        return output


def _case_of(batchdata: Mapping[str, Any], number: int) -> str:
    """Name of the one case in a batch."""
    if "case" in batchdata:
        return str(batchdata["case"][0])
    meta = getattr(batchdata.get("image"), "meta", {})
    names = meta.get("filename_or_obj", [])
    return _stem(names[0] if isinstance(names, (list, tuple)) else names) if names else f"case {number}"


def root_cause(error: BaseException) -> str:
    """The message of an exception, without the RuntimeError that MONAI wraps around a transform's own."""
    error = first_cause(error)
    return str(error) if isinstance(error, ValueError) and str(error) else f"{type(error).__name__}: {error}"


def volumes_ml(label_map: torch.Tensor, names: Sequence[str] = ()) -> dict[str, float]:
    """Volume of each value of a label map (1, X, Y, Z) that occurs, in ml; values without a name are numbered."""
    counts = np.zeros(65536, np.int64)
    for plane in np.asarray(label_map.detach().cpu())[0]:
        found = np.bincount(plane.ravel())
        counts[: len(found)] += found
    affine = np.asarray(label_map.affine) if isinstance(label_map, MetaTensor) else np.eye(4)
    voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000
    values = np.flatnonzero(counts[1:]) + 1
    return {names[v - 1] if v <= len(names) else str(v): float(counts[v] * voxel_ml) for v in values}


def format_results(results: Sequence[Mapping[str, Any]]) -> str:
    """A table of cases: seconds and ml per target, or the error."""
    width = max(len("case"), *(len(row["case"]) for row in results))
    lines = [f"{'case':{width}}  seconds  result"]
    for row in results:
        ml = ", ".join(f"{name} {value:.1f} ml" for name, value in row.get("ml", {}).items()) or "nothing found"
        outcome = f"FAILED: {row['error']}" if "error" in row else ml
        lines.append(f"{row['case']:{width}}  {row['seconds']:7.1f}  {outcome}")
    return "\n".join(lines)


# ---- writing ----------------------------------------------------------------------------------------------------


class SaveLabelMapd(SaveImaged):
    """Writes ``output_dir/<case>.nii.gz`` with the image's affine and header, whole or not at all.

    A SaveImaged, so that MONAI Label leaves it out. The item's "case" names the file, else the image file's name does.

    Args:
        keys: label maps (1, X, Y, Z) on the image's own grid, that is, after Invertd.
        overwrite: replace a file that is there; without it that is an error.
    """

    def __init__(
        self, keys: KeysCollection, output_dir: str = "./", overwrite: bool = False, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(
            keys, output_dir=output_dir, output_postfix="", output_dtype=np.uint8, separate_folder=False,
            print_log=False, allow_missing_keys=allow_missing_keys,
        )  # fmt: skip
        self.output_dir, self.overwrite = output_dir, overwrite

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        for key in self.key_iterator(item):
            source = str(item[key].meta.get("filename_or_obj", "")) if isinstance(item[key], MetaTensor) else ""
            case = item.get("case") or _stem(source) or "prediction"
            path = output_path(self.output_dir, case)
            if path.exists() and not self.overwrite:
                raise FileExistsError(f"{path} is already there; remove it, or allow to overwrite it")
            write_label_map(item[key], path)
        return item


def write_label_map(label_map: torch.Tensor, path: str | os.PathLike) -> None:
    """Write a label map (1, X, Y, Z) as NIfTI; header fields and form codes are those of its source image, if NIfTI."""
    array = np.asarray(label_map.detach().cpu())[0]
    affine = np.asarray(label_map.affine, float) if isinstance(label_map, MetaTensor) else np.eye(4)
    source = str(label_map.meta.get("filename_or_obj", "")) if isinstance(label_map, MetaTensor) else ""
    header = nib.load(source).header.copy() if source.lower().endswith((".nii", ".nii.gz")) else None
    if header is not None:
        header.set_data_shape(array.shape)
    image = nib.Nifti1Image(array, affine, header)
    codes = [0, 0] if header is None else [int(header.get(key, 0)) for key in ("sform_code", "qform_code")]
    s_code, q_code = codes if any(codes) else (1, 1)
    image.set_sform(affine if s_code else None, s_code)
    image.set_qform(affine if q_code else None, q_code)
    image.set_data_dtype(array.dtype)
    image.header["cal_min"] = image.header["cal_max"] = 0
    atomic_write(path, lambda temporary: nib.save(image, temporary), OUTPUT_SUFFIX)
