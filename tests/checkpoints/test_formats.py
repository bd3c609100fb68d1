"""A format is one Format and its line in FORMATS: everything else works with one that nothing knows of."""

import json
import re

import pytest
import torch

from latentsmith.checkpoints import diffusers, formats, match, open_checkpoint, spec_of
from latentsmith.checkpoints.base import Contents, Dialect, Format, packed, renamed
from latentsmith.checkpoints.convert import convert
from latentsmith.checkpoints.inspect import inspect_checkpoint
from latentsmith.files.tensors import open_tensors, save_safetensors

PARTS = ("unet", "vae", "text_encoder")


def slashed(name):
    return name.replace("text_model.", "tower/") if name.startswith("text_model.") else name.replace(".", "/")


def by_level(names):
    return lambda keys: {slashed(ours): theirs for ours, theirs in names(k.replace("/", ".") for k in keys).items()}


LEVELS = {"unet": by_level(diffusers.unet_names), "vae": by_level(diffusers.vae_names), "text_encoder": None}
DIALECTS = {
    part: Dialect("toy", "slashed", lambda names: renamed({name: slashed(name) for name in names}), LEVELS[part])
    for part in PARTS
}


def recognise(part):
    return lambda entries, config: DIALECTS[part] if any("/" in key for key in entries) else None


def open_toy(path, weights):
    if path.suffix != ".toy":
        return None
    file = open_tensors(path)
    return Contents({None: file}, "toy", json.loads(file.metadata["toy"]))


def write_toy(parts, out, spec, *, dtype=None, written=None):
    tensors = {}
    for part, dialect in DIALECTS.items():
        tensors |= packed(parts[part], dialect, dtype, f"{part}@")
    unet, text = ({key: spec.config_of(part)[key] for key in keys} for part, keys in
                  (("unet", ["num_heads"]), ("text_encoder", ["heads", "activation"])))  # fmt: skip
    config = {"unet": unet, "text_encoder": text, "prediction": spec.prediction_type, "steps": spec.timesteps}
    save_safetensors(out, tensors, {"toy": json.dumps(config)}, written=written)


TOY = Format(
    name="toy",
    title="toy file",
    key_rules=[(part, f"{part}@") for part in PARTS],
    dialects={part: recognise(part) for part in PARTS},
    open=open_toy,
    sizes=lambda checkpoint, part: checkpoint.config.get(part.name) if checkpoint.format == "toy" else None,
    facts=lambda checkpoint: (
        {"prediction": (checkpoint.config["prediction"], "toy"), "timesteps": checkpoint.config["steps"]}
        if checkpoint.format == "toy"
        else {}
    ),
    write=write_toy,
    ending=".toy",
)


@pytest.fixture
def with_toy(monkeypatch):
    rules = [(part, re.compile(pattern)) for part, pattern in TOY.key_rules]
    monkeypatch.setattr(formats, "KEY_RULES", rules + formats.KEY_RULES)
    before = dict(formats.FORMATS)
    formats.FORMATS.clear()
    formats.FORMATS.update({"toy": TOY, **before})
    yield
    formats.FORMATS.clear()
    formats.FORMATS.update(before)


def test_a_new_format_is_converted_to_and_from_and_inspected(tmp_path, reference_folder, shapes, with_toy):
    convert(reference_folder, tmp_path / "m.toy", "toy", prediction_type="sample")
    convert(tmp_path / "m.toy", tmp_path / "back.safetensors", "ldm", verify=True)
    source, toy, back = (
        open_checkpoint(path) for path in (reference_folder, tmp_path / "m.toy", tmp_path / "back.safetensors")
    )
    assert toy.format == "toy" and spec_of(toy).prediction_type == spec_of(back).prediction_type == "sample"
    for part in PARTS:
        wanted, found = (match(checkpoint, part, shapes[part]) for checkpoint in (source, back))
        assert all(torch.equal(tensor.read(), found[name].read()) for name, tensor in wanted.items())
    lines = list(inspect_checkpoint(tmp_path / "m.toy"))
    assert lines[0].endswith("m.toy: toy file") and "prediction sample (toy)" in lines[1]
    assert all("slashed names" in line for line in lines[2:5]) and len(lines) == 5
