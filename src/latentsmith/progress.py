"""The progress bar of every command: a bar on a terminal, a plain line every so often elsewhere."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from latentsmith.processes import is_first_process
from latentsmith.units import duration

LINE_SECONDS = 10.0  # between two plain lines
BAR_SECONDS = 0.1  # between two updates of a bar: a caller may report 100,000 samples a second
RATE_SECONDS = 30.0  # what the rate is measured over


class Rate:
    """Units per second over the last `seconds`, so that a slow start or a pause does not count for ever."""

    def __init__(self, seconds: float = RATE_SECONDS) -> None:
        self.seconds = seconds
        self.marks: deque[tuple[float, float]] = deque()  # (time, units done), at most about 100

    def update(self, done: float, now: float) -> float:
        """Return the rate; 0 until two reports are apart in time. done: units so far, now: seconds of any clock."""
        if len(self.marks) > 1 and self.marks[-1][0] - self.marks[-2][0] < self.seconds / 100:
            self.marks.pop()
        self.marks.append((now, done))
        while len(self.marks) > 2 and self.marks[1][0] <= now - self.seconds:
            self.marks.popleft()
        start, first = self.marks[0]
        return (done - first) / (now - start) if now > start else 0.0


class _Bar:
    """What `progress` yields; holds the last report."""

    def __init__(
        self,
        title: str,
        unit: str,
        show: Callable[[int, int, str], None],
        every: float,
        clock: Callable[[], float],
        rate_unit: str,
        rate_scale: float,
    ) -> None:
        self.title, self.unit, self.show, self.every, self.clock = title, unit, show, every, clock
        self.rate_unit, self.rate_scale, self.rate = rate_unit, rate_scale, Rate()
        self.first: tuple[float, int] | None = None  # time and units of the first report
        self.shown = clock()
        self.done = self.total = 0
        self.note = ""

    def __call__(self, done: int, total: int, *, note: str = "") -> None:
        """Report `done` units of `total`. note: any text, such as "3 set aside"."""
        now = self.clock()
        self.first = self.first or (now, done)
        self.done, self.total, self.note = done, total, note
        rate = self.rate.update(done, now)
        if now - self.shown >= self.every:
            self.shown = now
            left = [f"{duration((total - done) / rate)} left"] if rate > 0 else []
            self.show(done, total, ", ".join([*self.notes(rate), *left]))

    def notes(self, rate: float) -> list[str]:
        number = rate * self.rate_scale
        shown = f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
        return [*([self.note] if self.note else []), *([f"{shown} {self.rate_unit}/s"] if rate > 0 else [])]

    def summary(self) -> str:
        """Return the line that closes finished work: how long it took, and the mean rate."""
        start, first = self.first or (self.clock(), 0)
        seconds = self.clock() - start
        rate = (self.done - first) / seconds if seconds > 0 else 0.0
        return ", ".join([f"{self.title}: {self.done:,} {self.unit} in {duration(seconds)}", *self.notes(rate)])


@contextmanager
def progress(
    title: str,
    unit: str,
    *,
    rate_unit: str | None = None,
    rate_scale: float = 1.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[..., None]]:
    """Show the progress of a loop on stderr, in the first process only.

        with progress("reading sizes", "images") as bar:
            bar(done, total, note="3 set aside")

    rate_unit, rate_scale: what the rate counts and how many of it make a unit: "samples" and the batch size for
    steps. clock: seconds that only grow.
    """
    console = Console(file=sys.stderr)
    terminal, first = console.is_terminal, is_first_process()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=console, disable=not (terminal and first)) as bars:
        task = bars.add_task(title, total=None, text="")

        def show(done: int, total: int, text: str) -> None:
            if terminal:
                bars.update(task, completed=done, total=total, text=text)
            elif first:
                line = f"{title}: {done:,}/{total:,} {unit}"
                print(", ".join([line, *([text] if text else [])]), file=sys.stderr, flush=True)

        bar = _Bar(title, unit, show, BAR_SECONDS if terminal else LINE_SECONDS, clock, rate_unit or unit, rate_scale)
        yield bar
        if terminal:
            show(bar.done, bar.total, ", ".join(bar.notes(bar.rate.update(bar.done, clock()))))
    if first and not terminal and bar.done == bar.total > 0:
        print(bar.summary(), file=sys.stderr, flush=True)
