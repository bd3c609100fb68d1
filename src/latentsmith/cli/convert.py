"""`latentsmith convert`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Format(StrEnum):
    diffusers = "diffusers"
    ldm = "ldm"
    nemo = "nemo"


class Weights(StrEnum):
    ema = "ema"
    raw = "raw"


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Checkpoint of any supported format.")],
    out: Annotated[Path, typer.Argument(metavar="DST", help="File or folder to write.")],
    to: Annotated[Format, typer.Option("--to", help="Format to write.")],
    weights: Annotated[Weights, typer.Option(help="The average or the trained weights, where both are there.")] = (
        Weights.ema
    ),
) -> None:
    """Rewrite a checkpoint in another format.

    \b
    Examples:
      latentsmith convert runs/sd1 sd1-diffusers --to diffusers
      latentsmith convert v1-5-pruned.ckpt v1-5 --to diffusers
      latentsmith convert sd2-folder sd2.safetensors --to ldm --weights raw
    """
    from latentsmith.runs.convert import convert as run

    run(source, out, to.value, weights=weights.value)
