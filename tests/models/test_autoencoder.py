"""The VAE: its sizes, its options, what it refuses, and its distribution against torch's."""

import math

import pytest
import torch
import yaml
from torch.distributions import Normal, kl_divergence

from latentsmith.models import AutoencoderKL

DOCUMENTED = """
embed_dim: 4
ddconfig:
  double_z: true
  z_channels: 4
  resolution: 256
  in_channels: 3
  out_ch: 3
  ch: 128
  ch_mult: [1, 2, 4, 4]
  num_res_blocks: 2
  attn_resolutions: []
  dropout: 0.0
"""
TINY = dict(z_channels=4, ch=8, ch_mult=[1, 2], num_res_blocks=1, num_groups=4, resolution=16)


def tiny(embed_dim=4, **ddconfig):
    return AutoencoderKL(embed_dim=embed_dim, ddconfig=TINY | ddconfig)


def images(height=16, width=16):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(5)) * 2 - 1


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_published_size_with_every_documented_key():
    with torch.device("meta"):
        vae = AutoencoderKL(**yaml.safe_load(DOCUMENTED))
    assert count(vae) == 83_653_863 and len(vae.state_dict()) == 248
    parts = (vae.encoder, vae.decoder)
    assert [count(part) for part in parts] == [34_163_592, 49_490_179]
    assert [len(part.state_dict()) for part in parts] == [106, 138]
    assert vae.downsampling == 8


def test_names_are_those_of_the_published_file():
    with torch.device("meta"):
        shapes = {n: list(t.shape) for n, t in AutoencoderKL(**yaml.safe_load(DOCUMENTED)).state_dict().items()}
    expected = {
        "encoder.conv_in.weight": [128, 3, 3, 3],
        "encoder.down.1.block.0.nin_shortcut.weight": [256, 128, 1, 1],
        "encoder.down.2.downsample.conv.weight": [512, 512, 3, 3],
        "encoder.mid.attn_1.q.weight": [512, 512, 1, 1],
        "encoder.conv_out.weight": [8, 512, 3, 3],
        "quant_conv.weight": [8, 8, 1, 1],
        "post_quant_conv.weight": [4, 4, 1, 1],
        "decoder.conv_in.weight": [512, 4, 3, 3],
        "decoder.up.0.block.0.nin_shortcut.weight": [128, 256, 1, 1],
        "decoder.up.3.block.2.conv2.weight": [512, 512, 3, 3],
        "decoder.up.3.upsample.conv.weight": [512, 512, 3, 3],
        "decoder.conv_out.weight": [3, 128, 3, 3],
    }
    assert {name: shapes.get(name) for name in expected} == expected
    assert "decoder.up.0.upsample.conv.weight" not in shapes and "encoder.down.3.downsample.conv.weight" not in shapes


@pytest.mark.parametrize("ch_mult", [[1], [1, 1], [1, 2, 2]])
def test_each_level_but_the_last_halves_the_image(ch_mult):
    vae = tiny(ch_mult=ch_mult)
    factor = 2 ** (len(ch_mult) - 1)
    assert vae.downsampling == factor
    moments = vae.encode(images(16, 24))
    assert moments.shape == (2, 8, 16 // factor, 24 // factor)
    assert vae.decode(vae.mode(moments)).shape == (2, 3, 16, 24)


def test_embed_dim_and_channels_may_differ_from_z_channels():
    vae = tiny(embed_dim=3, z_channels=5, in_channels=1, out_ch=2)
    moments = vae.encode(images()[:, :1])
    assert moments.shape == (2, 6, 8, 8) and vae.mode(moments).shape == (2, 3, 8, 8)
    assert vae.decode(vae.mode(moments)).shape == (2, 2, 16, 16)


def test_attention_at_the_named_resolutions(randomise):
    """`resolution` is that of training: level i has attention if resolution / 2**i is named."""
    vae = randomise(tiny(attn_resolutions=[8]))
    assert [len(level.attn) for level in vae.encoder.down] == [0, 1]
    assert [len(level.attn) for level in vae.decoder.up] == [0, 2]
    assert vae.decode(vae.mode(vae.encode(images()))).shape == (2, 3, 16, 16)
    assert not any(len(level.attn) for level in tiny().encoder.down)


def test_blocks_of_each_level():
    vae = tiny(num_res_blocks=3)
    assert [len(level.block) for level in vae.encoder.down] == [3, 3]
    assert [len(level.block) for level in vae.decoder.up] == [4, 4]


def test_num_groups_is_that_of_every_norm():
    norms = [module for module in tiny(num_groups=2).modules() if isinstance(module, torch.nn.GroupNorm)]
    assert {norm.num_groups for norm in norms} == {2} and {norm.eps for norm in norms} == {1e-6}


@pytest.mark.parametrize(
    "ddconfig, line",
    [
        (dict(double_z=False), "ddconfig.double_z is false: a KL autoencoder needs a mean and a log variance"),
        (dict(num_groups=3), "group norm with 3 groups cannot divide 8 channels"),
        (dict(num_groups=32), "group norm with 32 groups cannot divide 8 channels"),
    ],
)
def test_sizes_that_do_not_fit_together(ddconfig, line):
    with pytest.raises(ValueError, match=line):
        tiny(**ddconfig)


def test_downsampling_looks_right_and_down_only(randomise):
    """Zeros are padded at the right and the bottom: the first latent never sees a padded row above it."""
    vae = randomise(tiny())
    conv = vae.encoder.down[0].downsample
    hidden = torch.randn(1, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    expected = (hidden[0, :, :3, :3] * conv.conv.weight[0]).sum() + conv.conv.bias[0]
    torch.testing.assert_close(conv(hidden)[0, 0, 0, 0], expected)
    assert conv(hidden).shape == (1, 8, 3, 3)


def test_kl_is_that_of_torch_distributions():
    moments = torch.randn(3, 8, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mean, logvar = moments[:, :4], moments[:, 4:]
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(AutoencoderKL.kl(moments), expected)
    assert AutoencoderKL.kl(torch.zeros(1, 8, 2, 2)).item() == 0


def test_log_variances_are_held_within_minus_30_and_20():
    moments = torch.cat([torch.zeros(1, 4, 1, 1), torch.tensor([-1e4, 1e4, -30.0, 20.0]).view(1, 4, 1, 1)], dim=1)
    drawn = AutoencoderKL.sample(moments, torch.ones(1, 4, 1, 1)).flatten().tolist()
    assert drawn == pytest.approx([math.exp(-15), math.exp(10), math.exp(-15), math.exp(10)], rel=1e-6)
    expected = 0.5 * sum(math.exp(each) - 1 - each for each in (-30, 20, -30, 20))
    assert AutoencoderKL.kl(moments).item() == pytest.approx(expected, rel=1e-6)


def test_mode_is_the_mean_and_samples_spread_about_it():
    moments = torch.cat([torch.full((1, 4, 50, 50), 3.0), torch.full((1, 4, 50, 50), math.log(4.0))], dim=1)
    assert torch.equal(AutoencoderKL.mode(moments), moments[:, :4])
    assert torch.equal(AutoencoderKL.sample(moments, torch.zeros(1, 4, 50, 50)), moments[:, :4])
    noise = torch.randn(1, 4, 50, 50, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(AutoencoderKL.sample(moments, noise), 3 + 2 * noise)


def test_channels_last_changes_nothing(randomise):
    vae = randomise(tiny(attn_resolutions=[8]))
    moments = vae.encode(images(8, 12))
    decoded = vae.decode(vae.mode(moments))
    vae.to(memory_format=torch.channels_last)
    found = vae.encode(images(8, 12).to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, moments, rtol=1e-4, atol=1e-5)
    latents = vae.mode(moments).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(vae.decode(latents), decoded, rtol=1e-4, atol=1e-5)


def test_fresh_weights_draw_latents_with_little_noise():
    """Every residual branch starts at zero, and the first deviation is exp(-6 / 2) = 0.05 on a grey image."""
    vae = tiny()
    assert not any(block.conv2.weight.any() for level in vae.encoder.down for block in level.block)
    moments = vae.encode(torch.zeros(1, 3, 16, 16))
    torch.testing.assert_close(moments[:, 4:], torch.full((1, 4, 8, 8), -6.0))


def test_latents_are_shifted_then_scaled():
    vae = AutoencoderKL(ddconfig=TINY, scale_factor=0.25, shift_factor=2.0)
    vae_latents = torch.tensor([2.0, 6.0])
    assert vae.to_latents(vae_latents).tolist() == [0.0, 1.0]
    assert torch.equal(vae.to_vae_latents(vae.to_latents(vae_latents)), vae_latents)
    assert AutoencoderKL(ddconfig=TINY).to_latents(torch.ones(1)).item() == pytest.approx(0.18215)
