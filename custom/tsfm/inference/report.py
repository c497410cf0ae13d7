"""``report.json``: what is known of each case of a folder, beside its label map."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events

from ..cases.folders import REPORT
from ..files import locked, write_text
from ..schema import FileError, read_json
from .quality import doubt


class CaseReport:
    """Handler of a `prediction.CaseEvaluator`: keeps ``report.json`` in `output_dir` up to date, case by case.

    ``{"cases": {case: {"seconds", "ml": {target: volume}, "quality": {target: {"agreement", "entropy"}}, "doubt"}}}``; a
    volume includes parts and what lies inside, and a case that failed has "error". Cases of earlier runs and of other processes into the same folder stay.

    Raises:
        FileError: another file of this name is there; as the run starts.
    """

    def __init__(self, output_dir: str) -> None:
        self.path = Path(output_dir, REPORT)

    def attach(self, engine: Engine) -> None:
        """Connect to the evaluator."""
        engine.add_event_handler(Events.STARTED, lambda _: read_report(self.path.parent))
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)

    def _write(self, engine: Any) -> None:
        row = dict(engine.results[-1])
        if "left" in row:  # another process writes it
            return
        case = row.pop("case")
        if "quality" in row:
            row["doubt"] = doubt(row["quality"])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path.parent):
            cases = read_report(self.path.parent)
            cases[case] = row
            lines = (f"{json.dumps(name)}: {json.dumps(one)}" for name, one in cases.items())
            text = '{"cases": {\n' + ",\n".join(lines) + "\n}}\n"  # a line per case; indented takes three times as long
            write_text(self.path, text)


def read_report(output_dir: str | Path) -> dict[str, Mapping[str, Any]]:
    """Case -> what ``report.json`` in a folder says; nothing where there is none, FileError for another file of this name."""
    path = Path(output_dir, REPORT)
    content = read_json(path) if path.is_file() else {"cases": {}}
    if not isinstance(content, dict) or not isinstance(content.get("cases"), dict):
        raise FileError(
            f'{path} is no report of segmented cases, expected {{"cases": {{...}}}}: move it, or choose another --output_dir'
        )
    return content["cases"]
