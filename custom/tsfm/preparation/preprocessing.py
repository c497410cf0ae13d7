"""Deterministic preparation: crop to non-zero, normalise, resample; nnU-Net 2.8.1's numbers on (S, P, L) arrays.

nnU-Net 2 normalises on the cropped source grid and resamples afterwards, and so does this module. Reading and checking
is in cases.cases and cases.volumes, the resizing itself in resampling.py.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cc3d
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, MapTransform, Orientationd

from ..cases.cases import Preparation, check_image, load_case
from ..cases.grids import spacing_of
from ..cases.volumes import axis_codes
from ..errors import CaseError
from ..labels import LabelTable
from ..names import modality_name
from .resampling import enclosing, label_box, nearest, new_shape, one_thread, resample, resample_labels, thick_axis

MASKED_BELOW = 0.75
"""A crop that keeps less than this share of the voxels makes the z-score look at the non-zero region only."""

PREPARED_VOXELS = 2**31
"""Voxels of one prepared channel, 8 GiB: six whole bodies of 500x500x2000 mm at 1.5 x 1 x 1 mm."""

SHRUNK = 1e-4
"""Share of its voxels that an image keeps at least when it is prepared: 20 times fewer along each axis."""


@dataclass(frozen=True)
class Grid:
    """How a prepared image lies in its source: sizes in voxels (S, P, L), `crop` half-open per axis."""

    source_shape: tuple[int, int, int]
    crop: tuple[tuple[int, int], ...]
    cropped_shape: tuple[int, int, int]
    shape: tuple[int, int, int]
    source_spacing_mm: tuple[float, float, float]
    spacing_mm: tuple[float, float, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, as MONAI's transform records and JSON want them."""
        return {name: np.array(value).tolist() for name, value in asdict(self).items()}

    def affine(self) -> np.ndarray:
        """(4, 4) from prepared voxel indices to source voxel indices (voxel edges stay where they are)."""
        matrix = np.eye(4)
        for axis, ((start, _), old, new) in enumerate(zip(self.crop, self.cropped_shape, self.shape, strict=True)):
            matrix[axis, axis] = old / new
            matrix[axis, 3] = start + 0.5 * old / new - 0.5
        return matrix


@dataclass
class Prepared:
    """image float32 (C, S, P, L), local codes (S, P, L) or None, and what is known of the case (plain JSON)."""

    image: np.ndarray
    codes: np.ndarray | None
    properties: dict[str, Any]


def crop_box(image) -> tuple[tuple[int, int], ...]:
    """Half-open bounding box (S, P, L) of voxels that are non-zero in any channel of a numpy (C, S, P, L).

    nnU-Net fills holes first, which does not move the box. Raises CaseError for an all-zero image.
    """
    box = enclosing(label_box(channel) for channel in image)
    if box is None:
        raise CaseError("every voxel is zero, so there is no box to crop to")
    return box


def filled_mask(image: np.ndarray) -> np.ndarray:
    """Bool (S, P, L): non-zero in any channel of (C, S, P, L), holes filled (face-connected, as in nnU-Net)."""
    mask = (image != 0).any(0)
    outside = np.pad(~mask, 1, constant_values=True)
    components = cc3d.connected_components(outside, connectivity=6)
    return components[1:-1, 1:-1, 1:-1] != components[0, 0, 0]


def channel_rules(
    preparation: Preparation, modality: str, channels: int, cropped_share: float = 1.0
) -> Sequence[Mapping[str, Any]]:
    """How each channel of a case is normalised, in the form of `Preparation.channels`.

    Listed modalities (CT) are clipped to [lower, upper], shifted by mean and divided by sd. Others are z-scored per
    channel; `cropped_share` (what the crop kept of the volume) then decides on the mask where the plan does not.
    """
    masked = {"scheme": "zscore", "masked": preparation.masked.get(modality, cropped_share < MASKED_BELOW)}
    rule = {"scheme": "ct", **preparation.intensity[modality]} if modality in preparation.intensity else masked
    return preparation.channels or [rule] * channels


def _normalize_channel(channel: torch.Tensor, rule: Mapping[str, Any], mask: torch.Tensor | None) -> None:
    """One channel (S, P, L) in place, by a rule of `Preparation.channels`; `mask` is that of the non-zero region, or all."""
    scheme = rule["scheme"]
    if scheme == "ct":
        channel.clamp_(rule["lower"], rule["upper"]).sub_(rule["mean"]).div_(max(rule["sd"], 1e-8))
    elif scheme == "01":
        channel.sub_(channel.min()).div_(channel.max().clamp_min(1e-8))
    elif scheme == "rgb":
        channel.div_(255.0)
    elif scheme == "zscore":
        sd, mean = torch.std_mean(channel if mask is None else channel[mask], correction=0)
        scaled = channel.sub(mean).div_(sd.clamp_min(1e-8))
        channel.copy_(scaled if mask is None else torch.where(mask, scaled, 0.0))
    elif scheme != "none":
        raise ValueError(f"normalization scheme {scheme!r} is unknown; expected 'ct', 'zscore', '01', 'rgb' or 'none'")


def check_prepared_shape(shape: Sequence[int], prepared: Sequence[int], spacing_mm, target_mm, source: str) -> None:
    """Raise CaseError for a prepared size (voxels per axis) that cannot be meant, before memory is asked for it."""
    old, new = (float(np.prod(sizes, dtype=float)) for sizes in (shape, prepared))
    if new > PREPARED_VOXELS or new < SHRUNK * old:
        sizes, sides = ("x".join(map(str, prepared)), [round(float(side), 4) for side in spacing_mm])
        limit = f"at most {PREPARED_VOXELS:.3g}" if new > PREPARED_VOXELS else f"at least {SHRUNK:g} of its {old:.3g}"
        raise CaseError(
            f"{source}: its voxels of {sides} mm (S, P, L) would become {sizes} at {list(target_mm)} mm, {new:.3g} voxels; "
            f"expected {limit}: check the voxel sizes of the file, or spacing_mm"
        )


def prepare_image(
    image: torch.Tensor,
    spacing_mm: Sequence[float],
    preparation: Preparation,
    modality: str,
    own: bool = False,
    source: str = "image",
) -> tuple[torch.Tensor, Grid]:
    """Crop, normalise and resample float32 (C, S, P, L); `own` allows to overwrite the input; `source` is for errors.

    The same bits for any number of threads.

    Raises:
        CaseError: only zero voxels, a prepared size that cannot be meant or that does not fit into memory.
    """
    crop = crop_box(image.cpu().numpy())
    inside = (slice(None), *(slice(*span) for span in crop))
    cropped = image[inside] if own else image[inside].clone()
    share = cropped[0].numel() / image[0].numel()
    shape = new_shape(cropped.shape[1:], spacing_mm, preparation.spacing_mm)
    check_prepared_shape(cropped.shape[1:], shape, spacing_mm, preparation.spacing_mm, source)
    grid = Grid(
        tuple(image.shape[1:]), crop, tuple(cropped.shape[1:]), shape, tuple(spacing_mm), preparation.spacing_mm
    )
    thick = thick_axis(spacing_mm, preparation.spacing_mm)
    rules, mask = channel_rules(preparation, modality, len(cropped), share), None
    if any(rule.get("masked") for rule in rules):
        mask = filled_mask(cropped.cpu().numpy())
        if preparation.resample_first:  # a spline rings into the zeros around the mask, so the mask itself is resampled
            mask = resample(mask, shape, 1, thick) >= 0.5
        mask = torch.from_numpy(mask).to(cropped.device)
    if preparation.resample_first:
        cropped = _resample_channels(cropped, shape, thick, source)
    with one_thread():
        for channel, rule in zip(cropped, rules, strict=True):
            _normalize_channel(channel, rule, mask if rule.get("masked") else None)
    if not preparation.resample_first:
        cropped = _resample_channels(cropped, shape, thick, source)
    return cropped, grid


def _resample_channels(image: torch.Tensor, shape: Sequence[int], thick: int | None, source: str) -> torch.Tensor:
    try:
        if len(image) == 1:
            return resample(image[0], shape, 3, thick)[None]
        return torch.stack([resample(channel, shape, 3, thick) for channel in image])
    except (MemoryError, RuntimeError) as error:
        if "alloc" not in str(error) and "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        raise CaseError(f"{source}: {'x'.join(map(str, shape))} prepared voxels do not fit into memory") from error


def prepare_case(
    item: Mapping[str, Any], table: LabelTable | None, preparation: Preparation, codes: np.ndarray | None = None
) -> Prepared:
    """A datalist item on the target grid, normalised, with its label codes (`codes` where they were read) resampled likewise.

    Raises:
        CaseError: what `load_case` finds wrong.
    """
    case = load_case(item, table, preparation, codes)
    spacing, affine = case.spacing_mm, case.affine
    codes, case.codes = case.codes, None
    image, grid = prepare_image(
        torch.from_numpy(case.image), spacing, preparation, case.modality, own=True, source=case.source
    )
    if codes is not None:
        codes = codes[tuple(slice(*span) for span in grid.crop)]
        codes = np.ascontiguousarray(resample_labels(codes, grid.shape, thick_axis(spacing, preparation.spacing_mm)))
    properties = {
        **grid.to_dict(),
        "source": case.source,
        "dataset": case.dataset,
        "case": case.name,
        "modality": case.modality,
        "source_affine": affine.tolist(),
        "empty_label": None if codes is None else not codes.any(),
    }
    return Prepared(np.ascontiguousarray(image.numpy()), codes, properties)


def _as_preparation(given: Preparation | Mapping[str, Any]) -> Preparation:
    return given if isinstance(given, Preparation) else Preparation.from_dict(given)


class OrientImaged(Orientationd):
    """Turn images (C, X, Y, Z) to the `orientation` of a `Preparation` (or its `to_dict`), and back.

    MONAI's Orientationd, for orientations that depend on the image ("kji", see `volumes.axis_codes`) too.
    """

    def __init__(self, keys: KeysCollection, preparation: Preparation | Mapping[str, Any]) -> None:
        super().__init__(keys, "SPL", labels=None)
        self.orientation = _as_preparation(preparation).orientation

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        out = dict(data)
        for key in self.key_iterator(out):
            self.ornt_transform.axcodes = axis_codes(np.asarray(out[key].affine, float), self.orientation)
            out[key] = self.ornt_transform(out[key])
        return out


class PrepareImaged(MapTransform, InvertibleTransform):
    """`prepare_image` as a MONAI transform, and the way back.

    Takes what `OrientImaged` gives: a MetaTensor (C, S, P, L). `preparation` may be its
    `to_dict`. The modality is the argument, else `data["modality"]`, else the preparation's default.

    `inverse` accepts a tensor on the prepared grid (brought back by nearest voxel) or already on the cropped source
    grid, told apart by shape, and fills what was cropped with 0.

    Raises:
        CaseError: wrong channel count, NaN, infinite or only zero voxels; the message names the file if known.
    """

    def __init__(
        self,
        keys: KeysCollection,
        preparation: Preparation | Mapping[str, Any],
        modality: str | None = None,
    ) -> None:
        super().__init__(keys)
        self.preparation = _as_preparation(preparation)
        self.modality = modality_name(modality, "--modality") if modality else None

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        out = dict(data)
        given = data.get("modality")
        modality = self.modality or (modality_name(given) if given else self.preparation.default_modality)
        for key in self.key_iterator(out):
            out[key] = self._prepare(out[key], modality, str(key))
        return out

    def _prepare(self, image: Any, modality: str, key: str) -> MetaTensor:
        image = image if isinstance(image, MetaTensor) else MetaTensor(image)
        source = str(image.meta.get("filename_or_obj", key))
        if image.ndim != 4:
            raise CaseError(f"{source}: {tuple(image.shape)} voxels; expected (channels, S, P, L)")
        plain = image.as_tensor()
        check_image(plain, self.preparation, modality, source)
        affine = image.affine.detach().cpu().numpy().astype(float)
        if all(channel.min() == channel.max() for channel in plain):
            raise CaseError(f"{source}: every voxel holds the same value, so there is nothing to segment in it")
        own = plain.dtype != torch.float32
        prepared, grid = prepare_image(plain.float(), spacing_of(affine), self.preparation, modality, own, source)
        result = MetaTensor(prepared, meta={**image.meta, "affine": torch.from_numpy(affine @ grid.affine())})
        result.applied_operations = list(image.applied_operations)
        record = {**grid.to_dict(), "source_affine": affine.tolist()}
        return self.push_transform(result, orig_size=grid.source_shape, extra_info=record)

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The tensors of `keys` on the source grid (C, S, P, L) that the transform was given."""
        out = dict(data)
        for key in self.key_iterator(out):
            record = self.pop_transform(out[key])["extra_info"]
            tensor = out[key]
            found, shape, cropped = tuple(tensor.shape[1:]), tuple(record["shape"]), tuple(record["cropped_shape"])
            if found not in (shape, cropped):
                raise ValueError(
                    f"{key}: shape {found} (S, P, L); expected the prepared grid {shape} or the cropped one {cropped}"
                )
            plain = nearest(tensor.as_tensor(), cropped)
            full = plain.new_zeros((len(plain), *record["source_shape"]))
            full[(slice(None), *(slice(*span) for span in record["crop"]))] = plain
            affine = torch.tensor(record["source_affine"], dtype=torch.float64)
            result = MetaTensor(full, meta={**tensor.meta, "affine": affine})
            result.applied_operations = list(tensor.applied_operations)
            out[key] = result
        return out
