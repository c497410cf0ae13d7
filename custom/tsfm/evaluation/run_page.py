"""A run on one page, ``index.html``: curves, plan, scores, pictures, worst cases, and the command that repeats it.

Everything is inside the file, so it can be sent to someone. It is drawn from the files that a run and its evaluation leave.
"""

from __future__ import annotations

import base64
import filecmp
import json
import logging
import os
import shlex
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ignite import distributed as idist
from ignite.engine import Engine, Events

from ..files import write_text
from ..names import counted
from ..schema import read_json
from .pages import curve_png
from .tables import load_rows, score_notes

logger = logging.getLogger(__name__)

WORST = 15
"""Rows of the table of worst cases."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #1c2430 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #d5dae1 }
table { border-collapse: collapse } th { text-align: left; font-weight: 600; border-bottom: 1px solid #8893a2 }
td, th { padding: .15em 1.2em .15em 0; vertical-align: top } td.number, th.number { text-align: right }
pre { background: #f2f4f7; padding: .8em; white-space: pre-wrap; overflow-wrap: anywhere }
img { max-width: 100%; display: block; margin: .5em 0 } .note { color: #5b6675 }
"""


class RunPage:
    """Handler: draws ``index.html`` when a run, or its evaluation, is done.

    Args:
        output_dir: folder of the training run.
        evaluation_dir: folder of the evaluation, which is drawn into the run's page.
        checkpoint: the weights that were evaluated. Unless the run has left the very same, the page is the evaluation's
            alone and lies in `evaluation_dir`.
    """

    def __init__(self, output_dir: str, evaluation_dir: str | None = None, checkpoint: str | None = None) -> None:
        self.output_dir, self.evaluation_dir, self.checkpoint = output_dir, evaluation_dir, checkpoint

    def attach(self, engine: Engine) -> None:
        """Draw at the end; declare it last."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Draw the page; one that cannot be drawn is reported and spoils nothing."""
        if idist.get_rank() != 0:
            return
        try:
            own = self.checkpoint is None or _is_copy(self.checkpoint, os.path.join(self.output_dir, "model.pt"))
            logger.info("page: %s", run_page(self.output_dir if own else None, self.evaluation_dir))
        except (ValueError, OSError, KeyError) as error:
            logger.warning("no index.html: %s", error)


def run_page(
    run_dir: str | os.PathLike | None = None,
    evaluation_dir: str | os.PathLike | None = None,
    output_file: str | os.PathLike | None = None,
) -> Path:
    """Write the page of a run, of its evaluation, or of both; what is not there is left out.

    Args:
        run_dir: what train.json calls output_dir (run.json, plan.json, curve.csv).
        evaluation_dir: what evaluate.json calls output_dir (summary.json, cases.csv, page.png, targets.png).
        output_file: by default ``index.html`` in `run_dir`, or else in `evaluation_dir`.

    Raises:
        FileNotFoundError: neither folder holds anything to show.
    """
    parts = (_run_parts(Path(run_dir)) if run_dir else []) + (_scores(Path(evaluation_dir)) if evaluation_dir else [])
    parts = [(title, content) for title, content in parts if content]
    if not parts:
        raise FileNotFoundError(
            f"nothing to show in {run_dir or evaluation_dir}: expected the curve.csv of a training, or the summary.json "
            "of an evaluation; check --run_dir and --evaluation_dir"
        )
    again = {"run_dir": run_dir, "evaluation_dir": evaluation_dir}
    again = " ".join(f"--{key} {shlex.quote(os.path.abspath(value))}" for key, value in again.items() if value)
    parts.append(("This page again", f"<pre>{escape(f'python -m tsfm page {again}')}</pre>"))
    path = Path(output_file or Path(run_dir or evaluation_dir) / "index.html")
    name = escape(Path(run_dir or evaluation_dir).resolve().name)
    body = "\n".join(f"<h2>{escape(title)}</h2>\n{content}" for title, content in parts)
    text = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style></head>\n'
        f"<body><h1>{name}</h1>\n{body}\n</body></html>\n"
    )
    write_text(path, text)
    return path


def _run_parts(folder: Path) -> list[tuple[str, str]]:
    """Titles and HTML of what a training leaves."""
    record, plan = _json(folder / "run.json"), _json(folder / "plan.json")
    parts = []
    curve = folder / "curve.csv"
    if rows := load_rows(curve) if curve.is_file() else []:
        with tempfile.TemporaryDirectory() as scratch:
            picture = _picture(curve_png(curve, Path(scratch) / "curve.png"), "loss and Dice over epochs")
        parts.append(("Curves", f"<p>{escape(_in_words(rows))}</p>{picture}"))
    if plan:
        parts.append(("Plan", _facts(plan)))
    if record:
        pool = record.get("pool") or {}
        rows = [(name, one["cases"], ", ".join(one["annotated"])) for name, one in pool.get("datasets", {}).items()]
        parts.append(("Data", _table(("data set", "cases", "annotated targets"), rows) if rows else ""))
        commands = [*record.get("earlier", []), record]
        lines = dict.fromkeys(_command(one) for one in commands)
        times = ", ".join(str(one.get("started", "")) for one in commands)
        versions = ", ".join(f"{name} {value}" for name, value in record.get("versions", {}).items())
        note = f'<p class="note">started {escape(times)}; {escape(versions)}</p>'
        parts.append(("Command", f"<pre>{escape(chr(10).join(lines))}</pre>{note}"))
    return parts


def _in_words(rows: Sequence[Mapping[str, Any]]) -> str:
    last = rows[-1]
    text = f"{counted(last['epoch'], 'epoch')}, last loss {last['loss']:.3f}"
    if scored := [row for row in rows if row.get("ema") is not None]:
        best = max(scored, key=lambda row: row["ema"])
        text += (
            f"; Dice on patches of held-out cases (moving average) at best {best['ema']:.3f} in epoch {best['epoch']}"
        )
    return text + "."


def _scores(folder: Path) -> list[tuple[str, str]]:
    """Titles and HTML of what an evaluation leaves."""
    summary = _json(folder / "summary.json")
    if "datasets" not in summary:
        return []
    rows = []
    for dataset, targets in summary["datasets"].items():
        for target, entry in targets.items():
            lesions = entry.get("lesions")
            found = f"{lesions['found']} of {lesions['true']}, {lesions['false']} false" if lesions else "-"
            rows.append((dataset, target, entry["cases"], _mean(entry, "dice"), _mean(entry, "nsd"), found))
    note = "; ".join(f"{key}: {value}" for key, value in (summary.get("protocol") or {}).items())
    heads = ("data set", "target", "cases", "Dice", "surface Dice", "lesions found")
    notes = (f"{counted(summary['cases'], 'case')}, each scored whole", note, score_notes(summary).rstrip("."))
    scores = _table(heads, rows) + f'<p class="note">{escape(". ".join(filter(None, notes)))}.</p>'
    scored = sorted((r for r in load_rows(folder / "cases.csv") if r["dice"] is not None), key=lambda row: row["dice"])
    columns = ("dataset", "case", "target", "dice", "volume_predicted_ml", "volume_true_ml")
    worst = [[_number(row[key]) for key in columns] for row in scored[:WORST]]
    return [
        ("Scores", scores),
        ("Best, median and worst case", _picture(folder / "page.png", "image, truth, prediction")),
        ("The worst case of each target", _picture(folder / "targets.png", "image, truth, prediction per target")),
        ("Worst cases", _table(("data set", "case", "target", "Dice", "predicted ml", "true ml"), worst)),
    ]


def _mean(entry: Mapping[str, Any], key: str) -> str:
    return f"{entry[key]['mean']:.3f}" if entry.get(key) else "-"


def _command(record: Mapping[str, Any]) -> str:
    """The shell command of a run's record, in the folder where it was given."""
    words = list(record.get("command") or [])
    for module in ("monai.bundle", "tsfm"):
        if words and words[0].replace(os.sep, "/").endswith(f"{module.replace('.', '/')}/__main__.py"):
            words[:1] = ["python", "-m", module]
    return f"cd {shlex.quote(str(record.get('folder', '.')))} && {shlex.join(words)}" if words else ""


def _facts(content: Mapping[str, Any]) -> str:
    shown = [(key.replace("_", " "), value) for key, value in content.items() if value not in (None, [], {})]
    return _table(("", ""), [(key, _as_text(value)) for key, value in shown])


def _as_text(value: Any) -> str:
    """A value of a plan, rounded as the console shows it; lists keep their brackets."""
    if isinstance(value, list):
        return f"[{', '.join(map(_as_text, value))}]"
    if isinstance(value, str):
        return value
    if isinstance(value, int) and value >= 1e6:
        return f"{value / 1e6:.3g} million"
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def _table(heads: Iterable[str], rows: Iterable[Sequence[Any]]) -> str:
    def line(cells: Iterable[Any], tag: str) -> str:
        shown = (f"<{tag}{_align(cell)}>{escape(_number(cell))}</{tag}>" for cell in cells)
        return f"<tr>{''.join(shown)}</tr>"

    return f"<table>{line(heads, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _align(cell: Any) -> str:
    return ' class="number"' if str(cell).replace(".", "", 1).lstrip("-").isdigit() else ""


def _number(cell: Any) -> str:
    return f"{cell:.3f}" if isinstance(cell, float) else "" if cell is None else str(cell)


def _picture(path: Path, words: str) -> str:
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{escape(words)}" src="data:image/png;base64,{data}">'


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _is_copy(path: Any, other: str) -> bool:
    """Whether two weight files hold the same; several folds are a list, and no run's own."""
    return (
        isinstance(path, (str, os.PathLike))
        and os.path.isfile(path)
        and os.path.isfile(other)
        and filecmp.cmp(path, other, shallow=False)
    )
