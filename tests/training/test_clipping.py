"""Gradient norms against float64, and clipped steps against PyTorch's own clipping."""

import math

import pytest
import torch
from torch import nn

from latentsmith.training import clipping
from latentsmith.training.clipping import clip_divisor, gradient_norm


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
    assert clip_divisor(torch.tensor(0.5), 1.0) == 1
    assert clip_divisor(torch.tensor(4.0), 2.0) == pytest.approx(2)


@pytest.mark.parametrize("limit", [0.01, 100.0])
@pytest.mark.parametrize("name", ["fused_adam", "SGD"])
def test_a_clipped_step_is_pytorchs(toy, monkeypatch, name, limit):
    """Weights after three steps, clipped by torch.nn.utils and by ours, whether the optimizer divides or we do."""

    def by_pytorch(optimizer, gradients, norm, max_norm, *, scaler):
        nn.utils.clip_grad_norm_(clipping.parameters_of(optimizer), max_norm)

    options = dict(lr=0.1, eps=1e-3) if name == "fused_adam" else dict(lr=0.1)
    ours, theirs = (toy(optimizer=name, options=options) for _ in range(2))
    found = ours.train(steps=3, clip=limit)
    monkeypatch.setattr("latentsmith.training.loop.clip_and_skip", by_pytorch)
    other = theirs.train(steps=3, clip=limit)
    networks = (training.objective.networks["unet"] for training in (found, other))
    for one, two in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
