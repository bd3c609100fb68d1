"""Repaint only the region around a mask, at the full size of an image: the web UI's "inpaint at full resolution"."""

from dataclasses import dataclass

from PIL import Image, ImageOps

from latentsmith.files.errors import BadInput


@dataclass(frozen=True, eq=False)
class MaskedRegion:
    """The part of an image that is repainted. box: (left, top, right, bottom), in pixels."""

    image: Image.Image
    mask: Image.Image
    box: tuple[int, int, int, int]

    def cropped(self, size: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
        """Return the region of image and mask, resized to (width, height)."""
        return self.image.crop(self.box).resize(size), self.mask.crop(self.box).resize(size)

    def paste(self, repainted: Image.Image) -> Image.Image:
        """Return the whole image with the repainted region in it, blended by the mask."""
        left, top, right, bottom = self.box
        whole = self.image.convert("RGB")
        layer = whole.copy()
        layer.paste(repainted.resize((right - left, bottom - top)), self.box)
        return Image.composite(layer, whole, self.mask)


def masked_region(image: Image.Image, mask: Image.Image, padding: int, size: tuple[int, int]) -> MaskedRegion:
    """Return the region around what is not black in a mask, widened by padding and to the aspect of (width, height).

    Raises BadInput for a mask that is black all over.
    """
    if (found := mask.getbbox()) is None:
        raise BadInput("the mask is black all over: nothing is to be repainted")
    upright = ImageOps.exif_transpose(image)
    horizontal, vertical = (widened(found[axis], found[axis + 2], padding, upright.size[axis], 0) for axis in (0, 1))
    width, height = horizontal[1] - horizontal[0], vertical[1] - vertical[0]
    horizontal = widened(*horizontal, 0, upright.width, round(height * size[0] / size[1]))
    vertical = widened(*vertical, 0, upright.height, round(width * size[1] / size[0]))
    return MaskedRegion(upright, mask, (horizontal[0], vertical[0], horizontal[1], vertical[1]))


def widened(start: int, end: int, padding: int, limit: int, length: int) -> tuple[int, int]:
    """Return an interval with padding at both ends and at least `length` long, as far as 0 to limit allows."""
    start, end = max(0, start - padding), min(limit, end + padding)
    if end - start >= length:
        return start, end
    length = min(length, limit)
    start = min(max(0, (start + end - length) // 2), limit - length)
    return start, start + length
