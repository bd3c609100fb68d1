"""Images to tensors and back, images to start from, tiles."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from latentsmith.files.errors import BadInput
from latentsmith.image_request import ImageRequest
from latentsmith.inference.images import from_image, prepare_init_images, tiled, to_image
from latentsmith.inference.requests import mixed_noise


def image_of(height=16, width=24, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_there_and_back():
    assert (np.asarray(to_image(from_image(image_of()))) == np.asarray(image_of())).all()
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (from_image(clear) == 1).all()
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    deep = from_image(Image.fromarray(ramp))
    assert abs(deep - torch.from_numpy(ramp / 65535 * 2 - 1)).max() < 0.005


def test_failures_are_reported_in_place_of_an_image():
    assert "not finite" in to_image(torch.full((3, 8, 8), float("inf")))
    assert to_image(torch.full((3, 8, 8), -1.0)).getextrema() == ((0, 0),) * 3  # black is no failure
    assert to_image(torch.zeros(3, 8, 8)).size == (8, 8)


def prepared(images, masks=None, height=None, width=None):
    requests = [
        ImageRequest("a", image=image, mask_image=mask)
        for image, mask in zip(images, masks or [None] * len(images), strict=True)
    ]
    return prepare_init_images(requests, height, width, 8)


def test_images_to_start_from():
    assert prepared([None, None]) == [None, None]
    start = image_of()
    one, other = prepared([start, start])
    assert one is other and one.size == (16, 24) and one.mask is None
    mask = Image.new("L", (24, 16))
    mask.putpixel((9, 2), 255)
    (init_image,) = prepared([start], [mask])
    assert init_image.latent_mask.tolist() == [[[0, 1, 0], [0, 0, 0]]]
    around = init_image.around(torch.zeros(3, 16, 24))
    assert (around[:, 2, 9] == 0).all() and (around != init_image.image).any(0).sum() == 1
    see_through = Image.new("RGBA", (24, 16), (255, 255, 255, 0))
    see_through.putpixel((9, 2), (255, 255, 255, 255))
    assert torch.equal(prepared([start], [see_through])[0].mask, init_image.mask)
    (cropped,) = prepared([image_of(30, 30)], None, 16, 16)
    assert cropped.size == (16, 16)


def test_image_and_mask_of_one_camera(matrix_profile):
    """Both are stored upside down; as seen, the mask marks the upper half. The profile makes linear 128 sRGB 188."""
    exif = Image.Exif()
    exif[0x0112] = 3
    stored = Image.new("L", (16, 16))
    stored.paste(255, (0, 8, 16, 16))
    sides = [Image.new("RGB", (16, 16), (128, 128, 128)), stored]
    for each in sides:
        each.info["exif"] = exif.tobytes()
    sides[0].putpixel((15, 15), (0, 0, 0))  # as seen, the first pixel
    sides[0].info["icc_profile"] = matrix_profile(1.0)
    (made,) = prepared(sides[:1], sides[1:])
    assert made.mask[0, :8].eq(1).all() and made.mask[0, 8:].eq(0).all()
    assert made.image[:, 0, 0].eq(-1).all() and abs(made.image[:, 5:] * 127.5 + 127.5 - 188).max() <= 1


@pytest.mark.parametrize(
    ("images", "masks", "line"),
    [
        ([None], [Image.new("L", (8, 8))], "a mask without an image"),
        ([image_of()], [Image.new("L", (16, 24))], "the mask is 24x16, the image 16x24; make them one size"),
        ([image_of(17, 24)], None, "an image of 17x24 to start from does not divide by 8; give height and width"),
        ([image_of(), image_of(8, 8)], None, "the images to start from are of several sizes"),
        ([image_of(), None], None, "some requests of a call have an image to start from and some have none"),
    ],
)
def test_images_that_cannot_be_started_from(images, masks, line):
    with pytest.raises(BadInput, match=line):
        prepared(images, masks)


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
