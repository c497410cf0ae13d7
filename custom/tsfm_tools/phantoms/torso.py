"""Draws a torso as CT or MR sees it, with the organs and lesions of the pool's data sets.

In millimeters of a standing adult: ``s`` from the pelvic floor (0) to the lung apex (420), ``p`` from the belly (-115) to
the back (+115), ``l`` from right (-165) to left (+165). A case is this body, scaled and smoothly deformed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from .canvas import EVERYWHERE, ORGANS, Body, Canvas

RIGHT_KIDNEY, LEFT_KIDNEY = (150.0, 48.0, -60.0), (162.0, 48.0, 60.0)


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
    c.paint(EVERYWHERE, 3 - np.abs(p - 131 - lat**2 * 4e-4), c.tissue("couch"))
    c.paint(EVERYWHERE, depth, c.tissue("skin"))
    c.paint(EVERYWHERE, depth - 3, c.tissue("fat"))
    c.paint(EVERYWHERE, depth - fat, c.tissue("muscle") + 4 * c.noise(14))
    inner = depth - fat - 13
    ribs = np.minimum(5 - np.abs(inner + 5), 24 * (np.cos(2 * np.pi * (s + 0.5 * p) / 27) - 0.35) / 6)
    c.paint(EVERYWHERE, np.minimum(ribs, s - 195 - 0.4 * np.abs(lat)), c.tissue("bone"))
    sternum = np.minimum(np.minimum(7 - np.abs(inner + 6), 16 - np.abs(lat)), np.minimum(s - 255, -p - 60))
    c.paint(EVERYWHERE, sternum, c.tissue("marrow"))
    gluteal = np.clip((105 - s) / 25, -1, 1) * 30 + np.clip(p - 25, -40, 30)
    cavity = np.minimum(inner, 30 - gluteal)
    c.paint(EVERYWHERE, cavity, c.tissue("fat") + 5 * c.noise(16))
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
    c.paint(EVERYWHERE, np.minimum(over_dome + 4, cavity), c.tissue("mediastinum") + 20 * c.noise(18))
    c.paint(EVERYWHERE, np.minimum(4 - np.abs(over_dome - 1), cavity), c.tissue("muscle"))
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
        c.paint(EVERYWHERE, depth, lung)
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
        where, depth = c.draw(c.tube(points, radii), tissue)
        c.organs[where][depth > 0] = 0


def _skeleton(c: Canvas, cavity: np.ndarray) -> None:
    """Spine with disks and canal, back and psoas muscles, pelvis."""
    s, p, lat = c.grid
    for sign in (-1, 1):
        c.draw(c.tube([(0, 84, sign * 36), (420, 82, sign * 30)], (26, 20)), "muscle")
        where, depth = c.tube([(0, 20, sign * 60), (90, 40, sign * 48), (195, 56, sign * 30)], (20, 20, 10))
        c.paint(where, depth, c.tissue("muscle") + 5)
        where, depth = c.draw(c.ellipsoid((4, 4, sign * 92), (27, 27, 27)), "bone")
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
        c.draw(c.tube([(82, 34, 2), (15, 0, sign * 55)], (8, 7)), "artery")
    portal = [(214, 2, -48), (190, 8, -14), (194, 2, 24), (214, 34, 88)]
    for organ, tissue, points, radii in (
        ("esophagus", "esophagus", [(425, 34, 6), (300, 36, 6), (262, 26, 14), (240, 8, 28)], (9, 9, 9, 9)),
        ("aorta", "artery", [(345, 40, 22), (250, 36, 16), (82, 34, 4)], (12.5, 12, 9)),
        ("inferior_vena_cava", "vein", [(80, 34, -18), (190, 30, -22), (258, 12, -28)], (11, 12, 12)),
        ("portal_and_splenic_vein", "vein", portal, (8, 8, 6.5, 5.5)),
    ):
        c.draw(c.tube([c.jitter(point, 2.5) for point in points], radii), tissue, organ)


def _bowel(c: Canvas, cavity: np.ndarray) -> None:
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
        (62, 20, -108), (160, 28, -108), (172, -48, -90), (150, -72, 0),
        (178, -45, 92), (192, 35, 112), (62, 30, 112), (30, 25, 70),
    ]  # fmt: skip
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
    depth = np.minimum(depth + texture[where], under[where])
    c.paint(where, depth, c.tissue("spleen") + 4 * texture[where], organ="spleen")
    right, left = c.jitter(RIGHT_KIDNEY), c.jitter(LEFT_KIDNEY)
    for side, center, lift in (("right", right, (206, 42, -34)), ("left", left, (206, 36, 38))):
        where, depth = c.ellipsoid(center, size(52, 26, 28))
        medial = center[2] * 0.62
        part, hilum = c.ellipsoid((center[0], center[1] - 8, medial), (20, 16, 14))
        dent = np.full(c.shape, -1e3, np.float32)
        dent[part] = hilum
        depth = np.minimum(depth, -dent[where] + 1)
        c.paint(where, depth, c.tissue("cortex"), organ=f"kidney_{side}")
        c.paint(where, depth - 8 - 3 * c.noise(16)[where], c.tissue("medulla"))
        c.draw(c.ellipsoid(c.jitter(lift, 2), (15, 11, 6.5)), "adrenal", f"adrenal_gland_{side}")
    course = [(158, -6, -26), (184, -14, -6), (194, -12, 28), (210, 26, 84)]
    where, depth = c.tube([c.jitter(point, 4) for point in course], (17, 12, 11, 9))
    c.paint(where, depth + 1.5 * texture[where], c.tissue("pancreas") + 10 * texture[where], organ="pancreas")
    course = [(192, -32, -20), (180, -8, -50), (140, 6, -48), (132, 12, 0)]
    where, depth = c.draw(c.tube([c.jitter(point, 3) for point in course], (12, 12, 11, 10)), "duodenum", "duodenum")
    c.paint(where, depth - 6.5, c.tissue("fluid"))
    c.draw(c.ellipsoid(c.jitter((166, -46, -54)), size(30, 16, 15)), "gallbladder", "gallbladder")
    where, depth = c.draw(c.ellipsoid(c.jitter((48, -32, 0)), size(30, 32, 38)), "muscle", "bladder")
    c.paint(where, depth - 3.5, c.tissue("bladder"))
    c.draw(c.ellipsoid(c.jitter((10, -6, 0), 2), size(17, 17, 23)), "prostate", "prostate_or_uterus")


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


LARGE_LOBES = ("upper_lobe_left", "lower_lobe_left", "upper_lobe_right", "lower_lobe_right")

LESIONS = {  # hosts, radius (mm), may it grow out of its host
    "liver_tumor": (("liver",), (13, 28), False),
    "lung_tumor": (tuple(f"lung_{lobe}" for lobe in LARGE_LOBES), (9, 18), False),
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
    _bowel(c, cavity)
    _abdomen(c, cavity, over_dome)
    _vessels(c)
    for kind in lesions:
        _lesion(c, kind, *LESIONS[kind])
    return c.finish(noise=float(rng.uniform(9, 16)) if modality == "CT" else float(rng.uniform(12, 25)))
