"""Whole folders of images to label maps: one broken case is reported and the rest goes on.

In inference.json: `dataset` is a :class:`CaseDataset` over :func:`find_images`, `postprocessing` ends with
`saving.SaveResultsd`, `evaluator` is a :class:`CaseEvaluator`; everything else is MONAI's.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import Dataset, MetaTensor
from monai.engines import SupervisedEvaluator

from ..cases.folders import NIFTI, OUTPUT_SUFFIX, dicom_outputs, output_paths, paths_of, stem
from ..cases.grids import is_upright
from ..cases.nifti import header_of, unit_mm
from ..errors import first_cause
from ..files import atomic_write
from ..labels import LabelTable
from ..preparation.familiar import Familiar
from ..schema import nearest
from .claims import Claims, ended
from .dicom_seg import source_slices
from .passes import where_it_fits
from .source_grids import prepared_grid

logger = logging.getLogger(__name__)


class FailedCases(RuntimeError):
    """Some cases of a run failed; the others are done. The message lists them."""


def chosen_targets(choice: str | Sequence[str], trained: Sequence[str]) -> Sequence[str]:
    """Names of the targets to paint: `choice` (a name or several), or all `trained` ones where "all" is among it.

    3D Slicer shows a list of names and sends one or several of them back.

    Raises:
        ValueError: others than `trained` ones: nobody taught the network what to say of them.
    """
    names = [choice] if isinstance(choice, str) else list(choice)
    if "all" in names:
        return trained
    if unknown := [name for name in names if name not in trained]:
        raise ValueError(
            f"targets: {unknown} are not among those that the weights were trained on and that raw_ids, where given, has ids "
            f"for{nearest(unknown[0], trained)}; choose from {list(trained)}, or 'all'"
        )
    return names


def chosen_modality(choice: str | Sequence[str]) -> str | None:
    """The modality to normalize as, or None for each image's own: a list is what 3D Slicer shows to choose from."""
    return choice if isinstance(choice, str) else None


def chosen_flag(choice: bool | str) -> bool:
    """True or False, of itself or as the text that a server's client sends.

    Raises:
        ValueError: anything else.
    """
    known = {"true": True, "1": True, "false": False, "0": False}
    if str(choice).lower() not in known:
        raise ValueError(f"{choice!r} is neither true nor false")
    return known[str(choice).lower()]


def chosen_axes(choice: bool | str, description: Mapping[str, Any]) -> bool | str:
    """Axes along which windows are mirrored: for True those of the weights' training, else what `choice` says."""
    return description.get("mirror_axes", "SPL") if choice is True else choice


class CaseDataset(Dataset):
    """MONAI's Dataset, but a case whose transforms fail gives ``{"case", "error"}`` in place of an exception.

    So it gets through a DataLoader's worker, and :class:`CaseEvaluator` reports it.

    Args:
        data, transform: as for Dataset; an item that says no "case" is named like its image.
        output_dir: folder of the results; with it a case is claimed before it is read, so that no other process does it
            too. One that another has, or has done in the meantime, gives ``{"case", "left"}``.
        existing, save: as for `find_images`.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: Callable[[Any], Any],
        output_dir: str | os.PathLike | None = None,
        existing: str = "error",
        save: str | Sequence[str] = "label_map",
    ) -> None:
        super().__init__(data, transform)
        self.output_dir, self.existing, self.save = output_dir, existing, save
        self.claims = None if output_dir is None else Claims(output_dir)

    def free(self, case: str) -> None:
        """Give up the claim on a case: it is done, or failed."""
        if self.claims is not None:
            self.claims.free(case)

    def _left(self, case: str) -> str:
        """Why a case is left to another process, or nothing; then it is claimed."""
        if not self.claims.take(case):
            return "another process is at it"
        if self.existing == "overwrite" or not all(
            path.exists() for path in output_paths(self.output_dir, case, self.save)
        ):
            return ""
        self.claims.free(case)
        return "another process has done it"

    def _transform(self, index: int) -> Any:
        image = paths_of(self.data[index]["image"])[0]
        item = {"case": stem(image), **self.data[index]}
        if self.claims is not None and (left := self._left(item["case"])):
            return {"case": item["case"], "left": left}
        try:
            if dicom_outputs(self.save):  # before the work, not at its end
                source_slices(os.fspath(image))
            return self.transform(item)
        except Exception as error:
            logger.debug("case %s", item["case"], exc_info=True)
            return {"case": item["case"], "error": root_cause(error)}


class CaseEvaluator(SupervisedEvaluator):
    """SupervisedEvaluator that survives a bad case, says how each went, and fails at the end if one did.

    Handlers see an empty list in ``state.batch`` and ``state.output`` for a case that failed. ``results`` holds one
    dict per case: case, seconds (waiting for it included), and ml and quality per target, error, or why it was left. A
    target that some version of the network paints, and the result does not, has 0 ml.

    Args:
        table: label table, to tell the targets' volumes from the label map's values.
        annotated_only: paint a case with the targets that its data set ("dataset") annotates in `table`, as MultiTalent
            scores: what another data set would call these voxels does not cover them. The inferer is a `SlabInferer`.
        familiar: names what in an image the weights have not seen; the rows' "warnings".
        others: as for SupervisedEvaluator; batches of one case, with its name ("case"). `amp` belongs to the inferer.

    Raises:
        FailedCases: by `run`, after the last case, if some failed.
    """

    def __init__(
        self,
        *args: Any,
        table: LabelTable,
        annotated_only: bool = False,
        familiar: Familiar | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.prepare_batch = partial(_prepared_where_it_fits, self.prepare_batch)
        self.familiar = familiar or Familiar()
        self.every, self.annotated = self.inferer, None
        if annotated_only:
            self.annotated = {dataset: table.annotated(dataset) for dataset in table.datasets}
        self.table = table
        self.results: list[dict[str, Any]] = []

    def run(self, global_epoch: int = 1) -> None:
        self.results, self._mark = [], time.perf_counter()
        super().run(global_epoch)
        if self.results:
            print(table := format_results(self.results))
            logging.getLogger("run").info("%s", table)  # for run.log: see console.py
        ended(bool(self.failed))
        if failed := self.failed:
            listed = "\n".join(f"  {row['case']}: {row['error']}" for row in failed)
            raise FailedCases(f"{len(failed)} of {len(self.results)} cases failed:\n{listed}")

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Rows of the cases that failed, with their "error"."""
        return [row for row in self.results if "error" in row]

    def mark_failed(self, error: str) -> None:
        """Count the last case as failed: a handler had no use for its label map."""
        self.results[-1]["error"] = error

    @property
    def protocol(self) -> dict[str, str]:
        """How label maps are made, for whoever compares scores."""
        axes = sorted({axis for flip in getattr(self.every, "flips", ()) for axis in flip})
        return {
            "painted per case": "all targets" if self.annotated is None else "the targets that its data set annotates",
            "mirrored along": ", ".join("SPL"[axis - 2] for axis in axes) or "no axis",
        }

    def _iteration(self, engine: SupervisedEvaluator, batchdata: dict[str, Any]) -> Any:
        case = str(batchdata["case"][0])
        row = {"case": case, **{key: batchdata[key][0] for key in ("error", "left") if key in batchdata}}
        try:
            if row.keys() == {"case"}:
                output = self._segment(engine, batchdata, row)
        except Exception as error:
            logger.debug("case %s", case, exc_info=True)
            row["error"] = root_cause(error)
        finally:
            if isinstance(dataset := getattr(self.data_loader, "dataset", None), CaseDataset):
                dataset.free(case)
        if "error" in row:
            logger.error("%s: %s", case, row["error"])
        if "error" in row or "left" in row:
            engine.state.batch = output = []
        now = time.perf_counter()
        row["seconds"], self._mark = now - self._mark, now
        self.results.append(row)
        return output

    def _segment(self, engine: SupervisedEvaluator, batchdata: dict[str, Any], row: dict[str, Any]) -> Any:
        """Segment a case that was read, and note in its row what is known of it."""
        if self.annotated is not None:
            wanted = self.annotated[batchdata["dataset"][0]] if "dataset" in batchdata else self.every.chosen
            self.inferer = self.every.restricted_to(wanted)
        if warnings := self._strange(row["case"], batchdata):
            row["warnings"] = warnings
        output = super()._iteration(engine, batchdata)
        if getattr(self.inferer, "doubts", False):
            row["quality"] = self.inferer.quality
        known, found = self.table.names, {}
        if isinstance(output, list) and "pred" in output[0]:
            # zero_shot.json makes the table's targets of the inferer's
            is_own = getattr(self.inferer, "names", None) == known
            found = volumes_ml(output[0]["pred"], self.table, self.inferer.chosen if is_own else known)
        row["ml"] = found | {name: 0.0 for name in row.get("quality", ()) if name in known and name not in found}
        return output

    def _strange(self, case: str, batchdata: Mapping[str, Any]) -> list[str]:
        """What in an image is far from what the weights have seen."""
        image = batchdata["image"]
        grid, modality = prepared_grid(image), (batchdata.get("modality") or [None])[0]
        found = self.familiar.warnings(image.as_tensor()[0].numpy(force=True), grid, modality) if grid else []
        for line in found:
            logger.warning("%s is far from what the weights were trained on: %s", case, line)
        return found


def _prepared_where_it_fits(prepare: Callable, batch: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
    """MONAI's `prepare_batch`; an image that a GPU does not hold whole stays on the CPU, and goes there window by window."""
    return where_it_fits(lambda place: prepare(batch, place, *args, **kwargs), torch.device(device), "the image")


def root_cause(error: BaseException) -> str:
    """The message of an exception, without the RuntimeError that MONAI wraps around a transform's own."""
    error = first_cause(error)
    return str(error) if isinstance(error, ValueError) and str(error) else f"{type(error).__name__}: {error}"


def volumes_ml(label_map: torch.Tensor, table: LabelTable, computed: Sequence[str]) -> dict[str, float]:
    """Volume of each `computed` target that occurs in a label map (1, X, Y, Z), its parts and what lies inside included, in ml.

    Values that the table does not name, which somebody's own step may add, count nowhere.
    """
    values = label_map.detach().cpu().as_subclass(torch.Tensor).flatten()
    voxels = torch.bincount(values, minlength=len(table.names) + 1).numpy()[: len(table.names) + 1]
    counts = voxels @ table.map_membership()
    affine = np.asarray(label_map.affine) if isinstance(label_map, MetaTensor) else np.eye(4)
    voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000
    found = zip(table.names, counts, strict=True)
    return {name: float(count * voxel_ml) for name, count in found if count and name in computed}


def format_results(results: Sequence[Mapping[str, Any]]) -> str:
    """A table of cases: seconds and ml per target, or the error."""
    width = max(len("case"), *(len(row["case"]) for row in results))
    told = any(_agreement(row, name) for row in results for name in row.get("ml", {}))
    lines = [f"{'case':{width}}  seconds  result{' (how far mirrored versions or folds agree, as Dice)' * told}"]
    for row in results:
        found = [f"{name} {value:.1f} ml{_agreement(row, name)}" for name, value in row.get("ml", {}).items()]
        ml = ", ".join(found) or "nothing found"
        ml += " (unlike the training images, see the warnings)" if row.get("warnings") else ""
        outcome = f"FAILED: {row['error']}" if "error" in row else f"left out: {row['left']}" if "left" in row else ml
        lines.append(f"{row['case']:{width}}  {row['seconds']:7.1f}  {outcome}")
    return "\n".join(lines)


def _agreement(row: Mapping[str, Any], target: str) -> str:
    agreement = row.get("quality", {}).get(target, {}).get("agreement")
    return "" if agreement is None else f" ({agreement:.2f})"


def write_label_map(label_map: torch.Tensor, path: str | os.PathLike) -> None:
    """Write a label map (1, X, Y, Z) as NIfTI; header fields, unit and form codes are its source image's, if NIfTI.

    A sheared grid (a tilted gantry) is written as sform alone: a qform cannot hold it.
    """
    array = np.asarray(label_map.detach().cpu())[0]
    affine = np.asarray(label_map.affine, float) if isinstance(label_map, MetaTensor) else np.eye(4)
    source = str(label_map.meta.get("filename_or_obj", "")) if isinstance(label_map, MetaTensor) else ""
    header = header_of(source) if source.lower().endswith(NIFTI) else None
    if header is not None:
        header.set_data_shape(array.shape)
        affine = np.diag([*[1 / unit_mm(header)] * 3, 1]) @ affine
    image = nib.Nifti1Image(array, affine, header)
    codes = [0, 0] if header is None else [int(header.get(key, 0)) for key in ("sform_code", "qform_code")]
    s_code, q_code = codes if any(codes) else (1, 1)
    if not is_upright(affine):
        s_code, q_code = s_code or 1, 0
    image.set_sform(affine if s_code else None, s_code)
    image.set_qform(affine if q_code else None, q_code)
    image.set_data_dtype(array.dtype)
    image.header["cal_min"] = image.header["cal_max"] = 0
    atomic_write(path, lambda temporary: nib.save(image, temporary), OUTPUT_SUFFIX)
