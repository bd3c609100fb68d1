"""Pages: their charts are figures that Plotly takes, and Plotly is written once."""

import html
import json
import math
import re

import plotly.graph_objects
import pytest

from latentsmith.html_report import PLOTLY_FILE, Line, chart, image_row, running_mean, table, thinned, write_report

STEPS = range(1, 2001)


def figure_of(text):
    return json.loads(html.unescape(re.fullmatch(r"<div class='chart' data-figure='(.*)'></div>", text)[1]))


def falling(start, end):
    return [(step, start * (end / start) ** (step / 2000)) for step in STEPS]


def test_a_chart_is_a_figure_with_titles_and_units():
    figure = figure_of(chart([Line("dots", falling(1, 0.1), dots=True), Line("mean", falling(1, 0.1))], "samples/s"))
    known = plotly.graph_objects.Figure(figure)  # refuses a key or value that Plotly does not have
    assert known.layout.xaxis.title.text == "optimizer step" and known.layout.yaxis.title.text == "samples/s"
    assert [trace.mode for trace in known.data] == ["markers", "lines"] and known.data[1].x[-1] == 2000


@pytest.mark.parametrize(("low", "high"), [(0.03, 1.2), (0.05, 0.7), (1e-5, 3), (0.2, 0.29)])
def test_logarithmic_axes_have_a_few_ticks(low, high):
    axis = figure_of(chart([Line("loss", falling(high, low))], "loss", log=True))["layout"]["yaxis"]
    assert axis["type"] == "log"
    if "tickvals" in axis:
        assert 3 <= sum(low <= tick <= high for tick in axis["tickvals"]) <= 8


def test_values_that_cannot_be_drawn_are_left_out():
    points = [(1, 0.5), (2, math.nan), (3, math.inf), (4, -1.0), (5, 0.0), (6, 0.25)]
    assert figure_of(chart([Line("loss", points)], "loss", log=True))["data"][0]["x"] == [1, 6]
    assert figure_of(chart([Line("loss", points)], "loss"))["data"][0]["x"] == [1, 4, 5, 6]
    assert chart([Line("loss", points[:4])], "loss", log=True) == "<p>too few steps for a curve</p>"


def test_many_points_are_thinned():
    points = list(range(10_000))
    assert len(thinned(points, 1500)) == 1500 and thinned(points, 1500)[0] == 0 and thinned(points, 1500)[-1] == 9999
    assert thinned(points[:5], 6) == points[:5] and thinned([], 6) == []


def test_running_mean():
    assert running_mean([(1, 2.0), (2, 4.0), (3, 0.0)], keep=0.5) == [(1, 2.0), (2, 3.0), (3, 1.5)]


def test_plotly_is_written_once_and_the_page_is_small(tmp_path):
    page = tmp_path / "report.html"
    write_report(page, "a <run>", [("Loss & more", chart([Line("loss", falling(1, 0.1))], "loss"))])
    library = tmp_path / PLOTLY_FILE
    written = library.stat().st_mtime_ns
    write_report(page, "a <run>", [("Loss & more", chart([Line("loss", falling(1, 0.1))], "loss"))])
    assert library.stat().st_mtime_ns == written and page.stat().st_size < 40_000 < library.stat().st_size
    text = page.read_text()
    assert "<h1>a &lt;run&gt;</h1>" in text and "<h2>Loss &amp; more</h2>" in text and "http" not in text


def test_each_image_of_a_row_is_shown_above_its_prompt(tmp_path):
    row = image_row(tmp_path / "samples" / "a b.png", tmp_path / "report.html", (192, 64), ["one", "<two>", "three"])
    assert re.findall(r"object-position: ([\d.]+)%", row) == ["0.0000", "50.0000", "100.0000"]
    assert re.findall(r"<figcaption>(.*?)</figcaption>", row) == ["one", "&lt;two&gt;", "three"]
    assert row.count("src='samples/a%20b.png' style='aspect-ratio: 64 / 64;") == 3


def test_a_table_scrolls_in_its_own_box():
    text = table(["step", "loss"], [["2,000", "<0.1"]])
    assert text.startswith("<div class='scroll'><table><tr><th>step</th>") and "<td>&lt;0.1</td>" in text
