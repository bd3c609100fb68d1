"""`latentsmith generate`."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from latentsmith.files.errors import BadInput
from latentsmith.files.regular import PROMPTS
from latentsmith.files.text import read_lines
from latentsmith.image_request import AXES, OPTIONS
from latentsmith.precision import Dtype

from .convert import Weights, file_and_weight

DEFAULT_OUT = Path("images")
RANDOM_SEED = -1


def option(help: str, *flags: str, **limits: Any) -> Any:
    return typer.Option(*flags, help=help, show_default=False, **limits)


def with_sampling_options(command: Callable[..., int]) -> Callable[..., int]:
    """Replace a command's **sampling by the options of image_request, each None where it is not given."""
    signature = inspect.signature(command, eval_str=True)
    parameters = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    for name, each in OPTIONS.items():
        annotation: Any = StrEnum(name, {choice: choice for choice in each.choices}) if each.choices else each.type
        limits: dict[str, Any] = {"min": RANDOM_SEED if name == "seed" else each.low, "max": each.high}
        help = each.help if each.default is None or each.default is False else f"{each.help} [{each.default}]"
        described = option(help, *each.flags, **(limits if each.type in (int, float) else {}))
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation | None, described]
            )
        )
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return command


@with_sampling_options
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL] PROMPT", help="Prompts; with --config also KEY=VALUE.")
    ] = None,
    source: Annotated[
        str | None,
        option("Checkpoint: run folder, diffusers folder, one file, .nemo, hub name.", "--from", "--model", "-m"),
    ] = None,
    out: Annotated[Path | None, option(f"Folder to write to. [{DEFAULT_OUT}]", "--out", "-o", "--output")] = None,
    prompt: Annotated[list[str] | None, option("A prompt, as without the option.", "--prompt")] = None,
    prompts_file: Annotated[Path | None, option("A text file with a prompt on each line.")] = None,
    config: Annotated[Path | None, option("NeMo's inference YAML; options given here go first.")] = None,
    count: Annotated[
        int | None, option("Images of each prompt. [1]", "--count", "-n", "--num-images-per-prompt", min=1)
    ] = None,
    batch_size: Annotated[int | None, option("Images at a time. [8]", min=1)] = None,
    size: Annotated[str | None, option("WIDTHxHEIGHT in pixels, in place of --width and --height.")] = None,
    image: Annotated[Path | None, option("An image to start from.", "--image", "--init-image")] = None,
    mask: Annotated[
        Path | None, option("Of that image: white where to repaint, the rest is kept.", "--mask", "--mask-image")
    ] = None,
    device: Annotated[str | None, option("auto, cuda, mps or cpu. [auto]")] = None,
    dtype: Annotated[Dtype | None, option("Of the weights. [fp32]")] = None,
    weights: Annotated[Weights | None, option("The average or the trained weights. [ema]")] = None,
    prediction_type: Annotated[str | None, option("Where the checkpoint does not say it.")] = None,
    tokenizer: Annotated[str | None, option("Where the checkpoint has none.")] = None,
    lora: Annotated[
        list[str] | None, option("FILE[:WEIGHT] of an adapter (LoRA, LoHa, LoKr, DoRA, OFT); repeatable.", "--lora")
    ] = None,
    lora_folder: Annotated[
        Path | None, option("Adapters that prompts name: <lora:name:0.8>, with --prompt-syntax webui.")
    ] = None,
    embedding: Annotated[
        list[Path] | None, option("File of a textual inversion; repeatable.", "--embedding", "--textual-inversion")
    ] = None,
    preview: Annotated[Path | None, option("A PNG that shows the batch at hand.", "--preview")] = None,
    sheet: Annotated[bool | None, option("Also one sheet of all images.", "--sheet")] = None,
    grid: Annotated[list[str] | None, option("A sheet with axes: --grid guidance=1,3,7 steps=10,25")] = None,
    again: Annotated[Path | None, option("Make this image again and report what differs.")] = None,
    **sampling: Any,
) -> int:
    """Generate images from prompts; each PNG records how it was made.

    \b
    Examples:
      latentsmith generate --from runs/demo "a small red circle at the top left on a white background"
      latentsmith generate v1-5.safetensors "an astronaut" --steps 30 --seed 7 --count 4 --out images
      latentsmith generate --from sd2.nemo --prompts-file prompts.txt --negative "blurry" --size 768x768
      latentsmith generate --from runs/sd1 --image cat.png --strength 0.6 "a tiger"
      latentsmith generate --from runs/sd1 --grid guidance=1,3,7 steps=10,25 "a red circle"
      latentsmith generate v1-5.safetensors "sks dog" --lora dog.safetensors:0.8 --embedding toy.pt
      latentsmith generate --again images/a-red-circle-seed0.png
      torchrun --nproc-per-node 8 -m latentsmith generate --from sd2 --prompts-file prompts.txt
    """
    texts = [*(prompts or [])]
    command: dict[str, Any] = {
        "count": count,
        "batch_size": batch_size,
        "preview": preview,
        "sheet": sheet,
        "grid": grid,
    }
    command |= {"image": image, "mask": mask, "device": device, "dtype": dtype, "weights": weights}
    command |= {"prediction_type": prediction_type, "tokenizer": tokenizer, "out": out, "source": source}
    command |= {"lora_folder": lora_folder, "embeddings": embedding}
    command["loras"] = [file_and_weight(text) for text in lora] if lora else None
    stated = {name: value for name, value in (command | sampling).items() if value is not None}
    stated = {name: value.value if isinstance(value, StrEnum) else value for name, value in stated.items()}
    if again is not None:
        unread = {"prompt": prompt or texts or None, "prompts_file": prompts_file, "config": config, "size": size}
        return _again(again, stated | {name: value for name, value in unread.items() if value is not None})
    if size is not None:
        stated = width_and_height(size) | stated
    if grid:
        stated["grid"] = [*grid, *(text for text in texts if _is_axis(text))]
        texts = [text for text in texts if not _is_axis(text)]
    if source is None and texts and Path(texts[0]).exists():
        stated["source"] = texts.pop(0)
    texts += [*(prompt or []), *_read_prompts(prompts_file)]
    fid = None
    if config is not None:
        texts, fid, stated = _with_nemo(config, texts, stated)
    if stated.get("seed") == RANDOM_SEED:
        stated["seed"] = random.SystemRandom().randrange(2**32)
        print(f"seed {stated['seed']}")
    if not texts and fid is None:
        raise BadInput('no prompt: give one in quotes ("a red circle"), or a file of them with --prompts-file')
    if "source" not in stated:
        raise BadInput("--from is missing: the checkpoint (or model.restore_from_path in the file of --config)")
    if fid is not None:
        from latentsmith.inference.coco_captions import generate_for_captions

        generate_for_captions(stated.pop("source"), fid, **{k: value for k, value in stated.items() if k != "out"})
        return 0
    from latentsmith.inference.generate import generate as run

    run(stated.pop("source"), texts, Path(stated.pop("out", DEFAULT_OUT)), **stated)
    return 0


def _again(image: Path, stated: dict[str, Any]) -> int:
    allowed = ("out", "source", "device", "image", "mask", "tokenizer", "loras", "embeddings")
    if other := [name for name in stated if name not in allowed]:
        flag = OPTIONS[other[0]].flags[0] if other[0] in OPTIONS else f"--{other[0].replace('_', '-')}"
        raise BadInput(f"--again takes all from the image; {flag} cannot be given with it")
    from latentsmith.inference.reproduce import reproduce

    return 0 if reproduce(image, stated.pop("out", image.parent), **stated) else 1


def _with_nemo(config: Path, texts: list[str], stated: dict[str, Any]) -> tuple[list[str], Any, dict[str, Any]]:
    """Return prompts, section `fid` or None, and options of NeMo's file; the command line's own go first."""
    from latentsmith.config.nemo_inference import read_infer
    from latentsmith.config.overrides import is_override

    read = read_infer(config, [text for text in texts if is_override(text)])
    prompts = [text for text in texts if not is_override(text)]
    if "negative_prompt" not in stated:
        print(f"{config}: without --negative the empty prompt is the negative one, as in NeMo")
    fid, listed = read.pop("fid", None), read.pop("prompts", [])
    if prompts or fid is None:
        return prompts or listed, None, read | stated
    if "out" in stated:
        fid["save_path"] = stated["out"]
    if "guidance_scale" in stated:
        fid["classifier_free_guidance"] = [stated["guidance_scale"]]
    return [], fid, read | stated


def _is_axis(text: str) -> bool:
    name, equals, _ = text.partition("=")
    return bool(equals) and name in AXES


def width_and_height(size: str) -> dict[str, int]:
    if (match := re.fullmatch(r"(\d+)[xX](\d+)", size)) is None:
        raise BadInput(f"--size {size}: give WIDTHxHEIGHT, such as 768x512")
    return {"width": int(match[1]), "height": int(match[2])}


def _read_prompts(path: Path | None) -> list[str]:
    """Return the lines of a file that are not blank."""
    if path is None:
        return []
    try:
        return read_lines(path, PROMPTS)
    except OSError as error:
        raise BadInput(f"--prompts-file {path}: {error}") from None
