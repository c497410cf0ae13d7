"""``python -m tsfm audit``: measure every case, look for what is suspicious, write a page and a JSON file."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tqdm import tqdm
from tsfm.cases.folders import PoolError
from tsfm.cases.licences import weights_terms
from tsfm.cases.pool import DatasetPool
from tsfm.errors import CaseError
from tsfm.files import check_writable, write_json, write_text
from tsfm.labels import LabelTable
from tsfm.planning.own_data import dataset_pool
from tsfm.preparation.parallel import WorkerDied, run_all
from tsfm.schema import read_json

from .checks import check_dataset
from .findings import SEVERITIES, Finding
from .measures import measured
from .overlaps import Source, check_overlaps, declared_licences
from .page import EXPLAINED, counts, page
from .pictures import picture

logger = logging.getLogger(__name__)


def audit(
    dataset_dir: str,
    output_dir: str,
    pool_file: str | None = None,
    datasets: Sequence[str] | None = None,
    downstream: Any = None,
    pictures: int = 12,
    num_workers: int = 0,
    progress: bool = True,
) -> None:
    """Look for what would spoil a training or its scores: duplicates, leaks, odd labels, units, headers, licences.

    Args:
        dataset_dir: folder that holds the data sets' folders.
        output_dir: for audit.html, audit.json and what is kept for the next audit.
        pool_file: the pool file; without it every folder in `dataset_dir` with a dataset.json is a data set.
        datasets: only these of the pool file.
        downstream: what the weights will be scored on: folders with a dataset.json, or pool files and bundle overlays
            with their folders: "{'bundles/tsfm_finetune/configs/kits2019.json': '/data/kits19/data'}".
        pictures: at most so many of each kind of finding.
        num_workers: processes that measure cases.
        progress: whether to show bars.
    """
    check_writable(output_dir, "--output_dir")
    sources, left_out = find_sources(dataset_dir, pool_file, datasets, downstream)
    cache_dir = os.path.join(output_dir, "cache")
    os.makedirs(cache_dir, exist_ok=True)
    cases = [
        (item, source.pool.table) for source in sources for items in source.pool.scan[0].values() for item in items
    ]
    records, findings = measure_all(cases, cache_dir, num_workers, progress)
    for source in sources:
        for name, reason in source.pool.scan[1].items():
            findings.append(Finding("cannot be read", "note", f"not there: {reason}", name))
    for name in dict.fromkeys(record["dataset"] for record in records):
        table = next(table for item, table in cases if item["dataset"] == name)
        findings += check_dataset([record for record in records if record["dataset"] == name], table)
    findings += check_overlaps(records, sources)
    kinds = list(EXPLAINED)
    findings.sort(key=lambda one: (SEVERITIES.index(one.severity), kinds.index(one.kind)))
    drawn = _draw(findings, cases, records, cache_dir, pictures, progress)
    facts = _facts(sources, cases, records, left_out, drawn)
    content = {**facts, "findings": [asdict(one) for one in findings]}
    write_json(os.path.join(output_dir, "audit.json"), content, ensure_ascii=False)
    write_text(os.path.join(output_dir, "audit.html"), page("Audit of a pool", facts, findings, drawn))
    print(_summary(findings))
    print(f"{len(records)} of {len(cases)} cases measured: {os.path.join(output_dir, 'audit.html')}, audit.json")


def find_sources(
    dataset_dir: str, pool_file: str | None, datasets: Sequence[str] | None, downstream: Any
) -> tuple[list[Source], list[str]]:
    """(the pools to look at, folders in `dataset_dir` that are none); what is `downstream` is not trained on, too.

    Raises:
        PoolError: no folder, no data set at all; two data sets of one name.
    """
    if not os.path.isdir(dataset_dir):
        raise PoolError(
            f"--dataset_dir {os.path.abspath(dataset_dir)} is no folder; give the one that holds the data sets"
        )
    if datasets and pool_file is None:
        raise PoolError("--datasets names data sets of a pool file, and none is given (--pool_file)")
    if not isinstance(downstream, Mapping):
        downstream = dict.fromkeys([downstream] if isinstance(downstream, str) else downstream or ())
    left_out: list[str] = []
    if pool_file is not None:
        pools = [DatasetPool(pool_file, dataset_dir, datasets, allow_missing=True)]
    elif os.path.isfile(os.path.join(dataset_dir, "dataset.json")):
        pools = [dataset_pool(dataset_dir)]
    else:
        scored = {os.path.realpath(path if folder is None else folder) for path, folder in downstream.items()}
        folders = [one.path for one in sorted(os.scandir(dataset_dir), key=lambda one: one.name) if one.is_dir()]
        folders = [folder for folder in folders if os.path.realpath(folder) not in scored]
        is_set = {folder: os.path.isfile(os.path.join(folder, "dataset.json")) for folder in folders}
        pools = [dataset_pool(folder) for folder in folders if is_set[folder]]
        left_out = [os.path.basename(folder) for folder in folders if not is_set[folder]]
    sources = [Source(pool) for pool in pools]
    sources += [Source(_scored_pool(path, folder), downstream=True) for path, folder in downstream.items()]
    names = Counter(name for source in sources for name in source.pool.chosen)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise PoolError(f"the data sets {twice} are there twice; give one of each another name, or leave it out")
    if not sources:
        raise PoolError(
            f"{dataset_dir} holds no folder with a dataset.json; give --pool_file, or point --dataset_dir at one"
        )
    return sources, left_out


def _scored_pool(path: str, folder: str | None) -> DatasetPool:
    """What `downstream` of `audit` names: a folder, or a pool file or overlay of the fine-tuning bundle with its folder."""
    if folder is None:
        return dataset_pool(path)
    content = read_json(path)
    return DatasetPool(content.get("pool_file", content), folder, allow_missing=True, source=path)


def measure_all(
    cases: Sequence[tuple[Mapping[str, Any], LabelTable]], cache_dir: str, num_workers: int = 0, progress: bool = True
) -> tuple[list[dict[str, Any]], list[Finding]]:
    """(records of the cases that can be read, in order; findings on those that cannot)."""
    tables = {item["dataset"]: _table_of(table, item["dataset"]) for item, table in cases}
    jobs = [(item, tables[item["dataset"]], cache_dir) for item, _ in cases]
    found, failed = {}, []
    with tqdm(total=len(jobs), desc="measuring", disable=not progress) as bar:
        for index, outcome in run_all(measured, jobs, num_workers):
            bar.update()
            item = cases[index][0]
            if isinstance(outcome, (CaseError, WorkerDied, ValueError)):
                key = (item["dataset"], item["case"])
                failed.append(Finding("cannot be read", "error", str(outcome), item["dataset"], [key]))
            else:
                found[index] = outcome
    return [found[index] for index in sorted(found)], failed


def _table_of(table: LabelTable, dataset: str) -> dict[str, Any]:
    """The part of a table that one data set needs, so that others come and go without its cases being measured again."""
    declared, needed = table.to_dict(), set(table.annotated(dataset))
    for name in table.annotated(dataset):
        needed |= {table.names[index] for index in table.ancestors(table.names.index(name))}
    entry = [entry for entry in declared["datasets"] if entry["name"] == dataset]
    needed |= {name for names in entry[0]["labels"].values() for name in names}
    return {"targets": {name: one for name, one in declared["targets"].items() if name in needed}, "datasets": entry}


def _draw(findings, cases, records, cache_dir: str, most: int, progress: bool) -> dict[int, bytes]:
    """Index of a finding -> its picture, for the first `most` of each kind that are about readable cases."""
    keys = {(record["dataset"], record["case"]): record["key"] for record in records}
    known = {(item["dataset"], item["case"]): (item, table) for item, table in cases}
    drawable = [index for index, one in enumerate(findings) if one.cases and keys.keys() >= set(one.cases)]
    of_kind = {kind: [index for index in drawable if findings[index].kind == kind] for kind in EXPLAINED}
    chosen = [index for indices in of_kind.values() for index in indices[: max(most, 0)]]
    drawn = {}
    for index in tqdm(chosen, desc="drawing", disable=not progress):
        one = findings[index]
        drawn[index] = picture([(*known[key], keys[key]) for key in one.cases], one.place, cache_dir)
    return drawn


def _facts(
    sources: Sequence[Source], cases, records, left_out: Sequence[str], drawn: Mapping[int, bytes]
) -> dict[str, Any]:
    counts = Counter(item["dataset"] for item, _ in cases)
    facts = {"data sets": ", ".join(f"{name} ({count})" for name, count in counts.items())}
    scored = [name for source in sources if source.downstream for name in source.pool.chosen]
    pools = [source.pool for source in sources if not source.downstream]
    licences = {name: one for pool in pools for name, one in declared_licences(pool).items()}
    facts |= {"only scored on": ", ".join(scored)} if scored else {}
    facts |= {"folders left out (no dataset.json)": ", ".join(left_out)} if left_out else {}
    facts["measured"] = f"{len(records)} of {len(cases)} cases"
    facts["licences"] = ", ".join(f"{name} {one['name']}" for name, one in licences.items())
    facts["what weights inherit"] = weights_terms(licences)
    return facts


def _summary(findings: Sequence[Finding]) -> str:
    rows = {kind: numbers for kind, numbers in counts(findings).items() if any(numbers)}
    lines = [f"{'':<22}" + "".join(f"{severity + 's':>10}" for severity in SEVERITIES)]
    lines += [f"{kind:<22}" + "".join(f"{number or '':>10}" for number in numbers) for kind, numbers in rows.items()]
    return "\n".join(lines)
