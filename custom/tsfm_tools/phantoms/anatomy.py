"""Draws the voxels of the phantoms: a torso as CT or MR sees it, two breasts in DCE-MRI, a head with a glioma.

Everything is drawn in (S, P, L) arrays, in millimeters of a standing adult: ``s`` from the pelvic floor (0) to the lung
apex (420), ``p`` from the belly (-115) to the back (+115), ``l`` from right (-165) to left (+165). A case is this body,
scaled and smoothly deformed. Organs are implicit functions whose value is the depth below their surface in mm, so that
edges blend over a voxel (partial volume). The drawing is for tests and demos; it teaches nothing about patients.
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

RIGHT_KIDNEY, LEFT_KIDNEY = (150.0, 48.0, -60.0), (162.0, 48.0, 60.0)

BLEND_FLOOR_MM = 1.5


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
        slices = []
        for axis in range(3):
            a = ((low[axis] - self.deform_mm) * self.scale - self.low_mm[axis]) / self.spacing_mm[axis]
            b = ((high[axis] + self.deform_mm) * self.scale - self.low_mm[axis]) / self.spacing_mm[axis]
            slices.append(slice(int(np.clip(a - 1, 0, self.shape[axis])), int(np.clip(b + 2, 0, self.shape[axis]))))
        return tuple(slices)

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

    def ellipsoid(self, center: Sequence[float], radii: Sequence[float]) -> tuple[tuple, np.ndarray]:
        """Part of the grid around an ellipsoid, and the depth (mm) of its voxels below the surface."""
        reach = 1.3 * np.asarray(radii)
        where = self.box(np.asarray(center) - reach, np.asarray(center) + reach)
        terms = [((g[where] - c) / r) ** 2 for g, c, r in zip(self.grid, center, radii, strict=True)]
        return where, (1 - np.sqrt(terms[0] + terms[1] + terms[2])) * min(radii)

    def ellipsoid_full(self, center: Sequence[float], radii: Sequence[float]) -> np.ndarray:
        """Depth (mm) of every voxel of the grid below the surface of an ellipsoid, (S, P, L)."""
        terms = [((g - c) / r) ** 2 for g, c, r in zip(self.grid, center, radii, strict=True)]
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


def _wall(c: Canvas, fat_mm: float) -> np.ndarray:
    """Skin, fat, muscle, ribs and what fills the cavity; returns the depth (mm) below the inner wall, (S, P, L)."""
    s, p, lat = c.grid
    width = 163 - 9 * np.exp(-(((s - 165) / 60) ** 2)) + 8 * np.exp(-(((s - 40) / 70) ** 2))
    height = 112 - 5 * np.exp(-(((s - 120) / 80) ** 2)) + 6 * np.exp(-(((s - 300) / 80) ** 2))
    shoulder = np.clip((s - 360) / 90, 0, 1)
    x, y = np.abs(lat) / (width * (1 - 0.35 * shoulder**2)), np.abs(p) / (height * (1 - 0.25 * shoulder**2))
    radial = (x**2.5 + y**2.5) ** 0.4
    reach = np.sqrt(lat**2 + p**2) / np.maximum(radial, 1e-3)
    depth = reach * (1 - radial)
    fat = fat_mm * (1 + 0.5 * np.exp(-(((s - 70) / 70) ** 2)) * (0.4 + np.clip(p / 100, -0.3, 1)))
    everywhere = (slice(None),) * 3
    c.paint(everywhere, 3 - np.abs(p - 131 - lat**2 * 4e-4), c.tissue("couch"))
    c.paint(everywhere, depth, c.tissue("skin"))
    c.paint(everywhere, depth - 3, c.tissue("fat"))
    c.paint(everywhere, depth - fat, c.tissue("muscle") + 4 * c.noise(14))
    inner = depth - fat - 13
    ribs = np.minimum(5 - np.abs(inner + 5), 24 * (np.cos(2 * np.pi * (s + 0.5 * p) / 27) - 0.35) / 6)
    c.paint(everywhere, np.minimum(ribs, s - 195 - 0.4 * np.abs(lat)), c.tissue("bone"))
    sternum = np.minimum(np.minimum(7 - np.abs(inner + 6), 16 - np.abs(lat)), np.minimum(s - 255, -p - 60))
    c.paint(everywhere, sternum, c.tissue("marrow"))
    gluteal = np.clip((105 - s) / 25, -1, 1) * 30 + np.clip(p - 25, -40, 30)
    cavity = np.minimum(inner, 30 - gluteal)
    c.paint(everywhere, cavity, c.tissue("fat") + 5 * c.noise(16))
    return cavity


def _dome(c: Canvas) -> np.ndarray:
    """Height (mm above) of each voxel over the diaphragm, (S, P, L)."""
    s, p, lat = c.grid
    right = 66 * np.exp(-(((lat + 76) / 62) ** 2) - ((p + 2) / 78) ** 2)
    left = 54 * np.exp(-(((lat - 80) / 60) ** 2) - ((p - 2) / 78) ** 2)
    return s - (196 + right + left + 20 * np.exp(-((lat / 40) ** 2)))


def _chest(c: Canvas, cavity: np.ndarray, over_dome: np.ndarray) -> None:
    """Mediastinum, heart, trachea and the five lobes of the lungs, with vessels."""
    s, p, lat = c.grid
    everywhere = (slice(None),) * 3
    c.paint(everywhere, np.minimum(over_dome + 4, cavity), c.tissue("mediastinum") + 20 * c.noise(18))
    c.paint(everywhere, np.minimum(4 - np.abs(over_dome - 1), cavity), c.tissue("muscle"))
    vessels = np.maximum(c.noise(13) - 1.5, 0) * 330 + np.maximum(c.noise(8) - 1.9, 0) * 500
    lung = c.tissue("lung") + np.minimum(vessels, 800) * (1 if c.modality == "CT" else 0.15) + 18 * c.noise(30)
    for side, sign in (("right", -1.0), ("left", 1.0)):
        shape = 1 - np.sqrt(((s - 235) / 182) ** 2 + ((p - 2) / 96) ** 2 + ((lat - sign * 76) / 64) ** 2)
        depth = np.minimum(np.minimum(shape * 64, cavity - 1), over_dome - 5)
        oblique = (s - 300) - 0.85 * (p - 5)  # the upper lobe lies above and in front of this fissure
        if side == "left":
            lobes = {"lung_upper_lobe_left": oblique, "lung_lower_lobe_left": -oblique}
        else:
            horizontal = s - 305.0
            lobes = {
                "lung_upper_lobe_right": np.minimum(oblique, horizontal),
                "lung_middle_lobe_right": np.minimum(oblique, -horizontal),
                "lung_lower_lobe_right": -oblique,
            }
        c.paint(everywhere, depth, lung)
        for name, inside in lobes.items():
            c.organs[(depth > 0) & (inside > 0)] = ORGANS.index(name) + 1
    where, depth = c.ellipsoid(c.jitter((283, -28, 26)), c.rng.uniform(0.93, 1.07) * np.array((46, 50, 56)))
    c.paint(where, np.minimum(depth, over_dome[where] - 1), c.tissue("muscle") + 20)
    c.paint(where, np.minimum(depth - 9, over_dome[where] - 6), c.tissue("heart"))
    c.organs[where][depth > 0] = 0
    for points, radii, tissue in (
        ([(425, 8, 0), (335, 22, 0)], (9, 9), "muscle"),
        ([(425, 8, 0), (335, 22, 0)], (7, 7), "gas"),
        ([(300, -25, 5), (345, -20, -8), (362, 5, 5), (345, 40, 22)], (14, 14, 13, 12), "artery"),
        ([(300, -5, -28), (420, -10, -25)], (10, 9), "vein"),
    ):
        where, depth = c.tube(points, radii)
        c.paint(where, depth, c.tissue(tissue))
        c.organs[where][depth > 0] = 0


def _skeleton(c: Canvas, cavity: np.ndarray) -> None:
    """Spine with disks and canal, back and psoas muscles, pelvis."""
    s, p, lat = c.grid
    for sign in (-1, 1):
        where, depth = c.tube([(0, 84, sign * 36), (420, 82, sign * 30)], (26, 20))
        c.paint(where, depth, c.tissue("muscle"))
        where, depth = c.tube([(0, 20, sign * 60), (90, 40, sign * 48), (195, 56, sign * 30)], (20, 20, 10))
        c.paint(where, depth, c.tissue("muscle") + 5)
        where, depth = c.ellipsoid((4, 4, sign * 92), (27, 27, 27))
        c.paint(where, depth, c.tissue("bone"))
        c.paint(where, depth - 5, c.tissue("marrow"))
    wing = 9 - np.abs(np.sqrt(((s - 55) / 85) ** 2 + ((p - 5) / 74) ** 2 + (lat / 112) ** 2) - 1) * 74
    wing = np.minimum(np.minimum(wing, 98 - s), np.minimum(np.abs(lat) - 34, p + 30))
    where = c.box((-50, -100, -150), (105, 130, 150))
    c.paint(where, wing[where], c.tissue("bone"))
    c.paint(where, wing[where] - 4, c.tissue("marrow"))
    wide = np.clip((70 - s) / 60, 0, 1)
    column = (1 - np.sqrt(((p - 62 - 12 * wide) / 19) ** 2 + (lat / (24 + 22 * wide)) ** 2)) * 19
    where = c.box((-50, 20, -70), (450, 130, 70))
    c.paint(where, column[where], c.tissue("bone"))
    c.paint(where, column[where] - 4, c.tissue("marrow") + 25 * c.noise(10)[where])
    disk = np.minimum(column - 0.5, 5 - np.abs((s + 14) % 33 - 16.5)) - 9 * (s < 45)
    c.paint(where, disk[where], c.tissue("disk"))
    spine = np.minimum(12 - np.abs(lat) * (0.7 + 0.3 * np.cos(2 * np.pi * s / 33)), 17 - np.abs(p - 95))
    c.paint(where, spine[where], c.tissue("bone") - 60)
    c.paint(where, (9 - np.sqrt((p - 88) ** 2 + lat**2))[where], c.tissue("canal"))


def _vessels(c: Canvas) -> None:
    """Aorta with its iliac branches, inferior vena cava, portal and splenic vein, esophagus."""
    for sign in (-1, 1):
        where, depth = c.tube([(82, 34, 2), (15, 0, sign * 55)], (8, 7))
        c.paint(where, depth, c.tissue("artery"))
    for organ, tissue, points, radii in (
        ("esophagus", "esophagus", [(425, 34, 6), (300, 36, 6), (262, 26, 14), (240, 8, 28)], (9, 9, 9, 9)),
        ("aorta", "artery", [(345, 40, 22), (250, 36, 16), (82, 34, 4)], (12.5, 12, 9)),
        ("inferior_vena_cava", "vein", [(80, 34, -18), (190, 30, -22), (258, 12, -28)], (11, 12, 12)),
        (
            "portal_and_splenic_vein",
            "vein",
            [(214, 2, -48), (190, 8, -14), (194, 2, 24), (214, 34, 88)],
            (8, 8, 6.5, 5.5),
        ),
    ):
        where, depth = c.tube([c.jitter(point, 2.5) for point in points], radii)
        c.paint(where, depth, c.tissue(tissue), organ=organ)


def _bowel(c: Canvas, cavity: np.ndarray, over_dome: np.ndarray) -> None:
    """Loops of small bowel in the belly's fat, and the colon's frame with stool and gas."""
    where = c.box((40, -115, -130), (165, 30, 130))
    s, p, lat = (g[where] for g in c.grid)
    region = np.minimum(np.minimum(152 - s, s - 45), np.minimum(18 - p, 92 - np.abs(lat)))
    folds = 9 * (c.noise(19)[where] + 0.1)
    inside = np.minimum(cavity[where] - 9, region)
    c.paint(where, np.minimum(folds, inside), c.tissue("bowel"))
    c.paint(where, np.minimum(folds - 8, inside), c.tissue("fluid") + 15 * c.noise(20)[where])
    stool = c.noise(14)
    frame = [
        (62, 20, -108),
        (160, 28, -108),
        (172, -48, -90),
        (150, -72, 0),
        (178, -45, 92),
        (192, 35, 112),
        (62, 30, 112),
        (30, 25, 70),
    ]
    radii = (20, 18, 16, 16, 16, 14, 14, 14)
    where, depth = c.tube([c.jitter(point, 4) for point in frame], radii)
    depth = np.minimum(depth + 2.5 * c.noise(18)[where], cavity[where] - 2)
    c.paint(where, depth, c.tissue("bowel") + 10, organ="colon")
    content = np.where(
        stool[where] - c.grid[1][where] / 90 > 0.1, c.tissue("gas"), c.tissue("stool") + 25 * stool[where]
    )
    c.paint(where, depth - 4.5, content)


def _abdomen(c: Canvas, cavity: np.ndarray, over_dome: np.ndarray) -> None:
    """Liver with its vessels, spleen, kidneys, stomach, pancreas, duodenum and the small organs around them."""
    rng, texture = c.rng, c.noise(11)
    under = np.minimum(-over_dome - 3, cavity - 2)

    def size(*radii: float) -> np.ndarray:
        return np.array(radii) * rng.uniform(0.9, 1.1) * rng.uniform(0.95, 1.05, 3)

    where, depth = c.ellipsoid(c.jitter((222, -32, 62)), size(42, 40, 48))
    depth = np.minimum(depth, under[where])
    c.paint(where, depth, c.tissue("stomach"), organ="stomach")
    gas = (c.grid[1][where] < -32 + 4 * texture[where]) & (c.modality == "CT" or c.grid[1][where] < -45)
    c.paint(where, depth - 6, np.where(gas, c.tissue("gas"), c.tissue("fluid") + 30))
    right, left = c.jitter((206, 2, -80)), c.jitter((228, -44, -5))
    where = c.box((110, -115, -165), (300, 110, 80))
    lobes = [c.ellipsoid(right, size(78, 84, 68)), c.ellipsoid(left, size(34, 42, 66))]
    liver = np.full(c.shape, -1e3, np.float32)
    for part, depth in lobes:
        np.maximum(liver[part], depth, out=liver[part])
    liver = np.minimum(liver + 2 * texture, under)
    c.paint(where, liver[where], c.tissue("liver") + 5 * texture[where], organ="liver")
    _liver_vessels(c, liver)
    where, depth = c.ellipsoid(c.jitter((228, 44, 112)), size(46, 40, 25))
    c.paint(
        where, np.minimum(depth + texture[where], under[where]), c.tissue("spleen") + 4 * texture[where], organ="spleen"
    )
    for organ, center in (("kidney_right", c.jitter(RIGHT_KIDNEY)), ("kidney_left", c.jitter(LEFT_KIDNEY))):
        where, depth = c.ellipsoid(center, size(52, 26, 28))
        medial = center[2] * 0.62
        part, hilum = c.ellipsoid((center[0], center[1] - 8, medial), (20, 16, 14))
        dent = np.full(c.shape, -1e3, np.float32)
        dent[part] = hilum
        depth = np.minimum(depth, -dent[where] + 1)
        c.paint(where, depth, c.tissue("cortex"), organ=organ)
        c.paint(where, depth - 8 - 3 * c.noise(16)[where], c.tissue("medulla"))
        side = "right" if "right" in organ else "left"
        lift = (206, 42, -34) if side == "right" else (206, 36, 38)
        where, depth = c.ellipsoid(c.jitter(lift, 2), (15, 11, 6.5))
        c.paint(where, depth, c.tissue("adrenal"), organ=f"adrenal_gland_{side}")
    where, depth = c.tube(
        [c.jitter(q, 4) for q in [(158, -6, -26), (184, -14, -6), (194, -12, 28), (210, 26, 84)]], (17, 12, 11, 9)
    )
    c.paint(where, depth + 1.5 * texture[where], c.tissue("pancreas") + 10 * texture[where], organ="pancreas")
    where, depth = c.tube(
        [c.jitter(q, 3) for q in [(192, -32, -20), (180, -8, -50), (140, 6, -48), (132, 12, 0)]], (12, 12, 11, 10)
    )
    c.paint(where, depth, c.tissue("duodenum"), organ="duodenum")
    c.paint(where, depth - 6.5, c.tissue("fluid"))
    where, depth = c.ellipsoid(c.jitter((166, -46, -54)), size(30, 16, 15))
    c.paint(where, depth, c.tissue("gallbladder"), organ="gallbladder")
    where, depth = c.ellipsoid(c.jitter((48, -32, 0)), size(30, 32, 38))
    c.paint(where, depth, c.tissue("muscle"), organ="bladder")
    c.paint(where, depth - 3.5, c.tissue("bladder"))
    where, depth = c.ellipsoid(c.jitter((10, -6, 0), 2), size(17, 17, 23))
    c.paint(where, depth, c.tissue("prostate"), organ="prostate_or_uterus")


def _liver_vessels(c: Canvas, liver: np.ndarray) -> None:
    """Portal branches and hepatic veins: a handful of tapering tubes, named only where they lie in the liver."""
    hilum, cava = np.array((212.0, 0.0, -48.0)), np.array((252.0, 14.0, -30.0))
    ends = [(240, 10, -115), (180, 20, -118), (215, -55, -100), (232, -52, 20), (185, -40, -85)]
    branches = [(hilum, c.jitter(end, 10)) for end in ends]
    branches += [(cava, c.jitter(end, 10)) for end in [(205, 45, -110), (225, -20, -120), (222, -55, -20)]]
    for start, end in branches:
        bend = (start + end) / 2 + c.rng.uniform(-9, 9, 3)
        where, depth = c.tube([start, bend, end], (6.5, 5, 3))
        inside = np.minimum(depth, liver[where] - 1)
        if inside.size and inside.max() > 0:
            c.paint(where, inside, c.tissue("hepatic_vessel"), inner="hepatic_vessel")


def _lesion(c: Canvas, kind: str, hosts: Sequence[str], radius_mm: tuple[float, float], grows_out: bool) -> None:
    """One ragged lesion of its own contrast around a random voxel of its hosts; the larger ones have a dark core."""
    host = np.isin(c.organs, [ORGANS.index(h) + 1 for h in hosts])
    voxels = np.argwhere(ndimage.binary_erosion(host))
    voxels = voxels if len(voxels) else np.argwhere(host)
    if not len(voxels):
        return
    voxel = tuple(voxels[c.rng.integers(len(voxels))])
    center = np.array([g[voxel] for g in c.grid])
    radii = c.rng.uniform(*radius_mm) * c.rng.uniform(0.8, 1.25, 3)
    where, depth = c.ellipsoid(center, radii)
    if kind != "kidney_cyst":
        ragged = 0.14 * float(radii.mean())
        depth = depth + ragged * (c.noise(16)[where] + 0.7 * c.noise(8)[where])
    if not grows_out:
        depth = np.where(host[where], depth, np.minimum(depth, -0.1))
    c.paint(where, depth, c.tissue(kind) + 8 * c.noise(9)[where], inner=kind)
    if kind != "kidney_cyst" and radii.mean() > 13:
        core = (0.3 * c.tissue(kind) + 6) if c.modality == "CT" else 1.2 * c.tissue(kind)
        c.paint(where, depth - 0.45 * float(radii.min()), core)


LESIONS = {  # hosts, radius (mm), may it grow out of its host
    "liver_tumor": (("liver",), (13, 28), False),
    "lung_tumor": (
        ("lung_upper_lobe_left", "lung_lower_lobe_left", "lung_upper_lobe_right", "lung_lower_lobe_right"),
        (9, 18),
        False,
    ),
    "pancreas_tumor": (("pancreas",), (10, 16), True),
    "colon_tumor": (("colon",), (12, 19), True),
    "kidney_tumor": (("kidney_left", "kidney_right"), (12, 26), True),
    "kidney_cyst": (("kidney_left", "kidney_right"), (9, 15), True),
}


def draw_torso(
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    low_s_mm: float,
    rng: np.random.Generator,
    lesions: Sequence[str] = (),
    modality: str = "CT",
    contrast: float = 0.8,
) -> Body:
    """A torso in HU (or MR units of up to about 1000), with the named lesions in it.

    Args:
        shape: voxels along (S, P, L); in plane the field of view is centered on the body.
        spacing_mm: along (S, P, L).
        low_s_mm: height of the lowest slice above the pelvic floor.
        contrast: 0 is a scan without contrast agent, 1 a full portal-venous phase.
    """
    scale = float(rng.uniform(0.93, 1.06))
    low = (low_s_mm, 8 - shape[1] * spacing_mm[1] / 2, -shape[2] * spacing_mm[2] / 2)
    c = Canvas(tuple(shape), tuple(spacing_mm), low, rng, scale=scale, contrast=contrast, modality=modality)
    cavity = _wall(c, fat_mm=float(rng.uniform(9, 24)))
    over_dome = _dome(c)
    _chest(c, cavity, over_dome)
    _skeleton(c, cavity)
    _bowel(c, cavity, over_dome)
    _abdomen(c, cavity, over_dome)
    _vessels(c)
    for kind in lesions:
        _lesion(c, kind, *LESIONS[kind])
    return c.finish(noise=float(rng.uniform(9, 16)) if modality == "CT" else float(rng.uniform(12, 25)))


def draw_breasts(
    shape: Sequence[int], spacing_mm: Sequence[float], rng: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray]:
    """Two breasts before and twice after contrast: three MR images (S, P, L) and the tumor's mask."""
    low = [-n * d / 2 for n, d in zip(shape, spacing_mm, strict=True)]
    c = Canvas(tuple(shape), tuple(spacing_mm), tuple(low), rng, scale=float(rng.uniform(0.95, 1.1)), modality="MR")
    _, p, lat = c.grid
    everywhere = (slice(None),) * 3
    chest = p - 32 - (lat / 95) ** 2 * 14
    tissue, texture = np.full(c.shape, -1e3, np.float32), c.noise(16)
    c.paint(everywhere, chest, 420.0)
    c.paint(everywhere, chest - 26, 120.0)
    for sign in (-1, 1):
        where, depth = c.ellipsoid((c.rng.uniform(-5, 5), 34, sign * 78), (68, 92, 62))
        depth = np.minimum(depth, -chest[where] + 3)
        c.paint(where, depth, 260.0)
        tissue[where] = np.maximum(tissue[where], depth - 14)
    gland = np.minimum(tissue, 9 * texture + 3)
    c.paint(everywhere, gland, 480.0)
    voxels = np.argwhere(tissue > 3)
    center = np.array([g[tuple(voxels[c.rng.integers(len(voxels))])] for g in c.grid])
    where, depth = c.ellipsoid(center, c.rng.uniform(9, 19) * c.rng.uniform(0.8, 1.2, 3))
    lesion = np.full(c.shape, -1e3, np.float32)
    lesion[where] = depth + 2.2 * (c.noise(14) + 0.6 * c.noise(7))[where]
    lesion = np.minimum(lesion, tissue + 12)
    if lesion.max() <= 0:
        lesion[lesion == lesion.max()] = 0.1
    uptake = np.clip(lesion / c.blend_mm + 0.5, 0, 1)
    background = np.clip(gland / 8, 0, 1) * 70 + np.clip((chest - 30) / 6, 0, 1) * (texture > 0.3) * 300
    phases, plain = [], c.value.copy()
    for tumor, other in ((60.0, 0.0), (620.0, 0.7), (500.0, 1.0)):
        c.value = plain + uptake * tumor + background * other
        phases.append(c.finish(noise=18.0).image)
    return phases, lesion > 0


def draw_head(
    shape: Sequence[int], spacing_mm: Sequence[float], rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A skull-stripped head with a glioma: {flair, t1, t1ce, t2}, and BraTS' map (1 necrosis, 2 edema, 4 enhancing).

    Images and map are (S, P, L); outside of the brain the images are exactly 0.
    """
    low = [-n * d / 2 for n, d in zip(shape, spacing_mm, strict=True)]
    c = Canvas(
        tuple(shape),
        tuple(spacing_mm),
        tuple(low),
        rng,
        scale=float(rng.uniform(0.95, 1.05)),
        deform_mm=5,
        modality="MR",
    )
    s, p, lat = c.grid
    brain = (1 - np.sqrt((s / 66) ** 2 + (p / 84) ** 2 + (lat / 66) ** 2)) * 66
    folds = c.noise(15)
    sulci = np.minimum(np.abs(folds) * 9 - 2.0, 9 - brain + 4)
    white = brain - 10 + 4 * folds
    fissure = 2.5 - np.abs(lat) + (s < 5) * -9
    ventricles = np.maximum(c.ellipsoid_full((8, -4, -13), (13, 30, 6)), c.ellipsoid_full((8, -4, 13), (13, 30, 6)))
    side = float(rng.choice((-1, 1)))
    center = (rng.uniform(-15, 32), rng.uniform(-38, 38), side * rng.uniform(22, 38))
    radius = rng.uniform(13, 19)
    bumps = c.noise(18) + 0.5 * c.noise(9)
    tumor = np.minimum(c.ellipsoid_full(center, radius * rng.uniform(0.85, 1.2, 3)) + 2 * bumps, brain - 3)
    edema = np.minimum(np.maximum(tumor + rng.uniform(8, 13) + 3 * c.noise(22), tumor), brain - 2)
    necrosis = tumor - rng.uniform(4, 7) + 1.5 * bumps
    label = np.zeros(c.shape, np.uint8)
    for depth, value in ((edema, 2), (tumor, 4), (necrosis, 1)):
        label[(depth > 0) | (depth == depth.max()) & ~np.any(depth > 0)] = value
    signal = {  # gray, white, liquor, edema, enhancing, necrosis
        "flair": (620, 480, 120, 980, 760, 420), "t1": (520, 700, 180, 450, 480, 330),
        "t1ce": (540, 720, 190, 470, 1150, 320), "t2": (620, 470, 1100, 950, 760, 1020),
    }  # fmt: skip
    images = {}
    for name, (gray, pale, liquor, wet, bright, dead) in signal.items():
        c.value = np.zeros(c.shape, np.float32)
        layers = ((brain, liquor), (np.minimum(brain - 1.5, sulci), gray), (np.minimum(white, brain - 9), pale))
        for depth, value in (*layers, (np.minimum(fissure, brain), liquor), (ventricles, liquor)):
            c.paint((slice(None),) * 3, depth, float(value))
        for depth, value in ((edema, wet), (tumor, bright), (necrosis, dead)):
            c.paint((slice(None),) * 3, depth, float(value))
        image = c.finish(noise=18.0).image
        image[brain < -1] = 0  # skull-stripped: outside there is nothing at all
        images[name] = image
    return images, label
