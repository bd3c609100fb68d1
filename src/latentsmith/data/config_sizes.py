"""What a config says of the sizes of images: its transforms, crops, filters, and the latents that follow from them."""

from collections.abc import Sequence
from typing import Any

from latentsmith.config import Config
from latentsmith.files.errors import BadInput

from .loader import Shape
from .transforms import Transforms


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
