"""`latentsmith demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path("runs/demo"),
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Train the VAE and the text encoder too; hours, not minutes.")
    ] = False,
) -> None:
    """Run the whole way on synthetic scenes: make, import, cache, train, generate, measure. Minutes on a CPU.

    \b
    Examples:
      latentsmith demo
      latentsmith demo --out /tmp/demo --from-scratch
    """
    from latentsmith.demo.demo import demo as run

    run(out, from_scratch=from_scratch)
