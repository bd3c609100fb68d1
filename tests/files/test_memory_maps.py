"""A file is mapped only as long as a tensor of it is held."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latentsmith.checkpoints.load import load_component
from latentsmith.files.lazy import forget_maps
from latentsmith.files.tensors import open_tensors
from latentsmith.models import UNetModel

SMALL = dict(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,), num_heads=2,
             context_dim=16)  # fmt: skip


def is_mapped(file):
    return str(file) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_the_tensors_alone_keep_a_file_mapped(tmp_path, save):
    file, tensors = tmp_path / "weights", {"a": torch.randn(1000), "b": torch.randn(3)}
    save(tensors, file)
    held = open_tensors(file)["a"]
    forget_maps()
    assert is_mapped(file) and torch.equal(held, tensors["a"])
    del held
    assert not is_mapped(file)


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_a_filled_network_maps_nothing(tmp_path, save):
    source, network, file = UNetModel(**SMALL), UNetModel(**SMALL), tmp_path / "unet.weights"
    save(source.state_dict(), file)
    load_component(network, file, "unet")
    assert not is_mapped(file)
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in source.state_dict().items())
