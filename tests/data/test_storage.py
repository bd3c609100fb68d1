"""Sources of single files from afar give what the same files give here."""

import functools
import json
import socket
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest

from latentsmith.cli import main
from latentsmith.data.errors import BadSample
from latentsmith.data.source_kinds import FolderSource, TableSource
from latentsmith.data.sources import open_source
from latentsmith.data.storage import OUTSIDE, PREFETCH, Access, LocalStorage, RemoteStorage
from latentsmith.data.tables import ParquetTable
from latentsmith.files.errors import BadInput
from latentsmith.files.regular import CAPTION

COUNT = PREFETCH + 7
OUTSIDE_TOO = Access(allow_outside=True)  # the tables made here have names with `..`


def folder_of_images(folder, png):
    for number in range(COUNT):
        path = folder / f"part {number % 3}" / f"{number:03}[a].png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(seed=number))
        path.with_suffix(".txt").write_text(f"\ufeffcaption {number}", encoding="utf-8")
    (folder / "lost.txt").write_text("no image")
    (folder / "mute.png").write_bytes(png())
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.png").write_bytes(png())


def table_of_images(folder, png, suffix):
    for within in (folder / "0", folder / "1"):
        within.mkdir(parents=True)
    rows = [{"file_name": f"./{n % 2}/../{n}.png", "text": f"caption\n{n}", "n": str(n)} for n in range(COUNT)]
    for number in range(COUNT):
        if number != 5:
            (folder / f"{number}.png").write_bytes(png(seed=number))
    if suffix == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        quoted = [f'{row["file_name"]},"{row["text"]}",{row["n"]}' for row in rows]
        (folder / "metadata.csv").write_text("\n".join(["file_name,text,n", *quoted]))


def parquets(folder, png):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder.mkdir()
    (folder / "beside.png").write_bytes(png())
    for name, rows in (
        ("b", [{"image": {"bytes": png(seed=9), "path": None}, "text": "last"}]),
        ("a", [{"image": {"bytes": None, "path": "beside.png"}, "text": "first"},
               {"image": {"bytes": None, "path": "gone.png"}, "text": "second"}]),
    ):  # fmt: skip
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}.parquet")


MAKE = {
    "folder": (folder_of_images, FolderSource),
    "jsonl": (functools.partial(table_of_images, suffix="jsonl"), TableSource),
    "csv": (functools.partial(table_of_images, suffix="csv"), TableSource),
}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


class Listening(ThreadingHTTPServer):
    request_queue_size = PREFETCH  # of connections that may wait: with Python's five, others wait for a retransmission


@pytest.fixture
def addresses(tmp_path):
    """Addresses of the folder `source` in memory and, over HTTP, on a web server that lists it."""
    pytest.importorskip("aiohttp")

    def upload():
        memory = fsspec.filesystem("memory")
        for path in (tmp_path / "source").rglob("*"):
            if path.is_file():
                memory.pipe_file(f"/places/{path.relative_to(tmp_path)}", path.read_bytes())

    with Listening(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        web = f"http://127.0.0.1:{server.server_address[1]}/source"
        yield lambda: (upload(), {"memory": "memory://places/source", "http": web})[1]
        server.shutdown()
    fsspec.filesystem("memory").store.clear()


def content(source, start=0):
    found = []
    for item in source.items(start):
        entry = [item.name, dict(item.extra)]
        for read in (item.image, item.caption):
            try:
                entry.append(read())
            except BadSample as error:
                entry.append(error.reason)
        found.append(entry)
    return found


@pytest.mark.parametrize("source", MAKE)
def test_the_same_as_here(tmp_path, png, addresses, source):
    make, wanted = MAKE[source]
    make(tmp_path / "source", png)
    here = open_source(tmp_path / "source", OUTSIDE_TOO)
    assert isinstance(here, wanted) and len(here) >= COUNT
    for where, url in addresses().items():
        if where == "http" and source == "folder":
            continue  # a web server's listing escapes names
        far = open_source(url, OUTSIDE_TOO)
        assert isinstance(far, wanted) and len(far) == len(here)
        for start in (0, 3, PREFETCH + 1):
            assert content(far, start) == content(here, start)
        assert far.fingerprint() == open_source(url).fingerprint()


def test_files_come_many_at_once(tmp_path, png, addresses, monkeypatch):
    table_of_images(tmp_path / "source", png, "jsonl")
    source = open_source(addresses()["memory"], OUTSIDE_TOO)
    asked, cat = [], fsspec.implementations.memory.MemoryFileSystem.cat
    monkeypatch.setattr(
        fsspec.implementations.memory.MemoryFileSystem,
        "cat",
        lambda self, paths, **options: asked.append(len(paths)) or cat(self, paths, **options),
    )
    assert len(content(source)) == COUNT and asked == [PREFETCH, COUNT - PREFETCH]


def test_parquet(tmp_path, png, addresses):
    parquets(tmp_path / "source", png)
    local = LocalStorage(tmp_path / "source")
    here = TableSource(local, ParquetTable(local, ["a.parquet", "b.parquet"]))
    far = open_source(addresses()["memory"] + "/a.parquet")
    assert content(far) == content(here)[:2] and content(far)[1][2] == "missing image"
    (tmp_path / "source" / "beside.png").unlink()
    fsspec.filesystem("memory").store.clear()
    everything = open_source(url := addresses()["memory"])
    assert isinstance(everything, TableSource)
    assert [row[3] for row in content(everything)] == ["first", "second", "last"]
    assert everything.fingerprint() == open_source(url).fingerprint()


def test_the_command(tmp_path, png, addresses, capsys):
    folder_of_images(tmp_path / "source", png)
    assert main(["data", "import", str(tmp_path / "source"), str(tmp_path / "here")]) == 0
    assert main(["data", "import", addresses()["memory"], str(tmp_path / "far")]) == 0
    assert "2 set aside" in capsys.readouterr().out
    names = [path.name for path in sorted((tmp_path / "here").glob("*.tar"))]
    assert names and all((tmp_path / "far" / n).read_bytes() == (tmp_path / "here" / n).read_bytes() for n in names)


def test_a_network_that_fails_is_no_bad_sample(tmp_path, png, addresses, monkeypatch):
    table_of_images(tmp_path / "source", png, "jsonl")
    source = open_source(addresses()["memory"], OUTSIDE_TOO)

    def refuse(self, *words, **options):
        raise PermissionError("403")

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, "cat_file", refuse)
    with pytest.raises(BadInput, match=r"memory://places/source.*403"):
        content(source)


def test_a_server_that_is_busy_is_asked_again_and_one_that_refuses_is_told(tmp_path, png, addresses, monkeypatch):
    """A status is no file that is not there: a table would become a folder of images."""
    table_of_images(tmp_path / "source", png, "jsonl")
    answers = [503, 503]

    class Busy(Quiet):
        def send_head(self):
            if answers and self.path.endswith("metadata.jsonl"):
                self.send_error(answers.pop())
                return None
            return super().send_head()

    monkeypatch.setattr("latentsmith.data.storage.time.sleep", lambda seconds: None)
    with Listening(("127.0.0.1", 0), functools.partial(Busy, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/source"
        assert isinstance(open_source(url), TableSource) and not answers
        answers += [403] * 20
        with pytest.raises(BadInput, match=r"source.*403"):
            open_source(url)
        server.shutdown()


def test_nobody_at_the_address_is_not_nothing_there(monkeypatch):
    monkeypatch.setattr("latentsmith.data.storage.time.sleep", lambda seconds: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    for address in (f"{url}/folder", f"{url}/t.csv"):
        with pytest.raises(BadInput, match="cannot be read"):
            open_source(address)


def test_a_table_may_point_beside_its_folder(tmp_path, png, addresses):
    (tmp_path / "source" / "captions").mkdir(parents=True)
    (tmp_path / "source" / "a.png").write_bytes(png())
    (tmp_path / "source" / "captions" / "t.csv").write_text("file_name,text\n../a.png,one\n")
    for url in addresses().values():
        table = f"{url}/captions/t.csv"
        assert content(open_source(table, OUTSIDE_TOO)) == [["../a.png", {}, png(), "one"]]
        assert content(open_source(table)) == [["../a.png", {}, OUTSIDE, "one"]]


def test_large_files_far_away_are_not_fetched(monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/large/a.txt", bytes(CAPTION.size + 1))
    far = RemoteStorage("memory://large")
    with pytest.raises(BadSample, match=r"large/a\.txt: 1,048,577 bytes") as error:
        far.read("a.txt", CAPTION)
    assert error.value.reason == "too many bytes"
    far.sizes()
    monkeypatch.setattr(type(memory), "cat_file", None)
    with pytest.raises(BadSample, match=r"large/a\.txt: 1,048,577 bytes"):
        far.read("a.txt", CAPTION)
    memory.store.clear()


def reason_of(place, name):
    try:
        return place.read(name)
    except BadSample as error:
        return error.reason


def test_names_stay_inside_the_folder(tmp_path):
    """Names, links and links of folders: each is resolved before it is read."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "beside").mkdir()
    (tmp_path / "in-2.txt").write_text("not in the folder, whose name this one starts with")
    for path in (folder / "sub" / "own.txt", tmp_path / "beside" / "other.txt"):
        path.write_text(path.name)
    for name, target in (
        ("link.txt", "sub/own.txt"),
        ("out.txt", "../beside/other.txt"),
        ("twice.txt", "out.txt"),
        ("folder", "../beside"),
        ("prefix.txt", "../in-2.txt"),
        ("self.txt", "self.txt"),
        ("nowhere.txt", "/nowhere/a.txt"),
    ):
        (folder / name).symlink_to(target)
    (tmp_path / "named").symlink_to(folder)  # the user's own name of the folder may be a link
    absolute, up = str(folder / "sub" / "own.txt"), "sub/../sub/own.txt"
    links = ["out.txt", "twice.txt", "folder/other.txt", "prefix.txt", "nowhere.txt"]
    place = LocalStorage(tmp_path / "named")
    assert place.read("link.txt") == place.read("sub/own.txt") == b"own.txt"
    assert {name: reason_of(place, name) for name in [*links, absolute, up, "../beside/other.txt"]} == dict.fromkeys(
        [*links, absolute, up, "../beside/other.txt"], OUTSIDE
    )
    assert reason_of(place, "self.txt") == "unreadable file" and reason_of(place, "gone.txt") == "missing image"
    follows = LocalStorage(folder, Access(follow_links=True))
    assert [follows.read(name) for name in links[:3]] == [b"other.txt"] * 3
    assert reason_of(follows, up) == reason_of(follows, absolute) == OUTSIDE
    outside = LocalStorage(folder, OUTSIDE_TOO)
    assert outside.read(absolute) == outside.read(up) == b"own.txt" and outside.read("../in-2.txt")
    assert all(reason_of(outside, name) == OUTSIDE for name in links)


def test_linked_folders_are_walked_and_loops_end(tmp_path):
    folder = tmp_path / "in"
    for name in ("a/deep/x.txt", "b/y.txt", "../other/z.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    for name, target in (
        ("again", "a"),
        ("a/up", ".."),
        ("a/deep/self", "."),
        ("a/to-b", "../b"),
        ("b/to-a", "../a"),
        ("out", "../other"),
        ("a/out", str(tmp_path)),
    ):
        (folder / name).symlink_to(target)
    place = LocalStorage(folder)
    names = set(place.sizes())
    assert names >= {"a/deep/x.txt", "again/deep/x.txt", "a/to-b/y.txt", "b/to-a/deep/x.txt"} and len(names) < 20
    assert not any("out" in name for name in names)
    assert {name.rpartition("/")[2] for name in place.refused} == {"out"} and {"out", "a/out"} <= set(place.refused)
    follows = LocalStorage(folder, Access(follow_links=True))
    assert "out/z.txt" in follows.sizes() and not follows.refused


def test_links_that_multiply_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("latentsmith.data.storage.MAX_LINKED_FOLDERS", 1000)
    for number in range(40):
        (tmp_path / f"{number}").mkdir()
        for name in "xy":
            (tmp_path / f"{number}" / name).symlink_to(f"../{number + 1}")
    with pytest.raises(BadInput, match="more than 1,000 links to folders"):
        LocalStorage(tmp_path).sizes()


def test_a_folder_named_as_a_file(tmp_path, png, addresses):
    parquets(tmp_path / "source", png)
    (tmp_path / "source").rename(tmp_path / "whole.parquet")
    (tmp_path / "source").mkdir()
    (tmp_path / "whole.parquet").rename(tmp_path / "source" / "whole.parquet")
    (tmp_path / "source" / "whole.parquet" / "beside.png").unlink()
    source = open_source(addresses()["memory"] + "/whole.parquet")
    assert isinstance(source, TableSource) and len(source) == 3


@pytest.mark.parametrize("name", ["nowhere", "nowhere.csv", "nowhere.parquet", ""])
def test_nothing_there(name):
    with pytest.raises(BadInput, match=r"memory://places-none"):
        open_source(f"memory://places-none/{name}".rstrip("/"))


def test_what_is_hidden_does_not_count():
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/hidden-ones/__MACOSX/a.png", b"x")
    memory.pipe_file("/hidden-ones/b/.c.png", b"x")
    memory.pipe_file("/hidden-ones/b/d.png", b"xyz")
    assert RemoteStorage("memory://hidden-ones").sizes() == {"b/d.png": 3}
    memory.store.clear()
