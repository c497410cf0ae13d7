"""Which pool a downstream data set is: MSD, nnU-Net v2, two folders, or a pool file, told apart by what lies there."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..cases.folders import PoolError, paths_of
from ..cases.licences import check_weights
from ..cases.pool import DatasetPool
from ..cases.sources import Sources, recorded_pool
from ..cases.volumes import read_grid
from ..names import modality_name, plain_name, plain_names
from ..schema import FileError, read_json
from ..training.checkpoint import image_channels
from ..training.weight_files import CheckpointError
from .public_weights import read_pretrained

logger = logging.getLogger(__name__)

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")

IGNORE = "ignore"  # nnU-Net's name of the label whose voxels enter no loss


def dataset_pool(
    dataset_dir: str,
    pool_file: str | Mapping[str, Any] | None = None,
    images: str = "images",
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
    `images` and `labels` with the same file names (or ``x_0000``, ``x_0001`` per channel), for which `label_ids`
    (``{"1": "liver"}``) are needed. Where `dataset_dir` holds nothing of the kind (a MONAI Label server hands items in by
    itself), the targets are those of the `pretrained` weights. With `kept_in`, a store, everything is as it was recorded there.

    `licence` is what the data's licence, and those of what the `pretrained` weights saw, have to permit (`DatasetPool`).

    Raises:
        PoolError: a folder that is none of these, two folders without `label_ids`, a licence that does not permit it.
    """
    _check_weights(pretrained, licence)
    options["licence"] = licence
    name = _plain_name(os.path.basename(os.path.abspath(dataset_dir)))
    if pool_file is not None or kept_in is not None:
        content = recorded_pool(kept_in, name) if pool_file is None else pool_file
        return DatasetPool(content, dataset_dir, kept_in=kept_in, **options)
    declared = os.path.join(dataset_dir, "dataset.json")
    entry: dict[str, Any] = {"name": name, "folder": "."}
    targets: dict[str, Any] = {}
    if os.path.isfile(declared):
        content = read_json(declared, "dataset.json", PoolError)
        if not label_ids:
            label_ids, targets, ignored = _declared_labels(content, declared)
            entry |= {"ignore": ignored} if ignored else {}
        entry |= _declared_files(content, declared) | {"modality": modality or _declared_modality(content, declared)}
    elif os.path.isdir(os.path.join(dataset_dir, images)):
        entry |= _two_folders(dataset_dir, images, labels)
        entry["modality"] = modality or "CT"
        if not label_ids:
            raise PoolError(
                f"{dataset_dir}: two folders say nothing about the labels; name them (--label_ids \"{{'1': 'liver'}}\")"
            )
    elif pretrained is not None and os.path.exists(str(pretrained)):
        description = pretrained_description(pretrained)
        return DatasetPool({"targets": description["targets"], "datasets": []}, dataset_dir, **options)
    else:
        raise PoolError(
            f"{os.path.abspath(dataset_dir)} holds neither dataset.json (Medical Segmentation Decathlon, nnU-Net) nor a "
            f"folder '{images}'; point --dataset_dir at one of these, or give a --pool_file"
        )
    named = {name: {} for names in label_ids.values() for name in ([names] if isinstance(names, str) else names)}
    entry["labels"] = {str(raw): names for raw, names in label_ids.items()}
    return DatasetPool({"targets": regions or targets or named, "datasets": [entry]}, dataset_dir, **options)


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
    return None if os.path.isdir(dataset_dir) or not raw_data else os.path.join(ckpt_dir, "model.pt")


def pretrained_description(pretrained: str | None) -> dict[str, Any]:
    """What travels with the pretrained weights; CheckpointError with the way out where there are none."""
    if pretrained is None:
        raise CheckpointError(
            "there are no pretrained weights to plan by: give --pretrained FILE, or numbers, or 'auto'"
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


def _plain_name(name: str) -> str:
    """Of a data set: its folder's name, or "data" where that has no letter or digit."""
    return plain_name(name) or "data"


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
    ending = content.get("file_ending") or _ending(os.path.join(folder, "imagesTr"))
    declared = content.get("channel_names") or content.get("modality") or "CT"
    channels = 1 if isinstance(declared, str) else len(declared)
    images = [f"imagesTr/{{case}}_{number:04d}{ending}" for number in range(channels)]
    if not glob.glob(os.path.join(glob.escape(folder), images[0].replace("{case}", "*"))):
        raise PoolError(
            f"{os.path.join(folder, 'imagesTr')} holds no file like CASE_0000{ending} (nnU-Net's names), and {path} has no "
            '"training" list (MSD)'
        )
    return {"image": images if channels > 1 else images[0], "label": f"labelsTr/{{case}}{ending}"}


def _declared_labels(content: Mapping[str, Any], path: str) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """(raw id -> target or targets, targets with their tree, ids to ignore).

    MSD has ``{"1": name}``, nnU-Net ``{name: 1}`` or, for regions, ``{name: [1, 2]}``: an id then belongs to every region
    that lists it, and a region lies inside the smallest one that holds all its ids.
    """
    labels = content.get("labels")
    if not isinstance(labels, Mapping) or not labels:
        raise PoolError(f'{path} has no "labels"')
    if all(str(key).isdigit() for key in labels):
        plain = plain_names({raw: name for raw, name in labels.items() if int(raw) != 0}, path)
        named: dict[str, list[int]] = {}
        for raw, name in plain.items():
            named.setdefault(name, []).append(int(raw))
    else:
        ids = {name: value if isinstance(value, list | tuple) else [value] for name, value in labels.items()}
        if not all(isinstance(raw, int) for values in ids.values() for raw in values):
            raise PoolError(
                f'{path}: "labels" is {dict(labels)}; expected {{"0": "background", "1": name, ...}}, or nnU-Net\'s '
                '{"background": 0, name: 1, ...} with a list of ids for a region'
            )
        ids = {name: list(values) for name, values in ids.items() if list(values) != [0]}
        plain = plain_names({name: name for name in ids}, path)
        named = {plain[name]: values for name, values in ids.items()}
    ignored = named.pop(IGNORE, [])
    order = content.get("regions_class_order")
    if order is not None and len(order) != len(named):
        raise PoolError(f'{path}: "regions_class_order" is {order}; expected one entry for each of {list(named)}')
    by_id = {raw: [name for name, ids in named.items() if raw in ids] for ids in named.values() for raw in ids}
    label_ids = {str(raw): names[0] if len(names) == 1 else names for raw, names in sorted(by_id.items())}
    return label_ids, {name: _relation(name, named) for name in named}, ignored


def _relation(name: str, named: Mapping[str, Sequence[int]]) -> dict[str, str]:
    own = set(named[name])
    around = [other for other, ids in named.items() if own < set(ids)]
    return {"inside": min(around, key=lambda other: len(named[other]))} if around else {}


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


def _two_folders(dataset_dir: str, images: str, labels: str) -> dict[str, Any]:
    """Patterns for two folders of equally named files, or with a file per channel under nnU-Net's names."""
    folder, label_folder = os.path.join(dataset_dir, images), os.path.join(dataset_dir, labels)
    ending = _ending(folder)
    if not os.path.isdir(label_folder):
        raise PoolError(f"folder {label_folder} does not exist")
    names = [name.removesuffix(ending) for name in sorted(os.listdir(folder)) if name.endswith(ending)]
    labelled = {name.removesuffix(ending) for name in os.listdir(label_folder)}
    # "case_0001" may be a case's own number: then there is a label of that name
    numbers = {name[-4:] for name in names if re.search(r"_\d{4}$", name) and name not in labelled}
    if "0000" not in numbers:
        return {"image": f"{images}/{{case}}{ending}", "label": f"{labels}/{{case}}{ending}"}
    patterns = [f"{images}/{{case}}_{number}{ending}" for number in sorted(numbers)]
    return {"image": patterns if len(patterns) > 1 else patterns[0], "label": f"{labels}/{{case}}{ending}"}


def _ending(folder: str) -> str:
    files = os.listdir(folder)
    found = next((ending for ending in ENDINGS if any(name.endswith(ending) for name in files)), None)
    if found is None:
        raise PoolError(f"{folder} holds no .nii.gz, .nii, .nrrd or .mha file")
    return found
