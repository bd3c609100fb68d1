"""Read batches of a training set: images or cached moments, token ids or cached embeddings."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from latentsmith.text.tokenizer import Tokenizer

from .config_sizes import squarest
from .dataset import TrainingSet
from .latent_cache import CAPTION_KEY, IMAGE_KEY
from .loader import Reader, Record, Shape, collate, collated
from .sample_io import blaming_sample, caption_of, image_member
from .shards import Sample
from .shuffle import CAPTIONS, CROPS, integer_below, sample_seed
from .synthetic import SyntheticSet
from .transforms import Transforms


def reader(samples: TrainingSet, seed: int, tokenizer: Tokenizer | None) -> Reader:
    """Return the function (indices, positions) -> what training needs of those samples, stacked.

    tokenizer: None where captions are not read as text. The batch has `keys`, and of these what the set gives:
    `images` (batch, 3, height, width) in [-1, 1], or `moments` (`vae_latents` of a cache of means); `token_ids` (batch,
    length), or `context` (batch, length, context_dim); `loss_weight` (batch,) where sets have weights of their own.
    """
    shards, cache, transforms, sets = samples.shards, samples.cache, samples.transforms, samples.sets
    if isinstance(shards, SyntheticSet):
        return collated(lambda index, position: shards.read(index, tokenizer))
    is_random = transforms is not None or (cache is not None and cache.variants > 1)
    names = {}  # of the cache's members, in the batch
    if cache is not None and transforms is None:
        names[IMAGE_KEY] = "vae_latents" if cache.holds_means else "moments"
    if cache is not None and tokenizer is None:
        names[CAPTION_KEY] = "context"

    def read_sample(index: int, position: int) -> Record:
        sample = shards[index]
        record: Record = {"keys": sample.key}
        crop_seed = sample_seed(seed, position, CROPS) if is_random else 0
        if cache is not None:
            variant = integer_below(cache.variants, crop_seed)
            arrays = cache.encodings(sample, list(names), variant)
            record |= {names[name]: array for name, array in arrays.items()}
        if transforms is not None:
            record["images"] = transformed_image(sample, transforms, crop_seed)
        if tokenizer is not None:
            caption = caption_of(sample)
            if sets is not None:
                caption = sets.captions[sets.number(index)](caption, sample_seed(seed, position, CAPTIONS))
            record["token_ids"] = tokenizer([caption])[0]
        if sets is not None and sets.loss_weights is not None:
            record["loss_weight"] = torch.tensor(sets.loss_weights[sets.number(index)])
        return record

    def read(indices: Sequence[int], positions: Sequence[int]) -> Record:
        batch = collate([read_sample(*pair) for pair in zip(indices, positions, strict=True)])
        return batch | {"latent_shape": latent_shape_of(batch, samples)} if samples.sizes else batch

    return read


def transformed_image(sample: Sample, transforms: Transforms, seed: int) -> np.ndarray:
    """Return the image of a sample, (3, height, width) in [-1, 1]; its crop is a function of the seed."""
    with blaming_sample(sample):
        return transforms.decode(image_member(sample)[1], seed)


def latent_shape_of(batch: Mapping[str, Any], samples: TrainingSet) -> Shape:
    """Return the shape of the latents of a batch, where a set has several sizes."""
    channels, side, _ = samples.latent_shape
    factor = squarest(samples.sizes)[0] // side if "images" in batch else 1
    height, width = next(batch[name] for name in ("moments", "vae_latents", "images") if name in batch).shape[2:]
    return channels, height // factor, width // factor
