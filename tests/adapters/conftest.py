"""Tiny models of both versions: a diffusers folder, its networks in diffusers' classes, and ours."""

import json
from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers

from latentsmith import AutoencoderKL, ClipTextEncoder, Pipeline, UNetModel
from latentsmith.adapters.names import layers_of
from latentsmith.checkpoints import ModelSpec, export_diffusers
from latentsmith.text.tokenizer import train_vocabulary

UNET = dict(model_channels=32, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[1, 2], context_dim=24)
VAE = dict(embed_dim=4, ddconfig=dict(z_channels=4, ch=32, ch_mult=[1, 2], num_res_blocks=1))
TEXT = dict(width=24, layers=2, heads=2, intermediate_size=48, vocab_size=520, max_length=77)


@pytest.fixture(scope="session")
def models(tmp_path_factory, randomise):
    """Version -> its folder, diffusers' U-Net and transformers' text encoder, our pipeline and its layers."""
    folder = tmp_path_factory.mktemp("models")
    train_vocabulary(["a red circle"], 518, folder / "words")
    words = {file.name: file.read_bytes() for file in (folder / "words").iterdir()}
    words["tokenizer_config.json"] = json.dumps(
        dict(tokenizer_class="CLIPTokenizer", model_max_length=77, pad_token="<|endoftext|>")
    ).encode()
    return {version: _model(folder / f"v{version}", version, words, randomise) for version in (1, 2)}


def _model(folder, version, words, randomise):
    unet = UNET | (dict(num_heads=2) if version == 1 else dict(num_head_channels=16, use_linear_in_transformer=True))
    text = TEXT | dict(activation="quick_gelu" if version == 1 else "gelu")
    networks = {
        "unet": UNetModel(**unet),
        "vae": AutoencoderKL(**VAE),
        "text_encoder": ClipTextEncoder(**text),
    }
    for seed, network in enumerate(networks.values()):
        randomise(network, seed)
    spec = ModelSpec(unet, VAE, text, "epsilon", image_size=8)
    parts = {name: dict(network.state_dict()) for name, network in networks.items()}
    export_diffusers(parts, folder, spec, tokenizer=words)
    return SimpleNamespace(
        folder=folder,
        unet=lambda: diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        text_encoder=lambda: transformers.CLIPTextModel.from_pretrained(folder / "text_encoder"),
        pipeline=lambda: Pipeline.from_pretrained(folder, device="cpu"),
        layers=layers_of({name: networks[name] for name in ("unet", "text_encoder")}),
    )


@pytest.fixture(scope="session", params=[1, 2], ids=["v1", "v2"])
def model(request, models):
    return models[request.param]


@pytest.fixture(scope="session")
def inputs():
    generator = torch.Generator().manual_seed(1)
    latents, text = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, 24)))
    return latents, torch.tensor([3, 500]), text
