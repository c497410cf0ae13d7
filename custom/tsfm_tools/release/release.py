"""Turns a bundle and any checkpoint trained with it into a release: a folder that needs nothing else, and its zip.

`release` writes into `output_dir`:

* ``NAME/``: the bundle with the package and the MONAI Label app as real copies, the weights as ``models/model.pt`` (a
  plain state dict; on request ``model.safetensors`` too), and configs, metadata, README and data licenses that fit them;
* ``NAME_vX.Y.Z.zip``: the same folder, byte for byte the same whenever its content is; and its ``.sha256``;
* ``model_info.json``: the entry under which the Model Zoo lists it (SHA-1 and address), merged with what is there.

Weights over 25 MB are also named in ``NAME/large_files.yml``, which the Model Zoo wants beside the configs in its
repository and, like its own releases, not in the zip.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import tsfm
from tsfm.cases.licences import licence_list
from tsfm.files import atomic_write, locked, sweep, unfinished, write_json, write_text
from tsfm.schema import read_json
from tsfm.training.checkpoint import EXTRA_STATE, encode_description, read_state
from tsfm.training.weight_files import write_state

from .fitting import NOT_EVALUATED, dice_per_target, fill_configs, fill_metadata, merge_overlay
from .readme import licences_seen, performance, system_table, training_table, weights_table, write_readme
from .rules import ReleaseError, check_name, check_version, check_weights, named_for_clicks

LARGE_FILE_BYTES = 25 * 2**20

ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can name

WEIGHT_SUFFIXES = (".pt", ".safetensors", ".ts", ".onnx")

STAGED = ("LICENSE", "configs/*.json", "configs/*.conf", "docs/*")
"""What a release takes from a bundle's folder; weights and package come beside it, runs and their data never do."""

LEFT_OUT = "monailabel_train.json"
"""Among the configs: where MONAI Label notes a training on several GPUs, with the images' paths."""

PARTS = {"LICENSE", "configs", "docs", "label_app", "models", "tsfm", "large_files.yml"}
"""All that lies in a release's folder."""

RELEASED_WEIGHTS = ("model.pt", "model.safetensors")

PINS = ("requirements.txt", "requirements-label.txt")
"""Files of the repository's root that a reader of the zip needs too; staged in ``docs/``."""


def release(
    bundle_dir: str,
    checkpoint: str | Sequence[str],
    output_dir: str,
    name: str | None = None,
    version: str | None = None,
    changelog: str | None = None,
    base_url: str = "",
    metrics: str | None = None,
    metrics_of: str = "",
    trained_on: str | None = None,
    overlays: Sequence[str] = (),
    data_license: str | None = None,
    display_name: str | None = None,
    safetensors: bool = False,
    zipped: bool = True,
    inference: Mapping[str, Any] | None = None,
) -> str:
    """Stage a bundle around a checkpoint and zip it, with checksums and the Model Zoo's files.

    Args:
        bundle_dir: a bundle folder of this repository (``bundles/tsfm_finetune``).
        checkpoint: weights that a bundle trained (``model.pt``, a training checkpoint, safetensors), or a list of folds',
            which become one network whose logits are their mean.
        output_dir: created if needed; an older release of the same name in it is replaced; any other folder is refused, and
            one to which runs, results or weights were added.
        name: of the released bundle; the folder's name by default, with ``_deepedit`` for weights with click channels
            (MONAI Label's name for what takes clicks), whose training always uses ``clicks.json``.
        version: by default that of ``metadata.json``.
        changelog: what is new in `version`; needed where ``metadata.json`` says nothing about it.
        base_url: where the files will be downloadable; goes into ``large_files.yml`` and ``model_info.json``.
        metrics_of: a sentence for the README, where `metrics` are not of these weights as they are released.
        metrics: ``summary.json`` of an evaluation of these weights, for metadata and README; without it they say that the
            weights were not evaluated.
        trained_on: a sentence on what the weights were trained on and what they cannot do, for metadata and README.
        overlays: overlays of the bundle, or paths of others, that its training shall always use (``small.json`` for weights that were
            trained with it): they are merged into the staged ``train.json``, which is all that MONAI Label reads.
        data_license: text file that becomes ``docs/data_license.txt``: the license of every data set that these weights
            were trained on; by default the list that travels with them.
        display_name: of the bundle in the Model Zoo's browser; by default made of `name`.
        safetensors: write the weights as ``models/model.safetensors`` too.
        zipped: False stops at the folder.
        inference: ids of ``inference.json`` that this release sets otherwise (``{"postprocessing_plan": {...}}``).

    Returns:
        path of the zip, or of the folder.

    Raises:
        ReleaseError, CheckpointError: before anything is written.
    """
    tensors, description = read_state(checkpoint)
    takes_clicks = bool(description.get("click_sigma"))
    name = name or named_for_clicks(os.path.basename(os.path.abspath(bundle_dir)), takes_clicks)
    configs = _read_configs(bundle_dir)
    metadata = configs["metadata.json"]
    check_name(name, takes_clicks)
    if "targets" not in description:
        raise ReleaseError(
            f"{checkpoint}: the weights carry no description (targets, spacing, network), so no bundle can be fitted "
            "to them; release a checkpoint that was trained with these bundles"
        )
    metadata["version"] = version or metadata.get("version", "")
    if changelog:
        earlier = {key: text for key, text in metadata.get("changelog", {}).items() if key != metadata["version"]}
        metadata["changelog"] = {metadata["version"]: changelog, **earlier}
    check_version(metadata)
    metadata["eval_metrics"] = dice_per_target(read_json(metrics), metrics) if metrics else dict(NOT_EVALUATED)
    licence = read_licence(data_license) if data_license else None
    overlays = [overlays] if isinstance(overlays, str) else overlays
    for overlay in dict.fromkeys([*["clicks.json"] * takes_clicks, *overlays]):
        _train_with(overlay, configs, bundle_dir)
    if takes_clicks:
        configs["train.json"]["click_sigma"] = description["click_sigma"]
    for config in (configs[file] for file in ("inference.json", "evaluate.json") if file in configs):
        changed = {key: value for key, value in (inference or {}).items() if key.split("#")[0] in config}
        config.update(merge_overlay(config, changed))
    fill_configs(configs, description)
    shown = display_name or _display_name(name, bundle_dir, metadata)
    parameters, seen = sum(tensor.numel() for tensor in tensors.values()), licences_seen(description, configs)
    fill_metadata(metadata, description, shown, trained_on, parameters)
    first = checkpoint if isinstance(checkpoint, str) else checkpoint[0]
    parts = {
        "weights": weights_table(description, metadata, parameters, seen, trained_on),
        "training": training_table(configs.get("train.json", {}), description, first),
        "performance": performance(metadata, metrics_of),
        "system": system_table(parameters, description["patch_size"]),
    }
    bundle = os.path.join(output_dir, name)
    _refuse_to_lose(bundle, bundle_dir, checkpoint)
    with _replaced(bundle) as folder:
        _copy_bundle(bundle_dir, folder)
        for file, content in configs.items():
            write_json(os.path.join(folder, "configs", file), content, ensure_ascii=False)
        Path(folder, "docs/data_license.txt").write_text(licence or licence_list(seen), encoding="utf-8")
        write_readme(os.path.join(folder, "docs", "README.md"), name, metadata["version"], parts)
        _write_weights(os.path.join(folder, "models"), tensors, description, safetensors)
        _copy_package(folder)
        _write_large_files(folder, name, base_url)
        check_weights(folder)
    if not zipped:
        return bundle
    path = zip_bundle(bundle, output_dir)
    file = os.path.basename(path)
    Path(path + ".sha256").write_text(f"{file_hash(path, 'sha256')}  {file}\n", encoding="utf-8")
    list_release(output_dir, file.removesuffix(".zip"), file_hash(path, "sha1"), _url(base_url, file))
    return path


def _train_with(overlay: str, configs: dict[str, Any], bundle_dir: str) -> None:
    """Merge an overlay, one of the bundle's or a path, into the train.json of its configs, and say so there."""
    if overlay not in configs and not os.path.isfile(overlay):
        raise ReleaseError(
            f"{bundle_dir} has no configs/{overlay}, and no such file is there; its configs are {sorted(configs)}"
        )
    said = f"In this release {os.path.basename(overlay)} is merged into it."
    about = configs["train.json"].get("_desc_", "").replace(said, "").strip()  # a release of a release has said it
    configs["train.json"] = merge_overlay(configs["train.json"], configs.get(overlay) or read_json(overlay))
    configs["train.json"]["_desc_"] = f"{about} {said}".strip()


def read_licence(path: str) -> str:
    """The text of a file for ``docs/data_license.txt``; ReleaseError where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ReleaseError(f"--data_license {path} cannot be read ({error}); expected a text file in UTF-8") from None


def list_release(output_dir: str, release: str, checksum: str, source: str) -> None:
    """Add a release (NAME_vX.Y.Z) to the ``model_info.json`` of a folder, to which other processes may add theirs."""
    listing = os.path.join(output_dir, "model_info.json")
    with locked(output_dir):
        known = read_json(listing) if os.path.isfile(listing) else {}
        known[release] = {"checksum": checksum, "source": source}
        write_json(listing, dict(sorted(known.items())), ensure_ascii=False)


@contextmanager
def _replaced(folder: str) -> Iterator[str]:
    """A new folder to fill, which takes the place of `folder` at the end of the block, or is gone if that fails."""
    parent = os.path.dirname(os.path.abspath(folder))
    os.makedirs(parent, exist_ok=True)
    sweep(parent)
    scratch = unfinished(parent)
    os.mkdir(scratch, 0o700)
    try:
        yield scratch
        os.chmod(scratch, 0o755)
        if os.path.isdir(folder):
            os.replace(folder, f"{scratch}.before")
        os.replace(scratch, folder)
        shutil.rmtree(f"{scratch}.before", ignore_errors=True)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _refuse_to_lose(target: str, bundle_dir: str, checkpoint: str | Sequence[str]) -> None:
    """ReleaseError where the folder to be replaced is no earlier release, or holds what no release writes."""
    sources = [bundle_dir, *([checkpoint] if isinstance(checkpoint, str) else checkpoint)]
    inside = [path for path in sources if Path(path).resolve().is_relative_to(Path(target).resolve())]
    is_release = all(os.path.exists(os.path.join(target, part)) for part in ("configs/metadata.json", "tsfm", "models"))
    if inside:
        found = f"it holds {inside[0]}:"
    elif os.path.lexists(target) and (not is_release or os.path.islink(target)):
        found = "what is there is no earlier release:"
    elif is_release and (added := _added(target)):
        found = f"it holds {added[:5]}, which no release writes (results, a run, a training?): move these away, or"
    else:
        return
    raise ReleaseError(
        f"{os.path.abspath(target)} would be replaced, but {found} choose another --output_dir or --name"
    )


def _added(folder: str) -> list[str]:
    """What people and a MONAI Label server's trainings left in a release: runs and results, weights."""
    weights = [file for file in list_files(os.path.join(folder, "models")) if file.endswith((".pt", ".safetensors"))]
    return [*sorted({*os.listdir(folder)} - PARTS), *(file for file in weights if file not in RELEASED_WEIGHTS)]


def _copy_bundle(bundle_dir: str, folder: str) -> None:
    """A bundle's own files, and the pins of the repository that a source bundle lies in (a staged one has them)."""
    found = [path for pattern in STAGED for path in glob.glob(os.path.join(glob.escape(bundle_dir), pattern))]
    for part in ("configs", "docs"):
        os.mkdir(os.path.join(folder, part))
    for path in filter(os.path.isfile, found):
        if os.path.basename(path) != LEFT_OUT:
            shutil.copyfile(path, os.path.join(folder, os.path.relpath(path, bundle_dir)))
    repository = os.path.dirname(os.path.dirname(os.path.abspath(bundle_dir)))
    for name in PINS:
        source, target = Path(repository, name), Path(folder, "docs", name)
        if source.is_file() and not target.exists():
            lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if not line.startswith("-e ")]  # the package is in the bundle
            target.write_text("".join(kept), encoding="utf-8")


def zip_bundle(bundle: str, output_dir: str) -> str:
    """Zip a staged folder as ``NAME_vX.Y.Z.zip``: sorted names, one fixed time, fixed permissions; returns the path."""
    name = os.path.basename(os.path.abspath(bundle))
    version = read_json(os.path.join(bundle, "configs", "metadata.json"))["version"]
    path = os.path.join(output_dir, f"{name}_v{version}.zip")
    atomic_write(path, lambda temporary: _write_zip(temporary, bundle, name))
    return path


def _write_zip(path: str, bundle: str, name: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for file in list_files(bundle):
            if file == "large_files.yml":
                continue
            entry = zipfile.ZipInfo(f"{name}/{file}", ZIP_TIME)
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            is_weight = file.endswith(WEIGHT_SUFFIXES)  # float noise does not shrink
            entry.compress_type = zipfile.ZIP_STORED if is_weight else zipfile.ZIP_DEFLATED
            entry.file_size = os.path.getsize(os.path.join(bundle, file))
            with open(os.path.join(bundle, file), "rb") as source, archive.open(entry, "w") as target:
                shutil.copyfileobj(source, target, 2**20)


def list_files(folder: str) -> list[str]:
    """Every file below `folder`, relative, with forward slashes, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if not path.is_dir())


def large_files(folder: str) -> list[str]:
    """Those that the Model Zoo wants outside of its repository."""
    return [file for file in list_files(folder) if os.path.getsize(os.path.join(folder, file)) > LARGE_FILE_BYTES]


def file_hash(path: str, kind: str) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.new(kind)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _read_configs(bundle_dir: str) -> dict[str, Any]:
    folder = os.path.join(bundle_dir, "configs")
    if not os.path.isfile(os.path.join(folder, "metadata.json")):
        raise ReleaseError(f"{os.path.abspath(bundle_dir)} is not a bundle: it has no configs/metadata.json")
    files = [file for file in sorted(os.listdir(folder)) if file.endswith(".json") and file != LEFT_OUT]
    contents = {file: read_json(os.path.join(folder, file)) for file in files}
    return {file: content for file, content in contents.items() if isinstance(content, dict)}  # a list is no config


def _write_weights(
    folder: str, tensors: Mapping[str, torch.Tensor], description: Mapping[str, Any], safetensors: bool
) -> None:
    os.makedirs(folder)
    state = {key: value.contiguous() for key, value in sorted(tensors.items())}
    state[EXTRA_STATE] = encode_description(description)
    for name in ("model.pt", *["model.safetensors"] * safetensors):
        write_state(state, os.path.join(folder, name), name.endswith(".safetensors"))


def _display_name(name: str, bundle_dir: str, metadata: Mapping[str, Any]) -> str:
    """What people are shown: a renamed bundle's own name in words, else what the bundle says."""
    if name == os.path.basename(os.path.abspath(bundle_dir)) and metadata.get("name"):
        return metadata["name"]
    words = name.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def _copy_package(folder: str) -> None:
    """Package and MONAI Label app as real copies: a link would be dropped or broken by what packs and unpacks bundles."""
    for source in (Path(tsfm.__file__).parent, Path(__file__).parents[1] / "label_app"):
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
        shutil.copytree(source, os.path.join(folder, source.name), ignore=ignored)


def _write_large_files(bundle: str, name: str, base_url: str) -> None:
    lines = ["large_files:"]
    for file in large_files(bundle):
        lines += [
            f'  - path: "{file}"',
            f'    url: "{_url(base_url, f"{name}/{file}")}"',
            f'    hash_val: "{file_hash(os.path.join(bundle, file), "sha256")}"',
            '    hash_type: "sha256"',
        ]
    if lines[1:]:
        write_text(os.path.join(bundle, "large_files.yml"), "\n".join(lines) + "\n")


def _url(base_url: str, file: str) -> str:
    return f"{base_url.rstrip('/')}/{file}" if base_url else file
