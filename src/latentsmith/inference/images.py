"""Images to tensors and back, images to start from, and networks run over large ones in tiles."""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from latentsmith.files.colour import to_srgb
from latentsmith.files.errors import BadInput
from latentsmith.image_request import ImageRequest, check_pixels
from latentsmith.models import AutoencoderKL

TILE = 64  # latents a side; a quarter of it overlaps
DECODED_AT_ONCE = 512 * 512  # pixels, where a batch has more than one image


def to_image(pixels: Tensor) -> Image.Image | str:
    """Return pixels (3, height, width) in [-1, 1] as an image of 8 bits, or why there is none, as a text.

    Values that are not finite come from failures alone. An image may well be black.
    """
    if not pixels.isfinite().all():
        return (
            "the image holds values that are not finite: so do the latents, or the VAE fails; use float32 or bfloat16"
        )
    rounded = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(rounded))


def to_unit_range(images: Tensor) -> Tensor:
    """Return images of [-1, 1] in [0, 1], on the CPU. Raises BadInput where `to_image` has none."""
    for image in images:
        if isinstance(reason := to_image(image), str):
            raise BadInput(reason)
    return (images / 2 + 0.5).clamp(0, 1).cpu()


def from_image(image: Image.Image) -> Tensor:
    """Return an image as (3, height, width) in [-1, 1], float32: upright, in sRGB, transparency on white."""
    pixels = np.asarray(to_srgb(image), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).contiguous()


def cropped(image: Image.Image, height: int | None, width: int | None) -> Image.Image:
    """Return an image resized to fill height x width, its longer side cropped at both ends."""
    size = (width or image.width, height or image.height)
    return image if image.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS)


@dataclass(frozen=True, eq=False)
class InitImage:
    """An image to start from. image: (3, height, width) in [-1, 1]. mask: (1, height, width), 1 where to repaint;
    None: everywhere. latent_mask: the same of the latents, 1 where any of their pixels is to be repainted."""

    image: Tensor
    mask: Tensor | None
    latent_mask: Tensor

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[1], self.image.shape[2]

    def around(self, generated: Tensor) -> Tensor:
        """Return a generated image with this one's own pixels outside the mask."""
        if self.mask is None:
            return generated
        return torch.where(self.mask > 0, self.image + self.mask * (generated - self.image), self.image)


def prepare_init_images(
    requests: Sequence[ImageRequest], height: int | None, width: int | None, factor: int
) -> list[InitImage | None]:
    """Return what each request starts from, all of one size. Raises BadInput for sizes that do not fit.

    height, width: what images are cropped to; None: as they are. factor: the VAE's, which must divide both.
    """
    prepared: dict[tuple[int, int], InitImage] = {}
    found: list[InitImage | None] = []
    for request in requests:
        if request.image is None:
            found.append(None)
            continue
        key = (id(request.image), id(request.mask_image))
        if key not in prepared:
            prepared[key] = prepare_init_image(request.image, request.mask_image, height, width, factor)
        found.append(prepared[key])
    if len({each.size for each in prepared.values()}) > 1:
        raise BadInput("the images to start from are of several sizes; give height and width to crop them to")
    if prepared and None in found:
        raise BadInput("some requests of a call have an image to start from and some have none; call once for each")
    return found


def prepare_init_image(
    image: Image.Image, mask: Image.Image | None, height: int | None, width: int | None, factor: int
) -> InitImage:
    for name, each in {"image": image, "mask_image": mask}.items():
        if each is not None and not isinstance(each, Image.Image):
            raise BadInput(f"{name} is a {type(each).__name__}; give a PIL image")
    check_pixels(height or image.height, width or image.width)
    upright, marked = to_srgb(image), None if mask is None else lightness(mask)
    if marked is not None and marked.size != upright.size:
        sizes = f"the mask is {marked.height}x{marked.width}, the image {upright.height}x{upright.width}"
        raise BadInput(f"{sizes}; make them one size")
    pixels = from_image(cropped(upright, height, width))
    height, width = pixels.shape[1:]
    if height % factor or width % factor:
        raise BadInput(
            f"an image of {height}x{width} to start from does not divide by {factor}; "
            "give height and width to crop it to"
        )
    if marked is None:
        return InitImage(pixels, None, torch.ones(1, height // factor, width // factor))
    repaint = torch.from_numpy(np.asarray(cropped(marked, height, width), dtype=np.float32) / 255)[None]
    return InitImage(pixels, repaint, (F.max_pool2d(repaint, factor) > 0).float())


def lightness(mask: Image.Image) -> Image.Image:
    """Return a mask's lightness, upright; what is transparent is black, so it is kept."""
    return to_srgb(mask, background="black").convert("L")


def decode(vae: AutoencoderKL, vae_latents: Tensor, *, tiling: bool) -> Tensor:
    """Return images (batch, 3, height, width), float32, of unscaled latents (batch, channels, height / f, width / f).

    tiling: see SamplingOptions.vae_tiling. A VAE in float16 whose values overflow is used once more in float32, with a
    warning.
    """
    at_once = max(1, DECODED_AT_ONCE // (vae_latents.shape[2] * vae_latents.shape[3] * vae.downsampling**2))

    def run(network: AutoencoderKL, piece: Tensor) -> Tensor:
        return torch.cat([network.decode(part) for part in piece.split(at_once)])

    return run_vae(vae, run, vae_latents, Fraction(vae.downsampling), TILE if tiling else None)


def encode(vae: AutoencoderKL, images: Tensor, *, tiling: bool) -> Tensor:
    """Return unscaled latents of images in [-1, 1]: the means, float32; otherwise as `decode`."""

    def run(network: AutoencoderKL, piece: Tensor) -> Tensor:
        return torch.cat([network.mode(network.encode(part)) for part in piece.split(1)])

    return run_vae(vae, run, images, Fraction(1, vae.downsampling), TILE * vae.downsampling if tiling else None)


def run_vae(
    vae: AutoencoderKL,
    run: Callable[[AutoencoderKL, Tensor], Tensor],
    tensor: Tensor,
    scale: Fraction,
    tile: int | None,
) -> Tensor:
    """Return run(vae, tensor), float32: in tiles if `tile` says how large, and in float32 where float16 overflows."""

    def whole(network: AutoencoderKL) -> Tensor:
        apply, moved = partial(run, network), tensor.to(next(network.parameters()))
        return tiled(apply, moved, scale, tile=tile, overlap=tile // 4).float() if tile else apply(moved).float()

    found = whole(vae)
    half = next(vae.parameters()).dtype == torch.float16
    if half and not found.isfinite().all() and tensor.isfinite().all():
        warnings.warn("the VAE overflows in float16 and is used in float32 instead", stacklevel=4)
        found = whole(copy.deepcopy(vae).float())
    return found


def tiled(run: Callable[[Tensor], Tensor], tensor: Tensor, scale: Fraction, *, tile: int, overlap: int) -> Tensor:
    """Apply `run`, which turns height and width into `scale` times as much, to overlapping squares and blend them.

    tensor: (batch, channels, height, width). tile, overlap: in its own pixels, multiples of the scale's denominator.
    Where one tile holds it all, the result is run(tensor) itself.
    """
    height, width = tensor.shape[2:]
    if height <= tile and width <= tile:
        return run(tensor)
    total = weights = torch.zeros(())
    for top in tile_starts(height, tile, overlap):
        for left in tile_starts(width, tile, overlap):
            piece = run(tensor[:, :, top : top + tile, left : left + tile])
            if not total.dim():
                size = (int(height * scale), int(width * scale))
                total = piece.new_zeros(*piece.shape[:2], *size, dtype=torch.float32)
                weights = total.new_zeros(size)
            edges = [ramp(length, int(overlap * scale)).to(piece.device) for length in piece.shape[2:]]
            weight = edges[0][:, None] * edges[1]
            row, column = int(top * scale), int(left * scale)
            window = (..., slice(row, row + piece.shape[2]), slice(column, column + piece.shape[3]))
            total[window] += piece.float() * weight
            weights[window] += weight
    return total / weights


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Return where tiles begin so that they overlap by at least `overlap` and the last ends at `length`."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def ramp(length: int, overlap: int) -> Tensor:
    """Return weights of a tile's pixels: 1 inside, falling towards both ends over `overlap`, never 0."""
    distance = torch.arange(1, length + 1, dtype=torch.float32)
    return torch.minimum(distance, distance.flip(0)).clamp(max=overlap + 1) / (overlap + 1)
