"""Checkpoints in the background, by the minute, on a full disk."""

import errno
import shutil
import threading
from itertools import count

import pytest
import torch

from latentsmith.files.errors import BadInput
from latentsmith.files.memory import available_bytes
from latentsmith.training import checkpointing
from latentsmith.training.checkpointing import (
    CheckpointPlan,
    check_disk,
    checkpoint_bytes,
    checkpoints_in,
    read_state,
    take_snapshot,
    write_checkpoint,
)
from latentsmith.training.hooks import Hook


def saved(run):
    return [path.name for path in checkpoints_in(run.folder / "checkpoints")]


def states(run):
    return [read_state(path) for path in checkpoints_in(run.folder / "checkpoints")]


def test_background_and_blocking_saves_are_the_same_files(toy, monkeypatch, capsys):
    background, blocking = toy(), toy()
    background.train(steps=6, every=1)
    monkeypatch.setattr(checkpointing, "available_bytes", lambda: 0)
    blocking.train(steps=6, every=1)
    assert states(background) == states(blocking) and len(states(blocking)) == 6
    assert capsys.readouterr().out.count("training waits while it saves") == 1


def test_training_goes_on_while_a_checkpoint_is_written(toy, monkeypatch):
    """A save of step 2 that takes until step 4 holds the weights of step 2 all the same."""
    reached, done = threading.Event(), []

    def slow(folder, snapshot, keep, metadata):
        if snapshot.state["global_step"] == 2:
            assert reached.wait(600), "training waited for its checkpoint"
        done.append(snapshot.state["global_step"])
        return write_checkpoint(folder, snapshot, keep, metadata)

    class Reach(Hook):
        def after_step(self, training, step):
            if training.state.global_step == 3:
                reached.set()

    plain, run = toy(), toy()
    plain.train(steps=4, every=2)
    monkeypatch.setattr(checkpointing, "write_checkpoint", slow)
    run.train(steps=4, every=2, hooks=[Reach()])
    assert done == [2, 4] and states(run) == states(plain)


def test_no_thread_stays_after_a_save(toy, monkeypatch):
    """One that has run tensor operations slows those of training as long as it lives."""
    writers = []

    def write(*arguments):
        writers.append(threading.current_thread())
        return write_checkpoint(*arguments)

    class Join(Hook):
        def after_step(self, training, step):
            while len(writers) < training.state.global_step - 1:  # the step before this one was saved meanwhile
                threading.Event().wait(0.01)
            for thread in writers[: training.state.global_step - 1]:
                thread.join(600)
                assert thread is not threading.main_thread() and not thread.is_alive()

    monkeypatch.setattr(checkpointing, "write_checkpoint", write)
    toy().train(steps=3, every=1, hooks=[Join()])
    assert len(set(writers)) == 3


def test_a_full_disk_keeps_the_last_one_and_training_goes_on(toy, monkeypatch, capsys):
    def full(folder, snapshot, keep, metadata):
        if snapshot.state["global_step"] in (2, 3):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_checkpoint(folder, snapshot, keep, metadata)

    plain, run = toy(), toy()
    plain.train(steps=5, every=1, keep=1)
    monkeypatch.setattr(checkpointing, "write_checkpoint", full)
    run.train(steps=5, every=1, keep=1)
    output = capsys.readouterr().err
    for step in (2, 3):
        line = (
            f"checkpoint of step {step} not written (No space left on device): training goes on, step-00000001 is the"
        )
        assert line in output
    assert saved(run) == ["step-00000005"] and states(run) == states(plain) and run.losses() == plain.losses()


def test_a_failed_write_leaves_nothing(toy, monkeypatch):
    run = toy()
    state = run.train(steps=1, every=1).state
    folder = run.folder / "checkpoints"

    def torn(path, tensors, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("latentsmith.training.checkpointing.save_safetensors", torn)
    state.global_step = 2
    with pytest.raises(OSError):
        write_checkpoint(folder, take_snapshot(state), -1, {})
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]


def test_the_last_one_has_to_succeed(toy, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpointing, "write_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        toy().train(steps=1)


def test_a_disk_too_small_is_refused_before_the_first_step(toy, monkeypatch):
    run = toy()
    state = run.training().state
    size = checkpoint_bytes(state)
    plan = CheckpointPlan(run.folder / "checkpoints", 2, keep=3)
    for max_steps, free, fits in (
        (4, 3 * size, True),
        (4, 3 * size - 1, False),
        (100, 4 * size, True),
        (100, 4 * size - 1, False),
    ):
        monkeypatch.setattr(checkpointing.shutil, "disk_usage", lambda _, free=free: type("Usage", (), {"free": free}))
        if fits:
            check_disk(plan, state, max_steps)
        else:
            with pytest.raises(BadInput, match=r"checkpoints: 0.0 GiB are free, and [23] checkpoints of 0.0 GiB"):
                check_disk(plan, state, max_steps)
    with pytest.raises(BadInput):
        run.train(steps=100, every=2)
    assert not run.losses() and not saved(run)


def test_the_size_is_that_of_the_files(toy):
    run = toy(decay=0.9)
    estimate = checkpoint_bytes(run.training().state)
    state = run.train(steps=1).state
    (path,) = checkpoints_in(run.folder / "checkpoints")
    tensors = take_snapshot(state).bytes
    assert estimate == tensors - 4 * len(list(state.networks["unet"].parameters()))  # but for the step counters
    assert sum(file.stat().st_size for file in path.rglob("*.safetensors")) >= tensors


def test_by_the_minute(toy):
    clock = [0.0]

    class Tick(Hook):
        def after_step(self, training, step):
            clock[0] += 25

    run = toy()
    run.train(steps=8, hooks=[Tick()], minutes=1, clock=lambda: clock[0])
    assert saved(run) == ["step-00000003", "step-00000006", "step-00000008"]


def test_a_loss_scale_is_kept(toy):
    state = toy().train(steps=1).state
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    state.scaler.scale(torch.ones(()))
    assert take_snapshot(state).state["scaler"]["scale"] == 1024.0


def test_a_checkpoint_in_the_way_stands_until_the_new_one_is_in_its_place(toy, monkeypatch):
    """A process that is killed between the two renames loses nothing: the next start puts the old one back."""
    run = toy()
    state, folder = run.train(steps=1).state, run.folder / "checkpoints"

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("latentsmith.training.checkpointing.os.rename", die)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(folder, take_snapshot(state), -1, {})
    monkeypatch.undo()
    checkpointing.remove_leftovers(folder)
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    assert read_state(folder / "step-00000001")["global_step"] == 1


def test_memory_is_there():
    assert available_bytes() > 2**20


@pytest.mark.parametrize("in_the_way", [False, True])
def test_killed_before_every_write_of_a_checkpoint(toy, killed_at_write, in_the_way):
    """There is always a whole one, the one before or the new one, and the next start leaves nothing but whole ones."""
    run = toy(decay=0.9)
    state, begun = run.train(steps=1).state, run.folder / "checkpoints"
    for step in (2, 3):
        state.global_step = step
        write_checkpoint(begun, take_snapshot(state), -1, {})
    state.global_step = new = 3 if in_the_way else 4
    for number in count(1):
        folder = run.folder / f"killed-{number}"
        shutil.copytree(begun, folder)
        killed = killed_at_write(lambda folder=folder: write_checkpoint(folder, take_snapshot(state), 1, {}), number)
        checkpointing.restore_replaced(folder)
        newest = checkpoints_in(folder)[-1]
        assert read_state(newest)["global_step"] in (3, new)
        checkpointing.remove_leftovers(folder)
        write_checkpoint(folder, take_snapshot(state), 1, {})
        assert [path.name for path in folder.iterdir()] == [f"step-{new:08d}"]
        assert read_state(folder / f"step-{new:08d}")["global_step"] == new
        if not killed:
            break
    assert number > 12
