"""Batches of several images, turns, cancelling, and models that come and go."""

import threading

import numpy as np
import pytest
import torch

from latentsmith.files.errors import BadInput
from latentsmith.image_request import ImageRequest, SamplingOptions
from latentsmith.server.jobs import FairQueue, ImageTask, Job, JobRunner, QueueFull, Status
from latentsmith.server.limits import Limits
from latentsmith.server.models import Busy, ModelShelf, UnknownModel, bytes_of
from latentsmith.server.worker import DeviceWorker

SMALL = SamplingOptions(height=16, width=16, num_inference_steps=3)


@pytest.fixture
def worker():
    made = DeviceWorker(max_rows=8)
    yield made
    made.close()


def test_calls_of_one_shape_run_together_and_others_alone(worker):
    batches = []

    def network(noisy, timesteps, context):
        batches.append(len(noisy))
        return noisy * timesteps[:, None] + context

    def image(number, width, found):
        with worker.image():
            ready.wait()
            for step in range(5):
                noisy, times = torch.full((2, width), float(number)), torch.full((2,), float(step))
                found[number] = worker.call(network, noisy, times, {"context": torch.full((2, 1), 100.0)})

    ready, found = threading.Barrier(5), {}
    threads = [threading.Thread(target=image, args=(i, 3 if i < 3 else 4, found)) for i in range(5)]
    [each.start() for each in threads]
    [each.join() for each in threads]
    assert all((found[i] == 4 * i + 100).all() for i in range(5))
    assert sum(batches) == 5 * 5 * 2 and len(batches) < 25
    assert max(batches) == 6


def test_a_batch_too_large_for_the_memory_runs_one_by_one(worker):
    def network(noisy, timesteps):
        if len(noisy) > 1:
            raise torch.OutOfMemoryError
        return noisy + 1

    found = []

    def image(number):
        with worker.image():
            ready.wait()
            found.append(worker.call(network, torch.full((1, 2), float(number)), torch.zeros(1), {}).mean().item())

    ready = threading.Barrier(3)
    threads = [threading.Thread(target=image, args=(i,)) for i in range(3)]
    [each.start() for each in threads]
    [each.join() for each in threads]
    assert sorted(found) == [1, 2, 3]


def test_an_error_reaches_its_caller(worker):
    def fails():
        raise BadInput("no")

    with pytest.raises(BadInput, match="no"):
        worker.run(fails)
    assert worker.run(lambda: 5) == 5


@pytest.fixture
def runner(model_folder, worker):
    shelf = ModelShelf([str(model_folder)], worker)
    made = JobRunner(shelf, worker, Limits(queued_images=8, steps=40, count=9), at_once=4)
    yield made
    made.close(finish=False)
    shelf.close()


def finished(runner, job):
    over = threading.Event()
    job.on_change.append(lambda: job.is_over and over.set())
    runner.submit(job)
    assert over.wait(600)
    return job


def test_an_image_does_not_depend_on_what_runs_beside_it(runner, pipeline):
    samplers = ["dpmsolver++", "euler_a", "heun", "unipc"]
    jobs = [
        Job("tiny", [ImageRequest("a red circle", seed=number, guidance_scale=1.0 + number)],
            SamplingOptions(height=16, width=16, num_inference_steps=3 + number, sampler=name), client=name)
        for number, name in enumerate(samplers)
    ]  # fmt: skip
    over = [threading.Event() for _ in jobs]
    for job, event in zip(jobs, over, strict=True):
        job.on_change.append(lambda job=job, event=event: job.is_over and event.set())
        runner.submit(job)
    assert all(event.wait(600) for event in over)
    for number, (job, name) in enumerate(zip(jobs, samplers, strict=True)):
        options = dict(height=16, width=16, num_inference_steps=3 + number, sampler=name, guidance_scale=1.0 + number)
        alone = pipeline("a red circle", seed=number, **options).images[0]
        assert abs(np.asarray(job.images[0], int) - np.asarray(alone, int)).max() <= 1


def test_a_full_queue_and_a_cancelled_job(runner):
    long = [
        Job("tiny", [ImageRequest("a")] * 4, SamplingOptions(height=64, width=64, num_inference_steps=40))
        for _ in range(2)
    ]
    with pytest.raises(QueueFull):
        runner.submit(Job("tiny", [ImageRequest("a")] * 9, SMALL))
    over = threading.Event()
    long[1].on_change.append(lambda: long[1].is_over and over.set())
    for job in long:
        runner.submit(job)
        job.cancel()
    assert over.wait(600) and long[1].status is Status.CANCELLED
    assert finished(runner, Job("tiny", [ImageRequest("a")], SMALL)).status is Status.DONE


def test_clients_take_turns():
    queue = FairQueue()
    jobs = {client: Job("m", [ImageRequest("a")] * 3, SMALL, client=client) for client in "abc"}
    for client, count in (("a", 3), ("b", 1), ("c", 2)):
        for index in range(count):
            queue.add(ImageTask(jobs[client], index, None, SMALL, None))
    assert [queue.position(jobs[client]) for client in "abc"] == [0, 1, 2]
    assert [queue.take().job.client for _ in range(6)] == ["a", "b", "c", "a", "c", "a"]


def test_models_come_and_go_within_the_memory(model_folder, tmp_path, worker):
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(model_folder)
    size = bytes_of(tmp_path / "one")
    shelf = ModelShelf([str(tmp_path / "one"), str(tmp_path / "two")], worker, limit_bytes=int(1.5 * size))
    first = shelf.take("one")
    with pytest.raises(Busy):
        shelf.take("two")
    shelf.give_back(first)
    shelf.give_back(shelf.take("two"))
    assert [*shelf.loaded] == ["two"]
    with pytest.raises(UnknownModel):
        shelf.take("../one")
    shelf.close()
