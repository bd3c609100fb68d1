"""A run is a folder: its config, versions, command, checkpoints, logs and pictures."""

import json
import platform
import shlex
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from latentsmith.files.atomic import write_text
from latentsmith.files.errors import BadInput
from latentsmith.training.checkpoint import checkpoints_in, read_state

CHECKPOINTS = "checkpoints"


def run_folder(config: DictConfig) -> Path:
    """`exp_manager.exp_dir` / `exp_manager.name`; the first is ./runs if it is not given."""
    return Path(config.exp_manager.exp_dir or "runs") / config.exp_manager.name


def open_run_folder(config: DictConfig) -> Path:
    """Make the run folder and write what made the run into it."""
    folder = run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    versions = {"python": platform.python_version(), "torch": torch.__version__, "command": shlex.join(sys.argv)}
    write_text(folder / "versions.json", json.dumps(versions, indent=1) + "\n")
    return folder


def valid_checkpoints(folder: Path, look_only: bool) -> list[Path]:
    """The checkpoints of a run, oldest first. Newest ones that are damaged are set aside, renamed, and named, unless
    this is to look only."""
    found = checkpoints_in(folder)
    while found and not look_only:
        try:
            read_state(found[-1])
            break
        except BadInput as error:
            aside = found[-1].with_name(f"{found[-1].name}.DAMAGED")
            print(f"{error}: set aside as {aside.name}, going on from an earlier checkpoint", flush=True)
            found.pop().rename(aside)
    return found


def checkpoint_to_resume(config: DictConfig, folder: Path, *, look_only: bool = False) -> Path | None:
    """The checkpoint that the config says to go on from, or None to start at step 0.

    BadInput where there is none and the config wants one, and where the folder holds later ones, of which a run that
    starts before them would not know whether to keep them.
    """
    manager = config.exp_manager
    found = valid_checkpoints(folder / CHECKPOINTS, look_only)
    if manager.resume_from_checkpoint:
        start: Path | None = Path(manager.resume_from_checkpoint)
    else:
        start = found[-1] if found and manager.resume_if_exists else None
        if not start and manager.resume_if_exists and not manager.resume_ignore_no_checkpoint:
            raise BadInput(f"{folder}: no checkpoint to resume from; set exp_manager.resume_ignore_no_checkpoint=true")
    if found and (start is None or found[-1].name > start.name):
        raise BadInput(
            f"{found[-1]}: is later than where this run would start; give another exp_manager.name, resume, or move it"
        )
    return start
