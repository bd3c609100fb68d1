"""The pixels of any image as upright 8-bit sRGB: modes, bit depths, alpha, colour profiles, EXIF orientation."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from .images import BadImage

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
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF
ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")  # the band A of LAB is a colour
SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab"}  # a mode and the colour space of its profiles
PROFILE_STEPS = 9  # levels of each channel at which a profile is compared with sRGB
PROFILE_TOLERANCE = 2  # of 255; profiles of sRGB by several makers differ by 1


def to_srgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Return a loaded image upright, in 8-bit sRGB, mode RGB, what is transparent over `background`.

    Raises BadImage, reason "unsupported pixels", for float pixels and for integers of more than 16 bits, neither of
    which have an agreed range.
    """
    profile, orientation = image.info.get("icc_profile"), orientation_of(image)
    colour, alpha = split_alpha(image)
    colour = _with_profile(colour, profile)
    if alpha is not None:
        colour = Image.composite(colour, Image.new("RGB", colour.size, background), alpha)
    upright = colour.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else colour
    if upright is not image:
        upright.info = {}  # no longer has that profile and orientation
    return upright


def split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return an image with 8 bits a channel and without transparency, and its alpha, None if it has none."""
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image)
    if image.mode not in ALPHA_MODES and not image.has_transparency_data:
        return image.convert("RGB" if image.mode == "P" else "L") if image.mode in ("P", "1") else image, None
    grey = image.mode in ("L", "1", "LA", "La")
    straight = image.convert("LA" if grey else "RGBA")
    return straight.convert("L" if grey else "RGB"), straight.getchannel("A")


def is_plain(image: Image.Image) -> bool:
    """Return whether any decoder shows an image as `to_srgb` does: upright RGB or grey, one frame, opaque, sRGB."""
    profile = image.info.get("icc_profile")
    return (
        image.mode in ("RGB", "L")
        and not image.has_transparency_data
        and getattr(image, "n_frames", 1) == 1
        and orientation_of(image) not in UPRIGHT
        and (not profile or _transform(profile, image.mode) is None)
    )


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) to 8."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a garbled EXIF block says nothing about the pixels
        return 1


def _eight_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return a grey image of 9 to 16 bits a pixel as 8, rounded, and the alpha of its colour key."""
    if image.mode == "F":
        raise BadImage("unsupported pixels", "32-bit float pixels have no agreed range; save the image as 8 or 16 bits")
    tags = getattr(image, "tag_v2", {})
    depth = max(8, *tags.get(BITS_PER_SAMPLE, (16,)))
    values = np.asarray(image).astype(np.int64)
    if depth > 16 or values.min() < 0 or values.max() > 65_535:
        detail = (
            f"integers of {values.min():,} to {values.max():,}, and no agreed range; save the image as 8 or 16 bits"
        )
        raise BadImage("unsupported pixels", detail)
    most = 2**depth - 1
    grey = (values * 255 + most // 2) // most
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # which Pillow undoes for 8 bits only
        grey = 255 - grey
    key = image.info.get("transparency")
    alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)) if isinstance(key, int) else None
    return Image.fromarray(grey.astype(np.uint8)), alpha


def _with_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    transform = _transform(profile, image.mode) if profile or image.mode == "LAB" else None
    if transform is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return converted


@lru_cache(maxsize=32)
def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the colour transform to sRGB. None for a profile that is sRGB's by what it does, whatever its name is, or
    that cannot be read or is for other pixels; none means sRGB."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile and mode != "LAB" else _lab_profile()
        if source.profile.xcolor_space.strip() != SPACES.get(mode):
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    return None if mode in ("RGB", "L") and _is_identity(transform, mode) else transform


def _lab_profile() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    levels = np.linspace(0, 255, PROFILE_STEPS).astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3) if mode == "RGB" else levels[None]
    probe = Image.fromarray(np.ascontiguousarray(grid))
    made = ImageCms.applyTransform(probe, transform)
    assert made is not None
    apart = np.asarray(made).astype(int) - np.asarray(probe.convert("RGB"))
    return bool(abs(apart).max() <= PROFILE_TOLERANCE)
