"""What the audit measures of one case; kept on disk, so that a case is read again only when its files change."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from typing import Any

import cc3d
import numpy as np
from nibabel.orientations import aff2axcodes
from tsfm.cases.cases import Preparation, check_image, load_codes
from tsfm.cases.grids import spacing_of, upright_share
from tsfm.cases.sources import file_identity
from tsfm.cases.volumes import RawVolume, read_volume, to_spl
from tsfm.errors import CaseError
from tsfm.files import atomic_write
from tsfm.labels import LabelTable
from tsfm.preparation.fingerprint import DAMAGED
from tsfm.preparation.resampling import boxes_of, enclosing

from .signature import describe_image

FORMAT = 2  # of the kept files

SPECK_VOXELS = 3
"""Pieces of a label up to this size are specks."""

FORM_BINS, FORM_REACH = 12, 2.5  # of the histogram of where the foreground lies, the reach in root-mean-square radii


def measured(item: Mapping[str, Any], table: dict[str, Any], cache_dir: str) -> dict[str, Any]:
    """`measure` of a datalist item, from `cache_dir` where these very files were measured with this table before.

    Raises:
        CaseError: an image or label map that cannot be read.
    """
    identity = [FORMAT, file_identity(item), item["dataset"], item["case"], item["modality"], table]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:24]
    path = os.path.join(cache_dir, f"{key}.npz")
    try:
        with np.load(path) as kept:
            return {**json.loads(str(kept["facts"])), **{name: kept[name] for name in kept.files if name != "facts"}}
    except DAMAGED:  # or not there
        record = measure(item, LabelTable.from_dict(table))
    arrays = {name: value for name, value in record.items() if isinstance(value, np.ndarray)}
    facts = {name: value for name, value in record.items() if name not in arrays} | {"key": key}

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, facts=np.array(json.dumps(facts)), **arrays)

    atomic_write(path, write)
    return {**facts, **arrays}


def measure(item: Mapping[str, Any], table: LabelTable) -> dict[str, Any]:
    """Grid, intensities, labels and content hash of a datalist item, as plain values and arrays.

    ``targets``: of every annotated target its volume (``ml``), ``pieces``, ``specks``, ``stray`` (share of it outside the
    largest piece), ``center_mm`` and ``place`` (a voxel of it); all positions are (S, P, L). ``outside``: pieces that
    touch nothing of the target that they should lie in. ``form``: how the foreground lies around its center.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image, codes, raw, complaint = read_case(item, table)
    spacing = spacing_of(image.affine)
    thinned = image.array[(slice(None), *(slice(None, None, max(1, n // 64)) for n in image.array.shape[1:]))]
    ends = [(float(channel.min()), float(channel.max())) for channel in image.array]
    middle = np.percentile(thinned.reshape(len(thinned), -1), (0.5, 50, 99.5), axis=1).T
    voxel_ml = float(np.prod(spacing)) * upright_share(image.affine) / 1000
    return {
        **{key: item[key] for key in ("dataset", "case", "modality")},
        "axes": "".join(aff2axcodes(raw.affine)),
        "shape": list(image.array.shape[1:]),
        "spacing_mm": [round(side, 5) for side in spacing],
        "intensity": [[low, *map(float, row), high] for (low, high), row in zip(ends, middle, strict=True)],
        "warnings": list(dict.fromkeys(str(one.message) for one in caught)),
        "complaint": complaint,
        **_labels(codes, table, item["dataset"], spacing, voxel_ml),
        **describe_image(image.array[0], spacing, item["modality"]),
    }


def read_case(item: Mapping[str, Any], table: LabelTable) -> tuple[RawVolume, np.ndarray, RawVolume, str]:
    """(image (C, S, P, L), local codes (S, P, L), image as stored, what the label table does not list)."""
    raw = read_volume(item["image"])
    array, affine = to_spl(raw, np.float32)
    image, complaint = RawVolume(array, affine, raw.source), ""
    check_image(array, Preparation((1.0, 1.0, 1.0), in_channels=len(array)), item["modality"], raw.source)
    try:
        codes = load_codes(item["label"], table, item["dataset"], image)
    except CaseError as error:
        declared = table.to_dict()
        for entry in declared["datasets"]:
            entry["others"] = "background"
        codes = load_codes(item["label"], LabelTable.from_dict(declared), item["dataset"], image)  # or the same error
        complaint = str(error)
    return image, np.ascontiguousarray(codes.array[0]), raw, complaint


def _labels(
    codes: np.ndarray, table: LabelTable, dataset: str, spacing_mm: tuple[float, ...], voxel_ml: float
) -> dict[str, Any]:
    """``targets``, ``outside`` and the form, from local codes (S, P, L)."""
    rows = table.rows(dataset) == 1
    is_of = {name: rows[:, table.names.index(name)] for name in table.annotated(dataset)}  # bool per local code
    boxes, targets, outside = boxes_of(codes), {}, []
    for name, is_it in is_of.items():
        found = [boxes[code - 1] for code in np.flatnonzero(is_it) if 0 < code <= len(boxes) and boxes[code - 1]]
        if not found:
            targets[name] = {"ml": 0.0, "pieces": 0, "specks": 0, "stray": 0.0}
            continue
        sides = zip(enclosing(found), codes.shape, strict=True)  # and a voxel around it
        box = tuple(slice(max(0, low - 1), min(size, high + 1)) for (low, high), size in sides)
        pieces = cc3d.connected_components(np.ascontiguousarray(is_it[codes[box]]).view(np.uint8))
        facts = cc3d.statistics(pieces)
        sizes, centers = facts["voxel_counts"], facts["centroids"] + [side.start for side in box]
        targets[name] = _target(sizes[1:].astype(float), centers[1:], spacing_mm, voxel_ml)
        parent = table.entry(name).get("inside")
        around = is_of[parent] & ~is_it if parent in is_of else np.zeros(1, bool)
        if around.any():  # else the parent is nothing but this target here
            for piece in _apart(pieces, around[codes[box]]):
                size, place = int(sizes[piece]), [int(x) for x in np.round(centers[piece])]
                outside.append(
                    {"target": name, "parent": parent, "voxels": size, "ml": size * voxel_ml, "place": place}
                )
    return {"targets": targets, "outside": outside, **_form(rows.any(1)[codes], spacing_mm)}


def _target(sizes: np.ndarray, centers: np.ndarray, spacing_mm: tuple[float, ...], voxel_ml: float) -> dict[str, Any]:
    """Facts of a target from its pieces' voxels (n) and centers (n, 3)."""
    odd = np.argsort(-sizes)[min(1, len(sizes) - 1)]  # where to look: the second piece, if there is one
    return {
        "ml": float(sizes.sum()) * voxel_ml,
        "pieces": len(sizes),
        "specks": int((sizes <= SPECK_VOXELS).sum()),
        "stray": float(1 - sizes.max() / sizes.sum()),
        "center_mm": [float(x) for x in (centers * sizes[:, None]).sum(0) / sizes.sum() * spacing_mm],
        "place": [int(x) for x in np.round(centers[odd])],
    }


def _apart(pieces: np.ndarray, around: np.ndarray) -> list[int]:
    """The pieces (numbers from 1 in a volume) that share no face with the mask `around`."""
    parent = int(pieces.max()) + 1
    joined = np.where(around, parent, pieces.astype(np.uint32))
    touching = {piece for pair in cc3d.region_graph(joined, connectivity=6) if parent in pair for piece in pair}
    return sorted({*range(1, parent)} - touching)


def _form(foreground: np.ndarray, spacing_mm: tuple[float, ...]) -> dict[str, Any]:
    """``form`` (12, 12, 12) float16, norm 1, and ``radius_mm``: the same structure looks the same in another scan."""
    at = np.argwhere(foreground)
    at = at[:: max(1, len(at) // 20000)] * spacing_mm
    if len(at) < 20:
        return {"form": np.zeros((FORM_BINS,) * 3, np.float16), "radius_mm": 0.0}
    at = at - at.mean(0)
    radius = float(np.sqrt((at**2).sum(1).mean()))
    form, _ = np.histogramdd(at, FORM_BINS, [(-FORM_REACH * radius, FORM_REACH * radius)] * 3)
    return {"form": (form / np.linalg.norm(form)).astype(np.float16), "radius_mm": radius}
