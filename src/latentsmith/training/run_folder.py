"""A run is a folder: its config, versions, command, checkpoints, logs and images."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from latentsmith.config import Config, replaced, to_yaml
from latentsmith.files.atomic import remove_incomplete, write_text
from latentsmith.files.errors import BadInput
from latentsmith.files.lock import locked_folder
from latentsmith.files.tensors import open_tensors, save_safetensors
from latentsmith.text.tokenizer import Tokenizer

from .checkpointing import OPTIMIZER_FILE, STATE_FILE, check_fits, checkpoints_in, read_state, restore_replaced
from .identity import Content, Identity, branch_lines, check_identity, identity_of, read_identity
from .sharding import on_first_process

if TYPE_CHECKING:
    from lightning.fabric import Fabric

CHECKPOINTS = "checkpoints"


def run_folder(config: Config) -> Path:
    """Return `exp_manager.exp_dir` / `exp_manager.name`; the first is ./runs if it is not given."""
    return Path(config.exp_manager.exp_dir or "runs") / config.exp_manager.name


@contextmanager
def locked_run_folder(config: Config, fabric: Fabric) -> Iterator[None]:
    """Lock the run folder inside the context, in the first process; raises BadInput in all if another holds it."""
    with ExitStack() as held:
        on_first_process(fabric, lambda: held.enter_context(locked_folder(run_folder(config))))
        yield


def open_run_folder(
    config: Config,
    resume: Resume | None,
    trained: tuple[str, ...],
    content: Content,
    frozen: Mapping[str, nn.Module],
    tokenizer: Tokenizer | None,
) -> None:
    """Write into the locked run folder what made the run, after a last look whether it is the same run.

    content: what defines the run beside its options. frozen, tokenizer: what is not trained, kept once unless
    model.save_frozen is off, so that the folder is a whole model.
    Raises BadInput before anything changes where the folder holds another run.
    """
    folder = run_folder(config)
    identity, lines = compared(config, resume, trained, content)
    print(*lines, sep="\n", end="\n" if lines else "", flush=True)
    for path, reason in resume.damaged if resume else ():
        print(f"{reason}: set aside as {set_aside(path).name}, going on from an earlier checkpoint", flush=True)
    for leftovers in (folder, folder / "samples", folder / "nonfinite", folder / "tokenizer"):
        remove_incomplete(leftovers)
    is_new = resume is None or not resume.is_of(folder)
    for name, network in frozen.items() if config.model.save_frozen else ():
        path = folder / f"{name}.safetensors"
        if is_new or not path.exists():
            save_safetensors(path, dict(network.state_dict()))
    if config.model.save_frozen and tokenizer is not None:
        tokenizer.save(folder / "tokenizer")
    identity.write(folder)
    write_text(folder / "config.yaml", to_yaml(replaced(config, "exp_manager.allow_data_change", False)))
    versions = {"python": platform.python_version(), "torch": torch.__version__, "command": shlex.join(sys.argv)}
    write_text(folder / "versions.json", json.dumps(versions, indent=1) + "\n")


def compared(
    config: Config, resume: Resume | None, trained: tuple[str, ...], content: Content
) -> tuple[Identity, list[str]]:
    """Return what defines a run, and lines on how it differs from the run that it resumes.

    content: functions that return fingerprints; empty to compare the options alone. Raises BadInput for what would
    make it another run.
    """
    folder = run_folder(config)
    is_own = resume is None or resume.is_of(folder)
    source = folder if resume is None or is_own else resume.path.parent.parent
    before = read_identity(source) if resume else None
    now = identity_of(config, trained, content, before)
    if before is None:
        return now, []
    if not is_own:
        return now, branch_lines(source, before, now, trained)
    return now, check_identity(folder, before, now, trained, config.exp_manager.allow_data_change)


@dataclass(frozen=True)
class Resume:
    """A checkpoint to resume from, whose files were found whole.

    counters: its state.json. damaged: later checkpoints of the run that are not whole, each with the reason.
    """

    path: Path
    counters: Mapping[str, Any]
    damaged: Sequence[tuple[Path, BadInput]] = ()

    def is_of(self, folder: Path) -> bool:
        """Return whether it is a checkpoint of the run in a folder."""
        return self.path.resolve().parent == (folder / CHECKPOINTS).resolve()

    def scale_factor(self) -> float | None:
        """Return the scale of the latents that the run began with, if its weights say."""
        spec = open_tensors(self.path / OPTIMIZER_FILE).metadata.get("latentsmith.spec")
        return None if spec is None else float(json.loads(spec)["scale_factor"])


def find_resume(config: Config) -> Resume | None:
    """Return the checkpoint that the config says to resume from, or None to start at step 0.

    One that exp_manager.resume_from_checkpoint names in another run's folder is where this run begins; once it has
    later ones of its own it resumes from these.
    Raises BadInput where there is none and the config wants one, where all are damaged, and where the folder holds
    later ones than the run would start from: it could not know whether to keep them.
    """
    manager, folder = config.exp_manager, run_folder(config) / CHECKPOINTS
    newest = newest_whole(folder)
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


def newest_whole(folder: Path) -> Resume | None:
    """Return the newest checkpoint of a folder that is whole, with the damaged ones that are later."""
    damaged: list[tuple[Path, BadInput]] = []
    for path in reversed(checkpoints_in(folder)):
        try:
            return Resume(path, read_state(path), damaged)
        except BadInput as error:
            damaged.append((path, error))
    if damaged:
        raise BadInput(f"{damaged[-1][1]}. None of the {len(damaged)} checkpoints in {folder} is whole; name a new run")
    return None


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint to a name that is free."""
    number, aside = 1, path.with_name(f"{path.name}.DAMAGED")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.DAMAGED-{number}")
    return path.rename(aside)


def checked_resume(config: Config, trained: tuple[str, ...]) -> Resume | None:
    """Return what `find_resume` finds, if the options and what is trained are those of its run; changes no file."""
    resume = find_resume(config)
    if resume is not None:
        has_averages = config.exp_manager.ema.enable
        check_fits(resume.path, resume.counters, trained, config.model.optim.name, has_averages)
        compared(config, resume, trained, {})
    return resume


def resume_together(config: Config, fabric: Fabric, trained: tuple[str, ...]) -> Resume | None:
    """Return what the first process resumes from, in all of them, in a locked run folder.

    Raises BadInput where one of them cannot see it, and as `checked_resume`.
    """

    def find() -> Resume | None:
        restore_replaced(run_folder(config) / CHECKPOINTS)
        return checked_resume(config, trained)

    resume = on_first_process(fabric, find)
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
