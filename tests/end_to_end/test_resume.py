"""A run that was stopped goes on as if it had not been: the same losses and the same bits."""

import signal
import subprocess
import sys

import pytest
import torch

from latentsmith.training.checkpointing import read_state
from latentsmith.training.metrics_log import read_rows

DROPOUT = {"cached": ("model.unet_config.dropout=0.2",), "vae": ("model.first_stage_config.ddconfig.dropout=0.2",)}


@pytest.mark.parametrize("recipe", ["cached", "vae", "text"])
@pytest.mark.parametrize("layout", [(), ("model.channels_last=true",)], ids=["contiguous", "channels_last"])
def test_four_steps_are_two_and_two(world, recipe, layout):
    options = (*DROPOUT.get(recipe, ()), *layout)
    name = f"{recipe}-{len(layout)}"
    whole = world.train(recipe, f"{name}-whole", *options)
    halves = world.train(recipe, f"{name}-halves", *options, "trainer.max_steps=2")
    torch.rand(3)
    assert world.train(recipe, f"{name}-halves", *options) == halves
    assert read_rows(halves / "metrics.csv") == read_rows(whole / "metrics.csv")
    assert len(world.losses(whole)) == 4
    states = [read_state(world.newest(run)) for run in (whole, halves)]
    assert states[0] == states[1]  # with the checksums of weights, averages and optimizer


@pytest.mark.parametrize("recipe", ["cached", "vae"])
def test_workers_and_accumulation_change_nothing(world, recipe):
    plain = world.train(recipe, f"{recipe}-plain")
    workers = world.train(recipe, f"{recipe}-workers", "model.data.num_workers=2")
    parts = world.train(recipe, f"{recipe}-parts", "model.micro_batch_size=2", "model.global_batch_size=4")
    assert read_rows(workers / "metrics.csv") == read_rows(plain / "metrics.csv")
    assert read_state(world.newest(workers)) == read_state(world.newest(plain))
    assert world.losses(parts) == pytest.approx(world.losses(plain), rel=1e-5)
    assert [row["step"] for row in read_rows(parts / "metrics.csv")] == [1, 2, 3, 4]


def test_moments_in_eight_bits_go_on_too(world):
    moving = ("model.optim.lr=1e-3", "model.optim.sched.warmup_steps=0", "trainer.max_steps=8")
    options = ("model.optim.name=adamw8bit", *moving)
    plain = world.train("cached", "32-bit", *moving)
    whole = world.train("cached", "8-bit-whole", *options)
    halves = world.train("cached", "8-bit-halves", *options, "trainer.max_steps=3")
    world.train("cached", "8-bit-halves", *options)
    assert read_rows(halves / "metrics.csv") == read_rows(whole / "metrics.csv")
    assert read_state(world.newest(halves)) == read_state(world.newest(whole))
    assert world.losses(whole) != world.losses(plain)
    assert world.losses(whole) == pytest.approx(world.losses(plain), rel=0.02)
    sizes = [(world.newest(run) / "optimizer.safetensors").stat().st_size for run in (whole, plain)]
    assert sizes[0] < 0.4 * sizes[1]


STOPPED = """
import os, sys, torch
from pathlib import Path
from latentsmith.cli import main

run, rows, checkpoints, number, threads = Path(sys.argv[1]), *map(int, sys.argv[2:6])
asleep = False

def look(event, arguments):  # called for every file that this process opens, the metrics once or more for each step
    global asleep
    if asleep or event != "open" or arguments[0] is None or str(arguments[0]) != str(run / "metrics.csv"):
        return
    asleep = True
    lines = (run / "metrics.csv").read_bytes().count(b"\\n") if (run / "metrics.csv").exists() else 0
    if lines > rows and len(list(run.glob("checkpoints/step-????????"))) >= checkpoints:
        os.killpg(0, number)  # as Ctrl-C and schedulers do, workers and all
    else:
        asleep = False

torch.set_num_threads(threads)
sys.addaudithook(look)
sys.exit(main(sys.argv[6:]))
"""


def stopped_in_the_middle(world, arguments, run, rows, number=signal.SIGKILL, checkpoints=0):
    """Run the command in another process that sends itself a signal once the metrics have so many rows and there are
    so many checkpoints; its exit code and its messages. SIGKILL comes with no warning."""
    given = [word.replace("ROOT", str(world.root)) for word in arguments]
    numbers = (rows, checkpoints, int(number), torch.get_num_threads())
    command = [sys.executable, "-c", STOPPED, str(run), *map(str, numbers), *given]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 75), pytest.param(signal.SIGUSR1, 75, marks=pytest.mark.slow)],
)
def test_stopped_by_a_signal_it_saves_and_goes_on(world, number, code):
    options = ("trainer.max_steps=2000", "exp_manager.checkpoint_callback_params.every_n_train_steps=0",
               "model.data.num_workers=2", "model.micro_batch_size=2", "model.global_batch_size=4")  # fmt: skip
    name = f"stopped-{int(number)}"
    run = world.root / "runs" / name
    found, output = stopped_in_the_middle(world, world.command("cached", name, *options), run, 3, number)
    step = int(world.newest(run).name[5:])
    assert found == code and 3 <= step < 2000, output
    line = f"latentsmith: stopped at step {step} of 2,000 by {number.name}, saved; the same command goes on from there"
    assert line in output
    rows = read_rows(run / "metrics.csv")
    world.train("cached", name, *options[2:], f"trainer.max_steps={step + 2}")
    whole = world.train("cached", f"{name}-whole", *options[2:], f"trainer.max_steps={step + 2}")
    again = read_rows(run / "metrics.csv")
    assert again[: len(rows)] == rows and world.losses(whole) == world.losses(run)
    assert read_state(world.newest(run)) == read_state(world.newest(whole))


def test_a_damaged_checkpoint_is_set_aside(world, capsys):
    run = world.train("cached", "damaged")
    whole = read_rows(run / "metrics.csv")
    newest = world.newest(run)
    weights = newest / "unet.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    capsys.readouterr()
    assert world.train("cached", "damaged") == run
    output = capsys.readouterr().out
    assert f"{weights}: damaged or missing" in output and "set aside as step-00000004.DAMAGED, going on from" in output
    assert (run / "checkpoints" / "step-00000004.DAMAGED").is_dir()
    assert read_rows(run / "metrics.csv") == whole and world.newest(run) == newest


def test_killed_and_started_again(world):
    options = (
        *DROPOUT["cached"],
        "trainer.max_steps=48",
        "exp_manager.checkpoint_callback_params.every_n_train_steps=6",
    )
    whole = world.train("cached", "uninterrupted", *options)
    run = world.root / "runs" / "killed"
    code, _ = stopped_in_the_middle(world, world.command("cached", "killed", *options), run, rows=8, checkpoints=1)
    assert code == -signal.SIGKILL
    assert 6 <= int(world.newest(run).name[5:]) < 48
    world.train("cached", "killed", *options)
    assert read_rows(run / "metrics.csv") == read_rows(whole / "metrics.csv")
    assert [row["step"] for row in read_rows(run / "metrics.csv")] == list(range(1, 49))
    assert read_state(world.newest(run)) == read_state(world.newest(whole))


def test_going_back_asks_for_another_name(world, capsys):
    run = world.train("cached", "back")
    first = run / "checkpoints" / "step-00000002"
    for override in ("exp_manager.resume_if_exists=false", f"exp_manager.resume_from_checkpoint={first}"):
        assert world.call(*world.command("cached", "back", override)) == 2
        assert "step-00000004: is later than where this run would start" in capsys.readouterr().err
    again = world.train("cached", "branch", f"exp_manager.resume_from_checkpoint={first}")
    assert world.losses(again) == world.losses(run)[2:]


def damage(path):
    weights = path / "unet.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")


def test_damaged_again_and_all_damaged(world, capsys):
    run = world.train("cached", "damaged-again")
    for _ in range(2):
        damage(world.newest(run))
        world.train("cached", "damaged-again")
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000004", "step-00000004.DAMAGED", "step-00000004.DAMAGED-2"]
    rows = read_rows(run / "metrics.csv")
    for name in ("step-00000002", "step-00000004"):
        damage(run / "checkpoints" / name)
    capsys.readouterr()
    assert world.call(*world.command("cached", "damaged-again")) == 2
    assert "None of the 2 checkpoints" in capsys.readouterr().err
    assert read_rows(run / "metrics.csv") == rows  # nothing was begun anew over it


def test_a_branch_goes_on_by_the_same_command(world):
    source = world.train("cached", "trunk")
    first = source / "checkpoints" / "step-00000002"
    options = (f"exp_manager.resume_from_checkpoint={first}",)
    world.train("cached", "offshoot", *options, "trainer.max_steps=4")
    run = world.train("cached", "offshoot", *options, "trainer.max_steps=6")
    assert [row["step"] for row in read_rows(run / "metrics.csv")] == [3, 4, 5, 6]
    assert world.losses(run)[:2] == world.losses(source)[2:]


def test_time_is_up(world, capsys):
    options = ("trainer.max_time=00:00:00:01", "trainer.max_steps=100000",
               "exp_manager.checkpoint_callback_params.save_top_k=2")  # fmt: skip
    assert world.call(*world.command("cached", "timed", *options)) == 75
    run = world.root / "runs" / "timed"
    step = int(world.newest(run).name[5:])
    assert f"stopped at step {step:,} of 100,000 by trainer.max_time, saved" in capsys.readouterr().err
    assert step == read_rows(run / "metrics.csv")[-1]["step"] >= 1


def test_logs_that_cannot_be_written_do_not_end_a_run(world, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("metrics.append_row", "validation.append_row"):
        monkeypatch.setattr(f"latentsmith.training.hooks.{name}", full)
    monkeypatch.setattr("latentsmith.training.report.write_run_report", full)
    monkeypatch.setattr("latentsmith.training.hooks.samples.save_row", full)
    options = ("model.data.validation.dataset_path=ROOT/cache", "exp_manager.sample_images.every_n_train_steps=2",
               "exp_manager.sample_images.prompts=[x]", "exp_manager.sample_images.steps=1")  # fmt: skip
    run = world.train("cached", "no-logs", *options)
    output = capsys.readouterr().err
    for what in ("row of step 4", "validation loss", "report.html", "sample images"):
        assert f"{what} not written (No space left on device): training goes on" in output
    assert read_state(world.newest(run))["global_step"] == 4


def test_a_measured_scale_is_not_measured_again(world, monkeypatch):
    run = world.train("cached", "measured", "model.scale_factor=measured", "trainer.max_steps=2")
    monkeypatch.setattr("latentsmith.training.train.MEASURED_SAMPLES", 3)  # would give another one
    world.train("cached", "measured", "model.scale_factor=measured")
    monkeypatch.undo()
    whole = world.train("cached", "measured-whole", "model.scale_factor=measured")
    assert world.losses(run) == world.losses(whole)


def test_validation_of_images_in_pure_half_precision(world):
    options = ("trainer.precision=bf16-true", "model.data.validation.dataset_path=ROOT/shards", "trainer.max_steps=1")
    plain = world.train("images", "validated-32", *options[1:])
    half = world.train("images", "validated-16", *options)
    losses = [read_rows(run / "validation.csv")[0]["val_loss"] for run in (plain, half)]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.05)


def test_sets_mixed_by_weight_go_on(world):
    """The mixture is what training draws from, and it, too, is a function of the position."""
    sets = ("model.data.train.dataset_path=[ROOT/shards,ROOT/shards]",)
    mixed = (*sets, "model.data.train.weights=[1,3]")
    whole = world.train("images", "mixed-whole", *mixed)
    world.train("images", "mixed-halves", *mixed, "trainer.max_steps=2")
    halves = world.train("images", "mixed-halves", *mixed)
    assert world.losses(halves) == world.losses(whole) != world.losses(world.train("images", "not-mixed", *sets))
