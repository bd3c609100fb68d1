"""Weights in prompts, and prompts that are too long."""

import warnings

import pytest
import torch

from latentsmith.models import ClipTextEncoder
from latentsmith.text.prompts import embed_prompt, encode_prompt, weighted_parts
from latentsmith.text.tokenizer import Tokenizer, train_vocabulary


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("plain text", [("plain text", 1)]),
        ("", []),
        ("a (word) b", [("a ", 1), ("word", 1.1), (" b", 1)]),
        ("a ((word))", [("a ", 1), ("word", 1.21)]),
        ("a [word]", [("a ", 1), ("word", 1 / 1.1)]),
        ("(word:1.5)", [("word", 1.5)]),
        ("(a word : .5 )b", [("a word ", 0.5), ("b", 1)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
        ("(negative:-1)", [("negative", -1.0)]),
        (r"\(literal\) \[brackets\] \\", [("(literal) [brackets] \\", 1)]),
        ("(not closed", [("not closed", 1.1)]),
        ("not opened) here]", [("not opened) here]", 1)]),
        ("ratio 16:9)", [("ratio 16:9)", 1)]),
        ("[crossed (over] here)", [("crossed ", 1 / 1.1), ("over] here", 1.0)]),
        ("a: b, c:2", [("a: b, c:2", 1)]),
    ],
)
def test_web_ui_syntax(prompt, parts):
    found = weighted_parts(prompt)
    assert [text for text, _ in found] == [text for text, _ in parts]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in parts])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_vocabulary(["a red circle above a small blue square café"], 600, folder)
    return Tokenizer.from_file(folder, 12)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    torch.manual_seed(0)
    return ClipTextEncoder(
        width=16, layers=2, heads=2, intermediate_size=32, activation="quick_gelu", vocab_size=tokenizer.vocab_size,
        max_length=12,
    )  # fmt: skip


LONG = "a red circle above a small blue square a red circle above a small blue square café"


def test_short_prompts_are_the_tokenizers(tokenizer, encoder):
    for prompt in ("", "a red circle", "café"):
        encoded = encode_prompt(prompt, tokenizer)
        assert encoded.plain and len(encoded.chunks) == 1
        embedded = embed_prompt(encoded, 1, tokenizer, encoder)
        torch.testing.assert_close(embedded, encoder(tokenizer([prompt]))[0], rtol=0, atol=0)


def test_long_prompts_are_read_in_chunks(tokenizer, encoder):
    encoded = encode_prompt(LONG, tokenizer)
    assert [len(chunk) for chunk in encoded.chunks] == [10, 7]
    embedded = embed_prompt(encoded, 3, tokenizer, encoder)
    parts = ["a red circle above a small blue square a red", "circle above a small blue square café", ""]
    torch.testing.assert_close(embedded, encoder(tokenizer(parts)).flatten(0, 1))


def test_or_cut_with_what_is_cut_named(tokenizer):
    with pytest.warns(UserWarning, match='17 tokens, 10 fit; cut: "circle above a small blue square café"'):
        encoded = encode_prompt(LONG, tokenizer, long_prompts="cut")
    assert [len(chunk) for chunk in encoded.chunks] == [10]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_prompt("a red circle", tokenizer, long_prompts="cut")


def test_weights_scale_their_tokens_and_keep_the_mean(tokenizer, encoder):
    encoded = encode_prompt("a (red:1.5) circle", tokenizer, syntax="webui")
    assert [weight for _, weight in encoded.chunks[0]] == [1, 1.5, 1]
    weighted, plain = embed_prompt(encoded, 1, tokenizer, encoder), encoder(tokenizer(["a red circle"]))[0]
    expected = plain.clone()
    expected[2] *= 1.5
    torch.testing.assert_close(weighted, expected * plain.mean() / expected.mean())
    torch.testing.assert_close(weighted.mean(), plain.mean())


def test_weights_in_a_plain_prompt_are_text(tokenizer):
    with pytest.warns(UserWarning, match="prompt_syntax webui"):
        assert encode_prompt("a (red:1.5) circle", tokenizer).plain
