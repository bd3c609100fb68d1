"""Gradient norms against float64, and clipped steps against PyTorch's own clipping."""

import math

import pytest
import torch
from torch import nn

from latentsmith.training import clipping
from latentsmith.training.clipping import excess, gradient_norm


@pytest.mark.parametrize("chunk", [1 << 20, 7])
def test_the_norm_of_all(chunk, monkeypatch):
    monkeypatch.setattr(clipping, "CHUNK", chunk)
    gradients = [torch.randn(5, 3, 3, 3), torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last), torch.randn(9)]
    expected = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
    assert gradient_norm(gradients).item() == pytest.approx(expected, rel=1e-6)


def test_other_tensors_take_pytorchs_norm():
    gradients = [torch.randn(6, 4).t(), torch.randn(3, dtype=torch.float64)]
    expected = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
    assert gradient_norm(gradients).item() == pytest.approx(expected, rel=1e-6)
    assert gradient_norm([]).item() == 0


def test_a_large_gradient_in_float32():
    values = torch.rand(3_000_000) + 1
    assert gradient_norm([values]).item() == pytest.approx(values.double().norm().item(), rel=2e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(bad):
    assert not torch.isfinite(gradient_norm([torch.tensor([1.0, bad]), torch.ones(3)]))


def test_gradients_are_never_made_larger():
    assert excess(torch.tensor(0.5), 1.0) == 1
    assert excess(torch.tensor(4.0), 2.0) == pytest.approx(2)


@pytest.mark.parametrize("limit", [0.01, 100.0])
@pytest.mark.parametrize("name", ["fused_adam", "SGD"])
def test_a_clipped_step_is_pytorchs(toy, name, limit):
    """Weights after three steps, clipped by torch.nn.utils and by ours, whether the optimizer divides or we do."""
    options = dict(lr=0.1, eps=1e-3) if name == "fused_adam" else dict(lr=0.1)
    ours, theirs = (toy(optimizer=name, options=options) for _ in range(2))
    found, other = ours.module(), theirs.module()
    other.configure_gradient_clipping = by_pytorch(other, limit)
    ours.train(found, 3, gradient_clip_val=limit)
    theirs.train(other, 3, gradient_clip_val=limit)
    for one, two in zip(found.parts["unet"].parameters(), other.parts["unet"].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def by_pytorch(module, limit):
    def clip(optimizer, *_, **__):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        module.record(grad_norm=nn.utils.clip_grad_norm_(parameters, limit))

    return clip
