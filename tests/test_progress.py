"""The progress bar, with a clock of the test's own."""

import sys

import pytest

from latentsmith.processes import is_first_process
from latentsmith.progress import Rate, progress
from latentsmith.units import duration


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def run(clock, seconds, **options):
    """Report 10 units, one after each of `seconds`, given in a list."""
    with progress("reading", "images", clock=clock, **options) as bar:
        bar(0, len(seconds))
        for done, second in enumerate(seconds, 1):
            clock.now += second
            bar(done, len(seconds), note="2 set aside" if done > 5 else "")


def test_plain_lines_come_every_ten_seconds_and_at_the_end(clock, capsys):
    run(clock, [4.0] * 10)
    assert capsys.readouterr().err.splitlines() == [
        "reading: 3/10 images, 0.25 images/s, 0:28 left",
        "reading: 6/10 images, 2 set aside, 0.25 images/s, 0:16 left",
        "reading: 9/10 images, 2 set aside, 0.25 images/s, 0:04 left",
        "reading: 10 images in 0:40, 2 set aside, 0.25 images/s",
    ]


def test_rate_of_another_unit(clock, capsys):
    run(clock, [11.0, 11.0], rate_unit="samples", rate_scale=1100)
    assert capsys.readouterr().err.splitlines()[0] == "reading: 1/2 images, 100 samples/s, 0:11 left"


def test_rate_and_time_left_follow_the_last_seconds(clock, capsys):
    """Four slow units, then fast ones: the mean since the start would say 0.03 images/s and ten minutes left."""
    run(clock, [100.0] * 4 + [1.0] * 60)
    assert "reading: 54/64 images, 2 set aside, 1 images/s, 0:10 left" in capsys.readouterr().err.splitlines()


def test_rate_over_many_reports_keeps_few_of_them():
    rate = Rate(seconds=30)
    assert rate.update(0, 0.0) == 0
    for report in range(1, 100_001):
        value = rate.update(report, report / 1000)
    assert value == pytest.approx(1000) and len(rate.marks) < 110


def test_work_that_fails_prints_no_last_line(clock, capsys):
    with pytest.raises(ValueError), progress("reading", "images", clock=clock) as bar:
        bar(1, 1)
        raise ValueError
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID", "LOCAL_RANK"])
def test_only_the_first_process_shows_it(clock, capsys, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    run(clock, [11.0] * 3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "LOCAL_RANK": "0"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "LOCAL_RANK": "1"}, False),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "NODE_RANK": "1"}, True),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, False),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "LOCAL_RANK": "1"}, False),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0", "NODE_RANK": "0"}, True),
        ({}, True),
    ],
    ids=["torchrun in srun", "its second", "its second host", "srun", "Lightning in srun", "Lightning", "none"],
)
def test_the_first_process_is_that_of_rank_zero(monkeypatch, variables, first):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() == first


def test_a_bar_on_a_terminal(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    run(clock, [4.0] * 10)
    shown = capsys.readouterr().err
    assert "10/10" in shown and "2 set aside, 0.25 images/s" in shown and "reading: " not in shown


@pytest.mark.parametrize("seconds, text", [(0.4, "0:00"), (41, "0:41"), (599.6, "10:00"), (3723, "1:02:03")])
def test_duration(seconds, text):
    assert duration(seconds) == text
