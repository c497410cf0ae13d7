"""Correct a case with a few clicks on a running MONAI Label server, as 3D Slicer's module does.

    python benchmarks/correct_case.py --server http://127.0.0.1:8000 --model tsfm_finetune_deepedit \
        --image hippocampus_003 --label /data/labelsTr/hippocampus_003.nii.gz --clicks 3

Asks MODEL_seg for the automatic result, then MODEL with clicks: for every label of the model a list of voxels [i, j, k],
background included, as Slicer sends them. Each click lies in the middle of the largest piece of what is still wrong; the
truth is a label map with the model's own values. Prints the mean Dice over targets and the seconds of each request.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import urllib.request

import nibabel as nib
import numpy as np
from sides import dice
from tsfm.network.clicks import simulated_click


def ask(server: str, model: str, image: str, **request: object) -> np.ndarray:
    """The server's label map for an image of its studies."""
    parameters = {"result_extension": ".nii.gz", "result_dtype": "uint8", **request}
    body = (
        b'--x\r\nContent-Disposition: form-data; name="params"\r\n\r\n'
        + json.dumps(parameters).encode()
        + b"\r\n--x--\r\n"
    )
    url = f"{server}/infer/{model}?image={image}&output=image"
    call = urllib.request.Request(url, body, {"Content-Type": "multipart/form-data; boundary=x"})
    with urllib.request.urlopen(call) as answer, tempfile.NamedTemporaryFile(suffix=".nii.gz") as file:
        file.write(answer.read())
        file.flush()
        return np.asarray(nib.load(file.name).dataobj)


def mean_dice(truth: np.ndarray, found: np.ndarray, labels: dict[str, int]) -> float:
    """Over the targets that are in the truth or were found."""
    return float(np.nanmean([dice(truth == value, found == value) for value in labels.values() if value]))


def next_click(truth: np.ndarray, found: np.ndarray, labels: dict[str, int]) -> tuple[str, tuple[int, ...]] | None:
    """The label that the map should show, and where: of all labels the one with the largest mistake."""
    missed = {name: np.count_nonzero((truth == value) & (found != value)) for name, value in labels.items()}
    name = max(missed, key=missed.get)
    wanted = truth == labels[name]
    click = simulated_click(wanted, wanted & (found == labels[name])) if missed[name] else None
    return None if click is None else (name, click.voxel)


def main(options: argparse.Namespace) -> None:
    with urllib.request.urlopen(f"{options.server}/info/") as answer:
        labels = json.loads(answer.read())["models"][options.model]["labels"]
    truth = np.asarray(nib.load(options.label).dataobj)
    clicks: dict[str, list] = {name: [] for name in labels}
    started, found = time.perf_counter(), ask(options.server, f"{options.model}_seg", options.image)
    print(f"automatic: Dice {mean_dice(truth, found, labels):.4f}, {time.perf_counter() - started:.1f} s")
    for number in range(1, options.clicks + 1):
        click = next_click(truth, found, labels)
        if click is None:
            print("nothing is wrong any more")
            return
        name, voxel = click
        clicks[name].append([int(n) for n in voxel])
        started = time.perf_counter()
        found = ask(options.server, options.model, options.image, label=name, **clicks)
        print(
            f"click {number}, {name} at {list(voxel)}: Dice {mean_dice(truth, found, labels):.4f}, shown there: "
            f"{int(found[voxel])}, {time.perf_counter() - started:.1f} s"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="tsfm_finetune_deepedit")
    parser.add_argument("--image", required=True)
    parser.add_argument("--label", required=True)
    parser.add_argument("--clicks", type=int, default=3)
    main(parser.parse_args())
