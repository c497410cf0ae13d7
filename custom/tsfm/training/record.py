"""The record of a run: settings, versions, cases and times, beside its weights."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ignite.engine import Engine, Events

from .._version import __version__
from ..cases.pool import is_bare
from ..files import check_writable, write_json
from ..options import config_files
from ..schema import FileError, read_json

logger = logging.getLogger(__name__)

RECORDED_PACKAGES = ("monai", "torch", "numpy", "pytorch-ignite", "nibabel", "blosc2", "scipy")


class RunRecord:
    """Handler: writes ``run.json`` when the run starts: command, configs, settings, versions, pool summary.

    Args:
        output_dir: the run's folder; created, and tried for writing, before anything long starts.
        settings: the run's settings.
        pool: the `DatasetPool`, or None.
        items: training items (counted where there is no pool).

    Raises:
        OSError: a folder that cannot be written.
    """

    def __init__(
        self, output_dir: str, settings: Mapping[str, Any], pool: Any = None, items: Sequence[Any] = ()
    ) -> None:
        self.path = os.path.join(output_dir, "run.json")
        self.settings, self.pool, self.items = dict(settings), pool, items
        self.configs = {path: read_json(path) for path in config_files(sys.argv)}  # before anyone changes them
        check_writable(output_dir, "--output_dir")
        os.makedirs(output_dir, exist_ok=True)

    def attach(self, engine: Engine) -> None:
        """Write when `engine` starts."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Any) -> None:
        """Write the record; an earlier one of a resumed run is kept in its ``earlier`` list."""
        bare = is_bare(self.items)
        record = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": sys.argv,
            "folder": os.getcwd(),
            "configs": self.configs,
            "settings": self.settings,
            "epochs": engine.state.max_epochs,
            "versions": versions(),
            "pool": None if bare or self.pool is None else self.pool.summary(),
            "training_cases": len(self.items),
        }
        if os.path.exists(self.path):
            record["earlier"] = self._earlier()
        write_json(self.path, record, default=str)

    def _earlier(self) -> list[Any]:
        """The records of the run's earlier parts; a file that cannot be read is set aside, and the run goes on."""
        try:
            before = read_json(self.path)
            return [*before.pop("earlier", []), before]
        except (FileError, AttributeError, TypeError) as error:
            aside = os.path.join(os.path.dirname(self.path), "run_damaged.json")
            os.replace(self.path, aside)
            logger.warning(
                "the record of this run is damaged (%s): it is kept as %s, and a new one begins", error, aside
            )
            return []


def versions() -> dict[str, str]:
    """Versions of this package (with its git commit where it is a checkout), Python, the machine and key packages."""
    found = {"tsfm": __version__, "python": platform.python_version(), "machine": platform.platform()}
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        command = ["git", "-C", folder, "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        if commit.returncode == 0:
            found["git"] = commit.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):  # no git, or a slow disk
        pass
    for package in RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
