"""Killed at any moment, also while it saves, and started again, a run gives the losses of one that was left alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from latentsmith.training.checkpointing import read_state
from latentsmith.training.metrics_log import read_rows

TRIAL = Path(__file__).with_name("kill_trial.py")
OPTIONS = (
    "model.unet_config.dropout=0.2",
    "exp_manager.checkpoint_callback_params.every_n_train_steps=3",
    "exp_manager.checkpoint_callback_params.save_top_k=2",
    "model.data.validation.dataset_path=ROOT/cache",
    "trainer.val_check_interval=20",
)


def run(world, name, kills, steps):
    folder = world.root / "runs" / name
    arguments = [word.replace("ROOT", str(world.root)) for word in world.command("cached", name, *OPTIONS)]
    arguments.append(f"trainer.max_steps={steps}")
    done = subprocess.run([sys.executable, TRIAL, str(kills), "5", folder, *arguments], capture_output=True, text=True)
    log = folder.with_suffix(".log")
    assert done.returncode == 0, done.stderr + (log.read_text()[-2000:] if log.exists() else "")
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("kills", "steps"), [pytest.param(4, 320, id="4"), pytest.param(60, 4000, id="60", marks=pytest.mark.slow)]
)
def test_every_loss_is_what_it_would_have_been(world, kills, steps):
    whole, _ = run(world, f"alone-{kills}", 0, steps)
    killed, found = run(world, f"killed-{kills}", kills, steps)
    rows = read_rows(whole / "metrics.csv")
    print(f"{found}, {len(rows)} steps compared")
    assert found["kills"] == kills and [row["step"] for row in rows] == list(range(1, steps + 1))
    assert read_rows(killed / "metrics.csv") == rows
    assert read_rows(killed / "validation.csv") == read_rows(whole / "validation.csv")
    assert read_state(world.newest(killed)) == read_state(world.newest(whole))
    if kills > 50:
        assert found["saves_interrupted"] > 5


@pytest.mark.parametrize("apart", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_its_writes_a_run_is_started_again(world, killed_at_write, apart):
    """From the lock to the last checkpoint: the same command ends with the same losses, and leaves only its files."""
    command = world.command("images", f"whole-{apart}", "trainer.max_steps=2")
    assert world.call(*command) == 0
    whole = world.root / "runs" / f"whole-{apart}"
    number, killed = 1, True
    while killed:
        name = f"killed-{apart}-{number}"
        command = world.command("images", name, "trainer.max_steps=2")
        killed = killed_at_write(lambda command=command: world.call(*command), number)
        assert world.call(*command) == 0
        run = world.root / "runs" / name
        assert files(run) == files(whole), f"killed at write {number}"
        assert read_rows(run / "metrics.csv") == read_rows(whole / "metrics.csv")
        assert read_state(world.newest(run)) == read_state(world.newest(whole))
        number += apart
    assert number > 50


def files(run):
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
