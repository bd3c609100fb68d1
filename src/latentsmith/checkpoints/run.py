"""Run folders and checkpoints of latentsmith's own training, which writes them: one safetensors file for each part."""

import re
from pathlib import Path

from latentsmith.architectures import COMPONENTS
from latentsmith.files.atomic import INCOMPLETE
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import hash_file
from latentsmith.files.json import read_json
from latentsmith.files.tensors import open_tensors

from .base import Contents, Format

STATE_FILE = "state.json"  # written last, with a checksum of every other file of a checkpoint
FILES = {part: f"{part}.safetensors" for part in COMPONENTS}


def open_run(path: Path, weights: str) -> Contents | None:
    """Open a checkpoint folder or a run folder (whose newest checkpoint counts).

    Averages lie in the checkpoint's `ema/`. Frozen parts are stored once per run, in the run folder itself.
    """
    steps = [step for step in (path / "checkpoints").glob("step-*") if _is_finished(step)]
    if steps:
        folders = [max(steps, key=lambda step: int(step.name.removeprefix("step-"))), path]
    elif _is_ours(path):
        if path.name.endswith((INCOMPLETE, ".DAMAGED")):
            raise BadInput(f"{path}: an unfinished or damaged checkpoint; take another of the run")
        folders = [path, path.parent.parent] if path.parent.name == "checkpoints" else [path]
    else:
        return None
    names = ("ema/{}", "{}") if weights == "ema" else ("{}",)
    candidates = {
        part: [folder / name.format(file) for folder in folders for name in names] for part, file in FILES.items()
    }
    found = {part: next((file for file in files if file.is_file()), None) for part, files in candidates.items()}
    return Contents({part: open_tensors(file) for part, file in found.items() if file}, "run")


def _is_ours(folder: Path) -> bool:
    return any((folder / file).is_file() for file in FILES.values())


def _is_finished(step: Path) -> bool:
    return bool(re.fullmatch(r"step-\d+", step.name)) and (step / STATE_FILE).is_file() and _is_ours(step)


def check_sums(file: Path) -> None:
    """Raise BadInput for a file of a checkpoint that is not as training wrote it; other files pass unread."""
    folder = file.parent.parent if file.parent.name == "ema" else file.parent
    if not (folder / STATE_FILE).is_file():
        return
    checksums = read_json(folder / STATE_FILE, "the state of a run").get("checksums")
    expected = checksums.get(file.relative_to(folder).as_posix()) if isinstance(checksums, dict) else None
    if expected and hash_file(file) != expected:
        raise BadInput(f"{file}: damaged since it was written; take another checkpoint of the run")


FORMAT = Format(name="run", title="run", open=open_run)
