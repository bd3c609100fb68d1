"""Images for the data tests: real photographs that scikit-image and scikit-learn ship, and small ones made here."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def _png(size=(40, 30), seed=0, mode="RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def png():
    """A function (size, seed, mode) -> the bytes of a small PNG of noise."""
    return _png


@pytest.fixture
def photographs() -> dict[str, Path]:
    """Photographs by file name, among them grey, RGBA and palette ones, an animated GIF and a multi-page TIFF."""
    skimage = pytest.importorskip("skimage")
    sklearn = pytest.importorskip("sklearn")
    folders = [Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images"]
    names = ("*.jpg", "*.png", "*.gif", "*.tif")
    return {path.name: path for folder in folders for name in names for path in sorted(folder.glob(name))}
