"""Two hosts, each a network namespace with an address of its own, joined by torchrun's rendezvous; one is cut off."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest

from latentsmith.training.checkpointing import read_state
from latentsmith.training.metrics_log import read_rows

HOSTS = {"lsmith0": "10.83.7.1", "lsmith1": "10.83.7.2"}


def ip(*arguments, check=True):
    return subprocess.run(["ip", *arguments], check=check, capture_output=True)


def can_make_hosts():
    if not shutil.which("ip") or os.geteuid() != 0:
        return False
    made = ip("netns", "add", "lsmithprobe", check=False).returncode == 0
    ip("netns", "del", "lsmithprobe", check=False)
    return made


@pytest.fixture
def hosts():
    """The two namespaces, their ends of one cable up."""
    if not can_make_hosts():
        pytest.skip("needs network namespaces (root and the command ip)")
    first, second = HOSTS
    for name in HOSTS:
        ip("netns", "del", name, check=False)
        ip("netns", "add", name)
    ip("link", "add", "cable0", "netns", first, "type", "veth", "peer", "name", "cable1", "netns", second)
    for number, (name, address) in enumerate(HOSTS.items()):
        ip("-n", name, "addr", "add", f"{address}/24", "dev", f"cable{number}")
        for link in ("lo", f"cable{number}"):
            ip("-n", name, "link", "set", link, "up")
    yield list(HOSTS)
    for name in HOSTS:
        ip("netns", "del", name, check=False)


@contextmanager
def job(world, arguments, port):
    """torchrun on both hosts, killed at the end if it still runs, as a scheduler would."""
    given = [word.replace("ROOT", str(world.root)) for word in arguments]
    started = []
    for number, name in enumerate(HOSTS):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"cable{number}"}
        torchrun = {
            "nnodes": 2, "nproc-per-node": 1, "rdzv-backend": "c10d", "rdzv-id": port, "local-addr": HOSTS[name],
            "rdzv-endpoint": f"{HOSTS['lsmith0']}:{port}", "rdzv-conf": f"is_host={1 - number}",
        }  # fmt: skip
        options = [f"--{option}={value}" for option, value in torchrun.items()]
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", *options, "-m",
                   "latentsmith", *given]  # fmt: skip
        started.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                             start_new_session=True)
        )  # fmt: skip
    try:
        yield started
    finally:
        for name in HOSTS:  # workers have sessions of their own
            for number in ip("netns", "pids", name, check=False).stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(number), signal.SIGKILL)
        for process in started:
            process.communicate()


def finished(processes):
    output = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(output)[-4000:]


@pytest.mark.slow
def test_one_host_is_cut_off_and_the_job_started_again(world, hosts):
    options = ("trainer.max_steps=40", "trainer.devices=1", "trainer.num_nodes=2", "trainer.strategy=ddp",
               "model.global_batch_size=4", "model.micro_batch_size=2", "model.unet_config.dropout=0.2",
               "exp_manager.checkpoint_callback_params.every_n_train_steps=5")  # fmt: skip
    with job(world, world.command("cached", "hosts-whole", *options), 29711) as processes:
        finished(processes)
    run = world.root / "runs" / "hosts-cut"
    arguments = world.command("cached", "hosts-cut", *options)
    with job(world, arguments, 29712) as processes:
        while len(read_rows(run / "metrics.csv")) < 12:
            assert all(process.poll() is None for process in processes), [p.communicate()[1] for p in processes]
            time.sleep(0.02)
        ip("-n", "lsmith1", "link", "set", "cable1", "down")
        rows = len(read_rows(run / "metrics.csv"))
        time.sleep(3)  # a slow machine only sees less of what must not happen
        assert len(read_rows(run / "metrics.csv")) <= min(rows + 2, 39)  # nobody goes on alone
    ip("-n", "lsmith1", "link", "set", "cable1", "up")
    with job(world, arguments, 29713) as processes:
        finished(processes)
    whole = world.root / "runs" / "hosts-whole"
    assert read_rows(run / "metrics.csv") == read_rows(whole / "metrics.csv")
    assert [row["step"] for row in read_rows(run / "metrics.csv")] == list(range(1, 41))
    assert read_state(world.newest(run)) == read_state(world.newest(whole))
