"""What an image depends on, and what it does not; each stage of a pipeline used alone."""

import copy
import inspect
import threading
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from latentsmith.checkpoints import ModelSpec
from latentsmith.diffusion import NoiseSchedule
from latentsmith.files.errors import BadInput
from latentsmith.image_request import SamplingOptions, options_from_nemo
from latentsmith.inference import Pipeline, Tokenizer
from latentsmith.inference.images import InitImage, to_image
from latentsmith.models import AutoencoderKL, ClipTextEncoder, UNetModel
from latentsmith.text.tokenizer import train_vocabulary

UNET = dict(
    model_channels=32, channel_mult=[1, 2], attention_resolutions=[2], num_res_blocks=1, num_heads=2, context_dim=16
)
VAE = dict(ddconfig=dict(z_channels=4, ch=32, ch_mult=[1, 2], num_res_blocks=1))
TEXT = dict(width=16, layers=2, heads=2, intermediate_size=32, activation="quick_gelu", vocab_size=600, max_length=12)
LONG = "a red circle above a small blue square a red circle above a small blue square"
PROMPTS = ["a red circle", "a small blue square", LONG, "a red square", "", "blue"]
OPTIONS = dict(height=16, width=24, num_inference_steps=4, guidance_scale=3.0)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A random model whose images have contrast."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_vocabulary([LONG], 600, folder)
    torch.manual_seed(0)
    parts = dict(
        unet=UNetModel(**UNET), vae=AutoencoderKL(**VAE, scale_factor=0.5), text_encoder=ClipTextEncoder(**TEXT)
    )
    for part in parts.values():
        for parameter in part.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
        part.eval().requires_grad_(False)
    spec = ModelSpec(UNET, VAE, TEXT, "epsilon", image_size=8, scale_factor=0.5)
    return Pipeline(tokenizer=Tokenizer.from_file(folder, 12), spec=spec, **parts)


def arrays(images):
    return [np.asarray(image, dtype=int) for image in images]


def apart(left, right):
    return max(abs(one - other).max() for one, other in zip(arrays(left), arrays(right), strict=True))


def images(pipeline, *prompts, **keywords):
    return pipeline(*prompts, **OPTIONS | keywords).images


@pytest.mark.parametrize("sampler", ["dpmsolver++", "euler_a", "para_ddim"])
def test_an_image_is_a_function_of_its_prompt_and_seed(pipeline, sampler):
    """Alone, together with longer prompts, in any order and batch size: the same but for the last digit."""
    seeds = [5, 6, 7, 8, 9, 10]
    options = dict(sampler=sampler, tolerance=0.0)
    together = images(pipeline, PROMPTS, "grey", seed=seeds, **options)
    assert min(np.asarray(image).std() for image in together) > 5
    for size in (1, 4):
        assert apart(images(pipeline, PROMPTS, "grey", seed=seeds, batch_size=size, **options), together) <= 1
    backwards = images(pipeline, PROMPTS[::-1], "grey", seed=seeds[::-1], **options)
    assert apart(backwards[::-1], together) <= 1
    alone = [
        images(pipeline, prompt, "grey", seed=seed, **options)[0] for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    assert apart(alone, together) <= 1
    assert apart(images(pipeline, PROMPTS[0], "grey", seed=6, **options), together[:1]) > 20


def test_a_long_prompt_is_read_to_its_end(pipeline):
    first, second = LONG, LONG.removesuffix("square") + "circle"
    whole = [images(pipeline, prompt)[0] for prompt in (first, second)]
    assert apart(whole[:1], whole[1:]) > 0
    with pytest.warns(UserWarning, match="cut"):
        cut = [images(pipeline, prompt, long_prompts="cut")[0] for prompt in (first, second)]
    assert apart(cut[:1], cut[1:]) == 0


def test_guidance_of_each_prompt(pipeline):
    both = images(pipeline, PROMPTS[:2], guidance_scale=[1.0, 4.0])
    for number, scale in enumerate((1.0, 4.0)):
        alone = images(pipeline, PROMPTS[number], guidance_scale=scale)
        assert apart(alone, both[number : number + 1]) <= 1


def test_a_long_negative_prompt_of_an_image_without_guidance(pipeline):
    options = dict(negative_prompt=LONG * 2)
    both = images(pipeline, [LONG, LONG + " red", "a"], guidance_scale=[1.0, 7.5, 1.0], **options)
    for number, (prompt, scale) in enumerate([(LONG, 1.0), (LONG + " red", 7.5), ("a", 1.0)]):
        assert apart(images(pipeline, prompt, guidance_scale=scale, **options), both[number : number + 1]) <= 1
    mixed = images(pipeline, ["a", "b"], negative_prompt=[LONG * 2, None], guidance_scale=[1.0, 7.5])
    assert apart(images(pipeline, "a", guidance_scale=1.0), mixed[:1]) <= 1


@pytest.mark.parametrize(
    ("steps", "strength", "done"), [(100, 0.29, 29), (30, 0.834, 25), (30, 0.843, 25), (4, 1.0, 4)]
)
def test_steps_done_from_an_image(steps, strength, done):
    assert SamplingOptions(num_inference_steps=steps, strength=strength).steps_from_image == done


def test_nothing_outside_a_mask_depends_on_what_is_generated():
    """A product with 0 keeps NaN."""
    mask = torch.zeros(1, 4, 4)
    init_image = InitImage(torch.ones(3, 4, 4), mask, mask)
    assert (init_image.around(torch.full((3, 4, 4), float("nan"))) == 1).all()


def test_karras_sigmas_of_a_steep_schedule_are_noted(pipeline):
    cosine = copy.copy(pipeline)
    cosine.schedule = NoiseSchedule.from_config(beta_schedule="squaredcos_cap_v2")
    for sampler in ("dpmsolver++", "dpmsolver++_sde", "dpmsolver++_singlestep", "unipc"):
        for steps in (10, 50):
            with pytest.warns(UserWarning, match=f"of {steps} steps share timesteps"):
                cosine.completed(SamplingOptions(sampler=f"{sampler} Karras", num_inference_steps=steps))
            pipeline.completed(SamplingOptions(sampler=f"{sampler} Karras", num_inference_steps=steps))
    cosine.completed(SamplingOptions(sampler="euler Karras", num_inference_steps=10))


def test_karras_sigmas_of_the_model(pipeline):
    """As in diffusers, they are obeyed by the samplers whose schedulers have the key; a spacing turns them off."""
    karras = copy.copy(pipeline)
    karras.spec = replace(pipeline.spec, karras_sigmas=True)
    for sampler, obeys in (("euler", True), ("dpmsolver++", True), ("ddim", False), ("euler_a", False)):
        options = SamplingOptions(sampler=sampler, num_inference_steps=5)
        asked = SamplingOptions(sampler=f"{sampler} karras" if obeys else sampler, num_inference_steps=5)
        found, wanted = karras.sampling_schedule(options), pipeline.sampling_schedule(asked)
        assert torch.equal(found.sigmas, wanted.sigmas)
        spaced = replace(options, timestep_spacing="trailing")
        assert torch.equal(karras.sampling_schedule(spaced).sigmas, pipeline.sampling_schedule(spaced).sigmas)


def test_a_distinct_prompt_is_encoded_once(pipeline, monkeypatch):
    encoded = []
    encode = pipeline.text_encoder.forward
    monkeypatch.setattr(pipeline.text_encoder, "forward", lambda ids: encoded.append(len(ids)) or encode(ids))
    images(pipeline, ["a red circle"] * 5, "grey", batch_size=2)
    assert encoded == [1, 1]


def test_split_guidance_is_the_same_image(pipeline):
    assert apart(images(pipeline, PROMPTS, split_guidance=True), images(pipeline, PROMPTS)) <= 1


def test_without_guidance_the_negative_prompt_plays_no_part(pipeline):
    options = dict(guidance_scale=1.0)
    assert apart(images(pipeline, "a red circle", LONG, **options), images(pipeline, "a red circle", **options)) == 0


def test_masks_of_some_images(pipeline):
    """No mask is a mask that is white all over."""
    image, mask = Image.new("RGB", (24, 16), "teal"), Image.new("L", (24, 16))
    mask.paste(255, (0, 0, 12, 16))
    options = dict(seed=[1, 2], image=image)
    both = images(pipeline, PROMPTS[:2], mask_image=[mask, None], **options)
    alone = images(pipeline, PROMPTS[1], **options | dict(seed=2))
    assert apart(both[1:], alone) <= 1 and (np.asarray(both[0])[:, 12:] == np.asarray(image)[:, 12:]).all()


def test_one_image_that_fails_costs_no_other(pipeline):
    *_, last = pipeline.stream(PROMPTS[:2], **OPTIONS)
    last.latents[1] = float("nan")
    first, second = pipeline.decode_or_error(last)
    assert first.size == (24, 16) and "not finite" in second
    with pytest.raises(BadInput, match="not finite"):
        pipeline.images_of(last)


def test_a_half_precision_unet_can_be_put_in(pipeline):
    half = UNetModel(**UNET)
    half.load_state_dict(pipeline.unet.state_dict())
    mixed = Pipeline(half.bfloat16().eval(), pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.spec)
    assert images(mixed, PROMPTS[:1])[0].size == (24, 16)


def test_variations(pipeline):
    first, other = (images(pipeline, PROMPTS[0], seed=seed)[0] for seed in (1, 2))
    ends = [
        images(pipeline, PROMPTS[0], seed=1, variation_seed=2, variation_strength=part)[0] for part in (0.0, 0.2, 1.0)
    ]
    assert apart([ends[0]], [first]) == 0 and apart([ends[2]], [other]) <= 1
    near, far = (abs(arrays([ends[1]])[0] - arrays([end])[0]).mean() for end in (first, other))
    assert 0 < near < far


def test_stream_shows_every_step(pipeline):
    seen = list(pipeline.stream(PROMPTS[:2] + [LONG], **OPTIONS))
    assert [([request.prompt for request in each.requests], each.step) for each in seen] == [
        *((PROMPTS[:2], step) for step in (1, 2, 3, 4)),
        *(([LONG], step) for step in (1, 2, 3, 4)),
    ]
    assert [each.done for each in seen] == [False, False, False, True] * 2
    assert apart(pipeline.images_of(seen[3]), images(pipeline, PROMPTS[:2])) == 0
    preview = pipeline.images_of(seen[0])
    assert [image.size for image in preview] == [(24, 16)] * 2


def test_bad_input_is_said_before_anything_is_sampled(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline, "unet", None)
    for options, line in [
        (dict(guidance_scale=float("nan")), "guidance_scale is nan"),
        (dict(eta=2.0, sampler="ddim"), "eta is 2.0; it must be between 0 and 1"),
        (dict(eta=0.5, sampler="heun"), "heun has no share of noise to choose"),
        (dict(timestep_spacing="wide"), "wide"),
        (dict(strength=0.1, image=Image.new("RGB", (24, 16))), "strength 0.1 of 4 steps leaves none"),
        (dict(height=65_536, width=65_536), "height is 65536; it must be between 1 and 16384"),
        (dict(height=16_384, width=16_384), "16384x16384 has 268,435,456 pixels; at most 33,554,432 are made"),
        (
            dict(image=Image.new("L", (12_000, 12_000)), height=None, width=None),
            "144,000,000 pixels; at most 33,554,432",
        ),
        (dict(image=Image.new("L", (12_000, 16)), height=12_000, width=None), "144,000,000 pixels; at most 33,554,432"),
        (dict(seed=2**64 - 1), "seed is 18446744073709551615; it must be between 0 and 9223372036854775807"),
        (dict(seed=2**63 - 1, num_images_per_prompt=2), "seed is 9223372036854775808; it must be between 0 and"),
        (dict(image="cat.png"), "image is a str; give a PIL image"),
        (dict(image=[Image.new("RGB", (24, 16)), 1]), "image holds 2 for 1 prompts"),
        (dict(seed=[1, 2]), "seed holds 2 for 1 prompts"),
        (dict(seed=-1), "seed is -1; it must be between 0 and"),
        (dict(num_images_per_prompt=0), "num_images_per_prompt is 0"),
        (dict(num_inference_steps=0), "num_inference_steps is 0; it must be at least 1"),
        (dict(num_inference_steps=2.5), "num_inference_steps is 2.5; it must be a whole number"),
        (dict(height=0), "height is 0; it must be between 1 and 16384"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(guidance_scale="high"), "guidance_scale is 'high'; it must be a number"),
        (dict(sampler="eular"), "'eular' is not a sampler"),
        (dict(height=15), "images of 15x24 do not divide by 2"),
    ]:
        with pytest.raises(BadInput, match=line):
            pipeline.stream("a", **OPTIONS | options)
    image = Image.new("RGB", (24, 16))
    with pytest.raises(BadInput, match="some requests of a call have an image to start from and some have none"):
        pipeline.stream(["a", "b"], image=[image, None])
    for empty in (pipeline, pipeline.stream, pipeline.encode_prompt):
        with pytest.raises(BadInput, match="no prompt: give at least one"):
            empty([])
        with pytest.raises(BadInput, match="prompt is None; it must be a text or a list of texts"):
            empty(None)
        with pytest.raises(BadInput, match="prompt is 3; it must be a text"):
            empty([3])
    with pytest.raises(BadInput, match="no prompt: give at least one"):
        pipeline.sample(torch.zeros(0, 12, 16))


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
    half.vae = AutoencoderKL(**VAE, scale_factor=0.5)
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
        half.images_of(replace(next(iter(pipeline.stream("a", **OPTIONS | dict(num_inference_steps=1)))),
                              latents=torch.full((1, 4, 8, 12), float("nan"))))  # fmt: skip


def test_threads_sample_side_by_side(pipeline):
    expected = [images(pipeline, prompt, seed=3) for prompt in PROMPTS[:3]]
    found = [None] * 3

    def sample(number):
        found[number] = images(pipeline, PROMPTS[number], seed=3)

    threads = [threading.Thread(target=sample, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(apart(left, right) <= 1 for left, right in zip(found, expected, strict=True))


@pytest.mark.parametrize("syntax", ["plain", "webui"])
def test_stages_used_alone_make_the_same_image(pipeline, syntax):
    prompts = ["a (red:1.4) circle" if syntax == "webui" else "a red circle", LONG]
    text, null = pipeline.encode_prompt(prompts, "grey", prompt_syntax=syntax)
    assert text.shape == null.shape == (2, 24, 16)
    latents = pipeline.sample(text, null, seed=[3, 4], **OPTIONS)
    decoded = pipeline.decode(latents)
    assert latents.shape == (2, 4, 8, 12) and decoded.shape == (2, 3, 16, 24)
    assert apart([to_image(decoded[1])], images(pipeline, LONG, "grey", seed=4)) <= 1


def test_several_images_of_an_embedding_have_seeds_of_their_own(pipeline):
    text, null = pipeline.encode_prompt(["a red circle", "a blue square"])
    several = pipeline.sample(text, null, num_images_per_prompt=2, seed=[3, 8], **OPTIONS)
    for number, (prompt, seed) in enumerate([(0, 3), (0, 4), (1, 8), (1, 9)]):
        alone = pipeline.sample(text[prompt : prompt + 1], null[prompt : prompt + 1], seed=seed, **OPTIONS)
        error = (several[number] - alone[0]).abs().max() / alone.abs().max()
        assert error < 1e-4  # sums over a larger batch are rounded in another order


def test_sampling_without_null_text_is_unguided(pipeline):
    text, null = pipeline.encode_prompt("a red circle")
    size = dict(height=16, width=24, num_inference_steps=4)
    assert torch.equal(pipeline.sample(text, **size), pipeline.sample(text, null, guidance_scale=1.0, **size))
    with pytest.raises(BadInput, match="needs null_text_embeddings"):
        pipeline.sample(text, guidance_scale=3.0, **size)


def test_image_i_of_a_prompt_has_seed_plus_i(pipeline):
    several = images(pipeline, PROMPTS[:2], num_images_per_prompt=3, seed=[5, 20])
    pairs = [(prompt, seed + i) for prompt, seed in zip(PROMPTS[:2], (5, 20), strict=True) for i in range(3)]
    expected = [images(pipeline, prompt, seed=seed)[0] for prompt, seed in pairs]
    assert apart(several, expected) <= 1


def test_generators_take_the_place_of_seeds(pipeline):
    """One for each image, or one for all, used in turn, as diffusers fills its batch of noise."""
    own = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    options = dict(sampler="euler_a")
    assert apart(images(pipeline, PROMPTS[:2], generator=own, **options),
                 images(pipeline, PROMPTS[:2], seed=[5, 6], **options)) == 0  # fmt: skip
    latents = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(9))
    shared = images(pipeline, PROMPTS[:2], generator=torch.Generator().manual_seed(9))
    assert apart(shared, images(pipeline, PROMPTS[:2], latents=latents)) == 0
    with pytest.raises(BadInput, match="generator holds 2 for 1 images"):
        images(pipeline, PROMPTS[0], generator=own)


@pytest.mark.parametrize(
    ("keyword", "nearest"),
    [
        ("steps", "num_inference_steps"),
        ("num_inference_step", "num_inference_steps"),
        ("negative_prompts", "negative_prompt"),
        ("mask", "mask_image"),
        ("cfg_scale", "guidance_scale"),
        ("spacing", "timestep_spacing"),
    ],
)
def test_an_unknown_keyword_names_the_nearest(pipeline, keyword, nearest):
    with pytest.raises(TypeError, match=f"unknown keyword '{keyword}'; did you mean {nearest}"):
        pipeline("a", **{keyword: 1})


@pytest.mark.parametrize(
    ("keyword", "advice"),
    [
        ("frobnicate", "choose from"),
        ("num_images", "did you mean num_images_per_prompt"),
        ("callback_on_step_end", r"iterate over pipe.stream\(prompt\), which yields every step"),
        ("prompt_embeds", "give them to pipe.sample, and its latents to pipe.decode"),
        ("negative_prompt_embeds", "give them to pipe.sample, and its latents to pipe.decode"),
    ],
)
def test_an_unknown_keyword_that_nothing_is_like(pipeline, keyword, advice):
    with pytest.raises(TypeError, match=f"unknown keyword '{keyword}'; {advice}"):
        pipeline("a", **{keyword: 1})


def test_output_types(pipeline):
    """Of several sizes of batches, in the order of the prompts; "np" and "pt" are the images before rounding."""
    keywords = OPTIONS | dict(negative_prompt="grey", batch_size=2, num_images_per_prompt=2)
    shown, array, tensor, latents = (
        pipeline(PROMPTS[:3], **keywords, output_type=name).images for name in ("pil", "np", "pt", "latent")
    )
    assert (array.shape, tensor.shape, latents.shape) == ((6, 16, 24, 3), (6, 3, 16, 24), (6, 4, 8, 12))
    assert array.dtype == np.float32 and tensor.dtype == torch.float32
    assert (array == tensor.permute(0, 2, 3, 1).numpy()).all() and array.min() >= 0 and array.max() <= 1
    assert (np.abs(array * 255 - np.stack(arrays(shown))) <= 0.5001).all()
    assert torch.equal((pipeline.decode(latents) / 2 + 0.5).clamp(0, 1), tensor)
    with pytest.raises(BadInput, match="output_type 'jpg' is not one of pil, np, pt, latent"):
        pipeline("a", output_type="jpg")
    with pytest.raises(TypeError, match="unknown keyword 'output_type'"):
        pipeline.stream("a", output_type="pt")


def test_output_around_a_mask(pipeline):
    image, mask = Image.effect_noise((24, 16), 80).convert("RGB"), Image.new("L", (24, 16))
    mask.paste(255, (0, 0, 8, 16))
    made = pipeline("a", **OPTIONS, image=image, mask_image=mask, output_type="np").images[0]
    assert (np.rint(made[:, 8:] * 255) == np.asarray(image)[:, 8:]).all()


def test_sample_takes_no_prompts(pipeline):
    text, null = pipeline.encode_prompt("a")
    for keyword in ("negative_prompt", "prompt_syntax", "batch_size"):
        with pytest.raises(TypeError, match=f"{keyword} is not a keyword of sample; prompts go to encode_prompt"):
            pipeline.sample(text, null, **{keyword: "grey"})


def test_help_shows_every_keyword_with_its_default(pipeline):
    keywords = inspect.signature(pipeline).parameters
    assert list(keywords)[:2] == ["prompt", "negative_prompt"]
    assert (keywords["num_inference_steps"].default, keywords["guidance_scale"].default) == (25, 7.5)
    assert {"height", "generator", "latents", "strength", "eta", "num_images_per_prompt"} <= keywords.keys()


def test_to_moves_the_networks(pipeline):
    copied = copy.deepcopy(pipeline)
    assert copied.to("cpu", torch.bfloat16) is copied
    assert {next(part.parameters()).dtype for part in (copied.unet, copied.vae, copied.text_encoder)} == {
        torch.bfloat16
    }
    assert next(copied.to(torch.float32).unet.parameters()).dtype == torch.float32
    assert next(copied.to(dtype="bf16").unet.parameters()).dtype == torch.bfloat16
    with pytest.raises(BadInput, match="dtype float is not one of fp32, fp16, bf16"):
        copied.to(dtype="float")
    for device in ("nonsense", "cpu:nonsense", 2.5, *(["cuda"] if not torch.cuda.is_available() else [])):
        with pytest.raises(BadInput, match=f"^device {device}: .") as caught:
            copied.to(device)
        assert "\n" not in str(caught.value)
    assert copied.to("meta").device.type == "meta"


def test_options_of_nemos_infer_section():
    """The keys of NeMo's sd_infer.yaml as keywords of the pipeline."""
    infer = {"unconditional_guidance_scale": 5, "inference_steps": 30, "sampler_type": "PLMS", "eta": 0, "height": 512}
    found = options_from_nemo(infer | {"num_images_per_prompt": 4, "down_factor": 8, "width": None})
    expected = {"guidance_scale": 5, "num_inference_steps": 30, "sampler": "PLMS", "eta": 0, "height": 512}
    assert found == expected


def test_a_seed_beyond_32_bits_says_which_one_it_repeats(pipeline):
    """torch's generator on a CPU takes the lower 32 bits, in diffusers too."""
    small = images(pipeline, "a red circle", seed=5)
    for keywords in (dict(seed=5 + 2**32), dict(seed=5, variation_seed=2**32 + 6, variation_strength=0.5)):
        with pytest.warns(UserWarning, match=r"gives the noise of seed [56]: torch's generator on a CPU takes 32 bits"):
            large = images(pipeline, "a red circle", **keywords)
        if "variation_seed" not in keywords:
            assert apart(large, small) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images(pipeline, "a red circle", seed=2**32 - 1)
        images(pipeline, "a red circle", seed=2**40, generator=torch.Generator().manual_seed(5))


def test_few_steps_that_begin_far_from_noise_are_reported(pipeline):
    """The only leading timestep of a single step is the first: the network takes pure noise for a finished image."""
    few = OPTIONS | dict(sampler="ddim", timestep_spacing="leading")
    for steps, first in {1: 1, 2: 501, 3: 667}.items():  # steps_offset is 1
        with pytest.warns(UserWarning, match=f"{steps} steps begin at timestep {first} of 1000.* spacing trailing"):
            pipeline("a red circle", **few | dict(num_inference_steps=steps))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline("a red circle", **few)
        pipeline("a red circle", **few | dict(num_inference_steps=1, timestep_spacing="trailing"))
        start = pipeline("a red circle", **few).images[0]
        pipeline("a red circle", image=start, strength=1.0, **few | dict(num_inference_steps=2))
