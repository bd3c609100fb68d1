"""`latentsmith config ...`: look at configs without running them."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Overrides

app = typer.Typer(help="Show, validate, explain and compare configs.", no_args_is_help=True, rich_markup_mode=None)

Name = Annotated[str, typer.Argument(metavar="NAME|FILE", help="A preset or a YAML file.")]


@app.command()
def show(config: Name, overrides: Overrides = None) -> None:
    """Print the resolved config as YAML, each value with where it came from.

    \b
    Examples:
      latentsmith config show sd2_v
      latentsmith config show my.yaml trainer.precision=bf16
    """
    from latentsmith.config import compose
    from latentsmith.config.explain import show as describe

    typer.echo(describe(compose(config, overrides or [])))


@app.command()
def validate(config: Name, overrides: Overrides = None) -> None:
    """Check a config by itself: keys, types, ranges and contradictions, not files or this machine.

    \b
    Examples:
      latentsmith config validate my.yaml
      latentsmith config validate sd1 model.unet_config.num_head_channels=64
    """
    from latentsmith.config import compose

    for note in compose(config, overrides or []).notes:
        typer.echo(note)
    typer.echo(f"{config} is valid")


@app.command()
def explain(
    key: Annotated[str, typer.Argument(help="An option or a group of options; none for all.")] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="The reference page of all options.")] = False,
) -> None:
    """Say what an option means: its values, its default, and what becomes of it here.

    \b
    Examples:
      latentsmith config explain model.optim.lr
      latentsmith config explain model.optim
      latentsmith config explain --markdown
    """
    from latentsmith.config import explain

    typer.echo(explain.reference_page() if markdown else explain.explain(key))


@app.command()
def migrate(config: Name, overrides: Overrides = None) -> None:
    """Print a config of NeMo's or LDM's as one of ours: our keys, nothing that is at its default.

    \b
    Examples:
      latentsmith config migrate sd_train.yaml > mine.yaml
      latentsmith config migrate v2-inference-v.yaml model.data.train.dataset_path=shards > mine.yaml
    """
    from latentsmith.config import compose
    from latentsmith.config.explain import migrated

    typer.echo(migrated(compose(config, overrides or []), config))


@app.command()
def diff(first: Name, second: Name) -> None:
    """Print the options in which two configs differ.

    \b
    Examples:
      latentsmith config diff sd1 sd2_base
    """
    from latentsmith.config import compose
    from latentsmith.config.explain import diff as describe

    for line in describe(compose(first).config, compose(second).config):
        typer.echo(line)
