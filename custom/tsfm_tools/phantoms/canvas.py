"""What phantoms are painted on: a grid in millimeters, warped from case to case, and tissues in HU or as MR signal.

Everything is drawn in (S, P, L) arrays. Organs are implicit functions whose value is the depth below their surface in mm,
so that edges blend over a voxel (partial volume). The drawing is for tests and demos; it teaches nothing about patients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

# organs tile the body; lesions and the vessels of the liver lie inside of organs and are kept apart from them
ORGANS = (
    "spleen", "kidney_right", "kidney_left", "gallbladder", "esophagus", "liver", "stomach", "aorta",
    "inferior_vena_cava", "portal_and_splenic_vein", "pancreas", "adrenal_gland_right", "adrenal_gland_left",
    "duodenum", "bladder", "prostate_or_uterus", "lung_upper_lobe_left", "lung_lower_lobe_left",
    "lung_upper_lobe_right", "lung_middle_lobe_right", "lung_lower_lobe_right", "colon",
)  # fmt: skip

INNER = ("liver_tumor", "lung_tumor", "pancreas_tumor", "hepatic_vessel", "colon_tumor", "kidney_tumor", "kidney_cyst")

# tissue: HU without contrast, HU that full contrast adds, MR signal (0 to 1)
TISSUES = {
    "air": (-1000, 0, 0.0), "skin": (10, 15, 0.45), "fat": (-100, 0, 0.85), "muscle": (50, 15, 0.30),
    "bone": (420, 0, 0.06), "marrow": (190, 10, 0.55), "disk": (85, 0, 0.25), "canal": (20, 0, 0.80),
    "couch": (-180, 0, 0.0), "lung": (-840, 0, 0.05), "heart": (42, 110, 0.25), "mediastinum": (-60, 5, 0.7),
    "gas": (-850, 0, 0.02), "stool": (20, 0, 0.4), "bowel": (38, 45, 0.42), "fluid": (14, 0, 0.9),
    "liver": (56, 52, 0.50), "spleen": (48, 72, 0.38), "cortex": (36, 150, 0.45), "medulla": (34, 85, 0.62),
    "pancreas": (40, 50, 0.58), "gallbladder": (8, 0, 0.95), "stomach": (40, 45, 0.36), "artery": (42, 230, 0.10),
    "vein": (42, 125, 0.14), "adrenal": (35, 50, 0.46), "esophagus": (40, 30, 0.36), "duodenum": (36, 45, 0.4),
    "bladder": (6, 0, 1.0), "prostate": (40, 35, 0.48), "hepatic_vessel": (42, 135, 0.16),
    "liver_tumor": (42, 12, 0.72), "kidney_tumor": (38, 45, 0.75), "kidney_cyst": (8, 0, 0.98),
    "pancreas_tumor": (35, 12, 0.72), "lung_tumor": (35, 35, 0.5), "colon_tumor": (45, 45, 0.6),
}  # fmt: skip

BLEND_FLOOR_MM = 1.5

EVERYWHERE = (slice(None),) * 3


@dataclass
class Body:
    """One drawn case: ``image`` (S, P, L) float32 in HU or MR units, ``organs`` and ``inner`` uint8 indices + 1."""

    image: np.ndarray
    organs: np.ndarray
    inner: np.ndarray
    spacing_mm: tuple[float, float, float]

    def mask(self, names: Sequence[str]) -> np.ndarray:
        """Voxels of any of the named organs or inner structures, as bool (S, P, L)."""
        mask = np.zeros(self.organs.shape, bool)
        for name in names:
            mask |= self.organs == ORGANS.index(name) + 1 if name in ORGANS else self.inner == INNER.index(name) + 1
        return mask


def smooth_field(shape: Sequence[int], knots: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """A smooth random field of unit variance, a cubic B-spline over ``knots`` random coefficients; float32 of shape."""
    field_ = rng.standard_normal([k + 3 for k in knots]).astype(np.float32)
    for axis, (size, count) in enumerate(zip(shape, knots, strict=True)):
        t = np.linspace(0, count, size, endpoint=False)[:, None] - np.arange(-1, count + 2)[None, :]
        t = np.abs(t)
        weight = np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.where(t < 2, (2 - t) ** 3 / 6, 0.0)).astype(np.float32)
        field_ = np.moveaxis(np.tensordot(weight, field_, axes=(1, axis)), 0, axis)
    return np.ascontiguousarray(field_ / field_.std())


@dataclass
class Canvas:
    """An image being painted: warped coordinates of each voxel, its value, its organ and what is inside of that."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    low_mm: tuple[float, float, float]
    rng: np.random.Generator
    scale: float = 1.0
    deform_mm: float = 7.0
    contrast: float = 0.8
    modality: str = "CT"
    grid: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        self.extent = [n * d for n, d in zip(self.shape, self.spacing_mm, strict=True)]
        knots = [max(2, round(e / 90)) for e in self.extent]
        self.grid = []
        for axis in range(3):
            view = [1, 1, 1]
            view[axis] = self.shape[axis]
            line = (self.low_mm[axis] + self.spacing_mm[axis] * np.arange(self.shape[axis])) / self.scale
            shift = np.clip(smooth_field(self.shape, knots, self.rng), -2, 2) * (self.deform_mm / 2)
            self.grid.append(line.reshape(view).astype(np.float32) + shift)
        self.value = np.full(self.shape, self.tissue("air"), np.float32)
        self.organs = np.zeros(self.shape, np.uint8)
        self.inner = np.zeros(self.shape, np.uint8)
        self.blend_mm = max(BLEND_FLOOR_MM, float(np.mean(self.spacing_mm)) * 0.8)

    def tissue(self, name: str) -> float:
        """The value of a tissue in this case: HU with its contrast, or the MR signal times 1000."""
        hu, gain, signal = TISSUES[name]
        return hu + gain * self.contrast if self.modality == "CT" else 1000.0 * signal

    def noise(self, length_mm: float) -> np.ndarray:
        """A random texture with structures of about ``length_mm``; (S, P, L) float32 of unit variance."""
        knots = [int(np.clip(e / length_mm, 2, n)) for e, n in zip(self.extent, self.shape, strict=True)]
        return smooth_field(self.shape, knots, self.rng)

    def box(self, low: Sequence[float], high: Sequence[float]) -> tuple[slice, slice, slice]:
        """The part of the grid that can hold coordinates from ``low`` to ``high`` (mm), deformation included."""
        start = (np.subtract(low, self.deform_mm) * self.scale - self.low_mm) / self.spacing_mm - 1
        stop = (np.add(high, self.deform_mm) * self.scale - self.low_mm) / self.spacing_mm + 2
        ends = zip(np.clip(start, 0, self.shape), np.clip(stop, 0, self.shape), strict=True)
        return tuple(slice(int(first), int(last)) for first, last in ends)

    def paint(
        self, where: tuple, depth_mm: np.ndarray, value: float | np.ndarray, organ: str = "", inner: str = ""
    ) -> None:
        """Blend ``value`` in where ``depth_mm`` is positive and name those voxels; at least one where it is in view."""
        if depth_mm.size == 0 or depth_mm.max() < -2 * max(self.spacing_mm):
            return
        if depth_mm.max() <= 0:  # too small for this grid: keep its center voxel, so that no structure is lost
            depth_mm = np.where(depth_mm == depth_mm.max(), 0.1, depth_mm)
        alpha = np.clip(depth_mm / self.blend_mm + 0.5, 0, 1)
        self.value[where] += alpha * (value - self.value[where])
        if organ:
            self.organs[where][depth_mm > 0] = ORGANS.index(organ) + 1
        if inner:
            self.inner[where][depth_mm > 0] = INNER.index(inner) + 1

    def draw(self, shape: tuple[tuple, np.ndarray], tissue: str, organ: str = "") -> tuple[tuple, np.ndarray]:
        """Paint a tissue into a shape, which is a part of the grid and the depth of its voxels; hands the shape on."""
        self.paint(*shape, self.tissue(tissue), organ)
        return shape

    def ellipsoid(self, center: Sequence[float], radii: Sequence[float]) -> tuple[tuple, np.ndarray]:
        """Part of the grid around an ellipsoid, and the depth (mm) of its voxels below the surface."""
        reach = 1.3 * np.asarray(radii)
        where = self.box(np.asarray(center) - reach, np.asarray(center) + reach)
        return where, self.ellipsoid_depth(center, radii, where)

    def ellipsoid_depth(self, center: Sequence[float], radii: Sequence[float], where: tuple = EVERYWHERE) -> np.ndarray:
        """Depth (mm) of the voxels of a part of the grid below the surface of an ellipsoid."""
        terms = [((g[where] - c) / r) ** 2 for g, c, r in zip(self.grid, center, radii, strict=True)]
        return (1 - np.sqrt(sum(terms))) * min(radii)

    def tube(self, points: Sequence[Sequence[float]], radii: Sequence[float]) -> tuple[tuple, np.ndarray]:
        """Part of the grid around a tube through ``points`` with a radius at each, and the depth of its voxels."""
        points_ = np.asarray(points, float)
        margin = max(radii) * 1.3
        where = self.box(points_.min(0) - margin, points_.max(0) + margin)
        grid = [g[where] for g in self.grid]
        depth = np.full(grid[0].shape, -1e3, np.float32)
        for start, end, r0, r1 in zip(points_[:-1], points_[1:], radii[:-1], radii[1:], strict=True):
            step = end - start
            along = sum((g - a) * d for g, a, d in zip(grid, start, step, strict=True)) / max(float(step @ step), 1e-6)
            along = np.clip(along, 0, 1)
            distance = sum((g - a - along * d) ** 2 for g, a, d in zip(grid, start, step, strict=True))
            np.maximum(depth, r0 + along * (r1 - r0) - np.sqrt(distance), out=depth)
        return where, depth

    def jitter(self, center: Sequence[float], mm: float = 4.0) -> np.ndarray:
        """The center, moved at random by up to ``mm`` along each axis."""
        return np.asarray(center) + self.rng.uniform(-mm, mm, 3)

    def finish(self, noise: float) -> Body:
        """Blur as a scanner does, add its noise, and hand the case out."""
        image = ndimage.gaussian_filter(self.value, 0.45)
        grain = ndimage.gaussian_filter(self.rng.standard_normal(self.shape).astype(np.float32), (0.3, 0.55, 0.55))
        grain *= noise / grain.std()
        if self.modality == "CT":
            image += grain * np.where(image < -960, 0.4, 1.0)
            image = np.maximum(image, -1024)
        else:
            bias = 1 + 0.15 * np.clip(smooth_field(self.shape, (2, 2, 2), self.rng), -2, 2)
            image = np.hypot(image * bias + grain, np.roll(grain, 5, axis=2))
        return Body(image, self.organs, self.inner, self.spacing_mm)
