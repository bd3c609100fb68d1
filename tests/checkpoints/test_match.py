"""What does not fit is refused in one line that names the file, the first keys and the likely reason."""

import pytest
import torch

from latentsmith.checkpoints import match, open_checkpoint
from latentsmith.files.errors import BadInput


def read_part(path, part, shapes, *, weights="ema", from_nemo=None):
    found = match(open_checkpoint(path, weights), part, shapes, from_nemo)
    return {name: tensor.read() for name, tensor in found.items()}


def saved(tmp_path, state, name="m.ckpt"):
    torch.save(state, tmp_path / name)
    return tmp_path / name


def zeros(shapes, prefix=""):
    return {prefix + name: torch.zeros(shape) for name, shape in shapes.items()}


@pytest.fixture
def shapes(make_shapes):
    return make_shapes(1)


def refusal(path, part, shapes, **options):
    with pytest.raises(BadInput) as error:
        read_part(path, part, shapes, **options)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    return str(error.value)


def test_missing_extra_and_duplicate_keys(tmp_path, shapes):
    state = zeros(shapes["unet"])
    state["input_blocks.1.0.odd.weight"] = state.pop("input_blocks.1.0.in_layers.0.weight")
    line = refusal(saved(tmp_path, state), "unet", shapes["unet"])
    total = len(shapes["unet"])
    assert f"1 of {total} U-Net tensors missing (input_blocks.1.0.in_layers.0.weight)" in line
    assert "1 unknown (input_blocks.1.0.odd.weight)" in line
    double = zeros(shapes["unet"], "model.diffusion_model.") | zeros(shapes["unet"], "model.diffusion_model._orig_mod.")
    assert "are the same tensor twice; delete one" in refusal(saved(tmp_path, double), "unet", shapes["unet"])


def test_unknown_prefix_and_absent_part(tmp_path, shapes):
    state = zeros(shapes["vae"], "first_stage_model.")
    assert "no U-Net inside; it holds VAE" in refusal(saved(tmp_path, state), "unet", shapes["unet"])
    state["mystery.weight"] = torch.ones(1)
    assert "1 keys of no known format (mystery.weight)" in refusal(saved(tmp_path, state), "vae", shapes["vae"])


@pytest.mark.parametrize(("change", "reason"), [
    (dict(context_dim=48), "its context width is 32, the config says context_dim 48"),
    (dict(in_channels=9), "it takes 4 input channels, the config says in_channels 9"),
    (dict(model_channels=64), "its first convolution has 32 channels, the config says model_channels 64"),
    (dict(num_res_blocks=1), "its blocks differ: compare channel_mult, num_res_blocks"),
    (dict(transformer_depth=2), "its blocks differ: compare channel_mult, num_res_blocks"),
])  # fmt: skip
def test_unet_reasons(tmp_path, shapes, make_shapes, change, reason):
    path = saved(tmp_path, zeros(shapes["unet"]))
    assert reason in refusal(path, "unet", make_shapes(1, unet=change)["unet"])


def test_versions_are_named(tmp_path, make_shapes):
    v2 = saved(tmp_path, zeros(make_shapes(1, unet=dict(context_dim=1024))["unet"]))
    line = refusal(v2, "unet", make_shapes(1, unet=dict(context_dim=768))["unet"])
    assert "a v2 checkpoint: its context width is 1024, the config says context_dim 768" in line
    painting = saved(tmp_path, zeros(make_shapes(1, unet=dict(in_channels=9))["unet"]), "inpaint.ckpt")
    assert "an inpainting model: it takes 9 input channels" in refusal(painting, "unet", make_shapes(1)["unet"])


def test_linear_and_convolution_projections_are_the_same(tmp_path, make_shapes):
    linear, convolution = make_shapes(2)["unet"], make_shapes(1)["unet"]
    torch.manual_seed(0)
    state = {name: torch.randn(shape) for name, shape in linear.items()}
    loaded = read_part(saved(tmp_path, state), "unet", convolution)
    for name, tensor in loaded.items():
        assert tensor.shape == convolution[name] and torch.equal(tensor.flatten(), state[name].flatten())


def test_only_projections_may_gain_dimensions(tmp_path, shapes):
    state = zeros(shapes["unet"])
    state["time_embed.0.weight"] = state["time_embed.0.weight"][..., None]
    line = refusal(saved(tmp_path, state), "unet", shapes["unet"])
    assert "1 of another shape (time_embed.0.weight is (128, 32, 1), the config makes it (128, 32))" in line


def test_text_reasons(tmp_path, make_shapes):
    def file(layers):
        return saved(tmp_path, zeros(make_shapes(1, layers=layers)["text_encoder"]), f"{layers}.ckpt")

    def wanted(layers):
        return make_shapes(1, layers=layers)["text_encoder"]

    read_part(file(4), "text_encoder", wanted(3))  # the last of a full tower, unused by a penultimate encoder
    line = refusal(file(5), "text_encoder", wanted(3))
    assert "a text encoder of 5 layers, the config asks for 3" in line and "32 unknown" in line
    assert "a text encoder of 3 layers, the config asks for 5" in refusal(file(3), "text_encoder", wanted(5))
    assert "already stops at the penultimate layer" in refusal(file(23), "text_encoder", wanted(24))


def test_from_nemo_rules(tmp_path, reference_folder, reference, make_shapes):
    ours = make_shapes(reference.version)["unet"]
    line = refusal(reference_folder / "unet", "unet", ours, from_nemo=True)
    assert "are diffusers': set from_NeMo to false" in line
    read_part(reference_folder / "unet", "unet", ours, from_nemo=False)
    fused = {name.replace("in_layers.2.", "in_layers.1."): torch.zeros(shape) for name, shape in ours.items()}
    path = saved(tmp_path, fused)
    assert "are NeMo's: set from_NeMo to true" in refusal(path, "unet", ours, from_nemo=False)


def test_bad_choices_and_empty_folders(tmp_path, shapes):
    with pytest.raises(BadInput, match='weights=\'best\': must be "ema" or "raw"'):
        read_part(tmp_path, "unet", shapes["unet"], weights="best")
    assert "holds no weights" in refusal(tmp_path, "unet", shapes["unet"])
