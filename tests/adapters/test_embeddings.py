"""Textual inversion: files of every writer, the rows of a text encoder, and words in prompts."""

import pytest
import torch
from safetensors.torch import save_file

from latentsmith.adapters.embeddings import Embedding, add_embedding, read_embedding, remove_embedding, save_embedding
from latentsmith.files.errors import BadInput

VECTORS = torch.arange(48, dtype=torch.float32).reshape(2, 24) / 10


def write(path, content):
    (save_file if path.suffix == ".safetensors" else torch.save)(content, path)
    return path


@pytest.mark.parametrize(
    ("name", "content", "token"),
    [
        ("learned_embeds.safetensors", {"<cat>": VECTORS}, "<cat>"),
        ("learned_embeds.bin", {"<cat>": VECTORS}, "<cat>"),
        ("toy.safetensors", {"emb_params": VECTORS}, "toy"),
        ("toy.pt", {"emb_params": VECTORS}, "toy"),
        ("toy.pt", {"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS}, "name": "x", "step": 9}, "toy"),
        ("toy.safetensors", {"clip_l": VECTORS}, "toy"),
    ],
)
def test_files_of_every_writer(tmp_path, name, content, token):
    found = read_embedding(write(tmp_path / name, content))
    assert found.token == token and torch.equal(found.vectors, VECTORS)


def test_one_vector_may_have_one_dimension_and_half_precision(tmp_path):
    found = read_embedding(write(tmp_path / "a.safetensors", {"<a>": VECTORS[0].half()}))
    assert found.vectors.shape == (1, 24) and found.vectors.dtype == torch.float32


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_what_is_written_is_read_back(tmp_path, format):
    save_embedding(tmp_path / "toy.safetensors", Embedding("<toy>", VECTORS), format)
    found = read_embedding(tmp_path / "toy.safetensors")
    assert torch.equal(found.vectors, VECTORS) and found.token == ("<toy>" if format == "diffusers" else "toy")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"clip_l": VECTORS, "clip_g": VECTORS.repeat(1, 2)}, "is of SDXL, with vectors for two text encoders"),
        ({"a": VECTORS, "b": VECTORS + 1}, "holds 2 tensors; an embedding is one (a, b)"),
        ({"a": VECTORS.to(torch.int64)}, "torch.int64 of the shape (2, 24), not vectors"),
        ({"a": VECTORS[None]}, "shape (1, 2, 24), not vectors"),
        ({"a": VECTORS * float("nan")}, "not finite"),
        ({"a": VECTORS[:0]}, "not vectors"),
    ],
)
def test_what_is_no_embedding_is_one_line(tmp_path, content, message):
    with pytest.raises(BadInput) as caught:
        read_embedding(write(tmp_path / "a.safetensors", content))
    assert message in str(caught.value) and "a.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_a_pickle_with_code_is_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"string_to_param": {"*": VECTORS}, "x": Code()}, tmp_path / "a.pt")
    with pytest.raises(BadInput, match="print"):
        read_embedding(tmp_path / "a.pt")


def test_words_stand_for_rows_and_all_others_stay(models):
    pipeline = models[1].pipeline()
    encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    table = encoder.text_model.embeddings.token_embedding
    before, ids = table.weight.detach().clone(), tokenizer.encode("a red circle")
    fingerprint = tokenizer.fingerprint()
    cat = add_embedding(encoder, tokenizer, Embedding("<cat>", VECTORS))
    toy = add_embedding(encoder, tokenizer, Embedding("toy", VECTORS[:1] + 1))
    table = encoder.text_model.embeddings.token_embedding
    assert torch.equal(table.weight[: len(before)], before) and torch.equal(table.weight[cat], VECTORS)
    assert tokenizer.encode("a red circle") == ids and tokenizer.fingerprint() != fingerprint
    a, red = tokenizer.encode("a"), tokenizer.encode("red")
    assert tokenizer.encode("a <CAT> red toy,toys") == [*a, *cat, *red, *toy, *tokenizer.encode(",toys")]
    assert not set(toy) & set(tokenizer.encode("toys storytoy"))
    assert tokenizer(["red <cat>"])[0, :5].tolist() == [tokenizer.start_id, *red, *cat]
    assert tokenizer(["<cat> " * 60], return_cut=True)[1][0].startswith("<cat>")
    assert tokenizer.decode(tokenizer.encode("red <cat>")) == "red <cat> <cat>"
    hidden = encoder(tokenizer(["a toy"]))
    remove_embedding(encoder, tokenizer, "<cat>")
    assert torch.equal(encoder(tokenizer(["a toy"])), hidden)
    remove_embedding(encoder, tokenizer, "toy")
    assert torch.equal(encoder.text_model.embeddings.token_embedding.weight, before)
    assert tokenizer.fingerprint() == fingerprint


@pytest.mark.parametrize(
    ("token", "vectors", "message"),
    [
        ("<x>", torch.zeros(1, 768), "768 numbers (Stable Diffusion 1), this text encoder's have 24"),
        ("<x>", torch.zeros(80, 24), "has 80 vectors, a prompt 75"),
        ("two words", VECTORS, "a trained token is one word"),
        ("a", VECTORS, "is a token of the vocabulary"),
        ("", VECTORS, "a trained token is one word"),
        ("<cat>", VECTORS, "is there already"),
    ],
)
def test_what_cannot_be_added_is_one_line(models, token, vectors, message):
    pipeline = models[1].pipeline()
    add_embedding(pipeline.text_encoder, pipeline.tokenizer, Embedding("<Cat>", VECTORS))
    with pytest.raises(BadInput) as caught:
        add_embedding(pipeline.text_encoder, pipeline.tokenizer, Embedding(token, vectors))
    assert message in str(caught.value)
    assert len(pipeline.text_encoder.text_model.embeddings.token_embedding.weight) == 522
