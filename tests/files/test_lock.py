"""Locks: of two starts one is refused and changes nothing; a killed holder's lock is free at once."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from latentsmith.files import lock
from latentsmith.files.errors import BadInput
from latentsmith.files.lock import LOCK_FILE, locked, locked_folder, remove_stale_locks

HOLD = """
import os, sys, time
from pathlib import Path
from latentsmith.files.lock import locked_folder

with locked_folder(Path(sys.argv[1])):
    if sys.argv[2] == "fork" and os.fork() == 0:
        print("held", flush=True)  # by the parent, and no longer by this process
        os.close(1)
        time.sleep(600)
    if sys.argv[2] == "alone":
        print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder, mode="alone"):
    """A process that holds the lock of a folder until it is killed or its input ends."""
    command = [sys.executable, "-c", HOLD, str(folder), mode]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline().strip() == "held"
    return process


def state(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_the_second_is_refused_by_the_holders_name_and_changes_nothing(tmp_path):
    folder = tmp_path / "run"
    process = holder(folder)
    try:
        before = state(folder)
        assert set(before) == {folder / LOCK_FILE}
        message = rf"run: process {process.pid} on {socket.gethostname()}, started 20\S+, is writing here; wait until"
        for _ in range(2):
            with pytest.raises(BadInput, match=message), locked_folder(folder):
                pass
        assert state(folder) == before
    finally:
        process.communicate()
    assert not folder.exists()  # the lock made it, and nothing came into it


@pytest.mark.parametrize("mode", ["alone", "fork"])
def test_a_killed_holder_leaves_the_lock_free_at_once(tmp_path, mode):
    process = holder(tmp_path, mode)
    process.send_signal(signal.SIGKILL)
    process.wait()
    try:
        assert (tmp_path / LOCK_FILE).exists()
        with locked_folder(tmp_path):
            assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
        assert os.listdir(tmp_path) == []
    finally:
        os.killpg(process.pid, signal.SIGKILL) if mode == "fork" else None
        process.communicate()


def test_shared_locks_admit_each_other_and_no_exclusive_one(tmp_path):
    path = tmp_path / "x"
    with locked(path, tmp_path, shared=True):
        with locked(path, tmp_path, shared=True), pytest.raises(BadInput, match="is writing"), locked(path, tmp_path):
            pass
        assert path.exists()
        with locked(path, tmp_path, shared=True):
            pass
    assert not path.exists()
    with locked(path, tmp_path), pytest.raises(BadInput), locked(path, tmp_path, shared=True):
        pass


def test_a_file_removed_by_its_holder_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    """The other process opened the file before its holder removed it: it must lock the one that stands there now."""
    path, opened = tmp_path / "x", []

    def open_and_lose(*arguments):
        descriptor = os_open(*arguments)
        opened.append(descriptor)
        if len(opened) == 1:
            path.unlink()
        return descriptor

    os_open = os.open
    monkeypatch.setattr(lock.os, "open", open_and_lose)
    with locked(path, tmp_path):
        assert len(opened) == 2 and os.path.samestat(os.fstat(opened[1]), path.stat())


def test_where_there_are_no_locks_that_is_said(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with locked(tmp_path / "x", tmp_path):
        pass
    assert capsys.readouterr().err == "this file system has no locks: do not start the same command twice\n"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    for folder in ("/proc/latentsmith/x", tmp_path / "file" / "x"):
        (tmp_path / "file").touch()
        with pytest.raises(BadInput, match="x: the folder cannot be made"), locked_folder(type(tmp_path)(folder)):
            pass
    with pytest.raises(BadInput, match="cannot be written"), locked(tmp_path / "no" / "x", tmp_path):
        pass


def test_only_stale_locks_are_removed(tmp_path):
    (tmp_path / ".lock-1").touch()
    with locked(tmp_path / ".lock-2", tmp_path):
        remove_stale_locks(tmp_path, ".lock-*")
        assert os.listdir(tmp_path) == [".lock-2"]
