"""Decisions a run needs before it starts: which pool, which preparation, which network.

Each function takes what the user gave, fills the rest from the data by nnU-Net's rules or from the pretrained weights'
description, and says what it chose. The geometry (spacing, patch, strides, batch) is decided in plan_run.py.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..cases.cases import Preparation
from ..cases.folders import PoolError
from ..cases.licences import inherited_licences
from ..cases.pool import DatasetPool, is_bare
from ..cases.sources import Sources, file_identity
from ..errors import CaseError
from ..files import check_writable, write_json
from ..names import counted
from ..network.clicks import CLICK_CHANNELS
from ..network.described import DescribedNetwork, check_described
from ..network.networks import create_network
from ..patches.store import CaseStore
from ..preparation.fingerprint import FOLDER, Fingerprint, fingerprint, plan_spacing
from ..preparation.preprocessing import channel_rules
from ..schema import FileError, read_json
from ..training.checkpoint import build_network, goes_on
from .own_data import count_channels, pretrained_description
from .planner import Plan
from .transfer import load_pretrained
from .turns import first_process_first, rank

logger = logging.getLogger(__name__)

FINGERPRINT_FORMAT = 3  # of the files in which fingerprints are kept


def plan_preparation(
    pool: DatasetPool,
    store_dir: str,
    spacing_mm: Sequence[float] | str = "checkpoint",
    ct_normalization: Mapping[str, float] | str = "checkpoint",
    in_channels: int = 1,
    pretrained: str | None = None,
    num_workers: int = 0,
) -> Preparation:
    """How cases are prepared.

    `spacing_mm`: millimetres (S, P, L), ``"checkpoint"`` (as the pretrained weights expect) or ``"auto"`` (nnU-Net's
    target spacing for this data). `ct_normalization`: ``{"lower", "upper", "mean", "sd"}`` in HU, ``"checkpoint"``, or
    ``"fingerprint"``: percentiles and moments of the foreground of all CT of the pool (nnU-Net). Anything but CT is
    z-scored. A fingerprint is measured once, by `num_workers` processes, and kept in `store_dir`. Orientation and order of
    the steps are the pretrained weights', and with their normalization the rules of their channels.
    """
    if not pool.entries:  # items come from outside (MONAI Label): there is no data to plan by
        spacing_mm, ct_normalization = (
            "checkpoint" if isinstance(value, str) else value for value in (spacing_mm, ct_normalization)
        )
    by_weights = pretrained is not None or "checkpoint" in (spacing_mm, ct_normalization)
    known = pretrained_description(pretrained)["preparation"] if by_weights else {}
    orientation, channels = known.get("orientation", "SPL"), known.get("channels", ())
    intensity, masked = dict(known.get("intensity", {})), dict(known.get("masked", {}))
    modalities = [item["modality"] for item in pool.cases] if pool.entries else [known.get("default_modality")]
    has_ct = bool(pool.entries) and "CT" in modalities
    if len(channels) != in_channels:
        channels = ()
    if ct_normalization == "checkpoint" and has_ct and "CT" not in intensity and not channels:
        logger.warning(
            "the pretrained weights never saw CT of %s: its normalization follows from the fingerprint of this data",
            counted(in_channels, "channel"),
        )
        ct_normalization = "fingerprint"
    spacing = known["spacing_mm"] if spacing_mm == "checkpoint" else spacing_mm
    if spacing == "auto" or ct_normalization == "fingerprint":
        found = pool_fingerprint(pool, store_dir, num_workers, orientation)
    if spacing == "auto":
        spacing = plan_spacing(found.spacings_mm, found.shapes)
        logger.info("target spacing by nnU-Net's rule: %s mm (S, P, L)", [round(float(side), 3) for side in spacing])
    if ct_normalization == "fingerprint":
        masked |= {name: share for name, share in found.masked.items() if name != "CT"}
        intensity = {"CT": _measured_ct(pool, found)} if has_ct else {}
    elif isinstance(ct_normalization, Mapping):
        intensity = {"CT": dict(ct_normalization)}
    elif ct_normalization != "checkpoint":
        raise ValueError(
            f"ct_normalization is {ct_normalization!r}; expected 'checkpoint', 'fingerprint' or four numbers"
        )
    result = Preparation(
        tuple(spacing), intensity, in_channels, modalities[0], masked, channels if ct_normalization == "checkpoint" else (),
        orientation, known.get("resample_first", False),
    )  # fmt: skip
    if pool.entries:
        logger.info("images: %s", describe_images(pool, result))
    return result


def _measured_ct(pool: DatasetPool, found: Fingerprint) -> dict[str, float]:
    if "CT" not in found.intensity:
        raise PoolError(
            f"{pool.source}: no CT case has a labelled voxel, so there is nothing to normalize CT by; check the labels, "
            "or give --ct_normalization \"{'lower': ..., 'upper': ..., 'mean': ..., 'sd': ...}\""
        )
    return {key: found.intensity["CT"][key] for key in ("lower", "upper", "mean", "sd")}


def describe_images(pool: DatasetPool, preparation: Preparation) -> str:
    """Cases of each modality, and how they are normalized, in words for a terminal."""
    shown = []
    for modality, cases in Counter(item["modality"] for item in pool.cases).items():
        rules = channel_rules(preparation, modality, preparation.in_channels)
        words = [_rule_in_words(rule, " HU" if modality == "CT" else "") for rule in rules]
        words = words[:1] if len(set(words)) == 1 else [f"channel {i}: {rule}" for i, rule in enumerate(words)]
        channels = f" of {preparation.in_channels} channels" if preparation.in_channels > 1 else ""
        shown.append(f"{counted(cases, f'{modality} case')}{channels}, {', '.join(words)}")
    return "; ".join(shown)


def _rule_in_words(rule: Mapping[str, Any], unit: str) -> str:
    """A rule of `Preparation.channels`."""
    if rule["scheme"] == "ct":
        lower, upper, mean, sd = (f"{rule[key]:.4g}" for key in ("lower", "upper", "mean", "sd"))
        return f"clipped to {lower} to {upper}{unit}, less {mean}, divided by {sd}"
    masked = ", of its nonzero part" * bool(rule.get("masked"))
    words = {"zscore": f"z-score of each case and channel{masked}", "01": "scaled to 0 to 1", "rgb": "divided by 255"}
    return words.get(rule["scheme"], "as they are")


def downstream_network(
    pool: DatasetPool,
    patch_size: Sequence[int],
    in_channels: int,
    pretrained: str | None,
    plan: Plan | None = None,
    click_sigma: float | None = None,
    **overrides: Any,
) -> DescribedNetwork:
    """The network of a downstream task: the plan's, or the pretrained one with the task's channels, targets and patch.

    To `pretrained` weights the `plan` gives strides and kernels; the weights themselves are for :func:`take_over`.
    Without them the network is the plan's, else what `overrides` name. With `click_sigma` (voxels) it has two more channels,
    for clicks.
    """
    in_channels += CLICK_CHANNELS if click_sigma else 0
    shape = {"in_channels": in_channels, "out_channels": len(pool.table.names), "img_size": list(patch_size)}
    if pretrained is None:
        network = create_network(**shape, plan=plan, **overrides)
    else:
        if plan is not None and plan.strides:
            shape |= {"strides": plan.to_dict()["strides"], "kernel_sizes": plan.kernels_if_any_is_flat()}
        network = build_network(pretrained_description(pretrained), **shape | overrides)
    network.description = {"network": network.description["network"], "targets": pool.table.to_dict()["targets"]}
    if click_sigma:
        network.description["click_sigma"] = float(click_sigma)
    return network


def take_over(
    network: DescribedNetwork,
    pool: DatasetPool,
    pretrained: str | None,
    preparation: Preparation | None = None,
    output_dir: str | None = None,
) -> DescribedNetwork:
    """`network` with `pretrained` weights, whose channels, targets, patch or strides may differ; None leaves it as it is.

    The report of what was taken over goes to ``transfer_report.json`` in `output_dir`, when a run begins there; names of tensors
    with values that start anew are in ``network.fresh``, for :func:`tsfm.planning.parts.freeze`.

    Raises:
        CheckpointError: as `load_pretrained`.
        OSError: an `output_dir` that cannot be written.
    """
    check_described(network)
    if pretrained is None:
        network.fresh = {name for name, _ in network.named_parameters()}
        return network
    if output_dir:
        check_writable(output_dir, "--output_dir")
    report = os.path.join(output_dir, "transfer_report.json") if output_dir else None
    if report and pool.entries and any(os.path.exists(os.path.join(output_dir, name)) for name in ("last.pt", "last")):
        report = None  # of the run that is there, which this one continues, or is not let into
    task = {"modalities": sorted({item["modality"] for item in pool.cases})} if pool.entries else {}
    if preparation is not None:
        task["preparation"] = preparation.to_dict()
    entries = load_pretrained(network, str(pretrained), report_path=report, task=task).entries
    network.fresh = {entry.name for entry in entries if entry.new}
    description = pretrained_description(pretrained)
    same = {name for data, entry in pool.entries.items() for name in (data, *entry.get("origin", ()))}
    if (again := sorted(same & set(description.get("trained_on", ())))) and rank() == 0:
        logger.warning(
            "the weights in %s were trained on %s, too: cases that this run holds out may be among those that they saw (are "
            "they another fold's, or another data set's?), and its validation too good", pretrained, ", ".join(again),
        )  # fmt: skip
    network.description["licences"] = inherited_licences(description)
    goes_on(network, description)
    return network


def prepare(
    store: CaseStore, items: Sequence[Mapping[str, Any]], num_workers: int = 0, pool: DatasetPool | None = None
) -> None:
    """Prepare all `items` before the long work starts; of several processes the first does it, the others wait.

    The store keeps what it knows of the files of the `pool`, and needs them no more (`raw_data` False).

    Raises:
        StoreError, CaseError: listing every case that cannot be used.
    """
    with first_process_first("prepares the cases"):
        if pool is not None and not is_bare(items):
            record_sources(store.sources, pool)
        store.prepare(items, num_workers=num_workers, progress=rank() == 0).raise_failures()


def record_sources(sources: Sources, pool: DatasetPool) -> None:
    """Let the first process keep what is known of the files behind a pool's cases."""
    if rank() == 0 and pool.entries:
        sources.record(pool.cases, pool.table.to_dict()["targets"], pool.entries)


def pool_fingerprint(pool: DatasetPool, store_dir: str, num_workers: int = 0, orientation: str = "SPL") -> Fingerprint:
    """The pool's fingerprint; what was measured of these very files before, by their bytes, is kept in `store_dir`.

    Its axes are those of the `orientation` of a `Preparation`.

    Raises:
        PoolError: listing every case that cannot be used; the others need not be measured again.
    """
    with first_process_first("takes the fingerprint of the data"):
        return _read_or_measure(pool, store_dir, num_workers, orientation)


def _read_or_measure(pool: DatasetPool, store_dir: str, num_workers: int, orientation: str) -> Fingerprint:
    sources = Sources(store_dir, raw_data=pool.kept_in is None)
    sources.look_at(pool.cases)
    try:
        turned = orientation != "SPL"
        facts = [*([item["modality"], sources.identity(item)] for item in pool.cases), *[orientation] * turned]
        path = os.path.join(store_dir, FOLDER, f"pool-{_pool_key(pool, FINGERPRINT_FORMAT, facts)}.json")
        kept = path if os.path.isfile(path) else None if turned else _of_earlier_version(pool, store_dir)
    except CaseError:  # a file that is gone: listed below
        path = kept = None
    if kept:
        try:
            return Fingerprint(**read_json(kept), failed=[])
        except (FileError, TypeError) as error:
            logger.warning("the kept fingerprint %s is damaged (%s): it is measured again", kept, error)
    read_as = Preparation((1.0, 1.0, 1.0), in_channels=count_channels(pool), orientation=orientation)
    try:
        found = fingerprint(pool.cases, pool.table, read_as, num_workers, progress=rank() == 0, sources=sources)
    except OSError:
        check_writable(store_dir, "--store_dir")
        raise
    record_sources(sources, pool)
    if found.failed:
        listed = "\n".join(f"  {message}" for _, message in found.failed)
        raise PoolError(
            f'{len(found.failed)} of {len(pool.cases)} cases cannot be used; mend or "exclude" them:\n{listed}'
        )
    try:
        write_json(path, {key: value for key, value in asdict(found).items() if key != "failed"})
    except OSError as error:  # a store that others may only read serves all the same
        logger.warning("the fingerprint is not kept: %s", error)
    return found


def _pool_key(pool: DatasetPool, version: int, files: Sequence[Any]) -> str:
    key = json.dumps([version, files, pool.table.to_dict()["datasets"]], sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _of_earlier_version(pool: DatasetPool, store_dir: str) -> str | None:
    """Where an earlier version kept the fingerprint, by path and time of the files."""
    if pool.kept_in is not None or not glob.glob(os.path.join(glob.escape(store_dir), "fingerprint-*.json")):
        return None
    files = [[item["modality"], file_identity(item)] for item in pool.cases]
    path = os.path.join(store_dir, f"fingerprint-{_pool_key(pool, 2, files)}.json")
    if os.path.isfile(path):
        return path
    logger.warning("the fingerprints that an earlier version kept in %s are of other files or places", store_dir)
    return None
