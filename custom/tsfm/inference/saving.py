"""What is written of a case: the step of inference.json that ``--save`` steers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import SaveImaged

from ..cases.folders import dicom_outputs, output_paths, saved_outputs
from ..cases.raw_ids import in_raw_ids, raw_values
from ..labels import LabelTable
from .dicom_seg import highdicom, write_seg
from .prediction import write_label_map
from .probabilities import NEEDED_FOR, Probabilities


class Result(NamedTuple):
    """One case as it leaves inference: what a writer writes.

    label_map: (1, X, Y, Z) on the image's own grid, values 1 to N; a MetaTensor knows its image's file and affine.
    table: label table of these values; None where nobody said.
    item: the case's entries: those of the datalist ("image", "case", ...) and what the transforms made of them.
    raw_ids: the data set whose ids a label map is wanted in; None for the values.
    probabilities: those of this case, where the inferer kept them.
    """

    label_map: torch.Tensor
    table: LabelTable | None
    item: Mapping[Hashable, Any]
    raw_ids: str | None = None
    probabilities: Probabilities | None = None


def _label_map(result: Result, path: Path) -> None:
    label_map = result.label_map
    if result.raw_ids is not None:
        label_map = in_raw_ids(label_map, result.table, result.raw_ids)
    write_label_map(label_map, path)


def _uncertainty(result: Result, path: Path) -> None:
    values = torch.from_numpy(result.probabilities.uncertainty())[None]
    write_label_map(MetaTensor(values).copy_meta_from(result.label_map, copy_attr=False), path)


WRITERS: dict[str, Callable[[Result, Path], None]] = {
    "label_map": _label_map,
    "uncertainty": _uncertainty,
    "probabilities": lambda result, path: result.probabilities.save(path),
    "dicom_seg": lambda result, path: write_seg(result.label_map, path, result.table, "BINARY"),
    "dicom_labelmap": lambda result, path: write_seg(result.label_map, path, result.table, "LABELMAP"),
}
"""Name in ``--save`` (one of `cases.folders.OUTPUTS`) -> what writes a result to a path, whole or not at all."""


class SaveResultsd(SaveImaged):
    """Writes what `save` names of each case: ``output_dir/<case>.nii.gz``, the label map, with the image's affine and header.

    A SaveImaged, so that MONAI Label leaves it out. The item's "case" names the files.

    Args:
        keys: label maps (1, X, Y, Z) on the image's own grid, that is, after Invertd.
        existing: what to do with files that are there: "error", "skip" (keep them, write the others), or "overwrite".
        save: one or several of `cases.folders.OUTPUTS`.
        table: label table of the label map's values; needed for all but plain label maps.
        raw_ids: a data set of the table, in whose own ids label maps are written.
        probabilities: what the inferer fills; needed to save them.

    Raises:
        ValueError: unknown names in `save`, probabilities that nobody keeps, a data set without ids, a missing `table`.
        ImportError: DICOM shall be written and highdicom is not there.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str = "./",
        existing: str = "error",
        save: str | Sequence[str] = "label_map",
        table: LabelTable | None = None,
        raw_ids: str | None = None,
        probabilities: Probabilities | None = None,
    ) -> None:
        super().__init__(
            keys, output_dir=output_dir, output_postfix="", output_dtype=np.uint8, separate_folder=False, print_log=False,
        )  # fmt: skip
        self.output_dir, self.existing, self.save, self.table = output_dir, existing, saved_outputs(save), table
        self.raw_ids, self.probabilities = raw_ids, probabilities
        if raw_ids is not None:
            raw_values(table, raw_ids)
        if set(NEEDED_FOR) & set(self.save) and probabilities is None:
            raise ValueError(
                f"save is {self.save}, but nobody keeps probabilities: give inferer and saver one Probabilities"
            )
        if segs := dicom_outputs(self.save):
            highdicom()
            if table is None:
                raise ValueError(f"save is {self.save}, and a table names the segments of {segs[0]}: give one")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        for key in self.key_iterator(item):
            paths = output_paths(self.output_dir, item["case"], self.save)
            there = [path for path in paths if path.exists()] if self.existing != "overwrite" else []
            if there and self.existing == "error":
                raise FileExistsError(f"{there[0]} is already there; remove it, or allow to overwrite it")
            named = dict(zip(self.save, paths, strict=True))
            for name in sorted(named, key=list(WRITERS).index):  # the probabilities are given away last
                path = named[name]
                if path not in there:
                    WRITERS[name](Result(item[key], self.table, item, self.raw_ids, self.probabilities), path)
        if self.probabilities is not None:
            self.probabilities.discard()
        return item
