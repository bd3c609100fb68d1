"""`latentsmith train` and `latentsmith train-vae`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Config, Overrides, config_and_overrides, load

Init = Annotated[str | None, typer.Option("--init", help="Checkpoint to start from; the same as model.ckpt_path=FILE.")]
Resume = Annotated[
    Path | None, typer.Option("--resume", metavar="RUN", help="Continue a run folder from its newest checkpoint.")
]
MultiRun = Annotated[bool, typer.Option("--multirun", "-m", help="A run for each of key=a,b, one after the other.")]
Replay = Annotated[
    Path | None, typer.Option("--replay", help="Run the samples of a skipped step again: a file of nonfinite/.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print sizes, train nothing.")]


def train(
    config: Config = None,
    overrides: Overrides = None,
    init: Init = None,
    multirun: MultiRun = False,
    dry_run: DryRun = False,
    resume: Resume = None,
    replay: Replay = None,
) -> int:
    """Train or fine-tune a latent diffusion model.

    \b
    Examples:
      latentsmith train --config sd1 model.data.train.dataset_path=shards
      latentsmith train --config sd1 model.data.train.dataset_path=cache \\
          model.first_stage_key=image_encoded model.cond_stage_key=captions_encoded
      latentsmith train --config my.yaml trainer.precision=bf16 model.unet_config.use_checkpoint=True
      latentsmith train --config sd1 --init v1-5-pruned.safetensors model.optim.lr=1e-5
      latentsmith train --config sd2_v --init sd2-base.safetensors model.data.train.dataset_path=shards --dry-run
      latentsmith train --resume runs/sd1 trainer.max_steps=600000
      latentsmith train --config demo --multirun model.optim.lr=1e-3,3e-4 model.seed=0,1
      latentsmith train --replay runs/sd1/nonfinite/step-00001234.json
    """
    if replay is not None:
        from latentsmith.training.replay import config_file
        from latentsmith.training.replay import replay as run_again

        return 0 if run_again(replay, load(config or str(config_file(replay)), overrides)) else 1
    name, arguments = config_and_overrides(config, overrides, resume)
    arguments = _with_init(arguments, init)
    configs = [load(name, changes) for changes in (_sweep(name, arguments) if multirun else [arguments])]
    from latentsmith.training.train import train as run

    for loaded in configs:
        if multirun:
            print(f"{loaded.exp_manager.name}:", flush=True)
        run(loaded, dry_run=dry_run)
    return 0


def _sweep(config: str, arguments: list[str]) -> list[list[str]]:
    """Return the overrides of each run, with a name of its own made of what differs."""
    from latentsmith.config import overrides as grammar

    runs = grammar.sweep(arguments)
    varied = [index for index in range(len(arguments)) if len({run[index] for run in runs}) > 1]
    named = []
    for run in runs:
        pairs = [run[index].partition("=") for index in varied]
        parts = [f"{key.rpartition('.')[2]}{value}".replace("/", "-") for key, _, value in pairs]
        name = load(config, run).exp_manager.name
        named.append([*run, f"exp_manager.name={'-'.join([name, *parts])}"])
    return named


def train_vae(config: Config = None, overrides: Overrides = None, init: Init = None, dry_run: DryRun = False) -> None:
    """Train the VAE (model.first_stage_config) on images.

    \b
    Examples:
      latentsmith train-vae --config demo_vae model.data.train.dataset_path=scenes
      latentsmith train-vae --config demo_vae --init runs/demo_vae trainer.max_steps=40000
    """
    loaded = load(config, _with_init(overrides, init))
    from latentsmith.training.train_vae import train_vae as run

    run(loaded, dry_run=dry_run)


def _with_init(overrides: list[str] | None, init: str | None) -> list[str]:
    return [*(overrides or []), *([f"model.ckpt_path={init}"] if init else [])]
