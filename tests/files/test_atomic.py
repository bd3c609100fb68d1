import os
import resource
import signal
import subprocess
import sys

import pytest

from latentsmith.cli.main import exit_code
from latentsmith.files.atomic import INCOMPLETE, atomic_open, remove_incomplete, write_bytes, write_text


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    write_bytes(path, b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(path.parent) == ["a.txt"]


def test_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")
    with pytest.raises(RuntimeError, match="half way"), atomic_open(path) as file:
        file.write(b"new but n")
        raise RuntimeError("half way")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_full_disk_names_the_file(tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        code = exit_code(lambda: write_bytes(tmp_path / "a.bin", bytes(2000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1 and os.listdir(tmp_path) == []
    assert capsys.readouterr().err == f"latentsmith: {tmp_path}/a.bin: File too large\n"


def test_two_writers_of_one_name_do_not_mix(tmp_path):
    path = tmp_path / "a"
    with atomic_open(path) as first, atomic_open(path) as second:
        first.write(b"1" * 10)
        second.write(b"2" * 20)
    assert path.read_bytes() == b"1" * 10  # the first to open is the last to close


def test_killed_writer_leaves_no_file_of_that_name(tmp_path):
    program = (
        "import sys; from latentsmith.files.atomic import atomic_open\n"
        "with atomic_open(sys.argv[1]) as file:\n"
        "    file.write(b'half'); file.flush(); print('writing', flush=True); sys.stdin.read()\n"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path / "a.bin")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline().strip() == b"writing"
        writer.send_signal(signal.SIGKILL)
    (leftover,) = os.listdir(tmp_path)
    assert leftover.startswith(".a.bin.") and leftover.endswith(INCOMPLETE)
    remove_incomplete(tmp_path)
    assert os.listdir(tmp_path) == []
