"""Samples of noise in place of a set: model.data.synthetic_data."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from latentsmith.config import Config
from latentsmith.text.tokenizer import Tokenizer

from .config_sizes import (
    downsampling,
    image_size,
    latent_shape,
    open_transforms,
)
from .latent_cache import IMAGE_KEY
from .loader import Record, Shape
from .shuffle import sample_seed


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
