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
        self.marks: deque[tuple[float, float]] = deque()  # (time, units done), about 100 at most

    def update(self, done: float, now: float) -> float:
        """Return the rate, 0 until two reports lie apart in time. done: units so far; now: seconds of any clock."""
        if len(self.marks) > 1 and self.marks[-1][0] - self.marks[-2][0] < self.seconds / 100:
            self.marks.pop()
        self.marks.append((now, done))
        while len(self.marks) > 2 and self.marks[1][0] <= now - self.seconds:
            self.marks.popleft()
        start, first = self.marks[0]
        return (done - first) / (now - start) if now > start else 0.0


class ProgressBar:
    """Reports of one loop, shown by a rich bar on a terminal and as plain lines elsewhere."""

    def __init__(self, title: str, unit: str, rate_unit: str, rate_scale: float, clock: Callable[[], float]) -> None:
        self.title, self.unit, self.rate_unit, self.rate_scale, self.clock = title, unit, rate_unit, rate_scale, clock
        console, columns = (
            Console(file=sys.stderr),
            (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}")),
        )
        self.is_plain, self.is_first = not console.is_terminal, is_first_process()
        disable = self.is_plain or not self.is_first
        self.bars = Progress(TextColumn("{task.description}"), *columns, console=console, disable=disable)
        self.task = self.bars.add_task(title, total=None, text="")
        self.rate, self.shown, self.start, self.last = Rate(), clock(), (clock(), 0), (0, 0, "")

    def __call__(self, done: int, total: int, *, note: str = "") -> None:
        """Report `done` units of `total`. note: any text, such as "3 set aside"."""
        now = self.clock()
        if not self.rate.marks:
            self.start = now, done
        rate, self.last = self.rate.update(done, now), (done, total, note)
        if now - self.shown >= (LINE_SECONDS if self.is_plain else BAR_SECONDS) and self.is_first:
            self.shown = now
            left = [f"{duration((total - done) / rate)} left"] if rate > 0 else []
            self.show(f"{done:,}/{total:,} {self.unit}", [*self.notes(rate), *left])

    def finish(self) -> None:
        """Show the last report; where lines are plain and the work is done, how long it took and its mean rate."""
        done, total, _ = self.last
        seconds = self.clock() - self.start[0]
        rate = (done - self.start[1]) / seconds if seconds > 0 else 0.0
        if self.is_first and (done == total > 0 or not self.is_plain):
            self.show(f"{done:,} {self.unit} in {duration(seconds)}", self.notes(rate))

    def notes(self, rate: float) -> list[str]:
        number = rate * self.rate_scale
        speed = f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
        return [text for text in (self.last[2], f"{speed} {self.rate_unit}/s" if rate > 0 else "") if text]

    def show(self, amount: str, notes: list[str]) -> None:
        if self.is_plain:
            print(", ".join([f"{self.title}: {amount}", *notes]), file=sys.stderr, flush=True)
        else:
            done, total, _ = self.last
            self.bars.update(self.task, completed=done, total=total, text=", ".join(notes))


@contextmanager
def progress(
    title: str,
    unit: str,
    *,
    rate_unit: str | None = None,
    rate_scale: float = 1.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[ProgressBar]:
    """Show the progress of a loop on stderr, in the first process only.

        with progress("reading sizes", "images") as bar:
            bar(done, total, note="3 set aside")

    rate_unit, rate_scale: what the rate counts, and how many of them make a unit, such as "samples" and the batch
    size where the unit is steps. clock: returns seconds.
    """
    bar = ProgressBar(title, unit, rate_unit or unit, rate_scale, clock)
    with bar.bars:
        yield bar
        bar.finish()
