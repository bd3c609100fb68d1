"""Pictures to tensors and back, and networks run over large ones in tiles."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from latentsmith.files.errors import BadInput

from .options import one_each


def to_picture(image: Tensor) -> Image.Image | str:
    """An image (3, height, width) in [-1, 1] as a picture of 8 bits.

    In place of one whose values are not finite, or that is black all over, which only failures draw: what is wrong.
    """
    if not image.isfinite().all():
        return "it holds values that are not finite: the latents are not, or the VAE fails; use float32 or bfloat16"
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    if not pixels.any():
        return "it is black all over: its latents lie outside what the VAE decodes"
    return Image.fromarray(np.ascontiguousarray(pixels))


def from_picture(picture: Image.Image) -> Tensor:
    """An image (3, height, width) in [-1, 1], float32; what is transparent is white, rotation of EXIF is applied."""
    upright = eight_bits(ImageOps.exif_transpose(picture))
    if "A" in upright.getbands() or "transparency" in upright.info:
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
    pixels = np.asarray(upright.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).contiguous()


def eight_bits(picture: Image.Image) -> Image.Image:
    """A picture of 16 bits a channel with the upper 8 of them; any other as it is."""
    if not picture.mode.startswith("I"):
        return picture
    return Image.fromarray((np.asarray(picture).astype(np.int64) / 257).round().clip(0, 255).astype(np.uint8))


def fitted(picture: Image.Image, height: int | None, width: int | None) -> Image.Image:
    """The picture filled into height x width, its longer side cropped at both ends; as it is where neither is given."""
    if height is None and width is None:
        return picture
    size = (width or picture.width, height or picture.height)
    return picture if picture.size == size else ImageOps.fit(picture, size, Image.Resampling.LANCZOS)


@dataclass(frozen=True, eq=False)
class Base:
    """A picture to start from. image: (3, height, width) in [-1, 1]. mask: (1, height, width), 1 where to redraw; None:
    everywhere. latent_mask: the same of the latents, 1 where any of their pixels is to be redrawn."""

    image: Tensor
    mask: Tensor | None
    latent_mask: Tensor

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[1], self.image.shape[2]

    def around(self, drawn: Tensor) -> Tensor:
        """What was drawn, with the picture's own pixels outside the mask."""
        return drawn if self.mask is None else self.image + self.mask * (drawn - self.image)


def based_on(
    image: Image.Image | Sequence[Image.Image] | None,
    mask: Image.Image | Sequence[Image.Image] | None,
    count: int,
    height: int | None,
    width: int | None,
    factor: int,
) -> list[Base | None]:
    """What each of `count` pictures starts from; BadInput for a mask without a picture or of another size."""
    if image is None:
        if mask is not None:
            raise BadInput("a mask without a picture: give the picture that it is of")
        return [None] * count
    pictures, masks = one_each("pictures", image, count), one_each("masks", mask, count)
    made: dict[tuple[int, int], Base] = {}
    for picture, own_mask in zip(pictures, masks, strict=True):
        if (key := (id(picture), id(own_mask))) not in made:
            made[key] = base_of(picture, own_mask, height, width, factor)
    if len({base.size for base in made.values()}) > 1:
        raise BadInput("the pictures to start from are of several sizes; give height and width to crop them to")
    return [made[id(picture), id(own_mask)] for picture, own_mask in zip(pictures, masks, strict=True)]


def base_of(picture: Image.Image, mask: Image.Image | None, height: int | None, width: int | None, factor: int) -> Base:
    upright = ImageOps.exif_transpose(picture)
    if mask is not None and mask.size != upright.size:
        raise BadInput(
            f"the mask is {mask.height}x{mask.width}, the picture {upright.height}x{upright.width}; make them one size"
        )
    image = from_picture(fitted(upright, height, width))
    if image.shape[1] % factor or image.shape[2] % factor:
        raise BadInput(
            f"a picture of {image.shape[1]}x{image.shape[2]} to start from does not divide by {factor}; "
            "give height and width to crop it to"
        )
    if mask is None:
        return Base(image, None, torch.ones(1, image.shape[1] // factor, image.shape[2] // factor))
    pixels = np.asarray(fitted(light_of(mask), height, width), dtype=np.float32) / 255
    redraw = torch.from_numpy(pixels)[None]
    return Base(image, redraw, (F.max_pool2d(redraw, factor) > 0).float())


def light_of(mask: Image.Image) -> Image.Image:
    """A mask's lightness, what is transparent being black: kept."""
    mask = eight_bits(mask)
    if "A" in mask.getbands() or "transparency" in mask.info:
        mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask.convert("RGBA"))
    return mask.convert("L")


def tiled(run: Callable[[Tensor], Tensor], tensor: Tensor, scale: Fraction, *, tile: int, overlap: int) -> Tensor:
    """`run`, which turns height and width into `scale` times as much, over overlapping squares, blended linearly.

    tensor: (batch, channels, height, width). tile, overlap: in its own pixels, multiples of the scale's denominator.
    Where one tile holds it all, the result is run(tensor) itself.
    """
    height, width = tensor.shape[2:]
    if height <= tile and width <= tile:
        return run(tensor)
    total = weights = torch.zeros(())
    for top in starts(height, tile, overlap):
        for left in starts(width, tile, overlap):
            piece = run(tensor[:, :, top : top + tile, left : left + tile])
            if not total.dim():
                size = (int(height * scale), int(width * scale))
                total = piece.new_zeros(*piece.shape[:2], *size, dtype=torch.float32)
                weights = total.new_zeros(size)
            edges = [ramp(length, int(overlap * scale)).to(piece.device) for length in piece.shape[2:]]
            weight = edges[0][:, None] * edges[1]
            rows, columns = int(top * scale), int(left * scale)
            place = (..., slice(rows, rows + piece.shape[2]), slice(columns, columns + piece.shape[3]))
            total[place] += piece.float() * weight
            weights[place] += weight
    return total / weights


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin so that they overlap by at least `overlap` and the last ends at `length`."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def ramp(length: int, overlap: int) -> Tensor:
    """Weights of a tile's pixels: 1 inside, falling towards both ends over `overlap`, never 0."""
    near = torch.arange(1, length + 1, dtype=torch.float32)
    return torch.minimum(near, near.flip(0)).clamp(max=overlap + 1) / (overlap + 1)
