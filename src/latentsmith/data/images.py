"""From the bytes of any picture to RGB, and from RGB to what a network is fed."""

import difflib
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache, partial
from math import ceil
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from latentsmith.data.buckets import Buckets
from latentsmith.data.errors import BadSample
from latentsmith.data.order import integer_below
from latentsmith.files.errors import BadInput

MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs: a quarter of a GiB as RGB
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
    """The picture in `data` as an upright 8-bit sRGB image: first frame, alpha over white, colour profile applied.

    smallest_side: pixels that will be wanted of the shorter side; lets a much larger JPEG be decoded at 1/2, 1/4 or 1/8
    of its size, never below this. Raises BadSample, which says what is wrong; its reason: "zero bytes", "not an image",
    "truncated", "corrupt", "too many pixels", "unsupported pixels".
    """
    return rgb_of(load_image(data, max_pixels=max_pixels, smallest_side=smallest_side), data)


def load_image(
    data: bytes | memoryview, *, max_pixels: int = MAX_PIXELS, smallest_side: int | None = None
) -> Image.Image:
    """The first frame as the file has it, in its own mode, decoded. Arguments and errors as `decode_image`."""
    if not len(data):
        raise BadSample("zero bytes", "the image file is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise BadSample("too many pixels", f"more than {max_pixels:,} pixels ({error})") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more for a damaged file
        reason = "truncated" if _is_cut_short(data) else "not an image"
        detail = f"{reason} in a known format" if reason == "not an image" else reason
        raise BadSample(reason, f"{detail} ({len(data):,} bytes; {type(error).__name__})") from None
    width, height = image.size
    if width * height > max_pixels:
        raise BadSample("too many pixels", f"{width}x{height} is more than {max_pixels:,} pixels")
    if smallest_side:
        scale = smallest_side / min(width, height)
        image.draft(None, (ceil(width * scale), ceil(height * scale)))  # type: ignore[arg-type]
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
            "unsupported pixels", "32-bit float pixels have no agreed range; save the picture as 8 or 16 bits"
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
    """Whether any decoder shows a loaded image as `to_rgb` does: upright RGB or grey, one frame, opaque, sRGB."""
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
    except Exception as error:  # as above
        reason = "truncated" if _is_cut_short(data) or "truncated" in str(error).lower() else "corrupt"
        raise BadSample(reason, f"{reason} {image.format} image ({len(data):,} bytes; {error})") from None


def _is_cut_short(data: bytes | memoryview) -> bool:
    """Whether a WebP file, whose decoder only says "no", announces more bytes than there are."""
    head = bytes(data[:12])
    return head[:4] == b"RIFF" and head[8:] == b"WEBP" and int.from_bytes(head[4:8], "little") + 8 > len(data)


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # a garbled EXIF block says nothing about the pixels
        return 1


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if profile and image.mode in ("RGB", "L", "CMYK") and not _is_srgb(profile):
        transform = _profile_transform(profile, image.mode)
        if transform is not None:
            converted = ImageCms.applyTransform(image, transform)
            assert converted is not None
            return converted
    return image.convert("RGB")


@lru_cache(maxsize=32)
def _is_srgb(profile: bytes) -> bool:
    try:
        return "srgb" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).lower()
    except (ImageCms.PyCMSError, OSError):
        return True  # an unreadable profile is taken as none, and none means sRGB


@lru_cache(maxsize=32)
def _profile_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The colour transform to sRGB, or None where the profile is of another kind of pixels than the image."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None


class Transforms:
    """From a picture to `(3, height, width)`, float32 in [-1, 1]; the keys of NeMo's `augmentations`, in their order.

    resize_smallest_side: pixels of the shorter side afterwards (bicubic with antialias), the longer side in proportion.
    center_crop_h_w, random_crop_h_w: "height, width" or a pair. horizontal_flip: mirror half of the samples.
    aspect_buckets, in place of those: the middle of the picture in the nearest of several sizes (`buckets.Buckets`, a
    mapping of its resolution, step and max_aspect).
    An unknown key or a wrong value raises BadInput.
    """

    def __init__(self, **augmentations: Any):
        self._steps = [(key, _checked(key, value)) for key, value in augmentations.items()]
        keys = [key for key, _ in self._steps]
        if self.buckets and set(keys) - {"aspect_buckets", "horizontal_flip"}:
            raise BadInput("augmentations: aspect_buckets resizes and crops; leave out the other sizes")
        side, size = self.smallest_side, self.size
        if side and size and min(size) > side:
            raise BadInput(f"augmentations: a crop of {size[0]}x{size[1]} does not fit in resize_smallest_side={side}")

    @property
    def smallest_side(self) -> int | None:
        """The shorter side that decoding has to keep: that of a resize which comes first."""
        if self.buckets:  # a picture's own bucket asks for no more than this
            return self.buckets.resolution + self.buckets.step
        return self._steps[0][1] if self._steps and self._steps[0][0] == "resize_smallest_side" else None

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of every result, None if pictures keep their own."""
        crops = [value for key, value in self._steps if key.endswith("crop_h_w")]
        return crops[-1] if crops and not self._resizes_last() else None

    @property
    def buckets(self) -> Buckets | None:
        """The sizes of the results, where they have several."""
        return next((value for key, value in self._steps if key == "aspect_buckets"), None)

    @property
    def is_random(self) -> bool:
        """Whether two seeds can give two results."""
        return any(key == "random_crop_h_w" or (key == "horizontal_flip" and value) for key, value in self._steps)

    def __call__(self, image: Image.Image, rng_seed: int = 0) -> np.ndarray:
        """rng_seed: 64 bits, of this sample at this position of the run; everything random is a function of it."""
        for number, (key, value) in enumerate(self._steps):
            image = APPLY[key](image, value, partial(integer_below, seed=rng_seed, stream=number))
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32).transpose(2, 0, 1)
        return np.ascontiguousarray(pixels) / np.float32(127.5) - np.float32(1)

    def decode(self, data: bytes | memoryview, rng_seed: int = 0) -> np.ndarray:
        """The same from a file's bytes, decoding no more of a large JPEG than is needed. Raises BadSample."""
        return self(decode_image(data, smallest_side=self.smallest_side), rng_seed)

    def describe(self) -> list[list[Any]]:
        """The steps in order, for a fingerprint: `[["resize_smallest_side", 512], ["center_crop_h_w", [512, 512]]]`."""
        return [[key, _plain(value)] for key, value in self._steps if value]

    def unflipped(self) -> "Transforms":
        """The same without mirroring."""
        return Transforms(**{key: _plain(value) for key, value in self._steps if key != "horizontal_flip"})

    def _resizes_last(self) -> bool:
        keys = [key for key, _ in self._steps if key != "horizontal_flip"]
        return bool(keys) and keys[-1] == "resize_smallest_side"


WANTED = {
    "horizontal_flip": "true or false",
    "resize_smallest_side": "a number of pixels",
    "aspect_buckets": "a resolution, and perhaps step and max_aspect,",
}
Draw = Callable[[int], int]  # bound -> an integer in 0..bound-1


def _resize_smallest_side(image: Image.Image, side: int, draw: Draw) -> Image.Image:
    shorter = min(image.size)
    if shorter == side:
        return image
    width, height = (side if length == shorter else int(side * length / shorter) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _center_crop(image: Image.Image, size: tuple[int, int], draw: Draw) -> Image.Image:
    spare_h, spare_w = _spare(image, size)
    return _crop(image, round(spare_h / 2), round(spare_w / 2), size)


def _random_crop(image: Image.Image, size: tuple[int, int], draw: Draw) -> Image.Image:
    spare_h, spare_w = _spare(image, size)
    place = draw((spare_h + 1) * (spare_w + 1))
    return _crop(image, place // (spare_w + 1), place % (spare_w + 1), size)


def _flip(image: Image.Image, enabled: bool, draw: Draw) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if enabled and draw(2) else image


def _to_bucket(image: Image.Image, buckets: Buckets, draw: Draw) -> Image.Image:
    height, width = buckets.sizes[buckets.number_of(image.height, image.width)]
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
    box = (left, top, left + scale * width, top + scale * height)
    return image.resize((width, height), Image.Resampling.BICUBIC, box)


APPLY: dict[str, Callable[[Image.Image, Any, Draw], Image.Image]] = {
    "resize_smallest_side": _resize_smallest_side,
    "center_crop_h_w": _center_crop,
    "random_crop_h_w": _random_crop,
    "horizontal_flip": _flip,
    "aspect_buckets": _to_bucket,
}


def _spare(image: Image.Image, size: tuple[int, int]) -> tuple[int, int]:
    spare_h, spare_w = image.height - size[0], image.width - size[1]
    if spare_h < 0 or spare_w < 0:
        detail = (
            f"a picture of {image.height}x{image.width} (height x width) is too small for a crop of {size[0]}x{size[1]}"
        )
        raise BadSample("too small", f"{detail}; put resize_smallest_side before the crop")
    return spare_h, spare_w


def _crop(image: Image.Image, top: int, left: int, size: tuple[int, int]) -> Image.Image:
    return image.crop((left, top, left + size[1], top + size[0]))


def _checked(key: str, value: Any) -> Any:
    """The value of one augmentation in its canonical type; BadInput if key or value is wrong."""
    if key not in APPLY:
        near = difflib.get_close_matches(key, APPLY, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(APPLY)}"
        raise BadInput(f"augmentations.{key} is not a transform; {hint}")
    try:
        if key == "horizontal_flip":
            return _boolean(value)
        if key == "aspect_buckets":
            return Buckets(**value)
        numbers = _integers(value)
        if min(numbers) < 1 or len(numbers) != (1 if key == "resize_smallest_side" else 2):
            raise ValueError
        return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])
    except (TypeError, ValueError):
        wanted = WANTED.get(key, '"height, width"')
        raise BadInput(f"augmentations.{key}={value!r}: {wanted} is wanted") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Buckets):
        return asdict(value)
    return list(value) if isinstance(value, tuple) else value


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _integers(value: Any) -> list[int]:
    if isinstance(value, bool):
        raise TypeError
    parts: Iterable[Any] = (
        value.split(",") if isinstance(value, str) else value if isinstance(value, Iterable) else [value]
    )
    return [int(part) for part in parts]
