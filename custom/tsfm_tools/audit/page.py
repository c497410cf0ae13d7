"""The audit's page: one self-contained HTML file."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .findings import SEVERITIES, Finding

STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.6em 0}td,th{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:left}
h2{margin-top:2em;border-bottom:2px solid #ccc}.error{color:#b00020}.warning{color:#9a5b00}.note{color:#456}
figure{display:inline-block;vertical-align:top;margin:.4em;width:520px}figcaption{font-size:13px}
img{max-width:100%;background:#000}li{margin:.15em 0}code{background:#f2f2f2}"""

EXPLAINED = {
    "cannot be read": "Files that no training could use. Mend them, or name their cases under “exclude”.",
    "leaks": "Shared between what is trained on and what the weights will be scored on: such scores count for nothing.",
    "duplicates": "One scan several times: it weighs more, and may lie in training and validation at once.",
    "same patient": "One patient in several data sets: folds have to keep the cases together (“patient”).",
    "orientation": "A wrong orientation turns left into right.",
    "units": "Intensities that do not mean what the others mean.",
    "header and voxels": "What the reader, or a comparison with the other cases, found odd.",
    "label ids": "Values that the label table does not list.",
    "empty labels": "Nothing is drawn where others have something.",
    "volumes": "Structures far larger or smaller than in the rest of their data set.",
    "fragments": "Labels in more pieces than usual: slips of a brush, thresholds, resampling.",
    "outside the parent": "A tumor that touches nothing of the organ in which it is declared to lie.",
    "labels by a model": "Truth that is not drawn by experts.",
    "licences": "What the data's licences mean for weights.",
}


def page(title: str, facts: Mapping[str, Any], findings: Sequence[Finding], pictures: Mapping[int, bytes]) -> str:
    """HTML text.

    Args:
        facts: what was looked at, a text each: shown as a table.
        pictures: index of a finding -> its PNG.
    """
    rows = "".join(f"<tr><th>{escape(str(key))}</th><td>{escape(str(value))}</td></tr>" for key, value in facts.items())
    parts = [
        f"<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>",
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1><table>{rows}</table>{_overview(findings)}",
    ]
    for kind in [kind for kind, numbers in counts(findings).items() if any(numbers)]:
        parts.append(f"<h2 id='{_anchor(kind)}'>{escape(kind)}</h2><p>{escape(EXPLAINED[kind])}</p>")
        chosen = [(index, one) for index, one in enumerate(findings) if one.kind == kind]
        parts += [_figure(one, pictures[index]) for index, one in chosen if index in pictures]
        plain = [f"<li>{_line(one)}</li>" for index, one in chosen if index not in pictures]
        parts.append(f"<ul>{''.join(plain)}</ul>" if plain else "")
    return "\n".join([*parts, "</body></html>\n"])


def counts(findings: Sequence[Finding]) -> dict[str, list[int]]:
    """Kind -> number of findings of each severity; kinds in the page's order, those without findings too."""
    found = Counter((one.kind, one.severity) for one in findings)
    return {kind: [found[kind, severity] for severity in SEVERITIES] for kind in EXPLAINED}


def _overview(findings: Sequence[Finding]) -> str:
    head = "<tr><th></th>" + "".join(f"<th class='{severity}'>{severity}s</th>" for severity in SEVERITIES) + "</tr>"
    rows = []
    for kind, numbers in counts(findings).items():
        cells = "".join(f"<td class='{s}'>{n or ''}</td>" for s, n in zip(SEVERITIES, numbers, strict=True))
        name = f"<a href='#{_anchor(kind)}'>{escape(kind)}</a>" if any(numbers) else escape(kind)
        rows.append(f"<tr><td>{name}</td>{cells}</tr>")
    return f"<table>{head}{''.join(rows)}</table>"


def _anchor(kind: str) -> str:
    return kind.replace(" ", "-")


def _line(finding: Finding) -> str:
    where = " and ".join(f"{dataset}/{case}" for dataset, case in finding.cases) or finding.dataset
    return f"<b class='{finding.severity}'>{escape(where)}</b>: {escape(finding.message)}"


def _figure(finding: Finding, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    return f"<figure><img alt='' src='data:image/png;base64,{data}'><figcaption>{_line(finding)}</figcaption></figure>"
