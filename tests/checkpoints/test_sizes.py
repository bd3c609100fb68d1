"""Sizes and prediction types are found in headers; full-size key counts of the published models, on the meta device."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers

from latentsmith.checkpoints import (
    ModelSpec,
    architecture,
    clip,
    nemo,
    open_checkpoint,
    prediction_of,
    spec_of,
)
from latentsmith.checkpoints import (
    diffusers as folders,
)
from latentsmith.checkpoints.base import Checkpoint, Part
from latentsmith.files.errors import BadInput
from latentsmith.files.lazy import LazyTensor
from latentsmith.models.autoencoder import AutoencoderKL
from latentsmith.models.text_encoder import ClipTextEncoder
from latentsmith.models.unet import UNetModel

DDCONFIG = dict(double_z=True, z_channels=4, ch=128, ch_mult=[1, 2, 4, 4], num_res_blocks=2)


def shapes_of(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.fixture(scope="module", params=[1, 2], ids=["sd1", "sd2"])
def full(request):
    """Names and shapes of the full-size models: ours, and the libraries'. No memory is allocated."""
    v2 = request.param == 2
    text = dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
    )
    text = text if v2 else dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    with torch.device("meta"):
        heads = dict(num_head_channels=64, use_linear_in_transformer=True) if v2 else dict(num_heads=8)
        ours = dict(
            unet=UNetModel(context_dim=1024 if v2 else 768, **heads),
            vae=AutoencoderKL(ddconfig=DDCONFIG),
            text_encoder=ClipTextEncoder(arch="ViT-H-14" if v2 else "ViT-L-14", layer="penultimate" if v2 else "last"),
        )
        theirs = dict(
            unet=diffusers.UNet2DConditionModel(
                cross_attention_dim=1024 if v2 else 768, use_linear_projection=v2,
                attention_head_dim=[5, 10, 20, 20] if v2 else 8),
            vae=diffusers.AutoencoderKL(
                block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4),
            text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=49408, **text)),
        )  # fmt: skip
    named = {name: shapes_of(module) for name, module in ours.items()}
    return SimpleNamespace(v2=v2, ours=named, theirs={name: shapes_of(module) for name, module in theirs.items()})


def parameters(shapes):
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def test_counts_of_the_published_models(full):
    assert (len(full.ours["unet"]), parameters(full.ours["unet"])) == (686, 865_910_724 if full.v2 else 859_520_964)
    assert (len(full.ours["vae"]), parameters(full.ours["vae"])) == (248, 83_653_863)
    text = (372, 340_387_840) if full.v2 else (196, 123_060_480)
    assert (len(full.ours["text_encoder"]), parameters(full.ours["text_encoder"])) == text


def test_every_full_size_key_maps_one_to_one(full):
    unet = folders.unet_names(full.ours["unet"])
    assert {theirs: full.ours["unet"][ours] for ours, theirs in unet.items()} == full.theirs["unet"]
    vae = folders.vae_names(full.ours["vae"])
    assert set(vae.values()) == set(full.theirs["vae"]) and len(set(vae.values())) == 248
    changed = [ours for ours, theirs in vae.items() if full.ours["vae"][ours] != full.theirs["vae"][theirs]]
    assert len(changed) == 8 and all(".mid.attn_1." in name for name in changed)
    text = {name.removeprefix("text_model."): shape for name, shape in full.theirs["text_encoder"].items()}
    ours = full.ours["text_encoder"]
    assert {source.key: ours[name] for name, source in clip.HUGGING_FACE.table(ours).items()} == text


def test_nemo_and_openclip_figures(full):
    names = full.ours["unet"]
    renamed = nemo.V2_UNET.table(names)
    assert sum(ours != theirs.key for ours, theirs in renamed.items()) == 250 and len(set(renamed.values())) == 686
    if full.v2:
        table = clip.OPEN_CLIP_DIALECT.table(full.ours["text_encoder"])
        assert len({source.key for source in table.values()}) == 280


def checkpoint_of(full, path, extras=None, metadata=None):
    def never():
        raise AssertionError("weights were read")

    parts = {
        name: Part(name, path, {key.removeprefix("text_model."): LazyTensor(torch.float32, shape, never)
                                for key, shape in shapes.items()}, {})
        for name, shapes in full.ours.items()
    }  # fmt: skip
    return Checkpoint(path, "ldm", parts, extras=extras or {}, metadata=metadata or {})


def test_architecture_is_told_from_shapes(full, tmp_path):
    found = architecture(checkpoint_of(full, tmp_path / "m.ckpt"))
    with torch.device("meta"):
        modules = dict(unet=UNetModel, vae=AutoencoderKL, text_encoder=ClipTextEncoder)
        for part, make in modules.items():
            assert shapes_of(make(**found[part])) == full.ours[part]
    assert (found["unet"].get("num_heads"), found["unet"].get("num_head_channels")) == (
        (None, 64) if full.v2 else (8, None)
    )
    assert found["text_encoder"]["activation"] == ("gelu" if full.v2 else "quick_gelu")


def test_prediction_type_is_told_or_asked_for(full, tmp_path):
    path = tmp_path / "m.ckpt"
    assert prediction_of(checkpoint_of(full, path, metadata={"modelspec.prediction_type": "v"}))[0] == "v_prediction"
    if not full.v2:
        assert prediction_of(checkpoint_of(full, path)) == ("epsilon", "v1 weights")
        return
    base = prediction_of(checkpoint_of(full, path, extras={"global_step": 875000}))
    assert base == ("epsilon", "global_step 875,000")
    newer = checkpoint_of(full, path, extras={"global_step": 110000})
    assert prediction_of(newer) == ("v_prediction", "global_step 110,000")
    assert spec_of(newer).unet_config["upcast_attention"]  # 2.1
    unknown = checkpoint_of(full, path, extras={"global_step": 220000})
    assert prediction_of(unknown) == (None, "global_step 220,000, which no published file has")
    for checkpoint in (unknown, checkpoint_of(full, path)):
        with pytest.raises(BadInput, match=r"its weights do not show their prediction type .*; give prediction_type"):
            spec_of(checkpoint)
    spec = spec_of(checkpoint_of(full, path), "v_prediction")
    assert (spec.prediction_type, spec.image_size, spec.penultimate, spec.open_clip) == ("v_prediction", 96, True, True)


def test_odd_sizes_need_their_config(tmp_path, make_shapes):
    shapes = make_shapes(1)["unet"]
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "m.ckpt")
    with pytest.raises(BadInput, match="head counts are not in the weights of a U-Net of this size"):
        architecture(open_checkpoint(tmp_path / "m.ckpt"))


def test_spec_survives_json():
    import json

    spec = ModelSpec(dict(num_heads=8), dict(embed_dim=4, ddconfig={}), dict(arch="ViT-H-14"), "v_prediction", 96)
    assert ModelSpec(**json.loads(spec.to_json())) == spec and spec.open_clip


@pytest.mark.parametrize(
    ("stated", "padded"),
    [
        ({"_target_": "nemo.a.b.FrozenCLIPEmbedder"}, True),
        ({"_target_": "nemo.a.b.FrozenMegatronCLIPEmbedder"}, True),
        ({"_target_": "nemo.a.b.FrozenOpenCLIPEmbedder"}, False),
        ({"_target_": "nemo.a.b.FrozenCLIPEmbedder", "trained_unpadded": True}, False),
        ({}, False),
    ],
)
def test_which_text_nemo_padded(stated, padded):
    assert nemo.pads_text(stated) == padded
