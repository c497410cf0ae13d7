"""SAM-Med3D on held-out cases, by its authors' protocol: one target at a time, shown by one click inside the truth.

The truth also places the window, so these scores are no match for those of automatic methods.
"""

from __future__ import annotations

import numpy as np
import torch
from tsfm.cases.cases import Preparation, load_case
from tsfm.cases.pool import DatasetPool
from tsfm.network.clicks import deep_voxel
from tsfm.network.prompted import SAMMed3D
from tsfm.preparation.preprocessing import prepare_image
from tsfm.preparation.resampling import label_box, nearest, resample_labels

from ..release.import_stunet import read_network

PREPARATION = Preparation((1.5, 1.5, 1.5), channels=[{"scheme": "none"}], orientation="RAS")


def prompted_scores(
    weights: str, pool: DatasetPool, fold: int | str = 0, seed: int = 0, device: str | torch.device = "cpu"
) -> dict[str, dict[str, float]]:
    """Data set -> target -> mean Dice over the held-out cases that show the target, on the images' own grids.

    Raises:
        CheckpointError: `weights` of another network than SAM-Med3D, or not all of them.
    """
    network, tensors, _ = read_network(weights, "sam_med3d", "SAM-Med3D's weights")
    network.load_state_dict(tensors, strict=False)
    network, rng = network.eval().to(device), np.random.default_rng(seed)
    found: dict[str, dict[str, list[float]]] = {}
    for item in pool.evaluation_items(fold):
        case = load_case(item, pool.table, PREPARATION)
        image, grid = prepare_image(torch.from_numpy(case.image), case.spacing_mm, PREPARATION, case.modality)
        crop = tuple(slice(*span) for span in grid.crop)
        codes = resample_labels(np.ascontiguousarray(case.codes[crop]), grid.shape)
        first = pool.table.offset(case.dataset)
        for target in pool.table.annotated(case.dataset):
            is_target = pool.table.targets[first:, pool.table.names.index(target)] == 1  # by local code
            truth, mask = is_target[case.codes], np.zeros(case.codes.shape, bool)
            shown = is_target[codes]
            if not truth.any():
                continue
            if shown.any():
                mask[crop] = nearest(segment(network, image[0], shown, rng), grid.cropped_shape)
            dice = 2 * np.count_nonzero(mask & truth) / (np.count_nonzero(mask) + np.count_nonzero(truth))
            found.setdefault(case.dataset, {}).setdefault(target, []).append(dice)
    return {name: {target: float(np.mean(dice)) for target, dice in part.items()} for name, part in found.items()}


def segment(network: SAMMed3D, image: torch.Tensor, truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bool mask (R, A, S) of what a click somewhere in `truth` marks in `image`, both at 1.5 mm.

    The window lies around the middle of the truth's box; its intensities are z-scored by those above 0.
    Where it shows nothing of the truth (lesions far apart), nothing can be clicked and nothing is marked.
    """
    side = network.side
    middle = [(low + high) // 2 for low, high in label_box(truth)]
    here, there = [], []  # in the image, in the window
    for center, size in zip(middle, truth.shape, strict=True):
        start = center - side // 2
        low, high = max(start, 0), min(start + side, size)
        here.append(slice(low, high))
        there.append(slice(low - start, high - start))
    window = torch.zeros(side, side, side)
    window[tuple(there)] = image[tuple(here)]
    bright = window[window > 0]
    if len(bright) > 1:
        window = (window - bright.mean()) / bright.std().clamp_min(1e-8)
    mask = np.zeros(truth.shape, bool)
    if not truth[tuple(here)].any():
        return mask
    voxel = deep_voxel(truth[tuple(here)], rng) + [span.start for span in there]
    click = torch.tensor(voxel)[None, None]
    device = next(network.parameters()).device
    with torch.inference_mode():
        logits = network(window[None, None].to(device), click.to(device), torch.ones(1, 1, device=device))
    mask[tuple(here)] = (logits[0, 0].cpu() > 0).numpy()[tuple(there)]
    return mask
