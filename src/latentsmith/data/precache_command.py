"""`latentsmith precache`: run the frozen encoders over a set once."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from latentsmith import __version__
from latentsmith.architectures import COMPONENTS
from latentsmith.checkpoints.from_config import build_network, build_tokenizer, is_encoded, weights_of, with_padding
from latentsmith.files.errors import BadInput
from latentsmith.inference.pipeline import pick_device
from latentsmith.models import AutoencoderKL, ClipTextEncoder
from latentsmith.processes import own_device, process_of
from latentsmith.progress import progress
from latentsmith.text.tokenizer import Tokenizer
from latentsmith.training import setup
from latentsmith.training.dry_run import HALVES

from .dataset import fingerprint, layer_of
from .latent_cache import LatentCache
from .precache import CacheOptions, Encoders, write_cache


def precache(config: DictConfig, out: Path | str) -> Path:
    """Encode the pictures and captions of model.data.train into the folder `out`; returns it.

    What the stage keys name as encoded is encoded: with image_encoded and raw captions, pictures only; where neither
    is, both. What is encoded needs weights. Interrupted, it goes on where it stopped when run again. Under torchrun or
    srun the processes share the shards.
    """
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
    source, transforms = setup.shard_set(config), setup.transforms(config)
    for size in transforms.buckets.sizes if transforms.buckets else [setup.picture_size(transforms)]:
        setup.latent_shape(config, size)
    if setup.filtered_by(config) is not None:
        print("model.data.train.filterings leave pictures out when training; all of them are cached")
    kept = config.model.data.cache
    options = CacheOptions(kept.latents, kept.crops, kept.flipped, kept.share_captions)
    rank, processes = process_of()
    cut: Counter[str] = Counter()
    with progress("caching", "samples") as tell:
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
            progress=tell,
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


def wanted_encodings(config: DictConfig) -> set[str]:
    """The frozen networks to run: "vae", "text_encoder" or both."""
    keys = {"vae": config.model.first_stage_key, "text_encoder": config.model.cond_stage_key}
    return {part for part, key in keys.items() if is_encoded(key)} or set(keys)


def encoders(config: DictConfig, wanted: set[str], cut: Counter[str]) -> Encoders:
    """The frozen networks as functions of arrays, on the run's device, with fingerprints of all that shapes them.

    cut: counts the captions that are longer than the text encoder reads.
    """
    device = own_device(pick_device(config.trainer.accelerator.replace("gpu", "cuda")))
    half = HALVES.get(config.trainer.precision) if device != "cpu" else None
    networks: dict[str, Any] = {part: build_network(config, part).to(device).eval() for part in wanted}
    if config.model.channels_last and "vae" in networks:
        networks["vae"].to(memory_format=torch.channels_last)
    words = build_tokenizer(config) if "text_encoder" in wanted else None
    fingerprints = {part: fingerprint(network) for part, network in networks.items()}
    if half is not None:
        fingerprints["precision"] = str(half)
    if words:
        fingerprints |= {"layer": layer_of(config), "tokenizer": words.fingerprint()}
    return Encoders(
        images=image_encoder(networks["vae"], device, half) if "vae" in wanted else None,
        captions=caption_encoder(networks["text_encoder"], words, device, half, cut) if words else None,
        fingerprints=fingerprints,
        versions={"latentsmith": __version__, "torch": torch.__version__},
    )


def image_encoder(
    vae: AutoencoderKL, device: str, half: torch.dtype | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """Pictures (batch, 3, height, width) in [-1, 1] to moments (batch, 2 * z, height / f, width / f), arrays."""

    @torch.no_grad()
    def encode(images: np.ndarray) -> np.ndarray:
        with autocast(device, half):
            return vae.encode(torch.from_numpy(images).to(device)).float().cpu().numpy()

    return encode


def caption_encoder(
    text_encoder: ClipTextEncoder, words: Tokenizer, device: str, half: torch.dtype | None, cut: Counter[str]
) -> Callable[[list[str]], np.ndarray]:
    """Captions to text embeddings (batch, length, width), an array."""

    @torch.no_grad()
    def encode(captions: list[str]) -> np.ndarray:
        token_ids, ends = words(captions, return_cut=True)
        cut["captions"] += sum(map(bool, ends))
        with autocast(device, half):
            return text_encoder(token_ids.to(device)).float().cpu().numpy()

    return encode


def autocast(device: str, half: torch.dtype | None) -> torch.autocast:
    """The frozen networks' arithmetic in half precision, where a GPU is asked for it; float32 on a CPU."""
    return torch.autocast(device.partition(":")[0], half, enabled=half is not None)


def print_summary(cache: LatentCache) -> None:
    shapes = ", ".join(f"{name} {tuple(member['shape'])}" for name, member in cache.info["members"].items())
    several = f", {cache.variants} encodings of each picture" if cache.variants > 1 else ""
    print(f"{cache.folder}: {len(cache):,} samples, {shapes}{several}")
