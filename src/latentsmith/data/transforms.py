"""From an RGB image to what a network is fed: the steps of NeMo's `augmentations`."""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil
from typing import Any

import numpy as np
from PIL import Image

from latentsmith.files.errors import BadInput

from .buckets import Buckets
from .errors import BadSample
from .images import decode_image
from .shuffle import integer_below

STRIP = 8  # sides that differ by more: of the resized image, which may be huge, only the crop is made
Pixels = np.ndarray[Any, np.dtype[np.uint8]]  # (height, width, 3)


class Transforms:
    """From an image to `(3, height, width)`, float32 in [-1, 1]; the keys of NeMo's `augmentations`, in their order.

    resize_smallest_side: pixels of the shorter side afterwards (bicubic with antialias), the longer side in proportion.
    center_crop_h_w, random_crop_h_w: "height, width" or a pair. horizontal_flip: mirror half of the samples.
    aspect_buckets, in place of those: the middle of the image in the nearest of several sizes (`buckets.Buckets`, a
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
        """Return the shorter side that decoding has to keep: that of a resize which comes first."""
        if self.buckets:  # an image's own bucket asks for no more than this
            return self.buckets.resolution + self.buckets.step
        return self._steps[0][1] if self._steps and self._steps[0][0] == "resize_smallest_side" else None

    @property
    def size(self) -> tuple[int, int] | None:
        """Return (height, width) of every result, None if images keep their own."""
        crops = [value for key, value in self._steps if key.endswith("crop_h_w")]
        return crops[-1] if crops and not self._resizes_last() else None

    @property
    def buckets(self) -> Buckets | None:
        """Return the sizes of the results, where they have several."""
        return next((value for key, value in self._steps if key == "aspect_buckets"), None)

    @property
    def is_random(self) -> bool:
        """Return whether two seeds can give two results."""
        return any(key == "random_crop_h_w" or (key == "horizontal_flip" and value) for key, value in self._steps)

    def __call__(self, image: Image.Image, rng_seed: int = 0) -> np.ndarray:
        """Transform an image.

        rng_seed: 64 bits, of this sample at this position of the run; everything random is a function of it.
        """
        scaled = Scaled.whole(np.array(image if image.mode == "RGB" else image.convert("RGB")))
        for number, (key, value) in enumerate(self._steps):
            scaled = APPLY[key](scaled, value, partial(integer_below, seed=rng_seed, stream=number))
        pixels = scaled.pixels()
        made = np.empty((3, *pixels.shape[:2]), np.float32)
        np.divide(np.ascontiguousarray(pixels.transpose(2, 0, 1)), np.float32(127.5), out=made)
        made -= np.float32(1)
        return made

    def decode(self, data: bytes | memoryview, rng_seed: int = 0) -> np.ndarray:
        """Return the same from a file's bytes, decoding no more of a large JPEG than is needed. Raises BadSample."""
        return self(decode_image(data, smallest_side=self.smallest_side), rng_seed)

    def describe(self) -> list[list[Any]]:
        """Return the steps in order, for a fingerprint, such as `[["resize_smallest_side", 512]]`."""
        return [[key, _plain(value)] for key, value in self._steps if value]

    def unflipped(self) -> "Transforms":
        """Return the same without mirroring."""
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


@dataclass(frozen=True)
class Scaled:
    """An image and the size it is to have, resized only when its pixels are wanted: a crop then resizes no more.

    source: (height, width, 3) uint8. size: (height, width) that all of it would have.
    """

    source: Pixels
    size: tuple[int, int]

    @classmethod
    def whole(cls, pixels: Pixels) -> "Scaled":
        return cls(pixels, (pixels.shape[0], pixels.shape[1]))

    def resized(self, height: int, width: int) -> "Scaled":
        """Return the same at another size."""
        return Scaled(self.pixels() if self.size != self.source.shape[:2] else self.source, (height, width))

    def pixels(self) -> Pixels:
        return _resized(self.source, *self.size)

    def crop(self, top: int, left: int, size: tuple[int, int]) -> "Scaled":
        """Return a part of `size` of it. Of a strip only that part, and what its edges depend on, is resized."""
        if max(self.size) <= STRIP * min(self.size):
            return Scaled.whole(self.pixels()[top : top + size[0], left : left + size[1]])
        spans = [
            _span(start, length, wanted, had)
            for start, length, wanted, had in zip((top, left), size, self.size, self.source.shape[:2], strict=True)
        ]
        (low, high), (first, last) = spans
        scale_h, scale_w = (had / wanted for had, wanted in zip(self.source.shape[:2], self.size, strict=True))
        box = (first * scale_w, low * scale_h, last * scale_w, high * scale_h)
        part = Image.fromarray(self.source).resize((last - first, high - low), Image.Resampling.BICUBIC, box)
        return Scaled.whole(np.asarray(part)[top - low :, left - first :][: size[0], : size[1]])


def _span(start: int, length: int, wanted: int, had: int) -> tuple[int, int]:
    """Return the first and last pixel of a resized side on whose surroundings `length` of them from `start` depend."""
    margin = ceil(2 * max(1.0, wanted / had)) + 1  # a bicubic kernel reaches over two pixels of the coarser grid
    return max(0, start - margin), min(wanted, start + length + margin)


def _resize_smallest_side(image: Scaled, side: int, draw: Draw) -> Scaled:
    shorter = min(image.size)
    return image.resized(*(side if length == shorter else int(side * length / shorter) for length in image.size))


def _center_crop(image: Scaled, size: tuple[int, int], draw: Draw) -> Scaled:
    spare_h, spare_w = _spare(image, size)
    return image.crop(round(spare_h / 2), round(spare_w / 2), size)


def _random_crop(image: Scaled, size: tuple[int, int], draw: Draw) -> Scaled:
    spare_h, spare_w = _spare(image, size)
    top, left = divmod(draw((spare_h + 1) * (spare_w + 1)), spare_w + 1)
    return image.crop(top, left, size)


def _flip(image: Scaled, enabled: bool, draw: Draw) -> Scaled:
    return Scaled(image.source[:, ::-1], image.size) if enabled and draw(2) else image


def _to_bucket(image: Scaled, buckets: Buckets, draw: Draw) -> Scaled:
    """Return an image just large enough for the bucket, then its middle."""
    had = image.size
    size = buckets.sizes[buckets.number_of(*had)]
    scale = max(wanted / length for wanted, length in zip(size, had, strict=True))
    height, width = (max(wanted, round(scale * length)) for wanted, length in zip(size, had, strict=True))
    return _center_crop(image.resized(height, width), size, draw)


APPLY: dict[str, Callable[[Scaled, Any, Draw], Scaled]] = {
    "resize_smallest_side": _resize_smallest_side,
    "center_crop_h_w": _center_crop,
    "random_crop_h_w": _random_crop,
    "horizontal_flip": _flip,
    "aspect_buckets": _to_bucket,
}


def _resized(pixels: Pixels, height: int, width: int) -> Pixels:
    """Return pixels resized, bicubic with antialias. PyTorch's for bytes gives Pillow's values, to 2 of 255, in a
    quarter of its time."""
    if pixels.shape[:2] == (height, width):
        return pixels
    import torch

    batch = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(batch, (height, width), mode="bicubic", antialias=True)
    made: Pixels = resized[0].permute(1, 2, 0).numpy()
    return made


def _spare(image: Scaled, size: tuple[int, int]) -> tuple[int, int]:
    height, width = image.size
    spare_h, spare_w = height - size[0], width - size[1]
    if spare_h < 0 or spare_w < 0:
        detail = f"an image of {height}x{width} (height x width) is too small for a crop of {size[0]}x{size[1]}"
        raise BadSample("too small", f"{detail}; put resize_smallest_side before the crop")
    return spare_h, spare_w


def _checked(key: str, value: Any) -> Any:
    """Return the value of one augmentation in its canonical type; BadInput if key or value is wrong."""
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
