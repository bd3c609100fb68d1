"""Objects from nodes: the seed's blocks, NeMo's and LDM's files, all at full size on the meta device."""

from pathlib import Path

import pytest
import torch
import yaml

from latentsmith.checkpoints.load import build
from latentsmith.config import load_config
from latentsmith.config.class_registry import ALIASES, canonical
from latentsmith.config.foreign_keys import canonical_node
from latentsmith.files.errors import BadInput

FILES = Path(__file__).parents[1] / "config" / "yaml"
V1 = {"unet_config": 859_520_964, "first_stage_config": 83_653_863, "cond_stage_config": 123_060_480}
V2 = {"unet_config": 865_910_724, "first_stage_config": 83_653_863, "cond_stage_config": 340_387_840}


def count(node) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(node).parameters())


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("sd1", V1),
        ("sd2_v", V2),
        (FILES / "sd_train.yaml", V1),
        (FILES / "sd2_train.yaml", V2),
        (FILES / "ldm_v1.yaml", V1),
        (FILES / "ldm_v2.yaml", V2),
    ],
    ids=str,
)
def test_full_size(name, counts):
    no_files = [f"model.{part}.from_pretrained=null" for part in V1] + [
        "model.cond_stage_config.restore_from_path=null"
    ]
    model = load_config(name, no_files).model
    assert {part: count(getattr(model, part)) for part in counts} == counts


SEED_UNET = """
_target_: nemo.collections.multimodal.modules.stable_diffusion.diffusionmodules.openaimodel.UNetModel
from_NeMo: True
image_size: 32 # unused
in_channels: 4
out_channels: 4
model_channels: 320
attention_resolutions: [4, 2, 1]
num_res_blocks: 2
channel_mult: [1, 2, 4, 4]
num_head_channels: 64
use_spatial_transformer: true
use_linear_in_transformer: true
transformer_depth: 1
context_dim: 1024
use_checkpoint: False
legacy: False
use_flash_attention: True
"""
SEED_VAE = """
_target_: nemo.collections.multimodal.models.text_to_image.stable_diffusion.ldm.autoencoder.AutoencoderKL
embed_dim: 4
monitor: val/rec_loss
ddconfig: {double_z: true, z_channels: 4, resolution: 256, in_channels: 3, out_ch: 3, ch: 128, ch_mult: [1, 2, 4, 4],
  num_res_blocks: 2, attn_resolutions: [], dropout: 0.0}
lossconfig: {target: torch.nn.Identity}
"""
SEED_TEXT = """
_target_: nemo.collections.multimodal.modules.stable_diffusion.encoders.modules.FrozenOpenCLIPEmbedder
arch: ViT-H-14
version: laion2b_s32b_b79k
device: cuda
max_length: 77
freeze: True
layer: "penultimate"
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SEED_UNET, V2["unet_config"]),
        (SEED_VAE, V2["first_stage_config"]),
        (SEED_TEXT, V2["cond_stage_config"]),
    ],
)
def test_seed_blocks_build_by_themselves(text, expected):
    assert count(yaml.safe_load(text)) == expected


def test_seed_blocks_compose(tmp_path):
    text = "model:\n" + "".join(
        f"  {name}:" + block.replace("\n", "\n    ").rstrip() + "\n"
        for name, block in (
            ("unet_config", SEED_UNET),
            ("first_stage_config", SEED_VAE),
            ("cond_stage_config", SEED_TEXT),
        )
    )
    (tmp_path / "seed.yaml").write_text(text)
    model = load_config(tmp_path / "seed.yaml").model
    assert model.cond_stage_config._target_ == "latentsmith.models.ClipTextEncoder"
    assert count(model.unet_config) == V2["unet_config"]


def test_megatron_block_is_as_wide_as_the_context(tmp_path):
    (tmp_path / "seed.yaml").write_text("""
model:
  unet_config: {context_dim: 1024, num_head_channels: 64}
  cond_stage_config:
    _target_: nemo.collections.multimodal.modules.stable_diffusion.encoders.modules.FrozenMegatronCLIPEmbedder
    restore_from_path: /path/to/nemo_clip.nemo
    device: cuda
    freeze: True
    layer: "penultimate"
""")
    text = load_config(tmp_path / "seed.yaml").model.cond_stage_config
    assert text.arch == "ViT-H-14" and text.restore_from_path == "/path/to/nemo_clip.nemo"


def test_demo_builds_with_its_own_sizes():
    model = load_config("demo").model
    text, ddconfig = model.cond_stage_config, model.first_stage_config.ddconfig
    token_ids = torch.zeros(1, text.max_length, dtype=torch.int64)
    assert build(text)(token_ids).shape == (1, text.max_length, model.unet_config.context_dim)
    assert build(model.first_stage_config).downsampling == 2 ** (len(ddconfig.ch_mult) - 1)


def test_identity_and_loss_are_the_only_other_targets():
    assert isinstance(build({"target": "torch.nn.Identity"}), torch.nn.Identity)
    ours = {target for target, _ in ALIASES.values()}
    assert {name.rpartition(".")[2] for name in ours} == {
        *("UNetModel", "AutoencoderKL", "ClipTextEncoder", "ReconstructionLoss", "Identity")
    }


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({"_target_": "os.system", "command": "true"}, "config._target_: 'os.system' is not among the classes"),
        ({"_target_": "subprocess.Popen"}, "'subprocess.Popen' is not among"),
        ({"model_channels": 32}, "config._target_: None is not among"),
        ({"_target_": "latentsmith.models.UNetModel", "widht": 3}, "model.unet_config.widht is not an option"),
        ({"_target_": "latentsmith.models.UNetModel"}, "model.unet_config: use_spatial_transformer and context_dim"),
        ({"_target_": "latentsmith.models.ClipTextEncoder", "width": 8}, "model.cond_stage_config: the text encoder"),
    ],
)
def test_nothing_else_is_built(node, expected):
    with pytest.raises(BadInput) as caught:
        build(node)
    assert expected in str(caught.value)


def test_build_leaves_its_node_alone():
    node = {"target": "torch.nn.Identity", "params": {}}
    build(node)
    assert node == {"target": "torch.nn.Identity", "params": {}}


def test_spellings_of_nodes():
    assert canonical_node({"target": "a.B", "params": {"c": {"cls": "d.E"}}}) == {
        "_target_": "a.B",
        "c": {"_target_": "d.E"},
    }
    clip = canonical({"_target_": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "version": "mine"}, "x")
    assert clip == {"_target_": "latentsmith.models.ClipTextEncoder", "version": "mine", "arch": "ViT-L-14"}
