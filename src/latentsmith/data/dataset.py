"""Open what training reads: images or cached moments, captions or cached embeddings, or noise in their place."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from latentsmith.checkpoints.from_config import is_encoded
from latentsmith.config import Config
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_tensors, fingerprint_text
from latentsmith.progress import progress
from latentsmith.text.tokenizer import Tokenizer
from latentsmith.units import BYTES, scaled

from .buckets import LEFT_OUT, BucketOrder, MixedBuckets, listing
from .foreign_cache import ForeignCache
from .image_sizes import image_sizes
from .latent_cache import CAPTION_KEY, IMAGE_KEY, JoinedCaches, LatentCache
from .loader import Reader, Record, Shape, collate, collated
from .mirrors import MirrorCache
from .sample_io import blaming_sample, caption_of, image_member
from .shards import Sample, ShardSet
from .shuffle import CROPS, Mixture, integer_below, sample_seed, shuffled_index
from .sources import read_wdinfo
from .storage import is_remote, leads_out
from .transforms import Transforms

CAPTIONS_CHECKED = 1000  # whose lengths are counted before training


@dataclass(frozen=True)
class TrainingSet:
    """The samples of a run, and what follows from them for its networks.

    cache: None where nothing is encoded. transforms: of the images, None where they are encoded.
    latent_shape: (channels, height, width) of a sample; where images have several sizes, of the squarest.
    sizes: (height, width) in pixels, where there are several. order: position -> index, where it is not a shuffle of
    all samples. pad_to: the length to which the cached text embeddings were filled up, where the config does not say
    it: the caller has to set model.cond_stage_config.pad_to to it.
    """

    shards: "ShardSet | SyntheticSet"
    cache: LatentCache | None
    transforms: Transforms | None
    latent_shape: Shape
    sizes: Sequence[tuple[int, int]] = ()
    order: BucketOrder | Mixture | None = None
    pad_to: int | None = None

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


# ---- Opening ----


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
    for one in sizes:
        latent_shape(config, one)  # raises BadInput for one that the VAE does not divide
    order = sample_order(config, shards, numbers, global_batch) if split == "train" else None
    return TrainingSet(shards, cache, transforms, latent_shape(config, size), sizes, order, pad_to)


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
    """Return the order of a training set mixed by model.data.train.weights; None where it is a shuffle of all."""
    train = config.model.data.train
    if train.weights is None:
        return None
    if isinstance(train.dataset_path, str):
        raise BadInput(
            "model.data.train.weights mixes the sets of a list; give model.data.train.dataset_path=[...] too"
        )
    mirrors = mirror_cache(config)
    lengths = [len(ShardSet(tars_of(config, one), mirrors)) for one in as_list(train.dataset_path)]
    with blaming("model.data.train.weights"):
        return Mixture(tuple(lengths), tuple(train.weights), config.model.seed)


def open_transforms(config: Config, split: str = "train") -> Transforms:
    """Return the image transforms of a set, or those of training where it states none.

    Raises BadInput if they do not make images of one size, or of aspect buckets.
    """
    transforms = Transforms(**stated_augmentations(config, split))
    if transforms.size is None and transforms.buckets is None:
        raise BadInput(
            "model.data.train.augmentations needs center_crop_h_w, random_crop_h_w or aspect_buckets: batches are of "
            "one size"
        )
    return transforms


def stated_augmentations(config: Config, split: str) -> dict[str, Any]:
    """Return the augmentations that the config states for a set, or else for training."""
    data = config.model.data
    return (getattr(data, split).augmentations or data.train.augmentations).steps()


def min_or_max_size(config: Config) -> int | None:
    """Return the pixels of model.data.train.filterings.resolution, None without."""
    stated = config.model.data.train.filterings.resolution
    if stated.method and stated.value is None:
        raise BadInput("model.data.train.filterings.resolution.method has no effect alone; give its value in pixels")
    return stated.value


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


# ---- Caches ----


def open_caches(
    config: Config, shards: ShardSet, encoded: Mapping[str, bool], made_by: Mapping[str, Any], split: str
) -> LatentCache:
    """Open the caches that the shards belong to, as one, and check them against config and fingerprints."""
    caches = [LatentCache(folder) for folder in dict.fromkeys(shard.parent for shard in shards.paths)]
    for cache in caches:
        check_members(config, cache, encoded)
        cache.check(made_by)
    is_whole = shards.paths == [path for cache in caches for path in cache.shards.paths]
    if split == "train" and "buckets" in caches[0].info and not is_whole:
        raise BadInput(f"{caches[0].folder}: a cache with buckets is taken whole: give its folder, and once")
    names = [name for name, wanted in encoded.items() if wanted]
    return JoinedCaches(caches, shards, names) if len(caches) > 1 else caches[0]


def cached_sizes(
    config: Config, cache: LatentCache
) -> tuple[np.ndarray | None, list[tuple[int, int]], tuple[int, int]]:
    """Return the bucket of each sample, the sizes of the buckets, and the one size, or the squarest, of the images."""
    if found := cache.buckets():
        return *found, squarest(found[1])
    _, height, width = cache.info["members"][IMAGE_KEY]["shape"]
    if height is None or width is None:
        raise BadInput(f"{cache.folder}: images of several sizes, and no buckets of them; precache again")
    return None, [], (height * downsampling(config), width * downsampling(config))


def check_members(config: Config, cache: LatentCache, encoded: Mapping[str, bool]) -> None:
    """Raise BadInput for a cache that lacks what the stage keys want, or does not fit the U-Net."""
    for name, wanted in encoded.items():
        if wanted and name not in cache.encoded:
            raise BadInput(f"{cache.folder}: holds no {name}, only {', '.join(cache.encoded)}")
        if not wanted and name == IMAGE_KEY and IMAGE_KEY in cache.encoded:
            raise BadInput(f"{cache.folder}: a latent cache holds no images; set model.first_stage_key=image_encoded")
    unet = config.model.unet_config
    cache.check_shapes(unet.in_channels, unet.context_dim if encoded[CAPTION_KEY] else None)


def check_foreign(config: Config, cache: ForeignCache, encoded: Mapping[str, bool]) -> int | None:
    """Check encodings of NeMo's or MLPerf's, which the user must vouch for; returns the pad_to that they imply."""
    model = config.model
    if not model.data.accept_unfingerprinted:
        raise BadInput(
            f"{cache.folder}: encodings that do not say what made them; if it was this VAE, text encoder and size, set "
            "model.data.accept_unfingerprinted=true"
        )
    check_members(config, cache, encoded)
    if not encoded[CAPTION_KEY]:
        return None
    if model.caption_dropout_rate:
        raise BadInput(
            f"{cache.folder}: holds no embedding of the empty prompt, which model.caption_dropout_rate needs; use "
            "model.text_embedding_dropout_rate as NeMo does, or precache again"
        )
    length: int = cache.info["members"][CAPTION_KEY]["shape"][0]
    if length <= model.cond_stage_config.max_length or model.cond_stage_config.pad_to:
        return None
    print(f"{cache.folder}: text embeddings filled up to {length}, so the model will be sampled so (pad_to)")
    return length


def expected_fingerprints(
    config: Config,
    encoded: Mapping[str, bool],
    networks: Mapping[str, nn.Module],
    tokenizer: Tokenizer | None,
    split: str,
) -> dict[str, Any]:
    """Return what has to have made a cache, by the names in its cache.json; None for what the config does not say."""
    images, text = encoded[IMAGE_KEY], encoded[CAPTION_KEY] and "text_encoder" in networks
    stated = images and stated_augmentations(config, split)
    return {
        "vae": fingerprint_tensors(networks["vae"].state_dict()) if images and "vae" in networks else None,
        "text_encoder": fingerprint_tensors(networks["text_encoder"].state_dict()) if text else None,
        "layer": layer_fingerprint(config) if text else None,
        "tokenizer": tokenizer.fingerprint() if text and tokenizer else None,
        "transforms": open_transforms(config, split).describe() if stated else None,
    }


def layer_fingerprint(config: Config) -> str:
    """Return what a cache records of the text encoder's output beside its weights: the layer, and the padding."""
    node = config.model.cond_stage_config
    return node.layer + (f", padded to {node.pad_to}" if node.pad_to else "")


# ---- Reading ----


def reader(samples: TrainingSet, seed: int, tokenizer: Tokenizer | None) -> Reader:
    """Return the function (indices, positions) -> what training needs of those samples, stacked.

    tokenizer: None where captions are not read as text. The batch has `keys`, and of these what the set gives:
    `images` (batch, 3, height, width) in [-1, 1], or `moments` (`vae_latents` of a cache of means); `token_ids` (batch,
    length), or `context` (batch, length, context_dim).
    """
    shards, cache, transforms = samples.shards, samples.cache, samples.transforms
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
            record["token_ids"] = tokenizer([caption_of(sample)])[0]
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


@dataclass(frozen=True)
class SyntheticSet:
    """A set of `length` random samples (model.data.synthetic_data); sample i is the same in every run."""

    length: int
    latent_shape: Shape
    image_size: tuple[int, int]
    text_shape: tuple[int, int]
    encoded: Mapping[str, bool]

    @classmethod
    def from_config(cls, config: Config, encoded: Mapping[str, bool]) -> "SyntheticSet":
        """Return the set that a config asks for, with the size of its crops, or latents of model.image_size."""
        model, text = config.model, config.model.cond_stage_config
        side = downsampling(config) * model.image_size
        size = image_size(open_transforms(config)) if model.data.train.augmentations else (side, side)
        embedding = (text.pad_to or text.max_length, model.unet_config.context_dim or 1)
        return cls(model.data.synthetic_data_length, latent_shape(config, size), size, embedding, encoded)

    def __len__(self) -> int:
        return self.length

    def read(self, index: int, tokenizer: Tokenizer | None) -> Record:
        """Return noise for an image or its moments, and a caption or noise for its embedding."""
        generator = torch.Generator().manual_seed(sample_seed(0, index))
        record: Record = {"keys": f"synthetic-{index}"}
        if self.encoded[IMAGE_KEY]:
            channels, *size = self.latent_shape
            record["moments"] = torch.randn(2 * channels, *size, generator=generator)
        else:
            record["images"] = 2 * torch.rand(3, *self.image_size, generator=generator) - 1
        if tokenizer is None:
            record["context"] = torch.randn(self.text_shape, generator=generator)
        else:
            record["token_ids"] = tokenizer([f"a picture with the number {index}"])[0]
        return record


# ---- What is printed before a training ----


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


# ---- Sizes ----


def image_size(transforms: Transforms) -> tuple[int, int]:
    """Return (height, width) of the images, of the squarest where they have several sizes."""
    return transforms.size or squarest(transforms.buckets.sizes if transforms.buckets else [])


def squarest(sizes: Sequence[Sequence[int]]) -> tuple[int, int]:
    height, width = min(sizes, key=lambda size: max(size) / min(size))
    return height, width


def downsampling(config: Config) -> int:
    """Return the pixels of an image's side for each of its latents'."""
    return 1 << (len(config.model.first_stage_config.ddconfig.ch_mult) - 1)


def latent_shape(config: Config, size: tuple[int, int]) -> Shape:
    """Return (channels, height, width) of the latents of images of `size` (height, width)."""
    by = downsampling(config)
    if size[0] % by or size[1] % by:
        raise BadInput(f"images of {size[0]}x{size[1]} do not divide by {by}, the downsampling of the VAE")
    return config.model.first_stage_config.embed_dim, size[0] // by, size[1] // by


@contextmanager
def blaming(key: str) -> Iterator[None]:
    """Put the key of the config that is to blame before the message of a BadInput."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{key}: {error}") from None


def as_list(paths: Any) -> list[str]:
    return [paths] if isinstance(paths, str) else list(paths)
