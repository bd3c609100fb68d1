"""What we write, others open: diffusers without a warning, torch and safetensors bit for bit; and every round trip."""

import json
import logging
import tarfile
import warnings
from dataclasses import replace
from functools import partial

import diffusers
import pytest
import safetensors.torch
import torch
import yaml
from diffusers.loaders import single_file_utils as theirs

from latentsmith.checkpoints import (
    ModelSpec,
    export_ldm,
    export_nemo,
    match,
    open_checkpoint,
    prediction_of,
    spec_of,
    unused_text,
)
from latentsmith.checkpoints.formats import FORMATS
from latentsmith.files.errors import BadInput
from latentsmith.files.tensors import open_tensors

PARTS = ("unet", "vae", "text_encoder")
TOKENS = {chr(33 + i): i for i in range(94)} | {"<|startoftext|>": 94, "<|endoftext|>": 95}
TOKENIZER = {"vocab.json": json.dumps(TOKENS).encode(), "merges.txt": b"#version: 0.2\n"}
WRITABLE = {name: format for name, format in FORMATS.items() if format.write}
EXPORTERS = {
    name: partial(format.write, tokenizer=TOKENIZER) if format.needs_tokenizer else format.write
    for name, format in WRITABLE.items()
}
NAMES = {name: f"model{format.ending}" for name, format in WRITABLE.items()}
export_folder = EXPORTERS["diffusers"]


def read_part(path, part, shapes, *, weights="ema", from_nemo=None):
    found = match(open_checkpoint(path, weights), part, shapes, from_nemo)
    return {name: tensor.read() for name, tensor in found.items()}


@pytest.fixture(scope="session")
def canonical(reference_folder, shapes):
    return {part: read_part(reference_folder, part, shapes[part]) for part in PARTS}


@pytest.fixture(scope="session")
def spec(reference):
    v2 = reference.version == 2
    unet = dict(model_channels=32, channel_mult=[1, 2, 2], num_res_blocks=2, attention_resolutions=[2, 1],
                num_heads=2, context_dim=32, use_linear_in_transformer=v2)  # fmt: skip
    ddconfig = dict(z_channels=4, ch=32, ch_mult=[1, 2, 2], num_res_blocks=1)
    text = dict(width=32, layers=4 if v2 else 3, heads=2, intermediate_size=64, vocab_size=128, max_length=16)
    text |= dict(activation="gelu", layer="penultimate") if v2 else dict(activation="quick_gelu")
    return ModelSpec(
        unet, dict(embed_dim=4, ddconfig=ddconfig), text, "v_prediction" if v2 else "epsilon", image_size=16
    )


def equal(left, right):
    assert set(left) == set(right), sorted(set(left) ^ set(right))[:6]
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("second", EXPORTERS)
@pytest.mark.parametrize("first", EXPORTERS)
def test_round_trips_are_bit_exact(tmp_path, canonical, shapes, spec, first, second):
    """canonical -> first -> second -> canonical, each step streamed from the file before."""
    parts = canonical
    for step, format in enumerate((first, second)):
        path = tmp_path / str(step) / NAMES[format]
        EXPORTERS[format](parts, path, spec)
        checkpoint = open_checkpoint(path)
        parts = {part: match(checkpoint, part, shapes[part]) for part in PARTS}
    for part in PARTS:
        equal({name: tensor.read() for name, tensor in parts[part].items()}, canonical[part])


@pytest.mark.parametrize("format", EXPORTERS)
def test_half_precision(tmp_path, canonical, shapes, spec, format):
    path = tmp_path / NAMES[format]
    EXPORTERS[format](canonical, path, spec, dtype=torch.bfloat16)
    for part in PARTS:
        half = {name: tensor.bfloat16() for name, tensor in canonical[part].items()}
        equal(read_part(path, part, shapes[part]), half)


def test_diffusers_opens_the_folder_without_a_warning(tmp_path, reference, canonical, spec, caplog):
    export_folder(canonical, tmp_path / "out", spec)
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False)
    for logger in loggers:
        logger.removeHandler(handler)
    absent = "torchvision"  # a word about what is installed here, not about the folder
    assert [message for message in messages if absent not in message] == []
    for part in PARTS:
        equal(getattr(pipeline, part).state_dict(), getattr(reference, part).state_dict())
    assert pipeline.scheduler.config.prediction_type == spec.prediction_type
    for part in ("unet", "vae"):
        own, given = dict(getattr(pipeline, part).config), dict(getattr(reference, part).config)
        plain = lambda value: list(value) if isinstance(value, tuple) else value  # noqa: E731
        assert [key for key in given if plain(own[key]) != plain(given[key]) and not key.startswith("_")] == []
    assert pipeline.text_encoder.config.hidden_act == reference.text_encoder.config.hidden_act


def test_outputs_agree_with_the_original(tmp_path, reference, canonical, spec):
    export_folder(canonical, tmp_path / "out", spec)
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet").eval()
    torch.manual_seed(0)
    inputs = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 7, 32)
    with torch.no_grad():
        # Not bit for bit: kernels round by the alignment of the weights in memory.
        torch.testing.assert_close(unet(*inputs).sample, reference.unet.eval()(*inputs).sample, rtol=1e-5, atol=1e-6)


def test_ldm_file_is_read_by_diffusers_own_converters(tmp_path, reference, canonical, spec):
    export_ldm(canonical, tmp_path / "m.safetensors", spec)
    state = safetensors.torch.load_file(tmp_path / "m.safetensors")
    unet = theirs.convert_ldm_unet_checkpoint(dict(state), dict(reference.unet.config))
    equal(unet, reference.unet.state_dict())
    equal(theirs.convert_ldm_vae_checkpoint(dict(state), dict(reference.vae.config)), reference.vae.state_dict())


def test_ldm_key_set(tmp_path, reference, canonical, spec):
    export_ldm(canonical, tmp_path / "m.safetensors", spec, title="tiny")
    file = open_tensors(tmp_path / "m.safetensors")
    text = [name for name in file if name.startswith("cond_stage_model.")]
    layers, prefix = (
        3,
        "cond_stage_model.model." if reference.version == 2 else "cond_stage_model.transformer.text_model.",
    )
    assert all(name.startswith(prefix) for name in text)
    assert len(text) == (12 * layers + 4 if reference.version == 2 else 16 * layers + 4 + 1)
    assert len(file) == len(canonical["unet"]) + len(canonical["vae"]) + len(text) + 12
    assert file.metadata["modelspec.title"] == "tiny" and file.metadata["modelspec.resolution"] == "64x64"
    assert ("latentsmith.omitted" in file.metadata) == (reference.version == 2)


def test_schedule_buffers_are_ldms(tmp_path, canonical, spec):
    export_ldm(canonical, tmp_path / "m.safetensors", spec)
    file = open_tensors(tmp_path / "m.safetensors")
    reference = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(file["alphas_cumprod"], reference.alphas_cumprod, rtol=2e-6, atol=0)
    kept = file["alphas_cumprod"]
    assert [kept[t].item() for t in (0, 499, 999)] == pytest.approx([0.99915, 0.27766965, 0.0046600985], rel=1e-6)
    assert all(file.entries[name].shape == (1000,) for name in file if "." not in name)
    variance = torch.stack([reference._get_variance(t) for t in (1, 500, 999)])
    torch.testing.assert_close(file["posterior_variance"][[1, 500, 999]], variance, rtol=1e-4, atol=0)


def test_nemo_archive_is_torchs_and_tars(tmp_path, reference, canonical, spec):
    export_nemo(canonical, tmp_path / "m.nemo", spec)
    with tarfile.open(tmp_path / "m.nemo") as archive:
        assert archive.getnames() == ["./model_config.yaml", "./model_weights.ckpt"]
        archive.extractall(tmp_path / "out", filter="data")
    state = torch.load(tmp_path / "out" / "model_weights.ckpt", weights_only=True)
    mapped = torch.load(tmp_path / "out" / "model_weights.ckpt", weights_only=True, mmap=True)
    equal(state, mapped)
    weight = canonical["unet"]["input_blocks.1.1.transformer_blocks.0.norm3.weight"]
    assert torch.equal(
        state["model.model.diffusion_model.input_blocks.1.1.transformer_blocks.0.ff.net.0.weight"], weight
    )
    assert torch.equal(state["model.model.diffusion_model.out.1.bias"], canonical["unet"]["out.2.bias"])
    text = [name for name in state if name.startswith("model.cond_stage_model.")]
    if reference.version == 2:  # one layer more than the model's three, and the projection, all zero
        assert len(text) == 12 * 4 + 4 + 2
        assert not state["model.cond_stage_model.model.transformer.resblocks.3.mlp.c_fc.weight"].any()
    config = yaml.safe_load((tmp_path / "out" / "model_config.yaml").read_text())
    assert config["parameterization"] == {"epsilon": "eps", "v_prediction": "v"}[spec.prediction_type]
    embedder = "FrozenOpenCLIPEmbedder" if reference.version == 2 else "FrozenCLIPEmbedder"
    assert config["cond_stage_config"]["_target_"].endswith(embedder)


@pytest.mark.parametrize("format", EXPORTERS)
def test_the_spec_comes_back(tmp_path, canonical, spec, format):
    path = tmp_path / NAMES[format]
    EXPORTERS[format](canonical, path, spec)
    back = spec_of(open_checkpoint(path))
    assert prediction_of(open_checkpoint(path))[0] == spec.prediction_type == back.prediction_type
    assert (back.image_size, back.scale_factor, back.open_clip) == (16, 0.18215, spec.open_clip)
    for key, value in spec.unet_config.items():
        assert back.unet_config[key] == value, key
    for key, value in spec.first_stage_config["ddconfig"].items():
        assert back.first_stage_config["ddconfig"][key] == value, key
    assert back.cond_stage_config["heads"] == 2


@pytest.mark.parametrize("format", EXPORTERS)
def test_schedule_and_null_text_come_back(tmp_path, canonical, spec, format):
    odd = replace(spec, null_text="zero", beta_schedule="sqrt_linear", linear_start=0.001)
    EXPORTERS[format](canonical, tmp_path / NAMES[format], odd)
    back = spec_of(open_checkpoint(tmp_path / NAMES[format]))
    assert (back.null_text, back.beta_schedule, back.linear_start) == ("zero", "sqrt_linear", 0.001)
    if format == "ldm":
        betas = open_tensors(tmp_path / NAMES[format])["betas"]
        torch.testing.assert_close(betas, torch.linspace(0.001, 0.012, 1000), rtol=1e-6, atol=0)
    with pytest.raises(BadInput, match="beta_schedule cosine"):
        EXPORTERS[format](canonical, tmp_path / "other", replace(spec, beta_schedule="cosine"))


@pytest.mark.parametrize("format", EXPORTERS)
def test_what_a_format_has_no_key_for_comes_back(tmp_path, canonical, spec, format):
    unet = {**spec.unet_config, "upcast_attention": True}
    text = {**spec.cond_stage_config, "pad_to": 20}
    odd = replace(
        spec, unet_config=unet, cond_stage_config=text, zero_terminal_snr=True, timestep_spacing="linspace",
        steps_offset=0, set_alpha_to_one=True,
    )  # fmt: skip
    EXPORTERS[format](canonical, tmp_path / NAMES[format], odd)
    back = spec_of(open_checkpoint(tmp_path / NAMES[format]))
    assert back.unet_config["upcast_attention"]
    assert (back.zero_terminal_snr, back.timestep_spacing, back.steps_offset) == (True, "linspace", 0)
    assert back.set_alpha_to_one is True
    if format != "nemo":  # there the embedder's class says it
        assert back.cond_stage_config["pad_to"] == 20


@pytest.mark.parametrize("way", [("ldm",), ("nemo",), ("nemo", "ldm"), ("ldm", "nemo")])
def test_what_nothing_uses_of_a_v2_text_tower_is_kept(tmp_path, reference, canonical, shapes, spec, way):
    if reference.version == 1:
        assert unused_text(open_checkpoint(written(tmp_path, canonical, spec, "ldm")), shapes["text_encoder"]) == {}
        return
    last = {
        name.replace("layers.2.", "layers.3."): torch.randn(tensor.shape)
        for name, tensor in canonical["text_encoder"].items()
        if "layers.2." in name
    }
    whole = last | {"text_projection": torch.randn(32, 32), "logit_scale": torch.randn(())}
    parts = {**canonical, "text_encoder": canonical["text_encoder"] | whole}
    for format in way:
        checkpoint = open_checkpoint(written(tmp_path, parts, spec, format))
        extra = unused_text(checkpoint, shapes["text_encoder"])
        parts = {part: match(checkpoint, part, shapes[part]) for part in PARTS}
        parts["text_encoder"] |= extra
        assert spec_of(checkpoint).penultimate and "latentsmith.omitted" not in checkpoint.metadata
        equal({name: tensor.read() for name, tensor in extra.items()}, whole)
    plain = open_checkpoint(written(tmp_path / "plain", canonical, spec, way[-1]))
    assert unused_text(plain, shapes["text_encoder"]) == {}


def written(folder, parts, spec, format):
    folder.mkdir(exist_ok=True)
    EXPORTERS[format](parts, folder / NAMES[format], spec)
    return folder / NAMES[format]


def test_progress_names_every_tensor(tmp_path, canonical, spec):
    for format, export in EXPORTERS.items():
        names = []
        export(canonical, tmp_path / NAMES[format], spec, written=names.append)
        assert len(names) >= sum(len(part) for part in canonical.values()) - 3 * 4 and len(set(names)) == len(names)


def test_nothing_is_overwritten_or_left_behind(tmp_path, canonical, spec):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(BadInput, match="exists already"):
        export_folder(canonical, tmp_path / "out", spec)

    def stop(name):
        raise KeyboardInterrupt

    for format, export in EXPORTERS.items():
        with pytest.raises(KeyboardInterrupt):
            export(canonical, tmp_path / "half" / NAMES[format], spec, written=stop)
    assert list((tmp_path / "half").iterdir()) == []


def test_what_cannot_be_expressed(tmp_path, canonical, spec):
    groups = replace(spec, unet_config={**spec.unet_config, "resblock_gn_groups": 16})
    with pytest.raises(BadInput, match="resblock_gn_groups 16: diffusers has one number"):
        export_folder(canonical, tmp_path / "out", groups)
    with pytest.raises(BadInput, match="a whole model was expected, vae is missing"):
        export_ldm({"unet": canonical["unet"]}, tmp_path / "m.safetensors", spec)
