"""Which files of a folder are its one DICOM series, and what their headers say; SimpleITK reads them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ..errors import CaseError
from ..names import counted, listed
from .folders import is_dicom, legible
from .grids import warn

SERIES, FRAMES = "0020|000e", "0028|0008"
"""Tags of SeriesInstanceUID and NumberOfFrames."""

NO_IMAGES = ("SEG", "RTDOSE")
"""Modalities whose files have voxels, but no image of a body."""

PHASES = {
    "0020|0100": "TemporalPositionIdentifier", "0018|0081": "EchoTime", "0018|9087": "DiffusionBValue",
    "0020|0012": "AcquisitionNumber", "0018|1060": "TriggerTime", "0008|0008": "ImageType", "0008|0032": "AcquisitionTime",
    "0008|0018": "SOPInstanceUID",
}  # fmt: skip
"""What may tell apart slices that lie at one place, what explains most first."""


@dataclass(frozen=True)
class Slice:
    """What the header of one DICOM file says; None, or an empty text, is what it does not say. Lengths in mm, LPS.

    size and spacing: along a row, then along a column. scale: slope and intercept. kind: SimpleITK's type of its voxels.
    phases: by the names of `PHASES`.
    """

    name: str
    size: tuple[int, int]
    spacing: tuple[float, float]
    pixel_spacing: list[float] | None
    position: list[float] | None
    orientation: list[float] | None
    thickness: float | None
    scale: tuple[float, float]
    kind: int
    frames: int
    sop_class: str
    modality: str
    image_type: str
    series: str
    description: str
    phases: dict[str, str]

    @property
    def is_aside(self) -> bool:
        """Whether this is no part of a volume: a localizer, no image of a body, or a plane without a place."""
        is_localizer = "LOCALIZER" in self.image_type.split("\\")
        return is_localizer or self.modality in NO_IMAGES or (self.position is None and self.frames == 1)


def series_slices(folder: str) -> list[Slice]:
    """The slices of the one series in a folder; among several, localizers and what holds no image planes do not count.

    Raises:
        CaseError: no series or several; a header that cannot be read.
    """
    sitk = simpleitk(folder)
    with naming(folder):
        ids = sitk.ImageSeriesReader.GetGDCMSeriesIDs(folder)
        series = [sitk.ImageSeriesReader.GetGDCMSeriesFileNames(folder, one) for one in ids]
    aside = [files for files in series if len(series) > 1 and all(read_header(name).is_aside for name in files)]
    kept = [files for files in series if files not in aside]
    if len(kept) != 1:
        advice = "give each a folder of its own (`dcm2niix -f %s_%p -o OUT FOLDER` writes one NIfTI file per series)"
        if not kept:
            advice = "they are localizers or hold no image planes" if aside else "its DICOM files hold no images"
        found = kept or aside
        shown = listed(map(_described, found), between="; ") or "none"
        raise CaseError(f"{folder}: {len(found)} DICOM series: {shown}; expected exactly one: {advice}")
    slices = [read_header(name) for name in kept[0]]
    _check_others(folder, aside, {os.path.basename(name) for files in series for name in files}, slices[0].sop_class)
    return slices


def _described(files: Sequence[str]) -> str:
    """A series as messages list it: its description, the number of its slices and how thick they are."""
    first = read_header(files[0])
    thick = "unknown thickness" if first.thickness is None else f"{first.thickness:g} mm"
    return f"'{legible(first.description or first.series)}' ({counted(len(files) * first.frames, 'slice')} of {thick})"


def _check_others(folder: str, aside: Sequence[Sequence[str]], in_series: set[str], sop_class: str) -> None:
    """Name the series that are left out, and the DICOM files that are in no series: reports, contours.

    Raises:
        CaseError: one of these says that it is a slice like the others (by its SOP class), or nothing (an empty file), but
            GDCM could not read it.
    """
    files = {one.name for one in os.scandir(folder) if one.is_file() and not one.name.startswith(".")}
    others = [name for name in sorted(files - in_series) if is_dicom(os.path.join(folder, name))]
    damaged = [legible(name) for name in others if _declared_class(os.path.join(folder, name)) in (sop_class, "")]
    if damaged:
        raise CaseError(
            f"{folder}: {len(damaged)} DICOM files of the kind of the series or of none cannot be read: {listed(damaged)}; "
            "they are damaged or cut short: copy or download them again"
        )
    if aside or others:
        shown = listed([*map(_described, aside), *map(legible, others)], between="; ")
        warn(f"{folder}: left out beside the series, as localizers or without image planes: {shown}")


def _declared_class(path: str) -> str:
    """The SOP class that a DICOM file declares before its data set, or nothing."""
    with open(path, "rb") as file:
        found = re.search(rb"\x02\x00\x02\x00UI..([\d.]+)", file.read(1024), re.DOTALL)
    return found[1].decode() if found else ""


def read_header(name: str) -> Slice:
    """What the header of one DICOM file says.

    Raises:
        CaseError: it cannot be read, or holds something else where numbers should be.
    """
    reader = simpleitk(name).ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(name)
    with naming(name):
        reader.ReadImageInformation()

    def text(tag: str) -> str:
        return reader.GetMetaData(tag).strip(" \0") if reader.HasMetaDataKey(tag) else ""

    def numbers(tag: str, count: int) -> list[float] | None:
        found = text(tag)
        return _numbers(found, count, name, tag) if found else None

    def one_number(tag: str, default: float | None = None) -> float | None:
        return (numbers(tag, 1) or [default])[0]

    return Slice(
        name=name,
        size=tuple(reader.GetSize()[:2]),
        spacing=tuple(reader.GetSpacing()[:2]),
        pixel_spacing=numbers("0028|0030", 2),
        position=numbers("0020|0032", 3),
        orientation=numbers("0020|0037", 6),
        thickness=one_number("0018|0050"),
        scale=(one_number("0028|1053", 1.0), one_number("0028|1052", 0.0)),
        kind=reader.GetPixelID(),
        frames=int(one_number(FRAMES, 1)),
        sop_class=text("0008|0016"),
        modality=text("0008|0060"),
        image_type=text("0008|0008"),
        series=text(SERIES),
        description=text("0008|103e"),
        phases={what: text(tag) or "none" for tag, what in PHASES.items()},
    )


def frames_of(name: str) -> list[tuple[list[float], tuple[float, float]]]:
    """Place (LPS mm) and rescaling (slope, intercept) of each frame of a multi-frame file, which SimpleITK does not tell.

    Empty for a file that does not say where each of its frames lies.

    Raises:
        CaseError: no pydicom, or something else where the frames should be described.
    """
    try:
        from pydicom import dcmread
    except ImportError as error:
        raise CaseError(f"{name}: reading a multi-frame DICOM file needs pydicom: pip install pydicom") from error
    found = []
    try:
        described = dcmread(name, stop_before_pixels=True, force=True)  # ITK reads files without a preamble, too
        for group in described.get("PerFrameFunctionalGroupsSequence", []):
            place, scale = (group.get(part) for part in ("PlanePositionSequence", "PixelValueTransformationSequence"))
            if not place:
                return []
            position = [float(value) for value in place[0].ImagePositionPatient]
            found.append(
                (position, (float(scale[0].RescaleSlope), float(scale[0].RescaleIntercept)) if scale else (1.0, 0.0))
            )
    except Exception as error:  # of whatever kind: pydicom has many
        raise CaseError(
            f"{name}: what it says of its frames cannot be read ({type(error).__name__}: {error}); copy or download it again"
        ) from error
    return found


def _numbers(text: str, count: int, name: str, tag: str) -> list[float]:
    try:
        values = [float(part) for part in text.split("\\")]
    except ValueError:
        values = []
    if len(values) != count or not np.isfinite(values).all():
        raise CaseError(f"{name}: the DICOM tag ({tag.replace('|', ',')}) is {text!r}; expected {count} numbers")
    return values


def simpleitk(path: str):
    """SimpleITK, for a path that it takes: with other names it ends the process."""
    try:
        import SimpleITK
    except ImportError as error:
        raise CaseError(f"{path}: reading this format needs SimpleITK: pip install SimpleITK") from error
    if legible(path) != os.fspath(path):
        raise CaseError(
            f"{legible(path)}: a name in another encoding than UTF-8, which SimpleITK does not read; rename it"
        )
    return SimpleITK


@contextmanager
def naming(path: str):
    """SimpleITK's errors as CaseErrors that name the file."""
    try:
        yield
    except MemoryError as error:
        raise CaseError(f"{path}: its voxels do not fit into memory; free some, or cut the image") from error
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise CaseError(
            f"{path}: SimpleITK cannot read it ({reason}); expected NIfTI, NRRD, MetaImage, or a folder with one DICOM "
            "series: copy or download it again"
        ) from error
