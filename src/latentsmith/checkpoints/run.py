"""Run folders and checkpoints of latentsmith's own training, which writes them: one safetensors file for each part."""

import re
from pathlib import Path

from latentsmith.architectures import COMPONENTS
from latentsmith.files.atomic import INCOMPLETE
from latentsmith.files.tensors import open_tensors

from .base import Contents, Format

FILES = {part: f"{part}.safetensors" for part in COMPONENTS}


def open_run(path: Path, weights: str) -> Contents | None:
    """Open a checkpoint folder or a run folder (whose newest checkpoint counts).

    Averages lie in the checkpoint's `ema/`. Frozen parts are stored once per run, in the run folder itself.
    """
    steps = [step for step in (path / "checkpoints").glob("*") if not step.name.endswith(INCOMPLETE) and _is_ours(step)]
    if steps:
        folders = [max(steps, key=_step), path]
    elif _is_ours(path):
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


def _step(folder: Path) -> tuple[int, str]:
    numbers = re.findall(r"\d+", folder.name)
    return (int(numbers[-1]) if numbers else -1, folder.name)


FORMAT = Format(name="run", title="run", open=open_run)
