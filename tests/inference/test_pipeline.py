"""What a picture depends on, and what it does not."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from latentsmith.checkpoints import ModelSpec
from latentsmith.files.errors import BadInput
from latentsmith.inference import Pipeline, Tokenizer
from latentsmith.models import AutoencoderKL, ClipTextEncoder, UNetModel
from latentsmith.text.tokenizer import train_vocabulary

UNET = dict(
    model_channels=32, channel_mult=[1, 2], attention_resolutions=[2], num_res_blocks=1, num_heads=2, context_dim=16
)
VAE = dict(ddconfig=dict(z_channels=4, ch=32, ch_mult=[1, 2], num_res_blocks=1))
TEXT = dict(width=16, layers=2, heads=2, intermediate_size=32, activation="quick_gelu", vocab_size=600, max_length=12)
LONG = "a red circle above a small blue square a red circle above a small blue square"
PROMPTS = ["a red circle", "a small blue square", LONG, "a red square", "", "blue"]
OPTIONS = dict(height=16, width=24, steps=4, guidance_scale=3.0)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A random model whose pictures have contrast."""
    folder = tmp_path_factory.mktemp("words")
    train_vocabulary([LONG], 600, folder)
    torch.manual_seed(0)
    parts = dict(unet=UNetModel(**UNET), vae=AutoencoderKL(**VAE), text_encoder=ClipTextEncoder(**TEXT))
    for part in parts.values():
        for parameter in part.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
        part.eval().requires_grad_(False)
    spec = ModelSpec(UNET, VAE, TEXT, "epsilon", image_size=8, scale_factor=0.5)
    return Pipeline(tokenizer=Tokenizer.from_file(folder, 12), spec=spec, **parts)


def arrays(pictures):
    return [np.asarray(picture, dtype=int) for picture in pictures]


def apart(left, right):
    return max(abs(one - other).max() for one, other in zip(arrays(left), arrays(right), strict=True))


@pytest.mark.parametrize("sampler", ["dpmsolver++", "euler_a", "para_ddim"])
def test_a_picture_is_a_function_of_its_prompt_and_seed(pipeline, sampler):
    """Alone, together with longer prompts, in any order and batch size: the same but for the last digit."""
    seeds = [5, 6, 7, 8, 9, 10]
    options = OPTIONS | dict(sampler=sampler, tolerance=0.0)
    together = pipeline(PROMPTS, "grey", seed=seeds, **options)
    assert min(np.asarray(picture).std() for picture in together) > 5
    for size in (1, 4):
        assert apart(pipeline(PROMPTS, "grey", seed=seeds, batch_size=size, **options), together) <= 1
    backwards = pipeline(PROMPTS[::-1], "grey", seed=seeds[::-1], **options)
    assert apart(backwards[::-1], together) <= 1
    alone = [pipeline(prompt, "grey", seed=seed, **options)[0] for prompt, seed in zip(PROMPTS, seeds, strict=True)]
    assert apart(alone, together) <= 1
    assert apart(pipeline(PROMPTS[0], "grey", seed=6, **options), together[:1]) > 20


def test_a_long_prompt_is_read_to_its_end(pipeline):
    first, second = LONG, LONG.removesuffix("square") + "circle"
    whole = [pipeline(prompt, **OPTIONS)[0] for prompt in (first, second)]
    assert apart(whole[:1], whole[1:]) > 0
    with pytest.warns(UserWarning, match="cut"):
        cut = [pipeline(prompt, long_prompts="cut", **OPTIONS)[0] for prompt in (first, second)]
    assert apart(cut[:1], cut[1:]) == 0


def test_guidance_of_each_prompt(pipeline):
    both = pipeline(PROMPTS[:2], **OPTIONS | dict(guidance_scale=[1.0, 4.0]))
    for number, scale in enumerate((1.0, 4.0)):
        alone = pipeline(PROMPTS[number], **OPTIONS | dict(guidance_scale=scale))
        assert apart(alone, both[number : number + 1]) <= 1


def test_a_distinct_prompt_is_encoded_once(pipeline, monkeypatch):
    encoded = []
    encode = pipeline.text_encoder.forward
    monkeypatch.setattr(pipeline.text_encoder, "forward", lambda ids: encoded.append(len(ids)) or encode(ids))
    pipeline(["a red circle"] * 5, "grey", batch_size=2, **OPTIONS)
    assert encoded == [1, 1]


def test_split_guidance_is_the_same_picture(pipeline):
    assert apart(pipeline(PROMPTS, split_guidance=True, **OPTIONS), pipeline(PROMPTS, **OPTIONS)) <= 1


def test_without_guidance_the_negative_prompt_plays_no_part(pipeline):
    options = OPTIONS | dict(guidance_scale=1.0)
    assert apart(pipeline("a red circle", LONG, **options), pipeline("a red circle", **options)) == 0


def test_masks_of_some_pictures(pipeline):
    """No mask is a mask that is white all over."""
    picture, mask = Image.new("RGB", (24, 16), "teal"), Image.new("L", (24, 16))
    mask.paste(255, (0, 0, 12, 16))
    options = OPTIONS | dict(seed=[1, 2], image=picture)
    both = pipeline(PROMPTS[:2], mask=[mask, None], **options)
    alone = pipeline(PROMPTS[1], **options | dict(seed=2))
    assert apart(both[1:], alone) <= 1 and (np.asarray(both[0])[:, 12:] == np.asarray(picture)[:, 12:]).all()


def test_one_picture_that_fails_costs_no_other(pipeline):
    *_, last = pipeline.stream(PROMPTS[:2], **OPTIONS)
    last.latents[1] = float("nan")
    first, second = pipeline.decode_or_error(last)
    assert first.size == (24, 16) and "not finite" in second
    with pytest.raises(BadInput, match="not finite"):
        pipeline.pictures(last)


def test_a_half_precision_unet_can_be_put_in(pipeline):
    half = UNetModel(**UNET)
    half.load_state_dict(pipeline.unet.state_dict())
    mixed = Pipeline(half.bfloat16().eval(), pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.spec)
    assert mixed(PROMPTS[:1], **OPTIONS)[0].size == (24, 16)


def test_variations(pipeline):
    first, other = (pipeline(PROMPTS[0], seed=seed, **OPTIONS)[0] for seed in (1, 2))
    ends = [
        pipeline(PROMPTS[0], seed=1, variation_seed=2, variation_strength=part, **OPTIONS)[0]
        for part in (0.0, 0.2, 1.0)
    ]
    assert apart([ends[0]], [first]) == 0 and apart([ends[2]], [other]) <= 1
    near, far = (abs(arrays([ends[1]])[0] - arrays([end])[0]).mean() for end in (first, other))
    assert 0 < near < far


def test_stream_shows_every_step(pipeline):
    seen = list(pipeline.stream(PROMPTS[:2] + [LONG], **OPTIONS))
    assert [(drawing.numbers, drawing.step) for drawing in seen] == [
        *(((0, 1), step) for step in (1, 2, 3, 4)),
        *(((2,), step) for step in (1, 2, 3, 4)),
    ]
    assert [drawing.done for drawing in seen] == [False, False, False, True] * 2
    assert apart(pipeline.pictures(seen[3]), pipeline(PROMPTS[:2], **OPTIONS)) == 0
    preview = pipeline.pictures(seen[0])
    assert [picture.size for picture in preview] == [(24, 16)] * 2


def test_bad_input_is_said_before_anything_is_drawn(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline, "unet", None)
    monkeypatch.setattr(pipeline, "latent_shape", lambda options: (4, 8, 12))
    for options, line in [
        (dict(guidance_scale=float("nan")), "guidance_scale is nan"),
        (dict(eta=2.0, sampler="ddim"), "eta is 2.0; it must be between 0 and 1"),
        (dict(eta=0.5, sampler="heun"), "heun has no share of noise to choose"),
        (dict(spacing="wide"), "spacing 'wide' is not one of leading, trailing, linspace"),
        (dict(strength=0.1, image=Image.new("RGB", (24, 16))), "strength 0.1 of 4 steps leaves none"),
        (dict(seed=[1, 2]), "2 seeds for 1 prompts"),
        (dict(steps=0), "steps is 0"),
        (dict(steps=2.5), "steps is 2.5; it must be a whole number"),
        (dict(height=0), "pictures of 0x24"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(guidance_scale="high"), "guidance_scale is 'high'; it must be a number"),
        (dict(sampler="eular"), "'eular' is not a sampler"),
        (dict(height=15), "pictures of 15x24 do not divide by 2"),
    ]:
        with pytest.raises(BadInput, match=line):
            pipeline.stream("a", **OPTIONS | options)


def test_a_unet_that_wants_more_than_latents(pipeline):
    with pytest.raises(BadInput, match="an inpainting model: the U-Net takes 9 channels, the VAE's latents have 4"):
        Pipeline(
            UNetModel(**UNET, in_channels=9), pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.spec
        )


def test_tiled_decoding(pipeline):
    """One tile is the plain result; several are near it, without a jump at the seams."""
    small, large = torch.randn(1, 4, 64, 48), 0.5 * torch.randn(1, 4, 96, 160)
    assert torch.equal(pipeline.decode(small, tiling=True), pipeline.decode(small))
    plain, pieces = pipeline.decode(large), pipeline.decode(large, tiling=True)
    assert plain.shape == pieces.shape and (plain - pieces).abs().mean() < 0.2 * plain.abs().mean()


def test_a_half_precision_vae_that_overflows_is_used_again_in_float32(pipeline):
    half = Pipeline(pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.spec)
    half.vae = AutoencoderKL(**VAE)
    half.vae.load_state_dict(pipeline.vae.state_dict())
    half.vae.post_quant_conv.weight.data *= 1e4  # the group norms below take it out again, but not from infinity
    half.vae.post_quant_conv.bias.data.zero_()
    latents = 8 * torch.randn(1, 4, 8, 8)
    exact = half.decode(latents)
    half.vae.half()
    with pytest.warns(UserWarning, match="the VAE overflows in float16"):
        found = half.decode(latents)
    assert (found - exact).abs().max() < 0.05
    half.vae.encoder.conv_in.weight.data.fill_(6e4)
    with pytest.warns(UserWarning, match="the VAE overflows in float16"):
        assert half.encode(torch.ones(1, 3, 16, 16)).isfinite().all()
    assert next(half.vae.parameters()).dtype == torch.float16
    with pytest.raises(BadInput, match="not finite"):
        half.pictures(replace(next(iter(pipeline.stream("a", **OPTIONS | dict(steps=1)))),
                              latents=torch.full((1, 4, 8, 12), float("nan"))))  # fmt: skip


def test_threads_draw_side_by_side(pipeline):
    expected = [pipeline(prompt, seed=3, **OPTIONS) for prompt in PROMPTS[:3]]
    found = [None] * 3

    def draw(number):
        found[number] = pipeline(PROMPTS[number], seed=3, **OPTIONS)

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(apart(left, right) <= 1 for left, right in zip(found, expected, strict=True))
