"""`latentsmith generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentsmith.cli.options import OutFolder
from latentsmith.files.errors import BadInput


def generate(
    source: Annotated[str, typer.Option("--from", help="Checkpoint: run folder, diffusers folder, one file, .nemo.")],
    out: OutFolder,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="What to draw.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="A text file with a prompt on each line.")] = None,
    negative: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Sampling steps.")] = 25,
    guidance_scale: Annotated[float, typer.Option(min=0, help="How strongly the prompt counts; 1 is none.")] = 7.5,
    sampler: Annotated[str, typer.Option(help="dpmsolver++, ddim, euler, ...")] = "dpmsolver++",
    seed: Annotated[int, typer.Option(min=0, help="Picture i of a prompt uses seed + i.")] = 0,
    height: Annotated[int | None, typer.Option(min=8, help="Pixels; by default what the model was trained at.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Pixels; by default what the model was trained at.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cuda, mps or cpu.")] = "auto",
) -> None:
    """Draw pictures from prompts; each PNG records how it was made.

    \b
    Examples:
      latentsmith generate --from runs/demo --out pictures "a small red circle at the top left on a white background"
      latentsmith generate --from v1-5.safetensors --out pictures --steps 30 --seed 7 --count 4 "an astronaut"
      latentsmith generate --from sd2.nemo --out pictures --prompts-file prompts.txt --negative "blurry"
    """
    wanted = [*(prompts or []), *_read_prompts(prompts_file)]
    if not wanted:
        raise BadInput('no prompt: give one in quotes ("a red circle"), or a file of them with --prompts-file')
    from latentsmith.runs.generate import generate as run

    run(
        source,
        wanted,
        out,
        negative_prompt=negative,
        steps=steps,
        guidance_scale=guidance_scale,
        sampler=sampler,
        seed=seed,
        height=height,
        width=width,
        count=count,
        batch_size=batch_size,
        device=device,
    )


def _read_prompts(path: Path | None) -> list[str]:
    """The lines of a file that are not blank."""
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--prompts-file {path}: {error}") from None
    return [line.strip() for line in lines if line.strip()]
