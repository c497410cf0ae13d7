"""What SimpleITK reads: NRRD, MetaImage, and DICOM series whose geometry follows from every slice's own position.

ITK takes the distance of the first two slices for all of them and the slices' normal for the third axis. Here the
positions decide: they are sorted along the normal and must be even; slices that drift sideways by equal steps (gantry
tilt) give a sheared affine.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from ..errors import CaseError
from ..names import listed
from .folders import SUFFIXES
from .grids import SAME_GRID, warn
from .nifti import Opened, gray
from .packed import voxel_bytes
from .series import FRAMES, PHASES, SERIES, Slice, frame_numbers, naming, read_header, series_slices, simpleitk

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

POSITION_MM = 0.05
"""DICOM positions are often rounded to a tenth of a millimetre."""


def open_series(folder: str) -> Opened:
    """The one DICOM series in a folder.

    Raises:
        CaseError: no series or several; slices that are uneven, repeated, turned, of other sizes or without a position.
    """
    slices = series_slices(folder)
    if _is_multi_frame(slices):
        if len(slices) > 1:
            raise CaseError(f"{folder}: {len(slices)} multi-frame DICOM files; expected one, or one file per slice")
        return open_file(slices[0].name)
    order, affine = _stack(folder, slices)
    slices = [slices[i] for i in order]
    shape = (*slices[0].size, len(slices))
    scales, kinds = {one.scale for one in slices}, {one.kind for one in slices}

    def load() -> np.ndarray:
        sitk = simpleitk(folder)
        reader = sitk.ImageSeriesReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileNames([one.name for one in slices])
        if len(scales) > 1 or len(kinds) > 1 or any(value % 1 for pair in scales for value in pair):
            reader.SetOutputPixelType(sitk.sitkFloat32)  # ITK would round all slices to the first one's type
        with naming(folder):
            image = reader.Execute()
        if image.GetNumberOfComponentsPerPixel() > 1:
            raise CaseError(f"{folder}: DICOM with colors; expected one value per voxel")
        return sitk.GetArrayFromImage(image).transpose(2, 1, 0)[None]

    return Opened(1, shape, affine, "DICOM", load)


def slice_files(folder: str) -> list[str]:
    """The files of the one DICOM series in a folder, one per slice, in the order of the volume's third axis.

    Raises:
        CaseError: as `open_series`; a multi-frame file.
    """
    slices = series_slices(folder)
    if _is_multi_frame(slices):
        raise CaseError(f"{folder}: a multi-frame DICOM file; expected one file per slice")
    return [slices[i].name for i in _stack(folder, slices)[0]]


def _is_multi_frame(slices: Sequence[Slice]) -> bool:
    return any(one.frames > 1 for one in slices)


def _stack(folder: str, slices: Sequence[Slice]) -> tuple[np.ndarray, np.ndarray]:
    """Order of the slices along their normal, and the affine (4, 4) of the stack, to RAS mm."""
    for field, what in (("position", "ImagePositionPatient"), ("orientation", "ImageOrientationPatient")):
        absent = [one.name for one in slices if getattr(one, field) is None]
        if absent:
            raise CaseError(
                f"{folder}: {len(absent)} of {len(slices)} DICOM files have no {what}, for example "
                f"{os.path.basename(absent[0])}, so their place is not known; leave out what is no slice of the volume"
            )
    axes = np.array([one.orientation for one in slices]).reshape(-1, 2, 3)
    _same(folder, slices, np.abs(axes - axes[0]).max((1, 2)) > 1e-3, "turned another way than the first (a localizer?)")
    _same(folder, slices, [one.size != slices[0].size for one in slices], "of another size than the first")
    spacing = np.array([one.spacing for one in slices])
    _same(folder, slices, np.abs(spacing / spacing[0] - 1).max(1) > 1e-3, "of another PixelSpacing than the first")
    if slices[0].pixel_spacing is None:
        raise CaseError(f"{folder}: DICOM files without PixelSpacing, so voxels have no size; convert the series again")
    row, column = axes.mean(0) / np.linalg.norm(axes.mean(0), axis=1, keepdims=True)
    normal = np.cross(row, column)
    positions = np.array([one.position for one in slices])
    order = np.argsort(positions @ normal, kind="stable")
    step = _step(folder, [slices[i] for i in order], positions[order], normal)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([row * spacing[0, 0], column * spacing[0, 1], step], axis=1)
    affine[:3, 3] = positions[order[0]]
    return order, LPS_TO_RAS @ affine


def _same(folder: str, slices: Sequence[Slice], odd: Sequence[bool], what: str) -> None:
    found = [os.path.basename(one.name) for one, wrong in zip(slices, odd, strict=True) if wrong]
    if found:
        raise CaseError(
            f"{folder}: {len(found)} of {len(slices)} slices of the DICOM series are {what}: {listed(found, 4)}; give what "
            "belongs together a folder of its own"
        )


def _step(folder: str, slices: Sequence[Slice], positions: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """From one slice to the next, LPS mm (3,), for sorted slices; CaseError unless they lie evenly on a line."""
    if len(slices) == 1:
        if not slices[0].thickness:
            warn(f"{folder}: a single slice that does not say how thick it is; taken as 1 mm")
        return normal * (slices[0].thickness or 1.0)
    along = positions @ normal
    gaps = np.diff(along)
    usual = float(np.median(gaps[gaps > 1e-3])) if (gaps > 1e-3).any() else 0.0
    allowed = max(SAME_GRID * usual, min(POSITION_MM, usual / 2))
    if (gaps <= allowed).any():
        raise CaseError(f"{folder}: {_repeats(slices, along, allowed)}; give each volume a folder of its own")
    for what in list(PHASES.values())[:3]:
        values = dict.fromkeys(one.phases[what] for one in slices)
        if len(values) > 1:
            raise CaseError(
                f"{folder}: slices with {len(values)} different {what} ({listed(values, 4)}) in one DICOM "
                "series; give each volume a folder of its own"
            )
    # Positions may be rounded, so the line through all of them decides, and where it leaves each slice.
    number = np.arange(len(slices)) - (len(slices) - 1) / 2
    step = number @ positions / (number @ number)
    off = np.linalg.norm(positions - positions.mean(0) - number[:, None] * step, axis=1)
    if off.max() > allowed or np.abs(gaps - usual).max() > max(2 * allowed, 2 * POSITION_MM):
        places = listed((f"{value:g}" for value in along.round(3)), 40)
        raise CaseError(f"{folder}: {_holes(along, gaps, usual, allowed)}; positions along the normal (mm): {places}")
    lateral = np.linalg.norm(step - (step @ normal) * normal)
    if lateral * (len(slices) - 1) < allowed:
        return (step @ normal) * normal
    warn(
        f"{folder}: tilted gantry, each slice lies {lateral:.3g} mm beside the one before "
        f"({np.degrees(np.arctan2(lateral, step @ normal)):.1f} degrees); the volume is read as a sheared one"
    )
    return step


def _repeats(slices: Sequence[Slice], along: np.ndarray, allowed: float) -> str:
    """Which slices lie at one place, and what tells them apart."""
    place = np.concatenate([[0], np.cumsum(np.diff(along) > allowed)])
    counts = np.bincount(place)
    repeated = np.flatnonzero(counts > 1)
    where = along[np.isin(place, repeated)]
    reason = "nothing in their headers tells them apart (copies?)"
    for what in PHASES.values():
        values = [slices[i].phases[what] for i in np.flatnonzero(place == repeated[0])]
        if len(set(values)) > 1:
            reason = f"they differ in {what}: {', '.join(values)}"
            break
    return (
        f"{len(slices)} slices of one DICOM series lie at {len(counts)} places, {len(repeated)} of them taken "
        f"more than once (from {where[0]:g} to {where[-1]:g} mm along the normal); {reason}"
    )


def _holes(along: np.ndarray, gaps: np.ndarray, usual: float, allowed: float) -> str:
    """What is wrong with the distances of slices, and what to do."""
    steps = np.rint(gaps / usual)
    wide = np.flatnonzero(steps > 1)
    if wide.size and (np.abs(gaps - steps * usual) <= allowed).all():
        at = listed((f"{along[i]:g} and {along[i + 1]:g}" for i in wide), 5)
        return (
            f"{int((steps - 1).sum())} slices of the DICOM series are missing, between {at} mm where others are {usual:g} mm "
            "apart; copy the whole series"
        )
    if gaps.max() - gaps.min() <= allowed:
        return "slices of the DICOM series drift sideways by uneven steps; expected a straight stack"
    return (
        f"slices of the DICOM series are from {gaps.min():g} to {gaps.max():g} mm apart; expected even steps: give a "
        "part with even slices, or resample the series to NIfTI"
    )


def open_file(path: str) -> Opened:
    """One file that SimpleITK reads: NRRD, MetaImage, or DICOM that holds a whole volume.

    Raises:
        CaseError: unreadable, RGB, of other than three or four axes, one slice of a DICOM series.
    """
    sitk = simpleitk(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    with naming(path):
        reader.ReadImageInformation()
    size, channels = reader.GetSize(), reader.GetNumberOfComponents()
    if reader.HasMetaDataKey(SERIES):
        _check_alone(sitk, path, reader)
    extra = size[3] if len(size) == 4 else 1
    if len(size) not in (3, 4) or (channels > 1 and extra > 1):
        raise CaseError(f"{path}: a {len(size)}D image; expected a 3D volume, or a 4D one with its channels last")
    affine = np.eye(4)
    direction = np.array(reader.GetDirection()).reshape(len(size), -1)[:3, :3]
    affine[:3, :3] = direction * np.array(reader.GetSpacing()[:3])
    affine[:3, 3] = reader.GetOrigin()[:3]
    if size[2:] == (1,) and reader.HasMetaDataKey(SERIES) and (thickness := read_header(path).thickness):
        affine[:3, 2] *= thickness / np.linalg.norm(affine[:3, 2])  # which ITK takes for 1 mm
    if reader.HasMetaDataKey(FRAMES) and float(reader.GetMetaData(FRAMES)) > 1:
        _check_frames(path, size[2], affine)
    kind = reader.GetPixelIDValue()
    colors = channels in (3, 4) and (kind == sitk.sitkVectorUInt8 or "RGB" in sitk.GetPixelIDValueAsString(kind))

    def load() -> np.ndarray:
        with naming(path):
            present = voxel_bytes(path) if path.lower().endswith(SUFFIXES) else None
            array = sitk.GetArrayFromImage(reader.Execute())
        plane = array.nbytes // max(1, array.shape[0])
        if present is not None and not array.nbytes <= present < array.nbytes + plane:
            raise CaseError(
                f"{path}: its header asks for {array.nbytes} bytes of voxels, it holds {present}; the header is damaged: "
                "copy or download it again"
            )
        if channels > 1:
            array = np.moveaxis(array, -1, 0)
            if colors:
                array = gray(np.rec.fromarrays(list(array[:3]), names="R,G,B"), path)[None]
        elif len(size) == 3:
            array = array[None]
        return array.transpose(0, 3, 2, 1)

    return Opened(1 if colors else channels * extra, tuple(size[:3]), LPS_TO_RAS @ affine, "", load)


def _check_alone(sitk, path: str, reader) -> None:
    """A DICOM file is a volume of its own, or CaseError."""
    folder = os.path.dirname(os.path.abspath(path))
    others = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(folder, reader.GetMetaData(SERIES).strip())
    if len(others) > 1:
        raise CaseError(
            f"{path}: one of {len(others)} files of a DICOM series; give its folder, {folder}, to use the series"
        )


def _check_frames(path: str, frames: int, affine: np.ndarray) -> None:
    """CaseError unless the frames of one file are what ITK takes them for: an even stack (`affine`, LPS) of one scale."""
    places = np.array(frame_numbers(path, "0020|9113", "0020|0032", 3))
    if len(places) != frames:
        warn(f"{path}: a multi-frame DICOM file; SimpleITK places its frames, even steps are taken for granted")
        return
    apart = np.linalg.norm(places - affine[:3, 3] - np.arange(frames)[:, None] * affine[:3, 2], axis=1)
    off = np.flatnonzero(apart > max(SAME_GRID * np.linalg.norm(affine[:3, 2]), POSITION_MM))
    slopes, intercepts = (frame_numbers(path, "0028|9145", tag, 1) for tag in ("0028|1053", "0028|1052"))
    if off.size or any(one != several[0] for several in (slopes, intercepts) for one in several):
        reason = f"frame {off[0] + 1} of {frames} lies {apart[off[0]]:.3g} mm beside its place" if off.size else ""
        raise CaseError(
            f"{path}: a multi-frame DICOM file whose frames are no even stack of one volume: "
            f"{reason or 'they have different rescalings'}; `dcm2niix -o OUT FOLDER` writes each volume as NIfTI"
        )
