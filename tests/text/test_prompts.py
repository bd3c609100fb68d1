"""Weights in prompts, and prompts that are too long."""

import warnings

import pytest
import torch

from latentsmith.files.errors import BadInput
from latentsmith.models import ClipTextEncoder
from latentsmith.text.prompts import EXPLICIT, embed_prompt, encode_prompt, web_ui_tags, weighted_parts
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


class Shifted(torch.nn.Module):
    """A text encoder whose embeddings have a mean, as CLIP's have."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, rows):
        return self.encoder(rows) + 1


def test_weights_scale_their_tokens_and_keep_the_mean(tokenizer, encoder):
    encoder = Shifted(encoder)
    encoded = encode_prompt("a (red:1.5) circle", tokenizer, syntax="webui")
    assert [weight for _, weight in encoded.chunks[0]] == [1, 1.5, 1]
    weighted, plain = embed_prompt(encoded, 1, tokenizer, encoder), encoder(tokenizer(["a red circle"]))[0]
    expected = plain.clone()
    expected[2] *= 1.5
    torch.testing.assert_close(weighted, expected * plain.mean() / expected.mean())
    torch.testing.assert_close(weighted.mean(), plain.mean())


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("weight", [-100, -1, 0, 0.5, 1.0001, 1.2, 100])
def test_no_weight_flips_or_explodes_what_is_not_weighted(tokenizer, encoder, weight, shifted):
    """Fresh encoders end in a LayerNorm whose mean is 0, where a ratio of means has any sign and size."""
    encoder = Shifted(encoder) if shifted else encoder
    for prompt in (f"a (red:{weight}) circle", f"(a red circle:{weight})"):
        encoded = encode_prompt(prompt, tokenizer, syntax="webui")
        weighted, plain = embed_prompt(encoded, 1, tokenizer, encoder), encoder(tokenizer(["a red circle"]))[0]
        factor = (weighted[0] / plain[0]).mean()
        torch.testing.assert_close(weighted[0], plain[0] * factor)
        assert 0 < factor <= 2
        if weight == 1.0001:
            torch.testing.assert_close(weighted, plain, rtol=1e-3, atol=1e-3)
        if weight == 0:
            assert not weighted[2].any()


@pytest.mark.parametrize("prompt", ["(red:101)", "(red:-101)", "(" * 60 + "red", "(red:" + "9" * 400 + ")"])
def test_a_weight_beyond_reason_is_one_line(tokenizer, prompt):
    with pytest.raises(BadInput, match=r"weights lie within 100$"):
        encode_prompt(prompt, tokenizer, syntax="webui")


@pytest.mark.parametrize(
    "unit", ["(", "[", ")", ":", ": ", "(a:", ":1", "\\", "(a)", "((a) ", "<lora:", "[a|", "[a:b:", "AND "]
)
@pytest.mark.parametrize("ending", ["", "1" * 5000, " " * 5000 + "x"])
def test_reading_a_prompt_takes_time_in_proportion_to_its_length(unit, ending):
    """A quadratic reading of these 120,000 characters would take minutes."""
    prompt = unit * (120_000 // len(unit)) + ending
    weighted_parts(prompt)
    EXPLICIT.search(prompt)
    web_ui_tags(prompt)


@pytest.mark.parametrize("syntax", ["plain", "webui"])
def test_a_prompt_of_a_megabyte_is_one_line(tokenizer, syntax):
    with pytest.raises(BadInput, match=r'^"a{37}\.\.\." has 1,000,000 characters; a prompt has 20,000 at most$'):
        encode_prompt("a" * 1_000_000, tokenizer, syntax=syntax)


@pytest.mark.parametrize("syntax", ["plain", "webui"])
@pytest.mark.parametrize(
    "tag",
    ["<lora:add_detail:0.8>", "<hypernet:x:1>", "BREAK", "AND", "[red:blue:0.5]", "[red::10]", "[:red:.3]", "[a|b]"],
)
def test_tags_of_web_uis_are_text_and_named(tokenizer, tag, syntax):
    if "lora" in tag and syntax == "webui":
        return  # obeyed: the next test
    with pytest.warns(UserWarning) as caught:
        encode_prompt(f"a circle {tag} a square", tokenizer, syntax=syntax)
    assert [f"has {tag}, which web UIs obey; here it is text" in str(each.message) for each in caught] == [True]


@pytest.mark.parametrize(
    ("tag", "weights"),
    [
        ("<lora:a.b:0.8>", (0.8, 0.8)),
        ("<lora:a.b>", (1, 1)),
        ("<lyco:a.b:-.5>", (-0.5, -0.5)),
        ("<lora:a.b:0.2:1>", (1, 0.2)),
    ],
)
def test_lora_tags_leave_the_prompt(tokenizer, tag, weights):
    """(weight of the U-Net, of the text encoder)"""
    found = encode_prompt(f"a {tag}red circle", tokenizer, syntax="webui")
    assert found.chunks == encode_prompt("a red circle", tokenizer).chunks
    assert [(each.name, each.weight, each.text_weight) for each in found.loras] == [("a.b", *weights)]


@pytest.mark.parametrize("prompt", ["you and me", "a [small] circle", "16:9 [4:3]", "a < b > c", "BREAKFAST", "HAND"])
def test_plain_words_are_no_tags(prompt):
    assert web_ui_tags(prompt) == []


def test_weights_in_a_plain_prompt_are_text(tokenizer):
    with pytest.warns(UserWarning, match="prompt_syntax webui"):
        assert encode_prompt("a (red:1.5) circle", tokenizer).plain
