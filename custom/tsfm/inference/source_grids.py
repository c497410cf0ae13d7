"""The grid that a prepared image came from, as its transforms noted it: where label maps and probabilities are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..preparation.resampling import thick_axis


class SourceGrid(NamedTuple):
    """The grid before resampling: shape, and the axis that is resampled apart (or None); and where it lies in its image.

    crop: half-open spans of it in the whole turned image, whose shape is `full_shape` and whose affine is `affine`;
    `image_affine` is that of the image before it was turned.
    """

    shape: tuple[int, ...]
    thick: int | None
    crop: Sequence[Sequence[int]]
    full_shape: Sequence[int]
    affine: Any
    image_affine: Any


def prepared_grid(inputs: torch.Tensor) -> Mapping[str, Any] | None:
    """What `PrepareImaged` noted on an image of a batch of one, if it was there."""
    return next(
        (one["extra_info"] for one in reversed(_operations(inputs)) if one.get("class") == "PrepareImaged"), None
    )


def _operations(inputs: torch.Tensor) -> list[Mapping[str, Any]]:
    """The transforms that were noted on an image of a batch of one, first to last."""
    operations = getattr(inputs, "applied_operations", None) or []
    if operations and isinstance(operations[0], (list, tuple)):
        operations = operations[0]
    return [one for one in operations if isinstance(one, Mapping)]


def source_grid(inputs: torch.Tensor) -> SourceGrid:
    """The cropped source grid that `PrepareImaged` noted on a prepared image (1, C, S, P, L), else the image's own."""
    operations, shape = _operations(inputs), tuple(inputs.shape[2:])
    grid = prepared_grid(inputs)
    if grid is None:
        return SourceGrid(shape, None, [(0, size) for size in shape], shape, np.eye(4), np.eye(4))
    if tuple(grid["shape"]) != shape:
        raise ValueError(
            f"the image is {shape} voxels (S, P, L), PrepareImaged made it {tuple(grid['shape'])}: "
            "no transform between it and the inferer may change the shape"
        )
    thick, affine = thick_axis(grid["spacing_mm"], grid["source_spacing_mm"]), grid["source_affine"]
    turns = [one["extra_info"]["original_affine"] for one in operations if one.get("class") == "Orientation"]
    turned = (turns or [affine])[0]
    return SourceGrid(tuple(grid["cropped_shape"]), thick, grid["crop"], grid["source_shape"], affine, turned)
