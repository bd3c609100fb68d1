"""Several processes train as one does, over gloo on a CPU."""

import os
import subprocess
import sys

import pytest

from latentsmith.files.tensors import open_tensors
from latentsmith.training.log import read_rows


def trained(world, name, processes, *overrides):
    """The run of `processes` processes, each with an equal share of batches of 4."""
    given = world.command(
        "cached", name, f"trainer.devices={processes}", "trainer.strategy=ddp", "model.global_batch_size=4",
        f"model.micro_batch_size={4 // processes}", *overrides,
    )  # fmt: skip
    words = [word.replace("ROOT", str(world.root)) for word in given]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "latentsmith", *words], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return world.root / "runs" / name


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_losses_and_weights_of_one_process(world, processes):
    alone = world.train("cached", f"one-of-{processes}", "model.global_batch_size=4", "model.micro_batch_size=4")
    together = trained(world, f"{processes}-together", processes)
    expected, found = (read_rows(run / "metrics.csv") for run in (alone, together))
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], rel=1e-4), name
    weights = [open_tensors(world.newest(run) / "unet.safetensors") for run in (alone, together)]
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().max() < 2e-4, name


def test_two_processes_stopped_go_on(world):
    """Two steps and two more are the four of one process."""
    whole = trained(world, "two-whole", 2)
    trained(world, "two-halves", 2, "trainer.max_steps=2")
    halves = trained(world, "two-halves", 2)
    assert read_rows(halves / "metrics.csv") == read_rows(whole / "metrics.csv")
