"""What a command line and its config files say, checked before anything is built: MONAI takes any id and any value.

An option or an overlay's id that no config knows changes nothing, so it is refused with the nearest known one; so are
values that cannot be meant, and texts that MONAI would read as something else (``#``, ``@``).
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .schema import KINDS, check, kind, nearest, read_json

# options of `monai.bundle run` itself, and of its tracking
RUN_OPTIONS = {
    *("run_id", "init_id", "final_id", "meta_file", "config_file", "logging_file", "tracking", "args_file"),
    *("bundle_root", "tracking_uri", "experiment_name", "run_name", "workflow_type", "workflow_name"),
    *("save_execute_config", "is_not_rank0"),
}

ENTRY_POINTS = {"imports", "initialize", "run", "finalize"}

SIGNS = ("$", "@", "%")  # begin what MONAI evaluates: expressions, references, macros


class OptionError(ValueError):
    """An option or an id of an overlay that no config file knows, or a value that cannot be meant."""


COUNT = kind("int", "a whole number from 1", minimum=1)

INDEX = kind("int", "a whole number from 0", minimum=0)

RATE = kind("number", "a number from 0", minimum=0)

RATE_OR_NONE = kind(["number", "null"], "a number from 0, or null", minimum=0)

FLAG = kind("boolean", "true or false (on a command line: True or False)")

PATH = kind(["string", "null"], "a path (a name of digits alone: ./2024)")

NAMED = kind("string", "a name")

AUTO = r"\Aauto\Z"

POSITIVE = kind("number", "a number above 0", exclusiveMinimum=0)

BUDGET = kind(["number", "null"], "a number above 0, without its unit, or null", exclusiveMinimum=0)

THREE = [POSITIVE] * 3

KINDS["options"] = kind(
    "object",
    "an object of ids",
    properties={
        **dict.fromkeys(("epochs", "iterations_per_epoch", "val_iterations", "val_interval", "parts", "sw_batch_size"), COUNT),
        "batch_size": kind(["int", "string"], "a whole number from 1, or auto", minimum=1, pattern=AUTO),
        **dict.fromkeys(("seed", "part"), INDEX),
        "warmup_epochs": kind(["int", "string"], "a whole number from 0, or auto (the schedule's own)", minimum=0, pattern=AUTO),
        "num_workers": kind(
            ["int", "object"], "a whole number from 0", minimum=0, anyOf=[{"type": "int"}, {"required": ["_target_"]}]
        ),
        "save_interval": kind(["int", "string"], "a whole number from 1, or auto", minimum=1, pattern=AUTO),
        "checkpointing": kind(["boolean", "string"], "true, false or auto (on a command line: True or False)", pattern=AUTO),
        "learning_rate": RATE,
        **dict.fromkeys(("head_learning_rate", "encoder_learning_rate"), RATE_OR_NONE),
        **dict.fromkeys(("memory_gb", "step_seconds"), BUDGET),
        "label_ids": kind(
            ["object", "null"], 'an object from raw ids to targets, like {"1": "liver"}',
            additionalProperties=kind(["string", "array"], "the name of a target, or a list of them"),
        ),
        "regions": kind(["object", "null"], 'an object from targets to their relations, like {"liver": {}}'),
        "ct_normalization": kind(
            ["string", "object"], "fingerprint, checkpoint, or an object with the numbers lower, upper, mean and sd",
            pattern=r"\A(fingerprint|checkpoint)\Z", required=["lower", "upper", "mean", "sd"],
            properties={**dict.fromkeys(("lower", "upper", "mean"), kind("number", "a number")), "sd": POSITIVE},
        ),
        **dict.fromkeys(("allow_missing", "raw_data", "from_scratch", "amp", "compile", "progress", "save_sharded"), FLAG),
        **dict.fromkeys(("bundle_root", "output_dir", "store_dir", "ckpt_dir", "splits_file"), PATH),
        "checkpoint": kind(["string", "array", "null"], "a weight file, or a list of folds' weight files"),
        "dataset_dir": kind(["string", "array"], "a path (a name of digits alone: ./2024), or a list of them"),
        "fold": kind(["int", "string"], 'a fold\'s number from 0, or "all"', minimum=0, pattern=r"\A(all|\d+)\Z"),
        "mirror_axes": kind("string", "some of the letters S, P, L, each once", pattern=r"\A(?!.*(.).*\1)[SPL]*\Z"),
        "amp_dtype": kind("string", "bfloat16, float16 or (inference) auto", enum=["bfloat16", "float16", "auto"]),
        "licence": kind("string", "any, commercial or permissive", enum=["any", "commercial", "permissive"]),
        "save": kind(["string", "array"], "the name of an output, or a list of names", items=NAMED),
        "existing": kind("string", "error, skip or overwrite", enum=["error", "skip", "overwrite"]),
        "spacing_mm": kind(
            ["array", "string"], "three numbers of millimetres (S, P, L), auto, coarse or checkpoint", prefixItems=THREE,
            minItems=3, maxItems=3, pattern=r"\A(auto|coarse|checkpoint)\Z",
        ),
        "patch_size": kind(
            ["array", "string"], "three whole numbers of voxels (S, P, L), auto or checkpoint", items=COUNT,
            minItems=3, maxItems=3, pattern=r"\A(auto|checkpoint)\Z",
        ),
    },
)  # fmt: skip


def check_options(arguments: Sequence[str]) -> None:
    """Compare the ids that the command line and its overlays set with those that the first config file has.

    Raises:
        OptionError: listing unknown ids with the nearest known one, and values that cannot be meant.
        FileError: a config file with a key that is there twice.
    """
    options, paths = _options(arguments), config_files(arguments)
    if not paths:
        return
    contents = {path: read_json(path) for path in paths}
    wrong = [path for path, content in contents.items() if not isinstance(content, dict)]
    if wrong:
        raise OptionError(f'{wrong[0]} holds no object of ids, expected one like {{"epochs": 10}}')
    beside = _ids_beside([*contents, options.get("args_file", "")])
    first = _first_ids(contents, options)
    known = first.union(*beside.values())
    for path, content in list(contents.items())[1:]:
        listed = "; ".join(_unknown([key for key in content if not key.startswith("_")], known, contents, ""))
        if listed:
            raise OptionError(f"{path}: the other config files have no id for {listed}; it would change nothing")
    own = {name: value for name, value in options.items() if name not in RUN_OPTIONS}
    listed = "; ".join(_unknown(list(own), known, contents, "--"))
    if listed:
        raise OptionError(f"the config files have no id for {listed}; a mistyped option would change nothing")
    given = first | {_parts(key)[0] for content in contents.values() for key in content}
    for name in own:
        if _parts(name)[0] not in given:
            holders = " or ".join(sorted(path.name for path, ids in beside.items() if _parts(name)[0] in ids))
            raise OptionError(
                f"--{name} belongs to {holders}, which --config_file does not list: it would change nothing"
            )
    merged = {key: value for content in contents.values() for key, value in content.items()}
    for name, value in _typed(arguments).items():
        if name in own and _literal(value) is None and merged.get(name, "") is not None:
            raise OptionError(
                f"--{name} None would change nothing: MONAI drops an option that is None. Give --{name} '$None' (with single "
                f"quotes), or an overlay that says null"
            )
    _check_parts(merged, {tuple(_parts(key)) for key in (*merged, *own)})
    for path, content in contents.items():
        _check_values(content, path)
    _check_values(overrides(arguments), "command line")
    for name, value in own.items():
        target = re.split(r"#|::", value[1:])[0]
        if value.startswith(SIGNS[1:]) and target not in known and not target.endswith((".json", ".yaml", ".yml")):
            raise OptionError(
                f"--{name} {value}: a value that begins with {value[0]} refers to an id of the config files, and there is "
                f"none named '{target}'{nearest(target, known)}; for a file or folder of this name write ./{value}"
            )


def _check_parts(merged: Mapping[str, Any], given: set[tuple[str, ...]]) -> None:
    """OptionError for an id that an overlay replaced whole, without a part to which another id refers."""
    for reference in re.findall(r"@([A-Za-z_]\w*(?:(?:#|::)\w+)+)", json.dumps(merged)):
        first, *rest = _parts(reference)
        place = None if f"+{first}" in merged else merged.get(first)
        for depth, step in enumerate(rest):
            if not isinstance(place, Mapping) or (first, *rest[: depth + 1]) in given:
                break
            if step not in place:
                raise OptionError(
                    f"'{first}' is replaced as a whole and lacks '{step}', to which other ids refer (@{reference}): set its "
                    f'parts one by one, as in "{first}#{step}": ... (docs/changes.md)'
                )
            place = place[step]


def _check_values(content: Mapping[str, Any], source: str) -> None:
    """OptionError for values of the wrong type, and for those that `check_texts` refuses."""
    plain = {
        key.lstrip("+"): value
        for key, value in content.items()
        if not key.startswith("_") and not (isinstance(value, str) and value.startswith(SIGNS))
    }
    check(plain, "options", source, OptionError)
    known = KINDS["options"]["properties"]  # other lists may name ids
    check_texts({key: value for key, value in plain.items() if isinstance(value, str) or key in known}, source)


def check_texts(content: Mapping[str, Any], source: str) -> None:
    """OptionError for texts and paths, single or in lists, with a ``#``, which MONAI would turn into ``::``."""
    for key, value in content.items():
        for text in _texts(value):
            if "#" in text and not text.startswith(SIGNS):
                raise OptionError(
                    f"{source}, {key}: {text!r} has a #, which MONAI reads as ::; give the file or folder another name, or "
                    "a link without it"
                )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, (str, os.PathLike)):
        yield os.fspath(value)
    elif isinstance(value, (list, tuple)):
        yield from (text for one in value for text in _texts(one))


def _options(arguments: Sequence[str]) -> dict[str, str]:
    """Name -> text of every option of the command line, and of an args file."""
    options = _typed(arguments)
    path = options.get("args_file", "")
    if os.path.isfile(path) and isinstance(content := read_json(path), dict):
        options = {**{name: str(value) for name, value in content.items()}, **options}
    return options


def overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Id -> value of what a command line sets in the configs."""
    return {name: _literal(value) for name, value in _options(arguments).items() if name not in RUN_OPTIONS}


def _typed(arguments: Sequence[str]) -> dict[str, str]:
    """Name -> text of every ``--name value`` and ``--name=value``; a flag without a value is True."""
    options: dict[str, str] = {}
    for position, argument in enumerate(arguments):
        if position and argument.startswith("--"):
            name, sign, value = argument[2:].partition("=")
            following = arguments[position + 1] if position + 1 < len(arguments) else "--"
            options[name.replace("-", "_")] = value if sign else "True" if following.startswith("--") else following
    return options


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _parts(key: str) -> list[str]:
    return re.split(r"#|::", key.lstrip("+"))


def _first_ids(contents: Mapping[str, Any], options: Mapping[str, str]) -> set[str]:
    """Top-level ids of the first file, what any file refers to, and entry points."""
    found = RUN_OPTIONS | ENTRY_POINTS | {_parts(key)[0] for key in next(iter(contents.values()))}
    found |= set(re.findall(r"[@%]([A-Za-z_]\w*)", json.dumps(list(contents.values()))))
    return found | {options[name] for name in ("run_id", "init_id", "final_id") if name in options}


def _ids_beside(files: Sequence[str]) -> dict[Path, set[str]]:
    """Top-level ids of each config beside the first of `files` that is not of this run: overlays may serve several."""
    given = set(map(os.path.abspath, files))
    found = {}
    for path in Path(files[0]).absolute().parent.glob("*.json"):
        if str(path) not in given:
            try:
                content = read_json(path)
            except ValueError:  # not one of a bundle's configs
                continue
            found[path] = {_parts(key)[0] for key in content} if isinstance(content, Mapping) else set()
    return found


def _unknown(keys: Sequence[str], known: set[str], contents: Mapping[str, Any], dashes: str) -> Iterator[str]:
    """The keys that lead nowhere, each with the nearest that does."""
    for key in keys:
        first, *rest = _parts(key)
        if first not in known:
            yield f"{dashes}{key}{nearest(first, known).replace(chr(39), '').replace('mean ', f'mean {dashes}')}"
            continue
        places = [content[first] for content in contents.values() if isinstance(content, dict) and first in content]
        wrong = [_dead_end(place, rest) for place in places]
        if rest and places and all(wrong):
            yield f"{dashes}{key} ({wrong[0]})"


def _dead_end(place: Any, steps: Sequence[str]) -> str:
    """What is wrong with the way into a nested config; empty where it can be gone, or only MONAI knows."""
    for depth, step in enumerate(steps):
        if isinstance(place, list) and step.isdigit():
            if int(step) >= len(place):
                return f"there are {len(place)} entries"
            place = place[int(step)]
        elif isinstance(place, dict):
            if step not in place:
                is_argument = "_target_" in place and depth == len(steps) - 1
                return "" if is_argument else f"no '{step}' there{nearest(step, place)}"
            place = place[step]
        else:  # an expression or a reference
            return ""
    return ""


def config_files(arguments: Sequence[str]) -> list[str]:
    """The JSON files that ``--config_file`` names (none without it): one path, or a list of paths as text."""
    value = _options(arguments).get("config_file", "")
    if value.startswith("["):
        try:
            paths = [str(path) for path in ast.literal_eval(value)]
        except (ValueError, SyntaxError):
            paths = [part.strip(" '\"") for part in value.strip("[]").split(",")]
    else:
        paths = [value]
    return [path for path in paths if path.endswith(".json") and os.path.isfile(path)]
