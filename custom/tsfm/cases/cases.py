"""From a datalist item to checked arrays: image and label codes on the source grid, in (S, P, L) order."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..labels import LabelTable
from .pool import complete_items
from .volumes import CaseError, CaseWarning, RawVolume, axis_codes, check_same_grid, read_volume, spacing_of, to_spl

HU_RANGE = (-9000.0, 35000.0)
"""No CT scanner writes values beyond these, padding (-3024, -8192) and metal (up to about 31000) included."""


@dataclass(frozen=True)
class Preparation:
    """How images are prepared; plain values, so that it travels in a checkpoint.

    spacing_mm: target voxel sides (S, P, L). intensity: modality -> {"lower", "upper", "mean", "sd"} in its own units
    (CT: HU); a modality that is not listed is z-scored per case and channel. masked: modality -> whether the z-score
    looks at the non-zero region only (nnU-Net's plan); by default where cropping removed more than a quarter of the
    case. default_modality: for items that name none.

    The rest is for networks that were trained elsewhere. channels: the rule of each channel, whatever its modality:
    {"scheme": "ct" (with lower, upper, mean, sd) | "zscore" (with "masked") | "none" | "01" (to the range 0 to 1) | "rgb"
    (over 255)}. orientation: of the axes, see `reading.axis_codes`; where it is not "SPL", "(S, P, L)" reads "the three
    axes in this order" everywhere. resample_first: normalise after resampling (nnU-Net 1), not before.
    """

    spacing_mm: tuple[float, float, float]
    intensity: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    in_channels: int = 1
    default_modality: str = "CT"
    masked: Mapping[str, bool] = field(default_factory=dict)
    channels: Sequence[Mapping[str, Any]] = ()
    orientation: str = "SPL"
    resample_first: bool = False

    def __post_init__(self) -> None:
        spacing = tuple(float(side) for side in self.spacing_mm)
        if len(spacing) != 3 or not all(np.isfinite(side) and side > 0 for side in spacing):
            raise ValueError(f"Preparation.spacing_mm is {self.spacing_mm}; expected three positive numbers (S, P, L)")
        object.__setattr__(self, "spacing_mm", spacing)
        for modality, values in self.intensity.items():
            missing = {"lower", "upper", "mean", "sd"} - set(values)
            if missing:
                raise ValueError(f"Preparation.intensity of {modality} lacks {sorted(missing)}; it has {list(values)}")
        object.__setattr__(self, "channels", tuple(dict(rule) for rule in self.channels))
        if self.channels and len(self.channels) != self.in_channels:
            raise ValueError(f"Preparation.channels has {len(self.channels)} rules for {self.in_channels} channels")
        axis_codes(np.eye(4), self.orientation)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON from which `from_dict` builds the same preparation."""
        plain = asdict(self)
        plain["spacing_mm"] = list(self.spacing_mm)
        plain["intensity"] = {
            name: {k: float(v) for k, v in sorted(values.items())} for name, values in sorted(self.intensity.items())
        }
        plain["channels"] = [dict(rule) for rule in self.channels]
        plain["masked"] = {name: bool(value) for name, value in sorted(self.masked.items())}
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preparation:
        """The preparation that `to_dict` wrote."""
        return cls(**values)


@dataclass
class Case:
    """One case on its own grid: image (C, S, P, L) float32, local label codes (S, P, L) or None, affine of (S, P, L)."""

    image: np.ndarray
    codes: np.ndarray | None
    affine: np.ndarray
    source: str
    dataset: str
    modality: str
    name: str

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        return spacing_of(self.affine)


def load_case(item: Mapping[str, Any], table: LabelTable | None, preparation: Preparation) -> Case:
    """Read and check one datalist item; `table` None (or an item without "label") leaves `codes` None.

    Raises:
        CaseError: missing or unreadable file, wrong channels, NaN or infinite or only zero voxels, image and label on
            different grids, fractions or unknown ids in the label map.
    """
    if table is not None:
        item = complete_items([item], table, preparation.default_modality)[0]
    modality = item.get("modality") or preparation.default_modality
    raw = read_volume(item["image"])
    image, affine = to_spl(raw, np.float32, preparation.orientation)
    image_grid = RawVolume(image, affine, raw.source)
    del raw
    check_image(image, preparation, modality, image_grid.source)
    codes = None
    if table is not None and item.get("label") is not None:
        codes = _load_codes(item, table, image_grid, preparation.orientation)
    return Case(image, codes, affine, image_grid.source, item.get("dataset", ""), modality, item.get("case", ""))


def check_image(image, preparation: Preparation, modality: str, source: str) -> None:
    """Raise CaseError for a wrong channel count, non-finite or only zero voxels; warn of a CT that is not in HU.

    `image`: (C, S, P, L), numpy or torch.
    """
    if len(image) != preparation.in_channels:
        raise CaseError(
            f"{source}: {len(image)} channel(s), expected {preparation.in_channels}: give one 3D file per "
            "channel, one 4D file with the channels last, or set in_channels"
        )
    lowest, highest = float(image.min()), float(image.max())
    if not np.isfinite([lowest, highest]).all():
        count = int(np.count_nonzero(~np.isfinite(np.asarray(image))))
        raise CaseError(f"{source}: {count} voxels are NaN or infinite, expected finite intensities: repair the file")
    if lowest == highest == 0:
        raise CaseError(f"{source}: every voxel is zero, so there is nothing to see; leave the case out or replace it")
    if modality == "CT" and not (HU_RANGE[0] < lowest < -50 and 50 < highest < HU_RANGE[1]):
        warnings.warn(
            f"{source}: intensities from {lowest:g} to {highest:g} cannot be Hounsfield units (air -1000, water 0, "
            "bone up to 2000): check slope and intercept, or the item's modality",
            CaseWarning,
            stacklevel=2,
        )


def _load_codes(item: Mapping[str, Any], table: LabelTable, image: RawVolume, orientation: str) -> np.ndarray:
    """Local codes (S, P, L) of one label map, or of one mask per structure."""
    if not isinstance(item["label"], Mapping):
        return _encode(table, item["dataset"], *_load_labels(item["label"], image, orientation))
    ids = table.local_ids(item["dataset"])
    unknown = [name for name in item["label"] if name not in ids]
    if unknown:
        raise CaseError(
            f"{image.source}: label masks for {unknown}, which data set '{item['dataset']}' does not list; "
            f"it lists {list(ids[1:])}"
        )
    missing = [name for name in ids[1:] if isinstance(name, str) and name not in item["label"]]
    if missing:
        raise CaseError(
            f"{image.source}: no label masks for {missing}, which data set '{item['dataset']}' lists; without them these "
            "structures would count as absent"
        )
    codes = np.zeros(image.array.shape[1:], table.code_dtype)
    for name in sorted(item["label"], key=ids.index):
        codes[_load_labels(item["label"][name], image, orientation)[0] != 0] = ids.index(name)
    return codes


def _encode(table: LabelTable, dataset: str, raw: np.ndarray, source: str) -> np.ndarray:
    """Local codes of raw ids (S, P, L), a few slices at a time: counting ids makes 64-bit copies."""
    codes = np.empty(raw.shape, table.code_dtype)
    try:
        for start in range(0, len(raw), 16):
            codes[start : start + 16] = table.encode(dataset, raw[start : start + 16], source)
    except ValueError:
        try:
            table.encode(dataset, raw, source)  # the message counts over the whole volume
        except ValueError as error:
            raise CaseError(str(error)) from error
    return codes


def _load_labels(path, image: RawVolume, orientation: str) -> tuple[np.ndarray, str]:
    """Whole-number label map (S, P, L) on the image's grid, and its path."""
    raw = read_volume(path)
    if len(raw.array) != 1:
        raise CaseError(f"{raw.source}: {len(raw.array)} volumes in a label file; expected one 3D label map")
    labels, affine = to_spl(raw, None, orientation)
    check_same_grid(image, RawVolume(labels, affine, raw.source), "image and label")
    if labels.dtype.kind == "f":
        labels = _whole_numbers(labels, raw.source)
    return labels[0], raw.source


def _whole_numbers(labels: np.ndarray, source: str) -> np.ndarray:
    """The same values as integers; CaseError where there are fractions, NaN or numbers beyond 32 bits."""
    with np.errstate(invalid="ignore"):
        whole = labels.astype(np.int32)
    wrong = labels != whole
    if wrong.any():
        example = labels[wrong][0]
        raise CaseError(
            f"{source}: {int(wrong.sum())} voxels are not whole numbers (for example {example:g}); a label "
            "map holds ids: resample it with nearest neighbor, and save it as integers"
        )
    return whole


def file_identity(item: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """(absolute path, size, mtime in ns) of every file behind an item, DICOM folders listed file by file.

    Raises:
        CaseError: a file that does not exist.
    """
    label = item.get("label")
    labels = list(label.values()) if isinstance(label, Mapping) else [] if label is None else [label]
    image = item["image"]
    paths = [*(image if isinstance(image, (list, tuple)) else [image]), *labels]
    found = []
    for path in map(os.path.abspath, paths):
        inside = sorted(os.path.join(path, name) for name in os.listdir(path)) if os.path.isdir(path) else [path]
        for file in inside:
            try:
                state = os.stat(file)
            except OSError as error:
                raise CaseError(
                    f"{file}: cannot be read ({error.strerror}); check the data folder and the datalist"
                ) from error
            found.append((file, state.st_size, state.st_mtime_ns))
    return found
