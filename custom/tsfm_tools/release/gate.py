"""The Model Zoo's gate: everything its CI asks of a bundle that can run without its servers and GPUs, in one command.

    python -m tsfm gate --bundle_dir bundles/tsfm_pretrain      # prints a table, exits with 1 if a check fails

A bundle without ``models/model.pt`` (a source bundle) is checked for all that needs no weights. A staged bundle is
checked in a process of its own that imports the package vendored in it, not the one installed here. The schema
(2024-07-25) ships with the package, so nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import glob
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import tsfm
from tsfm.cases.cases import Preparation
from tsfm.labels import LABEL_MAP, LabelTable
from tsfm.network.tsfm_net import TSFM
from tsfm.training.checkpoint import describe_network, load_weights, read_state, save_weights, table_of

import tsfm_tools

from ..phantoms.layouts import write_all_ten, write_pool
from .export import TOLERANCE, relative_difference
from .release import LARGE_FILE_BYTES, ReleaseError, check_name, check_version, check_weights, list_files

SCHEMA = os.path.join(os.path.dirname(__file__), "meta_schema_20240725.json")

REQUIRED = ("configs/metadata.json", "configs/inference.json", "LICENSE")

PREFERRED = (
    *("configs/train.json", "configs/evaluate.json", "configs/multi_gpu_train.json", "configs/logging.conf"),
    *("docs/README.md", "docs/data_license.txt"),
)

PARTS = {"LICENSE", "configs", "docs", "models", "tsfm", "large_files.yml"}

README_HEADINGS = (  # of the zoo's template and of the bundles in it
    *("Model Overview", "Data", "Preprocessing", "Training Configuration", "Input", "Output", "Performance"),
    *("MONAI Bundle Commands", "System Configuration", "Limitations", "References", "License"),
)

PACKAGE_VERSIONS = ("monai_version", "pytorch_version", "numpy_version")

NOT_RUN = {
    "TensorRT export": "needs a GPU and torch_tensorrt",
    "multi-GPU unit tests": "needs two GPUs; the DDP overlay is tested with two CPU processes",
    "the zoo's import path": "it checks bundles from its repository's root: PYTHONPATH has to name the bundle's folder",
    "version not released before": "the zoo compares with its own model_info.json",
}

TINY = (16, 24, 24)  # voxels of the phantoms that the workflows are given

TOY_NETWORK = {
    **{"features": [4, 8], "depths_down": [1, 1], "depths_up": [1], "strides": [[2, 2, 2]]},
    **{"hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 16},
}


@dataclass(frozen=True)
class Check:
    """One row of the gate's table: ``result`` is ``pass``, ``FAIL``, ``skipped`` or ``not run``."""

    name: str
    result: str
    detail: str = ""


class Failed(Exception):
    """Raised by a check that found the bundle wanting, with what to change."""


class Skipped(Exception):
    """Raised by a check that this bundle gives no ground for."""


def gate(bundle_dir: str) -> list[Check]:
    """Run every check on a bundle folder, with the package that lies in it if it has one.

    Raises:
        FileNotFoundError: no such folder.
    """
    bundle_dir = os.path.abspath(bundle_dir)
    if not os.path.isdir(bundle_dir):
        raise FileNotFoundError(f"bundle folder {bundle_dir} does not exist")
    vendored = os.path.join(bundle_dir, "tsfm")
    if not os.path.isdir(vendored) or os.path.samefile(vendored, os.path.dirname(tsfm.__file__)):
        return run_checks(bundle_dir)
    with tempfile.TemporaryDirectory() as folder:
        report = os.path.join(folder, "gate.json")
        # The bundle's own copy of tsfm comes first; this module's folder brings tsfm_tools.
        path = os.pathsep.join([bundle_dir, os.path.dirname(os.path.dirname(tsfm_tools.__file__))])
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "tsfm_tools.release.gate", bundle_dir, report]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if not os.path.isfile(report):
            return [Check("vendored package", "FAIL", done.stderr.strip()[-400:])]
        with open(report, encoding="utf-8") as file:
            return [Check(**row) for row in json.load(file)]


def run_checks(bundle_dir: str, names: Sequence[str] | None = None) -> list[Check]:
    """Run the named checks (all of them by default) in this process; one that fails does not stop the others."""
    rows = []
    for name, check in CHECKS.items():
        if names is not None and name not in names:
            continue
        try:
            with _quiet():
                rows.append(Check(name, "pass", check(bundle_dir) or ""))
        except Skipped as reason:
            rows.append(Check(name, "skipped", str(reason)))
        except (Failed, ReleaseError) as error:
            rows.append(Check(name, "FAIL", str(error)))
        except Exception as error:
            rows.append(Check(name, "FAIL", _reason(error)))
    return rows + [Check(name, "not run", reason) for name, reason in NOT_RUN.items()]


def format_table(rows: list[Check]) -> str:
    """The rows as aligned text, the failures named again at the end."""
    width = max(len(row.name) for row in rows)
    lines = [f"{row.name:<{width}}  {row.result:<8}  {row.detail}" for row in rows]
    failed = [row.name for row in rows if row.result == "FAIL"]
    lines.append(f"{len(failed)} of {len(rows)} checks failed: {', '.join(failed)}" if failed else "the gate is open")
    return "\n".join(lines)


def _name(bundle: str) -> str:
    check_name(os.path.basename(bundle))
    return os.path.basename(bundle)


def _files(bundle: str) -> str:
    missing = [file for file in REQUIRED if not os.path.isfile(os.path.join(bundle, file))]
    _need(not missing, f"missing {missing}")
    if not _has_weights(bundle):
        return f"{len(REQUIRED)} files; no models/model.pt: a source bundle"
    return f"{len(REQUIRED)} files and models/model.pt"


def _preferred(bundle: str) -> str:
    missing = [file for file in PREFERRED if not os.path.isfile(os.path.join(bundle, file))]
    _need(not missing, f"missing {missing}")
    return f"{len(PREFERRED)} files"


def _clean(bundle: str) -> str:
    files = list_files(bundle)
    if not os.path.isdir(os.path.join(bundle, "tsfm")):
        raise Skipped("the source bundle holds no package; `python -m tsfm release` adds it")
    litter = [file for file in files if "__pycache__" in file or file.endswith(".pyc") or "/." in f"/{file}"]
    links = [file for file in files if os.path.islink(os.path.join(bundle, file))]
    strange = sorted({file.split("/")[0] for file in files} - PARTS)
    _need(not strange, f"{strange} are no parts of a bundle: runs, images and results do not belong into a release")
    _need(not litter and not links, f"caches, hidden files or links: {(litter + links)[:5]}")
    home = os.path.join(os.path.expanduser("~"), "")
    leaks = [file for file in files if _holds(os.path.join(bundle, file), home if len(home) > 2 else None)]
    _need(not leaks, f"files name this machine's home folder {home}: {leaks[:5]}")
    return f"{len(files)} files, no caches, links or paths of this machine"


def _large_files(bundle: str) -> str:
    large = [f for f in list_files(bundle) if os.path.getsize(os.path.join(bundle, f)) > LARGE_FILE_BYTES]
    listing = os.path.join(bundle, "large_files.yml")
    named = ""
    if os.path.isfile(listing):
        with open(listing, encoding="utf-8") as file:
            named = file.read()
    missing = [file for file in large if file not in named]
    _need(not missing, f"over 25 MB and not in large_files.yml: {missing}")
    return f"{len(large)} files over 25 MB"


def _json_style(bundle: str) -> str:
    wrong = []
    files = sorted(glob.glob(os.path.join(bundle, "configs", "*.json")))
    for path in files:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        content = json.loads(text)
        if text.rstrip("\n") not in (json.dumps(content, indent=4), json.dumps(content, indent=4, ensure_ascii=False)):
            wrong.append(os.path.basename(path))
    _need(not wrong, f"not indented by 4 as json.dumps does: {wrong}")
    return f"{len(files)} files"


def _schema(bundle: str) -> str:
    from monai.bundle import verify_metadata

    verify_metadata(meta_file=_config(bundle, "metadata.json"), filepath=SCHEMA)  # an existing file is not downloaded
    return "meta_schema_20240725.json"


def _changelog(bundle: str) -> str:
    metadata = _metadata(bundle)
    check_version(metadata)
    return f"version {metadata['version']}, {len(metadata['changelog'])} entries"


def _versions(bundle: str) -> str:
    metadata = _metadata(bundle)
    empty = [key for key in PACKAGE_VERSIONS if not metadata.get(key)]
    _need(not empty, f"metadata.json says nothing about {empty}")
    _need(metadata.get("required_packages_version"), "metadata.json: required_packages_version is empty")
    return ", ".join(f"{key.removesuffix('_version')} {metadata[key]}" for key in PACKAGE_VERSIONS)


def _license(bundle: str) -> str:
    with open(os.path.join(bundle, "LICENSE"), encoding="utf-8") as file:
        text = file.read()
    _need("Apache License" in text and "Version 2.0" in text, "LICENSE is not the Apache License 2.0")
    return "Apache-2.0"


def _data_license(bundle: str) -> str:
    with open(os.path.join(bundle, "docs", "data_license.txt"), encoding="utf-8") as file:
        text = file.read().lower()
    _need(text.strip(), "docs/data_license.txt is empty")
    pool = _config(bundle, "pool.json")
    names = []
    if _has_weights(bundle):
        trained_on = read_state(os.path.join(bundle, "models", "model.pt"))[1].get("trained_on", [])
        names = [name for name in trained_on if name != LABEL_MAP]  # label maps from a server name no data set
    elif os.path.isfile(pool):
        with open(pool, encoding="utf-8") as file:
            names = [entry["name"] for entry in json.load(file)["datasets"]]
    missing = [name for name in names if name.lower() not in text]
    _need(not missing, f"docs/data_license.txt does not name the data sets {missing} (release: --data_license)")
    return f"{len(names)} data sets named"


def _readme(bundle: str) -> str:
    with open(os.path.join(bundle, "docs", "README.md"), encoding="utf-8") as file:
        headings = [line.lstrip("#").strip(" *:\n").lower() for line in file if line.startswith("#")]
    missing = [heading for heading in README_HEADINGS if heading.lower() not in headings]
    _need(not missing, f"docs/README.md has no heading {missing}")
    return f"{len(README_HEADINGS)} headings of the zoo's template"


def _properties(kind: str) -> Callable[[str], str]:
    def check(bundle: str) -> str:
        from monai.bundle import ConfigWorkflow

        files = ["inference.json"] if kind == "infer" else ["train.json"]
        if kind == "train" and not _has_weights(bundle) and os.path.isfile(_config(bundle, "small.json")):
            files.append("small.json")  # properties are built to be checked: a source bundle's are of full size
        with tempfile.TemporaryDirectory() as folder:
            workflow = ConfigWorkflow(
                config_file=[_config(bundle, file) for file in files],
                meta_file=_config(bundle, "metadata.json"),
                workflow_type=kind,
                logging_file=False,
                bundle_root=bundle,
                **(_train_inputs(bundle, folder) if kind == "train" else _infer_inputs(bundle, folder)),
            )
            workflow.initialize()
            wrong = workflow.check_properties()
        _need(not wrong, f"{' + '.join(files)}: missing or wrong properties {wrong}")
        return f"{' + '.join(files)}: check_properties() == []"

    return check


def _infer_inputs(bundle: str, folder: str) -> dict[str, Any]:
    """Overrides that give inference.json an image to find and, for a source bundle, weights."""
    images = os.path.join(folder, "data")
    write_pool(images, 1, TINY, datasets=("msd_lung",))
    inputs = {"dataset_dir": os.path.join(images, "Task06_Lung", "imagesTr"), "output_dir": os.path.join(folder, "out")}
    return inputs if _has_weights(bundle) else {**inputs, "checkpoint": _toy_weights(bundle, folder)}


def _train_inputs(bundle: str, folder: str) -> dict[str, Any]:
    """Overrides that give train.json data: phantoms in its layout, or bare items as a MONAI Label server hands over."""
    data = os.path.join(folder, "data")
    inputs: dict[str, Any] = {key: os.path.join(folder, key) for key in ("store_dir", "output_dir", "ckpt_dir")}
    inputs["num_workers"] = 0
    if _has_weights(bundle):
        write_pool(data, 2, TINY, datasets=("msd_lung",))
        task = os.path.join(data, "Task06_Lung")
        images = sorted(glob.glob(os.path.join(task, "imagesTr", "*.nii.gz")))
        items = [{"image": image, "label": image.replace("imagesTr", "labelsTr")} for image in images]
        return {
            **inputs,
            "train#dataset#data": items[:1],
            "validate#dataset#data": items[1:],
            "ckpt_dir": bundle + "/models",
        }
    if os.path.isfile(_config(bundle, "pool.json")):
        write_all_ten(data, 2, TINY)
        return {**inputs, "dataset_dir": data}
    write_pool(data, 2, TINY, datasets=("msd_liver",))
    return {**inputs, "dataset_dir": os.path.join(data, "Task03_Liver"), "pretrained": _toy_weights(bundle, folder)}


def _toy_weights(bundle: str, folder: str) -> str:
    """Weights of a network of a few thousand parameters with the targets that the bundle's metadata names."""
    data = _metadata(bundle)["network_data_format"]
    names = [name for value, name in data["outputs"]["pred"]["channel_def"].items() if value != "0"]
    channels, patch = data["inputs"]["image"]["num_channels"], [16, 16, 16]
    table = LabelTable({name: {} for name in names}, [])
    network = TSFM(channels, len(names), **TOY_NETWORK, img_size=patch)
    ct = {"CT": {"lower": -1000.0, "upper": 1000.0, "mean": 0.0, "sd": 300.0}}
    describe_network(network, table, Preparation((8.0, 8.0, 8.0), ct, channels), patch)
    path = os.path.join(folder, "toy.pt")
    save_weights(network, path)
    return path


def _shape(bundle: str) -> str:
    from monai.bundle import verify_net_in_out

    _need_weights(bundle)
    inputs = _metadata(bundle)["network_data_format"]["inputs"]["image"]
    arguments = {"config_file": _config(bundle, "inference.json"), "meta_file": _config(bundle, "metadata.json")}
    verify_net_in_out(net_id="network_def", device="cpu", bundle_root=bundle, **arguments)
    return f"one forward pass of {inputs['num_channels']} x {inputs['spatial_shape']}"


def _weights(bundle: str) -> str:
    _need_weights(bundle)
    shortest = min((os.path.basename(f) for f in glob.glob(os.path.join(bundle, "models", "*.pt"))), key=len)
    _need(shortest == "model.pt", f"models/{shortest} has a shorter name than model.pt: MONAI Label would take it")
    found = check_weights(bundle)
    return f"{found['tensors']} tensors, {found['parameters']:,} parameters, both files"


def _channel_def(bundle: str) -> str:
    data = _metadata(bundle)["network_data_format"]
    _need(next(iter(data["inputs"])) == "image" and next(iter(data["outputs"])) == "pred", "first entries: image, pred")
    names = data["outputs"]["pred"]["channel_def"]
    _need(list(names) == [str(i) for i in range(len(names))], f"values {list(names)} have holes; expected 0..N")
    _need(names["0"] == "background", f"value 0 is {names['0']!r}; expected background")
    _need(all(name == name.lower() for name in names.values()), "names have to be lower-case")
    if _has_weights(bundle):
        _, description = read_state(os.path.join(bundle, "models", "model.pt"))
        _need(names == table_of(description).channel_def(), "channel_def differs from the targets of the weights")
    return f"{len(names) - 1} targets"


def _label_maps(bundle: str) -> str:
    """What a MONAI Label server hands back for training are label maps 1..N; train.json has to read them as such."""
    from monai.bundle import ConfigParser

    _need_weights(bundle)
    parser = ConfigParser()
    parser.read_config(_config(bundle, "train.json"))
    parser["bundle_root"] = bundle
    table = parser.get_parsed_content("table")
    values = np.arange(len(table.names) + 1)
    rows = {}
    for dataset in (table.bare_dataset, LABEL_MAP):
        try:
            rows[dataset] = table.targets[table.offset(dataset) + table.encode(dataset, values).astype(int)]
        except ValueError as error:
            raise Failed(f"bare items are read as '{dataset}': {error}") from None
    _need(
        np.array_equal(rows[table.bare_dataset], rows[LABEL_MAP]),
        f"bare items are read with the raw ids of '{table.bare_dataset}', which are not 1..N: MONAI Label would train on "
        "wrong labels. Release these weights with the fine-tuning bundle, which reads label maps.",
    )
    return f"bare items are read as '{table.bare_dataset}', 1..{len(table.names)}"


def _export(bundle: str) -> str:
    from monai.bundle import ConfigParser, ckpt_export

    _need_weights(bundle)
    spec = _metadata(bundle)["network_data_format"]["inputs"]["image"]
    shape = [1, spec["num_channels"], *spec["spatial_shape"]]
    weights = os.path.join(bundle, "models", "model.pt")
    arguments = {"config_file": _config(bundle, "inference.json"), "meta_file": _config(bundle, "metadata.json")}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.ts")
        way, remark = "scripted", ""
        try:
            ckpt_export("network_def", filepath=path, ckpt_file=weights, bundle_root=bundle, **arguments)
        except Exception:
            way, remark = "traced", "; the zoo scripts unless the bundle is in its exclude_verify_torchscript_list"
            extra = {"use_trace": True, "input_shape": shape}
            ckpt_export("network_def", filepath=path, ckpt_file=weights, bundle_root=bundle, **arguments, **extra)
        exported = torch.jit.load(path).eval()
    parser = ConfigParser()
    parser.read_config(arguments["config_file"])
    parser["bundle_root"] = bundle
    network = parser.get_parsed_content("network_def").eval()
    load_weights(network, weights)
    with torch.no_grad():
        difference = relative_difference(network, exported, tuple(shape))
    _need(difference <= TOLERANCE, f"{way} network differs by {difference:.2g} of the largest logit; {TOLERANCE:g} may")
    return f"TorchScript, {way}; outputs differ by at most {difference:.1g} of the largest logit{remark}"


CHECKS: dict[str, Callable[[str], str]] = {
    "bundle name": _name,
    "required files": _files,
    "preferred files": _preferred,
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
    "label maps back (MONAI Label)": _label_maps,
    "train properties": _properties("train"),
    "inference properties": _properties("infer"),
    "weights fit network_def": _weights,
    "verify_net_in_out": _shape,
    "ckpt_export": _export,
}


def _reason(error: BaseException) -> str:
    """What went wrong, and what that came from: MONAI wraps the cause of a component that cannot be built."""
    while error.__cause__ is not None:
        error = error.__cause__
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{text[:400]} ({os.path.basename(last.filename)}, line {last.lineno})"


def _need(condition: Any, message: str) -> None:
    if not condition:
        raise Failed(message)


def _has_weights(bundle: str) -> bool:
    return os.path.isfile(os.path.join(bundle, "models", "model.pt"))


def _need_weights(bundle: str) -> None:
    if not _has_weights(bundle):
        raise Skipped("a source bundle has no weights")


def _config(bundle: str, file: str) -> str:
    return os.path.join(bundle, "configs", file)


def _metadata(bundle: str) -> dict[str, Any]:
    with open(_config(bundle, "metadata.json"), encoding="utf-8") as file:
        return json.load(file)


def _holds(path: str, text: str | None) -> bool:
    """Does a file hold `text`? Read in overlapping pieces, so that weights of any size can be searched."""
    if text is None:
        return False
    needle, tail = text.encode(), b""
    with open(path, "rb") as file:
        while block := file.read(2**22):
            if needle in tail + block:
                return True
            tail = block[-len(needle) :]
    return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """MONAI's bundle functions print their arguments and warn at length; the table says what matters."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


if __name__ == "__main__":
    with open(sys.argv[2], "w", encoding="utf-8") as report_file:
        json.dump([asdict(row) for row in run_checks(sys.argv[1])], report_file)
