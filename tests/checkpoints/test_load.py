"""Networks are filled strictly and one tensor at a time; on the meta device they are only checked."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from latentsmith import AutoencoderKL, ClipTextEncoder, UNetModel, build
from latentsmith.checkpoints.load import load_component, meta_weights
from latentsmith.files.errors import BadInput

UNET = dict(model_channels=32, channel_mult=[1, 2], num_heads=2, context_dim=16)
VAE = dict(embed_dim=4, ddconfig=dict(ch=32, ch_mult=[1, 2], num_res_blocks=1, z_channels=4))
TEXT = dict(width=16, layers=1, heads=2, intermediate_size=32, activation="gelu", vocab_size=50)


@pytest.mark.parametrize(("cls", "options"), [(UNetModel, UNET), (AutoencoderKL, VAE), (ClipTextEncoder, TEXT)])
def test_shapes_on_the_meta_device_are_those_of_a_filled_network(cls, options):
    filled = cls(**options).state_dict()
    with meta_weights():
        empty = cls(**options).state_dict()
    assert {name: tensor.shape for name, tensor in empty.items()} == {n: tensor.shape for n, tensor in filled.items()}
    assert all(tensor.is_meta for tensor in empty.values())
    assert not any(tensor.is_meta for tensor in cls(**options).state_dict().values())


def test_the_compiler_is_not_imported():
    """A second of the start of every command that generates."""
    code = (
        "import sys, latentsmith, latentsmith.models, latentsmith.checkpoints.load as loading\n"
        f"with loading.meta_weights(): latentsmith.AutoencoderKL(**{VAE}), latentsmith.ClipTextEncoder(**{TEXT})\n"
        f"with loading.meta_weights(): latentsmith.UNetModel(**{UNET})\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture
def unet_file(tmp_path, randomise):
    """The file of a small U-Net with other numbers than any fresh one, and its tensors."""
    tensors = randomise(UNetModel(**UNET)).state_dict()
    save_file(tensors, tmp_path / "unet.safetensors")
    return tmp_path / "unet.safetensors", tensors


def test_a_node_is_filled_from_the_checkpoint_it_names(unet_file):
    path, tensors = unet_file
    unet = build({"_target_": "latentsmith.UNetModel", **UNET, "from_pretrained": str(path)})
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in unet.state_dict().items())
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in unet.parameters())
    other = build(
        {"_target_": "latentsmith.UNetModel", **UNET, "from_pretrained": "nowhere"}, from_pretrained=str(path)
    )
    assert torch.equal(other.time_embed[0].weight, tensors["time_embed.0.weight"])


def test_a_node_without_a_source_has_fresh_weights_of_the_seed():
    made = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        made.append(build({"_target_": "latentsmith.UNetModel", **UNET}).time_embed[0].weight)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_the_meta_device_checks_names_and_shapes_alone(unet_file):
    path, _ = unet_file
    with torch.device("meta"):
        unet = build({"_target_": "latentsmith.UNetModel", **UNET, "from_pretrained": str(path)})
        assert all(parameter.is_meta for parameter in unet.parameters())
        with pytest.raises(BadInput, match=r"unet\.safetensors"):
            build({"_target_": "latentsmith.UNetModel", **UNET, "channel_mult": [1], "from_pretrained": str(path)})


def test_filling_keeps_dtype_memory_format_and_requires_grad(unet_file):
    path, tensors = unet_file
    unet = UNetModel(**UNET).half().to(memory_format=torch.channels_last).requires_grad_(False)
    weight = unet.input_blocks[1][0].in_layers[2].weight
    load_component(unet, path, "unet")
    assert unet.input_blocks[1][0].in_layers[2].weight is weight and not weight.requires_grad
    assert weight.dtype == torch.half and weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(weight, tensors["input_blocks.1.0.in_layers.2.weight"].half())


def test_weights_are_allocated_once(unet_file, monkeypatch):
    """From the meta device: one allocation for each tensor, and nothing as large as the network beside them."""
    path, tensors = unet_file
    with meta_weights():
        unet = UNetModel(**UNET)
    allocated = []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kw: allocated.append(1) or empty_like(*args, **kw))
    load_component(unet, path, "unet")
    assert len(allocated) == len(tensors)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in unet.state_dict().items())
