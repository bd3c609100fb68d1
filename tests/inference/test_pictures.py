"""Pictures to tensors and back, tiles, noise."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from latentsmith.files.errors import BadInput
from latentsmith.inference.images import based_on, from_picture, tiled, to_picture
from latentsmith.inference.noise import mixed_noise


def picture(height=16, width=24, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_there_and_back():
    assert (np.asarray(to_picture(from_picture(picture()))) == np.asarray(picture())).all()
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (from_picture(clear) == 1).all()
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    deep = from_picture(Image.fromarray(ramp))
    assert abs(deep - torch.from_numpy(ramp / 65535 * 2 - 1)).max() < 0.005


def test_what_is_no_picture():
    assert "not finite" in to_picture(torch.full((3, 8, 8), float("inf")))
    assert "black all over" in to_picture(torch.full((3, 8, 8), -1.0))
    assert to_picture(torch.zeros(3, 8, 8)).size == (8, 8)


def test_bases():
    assert based_on(None, None, 2, None, None, 8) == [None, None]
    one, other = based_on(picture(), None, 2, None, None, 8)
    assert one is other and one.size == (16, 24) and one.mask is None
    mask = Image.new("L", (24, 16))
    mask.putpixel((9, 2), 255)
    (base,) = based_on(picture(), mask, 1, None, None, 8)
    assert base.latent_mask.tolist() == [[[0, 1, 0], [0, 0, 0]]]
    drawn = torch.zeros(3, 16, 24)
    around = base.around(drawn)
    assert (around[:, 2, 9] == 0).all() and (around != base.image).any(0).sum() == 1
    see_through = Image.new("RGBA", (24, 16), (255, 255, 255, 0))
    see_through.putpixel((9, 2), (255, 255, 255, 255))
    assert torch.equal(based_on(picture(), see_through, 1, None, None, 8)[0].mask, base.mask)
    (cropped,) = based_on(picture(30, 30), None, 1, 16, 16, 8)
    assert cropped.size == (16, 16)


@pytest.mark.parametrize(
    ("image", "mask", "line"),
    [
        (None, Image.new("L", (8, 8)), "a mask without a picture"),
        (picture(), Image.new("L", (16, 24)), "the mask is 24x16, the picture 16x24; make them one size"),
        (picture(17, 24), None, "a picture of 17x24 to start from does not divide by 8; give height and width"),
        ([picture(), picture(8, 8)], None, "the pictures to start from are of several sizes"),
    ],
)
def test_bases_that_cannot_be(image, mask, line):
    with pytest.raises(BadInput, match=line):
        based_on(image, mask, 2, None, None, 8)


@pytest.mark.parametrize("scale", [Fraction(2), Fraction(1, 2), Fraction(1)])
@pytest.mark.parametrize("size", [(8, 8), (20, 12), (9 * 2, 40)])
def test_tiles_of_a_local_function_are_the_whole(scale, size):
    """Pooling and repeating look at no neighbours, so tiles change nothing; the memory of a call is bounded."""
    seen = []

    def run(piece):
        seen.append(tuple(piece.shape[2:]))
        if scale == 2:
            return F.interpolate(piece, scale_factor=2) * 3
        return F.avg_pool2d(piece, 2) if scale < 1 else piece**2

    tensor = torch.randn(2, 3, *size)
    found = tiled(run, tensor, scale, tile=8, overlap=4)
    assert all(max(shape) <= 8 for shape in seen)
    torch.testing.assert_close(found, run(tensor))


def test_mixed_noise_is_unit_noise():
    generator = torch.Generator().manual_seed(0)
    own, other = (torch.randn(4, 64, 64, generator=generator) for _ in range(2))
    assert torch.equal(mixed_noise(own, other, 0), own)
    torch.testing.assert_close(mixed_noise(own, other, 1.0), other, rtol=0, atol=1e-4)
    half = mixed_noise(own, other, 0.5)
    assert abs(half.std() - 1) < 0.02
    assert (half - own).norm().item() == pytest.approx((half - other).norm().item(), rel=0.02)
    assert torch.equal(mixed_noise(own, own, 0.5), own)
