"""The same folder, prompt and noise give diffusers' StableDiffusionPipeline and ours the same image."""

import gc
import json
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from latentsmith import Pipeline, convert
from latentsmith.files.errors import BadInput
from latentsmith.files.tensors import open_tensors
from latentsmith.text import vocabulary

PROMPTS = ["a red circle above a small blue square", "Naïve  café, 3 boats!"]
NEGATIVE = "blurry, grey"
SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
# What published folders say, and what diffusers writes for those who say nothing.
SCHEDULERS = {
    "sd1": diffusers.PNDMScheduler(**SD, steps_offset=1, skip_prk_steps=True),
    "sd2_v": diffusers.DDIMScheduler(
        **SD, steps_offset=1, set_alpha_to_one=False, clip_sample=False, prediction_type="v_prediction"
    ),
    "plain": diffusers.DDIMScheduler(clip_sample=False),
    "trailing": diffusers.DDIMScheduler(**SD, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False),
}
# ours -> theirs, which takes over the folder's config, as users of diffusers change schedulers
SAMPLERS = {
    "ddim": (diffusers.DDIMScheduler, dict(clip_sample=False)),
    "plms": (diffusers.PNDMScheduler, dict(skip_prk_steps=True)),
    "dpmsolver++": (diffusers.DPMSolverMultistepScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
}


def write_vocabulary(folder, size, pad="<|endoftext|>"):
    """The first merges of CLIP's vocabulary, from the file in the open_clip package: vocab.json and merges.txt."""
    found = vocabulary._open_clip_file()
    if found is None:
        pytest.skip("the open_clip package is not installed")
    merges = vocabulary.read_vocabulary(found).merges[: size - 514]
    folder.mkdir()
    tokens = vocabulary.clip_tokens(merges)
    (folder / "vocab.json").write_text(json.dumps(tokens))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
    special = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    special |= dict(pad_token=pad)
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = special | dict(tokenizer_class="CLIPTokenizer", model_max_length=77)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def tiny_sizes():
    return SimpleNamespace(
        unet=dict(
            block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=4,
            sample_size=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        vae=dict(
            block_out_channels=(32, 64, 64), down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, sample_size=32,
        ),
        text=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=1000),
    )  # fmt: skip


def sd1_sizes():
    return SimpleNamespace(
        unet=dict(attention_head_dim=8, cross_attention_dim=768, sample_size=64),
        vae=dict(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, sample_size=512,
        ),
        text=dict(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=49408
        ),
    )  # fmt: skip


def save_pipeline(folder, sizes, scheduler, randomise):
    """A random model as diffusers' own pipeline saves it."""
    text = transformers.CLIPTextConfig(max_position_embeddings=77, **dict(hidden_act="quick_gelu") | sizes.text)
    pad = "!" if text.hidden_act == "gelu" else "<|endoftext|>"  # as v2's and v1's published folders have
    tokenizer = write_vocabulary(folder.with_name(folder.name + "-tokenizer"), sizes.text["vocab_size"], pad)
    vae = diffusers.AutoencoderKL(latent_channels=4, scaling_factor=0.18215, **sizes.vae)
    diffusers.StableDiffusionPipeline(
        unet=randomise(diffusers.UNet2DConditionModel(**sizes.unet), seed=1).eval(),
        vae=randomise(vae, seed=2).eval(),
        text_encoder=randomise(transformers.CLIPTextModel(text), seed=3).eval(),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(tokenizer),
        scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def opened(folder):
    """The folder as each library opens it, and the scheduler config that diffusers read."""
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    return SimpleNamespace(theirs=theirs, ours=Pipeline.from_pretrained(folder), config=theirs.scheduler.config)


def their_images(model, sampler, noise, steps, **options):
    pipeline = model.theirs
    cls, settings = SAMPLERS[sampler]
    pipeline.scheduler = cls.from_config(model.config, **settings)
    factor = pipeline.vae_scale_factor
    height, width = (factor * side for side in noise.shape[2:])
    return pipeline(height=height, width=width, latents=noise, num_inference_steps=steps, **options).images


def our_images(model, sampler, noise, steps, prompts, **options):
    pipeline = model.ours
    height, width = (pipeline.vae.downsampling * side for side in noise.shape[2:])
    return pipeline(
        prompts, height=height, width=width, latents=noise, num_inference_steps=steps, sampler=sampler, **options
    ).images


def largest_difference(found, expected):
    """In 255ths."""
    pairs = [(np.asarray(left, int), np.asarray(right, int)) for left, right in zip(found, expected, strict=True)]
    assert all(left.shape == right.shape for left, right in pairs)
    assert all(right.std() > 10 for _, right in pairs), "an image of one colour would prove nothing"
    return max(abs(left - right).max() for left, right in pairs)


def noise(height=8, width=8, batch=2):
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(11))


@pytest.fixture(scope="module", params=SCHEDULERS)
def model(request, randomise, tmp_path_factory):
    at = tmp_path_factory.mktemp(request.param) / "model"
    save_pipeline(at, tiny_sizes(), SCHEDULERS[request.param], randomise)
    if request.param == "sd1":  # published before there was a spacing to choose: each sampler takes its own
        file = at / "scheduler" / "scheduler_config.json"
        config = json.loads(file.read_text())
        del config["timestep_spacing"], config["prediction_type"]
        file.write_text(json.dumps(config))
    return opened(at)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_ten_steps_with_guidance(model, sampler):
    if sampler == "plms" and model.ours.spec.prediction_type == "v_prediction":
        pytest.skip("diffusers averages velocities, we the noise they imply, as LDM does")
    expected = their_images(model, sampler, noise(), 10, prompt=PROMPTS, guidance_scale=7.5)
    found = our_images(model, sampler, noise(), 10, PROMPTS, guidance_scale=7.5)
    assert largest_difference(found, expected) <= 1


def final_latents(pipeline, sampler="ddim", steps=10):
    size = dict(height=32, width=32, num_inference_steps=steps)
    *_, last = pipeline.stream(PROMPTS, latents=noise(), sampler=sampler, guidance_scale=7.5, **size)
    return last.latents


def largest_relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++"])
def test_latents_of_ten_steps(model, sampler):
    """Closer than images can show: guidance of 7.5 and ten steps leave about 3e-6 of float32's rounding."""
    expected = their_images(model, sampler, noise(), 10, prompt=PROMPTS, guidance_scale=7.5, output_type="latent")
    difference = largest_relative(final_latents(model.ours, sampler), expected)
    assert difference < 3e-5


@pytest.mark.parametrize(
    "key, value", [("steps_offset", 0), ("set_alpha_to_one", True), ("timestep_spacing", "trailing")]
)
def test_every_key_of_the_scheduler_config_shows(sd1, key, value, monkeypatch):
    before = final_latents(sd1.ours)
    monkeypatch.setattr(sd1.ours, "spec", replace(sd1.ours.spec, **{key: value}))
    assert largest_relative(final_latents(sd1.ours), before) > 1e-3


@pytest.fixture(scope="module")
def sd1(randomise, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd1-tiny") / "model"
    return opened(save_pipeline(folder, tiny_sizes(), SCHEDULERS["sd1"], randomise))


def test_prompts_and_token_ids(sd1):
    texts = [*PROMPTS, "", NEGATIVE, "word " * 20]
    expected = sd1.theirs.tokenizer(
        texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    ).input_ids
    assert torch.equal(sd1.ours.tokenizer(texts), expected)


def test_negative_prompt_shape_and_steps(sd1):
    start = noise(6, 12)
    expected = their_images(
        sd1, "dpmsolver++", start, 7, prompt=PROMPTS, negative_prompt=[NEGATIVE] * 2, guidance_scale=3.0
    )
    found = our_images(
        sd1, "DPM++ 2M", start, 7, PROMPTS, negative_prompt=NEGATIVE,
        guidance_scale=3.0,
    )  # fmt: skip
    assert largest_difference(found, expected) <= 1


def test_without_guidance(sd1):
    expected = their_images(sd1, "ddim", noise(), 4, prompt=PROMPTS, guidance_scale=1.0)
    found = our_images(sd1, "ddim", noise(), 4, PROMPTS, guidance_scale=1.0)
    assert largest_difference(found, expected) <= 1


def test_no_negative_prompt_is_the_checkpoints_null_text(sd1, monkeypatch):
    """A diffusers folder's is the empty prompt; a model trained with zeroed embeddings has zeros."""
    pipeline = sd1.ours
    options = dict(num_inference_steps=3, guidance_scale=5.0, latents=noise(), height=32, width=32)
    by_default = np.asarray(pipeline(PROMPTS, **options).images[0])
    empty = np.asarray(pipeline(PROMPTS, "", **options).images[0])
    assert (by_default == empty).all()
    monkeypatch.setattr(pipeline, "spec", replace(pipeline.spec, null_text="zero"))
    zero = np.asarray(pipeline(PROMPTS, **options).images[0])
    assert (zero != empty).any() and (np.asarray(pipeline(PROMPTS, "", **options).images[0]) == empty).all()


def test_an_image_is_a_function_of_its_own_seed(sd1):
    pipeline = sd1.ours
    for sampler in ("ddim", "euler_a"):
        options = dict(num_inference_steps=3, height=32, width=32, sampler=sampler)
        both = pipeline(PROMPTS, seed=[5, 6], **options).images
        alone = pipeline(PROMPTS[1:], seed=6, **options).images
        assert largest_difference(alone, both[1:]) <= 1  # batches of one and two round differently
        split = pipeline(PROMPTS, seed=[5, 6], batch_size=1, **options).images
        assert largest_difference(split, both) <= 1


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_the_same_generator_is_the_same_images(sd1, sampler):
    """Noise to start from, and that of a random sampler, comes from a generator as it does in diffusers."""
    theirs = sd1.theirs
    cls = {"ddim": diffusers.DDIMScheduler, "euler_a": diffusers.EulerAncestralDiscreteScheduler}[sampler]
    theirs.scheduler = cls.from_config(sd1.config, **SAMPLERS["ddim"][1])
    options = dict(height=32, width=32, num_inference_steps=6, guidance_scale=5.0, num_images_per_prompt=2)
    both = [
        pipeline(PROMPTS, generator=torch.Generator().manual_seed(4), **options, **own).images
        for pipeline, own in ((theirs, {}), (sd1.ours, dict(sampler=sampler)))
    ]
    assert largest_difference(*both) <= 1


def test_latents_of_another_shape(sd1):
    pipeline = sd1.ours
    line = r"latents of an image are \(4, 6, 8\); images of 32x32 start from \(4, 8, 8\)"
    with pytest.raises(BadInput, match=line):
        pipeline(PROMPTS, latents=noise(6, 8), height=32, width=32)
    with pytest.raises(BadInput, match="seed holds 1 for 2 prompts"):
        pipeline(PROMPTS, seed=[3], height=32, width=32)


@pytest.mark.parametrize(
    "options, line",
    [
        (dict(height=36, width=30), "images of 36x30 do not divide by 4"),
        (dict(sampler="ddmi"), "'ddmi' is not a sampler; did you mean ddpm or ddim"),
        (dict(num_inference_steps=1001), "steps is 1001"),
        (dict(num_inference_steps=0), "steps is 0"),
        (dict(negative_prompt=["a", "b"]), "negative_prompt holds 2 for 1 prompts"),
    ],
)
def test_what_cannot_be_sampled(sd1, options, line):
    pipeline = sd1.ours
    with pytest.raises(BadInput, match=line):
        pipeline("a boat", **dict(height=32, width=32) | options)


@pytest.fixture(scope="module")
def to_start_from():
    """A smooth image of 32x32 and a mask whose edges lie on the VAE's."""
    rows, columns = np.mgrid[0:32, 0:32]
    pixels = np.stack([rows * 8, columns * 8, (rows + columns) * 4], -1).astype(np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 12:32] = 255
    return Image.fromarray(pixels), Image.fromarray(mask)


@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++", "euler"])
def test_an_image_to_start_from(sd1, to_start_from, sampler):
    cls, settings = SAMPLERS[sampler]
    parts = {**sd1.theirs.components, "scheduler": cls.from_config(sd1.config, **settings)}
    theirs = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    compared(sd1, theirs, sampler, dict(image=to_start_from[0]))


def test_a_masked_image(sd1, to_start_from):
    """diffusers puts the noised image back around the mask after every step, we the clean estimate inside it."""
    cls, settings = SAMPLERS["ddim"]
    parts = {**sd1.theirs.components, "scheduler": cls.from_config(sd1.config, **settings)}
    theirs = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    image, mask = to_start_from
    compared(sd1, theirs, "ddim", dict(image=image), dict(mask_image=mask, height=32, width=32))
    kept = np.asarray(mask) == 0
    options = dict(sampler="ddim", num_inference_steps=10, strength=0.6, seed=3)
    masked = sd1.ours(PROMPTS[0], image=image, mask_image=mask, **options).images[0]
    assert (np.asarray(masked)[kept] == np.asarray(image)[kept]).all()
    assert (np.asarray(masked)[~kept] != np.asarray(image)[~kept]).mean() > 0.5


def compared(model, theirs, sampler, given, masked=None):
    """The image of one prompt; the VAE's deviation is made 0, since diffusers samples it and we take the mean."""
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    torch.randn(1, 4, 8, 8, generator=generator)  # diffusers' first draw is for the VAE
    start = torch.randn(1, 4, 8, 8, generator=generator)
    moments = model.theirs.vae.quant_conv
    before = moments.bias.data.clone()
    moments.bias.data[4:] = -1e4
    try:
        options = dict(prompt=PROMPTS[0], strength=0.6, num_inference_steps=10, guidance_scale=7.5)
        seeded = torch.Generator().manual_seed(3)
        expected = theirs(**options, **given, **(masked or {}), generator=seeded).images
    finally:
        moments.bias.data = before
    found = model.ours(
        PROMPTS[0], latents=start, sampler=sampler, num_inference_steps=10, strength=0.6, guidance_scale=7.5, **given,
        **({"mask_image": masked["mask_image"]} if masked else {}),
    ).images  # fmt: skip
    if masked:  # theirs decodes what is kept
        kept = np.asarray(masked["mask_image"]) == 0
        both = [np.where(kept[..., None], 0, np.asarray(images[0], int)) for images in (found, expected)]
        assert abs(both[0] - both[1]).max() <= 1
    else:
        assert largest_difference(found, expected) <= 1


def test_guidance_rescale(sd1):
    expected = their_images(
        sd1, "ddim", noise(), 6, prompt=PROMPTS, guidance_scale=9.0, guidance_rescale=0.7
    )  # fmt: skip
    found = our_images(sd1, "ddim", noise(), 6, PROMPTS, guidance_scale=9.0, guidance_rescale=0.7)
    assert largest_difference(found, expected) <= 1


def test_no_prompts(sd1):
    with pytest.raises(BadInput, match="no prompt"):
        sd1.ours([])


def full_size(version):
    """Sizes and scheduler of Stable Diffusion v1, or of v2 with velocities."""
    if version == 1:
        return sd1_sizes(), SCHEDULERS["sd1"]
    sizes = sd1_sizes()
    sizes.unet |= dict(attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024, use_linear_projection=True)
    sizes.text |= dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16)
    sizes.text |= dict(hidden_act="gelu")
    return sizes, SCHEDULERS["sd2_v"]


def image_by_diffusers(folder):
    """128 pixels, ten steps of DDIM, guidance; one library's model at a time is in memory."""
    gc.collect()
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    model = SimpleNamespace(theirs=theirs, config=theirs.scheduler.config)
    return their_images(model, "ddim", noise(16, 16, batch=1), 10, prompt=PROMPTS[:1], guidance_scale=7.5)


def image_by_us(path):
    gc.collect()
    model = SimpleNamespace(ours=Pipeline.from_pretrained(path))
    return our_images(model, "ddim", noise(16, 16, batch=1), 10, PROMPTS[:1], guidance_scale=7.5)


def same_weights(left, right):
    """Bit for bit, part by part, of two diffusers folders."""
    for part in ("unet", "vae", "text_encoder"):
        files = [open_tensors(next((folder / part).glob("*.safetensors"))) for folder in (left, right)]
        named = [{name.removeprefix("text_model."): name for name in file.entries} for file in files]
        assert named[0].keys() == named[1].keys()
        assert all(torch.equal(files[0][named[0][name]], files[1][named[1][name]]) for name in named[0]), part


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_full_size_there_and_back(version, randomise, tmp_path):
    """diffusers' folder -> ours -> one LDM file -> .nemo -> a folder that diffusers opens: one image, the same bits.

    Differences are in 255ths of a pixel."""
    sizes, scheduler = full_size(version)
    folder = save_pipeline(tmp_path / "model", sizes, scheduler, randomise)
    expected = image_by_diffusers(folder)
    ours = image_by_us(folder)
    ldm = convert(folder, tmp_path / "m.safetensors", "ldm")
    single = image_by_us(ldm)
    nemo = convert(ldm, tmp_path / "m.nemo", "nemo")
    ldm.unlink()
    archive = image_by_us(nemo)
    back = convert(nemo, tmp_path / "back", "diffusers")
    nemo.unlink()
    differences = [largest_difference(found, expected) for found in (ours, single, archive)]
    print("largest differences from diffusers, of 255:", differences)
    assert max(differences) <= 1
    same_weights(folder, back)
    assert largest_difference(image_by_diffusers(back), expected) == 0
