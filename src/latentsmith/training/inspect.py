"""Describe a run folder or one of its checkpoints in a few lines, and check that its files are as they were written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentsmith.checkpoints import open_checkpoint
from latentsmith.checkpoints.inspect import inspect_parts
from latentsmith.config import load_config
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import changed_files
from latentsmith.files.json import check_types, read_json
from latentsmith.progress import progress

from .checkpointing import STATE_FILE, STATE_TYPES, checkpoints_in
from .metrics_log import read_rows
from .run_folder import CHECKPOINTS


def is_run(path: Path) -> bool:
    """Return whether `path` is a run folder or one checkpoint of a run."""
    return any((path / name).is_file() for name in ("config.yaml", STATE_FILE))


def inspect_run(path: Path) -> Iterator[str]:
    """Yield lines that say how far a run, or one checkpoint of a run, is and what its parts are."""
    if (path / STATE_FILE).is_file():
        yield f"{path}: checkpoint of a run"
        yield _progress_of(path)
        yield from inspect_parts(open_checkpoint(path))
        return
    config = load_config(path / "config.yaml")
    steps = checkpoints_in(path / CHECKPOINTS)
    yield f"{path}: run {config.name}, {len(steps)} checkpoints"
    if rows := read_rows(path / "metrics.csv"):
        yield f"  last row  {', '.join(f'{name} {value:g}' for name, value in rows[-1].items())}"
    if steps:
        max_steps = config.trainer.max_steps
        yield _progress_of(steps[-1], f" of {max_steps:,}" if max_steps > 0 else "")
        yield from inspect_parts(open_checkpoint(path))


def _progress_of(checkpoint: Path, total: str = "") -> str:
    """Return the line on a checkpoint's counters. total: the run's steps, to follow the step number."""
    state = _read_state(checkpoint)
    averages = ", ".join(state.get("ema_updates") or []) or "none"
    step, seen = f"step {state['global_step']:,}{total}", f"{state['consumed_samples']:,} samples seen"
    return f"  newest    {checkpoint.name}: {step}, {seen}, averages of {averages}"


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json, whose checksums name files of that checkpoint alone."""
    path, what = checkpoint / STATE_FILE, "the state of a checkpoint"
    state = read_json(path, what)
    check_types(state, STATE_TYPES, path, what)
    checksums = state["checksums"]
    if outside := [name for name in checksums if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise BadInput(f"{path}: names {outside[0]!r}, which is not a file of this checkpoint")
    return state


def verify_run(path: Path) -> tuple[str, list[str]]:
    """Compare the files of one checkpoint, or of all of a run, with the checksums in their state.json.

    Returns what was checked, and a line for each damaged file.
    """
    steps = [path] if (path / STATE_FILE).is_file() else checkpoints_in(path / CHECKPOINTS)
    checksums = {
        str((step / name).relative_to(path)): checksum
        for step in steps
        for name, checksum in _read_state(step)["checksums"].items()
    }
    with progress("verifying", "files") as bar:
        return f"{len(checksums):,} files", changed_files(path, checksums, bar)
