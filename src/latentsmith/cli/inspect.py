"""`latentsmith inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from .convert import Weights


def inspect(
    path: Annotated[str, typer.Argument(help="Checkpoint, shard, set, cache or run folder; sets also at s3://...")],
    weights: Annotated[Weights, typer.Option(help="The average or the trained weights, where both are there.")] = (
        Weights.ema
    ),
    verify: Annotated[bool, typer.Option("--verify", help="Read everything and compare it with its hashes.")] = False,
) -> int:
    """Say what is in a checkpoint, a set of shards, a cache or a run folder; exit code 1 if --verify finds damage.

    \b
    Examples:
      latentsmith inspect v1-5-pruned.ckpt
      latentsmith inspect cache --verify
      latentsmith inspect runs/sd1
    """
    from latentsmith.checkpoints.inspect import inspect as run

    return 1 if run(path, weights=weights.value, verify=verify) else 0
