import pytest
import torch
from torch import nn

from latentsmith.training.ema import Ema


def walk(module: nn.Module, steps: int, ema: Ema) -> list[torch.Tensor]:
    """Move the weights `steps` times, and update the average; the weights after each step, in float64."""
    weights = []
    for step in range(1, steps + 1):
        with torch.no_grad():
            module.weight.add_(torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(step)))
        ema.update(module, step, torch.tensor(True))
        weights.append(module.weight.detach().double().clone())
    return weights


@pytest.mark.parametrize(("decay", "every"), [(0.5, 1), (0.9999, 1), (0.3, 3)])
def test_average_equals_its_closed_form(decay, every):
    module = nn.Linear(3, 2, bias=False)
    expected, ema = module.weight.detach().double().clone(), Ema(module, decay, every_n_steps=every)
    for update, weight in enumerate(walk(module, 12, ema)[every - 1 :: every], start=1):
        kept = min(decay, (1 + update) / (10 + update))  # the warm-up: 2/11, 3/12, ...
        expected = kept * expected + (1 - kept) * weight
    assert ema.updates == 12 // every
    torch.testing.assert_close(ema.state_dict()["weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_early_averages_follow_the_weights():
    module = nn.Linear(3, 2, bias=False)
    ema = Ema(module, 0.9999)
    started = module.weight.detach().clone()
    (weight,) = walk(module, 1, ema)
    torch.testing.assert_close(ema.state_dict()["weight"].double(), 2 / 11 * started.double() + 9 / 11 * weight)


def test_applied_they_are_the_weights_and_then_all_is_back():
    module = nn.Linear(3, 2)
    ema = Ema(module, 0.9)
    walk(module, 3, ema)
    weights = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    averages = {name: average.clone() for name, average in ema.state_dict().items()}
    with ema.applied(module):
        assert all(torch.equal(module.get_parameter(name), averages[name]) for name in weights)
    assert all(torch.equal(module.get_parameter(name), weights[name]) for name in weights)
    assert all(torch.equal(ema.state_dict()[name], averages[name]) for name in weights)


def test_averages_of_weights_in_half_precision_are_not_rounded():
    module = nn.Linear(3, 2).to(torch.bfloat16)
    ema = Ema(module, 0.9)
    walk(module, 3, ema)
    weight, average = module.weight.detach().clone(), ema.state_dict()["weight"].clone()
    assert average.dtype == torch.float32 and not torch.equal(average, average.bfloat16().float())
    with ema.applied(module):
        assert torch.equal(module.weight, average.bfloat16())
    assert torch.equal(module.weight, weight) and torch.equal(ema.state_dict()["weight"], average)


def test_only_trained_parameters_are_averaged_and_state_goes_on():
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    ema = Ema(module, 0.9, cpu_offload=True)
    assert list(ema.state_dict()) == ["weight"]
    walk(module, 4, ema)
    again = Ema(module, 0.9)
    again.load_state_dict({"weight": ema.state_dict()["weight"].clone()}, ema.updates)
    walk(module, 2, ema)
    torch.manual_seed(0)
    assert again.updates == 4
    with pytest.raises(KeyError, match="weight"):
        again.load_state_dict({}, 0)


def test_half_precision_weights_have_float32_averages():
    module = nn.Linear(3, 2, bias=False).bfloat16()
    ema = Ema(module, 0.5)
    walk(module, 2, ema)
    assert ema.state_dict()["weight"].dtype == torch.float32


def test_a_skipped_step_moves_nothing():
    module = nn.Linear(3, 2)
    ema = Ema(module, 0.9)
    walk(module, 3, ema)
    averages = [average.clone() for average in ema.averages]
    with torch.no_grad():
        module.weight += 1
    ema.update(module, 4, torch.tensor(False))
    assert all(map(torch.equal, averages, ema.averages)) and ema.updates == 3
