"""Folders of DICOM series for MONAI Label, which knows image files: each becomes one NIfTI file beside it."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger(__name__)


def series_as_nifti(folder: str) -> list[str]:
    """Write NAME.nii.gz into `folder` for every DICOM series in it or below; returns the paths that are new.

    The voxels are those that the bundles read from the series itself. A series that cannot be read is left out, with a
    warning that says why.
    """
    import torch
    from monai.data import MetaTensor
    from tsfm.cases.folders import find_images, output_path
    from tsfm.cases.volumes import read_volume
    from tsfm.errors import CaseError
    from tsfm.inference.prediction import write_label_map

    try:
        found = [item["image"] for item in find_images(folder) if os.path.isdir(item["image"])]
    except FileNotFoundError:  # an empty folder, to be filled later
        found = []
    written = []
    for series in found:
        name = os.path.relpath(series, folder).replace(os.sep, "_")
        path = str(output_path(folder, os.path.basename(os.path.abspath(folder)) if name == "." else name))
        if os.path.exists(path):
            continue
        try:
            volume = read_volume(series)
        except CaseError as error:
            logger.warning("left out: %s", error)
            continue
        write_label_map(MetaTensor(torch.from_numpy(volume.array), affine=torch.from_numpy(volume.affine)), path)
        logger.info("%s: written from the DICOM series %s", path, series)
        written.append(path)
    return written
