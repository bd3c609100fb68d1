"""What the commands ask of the allocator, in processes of their own."""

import os
import platform
import subprocess
import sys

import pytest

KEPT = """
import sys
sys.argv[1:] = {command!r}.split()
from latentsmith.cli import main
called = []
sys.modules["latentsmith.cli.main"].keep_freed_memory = lambda: called.append(1)
main()
import os
import platform
print(len(called), os.environ["THP_MEM_ALLOC_ENABLE"])
"""
HELD = """
import torch
from latentsmith.cpu.allocator import keep_freed_memory
keep_freed_memory()
def resident():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) // 1024
before = resident()
big = torch.ones(64 << 18)
del big
print(resident() - before)
"""


def run(code, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "THP_"))}
    arguments = [sys.executable, "-c", code]
    return subprocess.run(arguments, capture_output=True, text=True, check=True, env=clean | environment).stdout.split(
        "\n"
    )


@pytest.mark.parametrize(("command", "kept"), [("train --help", "1"), ("generate --help", "0"), ("--help", "0")])
def test_only_trainings_keep_what_they_free(command, kept):
    assert run(KEPT.format(command=command))[-2] == f"{kept} 1"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc, and reads /proc")
def test_freed_memory_stays_unless_the_environment_says_otherwise():
    """64 MiB, which an allocator left as it is gives back at once."""
    assert int(run(HELD)[-2]) > 48
    assert int(run(HELD, MALLOC_ARENA_MAX="2")[-2]) < 16
