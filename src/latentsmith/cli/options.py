"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentsmith.files.errors import BadInput

if TYPE_CHECKING:
    from latentsmith.config import Config as RunConfig

CONFIG = "A preset (sd1, sd2_base, sd2_v, demo, ...) or a YAML file; also without --config, as the first word."
Config = Annotated[str | None, typer.Option("--config", "-c", help=CONFIG)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[CONFIG] KEY=VALUE", help="Options of the config, in Hydra's grammar.")
]
OutFolder = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")]


def config_and_overrides(
    config: str | None, arguments: list[str] | None, resume: Path | None = None
) -> tuple[str, list[str]]:
    """Return the config's name and the overrides of a command.

    Without --config, the first word that is no override names the config. resume: a run folder, wherever it has been
    moved to; its own config and its newest checkpoint are taken. Raises BadInput where no config is named, or two.
    """
    arguments = list(arguments or [])
    if config is None and arguments and "=" not in arguments[0] and not arguments[0].startswith("~"):
        config = arguments.pop(0)
    if resume is not None and config is not None:
        raise BadInput(f"--resume {resume} takes the run's own config; leave out {config}")
    if resume is not None:
        folder = resume.resolve()
        config = str(folder / "config.yaml")
        if not Path(config).is_file():
            raise BadInput(f"--resume {resume}: is not a run folder; it has no config.yaml")
        location = [f"exp_manager.exp_dir={folder.parent}", f"exp_manager.name={folder.name}"]
        resuming = ["exp_manager.resume_if_exists=true", "exp_manager.resume_ignore_no_checkpoint=false"]
        arguments = [*location, *resuming, *arguments]
    if config is None:
        raise BadInput("--config is missing: a preset (sd1, sd2_base, demo, ...) or a YAML file")
    return config, arguments


def load(config: str | None, arguments: list[str] | None) -> RunConfig:
    """Return the config of a run; options that have no effect are named on stderr, in one line."""
    from latentsmith.config.compose import compose, print_notes, training_config

    name, overrides = config_and_overrides(config, arguments)
    composed = compose(name, overrides)
    loaded = training_config(name, composed)
    print_notes(name, composed)
    return loaded
