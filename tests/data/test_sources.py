import csv
import io
import json
import os
import pickle

import pytest
import webdataset

from latentsmith.data.errors import BadSample
from latentsmith.data.shards import ShardWriter
from latentsmith.data.sources import open_source
from latentsmith.data.storage import OUTSIDE, Access
from latentsmith.files.errors import BadInput
from latentsmith.files.regular import TABLE_LINE


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


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize("as_imagefolder", [True, False])
def test_tables(tmp_path, png, suffix, as_imagefolder):
    rows = [
        {"file_name": f"images/{i}.png", "text": f'a "quoted",\nbroken caption {i}', "score": str(i)} for i in range(3)
    ]
    table = tmp_path / f"metadata.{suffix}"
    if suffix == "jsonl":
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
    with pytest.raises(BadSample, match=r"line 2 of t\.jsonl: holds no image"):
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
            "holds addresses of images, not images; fetch them with img2dataset",
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


@pytest.mark.parametrize(
    "name", ["metadata.jsonl", "metadata.csv", "t.jsonl", "t.csv", "t.parquet", "wdinfo.pkl", "t.tar"]
)
@pytest.mark.parametrize("special", ["FIFO", "device"])
def test_what_is_no_regular_file_is_no_source(tmp_path, limited, name, special):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    os.mkfifo(tmp_path / name) if special == "FIFO" else (tmp_path / name).symlink_to("/dev/zero")
    sources = [tmp_path / name]
    if name.endswith(".tar"):
        sources += [tmp_path, tmp_path / "t*.tar"]
    elif name.startswith("metadata"):
        sources += [tmp_path]
    for source in sources:
        with pytest.raises(BadInput, match=f"{name}: (is a {special}|is a character device|a link out)"):
            open_source(source)


@pytest.mark.parametrize("name", ["set.json", "shard-000000.tar", "shard-000000.index.npy"])
def test_no_file_of_a_set_may_be_a_fifo_or_lie_outside(tmp_path, png, limited, name):
    folder = tmp_path / "set"
    folder.mkdir()
    with ShardWriter(folder) as writer:
        writer.write("s", {"png": png(), "txt": b"words"})
    if name == "set.json":
        record = {"file": "shard-000000.tar", "samples": 1, "bytes": 0, "checksum": ""}
        (folder / name).write_text(json.dumps({"shards": [record]}))
    sources = [folder] if name == "set.json" else [folder, folder / "shard-*.tar"]
    (folder / name).rename(tmp_path / "away")
    os.mkfifo(folder / name)
    for source in sources:
        with pytest.raises(BadInput, match="is a FIFO"):
            open_source(source)
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "away")
    for source in sources:
        with pytest.raises(BadInput, match="link out of the source folder; --follow-links"):
            open_source(source)
        assert len(open_source(source, Access(follow_links=True))) == 1


@pytest.mark.parametrize("tar", ["../a.tar", "{tmp_path}/a.tar"])
def test_lists_of_tars_stay_in_their_folder(tmp_path, tar):
    (tmp_path / "in").mkdir()
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        writer.write({"__key__": "a", "jpg": b"x", "txt": b"words"})
    tar = tar.format(tmp_path=tmp_path)
    (tmp_path / "in" / "wdinfo.pkl").write_bytes(pickle.dumps({"tar_files": [tar]}))
    with pytest.raises(BadInput, match="outside the source folder; --allow-outside"):
        open_source(tmp_path / "in" / "wdinfo.pkl")
    assert len(open_source(tmp_path / "in" / "wdinfo.pkl", Access(allow_outside=True))) == 1


def test_the_user_may_name_a_link(tmp_path, png):
    """What the command was given is read; what its folder holds decides the rest."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png())
    (tmp_path / "elsewhere").write_text("file_name,text\na.png,one\n")
    (tmp_path / "in" / "t.csv").symlink_to("../elsewhere")
    (tmp_path / "in" / "metadata.csv").symlink_to("../elsewhere")
    (item,) = open_source(tmp_path / "in" / "t.csv").items()
    assert item.image() == png()
    with pytest.raises(BadInput, match=r"metadata\.csv: a link out of the source folder"):
        open_source(tmp_path / "in")


def test_an_address_of_this_machine_is_a_folder_of_it(tmp_path, png):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(png())
    (tmp_path / "in" / "a.png").symlink_to("../secret")
    (item,) = open_source(f"file://{tmp_path}/in").items()
    with pytest.raises(BadSample) as error:
        item.image()
    assert error.value.reason == OUTSIDE


def test_only_links_out_of_a_folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "images").symlink_to("/")
    with pytest.raises(BadInput, match="in/images: a link out of the source folder; --follow-links reads it"):
        open_source(tmp_path / "in")


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_table_without_line_ends_is_not_held_in_memory(tmp_path, limited, suffix):
    with open(tmp_path / f"t.{suffix}", "wb") as file:
        file.truncate(8 * 2**30)
    with pytest.raises(BadInput, match=f"line 1 has more than {TABLE_LINE.size:,} characters"):
        open_source(tmp_path / f"t.{suffix}")
