"""`latentsmith convert`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from latentsmith.files.errors import BadInput
from latentsmith.precision import Dtype


class Weights(StrEnum):
    ema = "ema"
    raw = "raw"


def file_and_weight(text: str) -> tuple[Path, float]:
    """Parse FILE[:WEIGHT] of --lora."""
    file, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(file), float(weight)
    except ValueError:
        example = "such as style.safetensors:0.8"
        raise BadInput(f"--lora {text}: no such file; give FILE or FILE:WEIGHT, {example}") from None


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Checkpoint of any supported format.")],
    out: Annotated[Path, typer.Argument(metavar="DST", help="File or folder to write; must not exist.")],
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="FORMAT", help="Format to write: see the examples; a wrong one lists all."),
    ] = None,
    weights: Annotated[Weights, typer.Option(help="The average or the trained weights, where both are there.")] = (
        Weights.ema
    ),
    dtype: Annotated[Dtype | None, typer.Option(help="Of every weight; without it each keeps its own.")] = None,
    prediction_type: Annotated[
        str | None,
        typer.Option(help="epsilon, v_prediction or sample, where the checkpoint does not tell or is wrong."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Of a diffusers folder, where the checkpoint has none and CLIP's is not here.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Open the result, compare every tensor, print the largest difference.")
    ] = False,
    lora: Annotated[
        list[str] | None, typer.Option("--lora", metavar="FILE[:WEIGHT]", help="Adapter to merge in; repeatable.")
    ] = None,
    difference: Annotated[
        Path | None, typer.Option(metavar="BASE", help="Write a LoRA of what SRC has changed of this model.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of that LoRA.")] = 32,
    model: Annotated[
        Path | None, typer.Option(help="The model of an adapter SRC, where that has sizes of its own.")
    ] = None,
) -> None:
    """Rewrite a checkpoint or an adapter in another format, merge adapters, or extract one.

    \b
    Examples:
      latentsmith convert runs/sd1 sd1-diffusers --to diffusers
      latentsmith convert v1-5-pruned.ckpt v1-5 --to diffusers --dtype fp16 --verify
      latentsmith convert sd2-folder sd2.safetensors --to ldm --weights raw
      latentsmith convert 768-v.safetensors sd2.nemo --to nemo --prediction-type v_prediction
      latentsmith convert dog.safetensors dog-diffusers --to diffusers
      latentsmith convert v1-5.safetensors v1-5-dog.safetensors --to ldm --lora dog.safetensors:0.8
      latentsmith convert v1-5-dog.safetensors dog.safetensors --difference v1-5.safetensors --rank 32
    """
    from latentsmith.adapters.convert import convert_adapter, extract, is_adapter, merge
    from latentsmith.checkpoints.convert import convert as convert_model

    if difference is not None:
        extract(source, difference, out, rank=rank, to=to or "kohya")
        return
    if is_adapter(source):
        convert_adapter(source, out, to or "kohya", dtype=dtype.value if dtype else None, model=model)
        return
    options: dict[str, Any] = {
        "weights": weights.value,
        "dtype": dtype.value if dtype else None,
        "prediction_type": prediction_type,
        "tokenizer": tokenizer,
        "verify": verify,
    }
    if lora:
        merge(source, out, [file_and_weight(text) for text in lora], to, **options)
        return
    if to is None:
        raise BadInput("--to is missing: the format to write, such as diffusers, ldm or nemo")
    convert_model(source, out, to, **options)
