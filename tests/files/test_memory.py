"""How much memory a process has taken, in bytes on every system."""

import resource
import sys
from types import SimpleNamespace

import pytest

from latentsmith.files.memory import peak_bytes


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_the_peak_is_in_bytes(monkeypatch, platform, unit):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=3_000_000))
    assert peak_bytes() == 3_000_000 * unit


def test_the_peak_of_this_process():
    assert 2**24 < peak_bytes() < 2**40


def test_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_bytes() != peak_bytes()  # NaN
