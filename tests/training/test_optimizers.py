import math
import warnings

import pytest
import torch
from torch import nn

from latentsmith.files.errors import BadInput
from latentsmith.files.tensors import open_tensors
from latentsmith.training.checkpointing import checkpoints_in, read_state
from latentsmith.training.optimizers import build_optimizer, lr_schedule, optimizer_options, share_rounded_away


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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package.Lamb", "no_such_package is not installed; pip install no_such_package"),
        ("torch.optim.Optimizer2", "torch.optim.Optimizer2 is no class of an optimizer"),
        ("torch.optim.lr_scheduler", "is no class of an optimizer"),
        ("torch.nope.Adam", "torch.nope cannot be imported"),
        ("torch.optim.LBFGS", "does not work with one dense gradient a step"),
    ],
)
def test_what_is_no_optimizer(name, message):
    with pytest.raises(BadInput, match=message):
        build_optimizer(name, [nn.Parameter(torch.ones(1))], lr=0.1)


@pytest.mark.parametrize(
    ("name", "stated", "options", "message"),
    [
        (
            "SGD",
            {},
            {"momentun": 0.9},
            "model.optim.options.momentun means nothing to model.optim.name=SGD, which takes",
        ),
        ("SGD", {"eps": 1e-6}, {}, "model.optim.eps means nothing to model.optim.name=SGD"),
        ("torch.optim.Rprop", {"weight_decay": 0.1}, {}, "model.optim.weight_decay means nothing"),
        ("AdamW", {}, {"lr": 1}, "model.optim.options.lr: give it as model.optim.lr"),
        ("AdamW", {}, {"capturable": 1, "foreach": "x", "betas2": 1}, "betas2 means nothing"),
        ("SGD", {}, {"nesterov": True}, "model.optim: SGD does not take these options .Nesterov"),
    ],
)
def test_options_are_checked_against_the_signature(name, stated, options, message):
    with pytest.raises(BadInput, match=message):
        optimizer_options(name, {"lr": 0.1, "weight_decay": 0.0, "betas": None, "eps": None} | stated, options)


def test_options_reach_the_optimizer():
    stated = {"lr": 0.1, "weight_decay": 0.0, "betas": None, "eps": None}
    assert optimizer_options("Rprop", stated, {"etas": [0.4, 1.1]}) == {"lr": 0.1, "etas": (0.4, 1.1)}
    options = optimizer_options("torch.optim.SGD", stated, {"momentum": 0.9})
    assert build_optimizer("torch.optim.SGD", [nn.Parameter(torch.ones(1))], **options).defaults["momentum"] == 0.9


def test_muon_turns_matrices_and_adamw_the_rest():
    """Muon's first step has singular values near lr * 0.2 * sqrt(larger side); AdamW's is lr * sign(gradient)."""
    matrix, bias = nn.Parameter(torch.zeros(8, 4)), nn.Parameter(torch.zeros(3))
    optimizer = build_optimizer("Muon", [{"params": [bias, matrix], "lr_factor": 1.0}], lr=0.1, weight_decay=0.0)
    matrix.grad, bias.grad = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, -2, 3])
    optimizer.step()
    values = torch.linalg.svdvals(matrix.detach()) / (0.1 * 0.2 * 8**0.5)
    assert values.min() > 0.6 and values.max() < 1.3
    torch.testing.assert_close(bias.detach(), torch.tensor([-0.1, 0.1, -0.1]))


NEEDED = {
    "adam8bit": pytest.importorskip("bitsandbytes"),
    "lion": pytest.importorskip("lion_pytorch"),
    "prodigy": pytest.importorskip("prodigyopt"),
    "adamw_schedulefree": pytest.importorskip("schedulefree"),
}
RESUMED = {
    "Adafactor": {}, "Muon": {}, "lion": {}, "prodigy": {"lr": 1.0, "d0": 1e-3},
    "adamw_schedulefree": {"warmup_steps": 2},
    "sgd_schedulefree": {}, "radam_schedulefree": {}, "adam8bit": {}, "lion8bit": {}, "torch.optim.NAdam": {},
    "ASGD": {}, "Rprop": {},
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_each_goes_on_exactly(toy, name):
    whole, halves = (toy(optimizer=name, options={"lr": 1e-2} | RESUMED[name]) for _ in range(2))
    end = whole.train(steps=6, every=6).state
    halves.train(steps=3, every=3)
    halves.train(steps=6, every=6, resume=checkpoints_in(halves.folder / "checkpoints")[-1])
    assert halves.losses() == whole.losses() and len(set(whole.losses())) == 6
    states = [read_state(checkpoints_in(run.folder / "checkpoints")[-1]) for run in (whole, halves)]
    assert states[0] == states[1]
    assert end.optimizer.param_groups[0]["lr_factor"] == 1.0


def test_schedule_free_weights_are_those_of_evaluation(toy):
    """In the checkpoint and in validation x = y + (1 - 1 / beta1) (z - y); training goes on at y."""
    run = toy(optimizer="adamw_schedulefree", options={"lr": 1e-1})
    state = run.train(steps=5, every=5).state
    parameter = state.networks["unet"].conv.weight
    trained, z = parameter.detach().clone(), state.optimizer.state[parameter]["z"]
    expected = trained + (1 - 1 / 0.9) * (z - trained)
    with state.for_evaluation():
        torch.testing.assert_close(parameter.detach(), expected)
    assert torch.equal(parameter, trained) and not torch.allclose(trained, expected)
    saved = open_tensors(checkpoints_in(run.folder / "checkpoints")[-1] / "unet.safetensors")
    torch.testing.assert_close(saved["conv.weight"], expected)


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
