"""Checks of what lies in a bundle's folder: files, metadata, licenses, texts. Each takes the folder and says what it saw."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from monai.bundle import verify_metadata
from tsfm.labels import LABEL_MAP
from tsfm.schema import read_json
from tsfm.training.checkpoint import read_state, table_of

from .release import PARTS, large_files, list_files
from .rules import check_name, check_version

SCHEMA = os.path.join(os.path.dirname(__file__), "meta_schema_20240725.json")

REQUIRED = ("configs/metadata.json", "configs/inference.json", "LICENSE")

PREFERRED = (
    *("configs/train.json", "configs/evaluate.json", "configs/multi_gpu_train.json", "configs/logging.conf"),
    *("docs/README.md", "docs/data_license.txt"),
)

README_HEADINGS = (  # of the zoo's template and of the bundles in it
    *("Model Overview", "Data", "Preprocessing", "Training Configuration", "Input", "Output", "Performance"),
    *("MONAI Bundle Commands", "System Configuration", "Limitations", "References", "License"),
)

PACKAGE_VERSIONS = ("monai_version", "pytorch_version", "numpy_version")


class Failed(Exception):
    """Raised by a check that found the bundle wanting, with what to change."""


class Skipped(Exception):
    """Raised by a check that this bundle gives no ground for."""


def need(condition: Any, message: str) -> None:
    if not condition:
        raise Failed(message)


def has_weights(bundle: str) -> bool:
    return os.path.isfile(os.path.join(bundle, "models", "model.pt"))


def need_weights(bundle: str) -> None:
    if not has_weights(bundle):
        raise Skipped("a source bundle has no weights")


def config_path(bundle: str, file: str) -> str:
    return os.path.join(bundle, "configs", file)


def metadata_of(bundle: str) -> dict[str, Any]:
    return read_json(config_path(bundle, "metadata.json"))


def description_of(bundle: str) -> dict[str, Any]:
    """What travels with a bundle's weights; empty where it has none."""
    return read_state(os.path.join(bundle, "models", "model.pt"))[1] if has_weights(bundle) else {}


def _name(bundle: str) -> str:
    check_name(os.path.basename(bundle), bool(description_of(bundle).get("click_sigma")))
    return os.path.basename(bundle)


def _files(bundle: str, files: Sequence[str] = REQUIRED) -> str:
    missing = [file for file in files if not os.path.isfile(os.path.join(bundle, file))]
    need(not missing, f"missing {missing}")
    weights = " and models/model.pt" if has_weights(bundle) else "; no models/model.pt: a source bundle"
    return f"{len(files)} files" + weights * (files is REQUIRED)


def _clean(bundle: str) -> str:
    files = list_files(bundle)
    if not os.path.isdir(os.path.join(bundle, "tsfm")):
        raise Skipped("the source bundle holds no package; `python -m tsfm release` adds it")
    litter = [file for file in files if "__pycache__" in file or file.endswith(".pyc") or "/." in f"/{file}"]
    links = [path.name for path in Path(bundle).rglob("*") if path.is_symlink()]
    strange = sorted({file.split("/")[0] for file in files} - PARTS)
    need(not strange, f"{strange} are no parts of a bundle: runs, images and results do not belong into a release")
    need(not litter and not links, f"caches, hidden files or links: {(litter + links)[:5]}")
    home = os.path.join(os.path.expanduser("~"), "")
    leaks = [file for file in files if len(home) > 2 and _holds(os.path.join(bundle, file), home)]
    need(not leaks, f"files name this machine's home folder {home}: {leaks[:5]}")
    return f"{len(files)} files, no caches, links or paths of this machine"


def _holds(path: str, text: str) -> bool:
    """Does a file, of any size, hold `text`?"""
    if os.path.getsize(path) == 0:  # which cannot be mapped
        return False
    with open(path, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        return content.find(text.encode()) >= 0


def _text(*path: str | Path) -> str:
    return Path(*path).read_text(encoding="utf-8")


def _large_files(bundle: str) -> str:
    large, listing = large_files(bundle), Path(bundle, "large_files.yml")
    named = _text(listing) if listing.is_file() else ""
    missing = [file for file in large if file not in named]
    need(not missing, f"over 25 MB and not in large_files.yml: {missing}")
    return f"{len(large)} files over 25 MB"


def _json_style(bundle: str) -> str:
    wrong = []
    files = sorted(Path(bundle, "configs").glob("*.json"))
    for path in files:
        text = _text(path)
        if text.rstrip("\n") not in (json.dumps(json.loads(text), indent=4, ensure_ascii=one) for one in (True, False)):
            wrong.append(path.name)
    need(not wrong, f"not indented by 4 as json.dumps does: {wrong}")
    return f"{len(files)} files"


def _schema(bundle: str) -> str:
    verify_metadata(meta_file=config_path(bundle, "metadata.json"), filepath=SCHEMA)  # which is there: no download
    return "meta_schema_20240725.json"


def _changelog(bundle: str) -> str:
    metadata = metadata_of(bundle)
    check_version(metadata)
    return f"version {metadata['version']}, {len(metadata['changelog'])} entries"


def _versions(bundle: str) -> str:
    metadata = metadata_of(bundle)
    empty = [key for key in PACKAGE_VERSIONS if not metadata.get(key)]
    need(not empty, f"metadata.json says nothing about {empty}")
    need(metadata.get("required_packages_version"), "metadata.json: required_packages_version is empty")
    return ", ".join(f"{key.removesuffix('_version')} {metadata[key]}" for key in PACKAGE_VERSIONS)


def _license(bundle: str) -> str:
    text = _text(bundle, "LICENSE")
    need("Apache License" in text and "Version 2.0" in text, "LICENSE is not the Apache License 2.0")
    return "Apache-2.0"


def _data_license(bundle: str) -> str:
    text = _text(bundle, "docs", "data_license.txt").lower()
    need(text.strip(), "docs/data_license.txt is empty")
    pool = config_path(bundle, "pool.json")
    names = []
    if has_weights(bundle):
        trained_on = description_of(bundle).get("trained_on", [])
        names = [name for name in trained_on if name != LABEL_MAP]  # label maps from a server name no data set
    elif os.path.isfile(pool):
        names = [entry["name"] for entry in read_json(pool)["datasets"]]
    missing = [name for name in names if name.lower() not in text]
    need(not missing, f"docs/data_license.txt does not name the data sets {missing} (release: --data_license)")
    return f"{len(names)} data sets named"


def _readme(bundle: str) -> str:
    lines = _text(bundle, "docs", "README.md").splitlines()
    headings = [line.lstrip("#").strip(" *:").lower() for line in lines if line.startswith("#")]
    missing = [heading for heading in README_HEADINGS if heading.lower() not in headings]
    need(not missing, f"docs/README.md has no heading {missing}")
    return f"{len(README_HEADINGS)} headings of the zoo's template"


def _channel_def(bundle: str) -> str:
    data = metadata_of(bundle)["network_data_format"]
    need(next(iter(data["inputs"])) == "image" and next(iter(data["outputs"])) == "pred", "first entries: image, pred")
    names = data["outputs"]["pred"]["channel_def"]
    need(list(names) == [str(i) for i in range(len(names))], f"values {list(names)} have holes; expected 0..N")
    need(names["0"] == "background", f"value 0 is {names['0']!r}; expected background")
    need(all(name == name.lower() for name in names.values()), "names have to be lower-case")
    if has_weights(bundle):
        need(
            names == table_of(description_of(bundle)).channel_def(),
            "channel_def differs from the targets of the weights",
        )
    return f"{len(names) - 1} targets"


FOLDER_CHECKS: dict[str, Callable[[str], str]] = {
    "bundle name": _name,
    "required files": _files,
    "preferred files": partial(_files, files=PREFERRED),
    "self-contained and clean": _clean,
    "large files": _large_files,
    "JSON style": _json_style,
    "metadata against the schema": _schema,
    "version and changelog": _changelog,
    "package versions": _versions,
    "license": _license,
    "data licenses": _data_license,
    "README template": _readme,
    "label map (channel_def)": _channel_def,
}
"""Name of each check -> the check, in the order of the table."""
