"""How an image gets the size that an extractor takes. FID of the same images differs by the rule, so each has a name.

Source of the comparison: Parmar et al. 2022 (clean-fid).
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from latentsmith.files.errors import BadInput

Rule = Callable[[Image.Image, int], Tensor]


def clean(image: Image.Image, side: int) -> Tensor:
    """Pillow's bicubic, which averages where it shrinks, in float32 for each channel and not rounded: clean-fid's."""
    channels = [
        Image.fromarray(channel).resize((side, side), Image.Resampling.BICUBIC)
        for channel in np.moveaxis(np.asarray(image, dtype=np.float32), -1, 0)
    ]
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels]))


def center_crop(image: Image.Image, side: int) -> Tensor:
    """Bicubic on 8 bits to a shorter side of `side`, then the middle: how CLIP and DINOv2 prepare their own images."""
    width, height = image.size
    scale = side / min(width, height)
    across, down = (max(side, int(length * scale)) for length in (width, height))
    left, top = round((across - side) / 2), round((down - side) / 2)
    resized = image.resize((across, down), Image.Resampling.BICUBIC)
    return to_tensor(resized.crop((left, top, left + side, top + side)))


def tensorflow(image: Image.Image, side: int) -> Tensor:
    """TensorFlow 1's bilinear: see `legacy_tensorflow`. torch-fidelity and torchmetrics resize so."""
    return legacy_tensorflow(to_tensor(image)[None], side)[0]


def pytorch(image: Image.Image, side: int) -> Tensor:
    """PyTorch's bilinear without averaging, pixel centres at halves: pytorch-fid's, and so MLPerf's."""
    return F.interpolate(to_tensor(image)[None], (side, side), mode="bilinear", align_corners=False)[0]


def none(image: Image.Image, side: int) -> Tensor:
    """Take images that have the size already; others are refused."""
    if image.size != (side, side):
        raise BadInput(f"resize none: an image of {image.width}x{image.height}, the extractor takes {side}x{side}")
    return to_tensor(image)


RULES: dict[str, Rule] = {
    "clean": clean,
    "legacy-tensorflow": tensorflow,
    "pytorch-bilinear": pytorch,
    "center-crop": center_crop,
    "none": none,
}


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as float32 (3, height, width), 0 to 255."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)


def legacy_tensorflow(images: Tensor, side: int) -> Tensor:
    """Return images (batch, channels, height, width) at side x side, each pixel mixed from the four around it.

    Output i lies at i * length / side of the input: corners are not aligned, centres are not at halves, and nothing is
    averaged where images shrink. Source: tf.image.resize_bilinear of TensorFlow 1.
    """
    for dim in (2, 3):
        images = _mixed(images, dim, side)
    return images


def _mixed(images: Tensor, dim: int, side: int) -> Tensor:
    length = images.shape[dim]
    places = torch.arange(side, dtype=torch.float32, device=images.device) * (length / side)
    first = places.long().clamp(max=length - 1)
    share = (places - first).to(images.dtype).reshape([-1 if each == dim else 1 for each in range(images.ndim)])
    lower, upper = images.index_select(dim, first), images.index_select(dim, (first + 1).clamp(max=length - 1))
    return lower + (upper - lower) * share
