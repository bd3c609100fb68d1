"""Adapters written for other programs: diffusers with peft makes the same images; kohya's hashes; merges; SVD."""

import hashlib
import json
import struct

import diffusers
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentsmith import Pipeline
from latentsmith.adapters import AdapterSpec, adapter_state, adapters_of, inject
from latentsmith.adapters.convert import convert_adapter, extract, is_adapter, merge
from latentsmith.adapters.file import Header
from latentsmith.adapters.inspect import inspect_adapter, verify_adapter
from latentsmith.adapters.kohya import hashes
from latentsmith.adapters.read import read_adapter
from latentsmith.adapters.write import save_adapter
from latentsmith.cli import main
from latentsmith.files.errors import BadInput


def trained(model, path, to="kohya", scheme="lora", **options):
    """Write random adapters of U-Net and text encoder, ranks and alphas unequal, as a training would."""
    pipeline, states = model.pipeline(), {}
    torch.manual_seed(3)
    for part in ("unet", "text_encoder"):
        spec = AdapterSpec(
            scheme=scheme, rank=4, alpha=2, **{"conv_rank": 2, "conv_alpha": 1.5, "targets": "conv"} | options
        )
        inject(getattr(pipeline, part), spec)
        for _, adapter in adapters_of(getattr(pipeline, part)):
            for name, tensor in adapter.tensors.items():
                tensor.data += (0.3 if name == "dora_scale" else 0.2) * torch.randn(tensor.shape)
        states[part] = adapter_state(getattr(pipeline, part))
    header = Header(name="style", scheme=scheme, rank=4, alpha=2, base="SD1", trigger_words=("sks", "dog"))
    return save_adapter(path, states, model.layers, header, to)


@pytest.mark.parametrize("scheme", ["lora", "locon", "dora"])
def test_diffusers_and_peft_make_the_same_image_of_what_is_written(model, tmp_path, scheme):
    """10 DDIM steps: latents to 1e-4, images to 1 of 255; through `convert` from kohya's format."""
    options = {} if scheme == "locon" else {"targets": "transformer"}
    kohya = trained(model, tmp_path / "a.safetensors", scheme="lora" if scheme == "locon" else scheme, **options)
    folder = tmp_path / "theirs"
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(model.folder, safety_checker=None)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config, clip_sample=False)
    theirs.set_progress_bar_config(disable=True)
    ours = model.pipeline()
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    keywords = dict(num_inference_steps=10, height=16, width=16, latents=latents)

    def made(output_type):
        one = ours("a red circle", sampler="ddim", output_type=output_type, **keywords).images[0]
        return one, theirs("a red circle", output_type=output_type, **keywords).images[0]

    before, _ = made("latent")
    ours.load_lora(kohya)
    convert_adapter(kohya, folder, "diffusers", model=model.folder)
    theirs.load_lora_weights(str(folder))
    with torch.no_grad():
        found, expected = made("latent")
        assert (found - before).abs().max() > 0.05
        torch.testing.assert_close(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
        found, expected = (np.asarray(image, dtype=int) for image in made("pil"))
    assert abs(found - expected).max() <= 1


@pytest.mark.parametrize("scheme", ["lora", "dora"])
def test_there_and_back_is_the_same_adapter(model, tmp_path, scheme):
    """Unequal ranks and alphas survive, which diffusers' own converter loses."""
    kohya = trained(model, tmp_path / "a.safetensors", scheme=scheme)
    theirs = convert_adapter(kohya, tmp_path / "b.safetensors", "diffusers", model=model.folder)
    back = convert_adapter(theirs, tmp_path / "c.safetensors", "kohya", model=model.folder)
    first, last = load_file(kohya), load_file(back)
    assert first.keys() == last.keys() and all(torch.equal(first[key], last[key]) for key in first)


@pytest.mark.parametrize("scheme", ["loha", "lokr", "oft"])
def test_diffusers_gets_no_scheme_that_it_does_not_load(model, tmp_path, scheme):
    kohya = trained(model, tmp_path / "a.safetensors", scheme=scheme)
    with pytest.raises(BadInput, match="diffusers loads LoRA and DoRA alone"):
        convert_adapter(kohya, tmp_path / "b", "diffusers", model=model.folder)
    assert not (tmp_path / "b").exists()
    half = convert_adapter(kohya, tmp_path / "c.safetensors", "kohya", model=model.folder, dtype="fp16")
    assert {tensor.dtype for tensor in load_file(half).values()} == {torch.float16}


def test_metadata_and_hashes_are_kohyas(models, tmp_path):
    path = trained(models[1], tmp_path / "a.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert metadata["sshs_model_hash"] == hashlib.sha256(data[8 + length :]).hexdigest()
    assert metadata["sshs_legacy_hash"] == "e3b0c442"  # of nothing: below 1 MiB
    assert metadata["ss_network_module"] == "networks.lora" and metadata["ss_base_model_version"] == "sd_v1"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2")
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.trigger_phrase"] == "sks, dog"
    big = {"a": torch.randn(300_000), "b": torch.randn(10).half()}
    own = {"ss_v2": "False", "ss_output_name": "é"}
    save_file(big, tmp_path / "big.safetensors", own)
    expected = hashlib.sha256((tmp_path / "big.safetensors").read_bytes()[0x100000:0x110000]).hexdigest()[:8]
    assert hashes(big, own)["sshs_legacy_hash"] == expected


def test_a_merged_model_makes_what_the_adapters_make(model, tmp_path):
    one = trained(model, tmp_path / "one.safetensors", scheme="dora")
    two = trained(model, tmp_path / "two.safetensors", scheme="lokr")
    merge(model.folder, tmp_path / "merged", [(one, 0.7), (two, 0.4)], verify=True)
    merged, ours = Pipeline.from_pretrained(tmp_path / "merged", device="cpu"), model.pipeline()
    ours.load_lora(one, 0.7)
    ours.load_lora(two, 0.4)
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24)
    with torch.no_grad():
        found, expected = (p.unet(latents, torch.tensor([9]), text) for p in (merged, ours))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        tokens = torch.arange(10)[None]
        torch.testing.assert_close(merged.text_encoder(tokens), ours.text_encoder(tokens), atol=1e-5, rtol=1e-5)


def test_what_a_lora_has_changed_is_extracted_again(model, tmp_path, capsys):
    lora = trained(model, tmp_path / "a.safetensors")
    merge(model.folder, tmp_path / "merged", [(lora, 1.0)])
    out = extract(tmp_path / "merged", model.folder, tmp_path / "b.safetensors", rank=4)
    assert "0.00% of their change is left out" in capsys.readouterr().out
    first, second = (read_adapter(path, model.layers) for path in (lora, out))
    assert first.layers == second.layers
    ours, theirs = model.pipeline(), model.pipeline()
    ours.load_lora(lora)
    theirs.load_lora(out)
    for part in ("unet", "text_encoder"):
        pairs = zip(
            adapters_of(getattr(ours, part), "lora_0"), adapters_of(getattr(theirs, part), "lora_0"), strict=True
        )
        for (path, a), (_, b) in pairs:
            weight = getattr(ours, part).get_submodule(path).weight
            torch.testing.assert_close(a.change(weight), b.change(weight), atol=2e-5, rtol=0)
    extract(tmp_path / "merged", model.folder, tmp_path / "c.safetensors", rank=1, targets="attention")
    said = capsys.readouterr().out
    assert "of the whole change (norm) lies in weights" in said and "0.00% of their" not in said
    with pytest.raises(BadInput, match="does not differ"):
        extract(model.folder, model.folder, tmp_path / "d.safetensors")


def test_inspect_says_what_an_adapter_is(models, tmp_path, capsys):
    path = trained(models[1], tmp_path / "a.safetensors")
    lines = "\n".join(inspect_adapter(path, models[1].folder))
    for expected in ("kohya / LyCORIS names", "lora, rank 4", "2 (", "alpha 2", "Stable Diffusion 1", "attention",
                     "trigger   sks, dog", "ss_network_dim: 4"):  # fmt: skip
        assert expected in lines, lines
    assert main(["inspect", str(path), "--model", str(models[1].folder), "--verify"]) == 0
    assert "verified:" in capsys.readouterr().out
    tensors = load_file(path)
    tensors[min(key for key in tensors if "lora_up" in key)][0] = float("inf")
    save_file(tensors, path)
    assert verify_adapter(path, models[1].folder)[1]
    assert is_adapter(path) and not is_adapter(models[1].folder)


def test_the_command_converts_merges_and_extracts(models, tmp_path, capsys):
    model = models[1]
    path, folder = str(trained(model, tmp_path / "a.safetensors")), str(model.folder)
    out = [str(tmp_path / name) for name in ("b", "merged", "c.safetensors")]
    assert main(["convert", path, out[0], "--to", "diffusers", "--model", folder]) == 0
    assert json.loads((tmp_path / "b").is_dir() and "true")
    assert main(["convert", folder, out[1], "--lora", f"{path}:0.5"]) == 0
    assert main(["convert", out[1], out[2], "--difference", folder, "--rank", "4"]) == 0
    said = capsys.readouterr().out
    assert "merged" in said and "rank 4" in said
    for words, message in (
        (["convert", path, out[2], "--model", folder], "exists already"),
        (["convert", path, str(tmp_path / "x"), "--model", folder], "its name ends in .safetensors"),
        (["convert", path, str(tmp_path / "x"), "--to", "nemo", "--model", folder], "kohya or diffusers, not 'nemo'"),
        (["convert", folder, str(tmp_path / "x")], "--to is missing"),
        (["convert", folder, str(tmp_path / "x"), "--lora", "none.safetensors"], "none.safetensors: no such file"),
        (["convert", path, str(tmp_path / "x.safetensors")], "is of no layer of this model"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
