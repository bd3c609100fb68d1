import os
import resource
import signal
import struct
import sys
import traceback
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def randomise():
    """A function that fills a module with random weights of a sane scale, layers that start at zero among them."""

    @torch.no_grad()
    def randomise(module, seed=0):
        generator = torch.Generator().manual_seed(seed)
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            one_dimensional = parameter.dim() < 2  # biases and the scales of norms
            scale = 0.1 if one_dimensional else parameter[0].numel() ** -0.5
            centre = 1.0 if one_dimensional and (parameter == 1).all() else 0.0
            parameter.copy_(centre + scale * noise)
        return module

    return randomise


@pytest.fixture
def limited():
    """Fail a test that blocks, or takes 2 GiB, instead of letting it go on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("blocked for a minute"))
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 * 2**30, hard))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _matrix_profile(gamma: float, swap: bool = False, grey: bool = False) -> bytes:
    """A small profile of sRGB's primaries, in other order if `swap`, or of grey; with a power curve (ICC.1:2010)."""

    def xyz(x, y, z):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in (x, y, z)))

    primaries = [xyz(0.4361, 0.2225, 0.0139), xyz(0.3851, 0.7169, 0.0971), xyz(0.1431, 0.0606, 0.7139)]
    if swap:
        primaries.reverse()
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 79
    tags = [(b"desc", text), (b"wtpt", xyz(0.9642, 1, 0.8249))]
    if grey:
        tags += [(b"kTRC", curve)]
    else:
        tags += list(zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True))
        tags += [(name, curve) for name in (b"rTRC", b"gTRC", b"bTRC")]
    table, body, offset = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, data in tags:
        data += b"\0" * (-len(data) % 4)
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    head = struct.pack(
        ">I4sI4s4s4s", offset + len(body), b"\0" * 4, 0x02400000, b"mntr", b"GRAY" if grey else b"RGB ", b"XYZ "
    )
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + body


@pytest.fixture
def matrix_profile():
    """A function (gamma, swap, grey) -> the bytes of a small ICC profile."""
    return _matrix_profile


KILLED = 137
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")  # audit events, raised before the call itself


@pytest.fixture
def killed_at_write():
    """killed_at_write(command, n): run a function in another process that ends without a word before its n-th change of
    a file or folder; return whether it came so far. Its locks go with it, and no handler of errors runs."""

    def run(command, number: int) -> bool:
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # OpenMP's other threads are not in the fork
            _die_at(number)
            try:
                command()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, KILLED)
        return status == KILLED

    return run


def _die_at(number: int) -> None:
    count = 0

    def look(event, arguments):
        nonlocal count
        opens = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR) and arguments[0] != os.devnull
        count += bool(opens or event in CHANGES)
        if count == number:
            os._exit(KILLED)

    sys.addaudithook(look)
