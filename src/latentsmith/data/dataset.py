"""What training reads: pictures or cached moments, captions or cached embeddings."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from latentsmith.checkpoints.from_config import is_encoded
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_tensors
from latentsmith.progress import progress
from latentsmith.text.tokenizer import Tokenizer
from latentsmith.training import setup
from latentsmith.training.random_draws import CROPS
from latentsmith.training.samples import Reader, Record, one_by_one
from latentsmith.units import BYTES, scaled

from .buckets import LEFT_OUT, BucketOrder, MixedBuckets, listing
from .foreign_cache import ForeignCache
from .image_sizes import image_sizes
from .latent_cache import CAPTION_KEY, IMAGE_KEY, JoinedCaches, LatentCache, Rows
from .mixture import Mixture
from .sample_io import caption_of, image_member, named
from .shards import Sample, Shard, ShardSet
from .shuffle import integer_below, sample_seed, shuffled_index
from .synthetic import Synthetic, synthetic_set
from .transforms import Transforms

LOOKED_AT = 1000  # captions whose lengths are counted before training


@dataclass(frozen=True)
class TrainingSet:
    """The samples of a run. cache: None where nothing is encoded. latent_shape: (channels, height, width) of a sample,
    or of a square one where there are buckets of other sizes, in pixels `sizes`. order: which sample comes when, where
    it is not a shuffle of all."""

    shards: ShardSet | Synthetic
    cache: LatentCache | None
    transforms: Transforms | None
    latent_shape: tuple[int, int, int]
    sizes: Sequence[tuple[int, int]] = ()
    order: BucketOrder | Mixture | None = None

    def index(self, position: int, seed: int) -> int:
        """Which sample comes at a position of a run."""
        return self.order(position) if self.order else shuffled_index(seed, position, len(self.shards))

    @property
    def count(self) -> int:
        """Samples that training draws from."""
        return len(self.order) if isinstance(self.order, BucketOrder) else len(self.shards)


def open_set(
    config: DictConfig, networks: Mapping[str, nn.Module], words: Tokenizer | None, data: str = "train"
) -> TrainingSet:
    """Open the set of model.data.train (or `data`) and check that it is what stage keys and networks need.

    Raises BadInput for raw pictures where encodings are wanted, and the reverse; for encodings of other shapes than
    the U-Net takes, or made by another VAE, text encoder or tokenizer than the config's.
    """
    model = config.model
    encoded = {IMAGE_KEY: is_encoded(model.first_stage_key), CAPTION_KEY: is_encoded(model.cond_stage_key)}
    if model.data.synthetic_data and data == "train":
        random = synthetic_set(config, encoded)
        return TrainingSet(random, None, None, random.latent_shape)
    shards = setup.shard_set(config, data)
    is_cache = any(shard.parent.joinpath("cache.json").is_file() for shard in shards.paths[:1])
    if any(encoded.values()) and not is_cache and ForeignCache.reads(shards):
        return foreign_set(config, ForeignCache(shards), encoded, data)
    if any(encoded.values()) and not is_cache:
        raise BadInput(
            f"{model.data[data].dataset_path}: not a latent cache, and the stage keys ask for encodings; run "
            "`latentsmith precache`, or set model.first_stage_key=images model.cond_stage_key=captions"
        )
    folders = dict.fromkeys(shard.parent for shard in shards.paths)
    caches = [LatentCache(folder) for folder in folders] if is_cache else []
    if caches:
        made_by = wanted_fingerprints(config, encoded, networks, words, data)
    for one in caches:
        check_members(config, one, encoded)
        one.check(made_by)
    names = [name for name, wanted in encoded.items() if wanted]
    cache = JoinedCaches(caches, shards, names) if len(caches) > 1 else caches[0] if caches else None
    whole = data == "train" and caches and "buckets" in caches[0].info
    if whole and shards.paths != [path for one in caches for path in one.shards.paths]:
        raise BadInput(f"{caches[0].folder}: a cache with buckets is taken whole: give its folder, and once")
    return readable(config, shards, cache, encoded, data)


def readable(
    config: DictConfig, shards: ShardSet, cache: LatentCache | None, encoded: Mapping[str, bool], data: str
) -> TrainingSet:
    """The set, with the transforms of its pictures if it has some, and the size of its latents."""
    if encoded[IMAGE_KEY]:
        assert cache is not None
        found, transforms = cache.buckets(), None
        numbers, sizes = found or (None, [])
        shape = tuple(cache.info["members"][IMAGE_KEY]["shape"][1:])
        if found is None and None in shape:
            raise BadInput(f"{cache.folder}: pictures of several sizes, and no buckets of them; precache again")
        size = setup.square_of(sizes) if found else tuple(side * setup.factor(config) for side in shape)
    else:
        transforms = setup.transforms(config, data)
        sizes = list(transforms.buckets.sizes) if transforms.buckets else []
        size = setup.picture_size(transforms)
        numbers = transforms.buckets.numbers_of(heights_and_widths(shards)) if transforms.buckets else None
    latents = setup.latent_shape(config, size)
    for one in sizes:
        setup.latent_shape(config, one)
    if sizes and config.model.inductor:
        raise BadInput(
            "model.inductor=True compiles for one size, and aspect_buckets have several; leave out one of them"
        )
    order = order_of(config, shards, numbers) if data == "train" else None
    return TrainingSet(shards, cache, transforms, latents, sizes, order)


def order_of(config: DictConfig, shards: ShardSet, numbers: np.ndarray | None) -> BucketOrder | Mixture | None:
    """Which sample comes when: by buckets (their `numbers`), without what filterings leave out, or mixed by weights."""
    model, wanted = config.model, setup.filtered_by(config)
    if wanted is not None:
        sizes = heights_and_widths(shards)
        smaller = model.data.train.filterings.resolution.get("method") == "smaller"
        kept = np.all(sizes <= wanted if smaller else sizes >= wanted, axis=1)
        numbers = np.where(kept, np.uint8(0) if numbers is None else numbers, np.uint8(LEFT_OUT))
        print(f"filterings: {int(kept.sum()):,} of {len(kept):,} samples are taken")
    mixed = setup.mixture(config)
    if numbers is None:
        return mixed
    batch = setup.global_batch(config, setup.process_count(config))
    if mixed is not None:
        with setup.of_key("model.data.train.weights"):
            return MixedBuckets(numbers, model.seed, batch, mixed.lengths, mixed.weights)
    return BucketOrder(numbers, model.seed, batch)


def heights_and_widths(shards: ShardSet) -> np.ndarray:
    with progress("reading sizes", "pictures") as tell:
        return image_sizes(shards, tell)


def foreign_set(config: DictConfig, cache: ForeignCache, encoded: Mapping[str, bool], data: str) -> TrainingSet:
    """Encodings of NeMo's or MLPerf's, which the user must vouch for: nothing says what made them."""
    model = config.model
    if not model.data.accept_unfingerprinted:
        raise BadInput(
            f"{cache.folder}: encodings that do not say what made them; if it was this VAE, text encoder and size, set "
            "model.data.accept_unfingerprinted=true"
        )
    check_members(config, cache, encoded)
    if encoded[CAPTION_KEY] and model.caption_dropout_rate:
        raise BadInput(
            f"{cache.folder}: holds no embedding of the empty prompt, which model.caption_dropout_rate needs; use "
            "model.text_embedding_dropout_rate as NeMo does, or precache again"
        )
    length = cache.info["members"].get(CAPTION_KEY, {}).get("shape", [0])[0]
    if encoded[CAPTION_KEY] and length > model.cond_stage_config.max_length and not model.cond_stage_config.pad_to:
        OmegaConf.update(config, "model.cond_stage_config.pad_to", length, force_add=True)
        print(f"{cache.folder}: text embeddings filled up to {length}, so the model will be sampled so (pad_to)")
    return readable(config, cache.shards, cache, encoded, data)


def check_members(config: DictConfig, cache: LatentCache, encoded: Mapping[str, bool]) -> None:
    """Refuse a cache that lacks what the stage keys want, or does not fit the U-Net."""
    for name, wanted in encoded.items():
        if wanted and name not in cache.encoded:
            raise BadInput(f"{cache.folder}: holds no {name}, only {', '.join(cache.encoded)}")
        if not wanted and name == IMAGE_KEY and IMAGE_KEY in cache.encoded:
            raise BadInput(f"{cache.folder}: a latent cache holds no pictures; set model.first_stage_key=image_encoded")
    unet = config.model.unet_config
    cache.check_shapes(unet.in_channels, unet.context_dim if encoded[CAPTION_KEY] else None)


def wanted_fingerprints(
    config: DictConfig,
    encoded: Mapping[str, bool],
    networks: Mapping[str, nn.Module],
    words: Tokenizer | None,
    data: str,
) -> dict[str, Any]:
    """What has to have made a cache; None for what the config does not say."""
    text = encoded[CAPTION_KEY] and "text_encoder" in networks
    pictures = encoded[IMAGE_KEY]
    return {
        "vae": fingerprint(networks["vae"]) if pictures and "vae" in networks else None,
        "text_encoder": fingerprint(networks["text_encoder"]) if text else None,
        "layer": layer_of(config) if text else None,
        "tokenizer": words.fingerprint() if text and words else None,
        "transforms": stated_transforms(config, data) if pictures else None,
    }


def fingerprint(network: nn.Module) -> str:
    return fingerprint_tensors(network.state_dict())


def layer_of(config: DictConfig) -> str:
    """Return what a cache records of the text encoder's output: the layer, and padding if there is any."""
    node = config.model.cond_stage_config
    return node.layer + (f", padded to {node.pad_to}" if node.pad_to else "")


def stated_transforms(config: DictConfig, data: str) -> Any:
    """The transforms of a set of the config, if it states any."""
    stated = config.model.data[data].get("augmentations") or config.model.data.train.augmentations
    return setup.transforms(config, data).describe() if stated else None


def reader(samples: TrainingSet, seed: int, words: Tokenizer | None) -> Reader:
    """The function (indices, positions) -> what training needs of those samples, stacked.

    `images` (batch, 3, height, width) in [-1, 1] or `moments`; `context` (batch, length, context_dim) or `token_ids`
    (batch, length); their `keys`. words: the tokenizer, None where the captions' embeddings are cached.
    """
    shards, cache, transforms = samples.shards, samples.cache, samples.transforms
    if isinstance(shards, Synthetic):
        return one_by_one(lambda index, position: shards.read(index, words))
    encoded = {IMAGE_KEY: "vae_latents" if cache and cache.holds_means else "moments"} if transforms is None else {}
    encoded |= {CAPTION_KEY: "context"} if words is None else {}
    several_kept = cache is not None and cache.variants > 1

    def read(indices: Sequence[int], positions: Sequence[int]) -> Record:
        batch: Record = {"keys": []}
        pictures, captions, rows = [], [], Rows(cache, len(indices), list(encoded)) if cache and encoded else None
        for index, position in zip(indices, positions, strict=True):
            shard, inside = shards.place(index)
            sample = shard[inside] if transforms is not None or words is not None else None
            drawn = sample_seed(seed, position, CROPS) if several_kept or transforms is not None else 0
            batch["keys"].append(shard.key(inside))
            if rows is not None:
                variant = integer_below(rows.cache.variants, drawn) if several_kept else 0
                rows.read(shard, inside, sample, variant)
            if sample is not None and transforms is not None:
                pictures.append(picture_of(shard, sample, transforms, drawn))
            if sample is not None and words is not None:
                captions.append(caption_of(shard, sample))
        if rows is not None:
            batch |= {encoded[name]: torch.from_numpy(array) for name, array in rows.arrays.items()}
        if transforms is not None:
            batch["images"] = torch.stack(pictures)
        if words is not None:
            batch["token_ids"] = words(captions)
        if samples.sizes:
            batch["latent_shape"] = latent_shape_of(batch, samples)
        return batch

    return read


def picture_of(shard: Shard, sample: Sample, transforms: Transforms, seed: int) -> torch.Tensor:
    """(3, height, width) in [-1, 1]: a sample's picture, transformed by the draws of a seed."""
    with named(shard, sample):
        return torch.from_numpy(transforms.decode(image_member(sample)[1], seed))


def preflight(samples: TrainingSet, words: Tokenizer | None, steps: int, batch: int) -> list[str]:
    """What there is to know of a set before its training, in lines. words: where captions are read as text."""
    lines = [f"{summary(samples)}; {steps:,} steps of {batch}: {steps * batch / samples.count:.1f} epochs"]
    if samples.sizes and isinstance(samples.order, BucketOrder):
        lines += listing(samples.sizes, samples.order.counts, batch)
    if words is not None and not isinstance(samples.shards, Synthetic):
        lines += long_captions(samples.shards, words)
    return lines


def long_captions(shards: ShardSet, words: Tokenizer) -> list[str]:
    """Return a line on captions longer than the text encoder reads, estimated from some of them; none if all fit."""
    looked_at = min(LOOKED_AT, len(shards))
    long = 0
    for number in range(looked_at):
        shard, inside = shards.place(number * len(shards) // looked_at)
        long += bool(words([caption_of(shard, shard[inside])], return_cut=True)[1][0])
    share = f"{long:,} of {looked_at:,} captions" + (" looked at" if looked_at < len(shards) else "")
    return [f"{share} have more than {words.max_length} tokens: their ends are not seen"] if long else []


def latent_shape_of(batch: Mapping[str, Any], samples: TrainingSet) -> tuple[int, int, int]:
    """(channels, height, width) of the latents of a batch of one size out of several."""
    channels, side, _ = samples.latent_shape
    factor = setup.square_of(samples.sizes)[0] // side if "images" in batch else 1
    height, width = next(batch[name] for name in ("moments", "vae_latents", "images") if name in batch).shape[2:]
    return (channels, height // factor, width // factor)


def summary(samples: TrainingSet) -> str:
    """One line for the header of a run."""
    if isinstance(samples.shards, Synthetic):
        return f"{len(samples.shards):,} samples of noise, latents {json.dumps(samples.latent_shape)}"
    kind = "cached latents" if samples.transforms is None else "pictures"
    if samples.sizes:
        kind += " of several sizes"
    elif samples.transforms is None:
        kind += f" {json.dumps(samples.latent_shape)}"
    size = scaled(samples.shards.bytes, BYTES, 1024)
    return f"{samples.count:,} samples in {len(samples.shards.paths)} shards ({size}), {kind}"
