"""Checkpoints of every format with anything in their headers and configs: read, or refused in one line."""

import io
import json
import struct
import tarfile
import zipfile

import diffusers
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from latentsmith.checkpoints import architecture, open_checkpoint, spec_of
from latentsmith.checkpoints.base import SPEC_KEY
from latentsmith.checkpoints.convert import convert
from latentsmith.checkpoints.inspect import inspect_checkpoint
from latentsmith.checkpoints.load import network_shapes
from latentsmith.files.tensors import open_tensors

from ..checkpoints.conftest import tiny_model
from .conftest import mutated

FOREIGN = settings.get_profile("foreign")
FEWER = settings(FOREIGN, max_examples=max(1, FOREIGN.max_examples // 3))  # of what builds networks
HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
}


def read_all(path):
    file = open_tensors(path)
    return [file[name] for name in file]


def whole(path):
    """All that is done with a model before its weights are read."""
    list(inspect_checkpoint(path))
    checkpoint = open_checkpoint(path)
    architecture(checkpoint)
    spec = spec_of(checkpoint)
    spec.noise_schedule()
    return {part: network_shapes(part, spec.config_of(part)) for part in checkpoint.parts}


def safetensors_bytes(header):
    try:
        encoded = json.dumps(header).encode()
    except (ValueError, RecursionError):
        encoded = b"{}"
    return struct.pack("<Q", len(encoded)) + encoded + bytes(40)


@FOREIGN
@given(header=mutated(HEADER))
def test_safetensors_headers(tmp_path_factory, attempt, header):
    path = tmp_path_factory.getbasetemp() / "header.safetensors"
    path.write_bytes(safetensors_bytes(header))
    attempt(read_all, path)


@FOREIGN
@given(data=st.data())
def test_bytes_of_a_safetensors_file(tmp_path_factory, attempt, data):
    path, whole = tmp_path_factory.getbasetemp() / "bytes.safetensors", bytearray(safetensors_bytes(HEADER))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.integers(9, len(whole)))])
    attempt(read_all, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model as diffusers saves it."""
    folder, model = tmp_path_factory.mktemp("foreign") / "model", tiny_model(1)
    for part in ("unet", "vae", "text_encoder"):
        getattr(model, part).save_pretrained(folder / part)
    scheduler = diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, skip_prk_steps=True)
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return folder


FILES = ["unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"]


@FEWER
@given(data=st.data())
@pytest.mark.parametrize("name", FILES)
def test_configs_of_a_diffusers_folder(folder, attempt, name, data):
    file = folder / name
    kept = file.read_bytes()
    try:
        file.write_text(json.dumps(data.draw(mutated(json.loads(kept)))))
        attempt(whole, folder)
    finally:
        file.write_bytes(kept)


@pytest.fixture(scope="module")
def single(folder, tmp_path_factory):
    return {
        to: convert(folder, tmp_path_factory.mktemp(to) / name, to)
        for to, name in (("ldm", "m.safetensors"), ("nemo", "m.nemo"))
    }


@FEWER
@given(data=st.data())
def test_the_spec_in_our_own_metadata(single, attempt, data):
    path = single["ldm"].with_name("spec.safetensors")
    stored = single["ldm"].read_bytes()
    size = struct.unpack("<Q", stored[:8])[0]
    header = json.loads(stored[8 : 8 + size])
    spec = data.draw(mutated(json.loads(header["__metadata__"][SPEC_KEY])))
    header["__metadata__"][SPEC_KEY] = json.dumps(spec)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + stored[8 + size :])
    attempt(whole, path)


@FEWER
@given(data=st.data())
def test_the_config_of_a_nemo_archive(single, attempt, data):
    path = single["nemo"].with_name("config.nemo")
    with tarfile.open(single["nemo"]) as source, tarfile.open(path, "w") as target:
        for member in source:
            content = source.extractfile(member).read()
            if member.name.endswith(".yaml"):
                config = data.draw(mutated(yaml.safe_load(content)))
                content = yaml.safe_dump(config).encode("utf-8", "replace")
                member.size = len(content)
            target.addfile(member, io.BytesIO(content))
    attempt(whole, path)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    path = tmp_path_factory.mktemp("zip") / "m.ckpt"
    state = {f"model.diffusion_model.out.{i}.weight": torch.ones(2, 3) for i in range(3)}
    rest = {"epoch": 3, "hyper_parameters": {"cfg": {"a": [1, {"b": 2}]}, "d": (1, 2)}, "betas": torch.ones(3)}
    torch.save({"state_dict": state, **rest}, path)
    return path


@FOREIGN
@given(data=st.data())
def test_pickles_of_torch_files(ckpt, attempt, data):
    path = ckpt.with_name("mutated.ckpt")
    with zipfile.ZipFile(ckpt) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            content = bytearray(source.read(name))
            if name.endswith("data.pkl"):
                for _ in range(data.draw(st.integers(1, 3))):
                    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
            target.writestr(name, bytes(content))
    attempt(read_all, path)
    attempt(open_checkpoint, path)


@FOREIGN
@given(index=mutated({"metadata": {"total_size": 4}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
def test_indexes_of_shards(tmp_path_factory, attempt, index):
    path = tmp_path_factory.getbasetemp() / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    for number in (1, 2):
        path.with_name(f"{number}.safetensors").write_bytes(safetensors_bytes(HEADER))
    attempt(read_all, path)
