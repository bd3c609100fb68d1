"""Adapters on networks: nothing at first, gradients of a merged weight, off and away without a trace."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from latentsmith.adapters import (
    AdapterSpec,
    adapter_state,
    adapters_of,
    base_state,
    inject,
    load_adapter_state,
    remove,
    set_weight,
    target_ranks,
)
from latentsmith.adapters.inject import changed_weight
from latentsmith.checkpoints.load import meta_weights
from latentsmith.cpu import optimize_for_cpu
from latentsmith.models import ClipTextEncoder, UNetModel

SMALL = dict(
    model_channels=32, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[1, 2], num_heads=2, context_dim=24
)
SCHEMES = ("lora", "dora", "loha", "lokr", "oft")


def small_unet(**options):
    torch.manual_seed(0)
    network = UNetModel(**SMALL, **options)
    for parameter in network.parameters():  # none at zero, so that every adapter counts
        nn.init.normal_(parameter, std=0.1)
    return network.requires_grad_(False)


def inputs(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(2, 4, 8, 8, dtype=dtype), torch.tensor([3, 500]), torch.randn(2, 5, 24, dtype=dtype)


def moved(network, name="default", std=0.1):
    """Give every tensor of an adapter other values."""
    torch.manual_seed(2)
    with torch.no_grad():
        for _, adapter in adapters_of(network, name):
            for tensor in adapter.tensors.values():
                tensor += std * torch.randn_like(tensor)
    return network


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fresh_adapters_change_nothing(scheme):
    network = small_unet()
    before = network(*inputs())
    layers = inject(network, AdapterSpec(scheme=scheme, rank=4, targets="full"))
    assert len(layers) == sum(isinstance(m, nn.Linear | nn.Conv2d) for m in network.modules())
    torch.testing.assert_close(network(*inputs()), before, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("scheme", "use_checkpoint"), [*((scheme, False) for scheme in SCHEMES), ("lora", True), ("dora", True)]
)
def test_gradients_equal_those_through_a_merged_weight_in_float64(scheme, use_checkpoint):
    """Each adapter tensor's gradient against autograd through W + change(W), weights of a plain network."""
    network = small_unet(use_checkpoint=use_checkpoint).double()
    plain = copy.deepcopy(network)
    plain.set_checkpointing(False)
    inject(network, AdapterSpec(scheme=scheme, rank=4, alpha=3, targets="full"))
    moved(network.double())
    network(*inputs(torch.float64)).square().sum().backward()
    trained = [tensor for _, adapter in adapters_of(network) for tensor in adapter.tensors.values()]
    found = [tensor.grad.clone() for tensor in trained]
    merged = {
        f"{path}.weight": changed_weight(plain.get_submodule(path), [adapter]) for path, adapter in adapters_of(network)
    }
    loss = functional_call(plain, merged, inputs(torch.float64)).square().sum()
    expected = torch.autograd.grad(loss, trained)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    assert all(p.grad is None for name, p in network.named_parameters() if "adapters" not in name)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_off_and_away_is_the_base_bit_for_bit(scheme):
    network = small_unet()
    before, state, classes = (
        network(*inputs()),
        copy.deepcopy(network.state_dict()),
        [type(m) for m in network.modules()],
    )
    inject(network, AdapterSpec(scheme=scheme, rank=2, targets="full"))
    moved(network)
    assert not torch.allclose(network(*inputs()), before, atol=1e-3)
    assert base_state(network).keys() == state.keys()
    set_weight(network, "default", 0)
    assert torch.equal(network(*inputs()), before)
    remove(network)
    assert torch.equal(network(*inputs()), before)
    assert [type(m) for m in network.modules()] == classes and network.state_dict().keys() == state.keys()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_goes_into_a_bare_network_and_back_into_a_trained_one(scheme):
    network = small_unet()
    inject(network, AdapterSpec(scheme=scheme, rank=2, alpha=1, targets="conv"))
    fresh = copy.deepcopy(adapter_state(network))
    expected, state = moved(network)(*inputs()), copy.deepcopy(adapter_state(network))
    bare = small_unet()
    load_adapter_state(bare, state, "style")
    assert torch.equal(bare(*inputs()), expected)
    assert not any(parameter.requires_grad for parameter in bare.parameters())
    load_adapter_state(network, fresh)
    load_adapter_state(network, state)
    assert torch.equal(network(*inputs()), expected)
    assert all(tensor.requires_grad for _, adapter in adapters_of(network) for tensor in adapter.tensors.values())


def test_several_adapters_add_up_and_cpu_kernels_stay():
    network, one, two = small_unet(), small_unet(), small_unet()
    for unet in (network, one):
        inject(unet, AdapterSpec(rank=2), "a", seed=1)
        moved(unet, "a")
    for unet in (network, two):
        inject(unet, AdapterSpec(scheme="loha", rank=2), "b", seed=2)
        moved(unet, "b")
    set_weight(network, "b", 0.5)
    layers = dict(adapters_of(network, "a"))
    for path, adapter in layers.items():
        layer, other = network.get_submodule(path), dict(adapters_of(two, "b"))[path]
        both = changed_weight(layer, list(layer.adapters.values()))
        torch.testing.assert_close(both, layer.weight + adapter.change(layer.weight) + 0.5 * other.change(layer.weight))
    expected = network(*inputs())
    optimize_for_cpu(network)
    torch.testing.assert_close(network(*inputs()), expected, atol=1e-4, rtol=1e-4)
    optimize_for_cpu(one, pack_weights=True)
    remove(one, "a")
    assert {type(m).__name__ for m in one.modules()} >= {"Linear"}


def test_the_same_seed_makes_the_same_adapters_and_draws_nothing_else():
    states = []
    for seed in (3, 3, 4):
        network = small_unet()
        torch.manual_seed(9)
        inject(network, AdapterSpec(scheme="lora", rank=2), seed=seed)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(9)))
        states.append(adapter_state(network))
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not all(torch.equal(states[0][k], states[2][k]) for k in states[0])


def full_size(version):
    v1 = dict(model_channels=320, attention_resolutions=[4, 2, 1], num_res_blocks=2, channel_mult=[1, 2, 4, 4])
    v1 |= dict(num_heads=8, context_dim=768) if version == 1 else dict(num_head_channels=64, context_dim=1024)
    with meta_weights():
        text = {"arch": "ViT-L-14"} if version == 1 else {"arch": "ViT-H-14", "layer": "penultimate"}
        return UNetModel(**v1, use_linear_in_transformer=version == 2), ClipTextEncoder(**text)


@pytest.mark.parametrize("version", [1, 2])
def test_presets_target_what_other_programs_do(version):
    """Counts of modules and of parameters per unit of rank at full size."""
    unet, text = full_size(version)
    layers = 12 if version == 1 else 23
    counts = {
        "attention": (128, 4 * layers), "nemo": (160, 6 * layers), "transformer": (192, 6 * layers),
        "conv": (278, 6 * layers), "full": (282, 6 * layers),
    }  # fmt: skip
    for preset, (of_unet, of_text) in counts.items():
        spec = AdapterSpec(targets=preset)
        assert (len(target_ranks(unet, spec)), len(target_ranks(text, spec))) == (of_unet, of_text)

    def size(network, preset):
        modules = dict(network.named_modules())
        found = target_ranks(network, AdapterSpec(rank=1, targets=preset))
        return sum(modules[n].weight[0].numel() + len(modules[n].weight) for n in found)

    sizes = {1: (423_936, 1_050_816, 165_888), 2: (432_128, 1_059_008, 423_936)}[version]
    assert (size(unet, "transformer"), size(unet, "conv"), size(text, "transformer")) == sizes


def test_patterns_ranks_and_exclusions():
    unet, _ = full_size(1)
    assert len(target_ranks(unet, AdapterSpec(targets=["attn2.to_k", "attn2.to_v"]))) == 32
    found = target_ranks(unet, AdapterSpec(rank=8, conv_rank=2, targets="conv", ranks={"mid_block.*": 16, "to_q": 0}))
    assert found["middle_block.1.transformer_blocks.0.attn1.to_k"] == 16 and len(found) == 278 - 32
    assert found["input_blocks.1.0.in_layers.2"] == 2 and found["input_blocks.1.0.emb_layers.1"] == 8
    assert len(target_ranks(unet, AdapterSpec(exclude=["up_blocks.*"]))) == 192 - 9 * 12


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(scheme="lorra"), "'lorra' is not one of lora, loha, lokr, oft, dora"),
        (dict(rank=0), "rank is 0; it must be at least 1"),
        (dict(conv_rank=-1), "conv_rank is -1"),
        (dict(alpha=-1.0), "alpha is -1.0; it must be above 0"),
        (dict(alpha=float("nan")), "alpha is nan"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(scheme="loha", dropout=0.1), "dropout is for lora and dora"),
        (dict(ranks={"to_q": -2}), "ranks hold -2"),
        (dict(targets="some"), "'some' is not one of attention"),
        (dict(targets=["to_x"]), "'to_x' matches no linear layer"),
        (dict(ranks={"to_x": 3}), "ranks: 'to_x' matches no"),
        (dict(exclude=["*"]), "target no module"),
    ],
)
def test_what_cannot_be_is_one_line(given, message):
    with pytest.raises(ValueError, match="adapter") as caught:
        inject(small_unet(), AdapterSpec(**given))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_clashing_names_and_foreign_states_are_refused():
    network = small_unet()
    inject(network, AdapterSpec(rank=2))
    state = adapter_state(network)
    with pytest.raises(ValueError, match="already"):
        inject(network, AdapterSpec(rank=2))
    with pytest.raises(ValueError, match="letters, digits"):
        inject(network, AdapterSpec(rank=2), "a.b")
    with pytest.raises(ValueError, match="is of no adapter"):
        load_adapter_state(network, state | {"x.lora_up": torch.zeros(2, 2)})
    wrong = {key: torch.zeros(3, 3) if key.endswith("lora_up") else tensor for key, tensor in state.items()}
    with pytest.raises(ValueError, match="shape"):
        load_adapter_state(network, wrong)
    with pytest.raises(ValueError, match="do not fit"):
        load_adapter_state(small_unet(), wrong)
    with pytest.raises(ValueError, match="no linear layer"):
        load_adapter_state(small_unet(), {"x.lora_up": torch.zeros(2, 2), "x.lora_down": torch.zeros(2, 2)})


def test_dropout_acts_in_training_alone():
    network, given = small_unet(), inputs()
    inject(network, AdapterSpec(rank=4, dropout=0.5))
    moved(network)
    network.train()
    assert not torch.equal(network(*given), network(*given))
    network.eval()
    assert torch.equal(network(*given), network(*given))
