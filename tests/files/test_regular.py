"""Regular files are read up to a limit; whatever blocks or never ends is refused in one line."""

import json
import os
import socket
import tarfile

import pytest

from latentsmith.files.archives import is_archive, open_nemo
from latentsmith.files.errors import BadInput
from latentsmith.files.regular import NotRegular, SizeLimit, TooLarge, check_regular, open_regular, read_regular
from latentsmith.files.tensors import open_tensors
from latentsmith.inference.coco_captions import read_captions

LIMIT = SizeLimit("a test", 1000)


@pytest.fixture
def special(tmp_path):
    """Paths that are no regular files, by what the error calls them."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link-to-fifo").symlink_to("fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tmp_path)  # a socket's path has at most 107 bytes
        server.bind("socket")
    names = {"fifo": "a FIFO", "link-to-fifo": "a FIFO", "zero": "a character device", "socket": "a socket"}
    return {tmp_path / name: title for name, title in names.items()} | {tmp_path: "a directory"}


@pytest.fixture(autouse=True)
def same_folder(monkeypatch):
    monkeypatch.chdir(os.getcwd())  # restores it


def test_whole_files(tmp_path):
    path = tmp_path / "file"
    for size in (0, 1, 999, 1000):
        path.write_bytes(os.urandom(size))
        assert read_regular(path, LIMIT) == path.read_bytes()
        with open_regular(path) as file:
            assert file.read() == path.read_bytes()
    with open_regular(path, LIMIT) as file:
        assert file.seek(-10, os.SEEK_END) == 990 and file.read() == path.read_bytes()[-10:]
    assert check_regular(path).st_size == 1000
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "gone", LIMIT)


def test_large_files_are_refused_by_name(tmp_path):
    (tmp_path / "file").write_bytes(bytes(1001))
    with pytest.raises(TooLarge, match=r"/file: 1,001 bytes, more than the 1,000 allowed for a test$"):
        open_regular(tmp_path / "file", LIMIT)


def test_a_file_that_grows_is_bounded(tmp_path):
    (tmp_path / "file").write_bytes(bytes(1000))
    for read in (lambda file: file.read(), lambda file: file.read(2000), lambda file: list(file)):
        with open_regular(tmp_path / "file", LIMIT) as file:
            os.truncate(tmp_path / "file", 2**40)
            with pytest.raises(TooLarge):
                read(file)
        os.truncate(tmp_path / "file", 1000)


def test_files_of_proc_are_bounded(limited):
    """Their size is 0, whatever they hold."""
    assert b"MemTotal" in read_regular("/proc/meminfo", SizeLimit("a test", 100_000))
    with pytest.raises(TooLarge, match="/proc/meminfo"):
        read_regular("/proc/meminfo", SizeLimit("a test", 100))
    with pytest.raises((OSError, TooLarge)):
        read_regular("/proc/self/mem", LIMIT)


def test_special_files_are_refused(special, limited):
    for path, title in special.items():
        for refuse in (check_regular, open_regular, lambda path: read_regular(path, LIMIT)):
            with pytest.raises(NotRegular) as error:
                refuse(path)
            assert str(error.value) == f"{path}: is {title}; a regular file was expected"


def test_checkpoints_are_regular_files(special, tmp_path, limited):
    for path in special:
        if path != tmp_path:
            for refuse in (open_tensors, open_nemo, is_archive):
                with pytest.raises(NotRegular):
                    refuse(path)
    os.mkfifo(tmp_path / "model_config.yaml")
    with pytest.raises(NotRegular):
        open_nemo(tmp_path)
    (tmp_path / "model_config.yaml").unlink()
    (tmp_path / "model_config.yaml").write_text("a: 1")
    os.mkfifo(tmp_path / "model_weights.ckpt")
    with pytest.raises(NotRegular):
        open_nemo(tmp_path)
    os.mkfifo(tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    with pytest.raises(BadInput):
        open_tensors(tmp_path / "model.safetensors.index.json")


def test_large_config_of_an_unpacked_archive(tmp_path):
    with open(tmp_path / "model_config.yaml", "wb") as file:
        file.truncate(2**30)
    with pytest.raises(TooLarge, match="allowed for a config"):
        open_nemo(tmp_path)


def test_an_archive_is_read_as_before(tmp_path):
    with tarfile.open(tmp_path / "a.nemo", "w"):
        pass
    with pytest.raises(BadInput, match=r"no model_config\.yaml inside"):
        open_nemo(tmp_path / "a.nemo")


def test_files_of_captions(tmp_path, limited):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n\n")
    assert read_captions(tmp_path, None) == ["one", "two"]
    os.mkfifo(tmp_path / "b.txt")
    with pytest.raises(BadInput, match=r"b\.txt: is a FIFO"):
        read_captions(tmp_path, None)
