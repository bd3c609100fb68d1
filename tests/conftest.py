import resource
import signal
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
