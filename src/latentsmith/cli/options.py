"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

CONFIG = "A preset (sd1, sd2_base, sd2_v, demo, ...) or a YAML file."
Config = Annotated[str, typer.Option("--config", "-c", help=CONFIG)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options of the config, in Hydra's grammar.")
]
OutFolder = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")]


def load(config: str, overrides: list[str] | None) -> Any:
    """The composed config; options that have no effect here are named on stderr, in one line."""
    from latentsmith.config import compose
    from latentsmith.config.compose import print_notes, training_config

    composed = compose(config, overrides or [])
    loaded = training_config(config, composed)
    print_notes(config, composed)
    return loaded
