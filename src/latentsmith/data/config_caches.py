"""Open the latent caches of a config, and check them against its networks and stage keys."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from latentsmith.config import Config
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_tensors
from latentsmith.text.tokenizer import Tokenizer

from .config_sizes import downsampling, open_transforms, squarest, stated_augmentations
from .foreign_cache import ForeignCache
from .latent_cache import CAPTION_KEY, IMAGE_KEY, JoinedCaches, LatentCache
from .shards import ShardSet


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
