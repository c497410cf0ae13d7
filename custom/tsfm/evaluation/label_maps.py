"""Label map files of the evaluation: reading them as they are, comparing grids, finding the prediction of a case.

Everything stays on the files' own grid and axes; nothing is reoriented or resampled here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from ..cases.volumes import SAME_GRID, as_whole_numbers, grid_distance_mm
from ..labels import LabelTable

ENDINGS = re.compile(r"_(seg|pred|prediction|trans|mask)$")
"""What tools add to a case's name when they save a label map (MONAI's SaveImage: ``_trans``, or as configured)."""


def stem(path: str | Path) -> str:
    """File name without ``.nii``, ``.nii.gz`` or any one other extension."""
    name = Path(str(path)).name
    return re.sub(r"(\.nii)?\.gz$|\.[^.]+$", "", name)


def load_map(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """A NIfTI label map on its own grid: (integers with three axes, affine to RAS+ mm).

    Raises:
        ValueError: a file that is no readable NIfTI, more than three axes, fractions.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such label map")
    try:
        image = nib.load(path)
        array = np.asanyarray(image.dataobj)
    except Exception as error:  # nibabel, gzip and zlib each raise their own kind for a broken file
        raise ValueError(f"{path}: cannot be read as NIfTI ({type(error).__name__}: {error})") from error
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 3:
        raise ValueError(f"{path}: has shape {array.shape}, expected a label map with three axes")
    return as_whole_numbers(array, str(path)), image.affine


def load_truth(source: Any, table: LabelTable, dataset: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The truth of one case as local codes of `dataset`, and its affine (None where the source has none).

    Args:
        source: a NIfTI file; a mapping structure -> mask file; or raw ids as an array or tensor (1, X, Y, Z) or
            (X, Y, Z).
    """
    if isinstance(source, Mapping):
        return _merge_structures(source, table, dataset)
    if isinstance(source, (str, Path)):
        raw, affine = load_map(source)
        return table.encode(dataset, raw, str(source)), affine
    affine = np.asarray(source.affine) if hasattr(source, "affine") else None
    raw = as_whole_numbers(source.cpu().numpy() if isinstance(source, torch.Tensor) else source)
    return table.encode(dataset, raw[0] if raw.ndim == 4 else raw), affine


def _merge_structures(files: Mapping[str, Any], table: LabelTable, dataset: str) -> tuple[np.ndarray, np.ndarray]:
    """Local codes from one mask file per structure; where masks overlap the one listed later in the table wins."""
    codes, affine, ids = None, None, table.local_ids(dataset)
    missing = [name for name in ids[1:] if isinstance(name, str) and name not in files]
    if missing:
        raise ValueError(f"data set '{dataset}': no mask file for {missing}; the item lists {list(files)}")
    for code, name in enumerate(ids):
        if not isinstance(name, str):
            continue
        mask, its_affine = load_map(files[name])
        if codes is None:
            codes, affine = np.zeros(mask.shape, table.code_dtype), its_affine
        check_same_grid(str(files[name]), mask.shape, its_affine, codes.shape, affine)
        codes[mask > 0] = code
    return codes, affine


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """Voxel size in mm along the three array axes, to 10 nm (NIfTI keeps affines in 32 bits)."""
    return tuple(round(float(step), 5) for step in np.linalg.norm(np.asarray(affine, float)[:3, :3], axis=0))


def grid_difference(shape: Sequence[int], affine: Any, other_shape: Sequence[int], other_affine: Any) -> str:
    """What differs between two grids, in words; empty when they are the same by the reader's rule (`SAME_GRID`)."""
    if tuple(shape) != tuple(other_shape):
        return f"shape {tuple(shape)} against {tuple(other_shape)}"
    if affine is None or other_affine is None:
        return ""
    apart = grid_distance_mm(np.asarray(affine, float), np.asarray(other_affine, float), shape)
    return f"affines put a corner {apart:.3g} mm apart" if apart > SAME_GRID * min(spacing_of(affine)) else ""


def check_same_grid(source: str, shape, affine, other_shape, other_affine) -> None:
    """Raise a ValueError that names `source` where prediction (first) and truth do not lie on one grid."""
    difference = grid_difference(shape, affine, other_shape, other_affine)
    if difference:
        raise ValueError(
            f"{source}: prediction and truth lie on different grids: {difference}; save results on the image's own grid"
        )


def match_predictions(
    predictions: str | Path, labels: str | Path | Sequence[Mapping[str, Any]], dataset: str | None = None
) -> list[dict[str, Any]]:
    """One ``{"case", "dataset", "label", "prediction"}`` per truth, in the truths' order, with grids compared.

    Raises:
        FileNotFoundError: folders that are missing or empty; all cases without a prediction, named at once.
        ValueError: a prediction that fits two cases, a case with several, grids that differ; all named at once.
    """
    folder = Path(predictions)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of predictions")
    files: dict[str, list[Path]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.name.endswith((".nii", ".nii.gz"))):
        files.setdefault(ENDINGS.sub("", stem(path)), []).append(path)
    pairs = _truths(labels, dataset)
    for pair in pairs:
        pair["found"] = _candidates(pair, files, folder)
    missing = [pair["case"] for pair in pairs if not pair["found"]]
    if missing:
        raise FileNotFoundError(
            f"{folder}: no prediction for {len(missing)} of {len(pairs)} cases: {', '.join(missing)}"
        )
    several = [pair for pair in pairs if len(pair["found"]) > 1]
    problems = [f"{pair['case']}: several predictions: {[str(path) for path in pair['found']]}" for pair in several]
    claimed: dict[Path, str] = {}
    for pair in pairs:
        pair["prediction"] = pair.pop("found")[0]
        if pair["prediction"] in claimed:
            problems.append(f"{pair['prediction']} fits two cases: {claimed[pair['prediction']]} and {pair['case']}")
        claimed[pair["prediction"]] = pair["case"]
    problems = problems or [text for text in map(_header_difference, pairs) if text]
    if problems:
        raise ValueError("predictions and truths do not fit:\n  " + "\n  ".join(problems))
    return pairs


def _truths(labels: str | Path | Sequence[Mapping[str, Any]], dataset: str | None) -> list[dict[str, Any]]:
    if isinstance(labels, (str, Path)):
        if not Path(labels).is_dir():
            raise FileNotFoundError(f"{labels}: no such folder of labels")
        paths = sorted(p for p in Path(labels).glob("[!.]*") if p.name.endswith((".nii", ".nii.gz")))
        labels = [{"label": str(path), "case": stem(path)} for path in paths]
    if not labels:
        raise FileNotFoundError("no truth to compare with: the folder of labels, or the list of items, is empty")
    result = []
    for item in labels:
        first = lambda value: next(iter(value.values())) if isinstance(value, Mapping) else value  # noqa: E731
        image = item.get("image")
        image = image[0] if isinstance(image, (list, tuple)) else image
        image_name = stem(image) if image else ""
        names = [item.get("case"), image_name, re.sub(r"_\d{4}$", "", image_name), stem(first(item["label"]))]
        names = list(dict.fromkeys(str(name) for name in names if name))
        owner = item.get("dataset") or dataset
        entry = {"case": names[0], "dataset": owner, "label": item["label"], "image": item.get("image"), "names": names}
        result.append(entry)
    return result


def _candidates(pair: dict[str, Any], files: Mapping[str, list[Path]], folder: Path) -> list[Path]:
    """Predictions that carry one of the case's names; of several, those in a folder named like the case or data set."""
    for name in pair["names"]:
        found = files.get(name, [])
        for word in (pair["case"], pair["dataset"]):
            closer = [path for path in found if word in path.relative_to(folder).parts[:-1]]
            found = closer if len(found) > 1 and closer else found
        if found:
            return found
    return []


def _header_difference(pair: Mapping[str, Any]) -> str:
    """Grid difference of one pair from the headers alone; the scoring reports unreadable files."""
    label = pair["label"]
    try:
        truth = nib.load(next(iter(label.values())) if isinstance(label, Mapping) else label)
        prediction = nib.load(pair["prediction"])
    except Exception:  # the scoring reads the file again and reports it with its case
        return ""
    difference = grid_difference(prediction.shape[:3], prediction.affine, truth.shape[:3], truth.affine)
    return f"{pair['case']}: {difference} (prediction against truth)" if difference else ""
