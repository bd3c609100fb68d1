"""The same weights give the same numbers as diffusers' and transformers' own classes, tiny and at full size.

Each library saves a random model, `from_pretrained` loads it here. Differences are relative to the largest output.
"""

import gc

import diffusers
import pytest
import torch
import transformers

from latentsmith.checkpoints.load import build, load_component
from latentsmith.cpu import optimize_for_cpu
from latentsmith.files.errors import BadInput
from latentsmith.models import AutoencoderKL, ClipTextEncoder, UNetModel

TOLERANCE, FULL_SIZE_TOLERANCE = 1e-5, 1e-4
CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"

# name -> (diffusers' keywords, ours)
UNETS = {
    "v1": (
        dict(attention_head_dim=8, cross_attention_dim=24),
        dict(num_heads=8, context_dim=24),
    ),
    "v2": (
        dict(attention_head_dim=[2, 4, 8, 8], cross_attention_dim=40, use_linear_projection=True),
        dict(num_head_channels=16, context_dim=40, use_linear_in_transformer=True),
    ),
    "one level, no attention at the top": (
        dict(attention_head_dim=2, cross_attention_dim=24, layers_per_block=1, block_out_channels=(32, 64),
             down_block_types=("DownBlock2D", CROSS_DOWN), up_block_types=(CROSS_UP, "UpBlock2D")),
        dict(num_heads=2, context_dim=24, num_res_blocks=1, channel_mult=[1, 2], attention_resolutions=[2]),
    ),
    "lists": (
        dict(attention_head_dim=4, cross_attention_dim=24, layers_per_block=(1, 2, 1, 1),
             transformer_layers_per_block=(1, 2, 1, 1)),
        dict(num_heads=4, context_dim=24, num_res_blocks=[1, 2, 1, 1], transformer_depth=[1, 2, 1, 1]),
    ),
}  # fmt: skip
FULL_UNETS = {
    "v1": (dict(attention_head_dim=8, cross_attention_dim=768), dict(num_heads=8, context_dim=768)),
    "v2": (
        dict(attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024, use_linear_projection=True),
        dict(num_head_channels=64, context_dim=1024, use_linear_in_transformer=True),
    ),
}
TINY_WIDTHS = (32, 64, 128, 128)

# name -> (transformers' keywords, ours)
TEXTS = {
    "v1": (
        dict(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=60,
             max_position_embeddings=77, hidden_act="quick_gelu"),
        dict(width=48, intermediate_size=96, layers=3, heads=4, vocab_size=60, activation="quick_gelu"),
    ),
    "v2": (
        dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2, vocab_size=60,
             max_position_embeddings=77, hidden_act="gelu"),
        dict(width=64, intermediate_size=128, layers=4, heads=2, vocab_size=60, activation="gelu"),
    ),
}  # fmt: skip
FULL_TEXTS = {
    "v1": (
        dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
             hidden_act="quick_gelu"),
        dict(arch="ViT-L-14"),
    ),
    "v2": (
        dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, hidden_act="gelu"),
        dict(arch="ViT-H-14"),
    ),
}  # fmt: skip
FROM_NEMO = [None, False]


def largest_relative(found, expected):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return ((found - expected).abs().max() / expected.abs().max()).item()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(batch, seed=1, vocabulary=60):
    return torch.randint(0, vocabulary, (batch, 77), generator=torch.Generator().manual_seed(seed))


def saved(module, folder):
    module.save_pretrained(folder)
    return folder


def built(cls, **options):
    return build({"_target_": f"latentsmith.{cls.__name__}", **options})


def their_unet(config, randomise):
    config = dict(block_out_channels=TINY_WIDTHS) | config
    return randomise(diffusers.UNet2DConditionModel(sample_size=8, **config)).eval()


def their_vae(randomise, widths, **config):
    levels = len(widths)
    types = dict(down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels)
    return randomise(diffusers.AutoencoderKL(block_out_channels=widths, latent_channels=4, **types | config)).eval()


def their_text(config, randomise):
    return randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))).eval()


def unet_cases(context_dim, sizes):
    """Latents, timesteps and text of several sizes; a batch of two has two timesteps."""
    for seed, (height, width, timesteps) in enumerate(sizes):
        batch = len(timesteps)
        text = normal(batch, 77, context_dim, seed=seed + 100)
        yield normal(batch, 4, height, width, seed=seed), torch.tensor(timesteps), text


@torch.no_grad()
def unet_outputs(unet, cases):
    found = [unet(*case) for case in cases]
    return [getattr(output, "sample", output) for output in found]


@torch.no_grad()
def vae_outputs(vae, sizes, factor=8):
    """Moments and decoded latents at each size of image."""
    outputs = []
    for seed, (height, width) in enumerate(sizes):
        moments = vae.encode(normal(1, 3, height, width, seed=seed).clamp(-1, 1))
        decoded = vae.decode(normal(1, 4, height // factor, width // factor, seed=seed + 50))
        moments = moments.latent_dist.parameters if hasattr(moments, "latent_dist") else moments
        outputs += [moments, getattr(decoded, "sample", decoded)]
    return outputs


@torch.no_grad()
def their_embeddings(text, token_ids):
    """Last: what the model returns. Penultimate: the final norm of the layer before, as Stable Diffusion 2 takes it."""
    out = text(token_ids, output_hidden_states=True)
    norm = getattr(text, "text_model", text).final_layer_norm
    return {"last": out.last_hidden_state, "penultimate": norm(out.hidden_states[-2])}


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("from_nemo", FROM_NEMO)
def test_unet(name, from_nemo, randomise, tmp_path):
    theirs, ours = UNETS[name]
    reference = their_unet(theirs, randomise)
    sizes = [(8, 8, [0.0, 999.0]), (16, 24, [1.0]), (24, 8, [500.0, 37.0]), (8, 8, [123.5]), (9, 13, [7.0, 7.0])]
    expected = unet_outputs(reference, unet_cases(ours["context_dim"], sizes))
    unet = built(
        UNetModel, model_channels=32, from_pretrained=str(saved(reference, tmp_path)), from_NeMo=from_nemo, **ours
    )
    found = unet_outputs(unet.eval(), unet_cases(ours["context_dim"], sizes))
    assert max(map(largest_relative, found, expected)) < TOLERANCE


@pytest.mark.parametrize("fused", [True, False])
def test_both_attentions_are_theirs(fused, randomise, tmp_path):
    theirs, ours = UNETS["v2"]
    reference = their_unet(theirs, randomise)
    expected = unet_outputs(reference, unet_cases(40, [(8, 16, [321.0])]))
    unet = built(
        UNetModel, model_channels=32, from_pretrained=str(saved(reference, tmp_path)), use_flash_attention=fused, **ours
    )
    found = unet_outputs(unet.eval(), unet_cases(40, [(8, 16, [321.0])]))
    assert max(map(largest_relative, found, expected)) < TOLERANCE


def test_gradients_are_theirs(randomise, tmp_path):
    """Training takes the same step: gradients by their names in diffusers, to 1e-5 of the largest of any."""
    theirs, ours = UNETS["one level, no attention at the top"]
    reference = their_unet(theirs, randomise)
    latents, timesteps, text = next(unet_cases(24, [(8, 8, [10.0, 700.0])]))
    unet = built(UNetModel, model_channels=32, from_pretrained=str(saved(reference, tmp_path)), **ours)
    (reference(latents, timesteps, text).sample ** 2).mean().backward()
    (unet(latents, timesteps, text) ** 2).mean().backward()
    norms = [sorted(parameter.grad.norm().item() for parameter in module.parameters()) for module in (unet, reference)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4, abs=1e-5 * norms[1][-1])


def test_diffusers_names_are_not_nemos(randomise, tmp_path):
    theirs, ours = UNETS["one level, no attention at the top"]
    folder = str(saved(their_unet(theirs, randomise), tmp_path))
    with pytest.raises(BadInput, match="from_NeMo"):
        built(UNetModel, model_channels=32, from_pretrained=folder, from_NeMo=True, **ours)


def test_another_unets_file_is_refused(randomise, tmp_path):
    folder = str(saved(their_unet(UNETS["v1"][0], randomise), tmp_path))
    with pytest.raises(BadInput, match=str(tmp_path)):
        built(UNetModel, model_channels=32, from_pretrained=folder, num_heads=8, context_dim=32)
    with torch.device("meta"), pytest.raises(BadInput, match=str(tmp_path)):
        built(UNetModel, model_channels=32, from_pretrained=folder, num_heads=8, context_dim=32)


@pytest.mark.parametrize("from_nemo", FROM_NEMO)
@pytest.mark.parametrize("widths, blocks", [((32, 64, 64, 64), 2), ((32, 64), 1)])
def test_autoencoder(widths, blocks, from_nemo, randomise, tmp_path):
    reference = their_vae(randomise, widths, layers_per_block=blocks)
    factor, sizes = 2 ** (len(widths) - 1), [(32, 32), (16, 48)]
    expected = vae_outputs(reference, sizes, factor)
    ddconfig = dict(z_channels=4, ch=32, ch_mult=[width // 32 for width in widths], num_res_blocks=blocks)
    vae = AutoencoderKL(ddconfig=ddconfig).eval()
    load_component(vae, saved(reference, tmp_path), "vae", from_nemo=from_nemo)
    assert max(map(largest_relative, vae_outputs(vae, sizes, factor), expected)) < TOLERANCE


def test_autoencoder_with_other_norm_groups_and_attention(randomise, tmp_path):
    """Attention at the coarser of two levels, 8 groups in every norm."""
    types = dict(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    )
    reference = their_vae(randomise, (16, 32), layers_per_block=1, norm_num_groups=8, **types)
    expected = vae_outputs(reference, [(16, 24)], 2)
    ddconfig = dict(z_channels=4, ch=16, ch_mult=[1, 2], num_res_blocks=1, num_groups=8, attn_resolutions=[128])
    vae = built(AutoencoderKL, ddconfig=ddconfig, from_pretrained=str(saved(reference, tmp_path))).eval()
    assert max(map(largest_relative, vae_outputs(vae, [(16, 24)], 2), expected)) < TOLERANCE


def test_moments_mean_the_same(randomise, tmp_path):
    """Mode, sample and KL of diffusers' distribution, log variances beyond the limits among them."""
    moments = 20 * normal(2, 8, 5, 6)
    theirs = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution(moments)
    noise = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(AutoencoderKL.mode(moments), theirs.mode())
    torch.testing.assert_close(
        AutoencoderKL.sample(moments, noise), theirs.sample(torch.Generator().manual_seed(3)), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(AutoencoderKL.kl(moments), theirs.kl(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("layer", ["last", "penultimate"])
@pytest.mark.parametrize("name", TEXTS)
def test_text_encoder(name, layer, randomise, tmp_path):
    theirs, ours = TEXTS[name]
    reference = their_text(theirs, randomise)
    expected = their_embeddings(reference, ids(3))[layer]
    text = built(ClipTextEncoder, layer=layer, from_pretrained=str(saved(reference, tmp_path)), **ours)
    assert largest_relative(text(ids(3)), expected) < TOLERANCE


def test_a_file_of_one_layer_less_already_is_penultimate(randomise, tmp_path):
    """Stable Diffusion 2's folders hold 23 of 24 layers and mean their last."""
    theirs, ours = TEXTS["v2"]
    reference = their_text(theirs | dict(num_hidden_layers=3), randomise)
    text = built(ClipTextEncoder, layer="penultimate", from_pretrained=str(saved(reference, tmp_path)), **ours)
    assert largest_relative(text(ids(2)), their_embeddings(reference, ids(2))["last"]) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_UNETS)
def test_full_size_unet(name, randomise, tmp_path, record_property):
    theirs, ours = FULL_UNETS[name]
    sizes = [(8, 8, [999.0]), (16, 8, [20.0]), (16, 16, [501.0])]
    reference = their_unet(dict(block_out_channels=(320, 640, 1280, 1280)) | theirs, randomise)
    expected = unet_outputs(reference, unet_cases(ours["context_dim"], sizes))
    saved(reference, tmp_path)
    del reference
    gc.collect()
    unet = built(UNetModel, from_pretrained=str(tmp_path), from_NeMo=False, **ours).eval()
    optimize_for_cpu(unet)
    found = unet_outputs(unet, unet_cases(ours["context_dim"], sizes))
    differences = list(map(largest_relative, found, expected))
    record_property("largest relative differences", differences)
    assert max(differences) < FULL_SIZE_TOLERANCE, differences


@pytest.mark.slow
def test_full_size_autoencoder(randomise, tmp_path, record_property):
    sizes = [(64, 64), (128, 64)]
    reference = their_vae(randomise, (128, 256, 512, 512), layers_per_block=2)
    expected = vae_outputs(reference, sizes)
    saved(reference, tmp_path)
    del reference
    gc.collect()
    ddconfig = dict(z_channels=4, ch=128, ch_mult=[1, 2, 4, 4], num_res_blocks=2)
    vae = built(AutoencoderKL, ddconfig=ddconfig, from_pretrained=str(tmp_path)).eval()
    optimize_for_cpu(vae, pack_weights=True)
    differences = list(map(largest_relative, vae_outputs(vae, sizes), expected))
    record_property("largest relative differences", differences)
    assert max(differences) < FULL_SIZE_TOLERANCE, differences


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_TEXTS)
def test_full_size_text_encoder(name, randomise, tmp_path, record_property):
    theirs, ours = FULL_TEXTS[name]
    token_ids = ids(2, vocabulary=49408)
    reference = their_text(dict(vocab_size=49408, max_position_embeddings=77) | theirs, randomise)
    expected = their_embeddings(reference, token_ids)
    saved(reference, tmp_path)
    del reference
    differences = {}
    for layer in ("last", "penultimate"):
        gc.collect()
        text = built(ClipTextEncoder, layer=layer, from_pretrained=str(tmp_path), **ours)
        optimize_for_cpu(text)
        differences[layer] = largest_relative(text(token_ids), expected[layer])
        del text
    record_property("largest relative differences", differences)
    assert max(differences.values()) < FULL_SIZE_TOLERANCE, differences
