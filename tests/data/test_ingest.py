import errno
import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import webdataset
from PIL import Image

from latentsmith.cli import main
from latentsmith.data import resumable_output
from latentsmith.data.filters import Filters
from latentsmith.data.images import decode_image
from latentsmith.data.ingest import checked_caption, import_dataset
from latentsmith.data.shards import ShardSet
from latentsmith.data.storage import OUTSIDE
from latentsmith.files.errors import BadInput


def fill(folder, names, png, caption="an image of noise"):
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(png(seed=number))
        (folder / name).with_suffix(".txt").write_text(f"{caption} {number}")


def everything(folder):
    """Content of each file of a finished set, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_folder_becomes_shards(tmp_path, png):
    fill(tmp_path / "in", [f"photo.{i}.png" for i in range(7)], png)
    seen = []
    report = import_dataset(tmp_path / "in", tmp_path / "out", samples_per_shard=3, progress=lambda *a: seen.append(a))
    assert (report.good, report.bad, report.reasons, report.shards) == (7, 0, {}, 3)
    assert seen == [(i + 1, 7, 0) for i in range(7)]
    shards = ShardSet(tmp_path / "out")
    assert shards.counts == [3, 3, 1] and shards[5].key == "000000005"
    sample = shards[5]
    assert bytes(sample.members["png"]) == png(seed=5)  # a plain PNG keeps its bytes
    assert sample.text("txt") == "an image of noise 5"
    assert json.loads(sample.text("json")) == {"original_name": "photo.5.png", "width": 40, "height": 30}
    names = {path.name.split(".", 1)[1] for path in (tmp_path / "out").iterdir()}
    assert names == {"tar", "index.npy", "json"}  # no marker, no leftover


def test_webdataset_sees_each_sample(tmp_path, png):
    fill(tmp_path / "in", [f"photo.{i}.png" for i in range(4)], png)
    import_dataset(tmp_path / "in", tmp_path / "out")
    urls = [str(path) for path in ShardSet(tmp_path / "out").paths]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [sample["txt"] for sample in read] == [f"an image of noise {i}" for i in range(4)]
    assert all((sample["png"] == decode_image(png(seed=i))).all() for i, sample in enumerate(read))
    assert read[2]["json"]["original_name"] == "photo.2.png"


def test_every_kind_of_bad_sample_is_set_aside_with_its_reason(tmp_path, png):
    folder = tmp_path / "in"
    fill(folder, ["good.png", "wrong-extension.jpg"], png)
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    cases = {
        "corrupt": (png()[:60] + b"\xff" * 40 + png()[100:], b"x"),
        "truncated": (png()[:2000], b"x"),
        "zero": (b"", b"x"),
        "text": (b"not an image", b"x"),
        "huge": (buffer.getvalue(), b"x"),
        "tiny": (png(size=(1, 1)), b"x"),
        "empty-caption": (png(), b" \n "),
        "cp1252-caption": (png(), b"a caf\xe9"),
        "control-caption": (png(), b"a\x00b"),
        "long-caption": (png(), b"x" * 100_000),
    }
    for name, (image, caption) in cases.items():
        (folder / f"{name}.png").write_bytes(image)
        (folder / f"{name}.txt").write_bytes(caption)
    (folder / "uncaptioned.png").write_bytes(png())
    (folder / "orphan.txt").write_text("nothing beside me")
    report = import_dataset(folder, tmp_path / "out", filters=Filters(min_size=16))
    listing = json.loads(report.path.read_text())
    reasons = {entry["name"].split(".")[0]: entry["reason"] for entry in listing["samples"]}
    assert reasons == {
        "corrupt": "corrupt",
        "truncated": "truncated",
        "zero": "zero bytes",
        "text": "not an image",
        "huge": "too many pixels",
        "tiny": "too small",
        "empty-caption": "empty caption",
        "cp1252-caption": "caption not UTF-8",
        "control-caption": "binary caption",
        "long-caption": "caption too long",
        "uncaptioned": "missing caption",
        "orphan": "missing image",
    }
    assert (report.good, report.bad) == (2, 12) == (listing["good"], listing["bad"])
    assert report.reasons == listing["reasons"] and report.reasons["binary caption"] == 1
    details = " ".join(entry["detail"] for entry in listing["samples"])
    assert "100,000 characters, more than 10,000" in details and "1x1: the shorter side is under 16" in details
    kept = [json.loads(sample.text("json"))["original_name"] for sample in ShardSet(tmp_path / "out")]
    assert kept == ["good.png", "wrong-extension.jpg"]
    assert "png" in ShardSet(tmp_path / "out")[1].members  # named after what it is


def test_a_bad_sample_stays_listed_when_it_comes_last_or_alone(tmp_path, png):
    fill(tmp_path / "in", ["a.png"], png)
    (tmp_path / "in" / "b.png").write_bytes(b"")
    (tmp_path / "in" / "b.txt").write_text("x")
    assert import_dataset(tmp_path / "in", tmp_path / "out", samples_per_shard=1).bad == 1
    (tmp_path / "in" / "a.png").unlink()
    with pytest.raises(BadInput, match=r"no good sample in the source \(1 zero bytes, 1 missing image\)"):
        import_dataset(tmp_path / "in", tmp_path / "none")
    with pytest.raises(BadInput, match="unfinished"):
        ShardSet(tmp_path / "none")


def test_max_bad(tmp_path, png):
    fill(tmp_path / "in", [f"{i}.png" for i in range(6)], png)
    for i in (1, 3):
        (tmp_path / "in" / f"{i}.png").write_bytes(b"")
    with pytest.raises(BadInput, match=r"more than max_bad=1 bad samples \(2 zero bytes; last 3\.png: "):
        import_dataset(tmp_path / "in", tmp_path / "out", max_bad=1, samples_per_shard=1)
    assert import_dataset(tmp_path / "in", tmp_path / "out", max_bad=2, samples_per_shard=1).good == 4


def test_what_is_not_plain_is_stored_as_it_looks(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    red = Image.new("RGB", (48, 32), (200, 30, 30))
    red.save(folder / "a-rotated.jpg", exif=exif)
    red.convert("CMYK").save(folder / "b-cmyk.jpg")
    red.putalpha(128)
    red.save(folder / "c-alpha.png")
    red.convert("P").save(folder / "d-palette.gif")
    red.convert("L").save(folder / "e-grey.jpg")
    Image.fromarray(np.full((32, 48), 40_000, np.uint16)).save(folder / "f-wide.png")
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text("red")
    import_dataset(folder, tmp_path / "out")
    shards = ShardSet(tmp_path / "out")
    extensions = [(set(sample.members) - {"json", "txt"}).pop() for sample in shards]
    assert extensions == ["jpg", "jpg", "png", "png", "jpg", "png"]
    assert bytes(shards[4].members["jpg"]) == (folder / "e-grey.jpg").read_bytes()
    for sample, path in zip(shards, sorted(folder.glob("*-*.[jpg]*")), strict=True):
        (data,) = (data for name, data in sample.members.items() if name not in ("json", "txt"))
        stored, about = Image.open(io.BytesIO(bytes(data))), json.loads(sample.text("json"))
        expected = np.asarray(decode_image(path.read_bytes())).astype(int)
        assert stored.mode in ("RGB", "L") and not stored.getexif(), path
        assert (about["height"], about["width"]) == expected.shape[:2], path
        assert abs(np.asarray(stored.convert("RGB")).astype(int) - expected).max() <= 3, path


def test_duplicates(tmp_path, png):
    fill(tmp_path / "in", ["a.png", "b.png", "c.png"], png)
    for name in ("b", "c"):
        (tmp_path / "in" / f"{name}.png").write_bytes(png())
    (tmp_path / "in" / "b.txt").write_text((tmp_path / "in" / "a.txt").read_text())
    assert import_dataset(tmp_path / "in", tmp_path / "all").good == 3
    report = import_dataset(tmp_path / "in", tmp_path / "once", keep_duplicates=False, samples_per_shard=1)
    assert (report.good, report.reasons) == (2, {"duplicate": 1})


def test_finished_folder_is_left_alone(tmp_path, png):
    fill(tmp_path / "in", ["a.png"], png)
    first = import_dataset(tmp_path / "in", tmp_path / "out")
    before = everything(tmp_path / "out")
    assert import_dataset(tmp_path / "in", tmp_path / "out") == first
    with pytest.raises(
        BadInput, match=r"out: was begun with options\.filters\.min_size 1, and now it is 2; name a new folder"
    ):
        import_dataset(tmp_path / "in", tmp_path / "out", filters=Filters(min_size=2))
    assert everything(tmp_path / "out") == before
    with pytest.raises(BadInput, match="already holds something else"):
        import_dataset(tmp_path / "out", tmp_path / "in")


def test_tars_and_sets_can_be_imported_again(tmp_path, png):
    fill(tmp_path / "in", [f"{i}.png" for i in range(5)], png)
    import_dataset(tmp_path / "in", tmp_path / "once", samples_per_shard=2)
    import_dataset(tmp_path / "once", tmp_path / "twice", samples_per_shard=5)
    once, twice = ShardSet(tmp_path / "once"), ShardSet(tmp_path / "twice")
    assert [s.text("txt") for s in once] == [s.text("txt") for s in twice]
    assert [bytes(s.members["png"]) for s in once] == [bytes(s.members["png"]) for s in twice]


def interrupted_import(source, out):
    """Import in another process, and kill it (SIGKILL) where it waits within the third shard."""
    program = (
        "import sys; from latentsmith.data.ingest import import_dataset\n"
        "def pause(done, *_):\n"
        "    if done == 13:\n"
        "        print('paused', flush=True); sys.stdin.read()\n"
        "import_dataset(sys.argv[1], sys.argv[2], samples_per_shard=4, progress=pause)\n"
    )
    command = [sys.executable, "-c", program, str(source), str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline().strip() == b"paused"
        assert (out / "shard-000001.done.json").exists()
        process.send_signal(signal.SIGKILL)


def test_killed_import_goes_on_where_it_stopped(tmp_path, png):
    fill(tmp_path / "in", [f"{i:02}.png" for i in range(30)], png)
    for name in ("01", "06", "29"):
        (tmp_path / "in" / f"{name}.png").write_bytes(b"")
    interrupted_import(tmp_path / "in", tmp_path / "out")
    with pytest.raises(BadInput, match="unfinished; run the command"):
        ShardSet(tmp_path / "out")
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert 2 <= len(finished) < 7
    seen = []
    import_dataset(tmp_path / "in", tmp_path / "out", samples_per_shard=4, progress=lambda *a: seen.append(a))
    assert seen[0][0] > 8  # what was done is not read again
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == mtime for name, mtime in list(finished.items())[:2])
    import_dataset(tmp_path / "in", tmp_path / "reference", samples_per_shard=4)
    assert everything(tmp_path / "out") == everything(tmp_path / "reference")
    assert json.loads((tmp_path / "out" / "import-report.json").read_text())["bad"] == 3


def test_changed_source_is_refused_on_a_rerun(tmp_path, png):
    fill(tmp_path / "in", [f"{i:02}.png" for i in range(30)], png)
    interrupted_import(tmp_path / "in", tmp_path / "out")
    fill(tmp_path / "in", ["00-new.png"], png)
    with pytest.raises(BadInput, match=r"out: was begun with source \"\w+\", and now it is"):
        import_dataset(tmp_path / "in", tmp_path / "out", samples_per_shard=4)


def test_full_disk_is_one_line_and_can_go_on(tmp_path, png, monkeypatch):
    fill(tmp_path / "in", [f"{i}.png" for i in range(5)], png)

    def no_space(*arguments, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(resumable_output.ResumableOutput, "record", no_space)
        with pytest.raises(BadInput, match="out: the disk is full; free some space and run the command again"):
            import_dataset(tmp_path / "in", tmp_path / "out", samples_per_shard=2)
    assert import_dataset(tmp_path / "in", tmp_path / "out", samples_per_shard=2).good == 5


SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----"


def hostile_folder(tmp_path, png):
    """A folder of images and captions, some of them links to what is outside it or no regular files."""
    folder = tmp_path / "in"
    fill(folder, ["good.png", "out-caption.png", "fifo-caption.png", "zero-caption.png"], png)
    (tmp_path / "secret").write_text(SECRET)
    fill(tmp_path / "other", ["z.png"], png)
    for caption in ("out-caption", "fifo-caption", "zero-caption"):
        (folder / f"{caption}.txt").unlink()
    for name in ("out-image", "fifo-image", "zero-image", "inside", "inside-2"):
        (folder / f"{name}.txt").write_text("words")
    for name, target in (
        ("out-caption.txt", "../secret"),
        ("out-image.png", tmp_path / "other" / "z.png"),
        ("zero-caption.txt", "/dev/zero"),
        ("zero-image.png", "/dev/zero"),
        ("inside.png", "good.png"),
        ("inside-2.png", folder / "good.png"),
        ("a-folder", "../other"),
    ):
        (folder / name).symlink_to(target)
    for name in ("fifo-image.png", "fifo-caption.txt"):
        os.mkfifo(folder / name)
    return folder


def test_links_and_special_files_are_counted_and_not_read(tmp_path, png, limited):
    folder = hostile_folder(tmp_path, png)
    report = import_dataset(folder, tmp_path / "out", samples_per_shard=2)
    assert (report.good, report.reasons) == (3, {OUTSIDE: 5, "not a regular file": 2})
    listing = json.loads(report.path.read_text())
    assert {entry["name"] for entry in listing["samples"] if entry["reason"] == OUTSIDE} == {
        "out-caption.png", "out-image.png", "zero-caption.png", "zero-image.png", "a-folder",
    }  # fmt: skip
    assert listing["reasons"] == report.reasons
    assert SECRET.encode() not in b"".join(everything(tmp_path / "out").values())
    names = [json.loads(sample.text("json"))["original_name"] for sample in ShardSet(tmp_path / "out")]
    assert names == ["good.png", "inside-2.png", "inside.png"]


def test_links_are_followed_on_request(tmp_path, png, limited, capsys):
    folder = hostile_folder(tmp_path, png)
    assert main(["data", "import", str(folder), str(tmp_path / "out"), "--follow-links"]) == 0
    assert "4 not a regular file" in capsys.readouterr().out
    samples = list(ShardSet(tmp_path / "out"))
    names = [json.loads(sample.text("json"))["original_name"] for sample in samples]
    assert names == ["a-folder/z.png", "good.png", "inside-2.png", "inside.png", "out-caption.png", "out-image.png"]
    assert samples[4].text("txt") == SECRET


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_table_entries_outside_are_read_on_request(tmp_path, png, limited, suffix, capsys):
    (tmp_path / "in").mkdir()
    for folder in ("in", "."):
        (tmp_path / folder / "a.png").write_bytes(png())
    os.mkfifo(tmp_path / "in" / "fifo")
    (tmp_path / "in" / "link").symlink_to("../a.png")
    names = ["a.png", "../a.png", str(tmp_path / "a.png"), "/dev/zero", "/proc/self/mem", "fifo", "link"]
    table, rows = tmp_path / "in" / f"t.{suffix}", [{"image": name, "text": name} for name in names]
    if suffix == "jsonl":
        table.write_text("\n".join(map(json.dumps, rows)))
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), table)
    report = import_dataset(table, tmp_path / "out")
    assert (report.good, report.reasons) == (1, {OUTSIDE: 5, "not a regular file": 1})
    assert main(["data", "import", str(table), str(tmp_path / "outside"), "--allow-outside"]) == 0
    out = capsys.readouterr().out
    assert "3 samples" in out and "1 outside the source folder" in out and "2 not a regular file" in out
    with pytest.raises(BadInput, match=r"options\.follow_links \(absent\), and now it is true"):
        import_dataset(table, tmp_path / "out", follow_links=True)


def test_nothing_imported_names_the_first_causes(tmp_path, png):
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png())
        (tmp_path / "in" / f"{name}.png").symlink_to(f"../{name}.png")
    (tmp_path / "in" / "c.png").write_bytes(b"")
    (tmp_path / "in" / "c.txt").write_text("words")
    message = r"2 outside .*; nothing was imported; first causes: .*in/a\.png: a link .*--follow-links.*; c\.png: the"
    with pytest.raises(BadInput, match=message):
        import_dataset(tmp_path / "in", tmp_path / "out")


def test_a_long_caption_file_is_not_read(tmp_path, png):
    fill(tmp_path / "in", ["a.png", "b.png"], png)
    (tmp_path / "in" / "a.txt").write_bytes(b" " * (2**20 + 1))
    assert import_dataset(tmp_path / "in", tmp_path / "out").reasons == {"too many bytes": 1}


@pytest.mark.parametrize("text", ["Größe 12 \N{MULTIPLICATION SIGN} 3", "a\tb\nc", "\N{DOG FACE} x"])
def test_good_captions_pass(text):
    assert checked_caption(f"  {text}\n") == text


def test_real_photographs_of_many_kinds(tmp_path, photographs):
    (tmp_path / "in").mkdir()
    for name, path in photographs.items():
        (tmp_path / "in" / name).write_bytes(path.read_bytes())
        (tmp_path / "in" / name).with_suffix(".txt").write_text(f"a photograph called {name}")
    report = import_dataset(tmp_path / "in", tmp_path / "out", samples_per_shard=10)
    assert report.bad == report.reasons["not an image"] == 1  # multipage_rgb.tif: 64-bit floating point
    assert report.good == len(photographs) - 1
    for sample in ShardSet(tmp_path / "out"):
        (data,) = (data for name, data in sample.members.items() if name not in ("json", "txt"))
        about = json.loads(sample.text("json"))
        assert decode_image(data).size == (about["width"], about["height"])
