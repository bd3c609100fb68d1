"""Samples that an import leaves out, each counted under its filter's name."""

import json

import pytest
from PIL import Image

from latentsmith.cli import main
from latentsmith.data.errors import BadSample
from latentsmith.data.filters import Filters
from latentsmith.files.errors import BadInput

KNOWN = {"aesthetic": 5.5, "language": "en", "score": "7", "nothing": None}


@pytest.mark.parametrize(
    ("filters", "size", "caption", "reason"),
    [
        ({}, (1, 1), "x", None),
        ({"min_size": 16}, (16, 99), "x", None),
        ({"min_size": 16}, (99, 15), "x", "too small"),
        ({"max_size": 16}, (16, 99), "x", None),
        ({"max_size": 16}, (17, 99), "x", "too large"),
        ({"max_aspect": 2.0}, (20, 10), "x", None),
        ({"max_aspect": 2.0}, (10, 21), "x", "too elongated"),
        ({"min_caption": 3}, (9, 9), "abc", None),
        ({"min_caption": 3}, (9, 9), "ab", "caption too short"),
        ({"max_caption": 3}, (9, 9), "abcd", "caption too long"),
        ({"where": ("aesthetic>=5.5", "aesthetic<6", "language=en", "score>6.5", "language!=de")}, (9, 9), "x", None),
        ({"where": ("aesthetic>5.5",)}, (9, 9), "x", "not aesthetic>5.5"),
        ({"where": ("language=de",)}, (9, 9), "x", "not language=de"),
        ({"where": ("language>a",)}, (9, 9), "x", "not language>a"),
        ({"where": ("gone=1",)}, (9, 9), "x", "not gone=1"),
        ({"where": ("gone!=1",)}, (9, 9), "x", "not gone!=1"),
        ({"where": ("nothing=None",)}, (9, 9), "x", "not nothing=None"),
        ({"where": (" score <= 7.0 ",)}, (9, 9), "x", None),
    ],
)
def test_each(filters, size, caption, reason):
    check = Filters(**filters)
    if reason is None:
        check.check(size, caption, KNOWN)
    else:
        with pytest.raises(BadSample) as caught:
            check.check(size, caption, KNOWN)
        assert caught.value.reason == reason


def test_what_is_no_condition():
    with pytest.raises(BadInput, match="'language' is no condition; write KEY=VALUE"):
        Filters(where=("language",))


def test_the_command_counts_each(tmp_path, capsys):
    rows = [
        {"file_name": "a.png", "text": "good", "language": "en", "aesthetic": 6},
        {"file_name": "b.png", "text": "plain", "language": "en", "aesthetic": 4},
        {"file_name": "c.png", "text": "fremd", "language": "de", "aesthetic": 6},
        {"file_name": "d.png", "text": "wide", "language": "en", "aesthetic": 6},
    ]
    for row in rows:
        Image.new("RGB", (64 if row["text"] == "wide" else 16, 16)).save(tmp_path / row["file_name"])
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--where", "language=en", "--where", "aesthetic>=5", "--max-aspect", "2"]
    assert main(["data", "import", str(tmp_path), str(tmp_path / "out"), *arguments]) == 0
    output = capsys.readouterr().out
    for line in ("1 samples in 1 shards, 3 set aside", "1 not aesthetic>=5", "1 not language=en", "1 too elongated"):
        assert line in output
    assert main(["data", "import", str(tmp_path), str(tmp_path / "x"), "--where", "language"]) == 2
