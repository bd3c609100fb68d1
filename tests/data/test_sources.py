import csv
import io
import json
import pickle

import pytest
import webdataset

from latentsmith.data.errors import BadSample
from latentsmith.data.shards import ShardWriter
from latentsmith.data.sources import open_source
from latentsmith.files.errors import BadInput


def listed(path, start=0):
    return [(item.name, item.caption(), dict(item.extra)) for item in open_source(path).items(start)]


def test_folder_with_captions_beside_the_images(tmp_path, png):
    for name, caption in (
        ("b.photo.png", "second"),
        ("a/x.PNG", "\ufefffirst, with a byte-order mark"),
        ("c.jpg", "third"),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png())
        path.with_suffix(".caption" if name == "c.jpg" else ".txt").write_text(caption, encoding="utf-8")
    (tmp_path / "notes.md").write_text("ignored")
    (tmp_path / ".hidden.png").write_bytes(b"")
    expected = [("a/x.PNG", "first, with a byte-order mark", {}), ("b.photo.png", "second", {}), ("c.jpg", "third", {})]
    assert listed(tmp_path) == expected
    assert listed(tmp_path, 2) == expected[2:]
    assert next(open_source(tmp_path).items()).image() == png()


def test_folder_samples_without_a_partner(tmp_path, png):
    (tmp_path / "alone.png").write_bytes(png())
    (tmp_path / "lost.txt").write_text("a caption")
    alone, lost = open_source(tmp_path).items()
    with pytest.raises(BadSample, match=r"no alone\.txt or alone\.caption beside") as error:
        alone.caption()
    assert error.value.reason == "missing caption"
    with pytest.raises(BadSample, match=r"lost\.txt is a caption without an image") as error:
        lost.image()
    assert error.value.reason == "missing image"


def test_fingerprint_follows_the_listing(tmp_path, png):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png())
    before = open_source(tmp_path).fingerprint()
    assert open_source(tmp_path).fingerprint() == before
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    renamed = open_source(tmp_path).fingerprint()
    (tmp_path / "c.png").write_bytes(png() + b"\0")
    assert len({before, renamed, open_source(tmp_path).fingerprint()}) == 3


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("as_imagefolder", [True, False])
def test_tables(tmp_path, png, kind, as_imagefolder):
    rows = [
        {"file_name": f"images/{i}.png", "text": f'a "quoted",\nbroken caption {i}', "score": str(i)} for i in range(3)
    ]
    table = tmp_path / f"metadata.{kind}"
    if kind == "jsonl":
        table.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    else:
        with open(table, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(png())
    path = tmp_path if as_imagefolder else table
    assert listed(path) == [(row["file_name"], row["text"], {"score": row["score"]}) for row in rows]
    assert len(open_source(path)) == 3
    absent, present = open_source(path).items(0), next(open_source(path).items(1))
    assert present.image() == png()
    with pytest.raises(BadSample, match=r"0\.png: No such file") as error:
        next(absent).image()
    assert error.value.reason == "missing image"


def test_other_column_names(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"id": 7, "image": "x.png", "caption": "hello"}\n{"image": null}\n')
    first, second = open_source(tmp_path / "t.jsonl").items()
    assert (first.name, first.caption(), first.extra) == ("x.png", "hello", {"id": 7})
    with pytest.raises(BadSample, match=r"line 2 of t\.jsonl: no image"):
        second.image()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", "", "an empty table"),
        ("t.csv", "", "an empty table"),
        ("t.csv", "file_name,text\n", "an empty table"),
        ("t.jsonl", '{"file_name": "a", "text": "b"}\n{"file_name": \n', r"t\.jsonl: line 2 is not JSON"),
        ("t.jsonl", "\x00\x01\x02", "line 1 is not JSON"),
        ("t.jsonl", '["a", "b"]', "line 1 is list, not a JSON object"),
        ("t.csv", "file_name,text\na.png,one\nb.png\n", r"t\.csv: line 3 has not the header's 2 fields"),
        ("t.csv", "file_name,text\na.png,one,two,three\n", "line 2 has not the header's 2 fields"),
        ("t.csv", "file_name,text\na.png," + "x" * 200_000, r"line \d is not CSV"),
        (
            "t.jsonl",
            '{"url": "a", "text": "b"}',
            "no column for the image's path among url, text; name it one of",
        ),
        ("t.csv", "file_name,label\na,b\n", "no column for the caption among file_name, label"),
        ("t.parquet", "PAR1", "not readable as parquet"),
        ("t.tar", "garbage" * 100, r"t\.tar: .*garbage"),
    ],
)
def test_bad_tables(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=message):
        list(open_source(tmp_path / name).items())


def test_no_source(tmp_path):
    with pytest.raises(BadInput, match="no such folder or file"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="no images here; known extensions: jpg"):
        open_source(tmp_path)


def test_webdataset_tars_as_img2dataset_leaves_them(tmp_path, png):
    with webdataset.TarWriter(str(tmp_path / "00000.tar"), encoder=False) as writer:
        meta = {"caption": "from the json", "key": "a", "width": 40}
        writer.write({"__key__": "a", "jpg": png(), "txt": b"from the text", "json": json.dumps(meta).encode()})
        writer.write({"__key__": "b", "webp": png(), "json": json.dumps(meta).encode()})
        writer.write({"__key__": "c", "txt": b"\xff\xfe binary"})
    (tmp_path / "00000.parquet").write_bytes(io.BytesIO(b"PAR1").getvalue())
    a, b, c = open_source(tmp_path).items()
    assert (a.name, a.caption(), a.image(), a.extra) == ("a.jpg", "from the text", png(), meta)
    assert (b.name, b.caption()) == ("b.webp", "from the json")
    with pytest.raises(BadSample, match="c: members txt, none an image"):
        c.image()


def test_nemos_list_of_tars(tmp_path):
    with ShardWriter(tmp_path, samples_per_shard=2) as writer:
        for number in range(4):
            writer.write(f"s{number}", {"jpg": b"x", "txt": b"words"})
    listing = {"tar_files": ["shard-000001.tar"], "chunk_size": 2, "total_key_count": 2}
    (tmp_path / "wdinfo.pkl").write_bytes(pickle.dumps(listing))
    assert [item.name for item in open_source(tmp_path / "wdinfo.pkl").items()] == ["s2.jpg", "s3.jpg"]
