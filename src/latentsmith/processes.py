"""Which of the processes of a command this one is, by the environment that its launcher made."""

import os

import torch


def process_of() -> tuple[int, int]:
    """(rank, processes) as torchrun or srun says; (0, 1) alone, and in a batch script itself."""
    for rank, processes in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if rank in os.environ and processes in os.environ:
            return int(os.environ[rank]), int(os.environ[processes])
    return 0, 1


def is_first_process() -> bool:
    """Whether no launcher, torchrun, srun or Lightning's own, has given this process a place but the first."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))


def own_device(device: str) -> str:
    """The GPU of this process among those that torchrun or srun started on this machine."""
    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
    if device in ("auto", "cuda") and local and torch.cuda.is_available():
        return f"cuda:{int(local) % torch.cuda.device_count()}"
    return device
