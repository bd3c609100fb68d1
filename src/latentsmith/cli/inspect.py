"""`latentsmith inspect`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from latentsmith.files.errors import BadInput

from .convert import Weights

Describe = Callable[[Path], Iterable[str]]  # yields lines
Verify = Callable[[Path], tuple[str, list[str]]]  # returns what was checked, and a line for each fault


def inspect(
    path: Annotated[str, typer.Argument(help="Checkpoint, shard, set, cache or run folder; sets also at s3://...")],
    weights: Annotated[Weights, typer.Option(help="The average or the trained weights, where both are there.")] = (
        Weights.ema
    ),
    verify: Annotated[bool, typer.Option("--verify", help="Read everything and compare it with its hashes.")] = False,
    model: Annotated[
        Path | None, typer.Option(help="The model of an adapter, where that has sizes of its own.")
    ] = None,
) -> int:
    """Say what is in a checkpoint, an adapter, a set of shards, a cache or a run folder.

    The exit code is 1 if --verify finds damage.

    --verify compares shards with the checksums of set.json and a run's checkpoints with those of state.json; in any
    other checkpoint it looks for values that are not finite.

    \b
    Examples:
      latentsmith inspect v1-5-pruned.ckpt
      latentsmith inspect cache --verify
      latentsmith inspect runs/sd1
    """
    from latentsmith.data.mirrors import MirrorCache
    from latentsmith.data.storage import is_remote

    if is_remote(path):
        if verify:
            raise BadInput(f"{path}: --verify reads everything; run it where the files lie")
        print(path)
    local = MirrorCache.default().mirror(path) if is_remote(path) else Path(path)
    describe, check = _functions_for(local, weights.value, model)
    for line in describe(local):
        print(line)
    if not verify:
        return 0
    checked, damaged = check(local)
    for line in damaged:
        print(f"damaged: {line}")
    print(f"verified: {checked}" if not damaged else f"verified: {checked}, {len(damaged)} damaged")
    return 1 if damaged else 0


def _functions_for(path: Path, weights: str, model: Path | None) -> tuple[Describe, Verify]:
    """Return the function that describes what is at `path` and the one that verifies it."""
    from latentsmith.adapters.convert import is_adapter
    from latentsmith.adapters.inspect import inspect_adapter, verify_adapter
    from latentsmith.checkpoints.inspect import inspect_checkpoint, verify_checkpoint
    from latentsmith.data.inspect import inspect_shards, is_shards, verify_shards
    from latentsmith.training.inspect import inspect_run, is_run, verify_run

    if is_shards(path):
        return inspect_shards, verify_shards
    if is_run(path):
        return inspect_run, verify_run
    if is_adapter(path):
        return partial(inspect_adapter, model=model), partial(verify_adapter, model=model)
    return partial(inspect_checkpoint, weights=weights), partial(verify_checkpoint, weights=weights)
