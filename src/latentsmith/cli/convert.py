"""`latentsmith convert`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from latentsmith.precision import Dtype


class Weights(StrEnum):
    ema = "ema"
    raw = "raw"


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Checkpoint of any supported format.")],
    out: Annotated[Path, typer.Argument(metavar="DST", help="File or folder to write; must not exist.")],
    to: Annotated[
        str,
        typer.Option("--to", metavar="FORMAT", help="Format to write: see the examples; a wrong one lists all."),
    ],
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
) -> None:
    """Rewrite a checkpoint in another format.

    \b
    Examples:
      latentsmith convert runs/sd1 sd1-diffusers --to diffusers
      latentsmith convert v1-5-pruned.ckpt v1-5 --to diffusers --dtype fp16 --verify
      latentsmith convert sd2-folder sd2.safetensors --to ldm --weights raw
      latentsmith convert 768-v.safetensors sd2.nemo --to nemo --prediction-type v_prediction
    """
    from latentsmith.checkpoints.convert import convert as run

    run(
        source,
        out,
        to,
        weights=weights.value,
        dtype=dtype.value if dtype else None,
        prediction_type=prediction_type,
        tokenizer=tokenizer,
        verify=verify,
    )
