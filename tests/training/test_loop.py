"""Runs of the toy training: exact resume, accumulation, logs, checkpoints, sample images."""

import json
import multiprocessing
import signal
import threading
from contextlib import nullcontext

import pytest
import torch
from lightning.fabric.plugins import MixedPrecision
from PIL import Image

from latentsmith.data.loader import no_worker_left
from latentsmith.files.errors import BadInput, Stopped
from latentsmith.inference import GeneratedImages
from latentsmith.training.checkpointing import checkpoints_in, read_state
from latentsmith.training.hooks import Hook
from latentsmith.training.hooks.metrics import Metrics, smoothed
from latentsmith.training.hooks.samples import SampleImages
from latentsmith.training.hooks.signals import EXIT_CODES, StopOnSignal
from latentsmith.training.metrics_log import append_row, drop_rows_after, read_rows


def weights(training):
    return training.objective.networks["unet"].parameters()


def checkpoint(run, step):
    return run.folder / "checkpoints" / f"step-{step:08d}"


def stuck():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Event().wait()


def test_a_worker_that_is_stuck_ends_with_the_training_and_others_stay():
    processes = [multiprocessing.Process(target=stuck, daemon=True) for _ in range(2)]
    mine, worker = processes
    mine.start()
    with pytest.raises(BadInput), no_worker_left():
        worker.start()
        raise BadInput("as a training ends")
    assert mine.is_alive() and worker.exitcode == -signal.SIGKILL
    mine.kill()
    mine.join()


def test_gradients_are_gone_when_a_step_is_done(toy):
    held = []

    class Look(Hook):
        def after_step(self, training, step):
            held.extend(parameter.grad is not None for parameter in training.objective.parameters())

    toy().train(steps=2, hooks=[Look()])
    assert held and not any(held)


def test_four_steps_are_two_and_two(toy):
    whole, halves = (toy(unet_dropout=0.3, decay=0.9) for _ in range(2))
    whole.train(steps=4)
    halves.train(steps=2)
    torch.rand(5)  # the state of the process has no say
    halves.train(steps=4, resume=checkpoint(halves, 2))
    assert halves.losses() == whole.losses() and len(whole.losses()) == 4
    states = [read_state(checkpoint(run, 4)) for run in (whole, halves)]
    assert states[0] == states[1]  # checksums of weights, averages and optimizer among them
    assert {"unet.safetensors", "ema/unet.safetensors", "optimizer.safetensors"} == states[0]["checksums"].keys()


def test_resume_keeps_the_memory_order_of_the_optimizer(toy):
    """Fused AdamW reads weights and moments side by side in memory: both must be laid out alike after loading."""
    runs = []
    for stops in ((4,), (2, 4)):
        run = toy()
        for stop in stops:
            objective = run.objective()
            objective.networks["unet"].to(memory_format=torch.channels_last)
            done = checkpoints_in(run.folder / "checkpoints")
            run.train(objective, stop, resume=done[-1] if done else None)
        runs.append(run)
    assert read_state(checkpoint(runs[0], 4)) == read_state(checkpoint(runs[1], 4))


def test_accumulation_changes_nothing_but_memory(toy):
    at_once, by_parts = toy(), toy()
    first, second = at_once.train(steps=5), by_parts.train(steps=5, micro_batch=1)
    assert by_parts.losses() == pytest.approx(at_once.losses(), rel=1e-5)
    for one, other in zip(*(weights(training) for training in (first, second)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert (second.state.global_step, second.state.consumed_samples) == (5, 20)


def test_rows_are_one_for_each_step_after_a_resume(toy):
    run = toy()
    run.train(steps=5, every=2, micro_batch=2)
    before = run.losses()
    run.train(steps=7, resume=checkpoint(run, 2), micro_batch=2)  # as after a crash at step 5
    rows = read_rows(run.folder / "metrics.csv")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["loss"] for row in rows][:5] == before
    assert rows[0].keys() >= {"step", "loss", "lr", "grad_norm"}
    assert set().union(*rows) - rows[0].keys() <= {"loss_t0", "loss_t250", "loss_t500", "loss_t750"}


def test_rows_cut_short_by_a_crash_go(tmp_path):
    path = tmp_path / "metrics.csv"
    for step in (10, 20, 30):
        append_row(path, {"step": step, "loss": 1 / step})
    with open(path, "a") as file:
        file.write("40,0.0")
    drop_rows_after(path, 40)
    assert [row["step"] for row in read_rows(path)] == [10, 20, 30]
    drop_rows_after(path, 20)
    append_row(path, {"step": 30, "loss": 0.5})
    assert read_rows(path) == [{"step": 10, "loss": 0.1}, {"step": 20, "loss": 0.05}, {"step": 30, "loss": 0.5}]
    drop_rows_after(path, 0)
    append_row(path, {"step": 1, "loss": 2.0, "psnr": 3.0})
    assert read_rows(path) == [{"step": 1, "loss": 2.0, "psnr": 3.0}]
    drop_rows_after(tmp_path / "none.csv", 0)
    assert read_rows(tmp_path / "none.csv") == []


def test_a_metric_that_a_resumed_run_has_for_the_first_time(tmp_path):
    path = tmp_path / "metrics.csv"
    append_row(path, {"step": 1, "loss": 0.5})
    with open(path, "a") as file:
        file.write("2,0.")
    append_row(path, {"step": 3, "speed": 7.0, "loss": 0.25, "wait": 0.5})
    append_row(path, {"step": 4, "loss": 0.125})
    assert path.read_text() == "step,loss,speed,wait\n1,0.5,,\n3,0.25,7.0,0.5\n4,0.125,,\n"


def test_the_learning_rate_follows_the_step_after_a_resume(toy):
    run = toy(options={"lr": 0.5}, lr_factor=lambda step: 1 / (1 + step))
    run.train(steps=2)
    run.train(steps=4, resume=checkpoint(run, 2))
    rates = [row["lr"] for row in read_rows(run.folder / "metrics.csv")]
    assert rates == pytest.approx([0.5, 0.25, 0.5 / 3, 0.125])


def test_the_newest_checkpoints_are_kept(toy):
    run = toy()
    run.train(steps=7, every=2, keep=2)
    assert [path.name for path in checkpoints_in(run.folder / "checkpoints")] == ["step-00000006", "step-00000007"]
    run.train(steps=7, resume=checkpoint(run, 7))  # nothing to do
    assert len(run.losses()) == 7


def test_only_the_last_step_where_none_is_asked_for(toy):
    run = toy()
    run.train(steps=3, every=0, keep=1)
    assert [path.name for path in checkpoints_in(run.folder / "checkpoints")] == ["step-00000003"]


def test_what_is_incomplete_is_no_checkpoint(toy):
    run = toy()
    run.train(steps=2)
    left = run.folder / "checkpoints" / "step-00000009.INCOMPLETE"
    left.mkdir()
    (left / "state.json").write_text("{}")
    (run.folder / "checkpoints" / "step-00000008").mkdir()
    assert [path.name for path in checkpoints_in(run.folder / "checkpoints")] == ["step-00000002"]


@pytest.mark.parametrize("name", ["unet.safetensors", "optimizer.safetensors"])
def test_a_damaged_file_is_named(toy, name):
    run = toy()
    run.train(steps=1)
    path = checkpoint(run, 1) / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadInput, match=rf"{name}: damaged or missing; go on from another checkpoint"):
        run.train(steps=2, resume=checkpoint(run, 1))
    path.unlink()
    with pytest.raises(BadInput, match=f"{name}: damaged or missing"):
        read_state(checkpoint(run, 1))


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_what_is_no_checkpoint_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "state.json").write_text(text)
    with pytest.raises(BadInput, match=f"{tmp_path.name}: not a checkpoint of a run"):
        read_state(tmp_path)


def test_a_checkpoint_of_another_training_is_refused(toy):
    run = toy()
    run.train(steps=1)
    step_1 = checkpoint(run, 1)
    with pytest.raises(BadInput, match=r"step-00000001: holds no averages of unet; set exp_manager.ema.enable=false"):
        toy(decay=0.9).training(resume=step_1)
    with pytest.raises(BadInput, match=r"its optimizer is adamw, and model\.optim\.name is SGD"):
        toy(optimizer="SGD").training(resume=step_1)
    objective = run.objective()
    objective.networks["unet"].text = torch.nn.Linear(9, 4)
    with pytest.raises(BadInput, match=r"unet.safetensors: does not fit this config \(.*text.weight"):
        run.training(objective, resume=step_1)


def test_a_save_that_dies_leaves_the_older_checkpoint(toy, monkeypatch):
    run = toy()
    run.train(steps=2)

    def die(*_):
        raise OSError("no space left")

    monkeypatch.setattr("latentsmith.training.checkpointing.os.rename", die)
    with pytest.raises(OSError, match="no space left"):
        run.train(steps=4, every=4, resume=checkpoint(run, 2))
    monkeypatch.undo()
    assert checkpoints_in(run.folder / "checkpoints") == [checkpoint(run, 2)]
    run.train(steps=4, resume=checkpoint(run, 2))
    assert json.loads((checkpoint(run, 4) / "state.json").read_text())["global_step"] == 4
    assert not list((run.folder / "checkpoints").glob("*.INCOMPLETE"))


def test_loading_puts_the_counters_back(toy):
    run = toy(decay=0.9)
    run.train(steps=3)
    state = run.training(resume=checkpoint(run, 3)).state
    assert (state.global_step, state.consumed_samples, state.ema["unet"].updates) == (3, 12, 3)


class RandomPipeline:
    """Draws what depends on the weights, and disturbs everything that training must not depend on."""

    def __init__(self, unet):
        self.unet, self.seen = unet, []

    def __call__(self, prompts, **options):
        assert not self.unet.training and not torch.is_grad_enabled()
        torch.manual_seed(len(self.seen))
        torch.rand(3)
        self.seen.append([p.detach().clone() for p in self.unet.parameters()])
        return GeneratedImages([Image.new("RGB", (4, 4), (len(prompt), 0, 0)) for prompt in prompts])


def test_sample_images_do_not_change_training(toy):
    """Dropout, averages and accumulation included; the images are of the averaged weights."""
    plain, sampled = (toy(unet_dropout=0.3, decay=0.9) for _ in range(2))
    plain.train(steps=4, micro_batch=2)
    objective = sampled.objective()
    pipeline = RandomPipeline(objective.networks["unet"])

    def hook(log):
        return SampleImages(pipeline, sampled.folder / "samples", 2, log, prompts=["a", "bc"], steps=1)

    training = sampled.train(objective, 4, micro_batch=2, hooks=[hook])
    assert sampled.losses() == plain.losses()
    assert read_state(checkpoint(sampled, 4)) == read_state(checkpoint(plain, 4))
    images = sorted(path.name for path in (sampled.folder / "samples").iterdir())
    assert images == ["step-00000002.png", "step-00000004.png"]
    with Image.open(sampled.folder / "samples" / images[0]) as row:
        assert row.size == (8, 4) and (row.getpixel((0, 0))[0], row.getpixel((7, 3))[0]) == (1, 2)
    for drawn, average in zip(pipeline.seen[-1], training.state.ema["unet"].averages, strict=True):
        assert torch.equal(drawn, average)


def test_hooks_act_alike_in_any_order(toy):
    """The hooks of every run, given in the reverse order, write the same rows and checkpoints."""
    forward, backward = (toy(decay=0.9, reverse_hooks=reverse) for reverse in (False, True))
    forward.train(steps=5, every=2)
    backward.train(steps=5, every=2)
    assert read_rows(forward.folder / "metrics.csv") == read_rows(backward.folder / "metrics.csv")
    states = [[read_state(path) for path in checkpoints_in(run.folder / "checkpoints")] for run in (forward, backward)]
    assert states[0] == states[1] and len(states[0]) == 3


@pytest.fixture
def hang_up():
    """Undo, for one test, a nohup that the tests may run under."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_does_not_end_a_training_under_nohup(toy, hang_up):
    class Raise(Hook):
        def after_step(self, training, step):
            signal.raise_signal(signal.SIGHUP)

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run = toy()
    run.train(steps=3, hooks=[Raise()])
    assert len(run.losses()) == 3 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75), (None, 75)],
)
def test_a_signal_or_the_time_ends_a_training_after_its_step(toy, hang_up, number, code):
    clock = [0.0]

    class Raise(Hook):
        def after_step(self, training, step):
            clock[0] += 10
            if number and training.state.global_step == 2:
                signal.raise_signal(number)

    run, handlers = toy(), [signal.getsignal(each) for each in EXIT_CODES]
    hooks = [Raise()] if number else [Raise(), StopOnSignal(20.0, clock=lambda: clock[0])]
    name = signal.Signals(number).name if number else "trainer.max_time"
    with pytest.raises(Stopped, match=f"stopped at step 2 of 9 by {name}, saved") as stopped:
        run.train(steps=9, hooks=hooks)
    assert stopped.value.code == code and len(run.losses()) == 2
    assert [path.name for path in checkpoints_in(run.folder / "checkpoints")] == ["step-00000002"]
    assert handlers == [signal.getsignal(each) for each in EXIT_CODES]


def test_a_second_interrupt_ends_it_at_once(toy):
    class Raise(Hook):
        def after_step(self, training, step):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    run = toy()
    with pytest.raises(KeyboardInterrupt):
        run.train(hooks=[Raise()])
    assert not checkpoints_in(run.folder / "checkpoints")


def test_a_scaled_loss_is_clipped_at_its_own_size(toy):
    """As in float16 on a GPU: the gradient's norm and the step are those without a scale."""
    plain, scaled = toy(), toy()
    first = plain.train(steps=2, clip=0.5)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    plugin.forward_context, plugin.convert_input = nullcontext, lambda data: data  # the scale alone
    second = scaled.train(steps=2, clip=0.5, plugins=[plugin])
    norms = [[row["grad_norm"] for row in read_rows(run.folder / "metrics.csv")] for run in (plain, scaled)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5) and norms[0][0] > 0.5
    for one, other in zip(*(weights(training) for training in (first, second)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_row_cut_short_by_a_full_disk(tmp_path):
    path = tmp_path / "metrics.csv"
    append_row(path, {"step": 1, "loss": 0.5})
    with open(path, "a") as file:
        file.write("2,0.")
    append_row(path, {"step": 3, "loss": 0.25})
    with open(path, "a") as file:
        file.write("4\n")
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]
    drop_rows_after(path, 9)
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]


def test_one_bad_loss_does_not_stay_in_the_smoothed_one():
    value, seen = None, []
    for loss in (float("nan"), 1.0, float("nan"), float("inf"), 3.0):
        value = smoothed(value, torch.tensor(loss))
        seen.append(float(value))
    assert seen[1:4] == [1.0, 1.0, 1.0] and seen[4] == pytest.approx(0.95 + 0.05 * 3)


def test_speed_is_that_of_the_last_seconds(toy):
    """A slow first step does not count for ever; what waits for data is its share of the time."""
    clock = [0.0]

    class Tick(Hook):
        def after_step(self, training, step):
            clock[0] += 600 if training.state.global_step == 1 else 2

    run = toy()
    timed = Metrics(run.folder / "timed", 1, tensorboard=False, progress_bar=True, clock=lambda: clock[0])
    (run.folder / "timed").mkdir()
    run.train(steps=40, hooks=[Tick(), timed])
    rows = read_rows(run.folder / "timed" / "metrics.csv")
    assert rows[-1]["samples_per_second"] == pytest.approx(2)  # 4 samples every 2 seconds
    assert all(0 <= row["data_wait"] <= 1 and row["memory_gib"] > 0.05 for row in rows)


def test_what_was_left_of_checkpoints_goes(toy):
    run = toy()
    left = run.folder / "checkpoints" / "step-00000077.INCOMPLETE"
    left.mkdir(parents=True)
    (left / "unet.safetensors").write_bytes(b"half")
    run.train(steps=1)
    assert not left.exists() and [path.name for path in checkpoints_in(left.parent)] == ["step-00000001"]
