"""Decisions a run needs before it starts: which pool, which preparation, which patch, which network.

Each function takes what the user gave, fills the rest from the pretrained weights' description or, on request, by
nnU-Net's rules from the data, and says what it chose.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import nibabel as nib
import torch

from ..cases.cases import Preparation, file_identity
from ..cases.folders import PoolError, _two_folders
from ..cases.pool import DatasetPool
from ..cases.volumes import read_volume
from ..files import atomic_write
from ..network.described import DescribedNetwork
from ..network.networks import LEVEL_STRIDES, create_network
from ..patches.store import CaseStore
from ..preparation.fingerprint import Fingerprint, fingerprint, fit_patch, plan_spacing
from ..training.checkpoint import CheckpointError, build_network
from .public_weights import read_pretrained
from .transfer import freeze as freeze_parts
from .transfer import load_pretrained

logger = logging.getLogger(__name__)

FROM_SCRATCH = ("", "none", "None", None)


def dataset_pool(
    dataset_dir: str,
    pool_file: str | Mapping[str, Any] | None = None,
    images: str = "images",
    labels: str = "labels",
    regions: Mapping[str, Any] | None = None,
    label_ids: Mapping[str, str] | None = None,
    modality: str | None = None,
    pretrained: str | None = None,
    **options: Any,
) -> DatasetPool:
    """The pool of a downstream task, from whatever the user has.

    A `pool_file` (path or content) is used as it is. Otherwise `dataset_dir` holds an MSD ``dataset.json``, whose labels
    are the targets unless `label_ids` (raw id -> target) and `regions` (the targets with their tree) are given; or two
    folders `images` and `labels` with the same file names, for which `label_ids` (``{"1": "liver"}``) are needed. Where
    `dataset_dir` holds nothing of the kind (a MONAI Label server hands items in by itself), the targets are those of the
    `pretrained` weights.

    Raises:
        PoolError: a folder that is none of these, two folders without `label_ids`.
    """
    if pool_file is not None:
        return DatasetPool(pool_file, dataset_dir, **options)
    declared = os.path.join(dataset_dir, "dataset.json")
    entry: dict[str, Any] = {"name": _plain_name(os.path.basename(os.path.abspath(dataset_dir))), "folder": "."}
    if os.path.isfile(declared):
        with open(declared, encoding="utf-8") as file:
            content = json.load(file)
        entry |= {"format": "msd", "modality": modality or _msd_modality(content)}
        label_ids = label_ids or {
            raw: _plain_name(name) for raw, name in _msd_labels(content, declared).items() if str(raw) != "0"
        }
    elif os.path.isdir(os.path.join(dataset_dir, images)):
        entry |= _two_folders(dataset_dir, images, labels)
        entry["modality"] = modality or "CT"
        if not label_ids:
            raise PoolError(
                f"{dataset_dir}: two folders say nothing about the labels; name them (--label_ids \"{{'1': 'liver'}}\")"
            )
    elif pretrained not in FROM_SCRATCH and os.path.exists(str(pretrained)):
        description = _pretrained_description(pretrained)
        return DatasetPool({"targets": description["targets"], "datasets": []}, dataset_dir, **options)
    else:
        raise PoolError(
            f"{os.path.abspath(dataset_dir)} holds neither dataset.json (Medical Segmentation Decathlon) nor a folder "
            f"'{images}'; point --dataset_dir at one of these, or give a --pool_file"
        )
    regions = regions or {
        name: {} for names in label_ids.values() for name in ([names] if isinstance(names, str) else names)
    }
    entry["labels"] = {str(raw): names for raw, names in label_ids.items()}
    return DatasetPool({"targets": regions, "datasets": [entry]}, dataset_dir, **options)


def count_channels(pool: DatasetPool, pretrained: str | None = None) -> int:
    """Image channels of the pool's first case; of the weights where the pool has no cases."""
    if not pool.entries:
        return _pretrained_description(pretrained)["network"]["in_channels"]
    image = pool.cases[0]["image"]
    if isinstance(image, list | tuple):
        return len(image)
    if not str(image).lower().endswith((".nii", ".nii.gz")):
        return len(read_volume(image).array)
    try:
        shape = nib.load(image).shape
    except (nib.filebasedimages.ImageFileError, OSError, EOFError) as error:
        raise PoolError(f"{image} is not a readable NIfTI file: {error}") from None
    return int(shape[3]) if len(shape) == 4 else 1


def plan_preparation(
    pool: DatasetPool,
    store_dir: str,
    spacing_mm: Sequence[float] | str = "checkpoint",
    ct_normalization: Mapping[str, float] | str = "checkpoint",
    in_channels: int = 1,
    pretrained: str | None = None,
) -> Preparation:
    """How cases are prepared.

    `spacing_mm`: millimetres (S, P, L), ``"checkpoint"`` (as the pretrained weights expect) or ``"auto"`` (nnU-Net's
    target spacing for this data). `ct_normalization`: ``{"lower", "upper", "mean", "sd"}`` in HU, ``"checkpoint"``, or
    ``"fingerprint"``: percentiles and moments of the foreground of all CT of the pool (nnU-Net). Anything but CT is
    z-scored. A fingerprint is computed once and kept in `store_dir`.
    """
    known = {} if pretrained in FROM_SCRATCH else _pretrained_description(pretrained)["preparation"]
    for name, value in (("spacing_mm", spacing_mm), ("ct_normalization", ct_normalization)):
        if value == "checkpoint" and not known:
            raise ValueError(
                f"{name} is 'checkpoint', but there are no pretrained weights: give --{name} or --pretrained"
            )
    spacing = known["spacing_mm"] if spacing_mm == "checkpoint" else spacing_mm
    if spacing == "auto":
        found = _fingerprint(pool, store_dir)
        spacing = plan_spacing(found.spacings_mm, found.shapes)
        logger.info("target spacing by nnU-Net's rule: %s mm (S, P, L)", [round(float(side), 3) for side in spacing])
    masked = dict(known.get("masked", {}))
    has_ct = bool(pool.entries) and any(item["modality"] == "CT" for item in pool.cases)
    if (
        ct_normalization == "checkpoint"
        and has_ct
        and "CT" not in known.get("intensity", {})
        and not known.get("channels")
    ):
        logger.warning(
            "the pretrained weights never saw CT: its normalization follows from the fingerprint of this data"
        )
        ct_normalization = "fingerprint"
    if ct_normalization == "checkpoint":
        intensity = dict(known.get("intensity", {}))
    elif isinstance(ct_normalization, Mapping):
        intensity = {"CT": dict(ct_normalization)}
    elif ct_normalization == "fingerprint":
        found = _fingerprint(pool, store_dir)
        masked |= {name: share for name, share in found.masked.items() if name != "CT"}
        if has_ct and "CT" not in found.intensity:
            raise PoolError(
                f"{pool.source}: no CT case has a labelled voxel, so there is nothing to normalize CT by; check the labels, "
                "or give --ct_normalization \"{'lower': ..., 'upper': ..., 'mean': ..., 'sd': ...}\""
            )
        ct = found.intensity.get("CT", {})
        intensity = {"CT": {key: ct[key] for key in ("lower", "upper", "mean", "sd")}} if has_ct else {}
    else:
        raise ValueError(
            f"ct_normalization is {ct_normalization!r}; expected 'checkpoint', 'fingerprint' or four numbers"
        )
    modality = known.get("default_modality") if not pool.entries else pool.cases[0]["modality"]
    found = Preparation(tuple(spacing), intensity, in_channels, modality, masked)
    if spacing_mm != "checkpoint" or not known:
        return found
    kept = {key: known[key] for key in ("orientation", "resample_first") if key in known}
    if ct_normalization == "checkpoint" and len(known.get("channels", ())) == in_channels:
        kept["channels"] = known["channels"]
    return replace(found, **kept)


def plan_patch(
    patch_size: Sequence[int] | str, pool: DatasetPool, store_dir: str, preparation: Preparation, pretrained: str | None
) -> list[int]:
    """The training patch (S, P, L): as given, or ``"auto"``: the pretrained patch, no larger than the median case.

    The result is a multiple of the network's strides.
    """
    if patch_size != "auto":
        return [int(size) for size in patch_size]
    description = _pretrained_description(pretrained)
    if not pool.entries:
        return description["patch_size"]
    shape = _fingerprint(pool, store_dir).median_prepared_shape(preparation.spacing_mm)
    strides = description["network"].get("strides", LEVEL_STRIDES)
    patch = [int(size) for size in fit_patch(shape, strides, description["patch_size"])]
    logger.info(
        "patch %s for cases of about %s voxels at %s mm", patch, [round(s) for s in shape], list(preparation.spacing_mm)
    )
    return patch


def downstream_network(
    pool: DatasetPool,
    patch_size: Sequence[int],
    in_channels: int,
    pretrained: str | None,
    preparation: Preparation | None = None,
    from_scratch: bool = False,
    freeze: str = "none",
    output_dir: str | None = None,
    **overrides: Any,
) -> DescribedNetwork:
    """The pretrained network with the task's channels, targets and patch, its weights taken over.

    `from_scratch` keeps the architecture and drops the weights (the paper's "nopretrain" rows). Without `pretrained`
    the network's name and arguments come from `overrides` alone. The report of what was taken over goes to
    ``transfer_report.json`` in `output_dir`.
    """
    shape = {
        "in_channels": in_channels,
        "out_channels": len(pool.table.names),
        "img_size": list(patch_size),
        **overrides,
    }
    if pretrained in FROM_SCRATCH:
        network = create_network(**shape)
    else:
        network = build_network(_pretrained_description(pretrained), **shape)
    network.description = {"network": network.description["network"], "targets": pool.table.to_dict()["targets"]}
    if pretrained not in FROM_SCRATCH and not from_scratch:
        report = os.path.join(output_dir, "transfer_report.json") if output_dir else None
        task = {"modalities": sorted({item["modality"] for item in pool.cases})} if pool.entries else {}
        if preparation is not None:
            task["preparation"] = preparation.to_dict()
        load_pretrained(network, str(pretrained), report_path=report, task=task)
    freeze_parts(network, freeze)
    return network


def _pretrained_description(pretrained: str | None) -> dict[str, Any]:
    """What travels with the pretrained weights; CheckpointError with the way out where there are none."""
    if pretrained in FROM_SCRATCH:
        raise CheckpointError("there are no pretrained weights to plan by: give --pretrained FILE, or --patch_size")
    if not os.path.exists(str(pretrained)):
        raise CheckpointError(
            f"the pretrained weights {os.path.abspath(str(pretrained))} do not exist: put the model.pt of a pretraining "
            "there, or name it (--pretrained FILE). --from_scratch True needs it too: it says what the network is like"
        )
    description = read_pretrained(str(pretrained)).description
    if "network" not in description:
        raise CheckpointError(
            f"{pretrained}: the weights carry no description of their network, so nothing can be planned by them. Use a "
            "model.pt that tsfm's bundles wrote, or weights in a layout that docs/networks.md lists"
        )
    return description


def prepare(store: CaseStore, items: Sequence[Mapping[str, Any]], num_workers: int = 0) -> None:
    """Prepare all `items` before the long work starts; of several processes the first does it, the others wait.

    Raises:
        StoreError, CaseError: listing every case that cannot be used.
    """
    with first_process_first():
        store.prepare(items, num_workers=num_workers, progress=_rank() == 0).raise_failures()


@contextmanager
def first_process_first() -> Iterator[None]:
    """Under torchrun: the first process goes through the block alone, the others after it (and find its results)."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and _rank() > 0:
        torch.distributed.barrier()
    yield
    if distributed and _rank() == 0:
        torch.distributed.barrier()


def _rank() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if distributed else 0


def _fingerprint(pool: DatasetPool, store_dir: str) -> Fingerprint:
    """The pool's fingerprint, from `store_dir` where these very files were measured before."""
    with first_process_first():
        return _read_or_measure(pool, store_dir)


def _read_or_measure(pool: DatasetPool, store_dir: str) -> Fingerprint:
    files = [[item["modality"], file_identity(item)] for item in pool.cases]
    key = json.dumps([files, pool.table.to_dict()["datasets"]], sort_keys=True)
    path = os.path.join(store_dir, f"fingerprint-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json")
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            return Fingerprint(**json.load(file), failed=[])
    channels = Preparation((1.0, 1.0, 1.0), in_channels=count_channels(pool))
    found = fingerprint(pool.cases, pool.table, channels, progress=_rank() == 0)
    if found.failed:
        listed = "\n".join(f"  {message}" for _, message in found.failed)
        raise PoolError(
            f'{len(found.failed)} of {len(pool.cases)} cases cannot be used; mend or "exclude" them:\n{listed}'
        )

    def write(temporary: str) -> None:
        content = asdict(found)
        del content["failed"]
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=4)

    atomic_write(path, write)
    return found


def _plain_name(name: str) -> str:
    """Lower case with underscores, as label tables and MONAI Label have it."""
    return re.sub(r"[^0-9a-z]+", "_", str(name).lower()).strip("_")


def _msd_labels(content: Mapping[str, Any], path: str) -> dict[str, str]:
    """``{"0": "background", "1": name}``; nnU-Net v2's reversed ``{name: 1}`` is understood too."""
    labels = content.get("labels")
    if not isinstance(labels, Mapping) or not labels:
        raise PoolError(f'{path} has no "labels"')
    if all(str(key).isdigit() for key in labels):
        return {str(raw): name for raw, name in labels.items()}
    if all(isinstance(value, int) for value in labels.values()):
        return {str(raw): name for name, raw in labels.items()}
    raise PoolError(f'{path}: "labels" is {dict(labels)}; expected {{"0": "background", "1": name, ...}}')


def _msd_modality(content: Mapping[str, Any]) -> str:
    names = list((content.get("modality") or content.get("channel_names") or {"0": "CT"}).values())
    if len(names) > 1 and "CT" in (str(name).upper() for name in names):
        logger.warning("channels %s: with several channels each is z-scored per case, CT too", names)
    return "CT" if len(names) == 1 and str(names[0]).upper() == "CT" else "MR"
