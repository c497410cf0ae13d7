"""Deterministic preparation: crop to non-zero, normalise, resample; nnU-Net 2.8.1's numbers on (S, P, L) arrays.

nnU-Net 2 normalises on the cropped source grid and resamples afterwards, and so does this module. Reading and checking
is in cases.py and reading.py, the resizing itself in resampling.py.
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
from monai.transforms import InvertibleTransform, MapTransform
from tqdm import tqdm

from .cases import CaseError, Preparation, check_image, load_case
from .labels import LabelTable
from .parallel import WorkerDied, run_all
from .reading import Reader, spacing_of
from .resampling import ANISOTROPY, label_box, nearest, new_shape, one_thread, resample, resample_labels, thick_axis

__all__ = [
    "CaseError",
    "Fingerprint",
    "Grid",
    "Preparation",
    "PrepareImaged",
    "Prepared",
    "Reader",
    "crop_box",
    "fingerprint",
    "fit_patch",
    "load_case",
    "normalize",
    "plan_spacing",
    "prepare_case",
    "prepare_image",
    "resample",
    "resample_labels",
]

MASKED_BELOW = 0.75
"""A crop that keeps less than this share of the voxels makes the z-score look at the non-zero region only."""

FINGERPRINT_VOXELS = 10**7
"""Foreground voxels that a fingerprint draws over all cases (nnU-Net draws 1e8; the percentiles agree to 1e-3)."""


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
        return {name: _lists(value) for name, value in asdict(self).items()}

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
    boxes = [box for box in (label_box(channel) for channel in image) if box is not None]
    if not boxes:
        raise CaseError("every voxel is zero, so there is no box to crop to")
    return tuple((min(b[a][0] for b in boxes), max(b[a][1] for b in boxes)) for a in range(3))


def filled_mask(image: np.ndarray) -> np.ndarray:
    """Bool (S, P, L): non-zero in any channel of (C, S, P, L), holes filled (face-connected, as in nnU-Net)."""
    mask = (image != 0).any(0)
    outside = np.pad(~mask, 1, constant_values=True)
    components = cc3d.connected_components(outside, connectivity=6)
    return components[1:-1, 1:-1, 1:-1] != components[0, 0, 0]


def normalize(image: torch.Tensor, preparation: Preparation, modality: str, cropped_share: float = 1.0) -> torch.Tensor:
    """Normalise float (C, S, P, L) in place on the cropped source grid, and return it.

    Listed modalities (CT) are clipped to [lower, upper], shifted by mean and divided by sd. Others are z-scored per
    channel; `cropped_share` (what the crop kept of the volume) then decides on the mask where the plan does not.
    """
    values = preparation.intensity.get(modality)
    if values is not None:
        image.clamp_(values["lower"], values["upper"])
        return image.sub_(values["mean"]).div_(max(values["sd"], 1e-8))
    mask = None
    if preparation.masked.get(modality, cropped_share < MASKED_BELOW):
        mask = torch.from_numpy(filled_mask(image.cpu().numpy())).to(image.device)
    for channel in image:
        sd, mean = torch.std_mean(channel if mask is None else channel[mask], correction=0)
        scaled = channel.sub(mean).div_(sd.clamp_min(1e-8))
        channel.copy_(scaled if mask is None else torch.where(mask, scaled, channel))
    return image


def prepare_image(
    image: torch.Tensor, spacing_mm: Sequence[float], preparation: Preparation, modality: str, own: bool = False
) -> tuple[torch.Tensor, Grid]:
    """Crop, normalise and resample float32 (C, S, P, L); `own` allows to overwrite the input.

    The same bits for any number of threads.
    """
    crop = crop_box(image.cpu().numpy())
    inside = (slice(None), *(slice(*span) for span in crop))
    cropped = image[inside] if own else image[inside].clone()
    share = cropped[0].numel() / image[0].numel()
    shape = new_shape(cropped.shape[1:], spacing_mm, preparation.spacing_mm)
    grid = Grid(
        tuple(image.shape[1:]), crop, tuple(cropped.shape[1:]), shape, tuple(spacing_mm), preparation.spacing_mm
    )
    with one_thread():
        cropped = normalize(cropped, preparation, modality, share)
    thick = thick_axis(spacing_mm, preparation.spacing_mm)
    if len(cropped) == 1:
        return resample(cropped[0], shape, 3, thick)[None], grid
    return torch.stack([resample(channel, shape, 3, thick) for channel in cropped]), grid


def prepare_case(item: Mapping[str, Any], table: LabelTable | None, preparation: Preparation) -> Prepared:
    """A datalist item on the target grid, normalised, with its label codes resampled likewise.

    Raises:
        CaseError: what `load_case` finds wrong.
    """
    case = load_case(item, table, preparation)
    spacing, affine = case.spacing_mm, case.affine
    codes, case.codes = case.codes, None
    image, grid = prepare_image(torch.from_numpy(case.image), spacing, preparation, case.modality, own=True)
    if codes is not None:
        codes = codes[tuple(slice(*span) for span in grid.crop)]
        codes = np.ascontiguousarray(resample_labels(codes, grid.shape, thick_axis(spacing, preparation.spacing_mm)))
    properties = {
        **grid.to_dict(),
        "source": case.source,
        "dataset": case.dataset,
        "case": case.name,
        "modality": case.modality,
        "source_affine": _lists(affine.tolist()),
        "empty_label": None if codes is None else not codes.any(),
    }
    return Prepared(np.ascontiguousarray(image.numpy()), codes, properties)


class PrepareImaged(MapTransform, InvertibleTransform):
    """`prepare_image` as a MONAI transform, and the way back.

    Takes what `Orientationd(axcodes="SPL", labels=None)` gives: a MetaTensor (C, S, P, L). `preparation` may be its
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
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        given = isinstance(preparation, Preparation)
        self.preparation = preparation if given else Preparation.from_dict(preparation)
        self.modality = modality

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        out = dict(data)
        modality = self.modality or data.get("modality") or self.preparation.default_modality
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
        own = plain.dtype != torch.float32
        prepared, grid = prepare_image(plain.float(), spacing_of(affine), self.preparation, modality, own)
        result = MetaTensor(prepared, meta={**image.meta, "affine": torch.from_numpy(affine @ grid.affine())})
        result.applied_operations = list(image.applied_operations)
        record = {**grid.to_dict(), "source_affine": _lists(affine.tolist())}
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
                    f"{key}: shape {found}; expected the prepared grid {shape} or the cropped one {cropped}"
                )
            plain = nearest(tensor.as_tensor(), cropped)
            full = plain.new_zeros((len(plain), *record["source_shape"]))
            full[(slice(None), *(slice(*span) for span in record["crop"]))] = plain
            affine = torch.tensor(record["source_affine"], dtype=torch.float64)
            result = MetaTensor(full, meta={**tensor.meta, "affine": affine})
            result.applied_operations = list(tensor.applied_operations)
            out[key] = result
        return out


@dataclass
class Fingerprint:
    """What nnU-Net's planning needs to know of some cases.

    intensity: modality -> mean, median, sd, min, max, lower (0.5 percentile), upper (99.5 percentile) over foreground
    voxels, an equal number per case. shapes and spacings_mm: per case after cropping, (S, P, L). masked: modality ->
    whether its median crop kept less than three quarters. failed: (item, message) of cases that could not be read.
    """

    intensity: dict[str, dict[str, float]]
    shapes: list[tuple[int, int, int]]
    spacings_mm: list[tuple[float, float, float]]
    masked: dict[str, bool]
    failed: list[tuple[Mapping[str, Any], str]]

    @property
    def median_shape(self) -> tuple[float, ...]:
        return tuple(np.median(self.shapes, axis=0).tolist())

    @property
    def median_spacing_mm(self) -> tuple[float, ...]:
        return tuple(np.median(self.spacings_mm, axis=0).tolist())

    def median_prepared_shape(self, spacing_mm: Sequence[float]) -> tuple[float, ...]:
        """Median shape of the cases once they are resampled to this spacing."""
        shapes = [new_shape(n, s, spacing_mm) for n, s in zip(self.shapes, self.spacings_mm, strict=True)]
        return tuple(np.median(shapes, axis=0).tolist())


def fingerprint(
    items: Sequence[Mapping[str, Any]],
    table: LabelTable,
    preparation: Preparation | None = None,
    num_workers: int = 0,
    progress: bool = True,
) -> Fingerprint:
    """Read all items once and gather nnU-Net 2's fingerprint. `preparation` gives in_channels and default modality.

    Raises:
        CaseError: no item could be read (all messages are listed).
    """
    preparation = preparation or Preparation((1.0, 1.0, 1.0))
    voxels = max(1, FINGERPRINT_VOXELS // max(1, len(items)))
    found, failed = [], []
    jobs = [(item, table, preparation, voxels) for item in items]
    with tqdm(total=len(jobs), desc="fingerprint", disable=not progress) as bar:
        for index, outcome in run_all(_look_at_case, jobs, num_workers):
            bar.update()
            if isinstance(outcome, (CaseError, WorkerDied)):
                failed.append((items[index], str(outcome)))
            else:
                found.append((index, *outcome))
    if not found:
        listed = "\n".join(message for _, message in failed)
        raise CaseError(f"no case could be read for the fingerprint; found {len(items)} items:\n{listed}")
    found.sort(key=lambda row: row[0])
    _, modality, values, shapes, spacings, kept = zip(*found, strict=True)
    intensity, masked = {}, {}
    for name in dict.fromkeys(modality):
        of_modality = [i for i, m in enumerate(modality) if m == name]
        masked[name] = bool(np.median([kept[i] for i in of_modality]) < MASKED_BELOW)
        pooled = np.concatenate([values[i] for i in of_modality])
        if pooled.size:
            intensity[name] = _statistics(pooled)
    return Fingerprint(intensity, list(shapes), list(spacings), masked, failed)


def _look_at_case(item, table: LabelTable, preparation: Preparation, voxels: int):
    """(modality, foreground intensities, cropped shape, spacing, share kept by the crop) of one item."""
    case = load_case(item, table, preparation)
    crop = tuple(slice(*span) for span in crop_box(case.image))
    image, codes = case.image[(slice(None), *crop)], case.codes
    values = np.empty(0, np.float32)
    if codes is not None:
        foreground = (codes[crop] != 0) & ~np.isin(codes[crop], table.ignored(case.dataset))
        values = image[:, foreground].ravel()
    if values.size:
        values = np.random.RandomState(1234).choice(values, voxels, replace=True)
    return case.modality, values, image.shape[1:], case.spacing_mm, image[0].size / case.image[0].size


def _statistics(values: np.ndarray) -> dict[str, float]:
    lower, median, upper = np.percentile(values, (0.5, 50.0, 99.5))
    numbers = {"lower": lower, "upper": upper, "mean": values.mean(dtype=float), "sd": values.std(dtype=float)}
    numbers |= {"median": median, "min": values.min(), "max": values.max()}
    return {name: float(value) for name, value in numbers.items()}


def plan_spacing(spacings_mm: Sequence[Sequence[float]], shapes: Sequence[Sequence[int]]) -> tuple[float, float, float]:
    """nnU-Net's target spacing: the median per axis, finer along one axis that is far thicker than the others.

    Where the worst axis' median spacing is more than 3 times the others' and its median size less than a third of
    theirs, that axis takes its 10th percentile, but stays coarser than the others.
    """
    spacings_mm = np.asarray(spacings_mm, float)
    target, size = np.median(spacings_mm, axis=0), np.median(np.asarray(shapes, float), axis=0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    coarsest = max(target[others])
    if target[worst] > ANISOTROPY * coarsest and size[worst] * ANISOTROPY < min(size[others]):
        finer = np.percentile(spacings_mm[:, worst], 10)
        target[worst] = finer if finer >= coarsest else coarsest + 1e-5
    return tuple(target.tolist())


def fit_patch(
    shape: Sequence[float], strides: Sequence[Sequence[int]], patch_size: Sequence[int] = (112, 160, 192)
) -> tuple[int, int, int]:
    """Patch that fits the network: per axis `patch_size`, but no larger than the (median) image shape needs.

    Every side is a multiple of the product of the axis' strides, rounded up; and the lowest level keeps more than one
    voxel, which instance normalisation cannot do without.
    """
    divisors = [int(np.prod([stride[axis] for stride in strides])) if len(strides) else 1 for axis in range(3)]
    patch = [
        -(-max(1, min(int(np.ceil(size)), int(limit))) // divisor) * divisor
        for size, limit, divisor in zip(shape, patch_size, divisors, strict=True)
    ]
    if patch == divisors:
        patch[int(np.argmax(shape))] *= 2
    return tuple(patch)


def _lists(value: Any) -> Any:
    return [_lists(v) for v in value] if isinstance(value, (list, tuple)) else value
