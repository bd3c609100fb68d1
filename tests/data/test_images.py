import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch.nn.functional import interpolate

from latentsmith.data.errors import BadSample
from latentsmith.data.images import decode_image, load_image
from latentsmith.data.shuffle import integer_below
from latentsmith.data.transforms import Transforms
from latentsmith.files.colour import is_plain, to_srgb
from latentsmith.files.errors import BadInput

GRADIENT = np.stack(np.broadcast_arrays(np.arange(60)[:, None] * 4, np.arange(80) * 3, 128), -1).astype(np.uint8)


def saved(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(data: bytes, **options) -> np.ndarray:
    image = decode_image(data, **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_plain_formats():
    image = Image.fromarray(GRADIENT)
    for format, options in (("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        assert (pixels(saved(image, format, **options)) == GRADIENT).all(), format
    assert abs(pixels(saved(image, "JPEG", quality=95)) - GRADIENT).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    """Stored so that a viewer that obeys the tag shows the gradient upright (the table of the EXIF standard)."""
    undo = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1]}
    undo |= {5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 1)}
    undo |= {7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, -1)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](GRADIENT)))
    assert (pixels(saved(stored, exif=exif)) == GRADIENT).all()
    assert is_plain(load_image(saved(stored, exif=exif))) == (orientation == 1)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_garbled_exif_is_no_reason_to_refuse():
    data = saved(Image.fromarray(GRADIENT), "JPEG", exif=b"Exif\x00\x00II*\x00" + b"\xff" * 40)
    assert pixels(data).shape == GRADIENT.shape


def test_alpha_goes_over_white():
    alpha = np.broadcast_to(np.arange(80, dtype=np.uint8) * 3, (60, 80))
    rgba = np.dstack([GRADIENT, alpha])
    expected = (GRADIENT * (alpha / 255.0)[..., None] + 255 * (1 - alpha / 255.0)[..., None]).round()
    assert abs(pixels(saved(Image.fromarray(rgba))) - expected).max() <= 1
    grey = np.dstack([GRADIENT[..., 0], alpha])
    assert abs(pixels(saved(Image.fromarray(grey, "LA")))[..., 1] - expected[..., 0]).max() <= 1


def test_transparent_palette_and_colour_key():
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert pixels(saved(palette, transparency=1)).tolist() == [[[255, 0, 0], [255] * 3], [[255] * 3, [255, 0, 0]]]
    keyed = Image.fromarray(np.array([[[1, 2, 3], [9, 9, 9]]], np.uint8))
    assert pixels(saved(keyed, transparency=(1, 2, 3))).tolist() == [[[255] * 3, [9] * 3]]


def test_grey_one_bit_and_sixteen_bits():
    grey = GRADIENT[..., 0]
    assert (pixels(saved(Image.fromarray(grey))) == grey[..., None]).all()
    assert set(pixels(saved(Image.fromarray(grey).convert("1"))).ravel()) == {0, 255}
    wide = grey.astype(np.uint16) * 257
    for format in ("PNG", "TIFF"):
        assert (pixels(saved(Image.fromarray(wide), format)) == grey[..., None]).all(), format


def test_cmyk():
    cmyk = Image.new("CMYK", (32, 32), (0, 255, 255, 0))  # no cyan, full magenta and yellow: red
    for format in ("JPEG", "TIFF"):
        assert abs(pixels(saved(cmyk, format)) - [255, 0, 0]).max() <= 4, format


def test_float_pixels_are_refused():
    with pytest.raises(BadSample, match="no agreed range") as error:
        decode_image(saved(Image.new("F", (8, 8), 0.5), "TIFF"))
    assert error.value.reason == "unsupported pixels"


def test_colour_profile_becomes_srgb(matrix_profile):
    """Linear light 0.5 is 188 in sRGB (IEC 61966-2-1); swapped primaries turn red into blue."""
    grey = saved(Image.new("RGB", (4, 4), (128, 128, 128)), icc_profile=matrix_profile(1.0))
    assert abs(pixels(grey) - 188).max() <= 1
    red = saved(Image.new("RGB", (4, 4), (255, 0, 0)), icc_profile=matrix_profile(2.2, swap=True))
    assert abs(pixels(red) - [0, 0, 255]).max() <= 2
    assert not is_plain(load_image(red))


def test_profiles_that_say_nothing_new_change_nothing(matrix_profile):
    image = Image.fromarray(GRADIENT)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"not a profile at all"):
        data = saved(image, icc_profile=profile)
        assert (pixels(data) == GRADIENT).all()
        assert is_plain(load_image(data))
    cmyk_with_rgb_profile = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF", icc_profile=matrix_profile(1.0))
    assert abs(pixels(cmyk_with_rgb_profile) - [255, 0, 0]).max() <= 4


def test_a_profile_is_judged_by_what_it_does(matrix_profile):
    """Also one that is called sRGB, one of grey pixels with transparency, and one below a transparent colour."""
    named = matrix_profile(1.0).replace(b"test\0", b"sRGB\0")
    data = saved(Image.new("RGB", (4, 4), (128, 128, 128)), icc_profile=named)
    assert abs(pixels(data) - 188).max() <= 1 and not is_plain(load_image(data))
    linear_grey = matrix_profile(1.0, grey=True)
    for mode, colour, shown in (("L", 128, 188), ("LA", (128, 255), 188), ("LA", (128, 0), 255)):
        found = pixels(saved(Image.new(mode, (4, 4), colour), icc_profile=linear_grey))
        assert abs(found - shown).max() <= 1, mode
    deep = Image.fromarray(np.full((4, 4), 128 * 257, np.uint16))
    assert abs(pixels(saved(deep, icc_profile=linear_grey)) - 188).max() <= 1
    see_through = Image.new("RGBA", (4, 4), (128, 128, 128, 255))
    assert abs(pixels(saved(see_through, icc_profile=named)) - 188).max() <= 1


def test_srgb_again_changes_nothing(matrix_profile):
    """What is upright and in sRGB does not say any more that it is not."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = load_image(saved(Image.fromarray(GRADIENT), exif=exif, icc_profile=matrix_profile(1.8)))
    once = to_srgb(image)
    assert (np.asarray(to_srgb(once)) == np.asarray(once)).all() and once.size == (60, 80)


def lab_to_srgb(lab):
    """CIE Lab of D50 to sRGB of 0 to 255 in float64: CIE 15 and IEC 61966-2-1, adapted by Bradford's matrix."""
    y = (lab[0] + 16) / 116
    f = np.array([y + lab[1] / 500, y, y - lab[2] / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1, 0.8249]
    matrix = [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    linear = (np.array(matrix) @ xyz).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("lab", [(50, 0, 0), (60, 40, 20), (70, -30, 40), (40, 10, -50)])
def test_a_band_named_a_is_no_alpha(lab):
    bands = [round(lab[0] * 2.55), lab[1] + 128, lab[2] + 128]
    stored = Image.merge("LAB", [Image.new("L", (8, 8), band) for band in bands])
    assert (
        abs(pixels(saved(stored, "TIFF")) - lab_to_srgb(np.array(lab, float))).max() <= 6
    )  # LittleCMS interpolates a grid


def test_premultiplied_alpha_and_padding():
    """TIFF's associated alpha is divided out; a fourth channel that means nothing is dropped."""
    premultiplied = Image.new("RGBA", (4, 4), (200, 100, 0, 128)).convert("RGBa")
    assert abs(np.asarray(to_srgb(premultiplied)).astype(int) - [227, 177, 127]).max() <= 2
    assert np.asarray(to_srgb(Image.new("RGBX", (4, 4), (200, 100, 0, 9))))[0, 0].tolist() == [200, 100, 0]


def tiff_of(values: np.ndarray, bits: int, photometric: int = 1) -> bytes:
    """A TIFF of one grey strip, its values packed as its depth asks for (TIFF 6.0)."""
    if bits == 12:
        flat = values.reshape(-1, 2).astype(int)
        packed = np.stack([flat[:, 0] >> 4, (flat[:, 0] & 15) << 4 | flat[:, 1] >> 8, flat[:, 1] & 255], 1)
        body = packed.astype(np.uint8).tobytes()
    else:
        body = values.astype(f"<u{bits // 8}").tobytes()
    height, width = values.shape
    entries = [
        (256, width),
        (257, height),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, height),
    ]
    entries += [(279, len(body))]
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(entries)) + rows + b"\0" * 4


def test_sixteen_bits_are_rounded_and_have_a_known_range():
    deep = np.arange(0, 65536, 257 // 3, dtype=np.uint16)[:640].reshape(16, 40)
    for data in (saved(Image.fromarray(deep)), tiff_of(deep, 16)):
        assert (pixels(data)[..., 0] == np.round(deep / 257)).all()
    assert (pixels(tiff_of(deep, 16, photometric=0))[..., 0] == 255 - np.round(deep / 257)).all()
    twelve = deep >> 4
    assert (pixels(tiff_of(twelve, 12))[..., 0] == np.round(twelve / 4095 * 255)).all()
    keyed = saved(Image.fromarray(np.array([[1000, 2000]], np.uint16)), transparency=1000)
    assert pixels(keyed)[..., 0].tolist() == [[255, 8]]
    with pytest.raises(BadSample, match="no agreed range") as error:
        decode_image(tiff_of(deep.astype(np.uint32) << 12, 32))
    assert error.value.reason == "unsupported pixels"


def test_first_frame_of_animations():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    for format, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        data = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert (pixels(data) == [255, 0, 0]).all(), format
        assert not is_plain(load_image(data)), format


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_truncated_files_are_refused(format, part):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), format)
    with pytest.raises(BadSample) as error:
        decode_image(data[: int(len(data) * part)])
    assert error.value.reason in ("truncated", "corrupt", "not an image")
    if format in ("JPEG", "PNG", "WEBP", "BMP"):
        assert error.value.reason == "truncated" and "bytes" in str(error.value)


def test_what_is_no_image():
    for data, reason in (
        (b"", "zero bytes"),
        (b"hello", "not an image"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 99, "not an image"),
    ):
        with pytest.raises(BadSample) as error:
            decode_image(data)
        assert error.value.reason == reason


def test_pixel_limit():
    data = saved(Image.new("1", (20_000, 20_000)))
    with pytest.raises(BadSample, match=r"pixels") as error:
        decode_image(data)
    assert error.value.reason == "too many pixels"
    with pytest.raises(BadSample, match="80x60 is more than 4,799 pixels"):
        decode_image(saved(Image.fromarray(GRADIENT)), max_pixels=4799)


def test_scaled_jpeg_decoding_keeps_enough_and_looks_the_same():
    big = Image.fromarray(GRADIENT).resize((1600, 1200), Image.Resampling.BICUBIC)
    data = saved(big, "JPEG", quality=95)
    assert decode_image(data, smallest_side=64).size == (200, 150)
    assert decode_image(data, smallest_side=151).size == (400, 300)
    assert decode_image(data, smallest_side=1200).size == (1600, 1200)
    transforms = Transforms(resize_smallest_side=60)
    assert abs(transforms.decode(data) - transforms(big)).max() < 10 / 127.5


def test_resize_and_crop_are_the_antialiased_bicubic_of_torch():
    """PyTorch's own kernel; Pillow rounds to 8 bits twice, once for each axis."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 131, 3), dtype=np.uint8))
    result = Transforms(resize_smallest_side=32, center_crop_h_w="32, 40")(image)
    batch = torch.from_numpy(np.asarray(image).transpose(2, 0, 1)[None].copy()).float()
    resized = interpolate(batch, size=(32, int(32 * 131 / 90)), mode="bicubic", antialias=True).clamp(0, 255)[0].numpy()
    expected = resized[:, :, 3:43] / 127.5 - 1  # (46 - 40) / 2
    assert result.shape == (3, 32, 40) and result.dtype == np.float32 and result.flags.c_contiguous
    assert abs(result - expected).max() < 2.5 / 127.5


@pytest.mark.parametrize("size", [(4000, 3), (3, 4000), (20, 900), (2000, 100)])
@pytest.mark.parametrize("crop", ["center_crop_h_w", "random_crop_h_w"])
def test_of_a_strip_only_the_crop_is_resized(size, crop):
    """Pillow's resize of the whole strip, cropped; of pixels that no pass clips, so the two differ by rounding."""
    image = Image.fromarray(np.random.default_rng(0).integers(90, 166, (*size, 3), dtype=np.uint8))
    transforms = Transforms(resize_smallest_side=32, **{crop: "32, 24"})
    scale = 32 / min(size)
    whole = image.resize(tuple(32 if n == min(size) else int(n * scale) for n in image.size), Image.Resampling.BICUBIC)
    expected = np.asarray(whole).astype(int)
    for seed in range(3):
        found = ((transforms(image, seed).transpose(1, 2, 0) + 1) * 127.5).round()
        spare = [n - m for n, m in zip(expected.shape, (32, 24), strict=False)]
        top, left = (round(n / 2) for n in spare)
        if crop == "random_crop_h_w":
            place = integer_below((spare[0] + 1) * (spare[1] + 1), seed, stream=1)
            top, left = divmod(place, spare[1] + 1)
        assert abs(found - expected[top : top + 32, left : left + 24]).max() <= 1


def test_a_strip_takes_no_more_memory_than_its_crop(limited):
    """All of a 1 x 4000 image at 512 pixels would be 3 GiB."""
    strip = Image.fromarray(np.arange(4000, dtype=np.uint8)[:, None].repeat(3, 1)[:, None])
    for shape in (strip, strip.transpose(Image.Transpose.ROTATE_90)):
        assert Transforms(resize_smallest_side=512, random_crop_h_w="512, 512")(shape, 1).shape == (3, 512, 512)
        assert max(Transforms(aspect_buckets={"resolution": 512})(shape).shape) == 640


def test_range_is_exact():
    extremes = Image.fromarray(np.array([[[0, 127, 255]]], np.uint8))
    assert Transforms()(extremes).ravel().tolist() == pytest.approx([-1, 127 / 127.5 - 1, 1])


def test_keys_are_done_in_their_order():
    image = Image.fromarray(GRADIENT)  # 60 high, 80 wide
    crop_first = Transforms(center_crop_h_w=[40, 20], resize_smallest_side=40)
    resize_first = Transforms(resize_smallest_side=40, center_crop_h_w=[40, 20])
    assert crop_first(image).shape == (3, 80, 40) and crop_first.size is None and crop_first.smallest_side is None
    assert resize_first(image).shape == (3, 40, 20) and resize_first.size == (40, 20)
    assert crop_first.describe() != resize_first.describe()
    assert resize_first.describe() == [["resize_smallest_side", 40], ["center_crop_h_w", [40, 20]]]


def test_random_transforms_are_functions_of_the_seed():
    image = Image.fromarray(GRADIENT)
    transforms = Transforms(random_crop_h_w="58, 79", horizontal_flip=True)
    assert transforms.is_random and not Transforms(center_crop_h_w="8, 8", horizontal_flip=False).is_random
    results = [transforms(image, seed).tobytes() for seed in range(300)]
    assert results == [transforms(image, seed).tobytes() for seed in range(300)]
    assert len(set(results)) == 3 * 2 * 2  # every place and both ways round
    flipped = [transforms(image, seed)[1, 0, 0] > 0 for seed in range(300)]
    assert 110 < sum(flipped) < 190


@pytest.mark.parametrize(
    ("augmentations", "message"),
    [
        (
            {"resize_smalest_side": 64},
            r"\.resize_smalest_side is not a transform; did you mean resize_smallest_side",
        ),
        ({"rotate": 5}, r"augmentations\.rotate is not a transform; known: resize_smallest_side"),
        ({"resize_smallest_side": "big"}, r"resize_smallest_side='big': a number of pixels is wanted"),
        ({"center_crop_h_w": "512"}, r'center_crop_h_w=.512.: "height, width" is wanted'),
        ({"center_crop_h_w": [0, 4]}, "is wanted"),
        ({"horizontal_flip": "yes"}, "true or false is wanted"),
        (
            {"resize_smallest_side": 64, "center_crop_h_w": "128, 96"},
            "crop of 128x96 does not fit in resize_smallest_side=64",
        ),
    ],
)
def test_wrong_augmentations(augmentations, message):
    with pytest.raises(BadInput, match=message):
        Transforms(**augmentations)


def test_an_image_too_small_for_the_crop_is_never_padded():
    with pytest.raises(BadSample, match=r"60x80 \(height x width\) is too small for a crop of 64x64; put resize"):
        Transforms(center_crop_h_w="64, 64")(Image.fromarray(GRADIENT))


def test_real_photographs(photographs):
    """Every image that scikit-image and scikit-learn ship becomes a square in range, and not an empty one."""
    transforms = Transforms(resize_smallest_side=64, center_crop_h_w="64, 64")
    floats = photographs.pop("multipage_rgb.tif")  # 64-bit floating point
    with pytest.raises(BadSample, match="not an image in a known format"):
        transforms.decode(floats.read_bytes())
    for name, path in photographs.items():
        array = transforms.decode(path.read_bytes())
        assert array.shape == (3, 64, 64) and array.min() >= -1 and array.max() <= 1, name
        assert array.std() > 0.02, name
