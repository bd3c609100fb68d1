"""The U-Net: its sizes, its options, what it refuses, and the parts that other libraries lack."""

import math

import pytest
import torch
import yaml

from latentsmith.models import UNetModel
from latentsmith.models import attention as attention_module
from latentsmith.models.attention import AttentionBlock, CrossAttention, SpatialTransformer
from latentsmith.models.unet import Downsample, ResBlock, Upsample

SD1 = dict(
    in_channels=4, out_channels=4, model_channels=320, attention_resolutions=[4, 2, 1], num_res_blocks=2,
    channel_mult=[1, 2, 4, 4], num_heads=8, use_spatial_transformer=True, transformer_depth=1, context_dim=768,
)  # fmt: skip
DOCUMENTED = """
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
use_flash_attention: True
"""
TINY = dict(
    model_channels=32, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[2, 1], num_heads=4, context_dim=16
)


def count(modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def on_meta(**config):
    with torch.device("meta"):
        return UNetModel(**config)


def inputs(height=8, width=8, batch=2):
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(batch, 4, height, width, generator=generator)
    return latents, torch.tensor([3.0, 901.5])[:batch], torch.randn(batch, 5, 16, generator=generator)


def gradients(unet, *args):
    unet.zero_grad()
    (unet(*args) ** 2).mean().backward()
    return {name: parameter.grad.clone() for name, parameter in unet.named_parameters()}


def largest_relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def test_v1_size():
    unet = on_meta(**SD1)
    assert count([unet]) == 859_520_964 and len(unet.state_dict()) == 686
    by_class = {cls: [m for m in unet.modules() if isinstance(m, cls)]
             for cls in (ResBlock, SpatialTransformer, Upsample, Downsample)}  # fmt: skip
    assert [len(found) for found in by_class.values()] == [22, 16, 3, 3]
    assert [count(found) for found in by_class.values()] == [537_670_400, 267_239_360, 33_180_800, 19_355_840]


def test_v2_size_with_every_documented_key():
    unet = on_meta(**yaml.safe_load(DOCUMENTED))
    assert count([unet]) == 865_910_724 and len(unet.state_dict()) == 686


def test_v1_and_v2_differ_in_the_shapes_of_64_tensors():
    v1, v2 = on_meta(**SD1).state_dict(), on_meta(**yaml.safe_load(DOCUMENTED)).state_dict()
    assert list(v1) == list(v2)
    differing = [name for name in v1 if v1[name].shape != v2[name].shape]
    assert len(differing) == 64
    assert {name.rsplit(".", 2)[-2] for name in differing} == {"proj_in", "proj_out", "to_k", "to_v"}


def test_heads_of_v1_and_v2():
    for config, expected in ((SD1, [8, 8, 8, 8]), (yaml.safe_load(DOCUMENTED), [5, 10, 20, 20])):
        unet = on_meta(**config)
        blocks = [unet.input_blocks[i][1] for i in (1, 4, 7)] + [unet.middle_block[1]]
        assert [block.transformer_blocks[0].attn1.heads for block in blocks] == expected


def test_norms():
    """Their epsilons are too small to show in outputs: 1e-6 in transformers, 1e-5 elsewhere."""
    norms = {name: module for name, module in on_meta(**SD1).named_modules() if isinstance(module, torch.nn.GroupNorm)}
    assert {norm.num_groups for norm in norms.values()} == {32}
    assert {norm.eps for name, norm in norms.items() if name.endswith(".norm")} == {1e-6}
    assert {norm.eps for name, norm in norms.items() if not name.endswith(".norm")} == {1e-5}
    layer_norms = [module for module in on_meta(**SD1).modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(layer_norms) == 48 and {norm.eps for norm in layer_norms} == {1e-5}


@pytest.mark.parametrize(
    "changes, line",
    [
        (dict(context_dim=None), "use_spatial_transformer and context_dim go together"),
        (dict(use_spatial_transformer=False), "use_spatial_transformer and context_dim go together"),
        (dict(num_head_channels=8), "give one of num_heads and num_head_channels"),
        (dict(num_heads=-1), "give one of num_heads and num_head_channels"),
        (dict(num_heads=5), "32 channels cannot be cut into heads"),
        (dict(num_heads=-1, num_head_channels=24), "32 channels cannot be cut into heads"),
        (dict(num_heads=-1, num_head_channels=64), "32 channels cannot be cut into heads"),
        (dict(num_res_blocks=[1, 2, 3]), r"\[1, 2, 3\] has 3 numbers, channel_mult has 2"),
        (dict(transformer_depth=[1]), r"\[1\] has 1 numbers, channel_mult has 2"),
        (dict(resblock_gn_groups=24), "group norm with 24 groups cannot divide 32 channels"),
        (dict(model_channels=48), "group norm with 32 groups cannot divide 48 channels"),
    ],
)
def test_sizes_that_do_not_fit_together(changes, line):
    with pytest.raises(ValueError, match=line):
        on_meta(**TINY | changes)


def test_fresh_weights_predict_zero():
    """The last convolution starts at zero, and so does every residual branch."""
    assert not UNetModel(**TINY)(*inputs()).any()


@pytest.mark.parametrize("height, width", [(8, 8), (4, 12), (2, 2)])
def test_output_has_the_shape_of_the_latents(randomise, height, width):
    unet = randomise(UNetModel(**TINY | dict(out_channels=3)))
    assert unet(*inputs(height, width)).shape == (2, 3, height, width)


def test_lists_count_blocks_and_depth_of_each_level(randomise):
    unet = randomise(UNetModel(**TINY | dict(num_res_blocks=[1, 2], transformer_depth=[1, 3])))
    attended = [block[1] for block in unet.input_blocks if len(block) > 1]
    assert [len(block.transformer_blocks) for block in attended] == [1, 3, 3]
    assert len(unet.middle_block[1].transformer_blocks) == 3
    assert len(unet.input_blocks) == 1 + 1 + 1 + 2 and len(unet.output_blocks) == 2 + 3
    depths = [len(layer.transformer_blocks) for block in unet.output_blocks for layer in block
              if isinstance(layer, SpatialTransformer)]  # fmt: skip
    assert depths == [3, 3, 3, 1, 1] and unet(*inputs()).shape == (2, 4, 8, 8)


def test_one_number_is_the_same_as_a_list_of_it():
    lists = dict(num_res_blocks=[1, 1], transformer_depth=[1, 1])
    assert [p.shape for p in on_meta(**TINY).parameters()] == [p.shape for p in on_meta(**TINY | lists).parameters()]


def test_attention_follows_the_named_resolutions_and_the_middle():
    unet = on_meta(**TINY | dict(attention_resolutions=[2]))
    classes = [[type(layer) for layer in block] for block in unet.input_blocks]
    assert SpatialTransformer not in classes[1] and SpatialTransformer in classes[3]
    assert isinstance(on_meta(**TINY | dict(attention_resolutions=[])).middle_block[1], SpatialTransformer)


@pytest.mark.parametrize("cls", [ResBlock, SpatialTransformer, AttentionBlock])
def test_use_checkpoint_recomputes_in_the_backward_pass(randomise, cls):
    calls = []
    plain = cls is AttentionBlock
    config = TINY | (dict(use_spatial_transformer=False, context_dim=None) if plain else {})
    unet = randomise(UNetModel(**config))
    args = inputs()[:2] if plain else inputs()
    blocks = [module for module in unet.modules() if isinstance(module, cls)]
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))  # the recomputation stops before the end
    kept = gradients(unet, *args)
    assert len(calls) == len(blocks) > 2
    unet.set_checkpointing(True)
    recomputed = gradients(unet, *args)
    assert len(calls) == 3 * len(blocks)
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)
    with torch.no_grad():
        unet(*args)
    assert len(calls) == 4 * len(blocks)


def test_use_checkpoint_is_a_keyword():
    assert all(block.use_checkpoint for block in on_meta(**TINY, use_checkpoint=True).input_blocks)
    assert not any(block.use_checkpoint for block in on_meta(**TINY).input_blocks)


def test_plain_and_fused_attention_agree(randomise):
    """Outputs to 1e-5 of their largest, gradients to 1e-5 of the largest of any, in float32."""
    unets = [randomise(UNetModel(**TINY, use_flash_attention=fused)) for fused in (True, False)]
    fused, plain = (unet(*inputs()) for unet in unets)
    assert largest_relative(fused, plain) < 1e-5
    fused_gradients, plain_gradients = (gradients(unet, *inputs()) for unet in unets)
    largest = max(gradient.abs().max() for gradient in plain_gradients.values())
    for name, gradient in plain_gradients.items():
        assert (fused_gradients[name] - gradient).abs().max() < 1e-5 * largest, name


def test_conv_and_linear_projections_are_the_same_mathematics(randomise):
    conv = randomise(UNetModel(**TINY))
    linear = UNetModel(**TINY, use_linear_in_transformer=True)
    linear.load_state_dict({
        name: tensor.view(linear.state_dict()[name].shape) for name, tensor in conv.state_dict().items()
    })  # fmt: skip
    assert largest_relative(linear(*inputs(4, 6)), conv(*inputs(4, 6))) < 1e-5


@pytest.mark.parametrize("linear", [True, False])
def test_channels_last_changes_nothing(randomise, linear):
    unet = randomise(UNetModel(**TINY, use_linear_in_transformer=linear))
    expected = unet(*inputs(4, 6))
    unet.to(memory_format=torch.channels_last)
    latents, *rest = inputs(4, 6)
    found = unet(latents.to(memory_format=torch.channels_last), *rest)
    assert largest_relative(found, expected) < 1e-5


def test_without_text_attention_is_among_pixels(randomise):
    unet = randomise(UNetModel(**TINY | dict(use_spatial_transformer=False, context_dim=None)))
    latents, timesteps, _ = inputs(4, 6)
    expected = unet(latents, timesteps)
    assert expected.shape == latents.shape and unet.context_dim is None
    assert any(isinstance(module, AttentionBlock) for module in unet.modules())
    unet.to(memory_format=torch.channels_last)
    assert largest_relative(unet(latents.to(memory_format=torch.channels_last), timesteps), expected) < 1e-5


@pytest.mark.parametrize("upcast", [True, False])
def test_upcast_attention_is_float32_at_any_precision(monkeypatch, upcast):
    seen = []

    def spy(query, key, value, *, fused):
        inside = torch.empty(2, 2) @ torch.empty(2, 2)  # autocast would turn the product
        seen.append({query.dtype, key.dtype, value.dtype, inside.dtype})
        return attention_module.plain(query, key, value, fused=fused)

    monkeypatch.setattr(attention_module, "plain", attention_module.attention, raising=False)
    monkeypatch.setattr(attention_module, "attention", spy)
    block = CrossAttention(16, 2, None, True, 0.0, upcast)
    with torch.autocast("cpu", torch.bfloat16):
        assert block(torch.randn(2, 5, 16)).dtype == torch.bfloat16
    assert block.half()(torch.randn(2, 5, 16).half()).dtype == torch.float16
    assert seen[0] == {torch.float32 if upcast else torch.bfloat16}
    assert (torch.float16 in seen[1]) != upcast
    assert all(unit.upcast for unit in on_meta(**TINY, upcast_attention=True).modules() if hasattr(unit, "upcast"))


@pytest.mark.parametrize("fused", [True, False])
def test_attention_block_is_written_out(randomise, fused):
    """LDM's order of channels: head by head, each its query, key and value."""
    block = randomise(AttentionBlock(64, 4, fused)).double()
    hidden = torch.randn(2, 64, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    grouped = hidden.view(2, 32, -1)
    spread = (grouped.var(dim=2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    normed = ((grouped - grouped.mean(dim=2, keepdim=True)) / spread).view(2, 64, 15)
    normed = normed * block.norm.weight[:, None] + block.norm.bias[:, None]
    mixed = torch.zeros(2, 64, 15, dtype=torch.float64)
    for head in range(4):
        rows = block.qkv.weight[48 * head : 48 * head + 48, :, 0]
        projected = torch.einsum("oc,bcn->bon", rows, normed) + block.qkv.bias[48 * head : 48 * head + 48, None]
        query, key, value = projected[:, :16], projected[:, 16:32], projected[:, 32:]
        weights = (torch.einsum("bcq,bck->bqk", query, key) / math.sqrt(16)).softmax(dim=2)
        mixed[:, 16 * head : 16 * head + 16] = torch.einsum("bqk,bck->bcq", weights, value)
    out = torch.einsum("oc,bcn->bon", block.proj_out.weight[:, :, 0], mixed) + block.proj_out.bias[:, None]
    torch.testing.assert_close(block(hidden), hidden + out.view_as(hidden), rtol=1e-6, atol=1e-6)


def test_text_and_timesteps_both_matter(randomise):
    unet = randomise(UNetModel(**TINY))
    latents, timesteps, context = inputs()
    base = unet(latents, timesteps, context)
    assert not torch.allclose(unet(latents, timesteps + 50, context), base, rtol=1e-3)
    assert not torch.allclose(unet(latents, timesteps, context.flip(0)), base, rtol=1e-3)
    swapped = unet(latents.flip(0), timesteps.flip(0), context.flip(0)).flip(0)
    assert largest_relative(swapped, base) < 1e-5  # samples do not see each other


def test_dropout_is_on_in_training_only(randomise):
    unet = randomise(UNetModel(**TINY, dropout=0.5))
    assert not torch.equal(unet(*inputs()), unet(*inputs()))
    unet.eval()
    assert torch.equal(unet(*inputs()), unet(*inputs()))


def test_bfloat16_weights_take_float32_latents(randomise):
    unet = randomise(UNetModel(**TINY))
    expected = unet(*inputs())
    unet.bfloat16()
    latents, timesteps, context = inputs()
    found = unet(latents, timesteps, context.bfloat16())
    assert found.dtype == torch.bfloat16 and largest_relative(found.float(), expected) < 0.05
