"""The text encoder: its sizes, which layer it gives, what freezing means, what it refuses."""

import pytest
import torch
import yaml

from latentsmith.models import ClipTextEncoder
from latentsmith.models.text_encoder import quick_gelu

SIZES = dict(width=32, layers=3, heads=2, intermediate_size=64, activation="gelu", vocab_size=50, max_length=12)
DOCUMENTED = """
arch: ViT-H-14
max_length: 77
freeze: True
layer: "penultimate"
"""


def tokens(length=12):
    return torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(4))


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    "config, parameters, tensors",
    [
        (dict(arch="ViT-L-14"), 123_060_480, 196),
        (dict(arch="ViT-H-14"), 352_984_064, 388),
        (yaml.safe_load(DOCUMENTED), 340_387_840, 372),
    ],
)
def test_published_sizes(config, parameters, tensors):
    with torch.device("meta"):
        encoder = ClipTextEncoder(**config)
    assert count(encoder) == parameters and len(encoder.state_dict()) == tensors
    assert encoder.max_length == 77 and encoder.vocab_size == 49408


def test_sizes_given_beside_an_architecture_override_it():
    with torch.device("meta"):
        encoder = ClipTextEncoder(arch="ViT-L-14", layers=2, vocab_size=100, max_length=8)
    assert len(encoder.text_model.encoder.layers) == 2 and encoder.width == 768
    assert encoder.text_model.embeddings.token_embedding.weight.shape == (100, 768)
    assert encoder.text_model.embeddings.position_embedding.weight.shape == (8, 768)


@pytest.mark.parametrize(
    "changes, line",
    [
        (dict(arch="ViT-B-32"), "text encoder arch 'ViT-B-32' is unknown; choose from ViT-L-14, ViT-H-14"),
        (dict(width=None, heads=None), "the text encoder needs width, heads, or an arch"),
        (dict(activation="relu"), "text encoder activation 'relu' is not one of quick_gelu, gelu"),
        (dict(heads=5), "text encoder width 32 does not divide into 5 heads"),
        (dict(layer="hidden"), 'layer is \'hidden\'; it can be "last" or "penultimate"'),
    ],
)
def test_sizes_that_do_not_fit_together(changes, line):
    with pytest.raises(ValueError, match=line):
        ClipTextEncoder(**SIZES | changes)


def test_penultimate_leaves_out_the_last_layer_and_keeps_the_final_norm(randomise):
    full = randomise(ClipTextEncoder(**SIZES))
    shorter = ClipTextEncoder(**SIZES, layer="penultimate")
    assert len(shorter.text_model.encoder.layers) == 2
    shorter.load_state_dict({name: t for name, t in full.state_dict().items() if ".layers.2." not in name})
    hidden = full.text_model.embeddings(tokens())
    for layer in full.text_model.encoder.layers[:2]:
        hidden = layer(hidden)
    assert torch.equal(shorter(tokens()), full.text_model.final_layer_norm(hidden))
    assert not torch.allclose(shorter(tokens()), full(tokens()), rtol=1e-2)


def test_frozen_has_no_gradients_and_stays_in_evaluation_mode():
    encoder = ClipTextEncoder(**SIZES)
    outer = torch.nn.ModuleDict({"text_encoder": encoder}).train()
    assert outer.training and not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(tokens()).requires_grad


def test_unfrozen_trains_every_parameter(randomise):
    encoder = randomise(ClipTextEncoder(**SIZES, freeze=False)).train()
    assert all(module.training for module in encoder.modules())
    (encoder(tokens()) ** 3).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    no_effect = {n for n, p in encoder.named_parameters() if p.grad.abs().max() < 1e-4}
    assert {name.rsplit(".", 2)[-2] for name in no_effect} <= {"k_proj"}  # softmax does not see a key's bias


def test_a_token_sees_only_those_before_it(randomise):
    encoder = randomise(ClipTextEncoder(**SIZES))
    ids = tokens()
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 50
    before, after = encoder(ids), encoder(changed)
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=1e-5, atol=1e-6)
    assert ((after[:, 7:] - before[:, 7:]).abs().amax(dim=2) > 1e-3).all()
    torch.testing.assert_close(encoder(ids[:, :5]), before[:, :5], rtol=1e-5, atol=1e-6)


def test_places_count(randomise):
    encoder = randomise(ClipTextEncoder(**SIZES))
    found = encoder(torch.full((1, 12), 9))
    assert ((found[0, 1:] - found[0, :-1]).abs().amax(dim=1) > 1e-3).all()


def test_the_two_activations(randomise):
    values = torch.linspace(-4, 4, 41, dtype=torch.float64)
    torch.testing.assert_close(quick_gelu(values), values / (1 + torch.exp(-1.702 * values)))
    encoders = [
        randomise(ClipTextEncoder(**SIZES | dict(activation=activation))) for activation in ("gelu", "quick_gelu")
    ]
    exact, quick = (encoder(tokens()) for encoder in encoders)
    difference = (exact - quick).abs().max()
    assert 1e-4 < difference < 0.5  # an approximation of each other, not the same


def test_fresh_weights_give_each_word_its_own_embedding():
    torch.manual_seed(0)
    encoder = ClipTextEncoder(**SIZES | dict(width=128, vocab_size=2000, layers=4))
    model, layer = encoder.text_model, encoder.text_model.encoder.layers[0]
    spreads = {
        model.embeddings.token_embedding: 1.0,
        model.embeddings.position_embedding: 0.1,
        layer.self_attn.q_proj: 128**-0.5,
        layer.mlp.fc1: 256**-0.5,
    }
    for module, expected in spreads.items():
        assert module.weight.std().item() == pytest.approx(expected, rel=0.06)
    assert not any(m.bias.any() for m in encoder.modules() if isinstance(m, torch.nn.Linear))
    ids = torch.randint(2000, (2, encoder.max_length))
    embedded = torch.nn.functional.layer_norm(model.embeddings(ids), (128,))
    torch.testing.assert_close(encoder(ids), embedded)  # every residual branch starts at zero


def test_padding_of_the_output_is_zero_vectors_behind_the_same_text():
    """NeMo v2.0.0 fills 77 up to 80."""
    torch.manual_seed(0)
    sizes = dict(width=32, layers=2, heads=4, intermediate_size=64, activation="quick_gelu", vocab_size=100)
    plain = ClipTextEncoder(max_length=77, **sizes)
    padded = ClipTextEncoder(max_length=77, pad_to=80, **sizes)
    padded.load_state_dict(plain.state_dict())
    token_ids = torch.randint(100, (2, 77))
    found = padded(token_ids)
    assert found.shape == (2, 80, 32) and not found[:, 77:].any()
    assert torch.equal(found[:, :77], plain(token_ids))
    with pytest.raises(ValueError, match="pad_to is 10, less than max_length 77"):
        ClipTextEncoder(max_length=77, pad_to=10, **sizes)
