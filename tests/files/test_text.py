"""Text as people save it."""

import pytest

from latentsmith.cli.generate import _read_prompts
from latentsmith.data.sample_io import caption_of
from latentsmith.data.shards import ShardSet, ShardWriter
from latentsmith.data.sources import open_source
from latentsmith.files.errors import BadInput
from latentsmith.files.text import NotText, decode_text, is_visible
from latentsmith.inference.coco_captions import read_captions

LINES = "a café\r\nein Größe 12\rthird\n"
SAVED = {
    "utf-8": LINES.encode(),
    "utf-8 with mark": b"\xef\xbb\xbf" + LINES.encode(),
    "utf-16": b"\xff\xfe" + LINES.encode("utf-16-le"),
    "utf-16 big": b"\xfe\xff" + LINES.encode("utf-16-be"),
    "utf-32": LINES.encode("utf-32"),
}
READ = "a café\nein Größe 12\nthird\n"


@pytest.mark.parametrize("encoding", SAVED)
def test_every_encoding_with_a_mark(encoding, tmp_path):
    """In a file beside an image, in a tar at import and in training, in prompts and in a folder of captions."""
    assert decode_text(SAVED[encoding], "x") == READ
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.txt").write_bytes(SAVED[encoding])
    with ShardWriter(tmp_path / "tars") as writer:
        writer.write("a", {"png": b"x", "txt": SAVED[encoding]})
    beside, packed = open_source(tmp_path), open_source(tmp_path / "tars")
    texts = [next(source.items()).caption() for source in (beside, packed)]
    assert [*texts, caption_of(ShardSet(tmp_path / "tars")[0])] == [READ] * 3
    wanted = READ.strip().split("\n")
    assert _read_prompts(tmp_path / "a.txt") == read_captions(tmp_path, None) == wanted


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"red\na caf\xe9", r'x: not UTF-8 text \(byte 0xE9 after "a caf"\); save it as UTF-8'),
        (b"\xe9", r"x: not UTF-8 text \(byte 0xE9\)"),
        (b"\xff\xfea", "x: not UTF-16 text at byte"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "x: a Git LFS pointer"),
    ],
)
def test_other_bytes_are_named(data, message, tmp_path):
    with pytest.raises(NotText, match=message):
        decode_text(data, "x")
    (tmp_path / "p.txt").write_bytes(data)
    for read in (_read_prompts, lambda path: read_captions(path.parent, None)):
        with pytest.raises(BadInput, match=message.replace("x:", "p.txt:", 1)):
            read(tmp_path / "p.txt")


def test_a_caption_that_training_cannot_read_names_tar_and_key(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.write("k7", {"png": b"x", "txt": b"a caf\xe9"})
    with pytest.raises(BadInput, match=r"shard-000000\.tar: sample 'k7': \.txt: not UTF-8 text \(byte 0xE9"):
        caption_of(ShardSet(tmp_path)[0])


def test_what_shows_nothing_is_blank(tmp_path):
    for text in (
        "",
        " \u00a0\u3000",
        "\u200b",
        "\ufeff\ufeff",
        "\u2060",
        "\u200d",
        "\u2800",
        "\u3164",
        "\u0301",
        "\ufe0f",
    ):
        assert not is_visible(text), ascii(text)
    for text in (",", "\N{DOG FACE}", "ü", "1", "漢"):
        assert is_visible(text)
    (tmp_path / "p.txt").write_text("\ufeff\u200b\n \u2060\n\ufeffa dog\u200b \n", encoding="utf-8")
    assert _read_prompts(tmp_path / "p.txt") == ["a dog"]
