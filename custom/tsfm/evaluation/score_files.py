"""Files of scores: every case is on disk as it ends, tables and summary appear at the end."""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import check_writable
from ..labels import LabelTable, is_lesion
from .scores import COLUMNS
from .tables import markdown_scores, score_notes, summarize, table1

logger = logging.getLogger(__name__)

LESION_COLUMNS = ("case", "dataset", "target", "kind", "volume_ml", "covered")


class ScoreWriter:
    """Files of scores in one folder: every case is written as it ends, whole files appear at the end.

    While running, rows are in ``cases.csv.part`` and ``lesions.csv.part``; `finish` turns them into ``cases.csv`` and
    ``lesions.csv`` and adds ``summary.json`` (per data set and target) and ``scores.md`` (the tables).
    """

    def __init__(self, output_dir: str | Path, table: LabelTable) -> None:
        self.folder, self.table = Path(output_dir), table
        check_writable(self.folder, "--output_dir")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        self.failed: list[dict[str, str]] = []
        self._save([], "w")

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Keep one case's rows and append them to the files."""
        self.rows += rows
        self._save(rows, "a")

    def fail(self, case: str, error: Exception) -> None:
        """Remember a case that could not be scored; the others go on."""
        logger.error("%s could not be scored: %s", case, error)
        self.failed.append({"case": case, "error": str(error)})

    def finish(self, protocol: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Write the final files, return the summary.

        `protocol` says how the label maps were made; it goes into ``summary.json`` and below the tables.
        """
        self._save(self.rows, "w")
        lesion_targets = [name for name in self.table.names if is_lesion(self.table, name)]
        summary = {**summarize(self.rows), "lesion_targets": lesion_targets, "failed": self.failed}
        text = f"{table1(summary, lesion_targets)}\n\n{markdown_scores(summary)}\n"
        text += f"\n{score_notes(summary)}\n" * bool(score_notes(summary))
        if protocol:
            summary["protocol"] = dict(protocol)
            text += "\n" + "; ".join(f"{key}: {value}" for key, value in protocol.items()) + ".\n"
        for name, content in (("summary.json", json.dumps(summary, indent=4)), ("scores.md", text)):
            (self.folder / f"{name}.part").write_text(content, encoding="utf-8")
        for name in ("cases.csv", "lesions.csv", "summary.json", "scores.md"):
            os.replace(self.folder / f"{name}.part", self.folder / name)
        return summary

    def _save(self, rows: list[dict[str, Any]], mode: str) -> None:
        keys = LESION_COLUMNS[:3]
        lesions = [{**{key: row[key] for key in keys}, **lesion} for row in rows for lesion in row["lesions"]]
        for name, columns, lines in (("cases.csv", COLUMNS, rows), ("lesions.csv", LESION_COLUMNS, lesions)):
            with open(self.folder / f"{name}.part", mode, newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns)
                if mode == "w":
                    writer.writeheader()
                writer.writerows({key: _rounded(line.get(key)) for key in columns} for line in lines)


def _rounded(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
