"""JSON of our own folders and of tokenizers, with anything in it: read, or refused in one line."""

import io
import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentsmith.data.inspect import inspect_shards, verify_shards
from latentsmith.data.latent_cache import CACHE_FILE, LatentCache
from latentsmith.data.sample_io import npy_bytes
from latentsmith.data.shards import SET_FILE, ShardSet, ShardWriter, write_set_file
from latentsmith.files.hashing import hash_file
from latentsmith.files.images import read_image
from latentsmith.text.tokenizer import Tokenizer, train_vocabulary
from latentsmith.training.checkpointing import STATE_FILE, read_state
from latentsmith.training.inspect import inspect_run, verify_run

from .conftest import mutated

FOREIGN = settings.get_profile("foreign")
CACHE = {
    "format": 1, "samples": 2, "members": {"captions_encoded": {"shape": [3, 4], "dtype": "float32"}},
    "fingerprints": {"text_encoder": "abc", "transforms": {"size": [8, 8]}}, "versions": {"latentsmith": "0.1"},
    "variants": 1, "latents": "moments", "buckets": [[8, 8], [8, 16]],
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states") / "cache"
    with ShardWriter(folder, samples_per_shard=1) as writer:
        for number in range(2):
            members = {"captions_encoded.npy": npy_bytes(np.ones((3, 4), np.float32)), "txt": b"a cat"}
            writer.write(f"{number:03}", members)
    write_set_file(folder, writer.finished)
    return folder


def use(folder):
    list(inspect_shards(folder))
    verify_shards(folder)
    for sample in range(len(ShardSet(folder))):
        ShardSet(folder)[sample]


@FOREIGN
@given(data=st.data())
def test_listings_of_shards(cache, attempt, data):
    kept = (cache / SET_FILE).read_bytes()
    try:
        (cache / SET_FILE).write_text(json.dumps(data.draw(mutated(json.loads(kept)))))
        attempt(use, cache)
    finally:
        (cache / SET_FILE).write_bytes(kept)


@FOREIGN
@given(info=mutated(CACHE))
def test_descriptions_of_caches(cache, attempt, info):
    (cache / CACHE_FILE).write_text(json.dumps(info))
    try:
        attempt(use, cache)
        if opened := attempt(LatentCache, cache):
            attempt(opened.common, ["captions_encoded"])
            attempt(opened.check, {"text_encoder": "abc", "transforms": {"size": [8, 8]}})
            attempt(opened.check_shapes, 4, 4)
            attempt(opened.buckets)
    finally:
        (cache / CACHE_FILE).unlink()


@FOREIGN
@given(data=st.data())
def test_states_of_checkpoints(tmp_path_factory, attempt, data):
    folder = tmp_path_factory.getbasetemp() / "run" / "checkpoints" / "step-00000010"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "unet.safetensors").write_bytes(b"x")
    state = {"global_step": 10, "consumed_samples": 40, "ema_updates": {"unet": 3}, "optimizer": "AdamW",
             "checksums": {"unet.safetensors": hash_file(folder / "unet.safetensors")}}  # fmt: skip
    (folder / STATE_FILE).write_text(json.dumps(data.draw(mutated(state))))
    attempt(read_state, folder)
    attempt(verify_run, folder)
    attempt(lambda: list(inspect_run(folder.parent.parent)))


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    train_vocabulary(["a red circle"], 520, folder)
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["model"]["vocab"] = dict(list(whole["model"]["vocab"].items())[-20:])  # so that other parts are changed too
    return folder, {"added_tokens": [{"id": 0, "content": "a"}], **whole}


@FOREIGN
@given(data=st.data())
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                                  "added_tokens.json"])  # fmt: skip
def test_tokenizers(vocabulary, attempt, name, data):
    folder, whole = vocabulary
    small = {"pad_token": {"content": "!"}, "do_lower_case": True, "model_max_length": 77, "<cat>": 9}
    file = folder / name
    kept = file.read_bytes() if file.exists() else None
    try:
        file.write_text(json.dumps(data.draw(mutated(whole if name == "tokenizer.json" else small))))
        attempt(lambda: Tokenizer.from_file(folder, 12)(["a red circle"]))
    finally:
        file.unlink() if kept is None else file.write_bytes(kept)


@FOREIGN
@given(data=st.data())
@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "JPEG2000"])
def test_bytes_of_images(tmp_path_factory, attempt, name, data):
    """A header may claim any size: 8 x 70,000 pixels of JPEG 2000 among them."""
    buffer, path = io.BytesIO(), tmp_path_factory.getbasetemp() / "image"
    Image.new("RGB", (8, 8)).save(buffer, name)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.sampled_from([0, 1, 17, 127, 255]))
    if name == "JPEG2000" and data.draw(st.booleans()):
        struct.pack_into(">II", content, content.find(b"ihdr") + 4, 70_000, 8)
        struct.pack_into(">II", content, content.find(b"\xff\x51") + 6, 8, 70_000)
    path.write_bytes(content)
    attempt(read_image, path)
