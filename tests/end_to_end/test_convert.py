"""A tiny model of diffusers' own classes goes through `convert` in every direction; diffusers and safetensors judge."""

import json
import os
import re
import shutil
from dataclasses import replace

import diffusers
import pytest
import safetensors.torch
import torch
import transformers

import latentsmith
from latentsmith.checkpoints import formats, match, open_checkpoint, spec_of
from latentsmith.checkpoints.convert import convert
from latentsmith.checkpoints.load import network_shapes
from latentsmith.cli import main
from latentsmith.files.errors import BadInput
from latentsmith.files.lock import locked_folder
from latentsmith.text.tokenizer import train_vocabulary

PARTS = ("unet", "vae", "text_encoder")
ENDING = {"diffusers": "folder", "ldm": "model.safetensors", "nemo": "model.nemo"}


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=2, sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64), layers_per_block=1, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=520,
        max_position_embeddings=16,
    ))  # fmt: skip
    return {"unet": unet, "vae": vae, "text_encoder": text}


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory):
    """The model as the libraries save it, with a small tokenizer."""
    folder = tmp_path_factory.mktemp("source")
    for name, network in tiny.items():
        network.save_pretrained(folder / name)
    diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012).save_pretrained(folder / "scheduler")
    train_vocabulary(["a red circle", "a blue circle"], 518, folder / "tokenizer")
    return folder


def weights(path):
    """Canonical names to tensors, of all parts."""
    checkpoint = open_checkpoint(path)
    spec = spec_of(checkpoint)
    configs = dict(zip(PARTS, (spec.unet_config, spec.first_stage_config, spec.cond_stage_config), strict=True))
    return {
        f"{part} {name}": tensor.read()
        for part, config in configs.items()
        for name, tensor in match(checkpoint, part, network_shapes(part, config)).items()
    }


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("first", ["ldm", "nemo"])
def test_there_and_back_is_bit_exact(tmp_path, source, tiny, first, capsys):
    """The way back has no tokenizer of its own: a .nemo or an LDM file holds none."""
    convert(source, tmp_path / ENDING[first], first, verify=True)
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if not line.startswith("note: ")]
    padding = "note: other programs do not know of text without NeMo's three zero vectors (NeMo adds them)"
    assert (padding in printed) == (first == "nemo")
    assert "epsilon, " in lines[0] and "float32" in lines[0]
    assert [line.split(":")[0] for line in lines[1:]] == [*PARTS, "schedule", *PARTS]
    assert all(re.search(r"tensors, largest difference 0$", line) for line in lines[1:4])
    same_output = r"largest difference of its output 0, where the largest value is [0-9.]*[1-9]"
    assert all(re.search(same_output, line) for line in lines[5:])
    convert(tmp_path / ENDING[first], tmp_path / "back", "diffusers", tokenizer=source / "tokenizer")
    stems = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    for name, stem in stems.items():
        written = safetensors.torch.load_file(tmp_path / "back" / name / f"{stem}.safetensors")
        named = {key.removeprefix("text_model."): tensor for key, tensor in written.items()}  # memory lacks the prefix
        assert same(named, tiny[name].state_dict())


def test_a_folder_that_diffusers_opens_with_its_tokenizer(tmp_path, source, tiny, capsys):
    assert convert(source, tmp_path / "out", "diffusers") == tmp_path / "out"
    line = capsys.readouterr().out.splitlines()[0]
    total = sum(parameter.numel() for network in tiny.values() for parameter in network.parameters())
    assert line.startswith(f"{tmp_path / 'out'}: diffusers folder, {total:,} parameters, float32, epsilon, ")
    for file in (source / "tokenizer").iterdir():
        assert (tmp_path / "out" / "tokenizer" / file.name).read_bytes() == file.read_bytes()
    opened = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False)
    ids = opened.tokenizer("a red circle", padding="max_length", max_length=16).input_ids
    assert ids == latentsmith.Pipeline.from_pretrained(source).tokenizer(["a red circle"])[0].tolist()
    for name in PARTS:
        assert same(getattr(opened, name).state_dict(), tiny[name].state_dict())


def test_half_precision_is_rounded_once_and_measured(tmp_path, source, capsys):
    convert(source, tmp_path / "half.safetensors", "ldm", dtype="fp16", verify=True)
    before, after = weights(source), weights(tmp_path / "half.safetensors")
    assert all(torch.equal(after[name], before[name].half()) for name in before)
    lines = capsys.readouterr().out.splitlines()
    assert "float16" in lines[0]
    for part, tensors, outputs in zip(PARTS, lines[1:4], lines[5:], strict=True):
        worst = max(
            (before[name] - after[name].float()).abs().max().item() for name in before if name.startswith(f"{part} ")
        )
        assert worst > 0 and f"largest difference {worst:.3g} (" in tensors
        output, scale = re.search(r"of its output (\S+), where the largest value is (\S+)", outputs).groups()
        assert 0 < float(output) < 0.01 * float(scale)


def test_what_half_precision_cannot_hold(tmp_path, source, capsys):
    shutil.copytree(source, tmp_path / "large")
    file = tmp_path / "large" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights["conv_in.bias"][:2] = torch.tensor([1e-9, -1e-9])
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    convert(tmp_path / "large", tmp_path / "small.nemo", "nemo", dtype="fp16")
    assert re.search(r"float16, .* MiB, [2-9] numbers became 0$", capsys.readouterr().out.splitlines()[0])
    weights["conv_in.bias"][3] = -7e4
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    for format, name in ENDING.items():
        with pytest.raises(BadInput, match=r"input_blocks\.0\.0\.bias holds -70000, above 65504, the largest float16"):
            convert(tmp_path / "large", tmp_path / name, format, dtype="fp16")
        assert not (tmp_path / name).exists()
    convert(tmp_path / "large", tmp_path / "m.safetensors", "ldm", dtype="bf16", verify=True)


def test_prediction_type_is_taken_from_the_caller(tmp_path, source):
    convert(source, tmp_path / "v", "diffusers", prediction_type="v")
    scheduler = json.loads((tmp_path / "v" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    with pytest.raises(BadInput, match="prediction_type 'velocity' is not one of"):
        convert(source, tmp_path / "w", "diffusers", prediction_type="velocity")
    assert not (tmp_path / "w").exists()


def test_no_folder_without_a_tokenizer_that_fits(tmp_path, source, monkeypatch):
    convert(source, tmp_path / "m.nemo", "nemo")
    train_vocabulary(["many different words, none of them shorter than those before"], 560, tmp_path / "words")
    monkeypatch.setenv("LATENTSMITH_CLIP_VOCAB", str(tmp_path / "words"))
    with pytest.raises(BadInput, match="words: a tokenizer of 550 tokens, the text encoder has 520; give the model"):
        convert(tmp_path / "m.nemo", tmp_path / "out", "diffusers")
    monkeypatch.delenv("LATENTSMITH_CLIP_VOCAB")
    monkeypatch.setattr("latentsmith.text.vocabulary._open_clip_file", lambda: None)
    monkeypatch.setattr("latentsmith.text.vocabulary._in_hub_cache", lambda name: None)
    with pytest.raises(BadInput, match="CLIP's vocabulary is not on this machine: `pip install"):
        convert(tmp_path / "m.nemo", tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path, source):
    (tmp_path / "mine.safetensors").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name, to in (("mine.safetensors", "ldm"), ("empty", "diffusers")):
        with pytest.raises(BadInput, match="exists already, and nothing is overwritten"):
            convert(source, tmp_path / name, to)
    assert (tmp_path / "mine.safetensors").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("m.ckpt", {"to": "ldm"}, "ldm is one file, and its name ends in .safetensors"),
        ("m", {"to": "nemo"}, "nemo is one file, and its name ends in .nemo"),
        ("m", {"to": "onnx"}, "format 'onnx' is not one of diffusers, ldm, nemo"),
        ("m", {"to": "diffusers", "dtype": "int8"}, "dtype int8 is not one of fp32, fp16, bf16"),
        ("m", {"to": "diffusers", "weights": "best"}, 'weights=\'best\': must be "ema" or "raw"'),
    ],
)
def test_bad_options(tmp_path, source, name, options, message):
    with pytest.raises(BadInput) as caught:
        convert(source, tmp_path / name, **options)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_part_is_not_a_whole_model(tmp_path, source):
    with pytest.raises(BadInput, match="a whole model was expected"):
        convert(source / "unet", tmp_path / "m.safetensors", "ldm")


def test_verify_finds_a_changed_tensor(tmp_path, source, monkeypatch, capsys):
    """A disk that lies: one byte of the result changes between writing and comparing."""
    ldm = formats.FORMATS["ldm"]

    def lying(parts, out, *args, **kwargs):
        ldm.write(parts, out, *args, **kwargs)
        data = bytearray(out.read_bytes())
        data[len(data) // 2] ^= 1
        out.write_bytes(data)

    monkeypatch.setitem(formats.FORMATS, "ldm", replace(ldm, write=lying))
    arguments = ["convert", str(source), str(tmp_path / "m.safetensors"), "--to", "ldm", "--verify"]
    assert main(arguments) == 1
    assert "is not what was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("to", "apart"),
    [("ldm", 1), ("nemo", 1), ("diffusers", 9), pytest.param("diffusers", 1, marks=pytest.mark.slow)],
)
def test_killed_before_its_writes_a_conversion_leaves_nothing(tmp_path, source, killed_at_write, to, apart):
    """Each start clears what the one before left, and only the last of them leaves a file: the whole one."""
    out = tmp_path / "out" / ENDING[to]
    number = 1
    while killed_at_write(lambda: convert(source, out, to), number):
        left = [path for path in out.parent.glob("*") if not path.name.endswith(".lock")]
        assert len(left) <= 1
        shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)  # killed after the rename: it is whole
        number += apart
    assert number > 5 and [path.name for path in out.parent.iterdir()] == [out.name]
    assert same(weights(out), weights(source))


def test_another_conversion_to_the_same_name_is_refused(tmp_path, source):
    with locked_folder(tmp_path, name=".m.safetensors.lock"), pytest.raises(BadInput, match=r"m.safetensors: process"):
        convert(source, tmp_path / "m.safetensors", "ldm")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["diffusers", "ldm", "nemo"])
def test_every_file_is_synced_before_it_has_its_name(tmp_path, source, monkeypatch, to):
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino) or fsync(descriptor))
    out = convert(source, tmp_path / ENDING[to], to)
    written = [out, *out.rglob("*")]
    assert [path.name for path in written if path.stat().st_ino not in synced] == []
    assert tmp_path.stat().st_ino in synced
