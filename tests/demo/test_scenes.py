import hashlib
from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from PIL import Image

from latentsmith.demo import scenes
from latentsmith.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    caption,
    draw,
    draw_doodle,
    sample_scenes,
    scene_at,
    shape_masks,
    write_scenes,
)
from latentsmith.files.errors import BadInput


def test_a_scene_depends_on_seed_and_index_alone():
    backwards = [scene_at(7, index) for index in reversed(range(50))]
    assert sample_scenes(50, 7) == backwards[::-1]
    assert scene_at(7, 3) != scene_at(8, 3) != scene_at(7, 4)


def test_held_out_pairs_are_one_of_each_and_never_drawn_for_training():
    assert len(HELD_OUT) == 6
    assert {colour for colour, _ in HELD_OUT} == set(COLOURS) and {shape for _, shape in HELD_OUT} == set(SHAPES)

    def pairs(held_out):
        return {(scene.colour, scene.shape) for scene in sample_scenes(1500, 0, held_out)}

    assert pairs(True) == set(HELD_OUT)
    assert len(pairs(False)) == 30 and not pairs(False) & set(HELD_OUT)
    assert len(pairs(None)) == 36


@pytest.mark.parametrize("attribute, choices", [("size", 2), ("position", 5), ("background", 4), ("colour", 6)])
def test_values_are_drawn_evenly(attribute, choices):
    counts = Counter(getattr(scene, attribute) for scene in sample_scenes(3600, 1))
    assert len(counts) == choices
    assert max(abs(count - 3600 / choices) for count in counts.values()) < 5 * (3600 / choices) ** 0.5


def test_captions():
    scene = Scene("red", "circle", "large", "top left", "white")
    assert caption(scene) == "a large red circle at the top left on a white background"
    assert caption(replace(scene, position="center")) == "a large red circle in the center on a white background"
    every = product(COLOURS, SHAPES, SIZES, POSITIONS, BACKGROUNDS)
    assert len({caption(Scene(*values)) for values in every}) == 36 * 2 * 5 * 4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("position", POSITIONS)
def test_the_largest_object_stays_inside_wherever_jitter_puts_it(shape, position):
    for shift in [(-1, -1), (1, -1), (-1, 1), (1, 1)]:
        moved = tuple(scenes.MAX_SHIFT * part for part in shift)
        image = draw(Scene("red", shape, "large", position, "white", moved, 1 + scenes.MAX_SCALE))
        edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (edge == 255).all()
        assert (image == COLOURS["red"]).all(axis=-1).any()


AREAS = {  # in units of the half width squared, from elementary geometry
    "circle": np.pi,
    "square": (2 * 0.86) ** 2,
    "triangle": 3**0.5,
    "heart": (4 / (2 + 2**0.5)) ** 2 * (1 + np.pi / 4),
    "cross": 2 * 2 * 0.72 - 0.72**2,
    "ring": np.pi * (1 - 0.52**2),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_antialiased_area_is_the_geometric_one(shape, size):
    """Black on white, so what is missing of the white is the coverage."""
    image = draw(Scene("black", shape, size, "center", "white"))
    covered = (255 - image[..., 0].astype(float)).sum() / (255 - COLOURS["black"][0])
    assert covered == pytest.approx(AREAS[shape] * (SIZES[size] * 64) ** 2, rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_fill_their_frame_and_only_their_frame(shape):
    mask = shape_masks(200)[shape]
    assert mask.shape == (200, 200) and mask.min() == 0 and mask.max() == 1
    columns = np.flatnonzero(mask.max(axis=0) > 0.5)
    assert columns[0] + columns[-1] == 199  # symmetric
    half_width = (columns[-1] - columns[0] + 1) / 200
    assert 0.85 <= half_width <= 1.0


def test_antialiasing_agrees_with_counting_points():
    """Every pixel's coverage against 8 x 8 points in it: the image drawn 8 times as large, above a half or not."""
    for index in range(10):
        scene = replace(scene_at(2, index), background="white", background_tint=(0, 0, 0))
        colour = np.add(COLOURS[scene.colour], scene.tint).clip(0, 255)
        channel = int(colour.argmin())
        contrast = 255.0 - colour[channel]
        inside = 255.0 - draw(scene, 512)[..., channel] > contrast / 2
        counted = inside.reshape(64, 8, 64, 8).mean(axis=(1, 3))
        drawn = (255.0 - draw(scene, 64)[..., channel]) / contrast
        assert abs(drawn - counted).max() < 0.4  # corners: one distance knows one edge
        assert abs(drawn - counted).mean() < 0.003


def test_doodles_are_reproducible_and_varied():
    images = [draw_doodle(3, index, 32) for index in range(60)]
    assert all(image.shape == (32, 32, 3) and image.dtype == np.uint8 for image in images)
    assert (draw_doodle(3, 59, 32) == images[59]).all()
    assert len({hashlib.sha256(image.tobytes()).hexdigest() for image in images}) == 60
    assert np.mean([len(np.unique(image.reshape(-1, 3), axis=0)) > 8 for image in images]) > 0.9


def checksum(arrays):
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def test_images_never_change():
    """The demo's figures and the VAE that comes with the package were made of these pixels."""
    assert checksum(draw(scene_at(5, index)) for index in range(300)) == "add67643356399ad"
    assert checksum(draw_doodle(5, index) for index in range(60)) == "01f1746d006fd4ac"


def test_written_scenes_read_back(tmp_path):
    write_scenes(tmp_path / "new" / "folder", 12, seed=5)
    files = sorted(tmp_path.glob("new/folder/*"))
    assert [file.name for file in files[:2]] == ["scene-000000.png", "scene-000000.txt"] and len(files) == 24
    for index, (image, text) in enumerate(zip(files[::2], files[1::2], strict=True)):
        scene = scene_at(5, index, held_out=False)
        assert (np.asarray(Image.open(image)) == draw(scene)).all()
        assert text.read_text(encoding="utf-8") == caption(scene) + "\n"


def test_written_for_training_means_nothing_held_out(tmp_path):
    write_scenes(tmp_path, 300, seed=0, doodles=0.1, size=8)
    texts = [file.read_text() for file in tmp_path.glob("scene-*.txt")]
    assert len(texts) == 270
    assert not [text for text in texts for colour, shape in HELD_OUT if f" {colour} {shape} " in text]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_share_of_doodles(tmp_path, share):
    write_scenes(tmp_path, 20, seed=0, doodles=share, size=16)
    assert len(list(tmp_path.glob("doodle-*.png"))) == 20 * share
    assert len(list(tmp_path.glob("*.png"))) == len(list(tmp_path.glob("*.txt"))) == 20


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(BadInput, match="taken: cannot make this folder"):
        write_scenes(tmp_path / "taken", 1, seed=0)
    assert (tmp_path / "taken").read_text() == "mine"
