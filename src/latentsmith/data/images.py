"""From the bytes of any image to RGB."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import ceil

import numpy as np
from PIL import Image, ImageCms

from latentsmith.files.images import MAX_PIXELS, BadImage, is_cut_short, open_image

from .errors import BadSample

ORIENTATION = 0x0112  # the EXIF tag; its values 2..8 as the operation that undoes each
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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
    """`to_rgb` of an image loaded from `data`, with damage reported as `decode_image` does."""
    with _damage_reported(image, data):
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any loaded Pillow image as upright 8-bit sRGB; BadSample for float pixels, which have no agreed range."""
    profile, orientation = image.info.get("icc_profile"), orientation_of(image)
    if image.mode == "F":
        raise BadSample(
            "unsupported pixels", "32-bit float pixels have no agreed range; save the image as 8 or 16 bits"
        )
    if image.mode.startswith("I"):  # 16 bits a pixel, whatever integer type holds them
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode in ("P", "1") or image.has_transparency_data:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    alpha = image.getchannel("A") if "A" in image.getbands() else None
    colour = _to_srgb(image.convert("RGB") if alpha else image, profile)
    if alpha:
        colour = Image.composite(colour, Image.new("RGB", colour.size, "white"), alpha)
    return colour.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else colour


def is_plain(image: Image.Image) -> bool:
    """Return whether any decoder shows an image as `to_rgb` does: upright RGB or grey, one frame, opaque, sRGB."""
    profile = image.info.get("icc_profile")
    return (
        image.mode in ("RGB", "L")
        and not image.has_transparency_data
        and getattr(image, "n_frames", 1) == 1
        and orientation_of(image) not in UPRIGHT
        and (not profile or _is_srgb(profile))
    )


@contextmanager
def _damage_reported(image: Image.Image, data: bytes | memoryview) -> Iterator[None]:
    try:
        yield
    except BadSample:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more for a damaged file
        reason = "truncated" if is_cut_short(data) or "truncated" in str(error).lower() else "corrupt"
        raise BadSample(reason, f"{reason} {image.format} image ({len(data):,} bytes; {error})") from None


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) to 8."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a garbled EXIF block says nothing about the pixels
        return 1


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if profile and image.mode in ("RGB", "L", "CMYK") and not _is_srgb(profile):
        transform = _profile_transform(profile, image.mode)
        if transform is not None:
            converted = ImageCms.applyTransform(image, transform)
            assert converted is not None
            return converted
    return image if image.mode == "RGB" else image.convert("RGB")


@lru_cache(maxsize=32)
def _is_srgb(profile: bytes) -> bool:
    try:
        return "srgb" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).lower()
    except (ImageCms.PyCMSError, OSError):
        return True  # an unreadable profile is taken as none, and none means sRGB


@lru_cache(maxsize=32)
def _profile_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the colour transform to sRGB, or None where the profile is for other pixels than the image's."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
