"""Rules of resizing against Pillow, PyTorch and a loop; extractors by name; what is refused."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from latentsmith.evaluation.extractors import imagenet, open_extractor
from latentsmith.evaluation.resize import RULES
from latentsmith.files.errors import BadInput

SIZES = [(50, 50), (200, 130), (31, 290)]


def noise_image(width, height):
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", SIZES)
def test_clean_is_pillows_bicubic_of_each_channel_in_float(size):
    image = noise_image(*size)
    found = RULES["clean"](image, 64)
    for channel, band in zip(found, image.split(), strict=True):
        expected = band.convert("F").resize((64, 64), Image.Resampling.BICUBIC)
        assert np.array_equal(channel.numpy(), np.asarray(expected))


@pytest.mark.parametrize("size", SIZES)
def test_legacy_tensorflow_is_its_definition(size):
    image, side = noise_image(*size), 37
    pixels = np.asarray(image, dtype=np.float64)
    height, width = pixels.shape[:2]

    def sampled(values, length):  # along the first axis
        rows = []
        for place in np.arange(side) * (length / side):
            first = int(place)
            share, after = place - first, min(first + 1, length - 1)
            rows.append(values[first] * (1 - share) + values[after] * share)
        return np.stack(rows)

    expected = sampled(sampled(pixels, height).transpose(1, 0, 2), width).transpose(2, 1, 0)
    np.testing.assert_allclose(RULES["legacy-tensorflow"](image, side).numpy(), expected, rtol=0, atol=5e-3)  # float32


def test_the_rules_leave_an_image_of_the_right_size_alone():
    image = noise_image(48, 48)
    for name, rule in RULES.items():
        np.testing.assert_allclose(rule(image, 48).permute(1, 2, 0), np.asarray(image), rtol=0, atol=1e-4, err_msg=name)
    with pytest.raises(BadInput, match="resize none: an image of 50x50, the extractor takes 48x48"):
        RULES["none"](noise_image(50, 50), 48)


def test_dinov2_is_the_class_token_of_transformers(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=56)
    network = Dinov2Model(config).eval()
    network.save_pretrained(tmp_path)
    extractor = open_extractor(f"dinov2:{tmp_path}")
    pixels = torch.rand(2, 3, 224, 224) * 255
    with torch.no_grad():
        expected = network(imagenet(pixels)).last_hidden_state[:, 0]
        torch.testing.assert_close(extractor.network(pixels)["features"], expected)
    assert extractor.side == 224 and extractor.resize == "clean"
    with pytest.raises(BadInput, match="cannot be loaded"):
        open_extractor(f"dinov2:{tmp_path / 'nothing'}")


@pytest.mark.skipif(importlib.util.find_spec("efficientnet_lite_pytorch") is None, reason="an extra")
def test_efficientnet_lite0_knows_a_photograph():
    from skimage import data

    extractor = open_extractor("efficientnet-lite0")
    pixels = RULES["clean"](Image.fromarray(data.chelsea()), 224)
    with torch.inference_mode():
        made = extractor.network(pixels[None])
    assert made["features"].shape == (1, 1280)
    assert int(made["logits"].argmax()) in range(281, 286)  # the cats of ImageNet


class Mean(nn.Module):
    """A network of the user's."""

    image_size = 16

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((2, 3))


def test_own_networks_need_trust(tmp_path, monkeypatch):
    torch.jit.script(Mean()).save(tmp_path / "mean.pt")
    (tmp_path / "my_features.py").write_text("def mean():\n    return lambda pixels: pixels.mean((2, 3))\n")
    monkeypatch.syspath_prepend(tmp_path)
    pixels = torch.rand(2, 3, 16, 16)
    for spec in (f"torchscript:{tmp_path / 'mean.pt'}", "my_features:mean"):
        with pytest.raises(BadInput, match="add --trust if you trust it"):
            open_extractor(spec)
        extractor = open_extractor(spec, trust=True)
        torch.testing.assert_close(extractor.network(pixels)["features"], pixels.mean((2, 3)))
    sys.modules.pop("my_features", None)


@pytest.mark.parametrize(
    ("spec", "resize", "message"),
    [
        ("incepton", None, "features incepton: is not one of inception, clip"),
        ("clip", None, "clip: name the model"),
        ("inception", "bicubic", "resize bicubic: is not one of clean"),
        ("torchscript:nowhere.pt", None, "no such file"),
        ("no_such_module:function", None, "No module named 'no_such_module'"),
    ],
)
def test_unknown_names_are_one_line(spec, resize, message):
    with pytest.raises(BadInput) as caught:
        open_extractor(spec, resize=resize, trust=True)
    assert message in str(caught.value) and "\n" not in str(caught.value)
