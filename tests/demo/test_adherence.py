from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from latentsmith.demo.adherence import ATTRIBUTES, UNREADABLE, Reading, SceneReader, to_lab
from latentsmith.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    draw,
    sample_scenes,
    to_bytes,
)

VALUES = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "position": POSITIONS, "background": BACKGROUNDS}


@pytest.fixture(scope="module")
def reader():
    return SceneReader()


@pytest.fixture(scope="module")
def scenes():
    return sample_scenes(400, seed=11)


@pytest.fixture(scope="module")
def images(scenes):
    return [draw(scene) for scene in scenes]


def spoiled(image, seed, blur=0.7, noise=6.0):
    """Gaussian blur and Gaussian noise, of these standard deviations in pixels and 0..255."""
    offsets = np.arange(-8, 9)
    kernel = np.exp(-((offsets / blur) ** 2) / 2)
    image = np.pad(image.astype(float), ((8, 8), (8, 8), (0, 0)), mode="edge")
    for axis in (0, 1):
        image = np.apply_along_axis(np.convolve, axis, image, kernel / kernel.sum(), mode="valid")
    return to_bytes(image + np.random.default_rng(seed).normal(0, noise, image.shape))


def test_drawings_read_as_what_they_are(reader, images, scenes):
    result = reader.adherence(images, scenes)
    assert result.count == 400
    assert result.all_right >= 0.995


def test_light_blur_and_noise_hardly_matter(reader, images, scenes):
    result = reader.adherence([spoiled(image, index) for index, image in enumerate(images[:200])], scenes[:200])
    assert result.all_right >= 0.97


def test_heavy_blur_loses_shapes_not_positions(reader, images, scenes):
    result = reader.adherence([spoiled(image, 0, blur=3) for image in images[:50]], scenes[:50])
    assert result.shape < 0.6 and result.position > 0.9


@pytest.mark.parametrize("side", [48, 128])
def test_images_of_other_sizes(reader, scenes, side):
    assert reader.adherence([draw(scene, side) for scene in scenes[:60]], scenes[:60]).all_right >= 0.98


def test_shuffled_images_score_chance(reader, images, scenes):
    """Each attribute by itself as often as two independent draws of it agree, within four standard deviations."""
    result = reader.adherence(images[1:] + images[:1], scenes)
    for name in ATTRIBUTES:
        chance = 1 / len(VALUES[name])
        assert abs(getattr(result, name) - chance) < 4 * (chance * (1 - chance) / 400) ** 0.5, name
    assert result.all_right <= 0.01


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_wrong_value_is_caught(reader, scenes, name):
    """Change one attribute of the image to each other value: that attribute turns wrong, the others stay right."""
    for scene in scenes[:12]:
        for value in VALUES[name]:
            wrong = replace(scene, **{name: value})
            result = reader.adherence([draw(wrong)], [scene])
            right = {other: getattr(result, other) == 1 for other in ATTRIBUTES}
            assert right == {other: other != name or value == getattr(scene, name) for other in ATTRIBUTES}


def test_each_value_of_each_attribute_reads_back(reader):
    """All colours on all backgrounds, and all shapes at all positions and sizes."""
    plain = Scene("red", "circle", "large", "center", "white")
    for colour in COLOURS:
        for background in BACKGROUNDS:
            scene = replace(plain, colour=colour, background=background)
            assert reader.read_scene(draw(scene)) == Reading(*(getattr(scene, name) for name in ATTRIBUTES))
    for shape in SHAPES:
        for position in POSITIONS:
            for size in SIZES:
                scene = replace(plain, shape=shape, position=position, size=size)
                assert reader.read_scene(draw(scene)) == Reading(*(getattr(scene, name) for name in ATTRIBUTES))


def image_of(mask, colour=COLOURS["red"]):
    return to_bytes(255 + (np.array(colour) - 255.0) * np.asarray(mask, dtype=float)[..., None])


Y, X = np.mgrid[:64, :64] - 31.5
DISC = X**2 + Y**2 < 15**2


def test_smudges_and_nonsense_are_unreadable(reader):
    smudge = reader.read_scene(image_of(np.exp(-(X**2 + Y**2) / (2 * 8**2))))
    assert smudge.colour == smudge.shape == UNREADABLE
    assert reader.read_scene(np.full((64, 64, 3), 255, np.uint8)) == Reading(background="white")
    noise = reader.read_scene(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert noise.colour == noise.background == UNREADABLE
    for mask in [DISC & (X < 0), (X / 15) ** 2 + (Y / 10) ** 2 < 1, abs(X) + abs(Y) < 15, abs(abs(X) - 14) < 5]:
        assert reader.read_scene(image_of(mask)).shape == UNREADABLE


def test_colours_that_have_no_name_are_unreadable(reader):
    assert reader.read_scene(image_of(DISC, (120, 80, 40))).colour == UNREADABLE
    two = image_of(DISC)
    two[DISC & (X < 0)] = COLOURS["blue"]
    assert reader.read_scene(two).colour == UNREADABLE
    assert reader.read_scene(np.full((64, 64, 3), (90, 160, 90), np.uint8)).background == UNREADABLE


def test_between_two_sizes_or_positions_is_neither(reader):
    assert reader.read_scene(image_of(X**2 + Y**2 < 13.55**2)).size == UNREADABLE
    assert reader.read_scene(image_of((X - 7) ** 2 + (Y - 7) ** 2 < 15**2)).position == UNREADABLE


def test_a_second_object_spoils_the_shape(reader):
    assert reader.read_scene(image_of(DISC | ((X - 24) ** 2 + (Y - 24) ** 2 < 7**2))).shape == UNREADABLE


def test_a_stray_pixel_does_not(reader):
    image = image_of(DISC)
    image[2, 60] = 0
    assert reader.read_scene(image) == Reading("red", "circle", "large", "center", "white")


def test_lab_is_scikit_images():
    skimage_color = pytest.importorskip("skimage.color")
    colours = np.random.default_rng(0).integers(0, 256, (100, 1, 3), dtype=np.uint8)
    assert abs(to_lab(colours) - skimage_color.rgb2lab(colours)).max() < 0.01


def test_printed_result(reader, images, scenes):
    assert str(reader.adherence(images[:10], scenes[:10])).startswith("all right 100.0% (colour 100.0%, shape 100.0%")


def test_shares_count_what_they_say(reader, images, scenes):
    shown = Counter(scene.colour for scene in scenes)
    lies = [replace(scene, colour="red") for scene in scenes]
    result = reader.adherence(images, lies)
    assert result.colour == result.all_right == shown["red"] / 400
