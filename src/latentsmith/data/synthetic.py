"""Random samples instead of a set (model.data.synthetic_data), to measure a training without its data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig

from latentsmith.text.tokenizer import Tokenizer
from latentsmith.training import setup

from .latent_cache import IMAGE_KEY
from .shuffle import sample_seed


@dataclass(frozen=True)
class Synthetic:
    """A set of `length` random samples; sample i is the same in every run. latent_shape: (channels, height, width)."""

    length: int
    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]
    text_shape: tuple[int, int]
    encoded: Mapping[str, bool]

    def __len__(self) -> int:
        return self.length

    def read(self, index: int, words: Tokenizer | None) -> dict[str, Any]:
        """What training reads of a sample: noise for a picture or its moments, a caption or noise for its embedding."""
        generator = torch.Generator().manual_seed(sample_seed(0, index))
        record: dict[str, Any] = {"keys": f"synthetic-{index}"}
        if self.encoded[IMAGE_KEY]:
            channels, *size = self.latent_shape
            record["moments"] = torch.randn(2 * channels, *size, generator=generator)
        else:
            record["images"] = 2 * torch.rand(3, *self.image_size, generator=generator) - 1
        if words is None:
            record["context"] = torch.randn(self.text_shape, generator=generator)
        else:
            record["token_ids"] = words([f"a picture with the number {index}"])[0]
        return record


def synthetic_set(config: DictConfig, encoded: Mapping[str, bool]) -> Synthetic:
    """The random set that a config asks for, of the size of its crops, or of model.image_size latents without any."""
    model, text = config.model, config.model.cond_stage_config
    side = setup.factor(config) * int(model.get("image_size") or 64)
    size = setup.picture_size(setup.transforms(config)) if model.data.train.augmentations else (side, side)
    shape = setup.latent_shape(config, size)
    embedding = (text.pad_to or text.max_length, model.unet_config.context_dim or 1)
    return Synthetic(model.data.synthetic_data_length, shape, size, embedding, encoded)
