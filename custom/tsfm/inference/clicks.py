"""Clicks at inference: from voxels of the image's file to windows, of which only those that a click reaches are computed anew.

`ReadClicksd` checks the clicks of a request and notes them with the image, in millimetres; `ClickInferer` brings them to the
prepared grid. What it computed of an image's windows is kept (kept_windows.py), so that a corrected result costs a few windows.
Without clicks both do what inference does without them.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from ..labels import LabelTable
from ..network.clicks import Click, ClickError, click_channels, reaches
from ..schema import nearest
from .kept_windows import KeptWindows, kept_windows
from .notes import CLICKS
from .painting import Slab
from .passes import Passes
from .windows import SlabInferer

BACKGROUND = "background"

Prompt = Mapping[int, Sequence[Click]]
"""Target number -> its clicks, on the grid that the windows are cut from."""


class ReadClicksd(MapTransform):
    """Notes a request's clicks with its image, which is still on its file's grid (right after LoadImaged).

    Clicks are voxels [i, j, k] of the file, in one of the two forms that MONAI Label's clients send:

    * ``{"label": target, "foreground": [[i, j, k], ...], "background": [...]}``: inside and outside of one target;
    * ``{name: [[i, j, k], ...], ..., "background": [...]}``: what the label map shall show there. For a target that is a
      click inside; for every other one that is found there, or has clicks of its own, and does not contain that target, a
      click outside.

    Args:
        keys: the image.
        table: label table of the weights; targets go by their names or by what viewers show for them.
        sigma: of the network's click channels, in voxels; None for a network that has none.

    Raises:
        ClickError: a click outside of the volume, for no target, that is no three numbers, or for a network without
            click channels.
    """

    def __init__(self, keys: KeysCollection, table: LabelTable, sigma: float | None = None) -> None:
        super().__init__(keys)
        self.sigma = sigma
        self.names = {name: name for name in table.names}
        shown = list(table.channel_def().values())[1:]
        self.names |= dict(zip(shown, table.names, strict=True))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        out = dict(data)
        for key in self.key_iterator(out):
            image = out[key]
            source = str(image.meta.get("filename_or_obj", key))
            affine = np.asarray(image.affine, float)
            noted = []
            for kind, name, voxel in self._asked(data, source):
                self._check(voxel, name, tuple(image.shape[1:]), source)
                noted.append([kind, name, (affine[:3, :3] @ voxel + affine[:3, 3]).tolist()])
            if noted and self.sigma is None:
                raise ClickError(
                    f"{source}: {len(noted)} clicks, but these weights have no click channels: they segment automatically. "
                    "Train with configs/clicks.json added, or leave the clicks out"
                )
            if noted:
                image.meta[CLICKS] = json.dumps(noted)
        return out

    def _asked(self, request: Mapping[Hashable, Any], source: str) -> Iterator[tuple[str, str, Any]]:
        if request.get("foreground") is not None:
            target = self._target(request.get("label"), source)
            for kind, name in (("inside", "foreground"), ("outside", BACKGROUND)):
                yield from ((kind, target, voxel) for voxel in request.get(name) or ())
            return
        for name, voxels in request.items():
            if isinstance(voxels, list | tuple) and (name in self.names or name == BACKGROUND or _are_points(voxels)):
                label = name if name == BACKGROUND else self._target(name, source)
                yield from (("label", label, voxel) for voxel in voxels)

    def _target(self, name: Any, source: str) -> str:
        found = self.names.get(name) or self.names.get(str(name).lower())
        if found is None:
            raise ClickError(
                f"{source}: clicks for {name!r}, which is no target of these weights{nearest(str(name), self.names)}; "
                f"their targets are {sorted({*self.names.values()})}"
            )
        return found

    @staticmethod
    def _check(voxel: Any, name: str, shape: Sequence[int], source: str) -> None:
        numbers = isinstance(voxel, Sequence | np.ndarray) and len(voxel) == 3
        if not numbers or not all(isinstance(n, Real) and math.isfinite(n) for n in voxel):
            raise ClickError(f"{source}: a click for {name} is {voxel!r}; expected a voxel of the image, [i, j, k]")
        if any(not -0.5 <= n <= side - 0.5 for n, side in zip(voxel, shape, strict=True)):
            raise ClickError(
                f"{source}: a click for {name} at voxel {list(voxel)} lies outside of the volume of "
                f"{'x'.join(map(str, shape))} voxels; expected [i, j, k] from 0, in the order in which the file stores its axes"
            )


def _are_points(values: Sequence[Any]) -> bool:
    """Whether a request's list holds points, whatever its key: then somebody meant clicks."""
    points = [p for p in values if isinstance(p, list | tuple) and len(p) == 3 and all(isinstance(n, Real) for n in p)]
    return 0 < len(values) == len(points)


class ClickInferer(SlabInferer):
    """`SlabInferer` that takes the clicks noted with an image.

    The windows that a click reaches are computed once more for each target with clicks, whose logits take the place of
    the automatic ones; all others are taken from what was kept of the same image, network and settings. The result is
    that of computing every window.

    Args:
        click_sigma: of the network's click channels, in voxels; None for a network without: then this is a `SlabInferer`.
        keep_gb: memory for what is kept, in all; what does not fit is computed again. 0 keeps nothing, and nothing is kept
            while several versions of each window (mirrored ones, folds) are compared (`doubts`).
        others: as for `SlabInferer`.

    Raises:
        ClickError: clicks for a target that `targets` leaves out.
    """

    def __init__(self, *args: Any, click_sigma: float | None = None, keep_gb: float = 2.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sigma, self.keep_bytes = click_sigma, int(keep_gb * 2**30)
        if self.sigma is not None and self.exclusive:
            raise ValueError("click channels are for networks with one sigmoid per target, not for a softmax")

    def __call__(self, inputs: torch.Tensor, network: Any) -> torch.Tensor:
        note = inputs.meta.get(CLICKS) if isinstance(inputs, MetaTensor) else None
        if not note or self.sigma is None:
            return super().__call__(inputs, network)
        noted = json.loads(note if isinstance(note, str) else note[0])  # a list: from a DataLoader
        to_voxel = np.linalg.inv(np.asarray(inputs.affine.cpu(), float).reshape(-1, 4, 4)[0])
        voxels = [np.rint(to_voxel[:3, :3] @ mm + to_voxel[:3, 3]) for _, _, mm in noted]
        asked = [(kind, name, tuple(map(int, voxel))) for (kind, name, _), voxel in zip(noted, voxels, strict=True)]
        return super().__call__(inputs, network, prompt=self._prompt(asked, self._image(inputs), network))

    def _prompt(self, asked: Sequence[tuple[str, str, tuple[int, ...]]], image: torch.Tensor, network: Any) -> Prompt:
        """What each click (kind, name, voxel) says about which target; the kind "label" needs to know what is found there."""
        names, clicks = list(self.names), defaultdict(list)
        own = {names.index(name) for kind, name, _ in asked if kind != "outside" and name != BACKGROUND}
        found = [set()] * len(asked)
        if any(kind == "label" for kind, _, _ in asked):
            found = self._found_at([voxel for _, _, voxel in asked], image, network)
        for (kind, name, voxel), there in zip(asked, found, strict=True):
            contains = set()
            if name != BACKGROUND:
                if name not in self.chosen:
                    raise ClickError(f"clicks for {name}, but only {list(self.chosen)} are computed: add it to targets")
                target = names.index(name)
                clicks[target].append(Click(voxel, kind != "outside"))
                contains = {target, *self.table.ancestors(target)}
            for other in sorted((own | there) - contains) if kind == "label" else ():
                if names[other] in self.chosen:
                    clicks[other].append(Click(voxel, False))
        return clicks

    def _found_at(self, points: Sequence[Sequence[int]], image: torch.Tensor, network: Any) -> list[set[int]]:
        """For each voxel the targets that are found there without clicks; none outside of the image."""
        found: list[set[int]] = [set() for _ in points]
        levels, done = torch.tensor([self.levels[i] for i in self.channels]), 0
        for slab in self.slabs(image, network):
            for number, (s, *plane) in enumerate(points):
                if done <= s < slab.stop and all(0 <= n < side for n, side in zip(plane, image.shape[2:], strict=True)):
                    there = slab.logits[(slice(None), s - slab.start, *plane)].float().cpu() > levels
                    found[number] = {self.channels[i] for i in there.nonzero()[:, 0].tolist()}
            done = slab.stop
        return found

    def slabs(self, image: torch.Tensor, network: Any, prompt: Prompt | None = None) -> Iterator[Slab]:
        """As `SlabInferer.slabs`, with the clicks of `prompt`, on the grid of `image`."""
        if self.sigma is None:
            return super().slabs(image, network)
        before = self._before(image.shape[1:])
        moved = {
            target: [Click(tuple(n + low for n, low in zip(c.voxel, before, strict=True)), c.inside) for c in clicks]
            for target, clicks in (prompt or {}).items()
        }
        settings = (self.roi_size, self.flips, self.amp, self.amp_dtype, tuple(self.channels))
        watched = self._observer and (self.flips or getattr(network, "versions", None))  # every version has to be seen
        kept = kept_windows(image, network, settings, 0 if watched else self.keep_bytes)
        passes = partial(ClickPasses, sigma=self.sigma, channels=self.channels, prompt=moved, kept=kept)
        return super().slabs(image, network, passes)


class _Pass(NamedTuple):
    """A window's way through the network: without clicks for all targets (None), or for one with the clicks that reach it."""

    corner: tuple[int, ...]
    target: int | None
    clicks: tuple[Click, ...]


@dataclass
class ClickPasses(Passes):
    """Passes of a network with click channels; the observer sees those without clicks.

    Args:
        sigma: of the click channels, in voxels.
        channels: outputs that are wanted.
        prompt: clicks on the grid of the (padded) image.
        kept: what was computed of this image before.
        others: as for `Passes`.
    """

    sigma: float
    channels: Sequence[int]
    prompt: Prompt
    kept: KeptWindows

    def logits(
        self, image: torch.Tensor, corners: Sequence, window: Sequence[int], average: Any
    ) -> Iterator[tuple[torch.Tensor, Sequence[int]]]:
        """(logits (T, *window), float16, of the chosen targets; corner) of each window."""
        todo, observer = list(corners), self.observer
        while todo:
            some, todo = todo[: self.size], todo[self.size :]  # out of memory makes `size` smaller
            every = {tuple(corner): list(self._of(corner, window)) for corner in some}
            results = {one: self.kept.get(*one) for passes in every.values() for one in passes}
            for prompted in (False, True):
                self.observer = None if prompted else observer
                missing = [one for one, value in results.items() if value is None and bool(one.clicks) == prompted]
                for value, one in super().logits(image, missing, window, average):
                    value = value[self.channels] if one.target is None else value[one.target]
                    results[one] = self.kept.put(*one, value)
            self.observer = observer
            for corner in some:
                automatic, *clicked = every[tuple(corner)]
                merged = results[automatic].clone()
                for one in clicked:
                    merged[self.channels.index(one.target)] = results[one]
                yield merged, corner

    def _of(self, corner: Sequence[int], window: Sequence[int]) -> Iterator[_Pass]:
        yield _Pass(tuple(corner), None, ())
        for target, clicks in self.prompt.items():
            local = [Click(tuple(n - c for n, c in zip(one.voxel, corner, strict=True)), one.inside) for one in clicks]
            if seen := tuple(one for one in local if reaches(one, window, self.sigma)):
                yield _Pass(tuple(corner), target, seen)

    def _batch(self, image: torch.Tensor, passes: Sequence[_Pass], window: Sequence[int]) -> torch.Tensor:
        windows = super()._batch(image, [one.corner for one in passes], window)
        clicks = torch.stack([click_channels(one.clicks, window, self.sigma) for one in passes])
        return torch.cat([windows, clicks.to(windows)], 1)
