"""JSON from elsewhere: an object, or one line that names the file."""

import os

import pytest

from latentsmith.files.errors import BadInput
from latentsmith.files.json import parse_json, read_json
from latentsmith.files.regular import SizeLimit


def test_an_object_is_returned(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, "ä"]}', "utf-8")
    assert read_json(tmp_path / "a.json", "a set") == {"a": [1, "ä"]} == parse_json('{"a": [1, "ä"]}', "x", "a set")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.json: is not a set: not JSON"),
        (b"{", "a.json: is not a set: not JSON"),
        (b'{"a": "\xff"}', "a.json: is not a set: not JSON"),
        (b"[" * 200_000, "a.json: is not a set: not JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "a.json: is not a set: not JSON"),
        (b"[1]", "a.json: is not a set: it holds a list, a JSON object was expected"),
        (b"{}" + b" " * 100_000, "more than the 90,000 allowed for a test"),
    ],
    ids=["empty", "unfinished", "utf-8", "deep", "digits", "list", "large"],
)
def test_anything_else_is_one_line(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    limit = SizeLimit("a test", 90_000) if "allowed" in message else SizeLimit("a test", 10**6)
    with pytest.raises(BadInput) as error:
        read_json(path, "a set", limit=limit)
    assert message in str(error.value) and "\n" not in str(error.value) and str(path) in str(error.value)


def test_missing_files_and_fifos(tmp_path):
    with pytest.raises(BadInput, match=r"none\.json: no such file; a set was expected"):
        read_json(tmp_path / "none.json", "a set")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BadInput, match="is a FIFO"):
        read_json(tmp_path / "fifo", "a set")
