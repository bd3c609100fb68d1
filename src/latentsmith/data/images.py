"""From the bytes of any image to RGB."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil

from PIL import Image

from latentsmith.files.colour import to_srgb
from latentsmith.files.images import MAX_PIXELS, BadImage, is_cut_short, open_image

from .errors import BadSample


def decode_image(
    data: bytes | memoryview, *, max_pixels: int = MAX_PIXELS, smallest_side: int | None = None
) -> Image.Image:
    """Return the image in `data` as an upright 8-bit sRGB image: first frame, alpha over white, colour profile applied.

    smallest_side: pixels that will be wanted of the shorter side; lets a much larger JPEG be decoded at 1/2, 1/4 or 1/8
    of its size, never below this. Raises BadSample, which says what is wrong; its reason: "zero bytes", "not an image",
    "unsupported format", "truncated", "corrupt", "too many pixels", "too many bytes", "unsupported pixels".
    """
    return rgb_of(load_image(data, max_pixels=max_pixels, smallest_side=smallest_side), data)


def load_image(
    data: bytes | memoryview, *, max_pixels: int = MAX_PIXELS, smallest_side: int | None = None
) -> Image.Image:
    """Return the first frame as the file has it, in its own mode, decoded. Arguments and errors as `decode_image`."""
    try:
        image = open_image(data, max_pixels=max_pixels)
    except BadImage as error:
        raise BadSample(error.reason, str(error)) from None
    if smallest_side:
        width, height = image.size
        scale = smallest_side / min(width, height)
        image.draft(None, (ceil(width * scale), ceil(height * scale)))
    with _damage_reported(image, data):
        image.load()
    return image


def rgb_of(image: Image.Image, data: bytes | memoryview) -> Image.Image:
    """Return `to_srgb` of an image loaded from `data`, with damage reported as `decode_image` does."""
    with _damage_reported(image, data):
        return to_srgb(image)


@contextmanager
def _damage_reported(image: Image.Image, data: bytes | memoryview) -> Iterator[None]:
    try:
        yield
    except BadImage as error:
        raise BadSample(error.reason, str(error)) from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more for a damaged file
        reason = "truncated" if is_cut_short(data) or "truncated" in str(error).lower() else "corrupt"
        raise BadSample(reason, f"{reason} {image.format} image ({len(data):,} bytes; {error})") from None
