"""Folders as people have them: odd extensions, leftovers of systems, tables that leave images out, splits."""

import gzip
import io
import json
import pickle
import tarfile

import pytest
from PIL import Image

from latentsmith.cli import main
from latentsmith.data.dataset import TrainingSet, tars_of
from latentsmith.data.filters import Filters
from latentsmith.data.ingest import import_dataset
from latentsmith.data.preflight import preflight
from latentsmith.data.reader import reader
from latentsmith.data.sample_io import image_member
from latentsmith.data.shards import ShardSet
from latentsmith.data.sources import open_source
from latentsmith.data.transforms import Transforms
from latentsmith.files.errors import BadInput

JPEG = io.BytesIO()
Image.new("RGB", (24, 16), "red").save(JPEG, "JPEG")
JPEG = JPEG.getvalue()
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


def write(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())


def names_of(folder):
    return [item.name for item in open_source(folder).items()]


def tar_of(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_images_are_known_by_content(tmp_path):
    taken = ["a.jfif", "b.jpe", "c.JPG", "d.jpg_large", "e", "f.jpg-small", "g.v1.5"]
    write(tmp_path / "in", {name: JPEG for name in taken} | {"g.v1.5.txt": "g", "h.heic": b"\0\0\0 ftypheic"})
    write(tmp_path / "in", {f"{name[0]}.txt": name for name in taken[:6]} | {"h.txt": "h", "notes.md": "#"})
    write(tmp_path / "in", {"x.bin": b"BM is no bitmap", "p.dat": b"%!PS"})
    report = import_dataset(tmp_path / "in", tmp_path / "out")
    assert report.good == 7 and report.reasons == {"unsupported format": 1, "missing caption": 1} | {}
    assert report.notes == ("files that were not read: 2 (notes.md, x.bin)",)
    details = {entry["name"]: entry["detail"] for entry in json.loads(report.path.read_text())["samples"]}
    assert "the format is HEIF" in details["h.heic"]


def test_what_systems_leave_beside_files(tmp_path, png):
    junk = [
        "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg",
        "__MACOSX/._a.png",
        "._a.png",
        "Thumbs.db",
        "desktop.ini",
        "$RECYCLE.BIN/b.png",
    ]
    write(tmp_path / "in", {"a.png": png(), "a.txt": "a"} | {name: JPEG for name in junk})
    assert import_dataset(tmp_path / "in", tmp_path / "out").notes == ()
    assert names_of(tmp_path / "in") == ["a.png"]
    (tmp_path / "tars").mkdir()
    tar_of(tmp_path / "tars" / "a.tar", {"a.png": png(), "a.txt": b"a"} | {name: JPEG for name in junk})
    assert names_of(tmp_path / "tars") == ["a.png"]


def test_captions_named_after_the_whole_file(tmp_path):
    files = {"photo.jpg": JPEG, "photo.jpg.txt": "whole", "b.jpg": JPEG, "b.txt": "stem", "b.jpg.txt": "whole"}
    write(tmp_path, files | {"c.jpg": JPEG, "c.jpg.caption": "whole"})
    items = list(open_source(tmp_path).items())
    assert [(item.name, item.caption()) for item in items[:3]] == [
        ("b.jpg", "stem"),
        ("c.jpg", "whole"),
        ("photo.jpg", "whole"),
    ]
    assert [item.name for item in items[3:]] == ["b.jpg.txt"]  # a caption that no image uses


def test_captions_whose_names_differ_in_case(tmp_path):
    write(tmp_path, {"IMG_1.JPG": JPEG, "img_1.txt": "one", "B.JPG": JPEG, "b.jpg.txt": "two"})
    assert [item.caption() for item in open_source(tmp_path).items()] == ["two", "one"]


def test_a_limit_of_aspect_is_a_number():
    with pytest.raises(BadInput, match="max_aspect nan is not a number of at least 1"):
        Filters(max_aspect=float("nan"))


def test_images_that_share_a_caption_are_named(tmp_path, png):
    write(tmp_path, {"a.jpg": JPEG, "a.png": png(), "a.txt": "both"})
    assert open_source(tmp_path).notes == ["captions that go with several images: 1 (a.txt)"]


def test_a_table_that_leaves_images_out(tmp_path, png, capsys):
    rows = [{"file_name": name, "text": name} for name in ("1.png", "./sub/2.png", "1.png", "sub\\3.png")]
    write(tmp_path / "in", {name: png() for name in ("1.png", "sub/2.png", "sub/3.png", "4.png")})
    write(tmp_path / "in", {"Metadata.jsonl": "\n".join(map(json.dumps, rows))})
    assert main(["data", "import", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert (
        "4 samples" in printed
        and "1 not in the table" in printed
        and "images that several rows name: 1 (1.png)" in printed
    )
    report = json.loads((tmp_path / "out" / "import-report.json").read_text())
    assert report["samples"][0]["name"] == "4.png"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train/metadata.jsonl": "", "test/metadata.jsonl": ""}, "its tables are in test and train; import each"),
        (
            {"metadata.jsonl": "{}", "metadata.csv": "a"},
            "has two tables, metadata.csv and metadata.jsonl; name the one",
        ),
        (
            {"captions.csv": "file_name,text\na.jpg,a"},
            "without caption files, but captions.csv is there; name it as the source",
        ),
        ({"metadata.json": "{}"}, "without caption files, but metadata.json is there"),
    ],
)
def test_which_table_is_meant(tmp_path, files, message):
    write(tmp_path, {"train/a.jpg": JPEG, "a.jpg": JPEG} | files)
    with pytest.raises(BadInput, match=message):
        open_source(tmp_path)


def test_metadata_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    write(tmp_path, {"a.jpg": JPEG, "b.jpg": JPEG})
    table = pytest.importorskip("pyarrow").Table.from_pylist([{"file_name": "b.jpg", "text": "b"}])
    parquet.write_table(table, tmp_path / "metadata.parquet")
    listed, left_out = open_source(tmp_path).items()
    assert (listed.caption(), listed.image(), left_out.name) == ("b", JPEG, "a.jpg")


def test_parquet_splits_are_not_mixed(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    (tmp_path / "data").mkdir()
    (tmp_path / "other" / "train").mkdir(parents=True)
    (tmp_path / "other" / "test").mkdir()
    names = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000.parquet"]
    for name in [*names, "other/train/0.parquet", "other/test/0.parquet"]:
        parquet.write_table(pyarrow.Table.from_pylist([{"image": JPEG, "text": name}]), tmp_path / name)
    with pytest.raises(BadInput, match=r"has the splits test, train; import one: '.*/data/train\*\.parquet'"):
        open_source(tmp_path / "data")
    with pytest.raises(BadInput, match=r"import one: '.*/other/train/\*\.parquet'"):
        open_source(tmp_path / "other")
    for pattern, wanted in (("data/train*.parquet", names[:2]), ("other/train/*.parquet", ["other/train/0.parquet"])):
        assert [item.caption() for item in open_source(tmp_path / pattern).items()] == wanted
    with pytest.raises(BadInput, match="no such files"):
        open_source(tmp_path / "data" / "val*.parquet")


def test_more_parquet_files_than_may_be_open(tmp_path):
    resource = pytest.importorskip("resource")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist([{"image": JPEG, "text": "a"}] * 2)
    parquet.write_table(table, tmp_path / "0000.parquet")
    for number in range(1, 150):
        (tmp_path / f"{number:04}.parquet").hardlink_to(tmp_path / "0000.parquet")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        source = open_source(tmp_path)
        assert len(source) == 300 and sum(1 for _ in source.items()) == 300
        assert [item.name for item in source.items(297)] == [
            "row 1 of 0148.parquet",
            "row 0 of 0149.parquet",
            "row 1 of 0149.parquet",
        ]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_git_lfs_pointers_are_named(tmp_path, png):
    write(tmp_path / "in", {"a.jpg": LFS, "a.txt": "a", "b.png": png(), "b.txt": LFS, "c.png": png(), "c.txt": "c"})
    report = import_dataset(tmp_path / "in", tmp_path / "out")
    details = [entry["detail"] for entry in json.loads(report.path.read_text())["samples"]]
    assert len(details) == 2 and all("run `git lfs pull`" in detail for detail in details)
    for name in ("t.tar", "t.csv", "t.jsonl", "t.parquet"):
        write(tmp_path, {name: LFS})
        with pytest.raises(BadInput, match="a Git LFS pointer"):
            open_source(tmp_path / name)


@pytest.mark.parametrize("name", ["000.tar.gz", "000.tgz", "000.tar.zst", "000.tar.xz", "all.zip"])
@pytest.mark.parametrize("beside", [True, False])
def test_compressed_tars_are_named(tmp_path, png, name, beside):
    if beside:
        tar_of(tmp_path / "001.tar", {"a.png": png(), "a.txt": b"a"})
    write(tmp_path, {name: gzip.compress(b"tar")})
    for read in (open_source, ShardSet):
        with pytest.raises(BadInput, match=rf"{name} is compressed"):
            read(tmp_path)
    with pytest.raises(BadInput, match="is compressed"):
        open_source(tmp_path / name)


def test_a_tar_that_is_packed_inside_is_named(tmp_path):
    for head, name in (
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\x04\x22\x4d\x18", "lz4"),
        (b"PK\x03\x04", "zip"),
        (b"BZh9", "bzip2"),
    ):
        write(tmp_path, {"a.tar": head + bytes(2000)})
        with pytest.raises(BadInput, match=f"compressed with {name}"):
            ShardSet(tmp_path / "a.tar")


def test_members_of_tars_by_content(tmp_path):
    tar_of(tmp_path / "a.tar", {"a.jfif": JPEG, "a.txt": b"a", "b.img": JPEG, "b.txt": b"b"})
    tar_of(tmp_path / "b.tar", {"photo v1.5 x.jpg": JPEG, "photo v1.5 x.txt": b"c"})
    shards = ShardSet([tmp_path / "a.tar", tmp_path / "b.tar"])
    assert [image_member(shards[number])[0] for number in range(2)] == ["jfif", "img"]
    assert names_of(tmp_path)[:2] == ["a.jfif", "b.img"]
    with pytest.raises(BadInput, match="an extension begins at the first dot of a name"):
        image_member(shards[2])


def test_empty_tars_are_passed_over(tmp_path, png):
    """A worker of img2dataset that got nothing leaves one. In import, training and precache alike."""
    from latentsmith.data.image_sizes import image_sizes

    for number in range(4):
        tar_of(tmp_path / f"{number}.tar", {f"{number}.png": png(), f"{number}.txt": b"a"} if number % 2 else {})
    shards = ShardSet(tmp_path)
    assert [sample.key for sample in shards] == ["1", "3"] and shards.counts == [1, 1]
    assert image_sizes(shards).tolist() == [[30, 40]] * 2
    assert names_of(tmp_path) == ["1.png", "3.png"]
    for number in (1, 3):
        tar_of(tmp_path / f"{number}.tar", {})
    for read in (open_source, ShardSet):
        with pytest.raises(BadInput, match="the tars hold no samples"):
            read(tmp_path)


def test_nothing_good_writes_a_report_and_the_same_command_goes_on(tmp_path, png):
    write(tmp_path / "in", {"a.png": png(), "b.png": b""})
    message = r"first causes: no a\.txt or a\.caption beside a\.png.*all are listed in import-report\.json"
    with pytest.raises(BadInput, match=message):
        import_dataset(tmp_path / "in", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "import-report.json").read_text())
    assert report["good"] == 0 and [entry["name"] for entry in report["samples"]] == ["a.png", "b.png"]
    write(tmp_path / "in", {"a.txt": "now"})
    assert import_dataset(tmp_path / "in", tmp_path / "out").good == 1


@pytest.mark.parametrize("changed", ["a.png", "a.txt"])
def test_edits_are_seen_whatever_their_size(tmp_path, png, changed):
    write(tmp_path / "in", {"a.png": png(), "a.txt": "red"})
    import_dataset(tmp_path / "in", tmp_path / "out")
    assert import_dataset(tmp_path / "in", tmp_path / "out").good == 1
    write(tmp_path / "in", {changed: png(seed=3) if changed == "a.png" else "tan"})
    with pytest.raises(BadInput, match="was begun with source"):
        import_dataset(tmp_path / "in", tmp_path / "out")


def test_images_alone(tmp_path, png, capsys):
    """For an autoencoder; of a table the column of captions is not needed either."""
    write(tmp_path / "in", {"a.png": png(), "b.png": png(seed=1), "b.txt": "b"})
    assert main(["data", "import", str(tmp_path / "in"), str(tmp_path / "out"), "--no-captions"]) == 0
    shards = ShardSet(tmp_path / "out")
    assert [sorted(sample.members) for sample in shards] == [["json", "png"]] * 2
    samples = TrainingSet(shards, None, Transforms(center_crop_h_w="8, 8"), (4, 1, 1))
    assert reader(samples, 0, None)([0, 1], [0, 1])["images"].shape == (2, 3, 8, 8)
    assert preflight(samples, None, 1, 2)[0].startswith("2 samples in 1 shards")
    write(tmp_path / "in", {"t.csv": "file_name,label\na.png,1\n"})
    assert import_dataset(tmp_path / "in" / "t.csv", tmp_path / "table", captions=False).good == 1


def test_strips_are_too_elongated(tmp_path, png):
    write(tmp_path / "in", {"a.png": png((4000, 1)), "a.txt": "a", "b.png": png((400, 20)), "b.txt": "b"})
    assert import_dataset(tmp_path / "in", tmp_path / "out").reasons == {"too elongated": 1}
    assert main(["data", "import", str(tmp_path / "in"), str(tmp_path / "all"), "--max-aspect", "5000"]) == 0
    assert len(ShardSet(tmp_path / "all")) == 2


def test_a_tar_edited_in_place_is_another_source(tmp_path, png):
    for text in (b"red", b"tan"):
        tar_of(tmp_path / "a.tar", {"a.png": png(), "a.txt": text})
        found = open_source(tmp_path / "a.tar").fingerprint()
        if text == b"red":
            before = found
    assert found != before


def test_wdinfo_means_the_same_tars_in_import_and_training(tmp_path, png, monkeypatch):
    """Those beside the file, whatever the working folder is, or those in webdataset.local_root_path."""
    from types import SimpleNamespace as Node

    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    for folder, key in (("here", "a"), ("there", "b")):
        tar_of(tmp_path / folder / "0.tar", {f"{key}.png": png(), f"{key}.txt": b"a"})
    (tmp_path / "here" / "wdinfo.pkl").write_bytes(pickle.dumps({"tar_files": ["0.tar"]}))
    monkeypatch.chdir(tmp_path / "there")
    assert names_of(tmp_path / "here" / "wdinfo.pkl") == ["a.png"]
    for root, key in ((None, "a"), (str(tmp_path / "there"), "b")):
        config = Node(model=Node(data=Node(webdataset=Node(local_root_path=root))))
        assert ShardSet(tars_of(config, str(tmp_path / "here" / "wdinfo.pkl")))[0].key == key
