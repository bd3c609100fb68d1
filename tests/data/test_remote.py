"""Sets behind fsspec: the same samples as here, whole or in ranges, with no more on this disk than allowed."""

import functools
import json
import os
import pickle
import re
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import fsspec
import pytest

from latentsmith.config import load_config
from latentsmith.data import storage
from latentsmith.data.dataset import tars_of
from latentsmith.data.mirrors import MirrorCache, RemoteFile
from latentsmith.data.shards import ShardSet, ShardWriter, write_set_file
from latentsmith.data.sources import open_source
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_text


@pytest.fixture
def memory():
    """The file system of memory://, emptied afterwards."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture
def folder(tmp_path, memory, png):
    """30 samples in three shards, here and at memory://bucket/set."""
    path = tmp_path / "set"
    with ShardWriter(path, samples_per_shard=10) as writer:
        for number in range(30):
            writer.write(f"{number:06}", {"png": png(seed=number), "txt": f"caption {number}".encode()})
    write_set_file(path, writer.finished)
    memory.put(str(path), "/bucket/set", recursive=True)
    return path


class Server(SimpleHTTPRequestHandler):
    """Files and listings of a folder, and ranges of bytes, as web servers give them."""

    asked: ClassVar[list[str]] = []

    def send_head(self):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = self.translate_path(self.path)
        self.asked.append(f"{self.command} {self.headers.get('Range', 'whole')}")
        if not wanted or not path.endswith(".tar"):
            return super().send_head()
        first, last = map(int, wanted.groups())
        file = open(path, "rb")  # noqa: SIM115, closed by do_GET
        file.seek(0, 2)
        size, last = file.tell(), min(last, file.tell() - 1)
        file.seek(first)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.left = last + 1 - first
        return file

    def copyfile(self, source, out):
        out.write(source.read(self.__dict__.pop("left", -1)))

    def log_message(self, *arguments):
        pass


@pytest.fixture
def web(folder, monkeypatch):
    """The address at which a web server has the set's folder."""
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(Server, "asked", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=folder.parent)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/set"
        server.shutdown()


def contents(shards):
    return [(sample.key, {name: bytes(data) for name, data in sample.members.items()}) for sample in shards]


def opened(url, tmp_path, limit=2**30):
    return ShardSet(url, MirrorCache(tmp_path / "copies", limit))


def test_a_set_that_fits_comes_whole_when_it_is_touched(folder, tmp_path):
    shards = opened("memory://bucket/set", tmp_path)
    assert len(shards) == 30 and not list(tmp_path.glob("copies/*/*.tar"))
    assert shards[15].text("txt") == "caption 15"
    assert [path.name for path in tmp_path.glob("copies/*/*.tar")] == ["shard-000001.tar"]
    assert contents(shards) == contents(ShardSet(folder)) and shards.fingerprint() == ShardSet(folder).fingerprint()
    assert not isinstance(shards.shard(0).bytes, RemoteFile)


def test_a_set_that_is_too_large_is_read_in_ranges(folder, tmp_path, monkeypatch):
    shards = opened("memory://bucket/set", tmp_path, limit=1000)
    assert contents(shards) == contents(ShardSet(folder))
    assert isinstance(shards.shard(0).bytes, RemoteFile) and not list(tmp_path.glob("copies/*/*.tar"))
    asked = []
    read = RemoteFile.__getitem__
    monkeypatch.setattr(RemoteFile, "__getitem__", lambda self, index: asked.append(index) or read(self, index))
    assert shards[17].text("txt") == "caption 17"
    assert len(asked) == 1 and asked[0].stop - asked[0].start < 10_000  # one request, of this sample alone


@pytest.mark.parametrize("limit", [2**30, 1000], ids=["whole", "ranges"])
def test_over_http(folder, web, tmp_path, limit):
    """A folder with set.json, tars found by the server's listing, and one by its name."""
    whole = contents(ShardSet(folder))
    shards = opened(web, tmp_path, limit)
    assert contents(shards) == whole
    assert isinstance(shards.shard(0).bytes, RemoteFile) == (limit == 1000)
    ranges = [line for line in Server.asked if "bytes=" in line]
    assert (len(ranges) >= 30) == (limit == 1000)
    assert contents(opened(f"{web}/shard-000002.tar", tmp_path, limit)) == whole[20:]
    (folder / "set.json").unlink()
    assert contents(opened(f"{web}/shard-*.tar", tmp_path, limit)) == whole
    with pytest.raises(BadInput, match=r"shard-000009\.tar"):
        opened(f"{web}/shard-000009.tar", tmp_path, limit)


@pytest.mark.parametrize("limit", [2**30, 1000], ids=["whole", "ranges"])
@pytest.mark.parametrize("indexed", [True, False])
def test_plain_tars_and_patterns(folder, memory, tmp_path, limit, indexed):
    memory.rm("/bucket/set/set.json")
    if not indexed:
        for number in range(3):
            memory.rm(f"/bucket/set/shard-00000{number}.index.npy")
    whole = contents(ShardSet(folder))
    assert contents(opened("memory://bucket/set", tmp_path, limit)) == whole
    assert contents(opened("memory://bucket/set/shard-*.tar", tmp_path, limit)) == whole
    assert contents(opened("memory://bucket/set/shard-{000000..000001}.tar", tmp_path, limit)) == whole[:20]
    assert contents(opened("memory://bucket/set/shard-000002.tar", tmp_path, limit)) == whole[20:]


def test_members_far_apart_are_asked_for_alone(tmp_path, memory):
    with ShardWriter(tmp_path / "set", shared=("npy",)) as writer:
        for number in range(3):
            filling = bytes(200_000) if number == 1 else b"x"
            writer.write(f"{number}", {"npy": b"the same", "txt": f"{number}".encode(), "bin": filling})
    write_set_file(tmp_path / "set", writer.finished)
    memory.put(str(tmp_path / "set"), "/bucket/shared", recursive=True)
    shards = opened("memory://bucket/shared", tmp_path, limit=0)
    assert contents(shards) == contents(ShardSet(tmp_path / "set"))


def test_the_least_recently_touched_gives_way(folder, memory, tmp_path):
    memory.put(str(folder), "/bucket/other", recursive=True)
    size = ShardSet(folder).bytes
    first, second = opened("memory://bucket/set", tmp_path, size), opened("memory://bucket/other", tmp_path, size)
    whole = contents(ShardSet(folder))
    assert contents(first) == whole
    assert contents(second) == whole
    held = sum(path.stat().st_size for path in tmp_path.glob("copies/*/*.tar"))
    assert held <= size
    assert contents(first) == whole  # what was mapped stays; what is opened anew comes again
    assert contents(opened("memory://bucket/set", tmp_path, size)) == whole
    assert sum(path.stat().st_size for path in tmp_path.glob("copies/*/*.tar")) <= size


def test_a_set_that_has_changed_is_not_taken_for_its_copy(folder, memory, tmp_path):
    before = contents(opened("memory://bucket/set", tmp_path))
    with ShardWriter(tmp_path / "new", samples_per_shard=10) as writer:
        writer.write("000000", {"txt": b"another"})
    write_set_file(tmp_path / "new", writer.finished)
    memory.rm("/bucket/set", recursive=True)
    memory.put(str(tmp_path / "new"), "/bucket/set", recursive=True)
    after = contents(opened("memory://bucket/set", tmp_path))
    assert len(before) == 30 and after == [("000000", {"txt": b"another"})]


def test_a_plain_tar_of_the_same_size_is_not_taken_for_its_copy(memory, tmp_path):
    for text in (b"first", b"other"):
        with ShardWriter(tmp_path / text.decode()) as writer:
            writer.write("0", {"txt": text})
        memory.put(str(tmp_path / text.decode() / "shard-000000.tar"), "/bucket/plain/a.tar")
        assert opened("memory://bucket/plain", tmp_path)[0].text("txt") == text.decode()


@pytest.mark.parametrize("name", ["../../stray.tar", "/stray.tar", "..", "remote.json"])
def test_no_file_outside_the_copies_is_written(folder, memory, tmp_path, name):
    listed = memory.cat_file("/bucket/set/set.json").replace(b'"shard-000001.tar"', json.dumps(name).encode())
    memory.pipe_file("/bucket/set/set.json", listed)
    with pytest.raises(BadInput, match=rf"names '{re.escape(name)}', which is not a \.tar beside it"):
        opened("memory://bucket/set", tmp_path)


def everything(folder):
    """The files below a folder, links not followed, with their bytes or where they lead."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def hostile_remote_json(url, names):
    """remote.json as this cache wrote it before, and as it writes it now, in one."""
    sizes = dict.fromkeys(names, 1)
    old = {"url": url, "sizes": sizes, "whole": True, "limit": 0}
    return json.dumps({**old, "tars": {name: [1, ""] for name in names}})


@pytest.fixture
def data(folder, tmp_path):
    """A user's set, and beside it a folder from elsewhere whose remote.json asks for fetching and deleting."""
    root = tmp_path / "data"
    for name in ("mine", "hostile"):
        (root / name).mkdir(parents=True)
        for path in folder.glob("*.tar"):
            (root / name / path.name).write_bytes(path.read_bytes())
        for path in folder.glob("*.index.npy"):
            (root / name / path.name).write_bytes(path.read_bytes())
    names = [path.name for path in folder.glob("*.tar")]
    (root / "hostile" / "remote.json").write_text(hostile_remote_json(f"file://{folder}", [*names, "more.tar"]))
    return root


@pytest.mark.parametrize("location", ["elsewhere", "in the cache folder", "linked into the cache folder"])
def test_a_remote_json_found_in_data_is_not_obeyed(data, folder, tmp_path, location):
    """Such a folder is a plain folder of tars, and no file of it or beside it is deleted, changed or fetched."""
    copies, hostile = MirrorCache(tmp_path / "copies", 2**30), data / "hostile"
    if location == "in the cache folder":
        copies = MirrorCache(data, 0)
    if location == "linked into the cache folder":
        copies.folder.mkdir()
        about = json.loads((hostile / "remote.json").read_text())
        name = fingerprint_text(json.dumps([about["url"], about["tars"]]))[:24]
        hostile = hostile.rename(data / name)
        assert MirrorCache(data).mirror_at(hostile) is not None  # as if it was made here, but for the link
        (copies.folder / name).symlink_to(hostile)
        hostile = copies.folder / name
    (hostile / "shard-000000.tar").unlink()  # which obeying would fetch
    before = everything(data)
    assert contents(ShardSet(hostile, copies)) == contents(ShardSet(folder))[10:]
    assert contents(ShardSet(hostile / "shard-000001.tar", copies)) == contents(ShardSet(folder))[10:20]
    assert everything(data) == before


def test_only_tars_that_the_cache_fetched_are_deleted(data, folder, memory, tmp_path):
    """In a cache folder that holds a user's data too: other folders, other tars beside a copy, and links stay."""
    memory.put(str(folder), "/bucket/other", recursive=True)
    copies = MirrorCache(data, ShardSet(folder).bytes)
    before = everything(data)
    first = ShardSet("memory://bucket/set", copies)
    assert contents(first) == contents(ShardSet(folder))
    copy = first.paths[0].parent
    (copy / "mine.tar").write_bytes(b"of the user")
    (copy / "shard-000002.tar").unlink()
    (copy / "shard-000002.tar").symlink_to(data / "mine" / "shard-000002.tar")
    (data / ("0" * 24)).symlink_to(data / "mine")
    assert contents(ShardSet("memory://bucket/other", copies)) == contents(first)
    assert {path.name for path in copy.glob("*.tar")} == {"mine.tar", "shard-000002.tar"}
    assert before.items() <= everything(data).items()


def test_the_limit_is_that_of_the_running_config(folder, tmp_path):
    assert not isinstance(opened("memory://bucket/set", tmp_path).shard(0).bytes, RemoteFile)
    for path in (tmp_path / "copies").iterdir():
        assert isinstance(ShardSet(path, MirrorCache(tmp_path / "copies", 1000)).shard(0).bytes, RemoteFile)


def test_nothing_is_written_through_a_link_in_the_cache(folder, tmp_path):
    copy = opened("memory://bucket/set", tmp_path).paths[0].parent
    copy.rename(tmp_path / "moved")
    copy.symlink_to(tmp_path / "moved")
    before = everything(tmp_path)
    with pytest.raises(BadInput, match="a symbolic link in the cache of remote sets"):
        opened("memory://bucket/set", tmp_path)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["../mine/shard-000001.tar", "/etc/hostname", ".."])
def test_a_set_json_names_files_beside_it_alone(folder, name):
    listed = (folder / "set.json").read_text().replace('"shard-000001.tar"', json.dumps(name))
    (folder / "set.json").write_text(listed)
    with pytest.raises(BadInput, match=rf"names '{re.escape(name)}', which is not a file beside it"):
        ShardSet(folder)


@pytest.mark.parametrize("name", ["file:///etc/b.tar", "/etc/b.tar", "sub/../../b.tar"])
def test_a_wdinfo_names_tars_in_its_folder_alone(tmp_path, name):
    (tmp_path / "wdinfo.pkl").write_bytes(pickle.dumps({"tar_files": ["a.tar", name]}))
    config = load_config("demo")
    with pytest.raises(BadInput, match=rf"lists '{re.escape(name)}', which is not in its folder"):
        tars_of(config, str(tmp_path / "wdinfo.pkl"))


def test_a_tar_that_is_shorter_than_said_is_named(folder, memory, tmp_path):
    data = memory.cat_file("/bucket/set/shard-000001.tar")
    memory.pipe_file("/bucket/set/shard-000001.tar", data[:-10240])
    with pytest.raises(BadInput, match=r"shard-000001\.tar"):
        contents(opened("memory://bucket/set", tmp_path))


def test_failures_of_the_network_are_asked_again(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    system, failures = fsspec.filesystem("memory"), [OSError("reset"), TimeoutError("slow")]
    read = type(system).cat_file

    def flaky(self, path, **options):
        if path.endswith(".tar") and failures:
            raise failures.pop()
        return read(self, path, **options)

    monkeypatch.setattr(type(system), "cat_file", flaky)
    assert contents(opened("memory://bucket/set", tmp_path, limit=0)) == contents(ShardSet(folder))
    assert not failures
    failures += [OSError("reset")] * 10
    with pytest.raises(BadInput, match=r"memory://bucket/set/shard-000000\.tar: cannot be read \(OSError: reset\)"):
        _ = opened("memory://bucket/set", tmp_path, limit=0)[0]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://bucket/nothing", "no set.json and no .tar"),
        ("memory://bucket/nothing.tar", "cannot be read"),
        ("memory://bucket/half", "unfinished"),
        ("martian://bucket/set", "Protocol not known"),
    ],
)
def test_what_is_not_there_is_one_line(folder, memory, tmp_path, url, message):
    memory.pipe_file("/bucket/half/unfinished.json", b"{}")
    with pytest.raises(BadInput, match=message) as caught:
        opened(url, tmp_path)
    assert url.split("/")[0] in str(caught.value) and "\n" not in str(caught.value)


def test_tars_are_imported_from_afar(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTSMITH_DATA_CACHE", str(tmp_path / "copies"))
    items = list(open_source("memory://bucket/set").items())
    assert len(items) == 30 and items[3].caption() == "caption 3"
    copies = MirrorCache(tmp_path / "copies")
    assert [copies.mirror_at(path).url for path in copies.folder.iterdir()] == ["memory://bucket/set"]
