"""Measure whether generated images follow their prompts: read a scene's five attributes from the pixels alone.

The background is read at the border, the object is what differs from it, its colour is read at its core, and its shape,
size and position come from fitting each known shape to it. An attribute that matches nothing well is `unreadable`,
which is never right, so a smudge scores nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from .scenes import BACKGROUNDS, COLOURS, OFFSET, POSITIONS, SIZES, Scene, shape_masks

UNREADABLE = "unreadable"

LEAST_CONTRAST = 45.0  # length in 0..255 RGB between background and object; noise stays below, every colour above
LEAST_AREA = 0.008  # of the image: about a third of the smallest shape
LEAST_OVERLAP = 0.85  # intersection over union with the fitted shape; two different shapes reach 0.842
LEAST_PURE = 0.7  # share of the pixels of the object's core, and of the border, that have its colour
SIZE_TOLERANCE = 1.15  # a half width this many times off is of neither size


@dataclass(frozen=True)
class Reading:
    """The name of each attribute's value, or UNREADABLE."""

    colour: str = UNREADABLE
    shape: str = UNREADABLE
    size: str = UNREADABLE
    position: str = UNREADABLE
    background: str = UNREADABLE


ATTRIBUTES = tuple(field.name for field in fields(Reading))


@dataclass(frozen=True)
class Adherence:
    """Shares of `count` images, in [0, 1], whose reading equals their prompt; all_right: in all five attributes."""

    count: int
    colour: float
    shape: float
    size: float
    position: float
    background: float
    all_right: float

    def __str__(self) -> str:
        shares = ", ".join(f"{name} {getattr(self, name):.1%}" for name in ATTRIBUTES)
        return f"all right {self.all_right:.1%} ({shares}; {self.count} images)"


class SceneReader:
    """Reads scenes: the names of their colours, shapes, sizes, positions and backgrounds."""

    def __init__(self) -> None:
        self.palette = {name: to_lab(np.array(colour)) for name, colour in COLOURS.items()}
        self.backgrounds = {name: to_lab(np.array(colour)) for name, colour in BACKGROUNDS.items()}
        self.shapes = {name: ShapeTemplate(mask) for name, mask in shape_masks().items()}
        self.sizes = {name: np.array([np.log(half_width)]) for name, half_width in SIZES.items()}
        self.positions = {name: OFFSET * np.array(corner) for name, corner in POSITIONS.items()}

    def read_scene(self, image: np.ndarray) -> Reading:
        """Read the objects of an image: uint8 (height, width, 3), square or nearly so."""
        pixels = image.astype(np.float64)
        ground = np.median(border(pixels), axis=0)
        background = self._colour_of(border(pixels), ground, self.backgrounds)
        solid = solid_part(pixels, ground)
        if solid.mean() < LEAST_AREA:
            return Reading(background=background)
        core = eroded(solid)
        core = core if core.any() else solid
        colour = np.median(pixels[core], axis=0)
        mask = sharpened(covered(pixels, ground, colour))
        fits = {name: shape.fit(mask) for name, shape in self.shapes.items()}
        shape = max(fits, key=lambda name: fits[name].overlap)
        fit = fits[shape]
        return Reading(
            colour=self._colour_of(pixels[core], colour, self.palette),
            shape=shape if fit.overlap >= LEAST_OVERLAP else UNREADABLE,
            size=nearest(np.log([fit.half_width]), self.sizes, np.log(SIZE_TOLERANCE)),
            position=nearest(fit.middle, self.positions, 0.4 * least_distance(self.positions)),
            background=background,
        )

    def _colour_of(self, pixels: np.ndarray, colour: np.ndarray, named: Mapping[str, np.ndarray]) -> str:
        """Return the name of a colour if most of the pixels (n, 3) have it, within half the way to any other name's."""
        reach = least_distance(named) / 2
        pure = np.linalg.norm(to_lab(pixels) - to_lab(colour), axis=-1) < max(reach, 20)
        return nearest(to_lab(colour), named, reach) if pure.mean() >= LEAST_PURE else UNREADABLE

    def adherence(self, images: Sequence[np.ndarray], scenes: Sequence[Scene]) -> Adherence:
        """Return how often images[i] shows scenes[i]; at least one of each, equally many."""
        assert len(images) == len(scenes) > 0, f"{len(images)} images for {len(scenes)} scenes"
        pairs = [(self.read_scene(image), scene) for image, scene in zip(images, scenes, strict=True)]
        right = np.array(
            [[getattr(reading, name) == getattr(scene, name) for name in ATTRIBUTES] for reading, scene in pairs]
        )
        shares = dict(zip(ATTRIBUTES, right.mean(axis=0).tolist(), strict=True))
        return Adherence(count=len(scenes), all_right=float(right.all(axis=1).mean()), **shares)


@dataclass(frozen=True)
class Fit:
    """A shape fitted to an object, lengths in fractions of the image's side."""

    overlap: float  # intersection over union, in [0, 1]
    middle: np.ndarray  # (2,): x, y of the middle of the shape's frame, from the image's middle
    half_width: float


class ShapeTemplate:
    """A shape to fit to an object of any size and position.

    mask: (n, n) in [0, 1], the shape in the frame [-1, 1] x [-1, 1].
    """

    def __init__(self, mask: np.ndarray) -> None:
        self.mask = np.asarray(mask)
        self.area, self.centroid = moments(self.mask, -1, 2)

    def fit(self, mask: np.ndarray) -> Fit:
        """Fit the shape to a mask (height, width), in [0, 1], so that areas and centroids agree."""
        area, centroid = moments(mask, -0.5, 1)
        half_width = (area / self.area) ** 0.5
        middle = centroid - half_width * self.centroid
        drawn = self.drawn(mask.shape, middle, half_width)
        return Fit(float(np.minimum(drawn, mask).sum() / np.maximum(drawn, mask).sum()), middle, half_width)

    def drawn(self, shape: tuple[int, ...], middle: np.ndarray, half_width: float) -> np.ndarray:
        """Return the shape drawn at a position, (height, width), from 3 x 3 points a pixel."""
        height, width = shape
        columns = self._cells((np.arange(3 * width) + 0.5) / (3 * width) - 0.5, middle[0], half_width)
        rows = self._cells((np.arange(3 * height) + 0.5) / (3 * height) - 0.5, middle[1], half_width)
        points = np.pad(self.mask, 1)[np.ix_(rows, columns)]
        return sharpened(points.reshape(height, 3, width, 3).mean(axis=(1, 3)))

    def _cells(self, axis: np.ndarray, middle: float, half_width: float) -> np.ndarray:
        """Return each point's index into the padded mask; points outside fall on the padding."""
        side = len(self.mask)
        return np.clip(np.floor(((axis - middle) / half_width + 1) / 2 * side).astype(int) + 1, 0, side + 1)


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """Return CIE L*a*b*, white D65, of sRGB values 0..255 in the last axis; distances in it match visible differences.

    Source: IEC 61966-2-1 (sRGB), CIE 15 (Lab).
    """
    value = np.asarray(rgb) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
    xyz = linear @ to_xyz.T / (0.95047, 1.0, 1.08883)
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = root[..., 0], root[..., 1], root[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def border(pixels: np.ndarray) -> np.ndarray:
    """Return the outermost 1/32 of the image on every side, (n, 3), which no object covers by much."""
    height, width = pixels.shape[:2]
    inside = np.zeros((height, width), dtype=bool)
    edge = max(1, min(height, width) // 32)
    inside[edge:-edge, edge:-edge] = True
    return pixels[~inside]


def solid_part(pixels: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Return where the image is nearer to its object than to its background, bool (height, width)."""
    contrast = np.linalg.norm(pixels - ground, axis=-1)
    differs = contrast > LEAST_CONTRAST
    return contrast > 0.5 * np.percentile(contrast[differs], 80) if differs.any() else differs


def covered(pixels: np.ndarray, ground: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Return each pixel's distance from the background in units of the object's, (height, width)."""
    return np.linalg.norm(pixels - ground, axis=-1) / max(float(np.linalg.norm(colour - ground)), 1.0)


def sharpened(mask: np.ndarray) -> np.ndarray:
    """Stretch the middle half of [0, 1] over all of it: values below are noise, and blur counts less."""
    return np.clip(2 * mask - 0.5, 0, 1)


def eroded(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of a bool mask whose four neighbours are in it too."""
    padded = np.pad(mask, 1)
    sides = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & sides


def moments(mask: np.ndarray, start: float, length: float) -> tuple[float, np.ndarray]:
    """Return area and centroid (x, y) of a mask whose sides run from `start` over `length`."""
    height, width = mask.shape
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    total = mask.sum()
    centroid = np.array([(mask.sum(axis=0) @ x) / total, (mask.sum(axis=1) @ y) / total])
    return float(total / mask.size * length**2), start + length * centroid


def nearest(point: np.ndarray, named: Mapping[str, np.ndarray], reach: float) -> str:
    """Return the name at the least distance from the point, UNREADABLE beyond reach."""
    distances = {name: float(np.linalg.norm(point - position)) for name, position in named.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= reach else UNREADABLE


def least_distance(named: Mapping[str, np.ndarray]) -> float:
    """Return the distance of the two points nearest to each other."""
    points = np.array(list(named.values()))
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    return float(distances[~np.eye(len(points), dtype=bool)].min())
