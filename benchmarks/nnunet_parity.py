"""Imported nnU-Net models beside nnU-Net itself, 2.8.1 or 1.7.1: logits of one patch, prepared images, label maps.

The peer (nnunet_peer.py or nnunet1_peer.py, in the benchmark environment) trains three small models on ../shared/data with
nnU-Net's trainer and predicts two images with each: a softmax model of two folds, an anisotropic CT model, and a region
model with a residual encoder and transposed axes or, in version 1, one of four channels, masked, resampled, transposed, of
the fold "all". Each is imported, and the bundle's own inference.json segments the same images.

nnU-Net 2 sums weighted logits and weights in float16. Where windows weigh least, at corners and edges that one window alone
reaches, both are small multiples of 6e-8, so logits come out rounded, small ones to 0. This package keeps a float32 mean. The
peer therefore predicts twice, as nnU-Net is and with float32 sums in nnU-Net's own code: label maps must agree with the
latter; agreement with the former depends on how sure the model is in the image's corners, and is printed. Version 1 averages
probabilities in float32: label maps must agree with it as it is; printed, too, is what a mean of logits would give.

    python benchmarks/nnunet_parity.py --peer .venv-bench/bin/python --data ../shared/data
    python benchmarks/nnunet_parity.py --version 1 --peer .venv-bench/bin/python --data ../shared/data
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage
from sides import bundle_run, dice
from tsfm.cases.volumes import Reader
from tsfm.preparation.preprocessing import OrientImaged, PrepareImaged
from tsfm.training.checkpoint import build_network, load_weights, read_description
from tsfm_tools.release.import_nnunet import import_nnunet

LARGEST_LOGIT_DIFFERENCE = 1e-4
LARGEST_VOXEL_DIFFERENCE = 1e-5
LEAST_DICE = 0.999
ORDERS = {"prepared": False, "resampled_first": True}
"""What the peer stores of prepared images, and whether that is resampled before it is normalised."""
PEERS = {1: "nnunet1_peer.py", 2: "nnunet_peer.py"}
COLUMNS = {
    1: ("model", "image", "a logit", "a prepared voxel", "voxels found", "Dice", "Dice, mean of logits"),
    2: (
        "model", "image", "a logit", "a prepared voxel", "resampled first", "voxels found", "Dice", "Dice, float32 sums",
    ),
}  # fmt: skip


def mean_dice(one: np.ndarray, other: np.ndarray) -> float:
    """Over the values that occur; 1 where both are empty."""
    each = [dice(one == value, other == value) for value in np.union1d(one, other) if value]
    return float(np.mean(each)) if each else 1.0


def compare(expected: Path, work: Path, version: int) -> None:
    """Prints one line per image; raises where it differs by more than the bounds."""
    said = json.loads((expected / "info.json").read_text())
    bundle = Path(import_nnunet(said["folder"], str(work / "bundles"), name=f"nnunet_{expected.name}"))
    weights = str(bundle / "models/model.pt")
    description = read_description(weights)
    network = build_network(description).eval()
    load_weights(network, weights)
    predictions = work / "predictions" / expected.name
    options = {"amp": False, "existing": "overwrite", "device": "cpu", "progress": False}
    command = bundle_run(
        bundle, ["inference.json"], dataset_dir=said["images"], output_dir=predictions.resolve(), **options
    )
    environment = {**os.environ, "PYTHONPATH": str(bundle)}
    subprocess.run(command, cwd=bundle, env=environment, check=True, stdout=subprocess.DEVNULL)
    for path in said["images"]:
        case = Path(path).name.removesuffix(".nii.gz")
        theirs = np.load(expected / f"{case}.npz")
        with torch.no_grad():
            logits = network(torch.from_numpy(theirs["image"])).numpy()
        by_logit = float(np.abs(logits - theirs["logits"]).max())
        by_voxel = [
            float(np.abs(prepare(path, description["preparation"] | {"resample_first": first}) - theirs[key]).max())
            for key, first in ORDERS.items()
            if key in theirs
        ]
        ours = read(predictions / f"{case}.nii.gz")
        itself, means = read(expected / f"{case}.nii.gz"), read(expected / f"{case}_mean_logits.nii.gz")
        scores = [mean_dice(ours, other) for other in (itself, means)]
        columns = [expected.name, case, f"{by_logit:.1e}", *(f"{value:.1e}" for value in by_voxel)]
        columns += [str(np.bincount(ours.ravel())[1:].tolist())]
        columns += [f"{s:.5f} ({np.sum(ours != other)})" for s, other in zip(scores, (itself, means), strict=True)]
        print(f"| {' | '.join(columns)} |", flush=True)
        assert by_logit <= LARGEST_LOGIT_DIFFERENCE, f"{by_logit} > {LARGEST_LOGIT_DIFFERENCE}"
        assert max(by_voxel) <= LARGEST_VOXEL_DIFFERENCE, f"{by_voxel} > {LARGEST_VOXEL_DIFFERENCE}"
        assert ours.any() and itself.any(), "nothing was found: train for more --iterations, in a new --work"
        held = scores[version - 1]  # version 1 as it is, version 2 with float32 sums
        assert held >= LEAST_DICE, f"{held} < {LEAST_DICE}"


def prepare(path: str, preparation: dict) -> np.ndarray:
    """The image as the bundle prepares it, (C, S, P, L)."""
    image = LoadImage(reader=Reader(), ensure_channel_first=True)(path)
    item = {"image": image if isinstance(image, MetaTensor) else MetaTensor(image)}
    for transform in (OrientImaged, PrepareImaged):
        item = transform("image", preparation)(item)
    return item["image"].numpy()


def read(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj).astype(np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--version", type=int, default=2, choices=PEERS)
    parser.add_argument("--peer", help="Python of the environment with nnU-Net; without it WORK has its results")
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--work", help="default: nnunet_parity_VERSION among the temporary files")
    parser.add_argument("--iterations", default="150")
    options = parser.parse_args()
    work = Path(options.work or os.path.join(tempfile.gettempdir(), f"nnunet_parity_{options.version}"))
    if options.peer:
        script = Path(__file__).with_name(PEERS[options.version])
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        subprocess.run(
            [options.peer, str(script), str(work), options.data, options.iterations], check=True, env=environment
        )
    print(f"| {' | '.join(COLUMNS[options.version])} |")
    print("|" + "---|" * len(COLUMNS[options.version]))
    for expected in sorted((work / "expected").iterdir()):
        compare(expected, work, options.version)


if __name__ == "__main__":
    main()
