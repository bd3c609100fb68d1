"""Synthetic captioned images drawn from signed distances: one object on a plain background, or a doodle of several.

A scene has five attributes (colour, shape, size, position, background) and a little jitter, so whether a generated
image follows its prompt can be measured from the pixels. Lengths are fractions of the image's side, x to the right, y
downwards, and a signed distance is negative inside. Image `index` of a set is a pure function of (seed, index).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from latentsmith.files.errors import BadInput

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "orange": (255, 135, 15),
    "green": (25, 160, 60),
    "blue": (40, 110, 240),
    "purple": (135, 45, 175),
    "black": (25, 25, 30),
}
# All paler than every colour above: an object then differs from its background in the same direction for every pair, so
# that a network learns the object's position before it has learnt colours.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "cream": (255, 236, 180),
    "sky": (176, 216, 250),
    "grey": (185, 185, 185),
}
SIZES = {"small": 11.5 / 64, "large": 15.75 / 64}  # half the width of the object's box
OFFSET = 13.5 / 64  # from the middle to a corner position, each way
POSITIONS = {
    "top left": (-1, -1), "top right": (1, -1),
    "center": (0, 0),
    "bottom left": (-1, 1), "bottom right": (1, 1),
}  # fmt: skip
MAX_SHIFT = 1 / 64  # with MAX_SCALE a large object still ends 1/64 before the edge
MAX_SCALE = 0.04
MAX_TINT = 8  # of 255 in each channel


def circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 1


def square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(abs(x), abs(y)) - 0.86


def triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return an equilateral triangle, side 2, pointing up; centred by its box, like every shape here."""
    height = 3**0.5 / 2
    return np.maximum(y - height, height * abs(x) - (y + height) / 2)


def heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return a square standing on a corner, with a circle over each of its upper sides."""
    side = 4 / (2 + 2**0.5)  # makes the box 2 wide
    x, y = abs(x), y - 0.086
    tilted = (x + abs(y)) / 2**0.5 - side / 2
    lobe = np.hypot(x - side / 8**0.5, y + side / 8**0.5) - side / 2
    return np.minimum(tilted, lobe)


def cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = abs(x), abs(y)
    return np.maximum(np.maximum(x, y) - 1, np.minimum(x, y) - 0.36)


def ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return abs(np.hypot(x, y) - 0.76) - 0.24


def star_of(points: int, inner: float) -> Distance:
    """Return the distance of a star, its first point up, of radius 1 to the tips and `inner` to the notches.

    Folding the plane into half a point leaves one edge, whose line gives the distance.
    """
    half = np.pi / points

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        radius, angle = np.hypot(x, y), np.arctan2(x, -y)
        angle = abs((angle + half) % (2 * half) - half)
        along, across = radius * np.cos(angle), radius * np.sin(angle)
        edge = np.array([inner * np.cos(half) - 1, inner * np.sin(half)])
        beside = ((along - 1) * edge[1] - across * edge[0]) / np.hypot(*edge)
        return np.maximum(beside, radius - 1)  # the line alone stays near for more than a pixel past a sharp tip

    return distance


SHAPES: dict[str, Distance] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "heart": heart,
    "cross": cross,
    "ring": ring,
}
# Never drawn for training; every colour and every shape occurs once, so that training shows each in other pairs.
HELD_OUT = tuple(zip(COLOURS, ("circle", "cross", "heart", "triangle", "ring", "square"), strict=True))
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
TRAINING_PAIRS = tuple(pair for pair in PAIRS if pair not in HELD_OUT)


@dataclass(frozen=True)
class Scene:
    """The content of an image: five names of the tables above, and jitter too small to change which name is right."""

    colour: str
    shape: str
    size: str
    position: str
    background: str
    shift: tuple[float, float] = (0.0, 0.0)  # (x, y) fractions of the side, within MAX_SHIFT
    scale: float = 1.0  # within 1 +- MAX_SCALE
    tint: tuple[int, int, int] = (0, 0, 0)  # added to the object's colour, within +- MAX_TINT
    background_tint: tuple[int, int, int] = (0, 0, 0)  # the same, cut at 0 and 255


def scene_at(seed: int, index: int, held_out: bool | None = None) -> Scene:
    """Return scene `index` of the set `seed`. held_out: no pair of HELD_OUT (False), only those (True) or any."""
    random = np.random.default_rng(np.random.SeedSequence([seed, index]))
    pairs = {None: PAIRS, False: TRAINING_PAIRS, True: HELD_OUT}[held_out]

    def one_of(names: list[str]) -> str:
        return names[random.integers(len(names))]

    def tint() -> tuple[int, int, int]:
        red, green, blue = random.integers(-MAX_TINT, MAX_TINT, 3, endpoint=True).tolist()
        return red, green, blue

    colour, shape = pairs[random.integers(len(pairs))]
    size, position, background = one_of(list(SIZES)), one_of(list(POSITIONS)), one_of(list(BACKGROUNDS))
    right, down = random.uniform(-MAX_SHIFT, MAX_SHIFT, 2).tolist()
    scale = 1 + float(random.uniform(-MAX_SCALE, MAX_SCALE))
    return Scene(colour, shape, size, position, background, (right, down), scale, tint(), tint())


def sample_scenes(count: int, seed: int, held_out: bool | None = None) -> list[Scene]:
    return [scene_at(seed, index, held_out) for index in range(count)]


def caption(scene: Scene) -> str:
    """Return a caption such as "a large red circle at the top left on a white background"."""
    position = f"{'in' if scene.position == 'center' else 'at'} the {scene.position}"
    return f"a {scene.size} {scene.colour} {scene.shape} {position} on a {scene.background} background"


def draw(scene: Scene, size: int = 64) -> np.ndarray:
    """Return the image of a scene, uint8 (size, size, 3)."""
    column, row = POSITIONS[scene.position]
    radius = SIZES[scene.size] * scene.scale
    x, y = pixel_grid(size)
    x, y = (x - column * OFFSET - scene.shift[0]) / radius, (y - row * OFFSET - scene.shift[1]) / radius
    covered = coverage(SHAPES[scene.shape](x, y) * radius * size)
    background = np.clip(np.add(BACKGROUNDS[scene.background], scene.background_tint), 0, 255)
    colour = np.clip(np.add(COLOURS[scene.colour], scene.tint), 0, 255)
    return to_bytes(background + covered[..., None] * (colour - background))


def shape_masks(size: int = 64) -> dict[str, np.ndarray]:
    """Return each shape filling an image: how much of each pixel it covers, float64 (size, size) in [0, 1]."""
    x, y = (2 * axis for axis in pixel_grid(size))
    return {name: coverage(distance(x, y) * size / 2) for name, distance in SHAPES.items()}


def pixel_grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of the pixels' middles, each (size, size), in fractions of the side from the image's middle."""
    axis = (np.arange(size) + 0.5) / size - 0.5
    x, y = np.meshgrid(axis, axis)
    return x, y


def coverage(distance: np.ndarray) -> np.ndarray:
    """Return the share of each pixel inside a straight edge at this signed distance, in pixels, from its middle."""
    return np.clip(0.5 - distance, 0, 1)


def to_bytes(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def write_scenes(
    folder: str | Path,
    count: int,
    seed: int = 0,
    *,
    doodles: float = 0.0,
    size: int = 64,
    held_out: bool | None = False,
) -> None:
    """Write scene-000000.png with its caption in scene-000000.txt, and so on, `count` images in all.

    doodles: share of doodles among them (doodle-000001.png), spread evenly, for a set to train a general VAE on.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder}: cannot make this folder for images ({error.strerror}); name another") from error
    for index in range(count):
        if int((index + 1) * doodles) > int(index * doodles):
            name, image, text = "doodle", draw_doodle(seed, index, size), "a drawing"
        else:
            scene = scene_at(seed, index, held_out)
            name, image, text = "scene", draw(scene, size), caption(scene)
        path = folder / f"{name}-{index:06d}.png"
        Image.fromarray(image).save(path, compress_level=1)
        path.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")


def draw_doodle(seed: int, index: int, size: int = 64) -> np.ndarray:
    """Return an image like a sticker or a line drawing, uint8 (size, size, 3): one to six shapes on a background."""
    random = np.random.default_rng(np.random.SeedSequence([seed, index, 1]))  # 1: other numbers than scene `index`
    image = _background(random, size)
    ink = _random_colour(random) * random.choice([0.15, 0.5])  # all outlines of a doodle have one colour
    outlined = random.random() < 0.6
    for _ in range(random.integers(1, 7)):
        distance = _random_shape(random, size)
        width = random.uniform(0.6, 2.0) * size / 64
        colour = _shading(random, size)
        if random.random() < 0.25:
            image = _blend(image, colour, coverage(abs(distance) - 1.5 * width))
        else:
            image = _blend(image, colour, coverage(distance))
            if outlined:
                image = _blend(image, ink, coverage(abs(distance) - width))
    return to_bytes(image)


def _blend(below: np.ndarray, above: np.ndarray, covered: np.ndarray) -> np.ndarray:
    return below + covered[..., None] * (above - below)


def _random_colour(random: np.random.Generator) -> np.ndarray:
    """Return (3,) in 0..255: a third pastel, a third saturated, a tenth black, white or grey, the others anything."""
    colour, choice = random.uniform(0, 255, 3), random.random()
    if choice < 0.1:
        return np.full(3, random.choice([0.0, 255.0, colour[0]]))
    if choice < 0.4:
        return 160 + colour * 95 / 255
    if choice < 0.75:
        low, high = colour.min(), colour.max()
        return (colour - low) / max(high - low, 1.0) * 255 * random.uniform(0.7, 1)
    return colour


def _shading(random: np.random.Generator, size: int) -> np.ndarray:
    """Return one colour (3,), or a gradient (size, size, 3) between two similar ones."""
    colour = _random_colour(random)
    if random.random() < 0.65:
        return colour
    angle, (x, y) = random.uniform(0, 2 * np.pi), pixel_grid(size)
    share = np.clip(0.5 + x * np.cos(angle) + y * np.sin(angle), 0, 1)
    other = np.clip(colour + random.uniform(-110, 110, 3), 0, 255)
    return colour + share[..., None] * (other - colour)


def _background(random: np.random.Generator, size: int) -> np.ndarray:
    plain = random.random()
    if plain < 0.3:
        return np.full((size, size, 3), 255.0)
    if plain < 0.4:
        return np.zeros((size, size, 3))
    return np.zeros((size, size, 3)) + _shading(random, size)


def _random_shape(random: np.random.Generator, size: int) -> np.ndarray:
    """Return the signed distance in pixels, (size, size), of a random shape, randomly placed, scaled and turned."""
    radius, angle = random.uniform(0.06, 0.45), random.uniform(0, 2 * np.pi)
    right, down = random.uniform(-0.4, 0.4, 2)
    squeeze = random.uniform(0.45, 1.0)
    x, y = pixel_grid(size)
    x, y = (x - right) / radius, (y - down) / radius
    if random.random() < 0.5:
        x, y = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    value = _random_distance(random)(x / squeeze, y)
    # Squeezing steepens distances; value / |gradient| is right again where it matters, beside the outline.
    slope = np.hypot(*np.gradient(value))
    return value / np.maximum(slope, 1 / (radius * size))  # flatter only along a ridge


def _random_distance(random: np.random.Generator) -> Distance:
    star = star_of(int(random.integers(3, 9)), random.uniform(0.3, 0.9))
    choices = [*SHAPES.values(), circle, circle, star, _bar, _smile]
    return choices[random.integers(len(choices))]


def _bar(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(np.maximum(abs(x) - 1, 0), y) - 0.15


def _smile(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the lower half of a thin ring."""
    return np.maximum(abs(np.hypot(x, y) - 0.9) - 0.1, -y)
