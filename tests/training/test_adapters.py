"""Training adapters: gradients against a merged network in float64, learning rates, what full rank learns."""

import copy

import pytest
import torch
import torch.nn.functional as F

from latentsmith.adapters import AdapterSpec, adapters_of, inject
from latentsmith.models import UNetModel
from latentsmith.training.state import parameter_groups, trained_state

SIZES = dict(model_channels=32, channel_mult=(1, 2), attention_resolutions=(2,), num_res_blocks=1, num_heads=2,
             context_dim=16, resblock_gn_groups=8)  # fmt: skip


def unet() -> UNetModel:
    torch.manual_seed(0)
    network = UNetModel(**SIZES).double()
    with torch.no_grad():
        for parameter in network.parameters():  # zero-initialised layers would hide what is before them
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def loss_of(call):
    generator = torch.Generator().manual_seed(1)
    noisy, target = (torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    context = torch.randn(2, 5, 16, generator=generator, dtype=torch.float64)
    return F.mse_loss(call(noisy, torch.tensor([3, 700]), context), target)


@pytest.mark.parametrize("scheme", ["lora", "dora", "loha", "lokr", "oft"])
def test_gradients_are_those_through_merged_weights(scheme):
    """Both in float64: relative difference of every gradient below 1e-9."""
    network, plain = unet(), unet()
    inject(network, AdapterSpec(scheme=scheme, rank=4, alpha=3, targets="conv"))
    network.double()
    with torch.no_grad():
        for _, adapter in adapters_of(network):
            for parameter in adapter.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    loss_of(network).backward()
    merged = {f"{path}.weight": plain.get_submodule(path).weight for path, _ in adapters_of(network)}
    copies = {path: copy.deepcopy(adapter) for path, adapter in adapters_of(network)}
    weights = {f"{path}.weight": merged[f"{path}.weight"] + copies[path].change(merged[f"{path}.weight"])
               for path in copies}  # fmt: skip
    loss = loss_of(lambda *inputs: torch.func.functional_call(plain, weights, inputs))
    torch.testing.assert_close(loss, loss_of(network), rtol=1e-10, atol=0)
    for path, adapter in adapters_of(network):
        parameters = list(copies[path].parameters())
        expected = torch.autograd.grad(loss, parameters, retain_graph=True)
        for own, other in zip(adapter.parameters(), expected, strict=True):
            assert (own.grad - other).norm() <= 1e-9 * other.norm() + 1e-14


def test_full_rank_learns_what_full_fine_tuning_learns():
    """On one batch the gain of adapters of full rank, at a rate of their own, is within 5% of that of the weights."""
    whole, adapted = unet(), unet()
    layers = inject(adapted, AdapterSpec(rank=64, alpha=64, targets="attention"))
    adapted.double()
    whole.requires_grad_(False)
    for path in layers:
        whole.get_submodule(path).weight.requires_grad_(True)
    start, full = losses_after(whole, steps=40, lr=1e-2)
    same_start, low_rank = losses_after(adapted, steps=100, lr=2e-3)
    assert same_start == pytest.approx(start, rel=1e-12) and full < 0.5 * start
    assert abs(low_rank - full) < 0.05 * (start - full)


def losses_after(network, steps, lr):
    """Return the loss on one batch before and after so many steps of Adam."""
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=lr)
    first = float(loss_of(network).detach())
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(network).backward()
        optimizer.step()
    return first, float(loss_of(network).detach())


def test_groups_have_their_own_rates_and_a_checkpoint_the_adapters_alone():
    network = unet()
    inject(network, AdapterSpec(rank=2))
    groups = parameter_groups({"unet": network}, ("unet",), lambda name: 4.0 if name.endswith("lora_up") else 1.0)
    counts = {group["lr_factor"]: len(group["params"]) for group in groups}
    assert counts[4.0] == counts[1.0] == len(list(adapters_of(network)))
    assert len(trained_state(network)) == 2 * counts[1.0] and all(
        ".adapters." in name for name in trained_state(network)
    )
