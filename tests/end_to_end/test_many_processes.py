"""Several processes train as one does, over gloo on a CPU."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from latentsmith.data.latent_cache import LatentCache
from latentsmith.files.tensors import open_tensors
from latentsmith.training.checkpointing import read_state
from latentsmith.training.metrics_log import read_rows


def trained(world, name, processes, *overrides, strategy="ddp"):
    """The run of `processes` processes, each with an equal share of batches of 4."""
    given = world.command(
        "cached", name, f"trainer.devices={processes}", f"trainer.strategy={strategy}", "model.global_batch_size=4",
        f"model.micro_batch_size={4 // processes}", *overrides,
    )  # fmt: skip
    arguments = [word.replace("ROOT", str(world.root)) for word in given]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    done = subprocess.run([*torchrun, "latentsmith", *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return world.root / "runs" / name


@pytest.mark.parametrize("strategy", ["ddp", "model_parallel"])
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_losses_and_weights_of_one_process(world, processes, strategy):
    alone = world.train(
        "cached", f"one-of-{processes}-{strategy}", "model.global_batch_size=4", "model.micro_batch_size=4"
    )
    together = trained(world, f"{processes}-{strategy}", processes, strategy=strategy)
    expected, found = (read_rows(run / "metrics.csv") for run in (alone, together))
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], rel=1e-4), name
    weights = [open_tensors(world.newest(run) / "unet.safetensors") for run in (alone, together)]
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().max() < 2e-4, name


def test_as_srun_starts_them(world):
    """Two tasks of a SLURM job, by what srun tells each in its environment; no SLURM was at hand."""
    given = world.command("cached", "srun", "trainer.devices=2", "model.global_batch_size=4",
                          "model.micro_batch_size=2")  # fmt: skip
    arguments = [word.replace("ROOT", str(world.root)) for word in given]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
           "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1", "SLURM_STEP_NODELIST": "127.0.0.1",
           "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}  # fmt: skip
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "latentsmith", *arguments],
            env=os.environ | job | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    output = [task.communicate(timeout=600)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], output
    alone = world.train("cached", "srun-alone", "model.global_batch_size=4", "model.micro_batch_size=4")
    assert world.losses(world.root / "runs" / "srun") == pytest.approx(world.losses(alone), rel=1e-4)


@pytest.mark.parametrize(
    ("strategy", "processes"),
    [
        ("model_parallel", 2),
        ("ddp", 2),
        ("ddp", 4),
        ("model_parallel", 4),
    ],
)
@pytest.mark.slow
def test_processes_stopped_go_on(world, strategy, processes):
    """Two steps and ten more are the twelve of a run that was left alone, bit for bit, whatever the order of sums."""
    name, whole_run = f"{strategy}-{processes}", "trainer.max_steps=12"
    whole = trained(world, f"{name}-whole", processes, whole_run, strategy=strategy)
    trained(world, f"{name}-halves", processes, "trainer.max_steps=2", strategy=strategy)
    halves = trained(world, f"{name}-halves", processes, whole_run, strategy=strategy)
    assert read_state(world.newest(halves)) == read_state(world.newest(whole))
    assert read_rows(halves / "metrics.csv") == read_rows(whole / "metrics.csv")


def test_more_processes_go_on_with_a_run(world):
    name, batch = "one-then-two", ("model.global_batch_size=4", "model.micro_batch_size=4")
    world.train("cached", name, *batch, "trainer.max_steps=2")
    run = trained(world, name, 2)
    assert world.losses(run) == pytest.approx(world.losses(world.train("cached", "one-only", *batch)), rel=1e-4)


@pytest.mark.slow
def test_a_sharded_run_goes_on_in_one_process(world):
    """Its checkpoint is one set of whole files: the same as without shards, to load and to draw from."""
    trained(world, "sharded-then-alone", 2, "trainer.max_steps=2", strategy="model_parallel")
    run = world.train("cached", "sharded-then-alone", "model.global_batch_size=4")
    alone = world.train("cached", "never-sharded", "model.global_batch_size=4")
    assert world.losses(run) == pytest.approx(world.losses(alone), rel=1e-4)
    shapes = [
        {name: tensor.shape for file in sorted(world.newest(one).rglob("*.safetensors"))
         for name, tensor in open_tensors(file).items()}
        for one in (run, alone)
    ]  # fmt: skip
    assert shapes[0] == shapes[1]
    assert world.call("generate", "--from", run, "--out", run / "drawn", "--steps", 2, "a red circle") == 0


@pytest.mark.slow
def test_sharded_processes_end_in_order_every_time(world):
    """One end in four was an abort, while threads of gloo still held tensors: twelve without tell that it is none."""
    for number in range(12):
        trained(world, f"ends-{number}", 2, "trainer.max_steps=1", strategy="model_parallel")


SHARDS = """
import sys
from latentsmith.cli import main
from latentsmith.training.checkpointing import SaveCheckpoints

def look(self, training, step):
    unet, state = training.objective.networks["unet"], training.state
    local = sum(p.to_local().numel() for p in unet.parameters())
    moments = sum(row["exp_avg"].to_local().numel() for row in state.optimizer.state.values())
    averages = sum(average.to_local().numel() for average in state.ema["unet"].averages)
    total = sum(p.numel() for p in unet.parameters())
    sys.stdout.write("SHARE %f %f %f\\n" % (local / total, moments / total, averages / total))
    sys.stdout.flush()

SaveCheckpoints.after_step = look
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_each_process_holds_its_share_of_weights_moments_and_averages(world):
    given = world.command("cached", "shares", "trainer.devices=2", "trainer.strategy=model_parallel",
                          "model.global_batch_size=4", "model.micro_batch_size=2", "trainer.max_steps=1")  # fmt: skip
    arguments = [word.replace("ROOT", str(world.root)) for word in given]
    (world.root / "shares.py").write_text(SHARDS)
    command = [sys.executable, world.root / "shares.py", *arguments]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    shares = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("SHARE")]
    assert done.returncode == 0 and len(shares) == 2, done.stdout + done.stderr
    assert all(0.45 < float(share) < 0.55 for each in shares for share in each), shares


@pytest.mark.parametrize(
    ("strategy", "line"),
    [
        ("fsdp", "shards are trainer.strategy=model_parallel here"),
        ("deepspeed_stage_2", "shards are trainer.strategy=model_parallel here"),
        ("xla", "it is one of auto, ddp, model_parallel"),
        ("modelparallel", "it is one of auto, ddp, model_parallel"),
    ],
)
def test_strategies_that_cannot_work(world, capsys, strategy, line):
    for more in ([], ["--dry-run"]):
        assert world.call(*world.command("cached", "wrong-strategy", f"trainer.strategy={strategy}"), *more) == 2
        assert line in capsys.readouterr().err


def test_two_processes_fill_one_cache(world):
    """As torchrun starts them, at the same time; the cache is that of one process."""
    arguments = ["precache", "--config", "ROOT/tiny.yaml", "--out", "ROOT/cache-of-two",
             "model.first_stage_config.from_pretrained=ROOT/runs/vae",
             "model.cond_stage_config.from_pretrained=ROOT/runs/text"]  # fmt: skip
    command = [sys.executable, "-m", "latentsmith", *(word.replace("ROOT", str(world.root)) for word in arguments)]
    base = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            command, env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    output = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert sum("22 samples, image_encoded" in one for one in output) >= 1, output
    folders = [world.root / name for name in ("cache", "cache-of-two")]
    assert [path.name for path in sorted(folders[0].iterdir())] == [path.name for path in sorted(folders[1].iterdir())]
    info = [json.loads((folder / "cache.json").read_text()) for folder in folders]
    assert info[0] == info[1]
    caches = [LatentCache(folder) for folder in folders]
    for index in range(22):
        first, second = (cache[index] for cache in caches)
        assert all(np.allclose(first[name], second[name], rtol=2e-3, atol=5e-3) for name in first)
