"""What training reads: pictures or cached moments, captions or cached embeddings."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from latentsmith.data.cache import CAPTION_KEY, IMAGE_KEY, LatentCache, caption_of, image_member
from latentsmith.data.foreign_cache import ForeignCache
from latentsmith.data.images import Transforms
from latentsmith.data.order import sample_seed
from latentsmith.data.shards import ShardSet
from latentsmith.files.errors import BadInput
from latentsmith.inference.tokenizer import Tokenizer
from latentsmith.training.draws import CROPS

from . import pieces
from .networks import fingerprint, is_encoded, layer_of
from .synthetic import Synthetic, synthetic_set

Reader = Callable[[int, int], dict[str, Any]]


@dataclass(frozen=True)
class TrainingSet:
    """The samples of a run. cache: None where nothing is encoded. size: (height, width) in latents, of one sample."""

    shards: ShardSet | Synthetic
    cache: LatentCache | None
    transforms: Transforms | None
    latent_shape: tuple[int, int, int]


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
    shards = pieces.shard_set(config, data)
    is_cache = any(shard.parent.joinpath("cache.json").is_file() for shard in shards.paths[:1])
    if any(encoded.values()) and not is_cache and ForeignCache.reads(shards):
        return foreign_set(config, ForeignCache(shards), encoded, data)
    if any(encoded.values()) and not is_cache:
        raise BadInput(
            f"{model.data[data].dataset_path}: not a latent cache, and the stage keys ask for encodings; run "
            "`latentsmith precache`, or set model.first_stage_key=images model.cond_stage_key=captions"
        )
    folders = sorted({shard.parent for shard in shards.paths})
    if is_cache and len(folders) > 1:
        raise BadInput(f"{folders[0]}: one latent cache trains at a time; {folders[1]} is another folder")
    cache = LatentCache(folders[0]) if is_cache else None
    if cache:
        check_cache(config, cache, encoded, networks, words, data)
    return readable(config, shards, cache, encoded, data)


def readable(
    config: DictConfig, shards: ShardSet, cache: LatentCache | None, encoded: Mapping[str, bool], data: str
) -> TrainingSet:
    """The set, with the transforms of its pictures if it has some, and the size of its latents."""
    if encoded[IMAGE_KEY]:
        assert cache is not None
        moments = cache.info["members"][IMAGE_KEY]["shape"]
        return TrainingSet(shards, cache, None, (moments[0] // 2, moments[1], moments[2]))
    made = pieces.transforms(config, data)
    assert made.size is not None
    return TrainingSet(shards, cache, made, pieces.latent_shape(config, made.size))


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
        if not wanted and name == IMAGE_KEY:
            raise BadInput(f"{cache.folder}: a latent cache holds no pictures; set model.first_stage_key=image_encoded")
    unet = config.model.unet_config
    cache.check_shapes(unet.in_channels, unet.context_dim if encoded[CAPTION_KEY] else None)


def check_cache(
    config: DictConfig,
    cache: LatentCache,
    encoded: Mapping[str, bool],
    networks: Mapping[str, nn.Module],
    words: Tokenizer | None,
    data: str,
) -> None:
    """Refuse a cache as `check_members` does, and one that was made by something else."""
    check_members(config, cache, encoded)
    text = encoded[CAPTION_KEY] and "text_encoder" in networks
    cache.check(
        {
            "vae": fingerprint(networks["vae"]) if "vae" in networks else None,
            "text_encoder": fingerprint(networks["text_encoder"]) if text else None,
            "layer": layer_of(config) if text else None,
            "tokenizer": words.fingerprint() if text and words else None,
            "transforms": stated_transforms(config, data),
        }
    )


def stated_transforms(config: DictConfig, data: str) -> Any:
    """The transforms of a set of the config, if it states any."""
    stated = config.model.data[data].get("augmentations") or config.model.data.train.augmentations
    return pieces.transforms(config, data).describe() if stated else None


def reader(samples: TrainingSet, seed: int, words: Tokenizer | None) -> Reader:
    """The function (index, position) -> what training needs of that sample, without a batch axis.

    `images` (3, height, width) in [-1, 1] or `moments`; `context` (length, context_dim) or `token_ids` (length,).
    words: the tokenizer, None where the captions' embeddings are cached.
    """

    shards = samples.shards
    if isinstance(shards, Synthetic):
        return lambda index, position: shards.read(index, words)

    def read(index: int, position: int) -> dict[str, Any]:
        number, inside = shards.locate(index)
        shard = shards.shard(number)
        sample = shard[inside]
        record: dict[str, Any] = {"keys": sample.key}
        encoded = samples.cache[index] if samples.cache else {}
        if samples.transforms is None:
            record["moments"] = torch.from_numpy(encoded[IMAGE_KEY].copy())
        else:
            data = image_member(sample)[1]
            record["images"] = torch.from_numpy(samples.transforms.decode(data, sample_seed(seed, position, CROPS)))
        if words is None:
            record["context"] = torch.from_numpy(encoded[CAPTION_KEY].copy())
        else:
            record["token_ids"] = words([caption_of(shard, sample)])[0]
        return record

    return read


def summary(samples: TrainingSet) -> str:
    """One line for the header of a run."""
    if isinstance(samples.shards, Synthetic):
        return f"{len(samples.shards):,} samples of noise, latents {json.dumps(samples.latent_shape)}"
    kind = f"cached latents {json.dumps(samples.latent_shape)}" if samples.transforms is None else "pictures"
    return f"{len(samples.shards):,} samples in {len(samples.shards.paths)} shards, {kind}"
