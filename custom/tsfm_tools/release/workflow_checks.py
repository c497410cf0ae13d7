"""Checks of what a bundle does: its workflows are built, its network runs, loads the weights and is exported."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigWorkflow, ckpt_export, verify_net_in_out
from tsfm.cases.cases import Preparation
from tsfm.labels import LABEL_MAP, LabelTable
from tsfm.network.tsfm_net import TSFM
from tsfm.training.checkpoint import describe_network, load_weights, save_weights

from ..phantoms.layouts import write_all_ten, write_pool
from .export import TOLERANCE, relative_difference
from .folder_checks import Failed, config_path, has_weights, metadata_of, need, need_weights
from .rules import built, check_weights

TINY = (16, 24, 24)  # voxels of the phantoms that the workflows are given

TOY_NETWORK = {
    **{"features": [4, 8], "depths_down": [1, 1], "depths_up": [1], "strides": [[2, 2, 2]]},
    **{"hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 16},
}


def _label_maps(bundle: str) -> str:
    """What a MONAI Label server hands back for training are label maps 1..N; train.json has to read them as such."""
    need_weights(bundle)
    table = built(bundle, "train.json", "table")
    values = np.arange(len(table.names) + 1)
    rows = {}
    for dataset in (table.bare_dataset, LABEL_MAP):
        try:
            rows[dataset] = table.targets[table.offset(dataset) + table.encode(dataset, values).astype(int)]
        except ValueError as error:
            raise Failed(f"bare items are read as '{dataset}': {error}") from None
    need(
        np.array_equal(rows[table.bare_dataset], rows[LABEL_MAP]),
        f"bare items are read with the raw ids of '{table.bare_dataset}', which are not 1..N: MONAI Label would train on "
        "wrong labels. Release these weights with the fine-tuning bundle, which reads label maps.",
    )
    return f"bare items are read as '{table.bare_dataset}', 1..{len(table.names)}"


def _properties(bundle: str, kind: str) -> str:
    files, inputs = (["train.json"], _train_inputs) if kind == "train" else (["inference.json"], _infer_inputs)
    if kind == "train" and not has_weights(bundle) and os.path.isfile(config_path(bundle, "small.json")):
        files.append("small.json")  # properties are built to be checked: a source bundle's are of full size
    with tempfile.TemporaryDirectory() as folder:
        workflow = ConfigWorkflow(
            config_file=[config_path(bundle, file) for file in files],
            meta_file=config_path(bundle, "metadata.json"),
            workflow_type=kind,
            logging_file=False,
            bundle_root=bundle,
            **inputs(bundle, folder),
        )
        workflow.initialize()
        wrong = workflow.check_properties()
    need(not wrong, f"{' + '.join(files)}: missing or wrong properties {wrong}")
    return f"{' + '.join(files)}: check_properties() == []"


def _infer_inputs(bundle: str, folder: str) -> dict[str, Any]:
    """Overrides that give inference.json an image to find and, for a source bundle, weights."""
    images = os.path.join(folder, "data")
    write_pool(images, 1, TINY, datasets=("msd_lung",))
    inputs = {"dataset_dir": os.path.join(images, "Task06_Lung", "imagesTr"), "output_dir": os.path.join(folder, "out")}
    return inputs if has_weights(bundle) else {**inputs, "checkpoint": _toy_weights(bundle, folder)}


def _train_inputs(bundle: str, folder: str) -> dict[str, Any]:
    """Overrides that give train.json data: phantoms in its layout, or bare items as a MONAI Label server hands over."""
    data = os.path.join(folder, "data")
    inputs: dict[str, Any] = {key: os.path.join(folder, key) for key in ("store_dir", "output_dir", "ckpt_dir")}
    inputs["num_workers"] = 0
    if has_weights(bundle):
        (names,) = write_pool(data, 2, TINY, datasets=("msd_lung",)).values()
        image, label = (os.path.join(data, f"Task06_Lung/{key}sTr/{{}}.nii.gz") for key in ("image", "label"))
        items = [{"image": image.format(name), "label": label.format(name)} for name in names]
        lists = {"train#dataset#data": items[:1], "validate#dataset#data": items[1:]}
        return {**inputs, **lists, "ckpt_dir": bundle + "/models"}
    if os.path.isfile(config_path(bundle, "pool.json")):
        write_all_ten(data, 2, TINY)
        return {**inputs, "dataset_dir": data}
    write_pool(data, 2, TINY, datasets=("msd_liver",))
    return {**inputs, "dataset_dir": os.path.join(data, "Task03_Liver"), "pretrained": _toy_weights(bundle, folder)}


def _toy_weights(bundle: str, folder: str) -> str:
    """Weights of a network of a few thousand parameters with the targets that the bundle's metadata names."""
    data = metadata_of(bundle)["network_data_format"]
    names = [name for value, name in data["outputs"]["pred"]["channel_def"].items() if value != "0"]
    channels, patch = data["inputs"]["image"]["num_channels"], [16, 16, 16]
    table = LabelTable({name: {} for name in names}, [])
    network = TSFM(channels, len(names), **TOY_NETWORK, img_size=patch)
    ct = {"CT": {"lower": -1000.0, "upper": 1000.0, "mean": 0.0, "sd": 300.0}}
    describe_network(network, table, Preparation((8.0, 8.0, 8.0), ct, channels), patch)
    path = os.path.join(folder, "toy.pt")
    save_weights(network, path)
    return path


def _weights(bundle: str) -> str:
    need_weights(bundle)
    shortest = min((path.name for path in Path(bundle, "models").glob("*.pt")), key=len)
    need(shortest == "model.pt", f"models/{shortest} has a shorter name than model.pt: MONAI Label would take it")
    found = check_weights(bundle)
    return f"{found['tensors']} tensors, {found['parameters']:,} parameters"


def _inference(bundle: str) -> dict[str, str]:
    """Arguments by which MONAI's commands know a bundle's inference."""
    files = {"config_file": "inference.json", "meta_file": "metadata.json"}
    return {"bundle_root": bundle, **{key: config_path(bundle, file) for key, file in files.items()}}


def _shape(bundle: str) -> str:
    need_weights(bundle)
    inputs = metadata_of(bundle)["network_data_format"]["inputs"]["image"]
    verify_net_in_out(net_id="network_def", device="cpu", **_inference(bundle))
    return f"one forward pass of {inputs['num_channels']} x {inputs['spatial_shape']}"


def _export(bundle: str) -> str:
    need_weights(bundle)
    spec = metadata_of(bundle)["network_data_format"]["inputs"]["image"]
    shape = [1, spec["num_channels"], *spec["spatial_shape"]]
    weights = os.path.join(bundle, "models", "model.pt")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.ts")
        ckpt_export("network_def", filepath=path, ckpt_file=weights, **_inference(bundle))  # as the zoo: no --use_trace
        exported = torch.jit.load(path).eval()
    network = built(bundle, "inference.json", "network_def").eval()
    load_weights(network, weights)
    with torch.no_grad():
        difference = relative_difference(network, exported, tuple(shape))
    need(difference <= TOLERANCE, f"TorchScript differs by {difference:.2g} of the largest logit; {TOLERANCE:g} may")
    return f"TorchScript; outputs differ by at most {difference:.1g} of the largest logit"


WORKFLOW_CHECKS: dict[str, Callable[[str], str]] = {
    "label maps back (MONAI Label)": _label_maps,
    "train properties": partial(_properties, kind="train"),
    "inference properties": partial(_properties, kind="infer"),
    "weights fit network_def": _weights,
    "verify_net_in_out": _shape,
    "ckpt_export": _export,
}
"""Name of each check -> the check, in the order of the table."""
