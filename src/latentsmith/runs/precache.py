"""`latentsmith precache`: run the frozen encoders over a set once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from latentsmith import __version__
from latentsmith.data.cache import Encoders, LatentCache, write_cache
from latentsmith.files.errors import BadInput
from latentsmith.inference.pipeline import pick_device
from latentsmith.inference.tokenizer import Tokenizer
from latentsmith.models import AutoencoderKL, ClipTextEncoder

from . import pieces
from .networks import build_network, build_tokenizer, fingerprint, weights_of
from .progress import progress


def precache(config: DictConfig, out: Path | str) -> Path:
    """Encode the pictures and captions of model.data.train into the folder `out`; returns it.

    Both the VAE and the text encoder need weights. Interrupted, it goes on where it stopped when run again.
    """
    for part, key in (("vae", "first_stage_config"), ("text_encoder", "cond_stage_config")):
        if not weights_of(config, part):
            raise BadInput(f"model.{key}.from_pretrained is not set: a cache made by random weights is of no use")
    device = pick_device(config.trainer.accelerator.replace("gpu", "cuda"))
    words = build_tokenizer(config)
    vae: Any = build_network(config, "vae").to(device).eval()
    text_encoder: Any = build_network(config, "text_encoder").to(device).eval()
    encoders = Encoders(
        images=image_encoder(vae, device),
        captions=caption_encoder(text_encoder, words, device),
        fingerprints={
            "vae": fingerprint(vae),
            "text_encoder": fingerprint(text_encoder),
            "layer": config.model.cond_stage_config.layer,
            "tokenizer": words.fingerprint(),
        },
        versions={"latentsmith": __version__, "torch": torch.__version__},
    )
    source, transforms = pieces.training_set(config), pieces.transforms(config)
    assert transforms.size is not None
    pieces.latent_shape(config, transforms.size)
    with progress("caching", "samples") as tell:
        cache = write_cache(
            source,
            out,
            transforms,
            encoders,
            batch_size=config.model.micro_batch_size,
            seed=config.model.seed,
            progress=tell,
        )
    print_summary(cache)
    return Path(out)


def image_encoder(vae: AutoencoderKL, device: str) -> Callable[[np.ndarray], np.ndarray]:
    """Pictures (batch, 3, height, width) in [-1, 1] to moments (batch, 2 * z, height / f, width / f), arrays."""

    @torch.no_grad()
    def encode(images: np.ndarray) -> np.ndarray:
        return vae.encode(torch.from_numpy(images).to(device)).cpu().numpy()

    return encode


def caption_encoder(text_encoder: ClipTextEncoder, words: Tokenizer, device: str) -> Callable[[list[str]], np.ndarray]:
    """Captions to text embeddings (batch, length, width), an array."""

    @torch.no_grad()
    def encode(captions: list[str]) -> np.ndarray:
        return text_encoder(words(captions).to(device)).cpu().numpy()

    return encode


def print_summary(cache: LatentCache) -> None:
    shapes = ", ".join(f"{name} {tuple(member['shape'])}" for name, member in cache.info["members"].items())
    print(f"{cache.folder}: {len(cache):,} samples, {shapes}")
