"""Which pool a downstream data set is: MSD, nnU-Net v2, two folders, or a pool file, told apart by what lies there."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from ..cases.dataset_folder import declared_labels
from ..cases.folders import SUFFIXES, PoolError, paths_of, stem
from ..cases.licences import check_weights
from ..cases.pool import DatasetPool
from ..cases.sources import Sources, recorded_pool
from ..cases.volumes import read_grid
from ..names import modality_name, plain_name
from ..schema import FileError, read_json
from ..training.checkpoint import image_channels
from ..training.weight_files import CheckpointError
from .public_weights import read_pretrained

logger = logging.getLogger(__name__)

PATTERNS = "--images '{case}/ct.nii.gz' --labels '{case}/seg.nii.gz'"
"""An example for messages; a list under `images` is one file per channel, ``{structure}`` in `labels` a mask each."""


def dataset_pool(
    dataset_dir: str,
    pool_file: str | Mapping[str, Any] | None = None,
    images: str | Sequence[str] = "images",
    labels: str = "labels",
    regions: Mapping[str, Any] | None = None,
    label_ids: Mapping[str, str] | None = None,
    modality: str | None = None,
    pretrained: str | None = None,
    kept_in: str | None = None,
    licence: str = "any",
    **options: Any,
) -> DatasetPool:
    """The pool of a downstream task, from whatever the user has.

    A `pool_file` (path or content) is used as it is. Otherwise `dataset_dir` holds a ``dataset.json`` of the MSD (it lists
    its cases under "training") or of nnU-Net v2 (``imagesTr/x_0000.nii.gz``, a file per channel), whose labels are the
    targets unless `label_ids` (raw id -> target) and `regions` (the targets with their tree) are given; or two folders
    `images` and `labels` whose file names pair (``x_0000``, ``x_0001`` per channel), for which `label_ids`
    (``{"1": "liver"}``) are needed. `images` and `labels` may be patterns of a pool file, too (``{case}/T1.nii.gz``). Where
    `dataset_dir` holds nothing of the kind (a MONAI Label server hands items in by itself), the targets are those of the
    `pretrained` weights. With `kept_in`, a store, everything is as it was recorded there.

    `licence` is what the data's licence, and those of what the `pretrained` weights saw, have to permit (`DatasetPool`).

    Raises:
        PoolError: a folder that is none of these, two folders without `label_ids`, a licence that does not permit it, labels or
            a modality that a store recorded otherwise.
    """
    _check_weights(pretrained, licence)
    options["licence"] = licence
    dataset_dir = os.path.expanduser(dataset_dir)
    name = plain_name(os.path.basename(os.path.abspath(dataset_dir))) or "data"
    if pool_file is not None:
        given = {"images": images != "images", "labels": labels != "labels", "label_ids": label_ids, "regions": regions}
        if unused := [f"--{option}" for option, value in (given | {"modality": modality}).items() if value]:
            logger.warning("%s: without effect, since the pool file says it", " and ".join(unused))
        return DatasetPool(pool_file, dataset_dir, kept_in=kept_in, **options)
    if kept_in is not None:
        content = recorded_pool(kept_in, name)
        _check_recorded(content, label_ids, regions, modality, kept_in)
        return DatasetPool(content, dataset_dir, kept_in=kept_in, **options)
    declared = os.path.abspath(os.path.join(dataset_dir, "dataset.json"))
    source = declared if os.path.isfile(declared) else os.path.dirname(declared)
    labels_in = f"--label_ids (now {dict(label_ids)})" if label_ids else f'"labels" of {declared}'
    entry: dict[str, Any] = {"name": name, "folder": "."}
    targets: dict[str, Any] = {}
    patterns = _patterns(images, labels)
    if os.path.isfile(declared):
        content = read_json(declared, "dataset.json", PoolError)
        if not label_ids:
            label_ids, targets, ignored = declared_labels(content, declared)
            entry |= {"ignore": ignored} if ignored else {}
        entry |= patterns or _declared_files(content, declared)
        if not patterns and (images, labels) != ("images", "labels"):
            logger.warning(
                "%s says where the files are: --images and --labels are no patterns and have no effect", declared
            )
        entry["modality"] = modality or _declared_modality(content, declared)
    elif patterns or os.path.isdir(os.path.join(dataset_dir, images)):
        if not label_ids:
            raise PoolError(
                f"{dataset_dir}: image files say nothing about the labels; name them (--label_ids \"{{'1': 'liver'}}\")"
            )
        entry |= patterns or _two_folders(dataset_dir, images, labels)
        entry["modality"] = modality or "CT"
    elif pretrained is not None and os.path.exists(str(pretrained)):
        description = pretrained_description(pretrained)
        return DatasetPool({"targets": description["targets"], "datasets": []}, dataset_dir, **options)
    else:
        raise PoolError(
            f"{os.path.abspath(dataset_dir)} holds neither dataset.json (Medical Segmentation Decathlon, nnU-Net) nor a "
            f"folder '{images}'; point --dataset_dir at one of these, say how the files lie ({PATTERNS}), or give a --pool_file"
        )
    named = {name: {} for names in label_ids.values() for name in ([names] if isinstance(names, str) else names)}
    entry["labels"] = {str(raw): names for raw, names in label_ids.items()}
    content = {"targets": regions or targets or named, "datasets": [entry]}
    return DatasetPool(content, dataset_dir, source=source, labels_in=labels_in, **options)


def count_channels(pool: DatasetPool, pretrained: str | None = None) -> int:
    """Image channels of the pool's first case; of the weights where the pool has no cases."""
    if not pool.entries:
        return image_channels(pretrained_description(pretrained))
    first = pool.cases[0]
    if pool.kept_in is not None:
        return Sources(pool.kept_in).of(first["dataset"])["channels"]
    return read_grid(first["image"]).channels


def default_pretrained(dataset_dir: str, ckpt_dir: str, raw_data: bool = True) -> str | None:
    """The weights that a training begins with where none are named.

    None, so from nothing, for a data set in a folder or in the store; the bundle's own for items that a server hands in.
    """
    is_there = os.path.isdir(os.path.expanduser(dataset_dir))
    return None if is_there or not raw_data else os.path.join(ckpt_dir, "model.pt")


def pretrained_description(pretrained: str | None) -> dict[str, Any]:
    """What travels with the pretrained weights; CheckpointError with the way out where there are none."""
    if pretrained is None:
        raise CheckpointError(
            "there are no pretrained weights, which 'checkpoint' as --spacing_mm, --patch_size or --ct_normalization asks for, "
            "and a run without a data set: give --pretrained FILE, or numbers or 'auto' there ('fingerprint' for the last)"
        )
    if not os.path.exists(str(pretrained)):
        raise CheckpointError(
            f"the pretrained weights {os.path.abspath(str(pretrained))} do not exist: name the model.pt of a pretraining "
            "(--pretrained FILE), or leave --pretrained out to start from nothing"
        )
    description = read_pretrained(str(pretrained)).description
    if "network" not in description:
        raise CheckpointError(
            f"{pretrained}: the weights carry no description of their network, so nothing can be planned by them. Use a "
            "model.pt that tsfm's bundles wrote, or weights in a layout that docs/networks.md lists"
        )
    return description


def _check_weights(pretrained: str | None, use: str) -> None:
    """PoolError where the pretrained weights saw data whose licences are not known to permit the use."""
    if use != "any" and pretrained is not None and os.path.exists(str(pretrained)):
        check_weights(pretrained, read_pretrained(str(pretrained)).description, use, "leave --pretrained out")


def _check_recorded(
    content: Mapping[str, Any],
    label_ids: Mapping[str, Any] | None,
    regions: Mapping[str, Any] | None,
    modality: str | None,
    store: str,
) -> None:
    """PoolError where a data set was recorded with other labels or another modality than are asked for."""
    entry = content["datasets"][0]

    def ids(labels: Mapping[str, Any]) -> dict[str, list[str]]:
        return {str(raw): [names] if isinstance(names, str) else list(names) for raw, names in labels.items()}

    targets = {name: {k: v for k, v in entry.items() if k != "_desc_"} for name, entry in (regions or {}).items()}
    differ = {
        "label_ids": label_ids and ids(label_ids) != ids(entry["labels"]),
        "regions": regions and targets != content["targets"],
        "modality": modality and modality_name(modality) != modality_name(entry["modality"]),
    }
    if found := [f"--{option}" for option, differs in differ.items() if differs]:
        raise PoolError(
            f"{' and '.join(found)}: the store {store} has this data set with ids {entry['labels']}, targets "
            f"{list(content['targets'])} and modality {entry['modality']}. Leave the options out to go on with these, or prepare "
            "it anew where its files are (leave --raw_data out)"
        )


def _declared_files(content: Mapping[str, Any], path: str) -> dict[str, Any]:
    """MSD's list of cases, or patterns for nnU-Net's folders (v1 has both: its list leaves the channel's number out)."""
    folder = os.path.dirname(path)
    training = content.get("training")
    if training:
        images = training[0]["image"] if isinstance(training[0], Mapping) else str(training[0])
        first = os.path.join(folder, paths_of(images)[0])
        if os.path.isfile(first) or not os.path.isfile(re.sub(r"(\.nii(\.gz)?)$", r"_0000\1", first)):
            return {"format": "msd"}
    elif not os.path.isdir(os.path.join(folder, "imagesTr")):
        raise PoolError(f'{path} has neither a "training" list nor a folder imagesTr beside it')
    if content.get("dataset"):
        raise PoolError(
            f'{path} lists its files under "dataset"; expected imagesTr/CASE_0000.nii.gz and labelsTr: declare such a data '
            "set in a pool file (docs/datasets.md) and give it with --pool_file"
        )
    ending = content.get("file_ending") or _names(os.path.join(folder, "imagesTr"))[1]
    declared = content.get("channel_names") or content.get("modality") or "CT"
    channels = 1 if isinstance(declared, str) else len(declared)
    images = [f"imagesTr/{{case}}_{number:04d}{ending}" for number in range(channels)]
    if not glob.glob(os.path.join(glob.escape(folder), images[0].replace("{case}", "*"))):
        raise PoolError(
            f"{os.path.join(folder, 'imagesTr')} holds no file like CASE_0000{ending} (nnU-Net's names), and {path} has no "
            '"training" list (MSD)'
        )
    return {"image": images if channels > 1 else images[0], "label": f"labelsTr/{{case}}{ending}"}


def _declared_modality(content: Mapping[str, Any], path: str) -> str:
    """The modality of one channel; several channels are z-scored each, whatever they are."""
    declared = content.get("modality") or content.get("channel_names") or "CT"
    names = [declared] if isinstance(declared, str) else list(getattr(declared, "values", lambda: declared)())
    if len(names) == 1:
        try:
            return modality_name(names[0], path)
        except FileError as error:
            raise PoolError(f"{error}; or give --modality (CT: Hounsfield units, MR: whatever is z-scored)") from None
    if "CT" in (name.upper() for name in names):
        logger.warning("channels %s: with several channels each is z-scored per case, CT too", names)
    return "MR"


def _patterns(images: str | Sequence[str], labels: str) -> dict[str, Any]:
    """What a pool file says about files, where the names of the two folders are such patterns; else nothing."""
    if isinstance(images, str) and "{case}" not in images:
        return {}
    if "{case}" not in labels:
        raise PoolError(f"--images {images} is a pattern, --labels {labels} is none: {PATTERNS}")
    return {"image": images, "label": labels}


def _two_folders(dataset_dir: str, images: str, labels: str) -> dict[str, Any]:
    """Patterns for two folders whose names pair: equal but for what all of a folder begin or end with (``volume-1`` and
    ``segmentation-1``, ``x_img`` and ``x_seg``), or with a file per channel under nnU-Net's names."""
    names, ending = _names(os.path.join(dataset_dir, images))
    if not os.path.isdir(os.path.join(dataset_dir, labels)):
        raise PoolError(f"folder {os.path.join(dataset_dir, labels)} does not exist")
    labelled, label_ending = _names(os.path.join(dataset_dir, labels))
    # "case_0001" may be a case's own number: then there is a label of that name
    numbers = {name[-4:] for name in set(names) - set(labelled) if re.search(r"_\d{4}$", name)}
    channels = [f"_{number}" for number in sorted(numbers)] if "0000" in numbers else [""]
    cases = sorted({name.removesuffix(channel) for name in names for channel in channels if name.endswith(channel)})
    image, label = ("{case}", "{case}") if set(cases) & set(labelled) else _paired(cases, labelled)
    if not label:
        raise PoolError(
            f"no image in {os.path.join(dataset_dir, images)} ({names[0]}{ending}) has a label in {labels} "
            f"({labelled[0]}{label_ending}): name the files alike, or say what belongs together ({PATTERNS})"
        )
    if image != label:
        logger.info("%s: images %s%s with labels %s%s", dataset_dir, image, ending, label, label_ending)
    found = [f"{images}/{image}{channel}{ending}" for channel in channels]
    return {"image": found if len(found) > 1 else found[0], "label": f"{labels}/{label}{label_ending}"}


def _paired(names: Sequence[str], labelled: Sequence[str]) -> tuple[str, str]:
    """Patterns of the names of images and labels that differ in what all of them begin or end with; empty if none pair."""
    (front, back), (label_front, label_back) = _frame(names), _frame(labelled)
    front, label_front = ("", "") if front == label_front else (front, label_front)
    back, label_back = ("", "") if back == label_back else (back, label_back)
    cases, known = (
        {name[len(a) : len(name) - len(b)] for name in group}
        for group, a, b in ((names, front, back), (labelled, label_front, label_back))
    )
    return (f"{front}{{case}}{back}", f"{label_front}{{case}}{label_back}") if (cases & known) - {""} else ("", "")


def _frame(names: Sequence[str]) -> tuple[str, str]:
    """What all names begin with and end with, up to a sign between words; without one, up to a digit."""
    front, back = _common(names), _common([name[::-1] for name in names])[::-1]
    words = re.match(r".*[_. -]", front), re.search(r"[_. -](?=[^\W\d]).*", back)
    front = words[0][0] if words[0] else re.match(r"\D*", front)[0]
    return front, words[1][0] if words[1] else re.search(r"\D*$", back)[0]


def _common(names: Sequence[str]) -> str:
    """What all names begin with."""
    return "".join(letters[0] for letters in takewhile(lambda one: len(set(one)) == 1, zip(*names, strict=False)))


def _names(folder: str) -> tuple[list[str], str]:
    """Names of the images in a folder, and the one ending that all have."""
    files = sorted(name for name in os.listdir(folder) if name.lower().endswith(SUFFIXES) and not name.startswith("."))
    endings = Counter(name.removeprefix(stem(name)) for name in files)
    if not files:
        raise PoolError(f"{folder} holds no {', '.join(SUFFIXES)} file; say where they lie ({PATTERNS})")
    if len(endings) > 1:
        found = ", ".join(f"{count} {ending}" for ending, count in endings.items())
        raise PoolError(f"{folder} holds files of several endings ({found}): convert or rename them to have one")
    return [stem(name) for name in files], next(iter(endings))
