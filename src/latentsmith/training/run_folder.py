"""A run is a folder: its config, versions, command, checkpoints, logs and images."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from latentsmith.config import Config, to_yaml
from latentsmith.files.atomic import write_text
from latentsmith.files.errors import BadInput
from latentsmith.files.tensors import open_tensors, save_safetensors
from latentsmith.text.tokenizer import Tokenizer

from .checkpointing import STATE_FILE, checkpoints_in, read_state
from .sharding import on_first_process

if TYPE_CHECKING:
    from lightning.fabric import Fabric

CHECKPOINTS = "checkpoints"


def run_folder(config: Config) -> Path:
    """Return `exp_manager.exp_dir` / `exp_manager.name`; the first is ./runs if it is not given."""
    return Path(config.exp_manager.exp_dir or "runs") / config.exp_manager.name


def open_run_folder(config: Config, networks: Mapping[str, nn.Module], tokenizer: Tokenizer | None) -> None:
    """Make the run folder and write into it what made the run.

    networks, tokenizer: what is not trained, kept once unless model.save_frozen is off, so that the folder is a whole
    model.
    """
    folder = run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", to_yaml(config))
    versions = {"python": platform.python_version(), "torch": torch.__version__, "command": shlex.join(sys.argv)}
    write_text(folder / "versions.json", json.dumps(versions, indent=1) + "\n")
    if not config.model.save_frozen:
        return
    for name, network in networks.items():
        path = folder / f"{name}.safetensors"
        if not path.exists():
            save_safetensors(path, dict(network.state_dict()))
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer")


@dataclass(frozen=True)
class Resume:
    """A checkpoint to resume from, whose files were found whole. counters: its state.json."""

    path: Path
    counters: Mapping[str, Any]

    def scale_factor(self) -> float | None:
        """Return the scale of the latents that the run began with, if its weights say."""
        spec = open_tensors(self.path / "unet.safetensors").metadata.get("latentsmith.spec")
        return None if spec is None else float(json.loads(spec)["scale_factor"])


def find_resume(config: Config, *, read_only: bool = False) -> Resume | None:
    """Return the checkpoint that the config says to resume from, or None to start at step 0.

    One that exp_manager.resume_from_checkpoint names in another run's folder is where this run begins; once it has
    later ones of its own it resumes from these. read_only: leave damaged checkpoints where they are.
    Raises BadInput where there is none and the config wants one, where all are damaged, and where the folder holds
    later ones than the run would start from: it could not know whether to keep them.
    """
    manager, folder = config.exp_manager, run_folder(config) / CHECKPOINTS
    newest = newest_whole(folder, read_only)
    start = Path(manager.resume_from_checkpoint) if manager.resume_from_checkpoint else None
    elsewhere = start is not None and start.resolve().parent != folder.resolve()
    if newest and manager.resume_if_exists and (start is None or (elsewhere and newest.path.name > start.name)):
        return newest
    if start is None and manager.resume_if_exists and not manager.resume_ignore_no_checkpoint:
        raise BadInput(
            f"{folder.parent}: no checkpoint to resume from; set exp_manager.resume_ignore_no_checkpoint=true"
        )
    if newest and (start is None or newest.path.name > start.name):
        raise BadInput(
            f"{newest.path}: is later than where this run would start; give another exp_manager.name, resume, or move "
            "it"
        )
    if start is None:
        return None
    if newest and newest.path.resolve() == start.resolve():
        return newest
    return Resume(start, read_state(start))


def newest_whole(folder: Path, read_only: bool) -> Resume | None:
    """Return the newest checkpoint of a folder that is whole; damaged ones are reported and set aside."""
    found, damaged = checkpoints_in(folder), []
    newest = None
    while found and newest is None:
        try:
            newest = Resume(found[-1], read_state(found[-1]))
        except BadInput as error:
            damaged.append((found.pop(), error))
    if damaged and newest is None:
        raise BadInput(f"{damaged[-1][1]}. None of the {len(damaged)} checkpoints in {folder} is whole; name a new run")
    for path, reason in damaged:
        if read_only:
            print(f"{reason}: passed over", flush=True)
        else:
            print(f"{reason}: set aside as {set_aside(path).name}, going on from an earlier checkpoint", flush=True)
    return newest


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint to a name that is free."""
    number, aside = 1, path.with_name(f"{path.name}.DAMAGED")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.DAMAGED-{number}")
    return path.rename(aside)


def resume_together(config: Config, fabric: Fabric) -> Resume | None:
    """Return what the first process resumes from, in all of them. Raises BadInput where one of them cannot see it."""
    resume = on_first_process(fabric, lambda: find_resume(config))
    if resume is None:
        return None
    if not (resume.path / STATE_FILE).is_file():
        raise BadInput(
            f"rank {fabric.global_rank} found no {resume.path}, from which rank 0 resumes; share the run folder "
            "between the hosts"
        )
    if fabric.is_global_zero:
        print(f"resuming {run_folder(config)} at step {resume.counters['global_step']:,}", flush=True)
    return resume
