import os
import resource
import signal
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


KILLED = 137
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")  # audit events, raised before the call itself


@pytest.fixture
def killed_at_write():
    """killed_at_write(command, n): run a function in another process that ends without a word before its n-th change of
    a file or folder; return whether it came so far. Its locks go with it, and no handler of errors runs."""

    def run(command, number: int) -> bool:
        child = os.fork()
        if child == 0:
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
