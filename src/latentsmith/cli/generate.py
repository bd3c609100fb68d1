"""`latentsmith generate`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from latentsmith.files.errors import BadInput
from latentsmith.files.regular import PROMPTS, read_regular

from .convert import Dtype, Weights


class Syntax(StrEnum):
    plain = "plain"
    webui = "webui"


class LongPrompts(StrEnum):
    chunks = "chunks"
    cut = "cut"


class Spacing(StrEnum):
    leading = "leading"
    trailing = "trailing"
    linspace = "linspace"


WORDS = "What to draw; with --config also KEY=VALUE."
LAST_SEED = 2**63 - 1


def option(words: str, **limits: Any) -> Any:
    return typer.Option(help=words, show_default=False, **limits)


def generate(
    source: Annotated[
        str | None, typer.Option("--from", help="Checkpoint: run folder, diffusers folder, one file, .nemo, hub name.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write.")] = None,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help=WORDS)] = None,
    prompts_file: Annotated[Path | None, option("A text file with a prompt on each line.")] = None,
    negative: Annotated[str | None, option("What to steer away from.")] = None,
    config: Annotated[Path | None, option("NeMo's inference YAML; options given here go first.")] = None,
    steps: Annotated[int | None, option("Sampling steps. [25]", min=1, max=1000)] = None,
    guidance_scale: Annotated[float | None, option("How strongly the prompt counts; 1 is off. [7.5]")] = None,
    guidance_rescale: Annotated[float | None, option("0 to 1: keeps strong guidance from overexposing. [0]")] = None,
    split_guidance: Annotated[bool | None, option("Prompt and null text one after the other: half the memory.")] = None,
    sampler: Annotated[str | None, option("dpmsolver++, ddim, euler, ...; Karras after it. [dpmsolver++]")] = None,
    spacing: Annotated[Spacing | None, option("Of the timesteps; by default as the model says.")] = None,
    eta: Annotated[float | None, option("0 to 1: share of random noise in ddim. [0]")] = None,
    parallelism: Annotated[int | None, option("Steps at a time in para_ddim. [8]")] = None,
    tolerance: Annotated[float | None, option("When para_ddim takes a step as done. [0.1]")] = None,
    seed: Annotated[int | None, option("Picture i of a prompt uses seed + i. [0]", min=0, max=LAST_SEED)] = None,
    variation_seed: Annotated[int | None, option("Of the noise to vary towards. [0]", min=0, max=LAST_SEED)] = None,
    variation_strength: Annotated[float | None, option("0 to 1: how far towards it. [0]")] = None,
    height: Annotated[int | None, option("Pixels; by default what the model was trained at.", min=8)] = None,
    width: Annotated[int | None, option("Pixels; by default what the model was trained at.", min=8)] = None,
    image: Annotated[Path | None, option("A picture to start from.")] = None,
    strength: Annotated[float | None, option("0 to 1: how much of it is redrawn. [0.75]")] = None,
    mask: Annotated[Path | None, option("Of the picture: white where to redraw, the rest is kept.")] = None,
    prompt_syntax: Annotated[Syntax | None, option("webui reads (word:1.2) as a weight. [plain]")] = None,
    long_prompts: Annotated[LongPrompts | None, option("Over 77 tokens: in chunks, or cut. [chunks]")] = None,
    vae_tiling: Annotated[bool | None, option("Decode in tiles: any size in bounded memory.")] = None,
    count: Annotated[int | None, option("Pictures of each prompt. [1]", min=1)] = None,
    batch_size: Annotated[int | None, option("Pictures at a time. [8]", min=1)] = None,
    device: Annotated[str | None, option("auto, cuda, mps or cpu. [auto]")] = None,
    dtype: Annotated[Dtype | None, option("Of the weights. [fp32]")] = None,
    weights: Annotated[Weights | None, option("The average or the trained weights. [ema]")] = None,
    prediction_type: Annotated[str | None, option("Where the checkpoint does not say it.")] = None,
    tokenizer: Annotated[str | None, option("Where the checkpoint has none.")] = None,
    preview: Annotated[Path | None, option("A PNG that shows what is being drawn.")] = None,
    sheet: Annotated[bool | None, option("Also one sheet of all pictures.")] = None,
    grid: Annotated[list[str] | None, option("A sheet with axes: --grid guidance=1,3,7 steps=10,25")] = None,
    again: Annotated[Path | None, option("Make this picture again and say what differs.")] = None,
) -> int:
    """Draw pictures from prompts; each PNG records how it was made.

    \b
    Examples:
      latentsmith generate --from runs/demo --out pictures "a small red circle at the top left on a white background"
      latentsmith generate --from v1-5.safetensors --out pictures --steps 30 --seed 7 --count 4 "an astronaut"
      latentsmith generate --from sd2.nemo --out pictures --prompts-file prompts.txt --negative "blurry"
      latentsmith generate --from runs/sd1 --out pictures --image cat.png --strength 0.6 "a tiger"
      latentsmith generate --from runs/sd1 --out pictures --grid guidance=1,3,7 steps=10,25 "a red circle"
      latentsmith generate --again pictures/a-red-circle-seed0.png
      torchrun --nproc-per-node 8 -m latentsmith generate --from sd2 --out pictures --prompts-file prompts.txt
    """
    if again is not None:
        from latentsmith.inference.reproduce import again as repeat

        moved = {"image": image, "mask": mask, "tokenizer": tokenizer}
        allowed = {"again", "out", "source", "device", *moved}
        if other := [name for name, value in locals().items() if value is not None and name in OPTIONS - allowed]:
            raise BadInput(
                f"--again takes all from the picture; --{other[0].replace('_', '-')} cannot be given with it"
            )
        moved = {name: value for name, value in moved.items() if value is not None}
        return 0 if repeat(again, out or again.parent, source=source, device=device or "auto", **moved) else 1
    named = {"source", "out", "prompts", "prompts_file", "negative", "config", "again", "named"}
    given = {name: value for name, value in locals().items() if name not in named and value is not None}
    given = {name: value.value if isinstance(value, StrEnum) else value for name, value in given.items()}
    told = {"negative_prompt": negative, "source": source, "out": out}
    given |= {name: value for name, value in told.items() if value is not None}
    words = prompts or []
    if grid:
        from latentsmith.inference.generate import AXES

        axes = [word for word in words if word.partition("=")[0] in AXES and "=" in word]
        given["grid"] = [*grid, *axes]
        words = [word for word in words if word not in axes]
    wanted = [*words, *_read_prompts(prompts_file)]
    fid = None
    if config is not None:
        from latentsmith.config.nemo_inference import read_infer
        from latentsmith.config.overrides import is_override

        changes = [word for word in wanted if is_override(word)]
        wanted = [word for word in wanted if word not in changes]
        read = read_infer(config, changes)
        fid, listed = read.pop("fid", None), read.pop("prompts", [])
        given = read | given
        fid = None if wanted else fid
        wanted = wanted or listed
    if fid is not None:
        if "source" not in given:
            raise BadInput("--from is missing: the checkpoint (or give model.restore_from_path in the file)")
        from latentsmith.inference.coco_captions import draw_captions

        asked: dict[str, Any] = {"save_path": out, "classifier_free_guidance": guidance_scale and [guidance_scale]}
        fid |= {name: value for name, value in asked.items() if value is not None}
        draw_captions(given.pop("source"), fid, **{name: value for name, value in given.items() if name != "out"})
        return 0
    if not wanted:
        raise BadInput('no prompt: give one in quotes ("a red circle"), or a file of them with --prompts-file')
    for name, flag in (("source", "--from"), ("out", "--out")):
        if name not in given:
            raise BadInput(f"{flag} is missing: {'the checkpoint' if name == 'source' else 'the folder to write'}")
    from latentsmith.inference.generate import generate as run

    run(given.pop("source"), wanted, Path(given.pop("out")), **given)
    return 0


def _read_prompts(path: Path | None) -> list[str]:
    """The lines of a file that are not blank."""
    if path is None:
        return []
    try:
        lines = read_regular(path, PROMPTS).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--prompts-file {path}: {error}") from None
    return [line.strip() for line in lines if line.strip()]


OPTIONS = set(generate.__annotations__) - {"return"}
