"""Tiny random models of diffusers' and transformers' own classes, and ours on the meta device for names and shapes."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers

from latentsmith.models.autoencoder import AutoencoderKL
from latentsmith.models.text_encoder import ClipTextEncoder
from latentsmith.models.unet import UNetModel

UNET = dict(model_channels=32, channel_mult=[1, 2, 2], num_res_blocks=2, attention_resolutions=[2, 1])
DDCONFIG = dict(double_z=True, z_channels=4, ch=32, ch_mult=[1, 2, 2], num_res_blocks=1, in_channels=3, out_ch=3)
TEXT = dict(width=32, heads=2, intermediate_size=64, vocab_size=128, max_length=16)


def shapes_of(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def our_shapes(version, unet=None, layers=None):
    """Part -> names and shapes of our modules, which match `tiny_model(version)`."""
    context = dict(context_dim=32, num_heads=2, use_linear_in_transformer=version == 2)
    activation = "gelu" if version == 2 else "quick_gelu"
    with torch.device("meta"):
        return {
            "unet": shapes_of(UNetModel(**(UNET | context | (unet or {})))),
            "vae": shapes_of(AutoencoderKL(ddconfig=DDCONFIG)),
            "text_encoder": shapes_of(ClipTextEncoder(**TEXT, activation=activation, layers=layers or 3)),
        }


def tiny_model(version):
    """Random U-Net, VAE and text encoder of the libraries' classes. version 2: linear projections, exact GELU."""
    torch.manual_seed(version)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64, 64), layers_per_block=2, cross_attention_dim=32, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"), sample_size=16,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), use_linear_projection=version == 2,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 64), layers_per_block=1, latent_channels=4, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, vocab_size=128,
        max_position_embeddings=16, hidden_act="gelu" if version == 2 else "quick_gelu",
    ))  # fmt: skip
    return SimpleNamespace(version=version, unet=unet, vae=vae, text_encoder=text)


@pytest.fixture(scope="session", params=[1, 2], ids=["v1", "v2"])
def reference(request):
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def reference_folder(reference, tmp_path_factory):
    """The model as diffusers and transformers save it, with the scheduler of its version."""
    folder = tmp_path_factory.mktemp(f"diffusers-v{reference.version}")
    for name in ("unet", "vae", "text_encoder"):
        getattr(reference, name).save_pretrained(folder / name)
    betas = {"beta_start": 0.00085, "beta_end": 0.012}
    if reference.version == 1:
        scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, **betas)
    else:
        scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction", **betas)
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def shapes(reference):
    return our_shapes(reference.version)


@pytest.fixture
def make_shapes():
    return our_shapes
