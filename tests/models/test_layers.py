"""The shared pieces against closed forms and plain loops."""

import math

import numpy as np
import pytest
import torch

from latentsmith.models.layers import attention, group_norm, join_heads, split_heads, timestep_embedding, zero_init


def reference_attention(query, key, value, causal):
    """Equation 1 of Vaswani et al. 2017, one query at a time, in float64."""
    query, key, value = (tensor.double().numpy() for tensor in (query, key, value))
    out = np.zeros((*query.shape[:3], value.shape[3]))
    for batch, head, i in np.ndindex(*query.shape[:3]):
        seen = i + 1 if causal else key.shape[2]
        scores = key[batch, head, :seen] @ query[batch, head, i] / math.sqrt(query.shape[3])
        weights = np.exp(scores - scores.max())
        out[batch, head, i] = weights @ value[batch, head, :seen] / weights.sum()
    return torch.from_numpy(out)


@pytest.mark.parametrize("dim", [320, 32])
@pytest.mark.parametrize("timesteps", [[0, 1, 500, 999], [0.5, 333.25, 998.75, 7.0]])
def test_timestep_embedding_is_the_closed_form(dim, timesteps):
    """The angle, up to 999, is a float32: 6e-8 of it is 6e-5."""
    frequencies = np.exp(-math.log(10_000) * np.arange(dim // 2) / (dim // 2))
    angles = np.array(timesteps)[:, None] * frequencies
    expected = torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)], axis=1))
    found = timestep_embedding(torch.tensor(timesteps), dim)
    assert found.dtype == torch.float32 and found.shape == (4, dim)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-4)


def test_timestep_embedding_of_an_odd_width_ends_with_zeros():
    assert timestep_embedding(torch.tensor([3]), 5).shape == (1, 5)
    assert timestep_embedding(torch.tensor([3]), 5)[0, -1] == 0


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_attention_is_the_softmax_of_scaled_products(fused, causal, dtype, tolerance):
    """The plain path takes its softmax in float32 whatever the inputs are, hence 1e-6 in float64 too."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, 3, 5, 8, generator=generator).to(dtype) for _ in range(3))
    expected = reference_attention(query, key, value, causal)
    found = attention(query, key, value, fused=fused, causal=causal)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("fused", [True, False])
def test_attention_to_another_length(fused):
    query, key, value = torch.randn(1, 2, 7, 4), torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    found = attention(query, key, value, fused=fused)
    torch.testing.assert_close(found.double(), reference_attention(query, key, value, causal=False), rtol=0, atol=1e-6)


def test_plain_and_fused_attention_have_the_same_gradients():
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(2, 2, 9, 16, generator=generator, requires_grad=True) for _ in range(3)]
    toward = torch.randn(2, 2, 9, 16, generator=generator)
    plain, fused = (
        torch.autograd.grad((attention(*inputs, fused=fused) * toward).sum(), inputs) for fused in (False, True)
    )
    for left, right in zip(plain, fused, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_heads_are_contiguous_runs_of_channels():
    tokens = torch.arange(24.0).view(1, 2, 12)
    heads = split_heads(tokens, 3)
    assert heads.shape == (1, 3, 2, 4)
    assert heads[0, 1, 0].tolist() == [4, 5, 6, 7] and heads[0, 2, 1].tolist() == [20, 21, 22, 23]
    assert torch.equal(join_heads(heads), tokens)


def test_zero_init_leaves_nothing_but_zeros():
    module = zero_init(torch.nn.Conv2d(3, 4, 3))
    assert not any(parameter.any() for parameter in module.parameters())


def test_group_norm_that_does_not_divide():
    with pytest.raises(ValueError, match="group norm with 32 groups cannot divide 48 channels"):
        group_norm(48, 32, eps=1e-5)
