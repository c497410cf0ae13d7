"""Model folders and weight files of other projects, in exactly their layouts, with random numbers: for tests."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import nn

KERNELS, STRIDES, FEATURES = [[1, 3, 3], [3, 3, 3], [3, 3, 3]], [[1, 1, 1], [1, 2, 2], [2, 2, 2]], [4, 8, 8]
PATCH = [8, 16, 16]


def unet(residual: bool = False, inputs: int = 1, outputs: int = 3, **more):
    """nnU-Net's network as nnU-Net builds it."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

    depth = {"n_blocks_per_stage": [1, 2, 1]} if residual else {"n_conv_per_stage": [2, 2, 2]}
    options = {
        "n_stages": 3, "features_per_stage": FEATURES, "conv_op": nn.Conv3d, "kernel_sizes": KERNELS, "strides": STRIDES,
        **depth, "n_conv_per_stage_decoder": [1, 1] if residual else [2, 2], "conv_bias": True,
        "norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "dropout_op": None,
        "dropout_op_kwargs": None, "nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    network = (ResidualEncoderUNet if residual else PlainConvUNet)(inputs, num_classes=outputs, **{**options, **more})
    for parameter in network.parameters():  # biases and scales too, so that every tensor matters
        nn.init.normal_(parameter, 0.3, 0.5)
    return network.eval()


def plans(residual: bool = False, **configuration) -> dict:
    """plans.json of nnU-Net 2.8.1."""
    kind = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    depth = {"n_blocks_per_stage": [1, 2, 1]} if residual else {"n_conv_per_stage": [2, 2, 2]}
    architecture = {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
        "arch_kwargs": {
            "n_stages": 3, "features_per_stage": FEATURES, "conv_op": "torch.nn.modules.conv.Conv3d", "kernel_sizes": KERNELS,
            "strides": STRIDES, **depth, "n_conv_per_stage_decoder": [1, 1] if residual else [2, 2], "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }  # fmt: skip
    resampling = {"order": 3, "order_z": 0, "force_separate_z": None}
    full = {
        "data_identifier": "nnUNetPlans_3d_fullres", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
        "patch_size": PATCH, "spacing": [3.0, 1.5, 1.5], "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False], "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, **resampling},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {"is_seg": False, **resampling, "order": 1},
        "architecture": architecture, "batch_dice": True,
    }  # fmt: skip
    statistics = {"mean": 40.0, "std": 90.0, "percentile_00_5": -150.0, "percentile_99_5": 250.0, "median": 41.0}
    return {
        "dataset_name": "Dataset004_Toy", "plans_name": "nnUNetPlans", "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {"0": statistics},
        "configurations": {"2d": {"patch_size": [64, 64]}, "base": full, "3d_fullres": {"inherits_from": "base", **configuration}},
    }  # fmt: skip


DATASET = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "Liver": 1, "Liver tumor": 2},
    "file_ending": ".nii.gz",
}


def checkpoint(network, plan: dict, dataset: dict, **more) -> dict:
    """What nnUNetTrainer.save_checkpoint writes; its log holds numpy scalars."""
    logging = {"mean_fg_dice": [np.float64(0.5), np.float32(0.25)], "ema_fg_dice": [np.float64(0.5)], "lrs": [0.01]}
    init = {
        "plans": plan,
        "configuration": "3d_fullres",
        "fold": 0,
        "dataset_json": dataset,
        "device": torch.device("cpu"),
    }
    return {
        "network_weights": network.state_dict(), "optimizer_state": {"state": {}, "param_groups": []},
        "grad_scaler_state": None, "logging": logging, "_best_ema": np.float64(0.5), "current_epoch": 1000,
        "init_args": init, "trainer_name": "nnUNetTrainer", "inference_allowed_mirroring_axes": (0, 1, 2), **more,
    }  # fmt: skip


def write_folder(folder: Path, networks: dict, plan: dict | None = None, dataset: dict | None = None, **more) -> str:
    """A version 2 model folder with one network per fold."""
    plan, dataset = plan or plans(), dataset or DATASET
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plan))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    for fold, network in networks.items():
        (folder / f"fold_{fold}").mkdir()
        torch.save(checkpoint(network, plan, dataset, **more), folder / f"fold_{fold}" / "checkpoint_final.pth")
    return str(folder)


def generic_unet(**more):
    """nnU-Net 1's network in version 2's: a decoder with the kernel of the next deeper level, upsampling and heads unbiased."""
    from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder

    network = unet(**more)
    encoder = network.encoder
    encoder.kernel_sizes = [*encoder.kernel_sizes[1:], encoder.kernel_sizes[-1]]
    network.decoder = UNetDecoder(encoder, network.decoder.num_classes, [2, 2], deep_supervision=False)
    for name, parameter in network.decoder.named_parameters():
        zero = name.startswith(("transpconvs", "seg_layers")) and name.endswith("bias")
        nn.init.zeros_(parameter) if zero else nn.init.normal_(parameter, 0.3, 0.5)
    return network.eval()


def generic_unet_state(network) -> dict:
    """A plain network's weights under the names of nnU-Net 1's Generic_UNet, whose upsampling and heads have no bias."""
    state, found = network.state_dict(), {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[:2] == ["encoder", "stages"] and "all_modules" not in parts:
            level, block, what, kind = int(parts[2]), int(parts[5]), parts[6], parts[7]
            what = {"conv": "conv", "norm": "instnorm"}[what]
            where = f"{level}.{block}.blocks.0" if level == len(FEATURES) - 1 else f"{level}.blocks.{block}"
            found[f"conv_blocks_context.{where}.{what}.{kind}"] = value
        elif parts[:2] == ["decoder", "stages"] and "all_modules" not in parts:
            level, block, what, kind = parts[2], parts[4], parts[5], parts[6]
            what = {"conv": "conv", "norm": "instnorm"}[what]
            found[f"conv_blocks_localization.{level}.{block}.blocks.0.{what}.{kind}"] = value
        elif parts[:2] in (["decoder", "transpconvs"], ["decoder", "seg_layers"]) and parts[3] == "weight":
            found[{"transpconvs": "tu", "seg_layers": "seg_outputs"}[parts[1]] + f".{parts[2]}.weight"] = value
    return found


def write_version_1(
    folder: Path, state: dict, name: str = "nnUNetTrainerV2", trained: int | None = None, **plans_of
) -> str:
    """A version 1 model folder: fold_0/model_final_checkpoint.model with its .pkl, and plans.pkl."""
    stage = {
        "batch_size": 2, "patch_size": np.array(PATCH), "current_spacing": np.array([3.0, 1.5, 1.5]),
        "num_pool_per_axis": [1, 2, 2], "pool_op_kernel_sizes": STRIDES[1:], "conv_kernel_sizes": KERNELS,
        "do_dummy_2D_data_aug": False,
    }  # fmt: skip
    properties = {"mean": np.float32(40.0), "sd": np.float32(90.0), "percentile_00_5": -150.0, "percentile_99_5": 250.0}
    plan = {
        "plans_per_stage": {0: stage}, "normalization_schemes": {0: "CT"}, "use_mask_for_norm": {0: False},
        "dataset_properties": {"intensityproperties": {0: properties}}, "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2], "num_classes": 2, "conv_per_stage": 2, "num_modalities": 1, **plans_of,
    }  # fmt: skip
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.pkl").write_bytes(pickle.dumps(plan))
    content = {"epoch": 1000, "state_dict": state, "optimizer_state_dict": None, "lr_scheduler_state_dict": None}
    content |= {"plot_stuff": ([np.float64(1.0)], [], [], []), "best_stuff": (np.float64(1.0), 0, 0)}
    torch.save(content, folder / "fold_0" / "model_final_checkpoint.model")
    information = {
        "init": ("plans.pkl", 0, "out", "preprocessed", True, trained, True, False, True),
        "name": name,
        "class": f"<class '{name}'>",
        "plans": plan,
    }
    (folder / "fold_0" / "model_final_checkpoint.model.pkl").write_bytes(pickle.dumps(information))
    return str(folder)
