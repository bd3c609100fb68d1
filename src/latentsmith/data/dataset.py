"""Open what training reads: images or cached moments, captions or cached embeddings, or noise in their place."""

import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from latentsmith.checkpoints.from_config import is_encoded
from latentsmith.config import Config
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_text
from latentsmith.progress import progress
from latentsmith.text.tokenizer import Tokenizer

from .buckets import LEFT_OUT, BucketOrder, MixedBuckets
from .captions import CaptionRules
from .config_caches import (
    cached_sizes,
    check_foreign,
    expected_fingerprints,
    open_caches,
)
from .config_sizes import (
    image_size,
    latent_shape,
    min_or_max_size,
    open_transforms,
)
from .foreign_cache import ForeignCache
from .image_sizes import image_sizes
from .latent_cache import CAPTION_KEY, IMAGE_KEY, LatentCache
from .loader import Shape
from .mirrors import MirrorCache
from .shards import ShardSet
from .shuffle import Mixture, shuffled_index
from .sources import read_wdinfo
from .storage import is_remote, leads_out
from .synthetic import SyntheticSet
from .transforms import Transforms


@dataclass(frozen=True)
class Sets:
    """What a run does with the samples of each of its sets.

    ends: the number after the last sample of each. captions: the rules of each. loss_weights: None where all are 1.
    """

    ends: tuple[int, ...]
    captions: tuple[CaptionRules, ...]
    loss_weights: tuple[float, ...] | None = None

    def number(self, index: int) -> int:
        """Return which set a sample is of."""
        return bisect_right(self.ends, index)


@dataclass(frozen=True)
class TrainingSet:
    """The samples of a run, and what follows from them for its networks.

    cache: None where nothing is encoded. transforms: of the images, None where they are encoded.
    latent_shape: (channels, height, width) of a sample; where images have several sizes, of the squarest.
    sizes: (height, width) in pixels, where there are several. order: position -> index, where it is not a shuffle of
    all samples. pad_to: the length to which the cached text embeddings were filled up, where the config does not say
    it: the caller has to set model.cond_stage_config.pad_to to it. sets: what differs between the sets of a list.
    """

    shards: "ShardSet | SyntheticSet"
    cache: LatentCache | None
    transforms: Transforms | None
    latent_shape: Shape
    sizes: Sequence[tuple[int, int]] = ()
    order: BucketOrder | Mixture | None = None
    pad_to: int | None = None
    sets: Sets | None = None

    def index(self, position: int, seed: int) -> int:
        """Return the index of the sample at a position of a run."""
        return self.order(position) if self.order else shuffled_index(seed, position, len(self.shards))

    def fingerprint(self) -> str | None:
        """Name the samples and what is done to their images; None for noise."""
        if isinstance(self.shards, SyntheticSet):
            return None
        transforms = self.transforms.describe() if self.transforms else None
        return fingerprint_text(json.dumps([self.shards.fingerprint(), transforms]))

    @property
    def count(self) -> int:
        """Return samples that training draws from."""
        return len(self.order) if isinstance(self.order, BucketOrder) else len(self.shards)


def open_dataset(
    config: Config,
    networks: Mapping[str, nn.Module],
    tokenizer: Tokenizer | None,
    split: str = "train",
    *,
    global_batch: int = 1,
) -> TrainingSet:
    """Open the set of model.data.train (or `split`), and check that it is what stage keys and networks need.

    networks: those whose weights are known, by name; a cache has to be made by them. global_batch: samples of one
    optimizer step of the training, which have one size where the set has aspect buckets.
    Raises BadInput for raw images where encodings are wanted, and the reverse; for encodings of other shapes than the
    U-Net takes, or made by another VAE, text encoder or tokenizer than the config's.
    """
    model = config.model
    encoded = {IMAGE_KEY: is_encoded(model.first_stage_key), CAPTION_KEY: is_encoded(model.cond_stage_key)}
    if model.data.synthetic_data and split == "train":
        synthetic = SyntheticSet.from_config(config, encoded)
        return TrainingSet(synthetic, None, None, synthetic.latent_shape)
    shards = open_shards(config, split)
    is_cache = any(shard.parent.joinpath("cache.json").is_file() for shard in shards.paths[:1])
    pad_to, cache = None, None
    if is_cache:
        made_by = expected_fingerprints(config, encoded, networks, tokenizer, split)
        cache = open_caches(config, shards, encoded, made_by, split)
    elif any(encoded.values()) and ForeignCache.reads(shards):
        cache = ForeignCache(shards)
        pad_to = check_foreign(config, cache, encoded)
    elif any(encoded.values()):
        raise BadInput(
            f"{getattr(model.data, split).dataset_path}: not a latent cache, and the stage keys ask for encodings; run "
            "`latentsmith precache`, or set model.first_stage_key=images model.cond_stage_key=captions"
        )
    if encoded[IMAGE_KEY]:
        assert cache is not None
        transforms, (numbers, sizes, size) = None, cached_sizes(config, cache)
    else:
        transforms = open_transforms(config, split)
        sizes = list(transforms.buckets.sizes) if transforms.buckets else []
        size = image_size(transforms)
        numbers = transforms.buckets.numbers_of(heights_and_widths(shards)) if transforms.buckets else None
    if sizes and model.inductor:
        raise BadInput(
            "model.inductor=True compiles for one size, and aspect_buckets have several; leave out one of them"
        )
    for bucket in sizes:
        latent_shape(config, bucket)  # raises BadInput for one that the VAE does not divide
    order = sample_order(config, shards, numbers, global_batch) if split == "train" else None
    return TrainingSet(
        shards, cache, transforms, latent_shape(config, size), sizes, order, pad_to, open_sets(config, split)
    )


def open_images(config: Config) -> TrainingSet:
    """Open model.data.train as images of one size, without captions, to train an autoencoder on."""
    shards, transforms = open_shards(config), open_transforms(config)
    if min_or_max_size(config) is not None:
        raise BadInput("model.data.train.filterings: not of train-vae; `data import --min-size` leaves images out")
    if transforms.size is None:
        raise BadInput("model.data.train.augmentations.aspect_buckets: an autoencoder is trained on crops of one size")
    return TrainingSet(shards, None, transforms, latent_shape(config, transforms.size), order=open_mixture(config))


def open_shards(config: Config, split: str = "train") -> ShardSet:
    """Open the shards of model.data.train or model.data.validation."""
    path = getattr(config.model.data, split).dataset_path
    if not path:
        raise BadInput(
            f"model.data.{split}.dataset_path is not set; give the folder that `latentsmith data import` made"
        )
    return ShardSet([tar for one in as_list(path) for tar in tars_of(config, one)], mirror_cache(config))


def tars_of(config: Config, path: str) -> list[str]:
    """Return the tars or folder that a dataset_path names; relative ones start from webdataset.local_root_path.

    Without it the tars that a wdinfo.pkl lists lie beside it, as in `data import`.
    """
    root = config.model.data.webdataset.local_root_path or ""
    if not path.endswith(".pkl"):
        return [path if is_remote(path) else os.path.join(root, path)]
    tars, root = read_wdinfo(Path(path)), root or os.path.dirname(path)
    if outside := [tar for tar in tars if is_remote(tar) or leads_out(tar)]:
        raise BadInput(f"{path}: lists {outside[0]!r}, which is not in its folder; give it in dataset_path")
    return [os.path.join(root, tar) for tar in tars]


def mirror_cache(config: Config) -> MirrorCache:
    """Return the cache of remote sets that model.data.remote describes."""
    remote, default = config.model.data.remote, MirrorCache.default()
    return MirrorCache(Path(remote.cache_dir) if remote.cache_dir else default.folder, int(remote.cache_gib * 2**30))


def open_mixture(config: Config) -> Mixture | None:
    """Return the order of a training set mixed by its weights or repeats; None where it is a shuffle of all."""
    train = config.model.data.train
    if train.weights is None and train.repeats is None:
        return None
    key = "weights" if train.repeats is None else "repeats"
    if isinstance(train.dataset_path, str):
        raise BadInput(f"model.data.train.{key} mixes the sets of a list; give model.data.train.dataset_path=[...] too")
    lengths = lengths_of_sets(config)
    with blaming(f"model.data.train.{key}"):
        return Mixture(lengths, train.weights or by_repeats(train.repeats or (), lengths), config.model.seed)


def lengths_of_sets(config: Config) -> tuple[int, ...]:
    """Return the samples of each set of model.data.train.dataset_path."""
    mirrors = mirror_cache(config)
    paths = as_list(config.model.data.train.dataset_path)
    return tuple(len(ShardSet(tars_of(config, path), mirrors)) for path in paths)


def by_repeats(repeats: Sequence[int], lengths: Sequence[int]) -> tuple[float, ...]:
    """Return the weights of sets whose samples are sampled so many times each. Raises BadInput for a wrong count."""
    if len(repeats) != len(lengths):
        raise BadInput(f"{list(repeats)} for {len(lengths)} sets: give each one number")
    return tuple(float(times * length) for times, length in zip(repeats, lengths, strict=True))


def open_sets(config: Config, split: str) -> Sets | None:
    """Return what the config does with captions and losses of each set; None where it is nothing.

    Raises BadInput for lists of other lengths than dataset_path. In validation nothing is random or weighted.
    """
    train, given = config.model.data.train, config.model.data.train.captions
    prompts = given.prompt if isinstance(given.prompt, tuple) else (given.prompt,)
    rules = [
        CaptionRules(
            prompt,
            given.prefix,
            given.suffix,
            given.wildcards,
            given.shuffle_tags,
            given.keep_tags,
            given.tag_dropout,
            given.separator,
        )
        for prompt in prompts
    ]
    if train.loss_weights is None and rules == [CaptionRules()]:
        return None
    if split != "train":
        return Sets((), (rules[0].unchanging,))
    lengths = lengths_of_sets(config)
    for key, found in {"captions.prompt": prompts, "loss_weights": train.loss_weights or lengths}.items():
        if len(found) != len(lengths) and not (key == "captions.prompt" and len(found) == 1):
            raise BadInput(f"model.data.train.{key} has {len(found)} entries for {len(lengths)} sets of dataset_path")
    every = tuple(rules * len(lengths) if len(rules) == 1 else rules)
    return Sets(tuple(accumulate(lengths))[:-1], every, train.loss_weights)


def sample_order(
    config: Config, shards: ShardSet, numbers: np.ndarray | None, global_batch: int
) -> BucketOrder | Mixture | None:
    """Return which sample comes when: by buckets (their `numbers`), without filtered ones, or mixed by weights."""
    train, seed, limit = config.model.data.train, config.model.seed, min_or_max_size(config)
    if limit is not None:
        sizes = heights_and_widths(shards)
        smaller = train.filterings.resolution.method == "smaller"
        kept = np.all(sizes <= limit if smaller else sizes >= limit, axis=1)
        numbers = np.where(kept, np.uint8(0) if numbers is None else numbers, np.uint8(LEFT_OUT))
        print(f"filterings: {int(kept.sum()):,} of {len(kept):,} samples are taken")
    mixture = open_mixture(config)
    if numbers is None:
        return mixture
    if mixture is not None:
        with blaming("model.data.train.weights"):
            return MixedBuckets(numbers, seed, global_batch, mixture.lengths, mixture.weights)
    return BucketOrder(numbers, seed, global_batch)


def heights_and_widths(shards: ShardSet) -> np.ndarray:
    with progress("reading sizes", "images") as bar:
        return image_sizes(shards, bar)


@contextmanager
def blaming(key: str) -> Iterator[None]:
    """Put the key of the config that is to blame before the message of a BadInput."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{key}: {error}") from None


def as_list(paths: Any) -> list[str]:
    return [paths] if isinstance(paths, str) else list(paths)
