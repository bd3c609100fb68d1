"""Results of an evaluation on disk: results.json, results.csv, report.html with charts and sheets, curve.png."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from latentsmith import html_report
from latentsmith.files.atomic import atomic_open, write_text
from latentsmith.html_report import Line, chart
from latentsmith.inference.sheets import labelled_sheet

from .curve import curve_image
from .images import Images
from .intervals import LEVEL, Estimate
from .measure import METRICS
from .neighbours import nearest_neighbours
from .sweep import Results, Row

SHOWN = 16  # images of a sheet
THUMBNAIL = 128
COLUMNS = ("model", "guidance", "images", "metric", "value", "low", "high")
DISTANCES = ("fid", "frechet_distance")  # names that the curve's y axis can have


def write_results(results: Results, out: Path) -> None:
    """Write all files to a folder. The same measurements give the same bytes of results.json and results.csv."""
    write_text(out / "results.json", json.dumps(results.to_json(), indent=1, allow_nan=False) + "\n")
    write_text(out / "results.csv", table_of(results))
    points = curve_points(results.rows)
    if len(points) > 1:
        with atomic_open(out / "curve.png") as file:
            curve_image(points, "CLIP score", distance_name(results.rows[0])).save(file, format="PNG")
        rows = [f"{row.scale},{x!r},{y!r}" for row, (x, y) in zip(results.rows, points, strict=True)]
        write_text(out / "curve.csv", "\n".join(["guidance,clip_score,distance", *rows]) + "\n")
    write_page(results, out / "report.html")


def table_of(results: Results) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for source, rows in ((results.source, results.rows), (results.other, results.other_rows)):
        for row in rows:
            for name, each in row.values.items():
                bounds = ("" if bound is None else repr(bound) for bound in (each.low, each.high))
                writer.writerow([source, "" if row.scale is None else f"{row.scale:g}", row.found.images, name,
                                 repr(each.value), *bounds])  # fmt: skip
    return text.getvalue()


def distance_name(row: Row) -> str:
    """Return the name of the Frechet distance of features among a row's values, "" without one."""
    return next((name for name in row.sampled if name.split(" ")[0] in DISTANCES), "")


def curve_points(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """Return (CLIP score, distance) of each guidance scale."""
    name = distance_name(rows[0])
    if not name or any("clip_score" not in row.sampled for row in rows):
        return []
    return [(row.sampled["clip_score"].value, row.sampled[name].value) for row in rows]


def write_page(results: Results, page: Path) -> None:
    rows = results.rows
    sections = [("Values", values_table(rows) + intervals_note(results))]
    if len(points := curve_points(rows)) > 1:
        line = [Line("", points)]
        drawn = chart(line, distance_name(rows[0]), x_title="CLIP score")
        scales = ", ".join(f"{row.scale:g}" for row in rows)
        sections.append(("Distance against CLIP score", drawn + html_report.paragraph(f"Guidance {scales}, in order.")))
    if len(rows) > 1:
        sections.append(("Values by guidance", "".join(guidance_chart(rows, name) for name in rows[0].sampled)))
    if results.other_rows:
        sections.append((f"Compared with {results.other}", comparison(results)))
    for row in rows:
        title = "" if row.scale is None else f", guidance {row.scale:g}"
        sections += [
            (heading + title, html_report.image(path, page, note)) for heading, path, note in sheets(row, page)
        ]
    sections.append(("How it was measured", html_report.code(settings_lines(results))))
    html_report.write_report(page, f"Evaluation of {Path(results.source).name}", sections)


def guidance_text(row: Row) -> str:
    return "" if row.scale is None else f"{row.scale:g}"


def values_table(rows: Sequence[Row]) -> str:
    header = ["metric", *(f"guidance {guidance_text(row)}" if row.scale is not None else "value" for row in rows)]
    cells = [[f"{name}{arrow(name)}", *(str(row.values[name]) for row in rows)] for name in rows[0].sampled]
    return html_report.table(header, cells)


def arrow(name: str) -> str:
    """Return which direction is better, as an arrow after a value's name."""
    lower = next((each.lower for metric, each in METRICS.items() if name.split(" ")[0] in metric.split("_") or
                  name.startswith(metric)), "distance" in name or "memorised" in name)  # fmt: skip
    return " ↓" if lower else " ↑"


def intervals_note(results: Results) -> str:
    first = results.rows[0].found
    lines = [
        f"{first.images:,} images. In brackets: intervals of {LEVEL:.0%} from {results.settings.resamples} resamples "
        "of the images. Distances of few images are too large: compare equal numbers of images only."
    ]
    return "".join(html_report.paragraph(line) for line in [*lines, *sorted(set(first.notes))])


def guidance_chart(rows: Sequence[Row], name: str) -> str:
    points = [(float(row.scale or 0), row.sampled[name].value) for row in rows]
    return html_report.heading(name) + chart([Line(name, points)], name, x_title="guidance")


def comparison(results: Results) -> str:
    """Return a table of differences; those whose interval holds 0 are no evidence of one."""
    cells = []
    for row, other, differences in zip(results.rows, results.other_rows, results.differences(), strict=False):
        for name, difference in differences.items():
            cells.append([guidance_text(row), f"{name}{arrow(name)}", str(row.values[name]), str(other.values[name]),
                          str(difference), verdict(name, difference)])  # fmt: skip
    header = ["guidance", "metric", Path(results.source).name, Path(results.other).name, "difference", ""]
    return html_report.table(header, cells) + html_report.paragraph(
        "The same prompts, seeds and resamples on both sides."
    )


def verdict(name: str, difference: Estimate) -> str:
    if difference.low is None or difference.high is None or difference.low <= 0 <= difference.high:
        return "no clear difference"
    return "better" if (difference.value < 0) == (arrow(name) == " ↓") else "worse"


# ---- Sheets ----


def sheets(row: Row, page: Path) -> list[tuple[str, Path, str]]:
    """Write the sheets of a row beside the page and return (heading, file, note) of each."""
    folder = page.parent / "sheets"
    name = "images" if row.scale is None else f"guidance-{row.scale:g}"
    texts = row.prompts or row.images.names
    random = np.random.default_rng(0).permutation(row.found.images)[:SHOWN].tolist()
    drawn = [("Random images", "random", [(row.images, number, texts[number]) for number in sorted(random)], "")]
    if "features" in row.found.reference_features:
        left, right = (each["features"].all() for each in (row.found.features, row.found.reference_features))
        distances, _ = nearest_neighbours(left, right)
        order = np.argsort(distances, kind="stable")
        for heading, which in (("Nearest to the reference", order[:SHOWN]), ("Farthest", order[::-1][:SHOWN])):
            cells = [(row.images, int(each), f"{distances[each]:.3g} {texts[each]}") for each in which]
            drawn.append((heading, heading.split(" ")[0].lower(), cells, "Distance of features to the nearest one."))
    if row.memorised is not None:
        found, cells = row.memorised, []
        for each in np.argsort(found.distances, kind="stable")[: SHOWN // 2]:
            cells.append((row.images, int(each), f"{found.distances[each]:.3g} {texts[each]}"))
            cells.append((found.training, int(found.nearest[each]), f"training image {found.nearest[each]}"))
        note = f"Pairs, left generated. Below {found.threshold:.3g} counts as memorised."
        drawn.append(("Nearest training images", "memorised", cells, note))
    written = []
    for heading, kind, cells, note in drawn:
        path = folder / f"{name}-{kind}.png"
        write_sheet(cells, path)
        written.append((heading, path, note))
    return written


def write_sheet(cells: Sequence[tuple[Images, int, str]], path: Path) -> None:
    """Write images (by collection and number) above their texts."""
    shown = [(thumbnail(images.read(number)), text, False) for images, number, text in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(path) as file:
        labelled_sheet(shown, columns=min(8, len(shown)), zoom=1).save(file, format="PNG")


def thumbnail(image: Image.Image) -> np.ndarray:
    fitted = image.copy()
    fitted.thumbnail((THUMBNAIL, THUMBNAIL))
    square = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "white")
    square.paste(fitted, ((THUMBNAIL - fitted.width) // 2, (THUMBNAIL - fitted.height) // 2))
    return np.asarray(square)


def settings_lines(results: Results) -> list[str]:
    found = results.to_json()
    lines = [f"from: {results.source}", f"reference: {results.reference or 'none'}"]
    for identity in found["extractors"].values():
        lines.append(f"features: {identity['extractor']}, resize {identity['resize']}, weights {identity['weights']}")
    lines += [f"{name}: {value}" for name, value in found["settings"].items() if value not in (None, "", False)]
    return lines + [f"{name}: {value}" for name, value in found["sampling"].items() if value is not None]
