"""DICOM for MONAI Label: folders of series as NIfTI files, and labels to and from a DICOMweb server by their names."""

from __future__ import annotations

import glob
import logging
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import pydicom
import pydicom_seg
import SimpleITK as sitk
from fastapi import HTTPException
from label_checks import FINAL
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.datastore.local import LocalDatastore
from monailabel.datastore.utils.dicom import dicom_web_download_series

logger = logging.getLogger(__name__)


def series_as_nifti(folder: str) -> None:
    """Write NAME.nii.gz into `folder` for every DICOM series in it or below that has none yet.

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


class NamedSegments(DICOMWebDatastore):
    """A DICOMweb server whose SEG objects say by name what a segment is.

    MONAI Label's own names segments by their order, reads them back numbered by their order, cut to the slices that hold
    one, and looks for new labels only every two hours.
    """

    values: Mapping[str, int] | None
    """Name -> value in a label map, None where the server's bundles differ in it; whoever makes the store sets it."""

    def _known_values(self) -> Mapping[str, int]:
        """`values`; HTTPException where the value of a name depends on the bundle."""
        if self.values is None:
            raise HTTPException(
                409,
                "this server's bundles have different targets, so that a label's values could mean any bundle's: serve each "
                "bundle by a server of its own (--conf models NAME)",
            )
        return self.values

    def get_labeled_images(self, label_tag: Any = None, labels: Any = None) -> list[str]:
        """Images with a label on the server when it was last asked, or submitted since."""
        return sorted({*super().get_labeled_images(label_tag, labels), *LocalDatastore.get_labeled_images(self)})

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """Store a label map, its segments named by their values."""
        names = {value: name for name, value in self._known_values().items()}
        held = np.unique(sitk.GetArrayFromImage(sitk.ReadImage(label_filename))).tolist()
        shown = [{"name": names.get(int(value), f"value {value}"), "model_name": "TSFM"} for value in held if value]
        return super().save_label(image_id, label_filename, label_tag, {**label_info, "label_info": shown})

    def get_label_uri(self, label_id: str, label_tag: str, image_id: str = "") -> str:
        """The label map of an image; made from the server's SEG where it is not here yet."""
        here = os.path.join(self._datastore.label_path(label_tag), f"{image_id}.nii.gz")
        if label_tag == FINAL and image_id and not os.path.exists(here):
            folder = os.path.join(self._datastore.label_path(label_tag), label_id)
            dicom_web_download_series(None, label_id, folder, self._client, self._fetch_by_frame)
            with tempfile.TemporaryDirectory() as scratch:
                path = os.path.join(scratch, f"{image_id}.nii.gz")
                sitk.WriteImage(label_map_of(folder, self.get_image_uri(image_id), self._known_values()), path)
                LocalDatastore.save_label(self, image_id, path, label_tag, self._dicom_info(label_id))
        return super().get_label_uri(label_id, label_tag, image_id)


def label_map_of(folder: str, image: str, values: Mapping[str, int]) -> sitk.Image:
    """The label map, on the image's grid, of the DICOM SEG in a folder; segments of other names are left out.

    Raises:
        ValueError: no segment has a known name.
    """
    segments = pydicom_seg.SegmentReader().read(pydicom.dcmread(glob.glob(os.path.join(glob.escape(folder), "*"))[0]))
    grid = sitk.ReadImage(image)
    painted = sitk.Image(grid.GetSize(), sitk.sitkUInt8)
    painted.CopyInformation(grid)
    named = {number: str(segments.segment_infos[number].SegmentLabel) for number in segments.available_segments}
    known = {number: values[name.lower()] for number, name in named.items() if name.lower() in values}
    if not known:
        raise ValueError(
            f"{folder}: none of its segments {list(named.values())} has the name of a target {list(values)}"
        )
    if len(known) < len(named):
        logger.warning("%s: segments left out, whose names are no targets: %s", folder, set(named) - set(known))
    for number, value in known.items():
        there = sitk.Resample(segments.segment_image(number), grid, sitk.Transform(), sitk.sitkNearestNeighbor)
        painted = sitk.Mask(painted, there == 0) + sitk.Cast(there != 0, sitk.sitkUInt8) * value
    return painted
