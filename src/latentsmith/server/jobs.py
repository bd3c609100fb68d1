"""Jobs: what clients ask for, queued fairly, sampled together, and kept for a while."""

import logging
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from PIL import Image

from latentsmith.files.errors import BadInput
from latentsmith.image_request import ImageRequest, SamplingOptions
from latentsmith.inference.requests import PreparedRequest

from .limits import Limits
from .models import LoadedModel, ModelShelf
from .worker import DeviceWorker

log = logging.getLogger("latentsmith.server")


class QueueFull(Exception):
    """The queue takes no more images. seconds: when to try again."""

    def __init__(self, seconds: int):
        super().__init__(f"the queue is full; try again in {seconds} s")
        self.seconds = seconds


class Status(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(eq=False)
class Job:
    """Images that one request asks for, all of one model and with the same options.

    client: whose turn it is counted as. images: in the order of requests, None until made. steps_done: over all images.
    on_change: called, from any thread, after each step and at the end.
    """

    model: str
    requests: Sequence[ImageRequest]
    options: SamplingOptions
    client: str = ""
    wants_previews: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    status: Status = Status.QUEUED
    error: Exception | None = None
    images: list[Image.Image | None] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    steps_done: int = 0
    steps: int = 0
    started: float | None = None
    ended: float | None = None
    preview: Image.Image | None = None
    cancelled: bool = False
    on_change: list[Callable[[], object]] = field(default_factory=list)
    tasks_left: int = 0

    @property
    def is_over(self) -> bool:
        return self.status in (Status.DONE, Status.FAILED, Status.CANCELLED)

    @property
    def seconds_left(self) -> float | None:
        """Estimate the time to the end from the steps so far; None before the first one."""
        if self.started is None or not self.steps_done:
            return None
        return (time.time() - self.started) / self.steps_done * (self.steps - self.steps_done)

    def cancel(self) -> None:
        """Stop at the next step. Images that are done are kept."""
        self.cancelled = True

    def changed(self) -> None:
        for callback in [*self.on_change]:
            callback()


@dataclass(eq=False)
class ImageTask:
    """One image of a job."""

    job: Job
    index: int
    prepared: PreparedRequest
    options: SamplingOptions
    model: LoadedModel


class FairQueue:
    """Images that wait: each client's in order, the clients in turn."""

    def __init__(self) -> None:
        self.waiting: OrderedDict[str, deque[ImageTask]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self.waiting.values()))

    def add(self, task: ImageTask) -> None:
        self.waiting.setdefault(task.job.client, deque()).append(task)

    def take(self) -> ImageTask:
        """Remove and return the next image; its client is then the last in turn."""
        client, tasks = next(iter(self.waiting.items()))
        task = tasks.popleft()
        del self.waiting[client]
        if tasks:
            self.waiting[client] = tasks
        return task

    def position(self, job: Job) -> int:
        """Return how many images come before a job's first one that waits."""
        turns = {client: [*tasks] for client, tasks in self.waiting.items()}
        own = turns.get(job.client, [])
        place = next((index for index, task in enumerate(own) if task.job is job), None)
        if place is None:
            return 0
        clients = [*turns]
        before = clients.index(job.client)
        counts = [len(tasks) for client, tasks in turns.items() if client != job.client]
        return place + sum(min(count, place + (turn < before)) for turn, count in enumerate(counts))


class JobRunner:
    """Sample the images of jobs, `at_once` of them at a time, each in a thread of its own."""

    def __init__(self, shelf: ModelShelf, worker: DeviceWorker, limits: Limits, at_once: int = 8):
        self.shelf, self.worker, self.limits = shelf, worker, limits
        self.queue, self.jobs = FairQueue(), OrderedDict[str, Job]()
        self.running: set[Job] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._loop, name=f"image-{number}", daemon=True) for number in range(at_once)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> Job:
        """Queue a job. Raises BadInput for what cannot be made and QueueFull; loads the model if it is not there."""
        self.limits.check(job.requests, job.options)
        self._check_space(len(job.requests))
        model = self.shelf.take(job.model)
        try:
            options, prepared = model.pipeline.prepare(job.requests, job.options)
            self.limits.check_size(options)
            steps = options.steps_from_image if prepared[0].init_image else options.num_inference_steps
            job.options, job.steps, job.tasks_left = options, steps * len(prepared), len(prepared)
            job.images, job.metadata = [None] * len(prepared), [{}] * len(prepared)
            with self._changed:
                self._check_space(len(prepared))
                self._forget_old()
                self.jobs[job.id] = job
                for index, each in enumerate(prepared):
                    self.queue.add(ImageTask(job, index, each, options, model))
                    self.shelf.use(model)
                self._changed.notify_all()
        finally:
            self.shelf.give_back(model)
        return job

    def _check_space(self, images: int) -> None:
        if self._closed:
            raise QueueFull(self.limits.retry_seconds)
        if len(self.queue) + images > self.limits.queued_images:
            raise QueueFull(self.limits.retry_seconds)

    def get(self, id: str) -> Job | None:
        """Return a job that is not forgotten yet."""
        with self._changed:
            self._forget_old()
            return self.jobs.get(id)

    def position(self, job: Job) -> int:
        with self._changed:
            return self.queue.position(job)

    def close(self, *, finish: bool) -> None:
        """Take no more jobs, and end. finish: sample what is queued first; else cancel it."""
        with self._changed:
            self._closed = True
            if not finish:
                for job in self.jobs.values():
                    job.cancel()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _forget_old(self) -> None:
        oldest = time.time() - self.limits.kept_seconds
        for id, job in [*self.jobs.items()]:
            if job.ended is not None and job.ended < oldest:
                del self.jobs[id]

    def _loop(self) -> None:
        while (task := self._next()) is not None:
            try:
                self._sample(task)
            except Exception as error:  # of one image; the thread goes on to the next
                self._fail(task.job, error)
            finally:
                self.shelf.give_back(task.model)
                self._finish(task.job)

    def _next(self) -> ImageTask | None:
        with self._changed:
            self._changed.wait_for(lambda: len(self.queue) or self._closed)
            if not len(self.queue):
                return None
            task = self.queue.take()
            if task.job.started is None:
                task.job.started, task.job.status = time.time(), Status.RUNNING
                self.running.add(task.job)
            return task

    def _sample(self, task: ImageTask) -> None:
        job, pipeline = task.job, task.model.pipeline
        if job.cancelled or job.error:
            return
        deadline = time.monotonic() + self.limits.seconds_per_image
        with closing(pipeline.sample_one(task.prepared, task.options)) as steps:
            for step in steps:
                if step.done:
                    made = pipeline.images_of(step)[0]
                elif job.wants_previews and step.step % max(1, step.steps // self.limits.previews) == 0:
                    job.preview = pipeline.preview(step)
                with self._changed:
                    job.steps_done += 1
                if not step.done:
                    job.changed()
                if job.cancelled or job.error:
                    return
                if time.monotonic() > deadline and not step.done:
                    limit = f"{self.limits.seconds_per_image:g} s"
                    raise BadInput(f"an image took longer than {limit}; ask for fewer steps or pixels")
        job.metadata[task.index] = task.model.metadata(
            task.prepared.request, task.options
        )  # waits for the model's hash
        job.images[task.index] = made
        job.changed()

    def _fail(self, job: Job, error: Exception) -> None:
        if not isinstance(error, BadInput):
            log.exception("job %s failed", job.id)
        job.error = job.error or error

    def _finish(self, job: Job) -> None:
        with self._changed:
            job.tasks_left -= 1
            if job.tasks_left:
                return
            complete = all(image is not None for image in job.images)
            job.status = Status.FAILED if job.error else Status.DONE if complete else Status.CANCELLED
            job.ended = time.time()
            self.running.discard(job)
        job.changed()
