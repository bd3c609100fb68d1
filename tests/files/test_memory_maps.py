"""A file that has been copied into a module is no longer mapped."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from latentsmith.checkpoints import load_component
from latentsmith.models import UNetModel

SMALL = dict(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,), num_heads=2,
             context_dim=16)  # fmt: skip


def test_weights_are_mapped_only_as_long_as_they_are_held(tmp_path):
    unet = UNetModel(**SMALL)
    file = tmp_path / "unet.safetensors"
    save_file(unet.state_dict(), file)
    shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    loaded = load_component(file, "unet", shapes)
    assert str(file) in Path("/proc/self/maps").read_text()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in unet.state_dict().items())
    del loaded
    assert str(file) not in Path("/proc/self/maps").read_text()
