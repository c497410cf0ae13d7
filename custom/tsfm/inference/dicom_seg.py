"""A label map as a DICOM Segmentation (SEG) that lies on the slices of its source series, tilted ones too.

highdicom (requirements-dicom.txt) is imported when a SEG is asked for: it needs pydicom 3, MONAI Label pydicom 2.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .._version import __version__
from ..cases.dicom import slice_files
from ..cases.grids import grid_difference, spacing_of
from ..cases.volumes import read_grid
from ..errors import CaseError
from ..files import atomic_write
from ..labels import LabelTable, is_lesion
from .colors import colors_of

KINDS = ("BINARY", "LABELMAP")
"""One plane of bits per segment, which viewers read; or one map of all segments, smaller, which few read yet."""

STRUCTURE, ABNORMAL = "91723000 Anatomical Structure", "49755003 Morphologically Abnormal Structure"
TISSUE, LESION = "85756007 Tissue", "52988006 Lesion"
SIDES = {"left": "7771000 Left", "right": "24028007 Right"}
"""SNOMED CT codes of DICOM PS3.16: categories (CID 7150), types where a target declares none (CID 7151), sides (CID 244)."""

NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID")
"""What a SEG must repeat of its source; other attributes of patient and study may be empty."""

EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime",
)  # fmt: skip


def highdicom() -> Any:
    """The package, or ImportError with what to do."""
    try:
        import highdicom
    except ImportError as error:
        raise ImportError(
            f"a DICOM SEG is written by highdicom, which cannot be imported ({error}): pip install -r "
            "requirements-dicom.txt (highdicom 0.28.2; not in MONAI Label's environment, whose pydicom is older)"
        ) from error
    logging.getLogger("highdicom").setLevel(logging.WARNING)  # it tells of every module it copies
    return highdicom


def write_seg(
    label_map: torch.Tensor,
    path: str | os.PathLike,
    table: LabelTable,
    kind: str = "BINARY",
) -> None:
    """Write a label map (1, I, J, K) as a SEG that refers to its source series, whole or not at all.

    Segments are the targets that the map shows, in the table's order, with the table's names, SNOMED codes (without:
    Tissue, or Lesion) and colors. A LABELMAP has the map's own values; a BINARY numbers its segments from 1, as DICOM
    asks. Where the map is empty, one empty frame is written of a segment for the table's first target.

    Args:
        label_map: a MetaTensor on the grid of the series as it was read, whose folder its meta data name.
        table: of the map's values.
        kind: one of `KINDS`.

    Raises:
        ImportError: no highdicom.
        CaseError: the source is no DICOM series of single slices, lacks what a SEG must repeat, or lies on another grid.
    """
    hd = highdicom()
    source = str(label_map.meta.get("filename_or_obj", ""))
    slices = source_slices(source)
    values = np.asarray(label_map.detach().cpu())[0]
    grid = read_grid(source)
    apart = grid_difference(grid.shape, grid.affine, values.shape, np.asarray(label_map.affine))
    if apart:
        raise CaseError(f"{source}: the label map is not on the grid of the series: {apart}")
    found = [int(value) for value in np.unique(values) if value]
    if not found:
        found, slices, values = [1], slices[:1], values[:, :, :1]
    frames = values.transpose(2, 1, 0)  # slices, rows, columns
    numbers = {value: value if kind == "LABELMAP" else place for place, value in enumerate(found, start=1)}
    lookup = np.zeros(max(found) + 1, np.uint16 if max(found) > 255 else np.uint8)
    lookup[found] = [numbers[value] for value in found]
    try:
        seg = hd.seg.Segmentation(
            source_images=slices,
            pixel_array=lookup[frames],
            segmentation_type=kind,
            segment_descriptions=[_segment(hd, table, value, numbers[value], slices[0]) for value in found],
            series_instance_uid=hd.UID(),
            series_number=int(slices[0].get("SeriesNumber") or 0) + 1000,
            series_description="TSFM segmentation",
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="TSFM",
            manufacturer_model_name="tsfm",
            software_versions=__version__,
            device_serial_number="none",
            content_label="SEGMENTATION",
            omit_empty_frames=bool(frames.any()),
            specific_character_set="ISO_IR 192",
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise CaseError(f"{source}: highdicom makes no SEG for this series: {error}; leave dicom_seg out") from error
    atomic_write(path, lambda temporary: seg.save_as(temporary), ".dcm")


def source_slices(source: str) -> list[Any]:
    """The headers (pydicom) of a series in the order of the volume's slices, with what a SEG has to repeat.

    Raises:
        CaseError: as `write_seg`; call it before the work whose result shall become a SEG.
    """
    highdicom()
    from pydicom import dcmread

    if not os.path.isdir(source):
        raise CaseError(
            f"{source or 'an image from nowhere'}: a DICOM SEG refers to the slices of a DICOM series; expected a folder "
            "that holds one: leave dicom_seg out for other images"
        )
    slices = [dcmread(name, stop_before_pixels=True) for name in slice_files(source)]
    affine = read_grid(source).affine
    step_mm = float(abs(np.linalg.det(affine[:3, :3])) / np.prod(spacing_of(affine)[:2]))  # along the normal
    for one in slices:
        lacking = [name for name in NEEDED if not one.get(name)]
        if lacking:
            raise CaseError(
                f"{one.filename}: has no {', '.join(lacking)}, which a DICOM SEG has to repeat; take the series from "
                "where it came, or leave dicom_seg out"
            )
        for name in EMPTY:
            if name not in one:
                setattr(one, name, None)
        # What the reader took as rounding, highdicom takes for slices that are turned.
        one.ImageOrientationPatient = slices[0].ImageOrientationPatient
        one.SliceThickness = one.get("SliceThickness") or step_mm
        one.SpacingBetweenSlices = step_mm
    return slices


def _segment(hd: Any, table: LabelTable, value: int, number: int, source: Any) -> Any:
    """How a SEG describes the target with this value in the label map."""
    name = table.names[value - 1]
    codes: Mapping[str, str] = table.entry(name).get("snomed", {})
    lesion = is_lesion(table, name)
    label = table.channel_def()[str(value)]
    described = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=label[:64],
        segmented_property_category=_code(hd, ABNORMAL if lesion else STRUCTURE if codes else TISSUE),
        segmented_property_type=_code(hd, codes.get("type", LESION if lesion else TISSUE)),
        algorithm_type="AUTOMATIC",
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name="TSFM", version=__version__, family=_code(hd, "123110 Artificial Intelligence", "DCM")
        ),
        tracking_id=f"TSFM {label}",
        tracking_uid=f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, f'{source.SeriesInstanceUID} {name}').int}",
        anatomic_regions=[_code(hd, codes["site"])] if "site" in codes else None,
        display_color=hd.color.CIELabColor.from_string(colors_of(table)[value]),
    )
    if "side" in codes:
        described.SegmentedPropertyTypeModifierCodeSequence = [_code(hd, SIDES[codes["side"]])]
    return described


def _code(hd: Any, text: str, scheme: str = "SCT") -> Any:
    value, meaning = text.split(" ", 1)
    return hd.sr.CodedConcept(value, scheme, meaning)
