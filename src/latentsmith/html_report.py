"""report.html: one file that shows what a run made, with its pictures inside."""

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from latentsmith.files.atomic import write_text

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
img { max-width: 100%; image-rendering: pixelated; display: block; margin: .3rem 0 }
table { border-collapse: collapse } td, th { padding: .2rem .9rem .2rem 0 }
td, th { text-align: left; border-bottom: 1px solid #ddd }
pre { background: #f5f5f2; padding: .8rem; overflow-x: auto } figcaption { color: #666; font-size: .85rem }
"""


def write_report(path: Path, title: str, sections: Sequence[tuple[str, str]]) -> None:
    """Write a page of (heading, HTML) sections."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>\n{content}\n" for heading, content in sections)
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>"
    write_text(
        path, f"<!doctype html><html><head>{head}</head><body><h1>{html.escape(title)}</h1>\n{body}</body></html>\n"
    )


def picture(path: Path, caption: str = "", width: int | None = None) -> str:
    """A PNG as a figure, its bytes inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    size = f" width='{width}'" if width else ""
    note = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure style='margin:.6rem 0'>{note}<img{size} src='data:image/png;base64,{data}'></figure>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def code(lines: Iterable[str]) -> str:
    return "<pre>" + html.escape("\n".join(lines)) + "</pre>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def curve(rows: Sequence[Mapping[str, float]], name: str, *, width: int = 900, height: int = 260) -> str:
    """A value of every row above 0 as dots over its `step`, and its running mean as a line: an SVG, logarithmic in the
    value."""
    points = [(row["step"], row[name]) for row in rows if 0 < row.get(name, 0) < math.inf]
    if len(points) < 2:
        return paragraph("too few steps for a curve")
    lows, highs = min(value for _, value in points), max(value for _, value in points)
    low, high = math.log(lows), math.log(highs) + 1e-9
    last = points[-1][0]

    def place(step: float, value: float) -> str:
        x = 50 + (width - 60) * step / last
        y = 10 + (height - 40) * (high - math.log(value)) / (high - low)
        return f"{x:.1f},{y:.1f}"

    dots = "".join("<circle cx='{}' cy='{}' r='1.5' fill='#bbb'/>".format(*place(*p).split(",")) for p in points)
    line = " ".join(place(step, mean) for step, mean in running_mean(points))
    axis = f"<text x='2' y='18'>{highs:.3g}</text><text x='2' y='{height - 32}'>{lows:.3g}</text>"
    axis += f"<text x='50' y='{height - 8}'>0</text><text x='{width - 60}' y='{height - 8}'>{last:,.0f} steps</text>"
    mean = f"<polyline points='{line}' fill='none' stroke='#c2410c' stroke-width='2'/>"
    return f"<svg viewBox='0 0 {width} {height}' font-size='12' fill='#666'>{dots}{mean}{axis}</svg>"


def running_mean(points: Sequence[tuple[float, float]], kept: float = 0.95) -> list[tuple[float, float]]:
    """Points with each value replaced by an exponential mean of those up to it."""
    means, mean = [], points[0][1]
    for step, value in points:
        mean = kept * mean + (1 - kept) * value
        means.append((step, mean))
    return means
