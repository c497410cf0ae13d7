"""nnU-Net 2.8.1's preprocessing of one channel by plans written here; imported in the benchmark environment alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager


def preprocessing(
    spacing_mm: Sequence[float], scheme: str, intensity: Mapping[str, float], masked: bool = False
) -> tuple[DefaultPreprocessor, PlansManager, ConfigurationManager]:
    """The preprocessor and the last but one of its arguments: (S, P, L) to `spacing_mm`, normalized by `scheme`.

    Args:
        intensity: ``mean``, ``sd``, ``lower`` and ``upper`` (percentiles 0.5 and 99.5) of the foreground.
        masked: whether voxels outside of the body, which are 0, stay out of the normalization.
    """
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    names = {"mean": "mean", "std": "sd", "percentile_00_5": "lower", "percentile_99_5": "upper"}
    configuration = {
        "data_identifier": "x", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2, "patch_size": [16, 16, 16],
        "architecture": {"network_class_name": "unused", "arch_kwargs": {}, "_kw_requires_import": []},
        "spacing": list(spacing_mm), "normalization_schemes": [scheme], "use_mask_for_norm": [masked],
        "resampling_fn_data": "resample_data_or_seg_to_shape", "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
    }  # fmt: skip
    plans = PlansManager({
        "dataset_name": "d", "plans_name": "p", "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
        "image_reader_writer": "SimpleITKIO", "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {name: intensity[key] for name, key in names.items()}},
        "configurations": {"3d_fullres": configuration},
    })  # fmt: skip
    return DefaultPreprocessor(verbose=False), plans, plans.get_configuration("3d_fullres")


def declared(*labels: str) -> dict:
    """A dataset.json of one channel."""
    values = {name: value for value, name in enumerate(("background", *labels))}
    return {"channel_names": {"0": "CT"}, "file_ending": ".nii.gz", "labels": values}
