import hashlib

import pytest
import torch

from latentsmith.files.hashing import fingerprint_bytes, fingerprint_tensors, fingerprint_text, hash_file


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return {"b.weight": torch.randn(3, 4, 2, 2, generator=generator), "a": torch.randn((), generator=generator)}


def test_same_content_same_fingerprint(weights):
    known = fingerprint_tensors(weights)
    reordered = dict(reversed(weights.items()))
    channels_last = {k: v.to(memory_format=torch.channels_last) if v.dim() == 4 else v for k, v in weights.items()}
    wider = {k: v.double() for k, v in weights.items()}
    parameters = {k: torch.nn.Parameter(v) for k, v in weights.items()}
    assert {fingerprint_tensors(w) for w in (reordered, channels_last, wider, parameters)} == {known}


def test_bfloat16_equals_its_float32(weights):
    narrow = {k: v.bfloat16() for k, v in weights.items()}
    assert fingerprint_tensors(narrow) == fingerprint_tensors({k: v.float() for k, v in narrow.items()})
    assert fingerprint_tensors(narrow) != fingerprint_tensors(weights)


@pytest.mark.parametrize("change", ["value", "name", "shape", "missing"])
def test_every_difference_shows(weights, change):
    known = fingerprint_tensors(weights)
    if change == "value":
        weights["b.weight"][0, 0, 0, 0] += 1e-6
    elif change == "name":
        weights["c"] = weights.pop("a")
    elif change == "shape":
        weights["b.weight"] = weights["b.weight"].reshape(4, 3, 2, 2)
    else:
        del weights["a"]
    assert fingerprint_tensors(weights) != known


def test_digest_of_the_documented_bytes():
    """Computed by hand: `name shape` and a line end, then little-endian float32."""
    expected = hashlib.blake2b(b"w (2,)\n" + bytes.fromhex("0000803f000000c0"), digest_size=16).hexdigest()
    assert fingerprint_tensors({"w": torch.tensor([1.0, -2.0])}) == expected


def test_file_bytes_and_text_agree(tmp_path):
    text = "naïve" * 100_000
    (tmp_path / "a").write_text(text, encoding="utf-8")
    assert hash_file(tmp_path / "a") == fingerprint_text(text) == fingerprint_bytes(text.encode())
    assert fingerprint_text("\ud800") != fingerprint_text("")
