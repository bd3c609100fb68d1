"""The thread that owns the device, and networks whose calls from several images run as one batch.

Each image is sampled in a thread of its own by the same samplers as everywhere else. Its calls of the U-Net wait here
until every image under way waits too; those of equal shape then run as one. So an image joins the others at its first
step and leaves after its last one, whatever sampler, number of steps and guidance each has.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("latentsmith.server")


@dataclass(eq=False)
class NetworkCall:
    """A call that waits for others. conditioning: tensors (batch, ...), joined along the batch axis."""

    network: Callable[..., Tensor]
    noisy: Tensor
    timesteps: Tensor
    conditioning: Mapping[str, Tensor]
    result: Future[Tensor] = field(default_factory=Future)

    @property
    def key(self) -> tuple[Any, ...]:
        """Return what calls that can run together have in common."""
        shapes = [(name, tuple(value.shape[1:])) for name, value in sorted(self.conditioning.items())]
        return id(self.network), tuple(self.noisy.shape[1:]), self.noisy.dtype, tuple(shapes)


class DeviceWorker:
    """Run work on one thread: batches of network calls, and anything else by itself.

    max_rows: rows of a network's batch; an image with guidance has two. on_batch: called with the rows of each batch.
    """

    def __init__(self, max_rows: int = 16, on_batch: Callable[[int], None] = lambda rows: None):
        self.max_rows, self.on_batch = max_rows, on_batch
        self._changed = threading.Condition()
        self._tasks: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._calls: list[NetworkCall] = []
        self._computing = 0  # images that do not wait for this thread
        self._here = threading.local()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="device", daemon=True)
        self._thread.start()

    @contextmanager
    def image(self) -> Iterator[None]:
        """Count this thread as one that samples an image: batches wait for its next call."""
        with self._changed:
            self._computing += 1
        self._here.samples = True
        try:
            yield
        finally:
            self._here.samples = False
            self._count(-1)

    def run(self, function: Callable[[], Any]) -> Any:
        """Return function(), run on the device's thread. Raises what it raises."""
        future: Future[Any] = Future()
        return self._wait(lambda: self._tasks.append((function, future)), future)

    def call(
        self, network: Callable[..., Tensor], noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """Return network(noisy, timesteps, **conditioning), computed with the calls of other images."""
        call = NetworkCall(network, noisy, timesteps, conditioning)
        found: Tensor = self._wait(lambda: self._calls.append(call), call.result)
        return found

    def close(self) -> None:
        """End the thread after the work it has. Later work raises RuntimeError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _wait(self, submit: Callable[[], None], future: Future[Any]) -> Any:
        samples = getattr(self._here, "samples", False)
        if samples:  # counted again before its caller goes on, so that no batch leaves without it
            future.add_done_callback(lambda _: self._count(1))
        with self._changed:
            if self._closed:
                raise RuntimeError("the server is shutting down")
            submit()
            self._computing -= 1 if samples else 0
            self._changed.notify_all()
        return future.result()

    def _count(self, change: int) -> None:
        with self._changed:
            self._computing += change
            self._changed.notify_all()

    def _loop(self) -> None:
        with torch.no_grad():
            while (work := self._next()) is not None:
                work()

    def _next(self) -> Callable[[], None] | None:
        """Wait for work and return it; None when closed."""

        def ready() -> bool:
            return self._closed or bool(self._tasks) or bool(self._calls and self._computing <= 0)

        with self._changed:
            self._changed.wait_for(ready)
            if self._tasks:
                function, future = self._tasks.popleft()
                return lambda: fulfil(future, function)
            if not self._calls:
                return None
            batch = self._take()
        return lambda: self._run_batch(batch)

    def _take(self) -> list[NetworkCall]:
        """Take the oldest call, and as many like it as a batch holds."""
        first, rows, taken = self._calls[0], 0, list[NetworkCall]()
        for call in [each for each in self._calls if each.key == first.key]:
            if not taken or rows + len(call.noisy) <= self.max_rows:
                taken.append(call)
                rows += len(call.noisy)
        self._calls = [each for each in self._calls if each not in taken]
        return taken

    def _run_batch(self, batch: Sequence[NetworkCall]) -> None:
        self.on_batch(sum(len(call.noisy) for call in batch))
        try:
            outputs = joined(batch).split([len(call.noisy) for call in batch])
        except torch.OutOfMemoryError:
            if len(batch) > 1:
                log.warning("%d images at a time exceed the device's memory; they run one by one", len(batch))
                self.max_rows = max(1, sum(len(call.noisy) for call in batch) // 2)
                for call in batch:
                    self._run_batch([call])
                return
            fail(batch, RuntimeError("the image exceeds the device's memory; ask for a smaller one"))
        except Exception as error:
            fail(batch, error)
        else:
            for call, output in zip(batch, outputs, strict=True):
                call.result.set_result(output)


def joined(batch: Sequence[NetworkCall]) -> Tensor:
    """Return the network's output for all rows of the calls."""
    if len(batch) == 1:
        return batch[0].network(batch[0].noisy, batch[0].timesteps, **batch[0].conditioning)
    conditioning = {name: torch.cat([call.conditioning[name] for call in batch]) for name in batch[0].conditioning}
    noisy, timesteps = torch.cat([call.noisy for call in batch]), torch.cat([call.timesteps for call in batch])
    return batch[0].network(noisy, timesteps, **conditioning)


def fulfil(future: Future[Any], function: Callable[[], Any]) -> None:
    try:
        result = function()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


def fail(batch: Sequence[NetworkCall], error: Exception) -> None:
    for call in batch:
        call.result.set_exception(error)
