"""From a datalist item to checked arrays: image and label codes on the source grid, in (S, P, L) order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..errors import CaseError
from ..labels import LabelTable
from .grids import spacing_of, warn
from .pool import complete_items
from .volumes import RawVolume, axis_codes, on_grid_of, read_labels, read_volume, to_spl

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
    (over 255)}. orientation: of the axes, see `volumes.axis_codes`; where it is not "SPL", "(S, P, L)" reads "the three
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
        intensity = sorted(self.intensity.items())
        return {
            **asdict(self),
            "spacing_mm": list(self.spacing_mm),
            "intensity": {name: {k: float(v) for k, v in sorted(values.items())} for name, values in intensity},
            "channels": [dict(rule) for rule in self.channels],
            "masked": {name: bool(value) for name, value in sorted(self.masked.items())},
        }

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


def load_case(
    item: Mapping[str, Any], table: LabelTable | None, preparation: Preparation, codes: np.ndarray | None = None
) -> Case:
    """Read and check one datalist item; `table` None (or an item without "label") leaves `codes` None.

    With `codes`, read before from the same files, the label is not read again.

    Raises:
        CaseError: missing or unreadable file, wrong channels, NaN or infinite or only zero voxels, image and label on
            different grids, fractions or unknown ids in the label map.
    """
    if table is not None:
        item = complete_items([item], table, preparation.default_modality)[0]
    modality = item.get("modality") or preparation.default_modality
    raw = read_volume(item["image"])
    image, affine = to_spl(raw, np.float32, preparation.orientation)
    raw = RawVolume(image, affine, raw.source)
    check_image(image, preparation, modality, raw.source)
    if codes is None and table is not None and item.get("label") is not None:
        codes = np.ascontiguousarray(load_codes(item["label"], table, item["dataset"], raw).array[0])
    return Case(image, codes, affine, raw.source, item.get("dataset", ""), modality, item.get("case", ""))


def check_image(image, preparation: Preparation, modality: str, source: str) -> None:
    """Raise CaseError for a wrong channel count, non-finite or only zero voxels; warn of a CT that is not in HU.

    `image`: (C, S, P, L), numpy or torch.
    """
    if len(image) != preparation.in_channels:
        raise CaseError(
            f"{source}: {len(image)} channel(s), expected {preparation.in_channels}, as the weights or the first case have: "
            "give one 3D file per channel, or one 4D file with the channels last; of a series over time a single volume"
        )
    limits = [(float(channel.min()), float(channel.max())) for channel in image]
    lowest, highest = min(low for low, _ in limits), max(high for _, high in limits)
    if not np.isfinite(limits).all():
        count = int(np.count_nonzero(~np.isfinite(np.asarray(image))))
        raise CaseError(
            f"{source}: {count} voxels are NaN or infinite (in 32 bits), expected finite intensities: repair the file"
        )
    if lowest == highest == 0:
        raise CaseError(f"{source}: every voxel is zero, so there is nothing to see; leave the case out or replace it")
    for channel, (low, high) in enumerate(limits):
        if low == high:
            where = f"channel {channel} of {len(limits)}: " if len(limits) > 1 else ""
            warn(f"{source}: {where}every voxel holds {low:g}, so there is nothing in it; check the file")
    if modality == "CT" and not (HU_RANGE[0] < lowest < -50 and 50 < highest < HU_RANGE[1]):
        warn(
            f"{source}: intensities from {lowest:g} to {highest:g} cannot be Hounsfield units (air -1000, water 0, "
            "bone up to 2000): check slope and intercept, or the modality (--modality MR, or the item's)"
        )


def load_codes(
    label: Any, table: LabelTable, dataset: str, image: RawVolume | None = None, what: str = "image and label"
) -> RawVolume:
    """Local codes (1, I, J, K) of one label map, or of one mask per structure (mapping name -> file).

    With `image` the codes lie on its axes, whatever axes the files have; without it on those of the (first) file. Where
    masks overlap, the one that the table lists later wins.

    Raises:
        CaseError: unreadable files, grids that differ, masks that are missing or not listed, unknown ids; a mask over one
            that says more (a kidney over its tumor).
    """
    if isinstance(label, Mapping):
        return _merge_masks(label, table, dataset, image, what)
    raw = read_labels(label)
    raw = raw if image is None else on_grid_of(image, raw, what)
    return RawVolume(_encode(table, dataset, raw.array[0], raw.source)[None], raw.affine, raw.source)


def _merge_masks(
    label: Mapping[str, Any], table: LabelTable, dataset: str, image: RawVolume | None, what: str
) -> RawVolume:
    """`load_codes` of one mask file per structure."""
    ids = table.local_ids(dataset)
    source = image.source if image is not None else str(next(iter(label.values()), dataset))
    structures = [name for name in ids[1:] if isinstance(name, str)]
    lacking, unknown = [name for name in structures if name not in label], [name for name in label if name not in ids]
    if lacking or unknown or not label:
        raise CaseError(
            f"{source}: label masks for {len(label)} structures, none for {lacking}, unlisted are {unknown}; expected one of "
            f"each that data set '{dataset}' lists (without it a structure would count as absent), and of no other"
        )
    codes = None
    for name in sorted(label, key=ids.index):
        mask = read_labels(label[name])
        image = mask if image is None else image
        mask = on_grid_of(image, mask, what)
        if codes is None:
            codes = RawVolume(np.zeros(mask.array.shape, table.code_dtype), image.affine, mask.source)
        inside = mask.array != 0
        _check_hidden(codes.array, inside, table, dataset, name, mask.source)
        codes.array[inside] = ids.index(name)
    return codes


def _check_hidden(
    codes: np.ndarray, inside: np.ndarray, table: LabelTable, dataset: str, name: str, source: str
) -> None:
    """CaseError where the mask of `name` (`inside`) lies over `codes` that stand for its targets and for more within them."""
    ids = table.local_ids(dataset)
    rows = table.rows(dataset) == 1
    own = rows[ids.index(name)]
    within = [
        code for code in range(1, ids.index(name)) if own.any() and rows[code][own].all() and (rows[code] & ~own).any()
    ]
    hidden = codes[inside & np.isin(codes, within)] if within else ()
    if len(hidden):
        inner = ids[int(hidden[0])]
        raise CaseError(
            f"{source}: the mask of '{name}' covers {len(hidden)} voxels of '{inner}', which lies in it, and of overlapping "
            f"masks the one listed later counts: list '{inner}' after '{name}' in \"labels\" of data set '{dataset}'"
        )


def _encode(table: LabelTable, dataset: str, raw: np.ndarray, source: str) -> np.ndarray:
    """Local codes of raw ids (I, J, K), a few slices at a time: counting ids makes 64-bit copies."""
    codes = np.empty_like(raw, table.code_dtype)
    axis = int(np.argmax(np.abs(raw.strides)))
    parts, whole = np.moveaxis(raw, axis, 0), np.moveaxis(codes, axis, 0)
    try:
        for start in range(0, len(parts), 16):
            whole[start : start + 16] = table.encode(dataset, parts[start : start + 16], source)
    except ValueError:
        try:
            table.encode(dataset, raw, source)  # the message counts over the whole volume
        except ValueError as error:
            raise CaseError(str(error)) from error
    return codes
