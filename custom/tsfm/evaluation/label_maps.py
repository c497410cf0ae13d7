"""Label map files of the evaluation: predictions as they are, truths on their axes, finding the prediction of a case.

Everything stays on the prediction's own grid; nothing is resampled here. Files are read as training reads them.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..cases.cases import load_codes
from ..cases.folders import SUFFIXES, paths_of, results_in, stem
from ..cases.grids import grid_difference, turn_grid, turn_to
from ..cases.volumes import RawVolume, read_grid, read_labels
from ..labels import LabelTable

ENDINGS = re.compile(r"_(seg|pred|prediction|trans|mask)$")
"""What tools add to a case's name when they save a label map (MONAI's SaveImage: ``_trans``, or as configured)."""


def load_map(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """A label map of any format on its own axes: (integers with three axes, affine to RAS+ mm).

    Raises:
        CaseError: what `tsfm.cases.volumes.read_labels` refuses.
    """
    raw = read_labels(path)
    return raw.array[0], raw.affine


def load_truth(
    source: str | Path | Mapping[str, Any], table: LabelTable, dataset: str, grid: tuple[np.ndarray, np.ndarray, str]
) -> np.ndarray:
    """The truth of one case as local codes of `dataset`, on the axes of a prediction, whatever those of its files are.

    Args:
        source: a label file; or a mapping structure -> mask file.
        grid: prediction with three axes, its affine, the case's name. The files must lie on its grid.
    """
    image = RawVolume(grid[0][None], np.asarray(grid[1], float), grid[2])
    return load_codes(source, table, dataset, image, "prediction and truth").array[0]


def match_predictions(
    predictions: str | Path,
    labels: str | Path | Sequence[Mapping[str, Any]],
    dataset: str | None = None,
    what: str = "prediction",
) -> list[dict[str, Any]]:
    """One ``{"case", "dataset", "label", "prediction"}`` per truth, in the truths' order, with grids compared.

    Names may be those of nnU-Net's images: of ``CASE_0000``, or what was made of it, the case is ``CASE`` too. `what` is
    the word for the folder's files in errors.

    Raises:
        FileNotFoundError: folders that are missing or empty; all cases without a prediction, named at once.
        ValueError: a prediction that fits two cases, a case with several, grids that differ; all named at once.
    """
    folder = Path(predictions)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of {what}s")
    if isinstance(labels, (str, Path)) and Path(labels).is_dir() and folder.samefile(labels):
        raise ValueError(f"{folder} is given for the {what}s and for the labels; a map compared with itself agrees")
    files: dict[str, list[Path]] = {}
    for path in label_maps_in(folder):
        name = stem(path)
        for key in dict.fromkeys((ENDINGS.sub("", name), name)):
            files.setdefault(key, []).append(path)
    pairs = _truths(labels, dataset)
    for pair in pairs:
        pair["found"] = _candidates(pair, files, folder)
    missing = [pair["case"] for pair in pairs if not pair["found"]]
    if missing:
        raise FileNotFoundError(f"{folder}: no {what} for {len(missing)} of {len(pairs)} cases: {', '.join(missing)}")
    several = [pair for pair in pairs if len(pair["found"]) > 1]
    problems = [f"{pair['case']}: several {what}s: {[str(path) for path in pair['found']]}" for pair in several]
    claimed: dict[Path, str] = {}
    for pair in pairs:
        pair["prediction"] = pair.pop("found")[0]
        if pair["prediction"] in claimed:
            problems.append(f"{pair['prediction']} fits two cases: {claimed[pair['prediction']]} and {pair['case']}")
        claimed[pair["prediction"]] = pair["case"]
    problems = problems or [f"{text} ({what} against truth)" for text in map(_header_difference, pairs) if text]
    if problems:
        raise ValueError(f"{what}s and truths do not fit:\n  " + "\n  ".join(problems))
    return pairs


def label_maps_in(folder: str | Path) -> list[Path]:
    """The files of a folder and of those in it that could be label maps, sorted; links are followed, hidden ones left out.

    What our own inference wrote beside its label maps is none.
    """
    found = glob.glob(os.path.join(glob.escape(os.fspath(folder)), "**", "*"), recursive=True)
    others = {os.path.join(folder, name) for name in results_in(folder, besides="label_map")}
    images = (one for one in found if one.lower().endswith(SUFFIXES) and not os.path.isdir(one))
    return sorted(Path(one) for one in images if one not in others)


def _truths(labels: str | Path | Sequence[Mapping[str, Any]], dataset: str | None) -> list[dict[str, Any]]:
    if isinstance(labels, (str, Path)):
        if not Path(labels).is_dir():
            raise FileNotFoundError(f"{labels}: no such folder of labels")
        paths = sorted(p for p in Path(labels).glob("[!.]*") if p.name.lower().endswith(SUFFIXES))
        labels = [{"label": str(path), "case": stem(path)} for path in paths]
    if not labels:
        raise FileNotFoundError("no truth to compare with: the folder of labels, or the list of items, is empty")
    result = []
    for item in labels:
        image = item.get("image")
        image_name = stem(paths_of(image)[0]) if image else ""
        label_name = stem(paths_of(item["label"])[0])
        label_names = [label_name, ENDINGS.sub("", label_name)]
        names = [item.get("case"), image_name, re.sub(r"_\d{4}$", "", image_name), *label_names]
        names = list(dict.fromkeys(str(name) for name in names if name)) + [f"{name}_0000" for name in label_names]
        owner = item.get("dataset") or dataset
        result.append({"case": names[0], "dataset": owner, "label": item["label"], "names": names})
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
    """Grid difference of one pair from the headers alone, axes turned alike; the scoring reports unreadable files."""
    try:
        truth = read_grid(paths_of(pair["label"])[0])
        prediction = read_grid(pair["prediction"])
    except ValueError:  # the scoring reads the file again and reports it with its case
        return ""
    here, there = (prediction.shape, prediction.affine), (truth.shape, truth.affine)
    turned = turn_grid(*there, turn_to(truth.affine, prediction.affine))
    difference = grid_difference(*here, *there) and grid_difference(*here, *turned)
    return f"{pair['case']}: {difference}" if difference else ""
