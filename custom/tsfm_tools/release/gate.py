"""The Model Zoo's gate: everything its CI asks of a bundle that can run without its servers and GPUs, in one command.

    python -m tsfm gate --bundle_dir bundles/tsfm_pretrain      # prints a table, exits with 1 if a check fails

A bundle without ``models/model.pt`` (a source bundle) is checked for all that needs no weights. A staged bundle is
checked in a process of its own that imports the package vendored in it, not the one installed here. The schema
(2024-07-25) ships with the package, so nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import tsfm
from tsfm.errors import first_cause
from tsfm.options import check_texts
from tsfm.schema import read_json

from .folder_checks import FOLDER_CHECKS, Failed, Skipped
from .rules import ReleaseError
from .workflow_checks import WORKFLOW_CHECKS

CHECKS = {**FOLDER_CHECKS, **WORKFLOW_CHECKS}

TOOLS = str(Path(__file__).resolve().parents[2])
"""Where this package is found, by a process that imports ``tsfm`` from a bundle."""

NOT_RUN = {
    "TensorRT export": "needs a GPU and torch_tensorrt",
    "multi-GPU unit tests": "needs two GPUs; the DDP overlay is tested with two CPU processes",
    "the zoo's import path": "it checks bundles from its repository's root: PYTHONPATH has to name the bundle's folder",
    "version not released before": "the zoo compares with its own model_info.json",
}


@dataclass(frozen=True)
class Check:
    """One row of the gate's table: ``result`` is ``pass``, ``FAIL``, ``skipped`` or ``not run``."""

    name: str
    result: str
    detail: str = ""


def gate(bundle_dir: str) -> list[Check]:
    """Run every check on a bundle folder, with the package that lies in it if it has one.

    Raises:
        FileNotFoundError: no such folder.
        OptionError: one with a ``#`` in its path.
    """
    bundle_dir = os.path.abspath(bundle_dir)
    check_texts({"bundle_dir": bundle_dir}, "options")
    if not os.path.isdir(bundle_dir):
        raise FileNotFoundError(f"bundle folder {bundle_dir} does not exist")
    vendored, package = os.path.join(bundle_dir, "tsfm"), os.path.dirname(os.path.abspath(tsfm.__file__))
    if not os.path.isdir(vendored) or os.path.samefile(vendored, package):
        return run_checks(bundle_dir)
    with tempfile.TemporaryDirectory() as folder:
        report = os.path.join(folder, "gate.json")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((bundle_dir, TOOLS)), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "tsfm_tools.release.gate", bundle_dir, report]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if not os.path.isfile(report):
            return [Check("vendored package", "FAIL", done.stderr.strip()[-400:])]
        return [Check(**row) for row in read_json(report)]


def run_checks(bundle_dir: str) -> list[Check]:
    """Run every check in this process; one that fails does not stop the others."""
    rows = [run_check(bundle_dir, name) for name in CHECKS]
    return rows + [Check(name, "not run", reason) for name, reason in NOT_RUN.items()]


def run_check(bundle_dir: str, name: str) -> Check:
    """One of `CHECKS`."""
    try:
        with _quiet():
            return Check(name, "pass", CHECKS[name](bundle_dir))
    except Skipped as reason:
        return Check(name, "skipped", str(reason))
    except (Failed, ReleaseError) as error:
        return Check(name, "FAIL", str(error))
    except Exception as error:
        return Check(name, "FAIL", _reason(error))


def format_table(rows: list[Check]) -> str:
    """The rows as aligned text, the failures named again at the end."""
    width = max(len(row.name) for row in rows)
    lines = [f"{row.name:<{width}}  {row.result:<8}  {row.detail}" for row in rows]
    failed = [row.name for row in rows if row.result == "FAIL"]
    lines.append(f"{len(failed)} of {len(rows)} checks failed: {', '.join(failed)}" if failed else "the gate is open")
    return "\n".join(lines)


def _reason(error: BaseException) -> str:
    """What went wrong, and where."""
    error = first_cause(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{text[:400]} ({os.path.basename(last.filename)}, line {last.lineno})"


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
    found = json.dumps([asdict(row) for row in run_checks(sys.argv[1])])
    Path(sys.argv[2]).write_text(found, encoding="utf-8")
