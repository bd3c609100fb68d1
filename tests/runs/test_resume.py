"""A run that was stopped goes on as if it had not been: the same losses and the same bits."""

import os
import subprocess
import sys
import time

import pytest
import torch

from latentsmith.training.checkpoint import read_state
from latentsmith.training.log import read_rows

DROPOUT = {"cached": ("model.unet_config.dropout=0.2",), "vae": ("model.first_stage_config.ddconfig.dropout=0.2",)}


@pytest.mark.parametrize("kind", ["cached", "vae", "text"])
@pytest.mark.parametrize("layout", [(), ("model.channels_last=true",)], ids=["contiguous", "channels_last"])
def test_four_steps_are_two_and_two(world, kind, layout):
    options = (*DROPOUT.get(kind, ()), *layout)
    name = f"{kind}-{len(layout)}"
    whole = world.train(kind, f"{name}-whole", *options)
    halves = world.train(kind, f"{name}-halves", *options, "trainer.max_steps=2")
    torch.rand(3)
    assert world.train(kind, f"{name}-halves", *options) == halves
    assert read_rows(halves / "metrics.csv") == read_rows(whole / "metrics.csv")
    assert len(world.losses(whole)) == 4
    states = [read_state(world.newest(run)) for run in (whole, halves)]
    assert states[0] == states[1]  # with the checksums of weights, averages and optimizer


@pytest.mark.parametrize("kind", ["cached", "vae"])
def test_workers_and_accumulation_change_nothing(world, kind):
    plain = world.train(kind, f"{kind}-plain")
    workers = world.train(kind, f"{kind}-workers", "model.data.num_workers=2")
    parts = world.train(kind, f"{kind}-parts", "model.micro_batch_size=2", "model.global_batch_size=4")
    assert read_rows(workers / "metrics.csv") == read_rows(plain / "metrics.csv")
    assert read_state(world.newest(workers)) == read_state(world.newest(plain))
    assert world.losses(parts) == pytest.approx(world.losses(plain), rel=1e-5)
    assert [row["step"] for row in read_rows(parts / "metrics.csv")] == [1, 2, 3, 4]


def killed_in_the_middle(world, words, metrics, rows):
    """Start the command in another process and kill it, with no warning, once `metrics` has so many rows."""
    script = "import sys, torch; torch.set_num_threads(int(sys.argv.pop(1)))\n"
    script += "from latentsmith.cli import main; sys.exit(main(sys.argv[1:]))"
    given = [word.replace("ROOT", str(world.root)) for word in words]
    command = [sys.executable, "-c", script, str(torch.get_num_threads()), *given]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=dict(os.environ)) as process:
        while process.poll() is None and len(read_rows(metrics)) < rows:
            time.sleep(0.01)
        assert process.poll() is None, process.stderr.read().decode()
        process.kill()


def test_killed_and_started_again(world):
    options = (
        *DROPOUT["cached"],
        "trainer.max_steps=24",
        "exp_manager.checkpoint_callback_params.every_n_train_steps=6",
    )
    whole = world.train("cached", "uninterrupted", *options)
    run = world.root / "runs" / "killed"
    killed_in_the_middle(world, world.command("cached", "killed", *options), run / "metrics.csv", rows=8)
    assert 6 <= int(world.newest(run).name[5:]) < 24
    world.train("cached", "killed", *options)
    assert read_rows(run / "metrics.csv") == read_rows(whole / "metrics.csv")
    assert [row["step"] for row in read_rows(run / "metrics.csv")] == list(range(1, 25))
    assert read_state(world.newest(run)) == read_state(world.newest(whole))


def test_going_back_asks_for_another_name(world, capsys):
    run = world.train("cached", "back")
    first = run / "checkpoints" / "step-00000002"
    for override in ("exp_manager.resume_if_exists=false", f"exp_manager.resume_from_checkpoint={first}"):
        assert world.call(*world.command("cached", "back", override)) == 2
        assert "step-00000004: is later than where this run would start" in capsys.readouterr().err
    again = world.train("cached", "branch", f"exp_manager.resume_from_checkpoint={first}")
    assert world.losses(again) == world.losses(run)[2:]
