"""Kill a training with SIGKILL again and again, after a random number of steps, and start it again until it is done.

    python kill_trial.py KILLS SEED RUN_FOLDER train --config ... KEY=VALUE ...

A process that has everything imported is forked for each life, so that most of it is training. Prints JSON: kills,
those that interrupted a save, those before the first step of a life.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import lightning  # noqa: F401  imported before the forks
import torch

from latentsmith.cli import main
from latentsmith.training import train  # noqa: F401

STEPS = 20  # of a life, at most


def life(arguments: list[str], log: int) -> int:
    """A child that runs the command; its process number."""
    child = os.fork()
    if child == 0:
        os.dup2(log, 1)
        os.dup2(log, 2)
        os._exit(main(arguments))
    return child


def steps_in(path: Path) -> int:
    """Return the rows of a metrics.csv so far."""
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def trial(kills: int, seed: int, folder: Path, arguments: list[str]) -> dict[str, int]:
    chance = random.Random(seed)
    found = {"kills": 0, "saves_interrupted": 0, "before_a_step": 0}
    log = os.open(folder.with_suffix(".log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    while found["kills"] < kills:
        rows, left = steps_in(folder / "metrics.csv"), set(folder.glob("checkpoints/*.INCOMPLETE"))
        child = life(arguments, log)
        if chance.random() < 0.1:  # at any moment of its start
            time.sleep(chance.uniform(0.0, 0.5))
        else:
            steps = rows + chance.randint(1, STEPS)
            while steps_in(folder / "metrics.csv") < steps:
                if os.waitpid(child, os.WNOHANG)[0]:
                    raise SystemExit("a life ended by itself: too few steps, or an error; see the log")
                time.sleep(0.002)
            time.sleep(chance.uniform(0.0, 0.02))  # at any moment of a step
        moved = steps_in(folder / "metrics.csv") > rows
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "a life ended by itself: too few steps, or an error; see the log"
        found["kills"] += 1
        found["before_a_step"] += not moved
        found["saves_interrupted"] += bool(set(folder.glob("checkpoints/*.INCOMPLETE")) - left)
    _, status = os.waitpid(life(arguments, log), 0)
    assert status == 0, "the last life failed; see the log"
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(trial(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])))
