"""A run is a folder: its config, versions, command, checkpoints, logs and pictures."""

import json
import platform
import shlex
import sys
from pathlib import Path

import torch
from torch import nn

from latentsmith.config import Config, to_yaml
from latentsmith.files.atomic import write_text
from latentsmith.files.errors import BadInput
from latentsmith.files.tensors import open_tensors, save_safetensors
from latentsmith.processes import is_first_process
from latentsmith.text.tokenizer import Tokenizer

from .checkpoint import checkpoints_in, read_state

CHECKPOINTS = "checkpoints"


def run_folder(config: Config) -> Path:
    """`exp_manager.exp_dir` / `exp_manager.name`; the first is ./runs if it is not given."""
    return Path(config.exp_manager.exp_dir or "runs") / config.exp_manager.name


def open_run_folder(config: Config) -> Path:
    """Make the run folder and write what made the run into it."""
    folder = run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", to_yaml(config))
    versions = {"python": platform.python_version(), "torch": torch.__version__, "command": shlex.join(sys.argv)}
    write_text(folder / "versions.json", json.dumps(versions, indent=1) + "\n")
    return folder


def valid_checkpoints(folder: Path, look_only: bool) -> list[Path]:
    """The checkpoints of a run, oldest first, without the newest ones that are damaged.

    These are named and, unless this is to look only, set aside under another name, by the first process. BadInput if
    all are damaged.
    """
    found = checkpoints_in(folder)
    damaged = []
    while found:
        try:
            read_state(found[-1])
            break
        except BadInput as error:
            damaged.append((found.pop(), error))
    if damaged and not found:
        raise BadInput(f"{damaged[-1][1]}. None of the {len(damaged)} checkpoints in {folder} is whole; name a new run")
    for path, why in damaged:
        if look_only or not is_first_process():
            print(f"{why}: passed over", flush=True)
        else:
            aside = set_aside(path)
            print(f"{why}: set aside as {aside.name}, going on from an earlier checkpoint", flush=True)
    return found


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint to a name that is free."""
    number, aside = 1, path.with_name(f"{path.name}.DAMAGED")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.DAMAGED-{number}")
    return path.rename(aside)


def checkpoint_to_resume(config: Config, folder: Path, *, look_only: bool = False) -> Path | None:
    """The checkpoint that the config says to go on from, or None to start at step 0.

    One that exp_manager.resume_from_checkpoint names in another run's folder is where this run begins; once it has
    later ones of its own it goes on from these. BadInput where there is none and the config wants one, and where the
    folder holds later ones, of which a run that starts before them would not know whether to keep them.
    """
    manager = config.exp_manager
    found = valid_checkpoints(folder / CHECKPOINTS, look_only)
    start = Path(manager.resume_from_checkpoint) if manager.resume_from_checkpoint else None
    elsewhere = start is not None and start.resolve().parent != (folder / CHECKPOINTS).resolve()
    if found and manager.resume_if_exists and (start is None or (elsewhere and found[-1].name > start.name)):
        return found[-1]
    if start is None and manager.resume_if_exists and not manager.resume_ignore_no_checkpoint:
        raise BadInput(f"{folder}: no checkpoint to resume from; set exp_manager.resume_ignore_no_checkpoint=true")
    if found and (start is None or found[-1].name > start.name):
        raise BadInput(
            f"{found[-1]}: is later than where this run would start; give another exp_manager.name, resume, or move it"
        )
    return start


def scale_so_far(config: Config, folder: Path) -> float | None:
    """The scale of the latents that the run has begun with; None where it has not."""
    start = checkpoint_to_resume(config, folder, look_only=True)
    spec = open_tensors(start / "unet.safetensors").metadata.get("latentsmith.spec") if start else None
    return None if spec is None else float(json.loads(spec)["scale_factor"])


def save_frozen(
    folder: Path, networks: dict[str, nn.Module], trained: tuple[str, ...], tokenizer: Tokenizer | None
) -> None:
    """Put what is not trained into the run folder, once, so that the folder is a whole model."""
    for name, network in networks.items():
        path = folder / f"{name}.safetensors"
        if name not in trained and not path.exists():
            save_safetensors(path, dict(network.state_dict()))
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer")
