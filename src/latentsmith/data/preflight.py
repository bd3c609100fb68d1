"""Describe a training set before its training."""

import json

from latentsmith.text.tokenizer import Tokenizer
from latentsmith.units import BYTES, scaled

from .buckets import BucketOrder, listing
from .dataset import TrainingSet
from .sample_io import caption_of
from .shards import ShardSet
from .synthetic import SyntheticSet

CAPTIONS_CHECKED = 1000  # whose lengths are counted before training


def preflight(samples: TrainingSet, tokenizer: Tokenizer | None, steps: int, batch: int) -> list[str]:
    """Return lines that describe a set before its training. tokenizer: None where captions are not read as text."""
    lines = [f"{summary(samples)}; {steps:,} steps of {batch}: {steps * batch / samples.count:.1f} epochs"]
    lines += repeated_in_a_step(samples.count, batch)
    if samples.sizes and isinstance(samples.order, BucketOrder):
        lines += listing(samples.sizes, samples.order.counts, batch)
    if tokenizer is not None and isinstance(samples.shards, ShardSet):
        lines += long_captions(samples.shards, tokenizer)
    return lines


def repeated_in_a_step(count: int, batch: int) -> list[str]:
    """Return a line on a step of more samples than the set has; none for others."""
    if batch <= count:
        return []
    return [f"a step of {batch:,} has each of the {count:,} samples {batch / count:.1f} times: lower the batch size"]


def summary(samples: TrainingSet) -> str:
    """Return one line on size and content of a set."""
    if isinstance(samples.shards, SyntheticSet):
        return f"{len(samples.shards):,} samples of noise, latents {json.dumps(samples.latent_shape)}"
    content = "cached latents" if samples.transforms is None else "images"
    if samples.sizes:
        content += " of several sizes"
    elif samples.transforms is None:
        content += f" {json.dumps(samples.latent_shape)}"
    size = scaled(samples.shards.bytes, BYTES, 1024)
    return f"{samples.count:,} samples in {len(samples.shards.paths)} shards ({size}), {content}"


def long_captions(shards: ShardSet, tokenizer: Tokenizer) -> list[str]:
    """Return a line on captions longer than the text encoder reads, estimated from some of them; none if all fit."""
    checked = min(CAPTIONS_CHECKED, len(shards))
    long = 0
    for number in range(checked):
        caption = caption_of(shards[number * len(shards) // checked])
        long += bool(tokenizer([caption], return_cut=True)[1][0])
    share = f"{long:,} of {checked:,} captions" + (" looked at" if checked < len(shards) else "")
    return [f"{share} have more than {tokenizer.max_length} tokens: their ends are not seen"] if long else []
