"""Draws the page of an audit as a picture, for docs/audit.png: python docs/draw_audit.py AUDIT_FOLDER [OUTPUT]."""

import base64
import io
import re
import sys
from html import unescape
from pathlib import Path
from textwrap import fill

import matplotlib.image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLORS = {"error": "#b00020", "warning": "#9a5b00", "note": "#445566"}


def plain(html: str) -> str:
    """HTML without its tags."""
    return unescape(re.sub(r"<[^>]+>", "", html))


def main(folder: str, output: str = "docs/audit.png") -> None:
    """The table of the page's head, and the first picture of every kind of finding."""
    page = Path(folder, "audit.html").read_text(encoding="utf-8")
    table = re.findall(r"<table>.*?</table>", page, re.DOTALL)[1]
    rows = [[plain(cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", row)] for row in table.split("</tr>")[:-1]]
    shown = []
    for section in page.split("<h2")[1:]:
        figure = re.search(r"base64,([^']+)'><figcaption><b class='(\w+)'>(.*?)</figcaption>", section, re.DOTALL)
        if figure:
            png = matplotlib.image.imread(io.BytesIO(base64.b64decode(figure[1])))
            shown.append((plain("<" + section.split("</h2>")[0]), png, figure[2], plain(figure[3])))
    lines = -(-len(shown) // 2)
    sheet = Figure(figsize=(11, 2.2 + 3.6 * lines), dpi=90, layout="constrained")
    FigureCanvasAgg(sheet)
    axes = sheet.subplots(lines + 1, 2, height_ratios=[2.2] + [3.6] * lines, squeeze=False)
    for one in axes.ravel():
        one.set_axis_off()
    text = "\n".join(f"{row[0]:<22}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows if any(row[1:]))
    axes[0, 0].text(0, 1, "Audit of a pool", fontsize=15, va="top")
    axes[0, 0].text(0, 0.8, text, family="monospace", fontsize=9, va="top")
    for place, (kind, png, severity, caption) in zip(axes[1:].ravel(), shown, strict=False):
        place.imshow(png)
        place.set_title(kind, loc="left", fontsize=11)
        place.text(
            0, -0.03, fill(caption, 88)[:420], transform=place.transAxes, fontsize=7.5, va="top", color=COLORS[severity]
        )
    sheet.savefig(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
