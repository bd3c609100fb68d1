import math
import warnings

import pytest
import torch
from torch import nn

from latentsmith.config import model_options
from latentsmith.training.optimizers import BITSANDBYTES, build_optimizer, lr_schedule, share_rounded_away


def rates(name, steps=range(13), **options):
    schedule = lr_schedule(name, **options)
    return [schedule(step) for step in steps]


def test_the_weights_that_rounding_keeps_in_place():
    """Below 1 the values of bfloat16 are 2^-8 apart, from 1 on 2^-7; half of that moves a weight."""
    weights = [nn.Parameter(torch.tensor([1.0, -1.0, 0.0, 2.0**-12]))]
    assert share_rounded_away(weights, 0.9 * 2.0**-9, torch.bfloat16) == 0.5
    assert share_rounded_away(weights, 1.1 * 2.0**-9, torch.bfloat16) == 0.0
    assert share_rounded_away(weights, 2.0**-24, torch.bfloat16) == 0.75
    assert share_rounded_away(weights, 1e-6, torch.float32) == 0.0


def test_constant_knows_no_warm_up():
    assert rates("constant", warmup_steps=5) == [1.0] * 13


@pytest.mark.parametrize("name", ["WarmupPolicy", "WarmupHoldPolicy"])
def test_warm_up_rises_linearly_and_holds(name):
    assert rates(name, warmup_steps=4) == [0.2, 0.4, 0.6, 0.8] + [1.0] * 9
    assert rates(name) == [1.0] * 13
    assert rates(name, max_steps=10, min_factor=0.1) == [1.0] * 11 + [0.1] * 2  # NeMo's: the least rate beyond the end


def test_linear_falls_to_its_end():
    expected = [1 / 3, 2 / 3, 1, 1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0, 0]
    assert rates("linear", warmup_steps=2, hold_steps=1, max_steps=8) == pytest.approx(expected)


def test_cosine_falls_to_its_floor():
    got = rates("CosineAnnealing", warmup_steps=2, max_steps=10, min_factor=0.1)
    assert got[:2] == [1 / 3, 2 / 3]
    for step in range(2, 13):
        share = min(1, (step - 2) / 8)
        assert got[step] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2)
    assert got[10] == got[12] == pytest.approx(0.1)


def test_what_is_no_schedule():
    with pytest.raises(ValueError, match=r"optim\.sched\.name 'polynomial' is not a schedule"):
        lr_schedule("polynomial")
    for name in ("linear", "CosineAnnealing"):
        with pytest.raises(ValueError, match=f"{name} needs max_steps"):
            lr_schedule(name)


@pytest.mark.parametrize("name", ["fused_adam", "adamw", "AdamW", "Adam", "SGD", "RMSprop", "Adagrad"])
def test_optimizers_by_name(name):
    weight = nn.Parameter(torch.ones(3))
    optimizer = build_optimizer(name, [weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    assert (weight < 1).all() and optimizer.param_groups[0]["lr"] == 0.1


def test_fused_adam_is_adamw():
    """The first step of AdamW is lr * sign(gradient), and lr * weight_decay * weight comes off besides."""
    weight = nn.Parameter(torch.tensor([2.0, -2.0]))
    (weight * torch.tensor([3.0, 0.5])).sum().backward()
    build_optimizer("fused_adam", [weight], lr=0.1, weight_decay=0.5, eps=1e-12).step()
    torch.testing.assert_close(weight.detach(), torch.tensor([2 - 0.1 - 0.1, -2 - 0.1 + 0.1]))


@pytest.mark.parametrize("name", ["lamb", "Optimizer2", "__doc__", "lr_scheduler"])
def test_what_is_no_optimizer(name):
    with pytest.raises(ValueError, match=r"is neither fused_adam, adamw nor a class of torch\.optim"):
        build_optimizer(name, [nn.Parameter(torch.ones(1))], lr=0.1)


def test_the_config_knows_the_same_optimizers():
    assert tuple(BITSANDBYTES) == model_options.BITSANDBYTES


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw", "paged_adamw8bit"])
def test_optimizers_of_bitsandbytes_are_adamw(name):
    """Within the rounding of 8 bits; a paged one is plain on a CPU, and says so."""
    start = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    weights = [nn.Parameter(start.clone()) for _ in range(2)]
    options = {"lr": 0.01, "weight_decay": 0.1}
    steppers = [
        build_optimizer(each, [weight], **options) for each, weight in zip((name, "adamw"), weights, strict=True)
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        for _ in range(20):
            for weight, stepper in zip(weights, steppers, strict=True):
                stepper.zero_grad()
                ((weight - 3) ** 2).mean().backward()
                stepper.step()
    bits = 8 if "8bit" in name else 32
    assert {32: torch.float32, 8: torch.uint8}[bits] == steppers[0].state[weights[0]]["state1"].dtype
    moved = (weights[1] - start).norm()
    assert moved > 5 and (weights[0] - weights[1]).norm() < (0.05 if bits == 8 else 1e-5) * moved
