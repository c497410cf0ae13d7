"""What a user can mend, said plainly: mistyped options, and errors from under those that MONAI wraps around them."""

from __future__ import annotations

import ast
import difflib
import json
import os
import sys
from collections.abc import Sequence
from types import TracebackType

# options of `monai.bundle run` itself, and of its tracking
RUN_OPTIONS = {
    *("run_id", "init_id", "final_id", "meta_file", "config_file", "logging_file", "tracking", "args_file"),
    *("bundle_root", "tracking_uri", "experiment_name", "run_name", "workflow_type", "workflow_name"),
    *("save_execute_config", "is_not_rank0"),
}

OWN_MODULE = __package__


class CaseError(ValueError):
    """A case that cannot be used; the message names the file, what was found, what was expected and what to do."""


class CaseWarning(UserWarning):
    """A case that is used although something about it looks wrong."""


class OptionError(ValueError):
    """An option on the command line that no config file knows."""


def first_cause(error: BaseException) -> BaseException:
    """The exception under the RuntimeErrors that MONAI wraps around those of components and transforms."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def name_cause_last() -> None:
    """A bundle's ``initialize`` calls this: refuse mistyped options, and end the output of any error with its cause.

    Raises:
        OptionError: an option of ``python -m monai.bundle run`` that is no id of the config files.
    """
    sys.excepthook = _show
    check_options(sys.argv)


def check_options(arguments: Sequence[str]) -> None:
    """Compare the ids that the command line overrides with those that its config files have; MONAI takes any.

    Raises:
        OptionError: listing unknown ids, with the nearest known one.
    """
    options = [argument[2:].split("=", 1) for argument in arguments[1:] if argument.startswith("--")]
    names = [option[0].replace("-", "_") for option in options]
    if "config_file" not in names:
        return
    known = set(RUN_OPTIONS)
    for path in config_files(arguments):
        with open(path, encoding="utf-8") as file:
            known |= {key.lstrip("+").replace("::", "#").split("#")[0] for key in json.load(file)}
    unknown = [name for name in names if name.replace("::", "#").split("#")[0] not in known]
    if unknown:
        hints = [(name, difflib.get_close_matches(name, known, 1)) for name in unknown]
        listed = "; ".join(f"--{name}" + (f" (did you mean --{close[0]}?)" if close else "") for name, close in hints)
        raise OptionError(f"the config files have no id for {listed}; a mistyped option would change nothing")


def config_files(arguments: Sequence[str]) -> list[str]:
    """The JSON files that ``--config_file`` names (none without it): one path, or a list of paths as text."""
    position = next((i for i, argument in enumerate(arguments) if argument.startswith("--config_file")), None)
    if position is None:
        return []
    value = arguments[position].partition("=")[2] or (arguments[position + 1] if position + 1 < len(arguments) else "")
    if value.startswith("["):
        try:
            paths = [str(path) for path in ast.literal_eval(value)]
        except (ValueError, SyntaxError):
            paths = [part.strip(" '\"") for part in value.strip("[]").split(",")]
    else:
        paths = [value]
    return [path for path in paths if path.endswith(".json") and os.path.isfile(path)]


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    cause = first_cause(error)
    if isinstance(cause, KeyboardInterrupt):
        print(
            "\nInterrupted. The same command goes on after the last epoch or case that was finished.", file=sys.stderr
        )
        return
    if type(cause).__module__.split(".")[0] == OWN_MODULE:  # an error made for the user: the way to it says nothing
        print(f"\nThis run stopped because of\n{type(cause).__name__}: {cause}", file=sys.stderr, flush=True)
        return
    sys.__excepthook__(kind, error, trace)
    if cause is not error:
        print(f"\nThis run stopped because of\n{type(cause).__name__}: {cause}", file=sys.stderr, flush=True)
