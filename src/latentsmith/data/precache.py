"""Run the frozen networks of a config over its set, and keep what they make as a latent cache."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentsmith import __version__
from latentsmith.architectures import COMPONENTS
from latentsmith.checkpoints.from_config import build_network, build_tokenizer, is_encoded, weights_of, with_padding
from latentsmith.config import Config, require_config
from latentsmith.cpu import optimize_for_cpu
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_tensors
from latentsmith.models import AutoencoderKL, ClipTextEncoder
from latentsmith.precision import autocast_dtype, weights_dtype
from latentsmith.processes import own_device, pick_device, process_of
from latentsmith.progress import progress as progress_bar
from latentsmith.text.tokenizer import Tokenizer

from .cache_writer import CacheOptions, Encoders, write_cache
from .config_caches import layer_fingerprint
from .config_sizes import image_size, latent_shape, min_or_max_size, open_transforms
from .dataset import open_shards
from .latent_cache import (
    LatentCache,
)


def precache(config: Config, out: Path | str) -> Path:
    """Encode the images and captions of model.data.train into the folder `out`; returns it.

    What the stage keys name as encoded is encoded: with image_encoded and raw captions, images only; where neither
    is, both. What is encoded needs weights. Interrupted, it goes on where it stopped when run again. Under torchrun or
    srun the processes share the shards.
    """
    require_config(config, "precache")
    if config.model.data.synthetic_data:
        raise BadInput(
            "model.data.synthetic_data=true needs no cache: `train` makes its latents and embeddings of noise as it "
            "goes; set it to false to cache a set"
        )
    wanted = wanted_encodings(config)
    config = with_padding(config)
    for part, component in COMPONENTS.items():
        if part in wanted and not weights_of(config, part):
            raise BadInput(
                f"model.{component.config_key}.from_pretrained is not set: a cache made by random weights is of no use"
            )
    source, transforms = open_shards(config), open_transforms(config)
    for size in transforms.buckets.sizes if transforms.buckets else [image_size(transforms)]:
        latent_shape(config, size)
    if min_or_max_size(config) is not None:
        print("model.data.train.filterings leave images out when training; all of them are cached")
    kept = config.model.data.cache
    options = CacheOptions(kept.latents, kept.crops, kept.flipped, kept.share_captions)
    rank, processes = process_of()
    cut: Counter[str] = Counter()
    with progress_bar("caching", "samples") as bar:
        cache = write_cache(
            source,
            out,
            transforms,
            encoders(config, wanted, cut),
            options=options,
            batch_size=config.model.micro_batch_size,
            seed=config.model.seed,
            rank=rank,
            processes=processes,
            num_workers=config.model.data.num_workers,
            progress=bar,
        )
    if cut.total():
        print(
            f"{cut.total():,} captions have more than {config.model.cond_stage_config.max_length} tokens and were cut"
        )
    if cache is not None:
        print_summary(cache)
    else:
        print(f"{out}: process {rank} of {processes} has done its shards; the cache is whole when all have")
    return Path(out)


def wanted_encodings(config: Config) -> set[str]:
    """Return the frozen networks to run: "vae", "text_encoder" or both."""
    keys = {"vae": config.model.first_stage_key, "text_encoder": config.model.cond_stage_key}
    return {part for part, key in keys.items() if is_encoded(key)} or set(keys)


def encoders(config: Config, wanted: set[str], cut: Counter[str]) -> Encoders:
    """Return the frozen networks as functions of arrays, on the run's device, with fingerprints of what shapes them.

    cut: counts the captions that are longer than the text encoder reads.
    """
    device = own_device(pick_device(config.trainer.accelerator.replace("gpu", "cuda")))
    half = reduced_dtype(config.trainer.precision) if device != "cpu" else None
    networks: dict[str, Any] = {part: build_network(config, part).to(device).eval() for part in wanted}
    for network in networks.values() if device == "cpu" else ():
        optimize_for_cpu(network)
    if config.model.channels_last and "vae" in networks:
        networks["vae"].to(memory_format=torch.channels_last)
    tokenizer = build_tokenizer(config) if "text_encoder" in wanted else None
    fingerprints = {part: fingerprint_tensors(network.state_dict()) for part, network in networks.items()}
    if half is not None:
        fingerprints["precision"] = str(half)
    if tokenizer:
        fingerprints |= {"layer": layer_fingerprint(config), "tokenizer": tokenizer.fingerprint()}
    return Encoders(
        images=image_encoder(networks["vae"], device, half) if "vae" in wanted else None,
        captions=caption_encoder(networks["text_encoder"], tokenizer, device, half, cut) if tokenizer else None,
        fingerprints=fingerprints,
        versions={"latentsmith": __version__, "torch": torch.__version__},
    )


def reduced_dtype(precision: str) -> torch.dtype | None:
    """Return the dtype below float32 that a trainer.precision computes in, or None."""
    dtype = autocast_dtype(precision) or weights_dtype(precision)
    return None if dtype == torch.float32 else dtype


def image_encoder(
    vae: AutoencoderKL, device: str, half: torch.dtype | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function of images (batch, 3, height, width) in [-1, 1] to moments (batch, 2 * z, ...), arrays."""

    @torch.no_grad()
    def encode(images: np.ndarray) -> np.ndarray:
        with autocast(device, half):
            return vae.encode(torch.from_numpy(images).to(device)).float().cpu().numpy()

    return encode


def caption_encoder(
    text_encoder: ClipTextEncoder, tokenizer: Tokenizer, device: str, half: torch.dtype | None, cut: Counter[str]
) -> Callable[[list[str]], np.ndarray]:
    """Return a function of captions to text embeddings (batch, length, width), an array."""

    @torch.no_grad()
    def encode(captions: list[str]) -> np.ndarray:
        token_ids, ends = tokenizer(captions, return_cut=True)
        cut["captions"] += sum(map(bool, ends))
        with autocast(device, half):
            embedding: torch.Tensor = text_encoder(token_ids.to(device))
            return embedding.float().cpu().numpy()

    return encode


def autocast(device: str, half: torch.dtype | None) -> torch.autocast:
    """Return the frozen networks' arithmetic in half precision, where a GPU is asked for it; float32 on a CPU."""
    return torch.autocast(device.partition(":")[0], half, enabled=half is not None)


def print_summary(cache: LatentCache) -> None:
    shapes = ", ".join(f"{name} {tuple(member['shape'])}" for name, member in cache.info["members"].items())
    several = f", {cache.variants} encodings of each image" if cache.variants > 1 else ""
    print(f"{cache.folder}: {len(cache):,} samples, {shapes}{several}")
