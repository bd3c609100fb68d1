"""Rank and device of this process, read from the environment that its launcher (torchrun, srun, Lightning) sets."""

import os
from typing import TYPE_CHECKING

from latentsmith.files.errors import BadInput

if TYPE_CHECKING:
    import torch


LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))  # torchrun goes before srun around it
RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")  # Lightning sets the last two alone


def process_of() -> tuple[int, int]:
    """Return (rank, number of processes) as torchrun or srun sets them; (0, 1) without either and in a batch script.

    Raises BadInput for variables that cannot be: left over, or set by hand.
    """
    if launched := _launched():
        return launched
    if os.environ.get("RANK", "0") != "0" and "LOCAL_RANK" not in os.environ:
        raise BadInput(f"RANK={os.environ['RANK']} without WORLD_SIZE: set both, or unset it to run one process")
    return 0, 1


def is_first_process() -> bool:
    """Return whether this process has rank 0 of those that were launched together.

    Where neither torchrun nor srun started several, no variable of Lightning's may be above 0.
    """
    rank, processes = _launched() or (0, 1)
    return rank == 0 if processes > 1 else all(os.environ.get(name, "0") == "0" for name in RANKS)


def _launched() -> tuple[int, int] | None:
    """Return (rank, number of processes) of the first launcher that sets both; BadInput where they cannot be."""
    names = next((pair for pair in LAUNCHERS if all(name in os.environ for name in pair)), None)
    if names is None:
        return None
    stated = ", ".join(f"{name}={os.environ[name]}" for name in names)
    try:
        rank, processes = (int(os.environ[name]) for name in names)
    except ValueError:
        raise BadInput(f"{stated}: give whole numbers, or unset both to run one process") from None
    if not 0 <= rank < processes:
        raise BadInput(f"{stated}: a rank is below the number of processes; unset both to run one process")
    return rank, processes


def own_device(device: str) -> str:
    """Return the GPU of this process, where torchrun or srun started several on this machine; else `device`."""
    import torch

    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
    if device in ("auto", "cuda") and local and torch.cuda.is_available():
        return f"cuda:{int(local) % torch.cuda.device_count()}"
    return device


def pick_device(device: "str | torch.device | None") -> str:
    """Return the device named, or the first there is of cuda, mps and cpu. Raises BadInput for one that is missing."""
    import torch

    if device not in (None, "auto"):
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, TypeError) as error:
            raise BadInput(f"device {device}: {str(error).splitlines()[0]}") from None
        return str(device)
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
