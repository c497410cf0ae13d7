"""``report.json``: what is known of each case of a folder, beside its label map."""

from __future__ import annotations

import atexit
import json
import time
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events

from ..cases.folders import JOURNAL, REPORT, read_report
from ..files import locked, write_text
from .quality import doubt

PATIENCE = 50
"""The report is written again once this many times as long has passed as that takes."""


class CaseReport:
    """Handler of a `prediction.CaseEvaluator`: keeps ``report.json`` in `output_dir` up to date.

    ``{"cases": {case: {"seconds", "ml": {target: volume}, "quality": {target: {"agreement", "entropy"}}, "doubt"}}}``; a
    volume includes parts and what lies inside, and a case that failed has "error". Cases of earlier runs and of other
    processes into the same folder stay.

    Each row is on disk as its case ends, in the journal that `read_report` reads too: to write the whole report for each
    of thousands of cases would take longer than to segment them.

    Raises:
        FileError: another file of this name is there; as the run starts.
    """

    def __init__(self, output_dir: str) -> None:
        self.folder, self._due = Path(output_dir), 0.0

    def attach(self, engine: Engine) -> None:
        """Connect to the evaluator."""
        engine.add_event_handler(Events.STARTED, lambda _: read_report(self.folder))
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._note)
        engine.add_event_handler(Events.COMPLETED, self.write)
        atexit.register(self.write)  # an interrupted run

    def _note(self, engine: Any) -> None:
        row = dict(engine.results[-1])
        if "left" in row:  # another process writes it
            return
        case = row.pop("case")
        if "quality" in row:
            row["doubt"] = doubt(row["quality"])
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder), open(self.folder / JOURNAL, "a", encoding="utf-8") as journal:
            journal.write("\n" + json.dumps({case: row}))
        if time.monotonic() >= self._due:
            self.write()

    def write(self, _: Any = None) -> None:
        """Write the report with what is in the journal, and empty that."""
        if not (self.folder / JOURNAL).is_file():
            return
        begun = time.monotonic()
        with locked(self.folder):
            rows = (f"{json.dumps(case)}: {json.dumps(row)}" for case, row in read_report(self.folder).items())
            text = '{"cases": {\n' + ",\n".join(rows) + "\n}}\n"  # a line per case; indented takes three times as long
            write_text(self.folder / REPORT, text)
            (self.folder / JOURNAL).unlink(missing_ok=True)
        now = time.monotonic()
        self._due = now + PATIENCE * (now - begun)
