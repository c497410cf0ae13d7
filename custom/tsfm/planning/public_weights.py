"""Weights of other projects as pretrained weights: told apart by what a file holds, renamed to this package's names.

| file                                      | network   | what comes with it                                                |
|-------------------------------------------|-----------|-------------------------------------------------------------------|
| nnU-Net 2: model folder, or a fold's .pth | nnunet    | targets, plans (spacing, normalization, patch)                    |
| nnU-Net 1: folder, or .model with .pkl    | nnunet    | plans; its labels have no names                                   |
| STU-Net: ``*_ep4k.model``                 | stunet    | 104 targets of TotalSegmentator, in alphabetical order            |
| ``model_swinvit.pt``                      | swinunetr | the encoder only                                                  |
| ``ssl_pretrained_weights.pth``            | swinunetr | the encoder only                                                  |
| ``sam_med3d_turbo.pth``                   | sam_med3d | a prompted network, one target at a time                          |
| anything else                             | any       | what these bundles wrote                                          |

Files are read without executing anything (see checkpoint.py and safe_pickle.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..cases.cases import Preparation
from ..network.networks import STUNET_STRIDES
from ..training.checkpoint import read_state
from ..training.weight_files import load_file
from . import nnunet, nnunet_v1

NOTHING = r"(?!)"

SWIN_RANGE = {"lower": -1000.0, "upper": 1000.0, "mean": -1000.0, "sd": 2000.0}  # HU, to the range 0 to 1


class Pretrained(NamedTuple):
    """Tensors by the names that `create_network` gives them, and what is known of them.

    absent, unused: patterns of names that the tensors may lack, and that the network may lack. notes: for the report.
    """

    tensors: dict[str, Tensor]
    description: dict[str, Any]
    notes: tuple[str, ...] = ()
    absent: str = NOTHING
    unused: str = NOTHING


def read_pretrained(path: str | os.PathLike) -> Pretrained:
    """Weights of this or another project.

    Raises:
        CheckpointError: nothing there, unsafe, damaged, or weights that do not fit what comes with them.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        model = read_folder(path)
        fold, tensors = next(iter(model.folds.items()))
        note = f"fold {fold} of the folds {', '.join(model.folds)}"
        return Pretrained(tensors, model.description, (note,) if len(model.folds) > 1 else ())
    if path.endswith(".safetensors"):
        return _own(path)
    content = load_file(path)
    for key, needle, read in LAYOUTS:
        state = content.get(key) if key else content
        if isinstance(state, Mapping) and any(re.match(needle, str(name)) for name in state):
            return read(path, content, state)
    return _own(path)


def read_folder(path: str, **options: Any) -> nnunet.Model:
    """A model folder of nnU-Net 2, or of version 1."""
    version = nnunet_v1 if os.path.isfile(os.path.join(path, "plans.pkl")) else nnunet
    return version.read_model(path, **options)


def _own(path: str) -> Pretrained:
    """Weights that these bundles wrote; of an ensemble the first member."""
    tensors, description = read_state(path)
    network = description.get("network", {})
    if network.get("name") != "ensemble":
        return Pretrained(tensors, description)
    prefix, member = "" if network["network"].get("name", "tsfm") == "tsfm" else "net.", "members.0."
    first = {prefix + name.removeprefix(member): value for name, value in tensors.items() if name.startswith(member)}
    note = f"the first of {network['count']} networks whose mean the checkpoint holds"
    return Pretrained(first, {**description, "network": network["network"]}, (note,))


def _nnunet_2(path: str, content: Mapping[str, Any], state: Mapping[str, Tensor]) -> Pretrained:
    given = content["init_args"]
    description = nnunet.describe(content, given["plans"], given["dataset_json"], path)
    return Pretrained(nnunet.rename(state, description["network"], path), description)


def _nnunet_1(path: str, content: Mapping[str, Any], state: Mapping[str, Tensor]) -> Pretrained:
    return Pretrained(*nnunet_v1.read_checkpoint(path))


def _stunet(path: str, content: Mapping[str, Any], state: Mapping[str, Tensor]) -> Pretrained:
    """Version 1 layout of nnU-Net around STU-Net; its plan is the published one (z-score per case, 1.5 mm, 128^3)."""
    state = {name.removeprefix("module."): value for name, value in state.items()}
    levels = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("conv_blocks_context."))
    first = [state[f"conv_blocks_context.{level}.0.conv1.weight"] for level in range(levels)]
    blocks = [name for name in state if re.fullmatch(r"conv_blocks_context\.\d+\.\d+\.conv1\.weight", name)]
    outputs = len(state[f"seg_outputs.{levels - 2}.weight"])
    names = STUNET_TARGETS if outputs == len(STUNET_TARGETS) + 1 else ()
    network = {
        "name": "stunet",
        "in_channels": first[0].shape[1],
        "out_channels": outputs,
        "img_size": [128, 128, 128],
        "features": [len(weight) for weight in first],
        "strides": [list(stride) for stride in STUNET_STRIDES[: levels - 1]],
        "depths_down": [sum(name.split(".")[1] == str(level) for name in blocks) for level in range(levels)],
        "deep_supervision": True,
    }
    channels = network["in_channels"]
    rules = [{"scheme": "zscore", "masked": False}] * channels
    preparation = Preparation((1.5, 1.5, 1.5), in_channels=channels, channels=rules, resample_first=True)
    description = {
        **_ct_description(network, preparation, names),
        "dataset_labels": [{"name": "totalsegmentator", "labels": {str(i): [name] for i, name in enumerate(names, 1)}}],
        "activation": "probabilities",  # its inference is nnU-Net 1's
        "mirror_axes": "SPL",
    }
    note = () if names else (f"{outputs} outputs are not the 104 classes of TotalSegmentator: all heads start anew",)
    return Pretrained({f"net.{name}": value for name, value in state.items()}, description, note)


def _swinvit(path: str, content: Mapping[str, Any], state: Mapping[str, Tensor]) -> Pretrained:
    """``module.layers1.0.blocks.0.mlp.fc1`` is ``swinViT.layers1.0.blocks.0.mlp.linear1``."""
    renamed = {
        re.sub(r"\.mlp\.fc([12])\.", r".mlp.linear\1.", name.replace("module.", "net.swinViT.", 1)): value
        for name, value in state.items()
    }
    return _swin_encoder(renamed)


def _swin_ssl(path: str, content: Mapping[str, Any], state: Mapping[str, Tensor]) -> Pretrained:
    """``encoder.layers1.0.0.blocks...`` of the disruptive autoencoder, by MONAI's own filter."""
    from monai.networks.nets.swin_unetr import filter_swinunetr

    renamed = {}
    for name, value in state.items():
        kept = filter_swinunetr(name, value)
        renamed[name if kept is None else f"net.{kept[0]}"] = value
    return _swin_encoder(renamed)


def _swin_encoder(tensors: dict[str, Tensor]) -> Pretrained:
    embedding = tensors["net.swinViT.patch_embed.proj.weight"]
    size, channels = embedding.shape[:2]
    network = {
        "name": "swinunetr",
        "in_channels": channels,
        "out_channels": 1,
        "img_size": [96, 96, 96],
        "feature_size": size,
        "deep_supervision": False,
    }
    description = _ct_description(network, Preparation((2.0, 1.5, 1.5), {"CT": SWIN_RANGE}, channels))
    note = "the weights are of the encoder alone: the rest starts anew"
    return Pretrained(tensors, description, (note,), r"(?!net\.swinViT\.)", r"(?!net\.swinViT\.(patch_embed|layers\d))")


def _sam_med3d(path: str, content: Mapping[str, Any], state: Mapping[str, Tensor]) -> Pretrained:
    network = {"name": "sam_med3d", "in_channels": 1, "out_channels": 1, "img_size": [128, 128, 128]}
    description = _ct_description(network, Preparation((1.5, 1.5, 1.5), orientation="RAS"), ["target"])
    return Pretrained({f"net.{name}": value for name, value in state.items()}, description)


def _ct_description(network: dict[str, Any], preparation: Preparation, targets: Sequence[str] = ()) -> dict[str, Any]:
    return {
        "network": network,
        "targets": {name: {} for name in targets},
        "dataset_labels": [],
        "preparation": preparation.to_dict(),
        "patch_size": network["img_size"],
        "modalities": ["CT"],
    }


LAYOUTS = (
    ("network_weights", r"", _nnunet_2),
    ("state_dict", r"(module\.)?conv_blocks_context\.0\.0\.conv1\.", _stunet),
    ("state_dict", r"(module\.)?conv_blocks_context\.0\.blocks\.0\.", _nnunet_1),
    ("state_dict", r"module\.patch_embed\.proj\.", _swinvit),
    ("model", r"encoder\.patch_embed\.proj\.", _swin_ssl),
    ("model_state_dict", r"image_encoder\.", _sam_med3d),
)
"""(key of the file's content, beginning of a name in it, how it is read)"""


def _numbered(name: str, numbers: Any) -> list[str]:
    return [f"{name}{number}" for number in sorted(map(str, numbers))]


STUNET_TARGETS = (
    *("adrenal_gland_left", "adrenal_gland_right", "aorta", "autochthon_left", "autochthon_right", "brain"),
    *("clavicula_left", "clavicula_right", "colon", "duodenum", "esophagus", "face", "femur_left", "femur_right"),
    *("gallbladder", "gluteus_maximus_left", "gluteus_maximus_right", "gluteus_medius_left", "gluteus_medius_right"),
    *("gluteus_minimus_left", "gluteus_minimus_right", "heart_atrium_left", "heart_atrium_right", "heart_myocardium"),
    *("heart_ventricle_left", "heart_ventricle_right", "hip_left", "hip_right", "humerus_left", "humerus_right"),
    *("iliac_artery_left", "iliac_artery_right", "iliac_vena_left", "iliac_vena_right", "iliopsoas_left"),
    *("iliopsoas_right", "inferior_vena_cava", "kidney_left", "kidney_right", "liver", "lung_lower_lobe_left"),
    *("lung_lower_lobe_right", "lung_middle_lobe_right", "lung_upper_lobe_left", "lung_upper_lobe_right", "pancreas"),
    *("portal_and_splenic_vein", "pulmonary_artery", *_numbered("rib_left_", range(1, 13))),
    *(*_numbered("rib_right_", range(1, 13)), "sacrum", "scapula_left", "scapula_right", "small_bowel", "spleen"),
    *("stomach", "trachea", "bladder", *_numbered("vertebrae_c", range(1, 8))),
    *(*_numbered("vertebrae_l", range(1, 6)), *_numbered("vertebrae_t", range(1, 13))),
)
"""STU-Net's classes 1 to 104: TotalSegmentator's (version 1), alphabetically; by this project's names, where it has one."""
