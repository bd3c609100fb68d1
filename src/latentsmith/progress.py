"""Progress of long work: a bar with rate and time left on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0


@contextmanager
def progress(title: str, unit: str) -> Iterator[Callable[..., None]]:
    """A function to be told (done, total[, bad]) as the work goes on; shows title, rate in `unit`/s and time left."""
    console = Console(file=sys.stderr)
    started = printed = time.monotonic()
    first: int | None = None
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None, rate="")

        def tell(done: int, total: int, bad: int = 0) -> None:
            nonlocal printed, first
            first = done if first is None else first
            now = time.monotonic()
            rate = (done - first) / max(now - started, 1e-9)
            set_aside = f", {bad:,} set aside" if bad else ""
            bar.update(task, completed=done, total=total, rate=f"{rate:,.0f} {unit}/s{set_aside}")
            if not console.is_terminal and now - printed > PLAIN_SECONDS:
                printed = now
                left = f", {(total - done) / rate:.0f} s left" if rate > 0 else ""
                print(
                    f"{title}: {done:,}/{total:,} {unit}, {rate:,.1f}/s{left}{set_aside}",
                    file=sys.stderr,
                    flush=True,
                )

        yield tell
