"""report.html: a small page beside the images it shows and one copy of Plotly; nothing is fetched to look at it."""

import html
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from latentsmith.files.atomic import write_text

PLOTLY_FILE = "plotly.min.js"
LARGEST = 1e300  # of a charted value: rounding one near the largest float to five digits gives infinity
COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#0f766e", "#be185d")  # of lines, in their order
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.6rem; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
h3 { font-size: 1rem; margin: 1rem 0 .3rem }
figure { margin: 0 } figcaption { color: #555; font-size: .85rem; line-height: 1.3; margin-top: .2rem }
img { max-width: 100%; display: block } img.pixels { image-rendering: pixelated; width: 100%; object-fit: cover }
.chart { height: 320px; width: 100% }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(8rem, 40%), 1fr)); gap: .8rem }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .6rem 1rem; margin: 0 }
dt { color: #555; font-size: .85rem } dd { margin: 0 } dd, td, th { font-variant-numeric: tabular-nums }
.scroll { overflow-x: auto; margin-top: .8rem } table { border-collapse: collapse; white-space: nowrap }
td, th { padding: .2rem 1rem .2rem 0; text-align: left; border-bottom: 1px solid #ddd }
pre { background: #f5f5f2; padding: .8rem; overflow-x: auto; font-size: .85rem }
"""
SCRIPT = f"""
for (const chart of document.querySelectorAll(".chart")) {{
  const figure = JSON.parse(chart.dataset.figure)
  if (window.Plotly) Plotly.newPlot(chart, figure.data, figure.layout, {{responsive: true, displayModeBar: false}})
  else chart.textContent = "To see this chart, keep {PLOTLY_FILE} beside this page."
}}
"""


@dataclass(frozen=True)
class Line:
    """One curve of a chart. points: (x, y); those that are not finite are left out. dots: draw no line between them."""

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


def write_report(path: Path, title: str, sections: Sequence[tuple[str, str]]) -> None:
    """Write a page of (heading, HTML) sections, and Plotly beside it unless it is there."""
    from plotly.offline import get_plotlyjs

    body = "".join(f"<h2>{html.escape(heading)}</h2>\n{content}\n" for heading, content in sections)
    head = (
        "<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><script src='{PLOTLY_FILE}'></script>"
    )
    library = path.with_name(PLOTLY_FILE)
    if not library.exists():  # 5 MB, once
        write_text(library, get_plotlyjs())
    write_text(
        path,
        f"<!doctype html><html lang='en'><head>{head}</head>\n<body><h1>{html.escape(title)}</h1>\n{body}"
        f"<script>{SCRIPT}</script></body></html>\n",
    )


def chart(lines: Sequence[Line], y_title: str, *, x_title: str = "optimizer step", log: bool = False) -> str:
    """Return a chart of lines. log: a logarithmic y axis, without the values that are not above 0."""
    traces: list[dict[str, Any]] = []
    colours = iter(COLOURS)
    for line in lines:
        points = [(x, y) for x, y in line.points if abs(y) < LARGEST and (y > 0 or not log)]
        look: dict[str, Any] = {"mode": "markers", "marker": {"size": 4, "color": "#bbb"}}
        if not line.dots:
            look = {"mode": "lines", "line": {"width": 2, "color": next(colours)}}
        x, y = [short(x) for x, _ in points], [short(y) for _, y in points]
        traces.append({"type": "scatter", "name": line.name, "x": x, "y": y, "hovertemplate": "%{y:.4~g}", **look})
    if all(len(trace["x"]) < 2 for trace in traces):
        return paragraph("too few steps for a curve")
    axis = {"gridcolor": "#eee", "linecolor": "#999", "ticks": "outside", "automargin": True, "zeroline": False}
    layout = {
        "xaxis": {**axis, "title": {"text": x_title}, "tickformat": ",~r", "hoverformat": ",~r", "rangemode": "tozero"},
        "yaxis": {**axis, "title": {"text": y_title}, "tickformat": "~g", **(log_axis(traces) if log else {})},
        "margin": {"l": 10, "r": 25, "t": 30, "b": 10},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "showlegend": len(traces) > 1,
        "hovermode": "x unified",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#444"},
    }
    figure = json.dumps({"data": traces, "layout": layout}, separators=(",", ":"))
    return f"<div class='chart' data-figure='{html.escape(figure)}'></div>"


def log_axis(traces: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a logarithmic axis with at least three ticks; Plotly's own lie over one another between two decades."""
    values = [y for trace in traces for y in trace["y"]]
    powers = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    for digits in ((1,), (1, 2, 5), (1, 2, 3, 4, 5, 7)):
        ticks = [digit * 10.0**power for power in powers for digit in digits]
        if sum(min(values) <= tick <= max(values) for tick in ticks) >= 3:
            return {"type": "log", "tickvals": ticks}
    return {"type": "log", "nticks": 5}


def short(value: float) -> float:
    """Return a number to five digits, and a whole number as an int: JSON then has no decimal point."""
    return int(value) if float(value).is_integer() else float(f"{value:.5g}")


def running_mean(points: Sequence[tuple[float, float]], keep: float = 0.95) -> list[tuple[float, float]]:
    """Return the points with each value replaced by an exponential mean of those up to it."""
    means: list[tuple[float, float]] = []
    for x, y in points:
        means.append((x, keep * means[-1][1] + (1 - keep) * y if means else y))
    return means


def thinned(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most `most` items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]


def image(path: Path, page: Path, caption: str = "") -> str:
    """Return an image file as a figure of the page `page`, which lies in its folder or above."""
    note = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure><img class='pixels' src='{source(path, page)}' alt='{html.escape(caption)}'>{note}</figure>"


def image_row(path: Path, page: Path, size: tuple[int, int], captions: Sequence[str]) -> str:
    """Return images that lie side by side in one file, each above its caption. size: (width, height) of the file."""
    width, height = size[0] / len(captions), size[1]
    cells = []
    for number, caption in enumerate(captions):
        across = 100 * number / max(1, len(captions) - 1)
        style = f"aspect-ratio: {width:g} / {height}; object-position: {across:.4f}% 0"
        picked = f"<img class='pixels' src='{source(path, page)}' style='{style}' alt='{html.escape(caption)}'>"
        cells.append(f"<figure>{picked}<figcaption>{html.escape(caption)}</figcaption></figure>")
    return f"<div class='images'>{''.join(cells)}</div>"


def source(path: Path, page: Path) -> str:
    """Return the address of a file, relative to a page."""
    return quote(Path(os.path.relpath(path, page.parent)).as_posix())


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in a box of its own, which scrolls where it is wider than the page."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<div class='scroll'><table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table></div>"


def figures(values: Mapping[str, str]) -> str:
    """Return named numbers, as many side by side as the page has room for."""
    cells = (f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in values.items())
    return f"<dl class='figures'>{''.join(cells)}</dl>"


def heading(text: str) -> str:
    return f"<h3>{html.escape(text)}</h3>"


def code(lines: Iterable[str]) -> str:
    return "<pre>" + html.escape("\n".join(lines)) + "</pre>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"
