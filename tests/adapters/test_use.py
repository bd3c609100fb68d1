"""Adapters on a pipeline and on the command line: weights, tags, PNGs, and the base afterwards."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from latentsmith.adapters import AdapterSpec, adapter_state, adapters_of, inject
from latentsmith.adapters.inject import changed_weight
from latentsmith.adapters.kohya import named
from latentsmith.cli import main
from latentsmith.files.errors import BadInput
from latentsmith.inference.png import read_metadata

OPTIONS = dict(num_inference_steps=3, height=16, width=16, output_type="pt")


@pytest.fixture
def model(models):
    return models[1]


def style(model, path, scheme="lora", seed=0, parts=("unet", "text_encoder"), **options):
    """Write a kohya file of random adapters."""
    pipeline, states = model.pipeline(), {}
    torch.manual_seed(seed)
    for part in parts:
        inject(getattr(pipeline, part), AdapterSpec(scheme=scheme, rank=2, targets="conv", **options))
        for _, adapter in adapters_of(getattr(pipeline, part)):
            for tensor in adapter.tensors.values():
                tensor.data += 0.2 * torch.randn(tensor.shape)
        states[part] = adapter_state(getattr(pipeline, part))
    save_file({key: tensor.contiguous() for key, tensor in named(states, model.layers).items()}, path)
    return path


def images(pipeline, prompt="a red circle", **options):
    return pipeline(prompt, **(OPTIONS | options)).images


@pytest.mark.parametrize("scheme", ["lora", "dora", "loha", "lokr", "oft"])
def test_weights_change_without_reloading_and_the_base_comes_back(model, tmp_path, scheme):
    path, pipeline = style(model, tmp_path / "style.safetensors", scheme), model.pipeline()
    base = images(pipeline)
    assert pipeline.load_lora(path) == "style"
    whole = images(pipeline)
    assert (whole - base).abs().max() > 1e-3
    pipeline.set_lora_weight("style", 0)
    assert torch.equal(images(pipeline), base)
    pipeline.set_lora_weight("style", 1)
    assert torch.equal(images(pipeline), whole)
    pipeline.unload_lora("style")
    assert torch.equal(images(pipeline), base)
    assert all("Adapted" not in type(module).__name__ for module in pipeline.unet.modules())


@pytest.mark.parametrize("scheme", ["lora", "dora", "loha", "lokr", "oft"])
def test_merged_equals_unmerged(model, tmp_path, scheme, inputs):
    pipeline, merged = model.pipeline(), model.pipeline()
    pipeline.load_lora(style(model, tmp_path / "style.safetensors", scheme), 0.7)
    for part in ("unet", "text_encoder"):
        for path, adapter in adapters_of(getattr(pipeline, part), "lora_0"):
            layer = getattr(merged, part).get_submodule(path)
            layer.weight.data = changed_weight(layer, [adapter])
    with torch.no_grad():
        torch.testing.assert_close(pipeline.unet(*inputs), merged.unet(*inputs), atol=1e-5, rtol=1e-5)
        tokens = torch.arange(20)[None] + 300
        torch.testing.assert_close(pipeline.text_encoder(tokens), merged.text_encoder(tokens), atol=1e-5, rtol=1e-5)


def test_several_at_once_and_separate_weights(model, tmp_path):
    one = style(model, tmp_path / "one.safetensors", seed=1)
    two = style(model, tmp_path / "two.safetensors", "loha", seed=2)
    pipeline = model.pipeline()
    pipeline.load_lora(one, 0.5)
    pipeline.load_lora(two, 0.25, "other", text_encoder_weight=0)
    both = images(pipeline)
    pipeline.unload_lora("one")
    alone = images(pipeline)
    assert not torch.equal(both, alone)
    pipeline.load_lora(one, 0.5)
    torch.testing.assert_close(images(pipeline), both, atol=1e-5, rtol=0)


def test_tags_weigh_adapters_for_their_image_alone(model, tmp_path):
    pipeline = model.pipeline()
    pipeline.load_lora(style(model, tmp_path / "one.safetensors", seed=1), 0)
    pipeline.load_lora(style(model, tmp_path / "two.safetensors", seed=2), 0.5)
    expected = [images(pipeline)[0]]
    pipeline.set_lora_weight("one", 0.75)
    expected.append(images(pipeline)[0])
    pipeline.set_lora_weight("one", 0.8, text_encoder_weight=0.3)
    pipeline.set_lora_weight("two", 0)
    expected.append(images(pipeline)[0])
    pipeline.set_lora_weight("one", 0)
    pipeline.set_lora_weight("two", 0.5)
    prompts = [
        "a red circle",
        "a red circle<lora:one:0.5><lora:one:0.25>",
        "a red circle<lora:one:0.3:0.8><lora:two:0>",
    ]
    made = images(pipeline, prompts, prompt_syntax="webui", seed=[0, 0, 0], negative_prompt=[None] * 3)
    for found, wanted in zip(made, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert all((a - b).abs().max() > 1e-4 for a, b in pairwise(expected))
    assert torch.equal(images(pipeline)[0], expected[0])


def test_clip_skip_ends_the_text_encoder_earlier(model):
    pipeline = model.pipeline()
    base = images(pipeline)
    assert torch.equal(images(pipeline, clip_skip=1), base)
    skipped = images(pipeline, clip_skip=2)
    assert not torch.equal(skipped, base)
    layers = pipeline.text_encoder.text_model.encoder.layers
    del layers[-1]
    torch.testing.assert_close(images(pipeline), skipped, atol=1e-6, rtol=0)
    with pytest.raises(BadInput, match="clip_skip is 2; this text encoder has 1 layers"):
        images(pipeline, clip_skip=2)


def test_embeddings_in_prompts(model, tmp_path):
    pipeline = model.pipeline()
    row = pipeline.text_encoder.text_model.embeddings.token_embedding.weight[pipeline.tokenizer.encode("red")]
    save_file({"emb_params": row.detach().clone()}, tmp_path / "<toy>.safetensors")
    assert pipeline.load_embedding(tmp_path / "<toy>.safetensors") == "<toy>"
    assert torch.equal(images(pipeline, "a <toy> circle"), images(pipeline, "a red circle"))
    assert pipeline.load_embedding(tmp_path / "<toy>.safetensors", token="<two>") == "<two>"
    pipeline.unload_embedding("<toy>")
    assert torch.equal(images(pipeline, "a <two> circle"), images(pipeline, "a red circle"))


def test_embeddings_bundled_with_an_adapter(model, tmp_path):
    path, pipeline = style(model, tmp_path / "style.safetensors"), model.pipeline()
    tensors = load_file(path) | {"bundle_emb.toy.string_to_param.*": torch.ones(2, 24)}
    save_file(tensors, path)
    pipeline.load_lora(path)
    assert len(pipeline.tokenizer.encode("toy")) == 2 and max(pipeline.tokenizer.encode("toy")) == 521
    pipeline.unload_lora("style")
    assert not pipeline.tokenizer.added


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda p, f: p.load_lora(f, name="style"), "a LoRA 'style' is loaded already"),
        (lambda p, f: p.load_lora(f, float("nan"), "x"), "weight of LoRA 'x' is nan"),
        (lambda p, f: p.set_lora_weight("none", 1), "no LoRA 'none' is loaded; those are style"),
        (lambda p, f: p.unload_lora("none"), "no LoRA 'none' is loaded"),
        (lambda p, f: images(p, "<lora:none>", prompt_syntax="webui"), "<lora:none>: no LoRA of that name is loaded"),
        (lambda p, f: images(p, "<lora:style:x>", prompt_syntax="webui"), "give <lora:name:weight>"),
        (lambda p, f: images(p, "<lora:style:1:2:8>", prompt_syntax="webui"), "give <lora:name:weight>"),
        (lambda p, f: p.encode_prompt("<lora:style:1>", prompt_syntax="webui"), "call set_lora_weight instead"),
        (lambda p, f: p.unload_embedding("x"), "token 'x' was not added"),
    ],
)
def test_what_cannot_be_is_one_line(model, tmp_path, act, message):
    path, pipeline = style(model, tmp_path / "style.safetensors"), model.pipeline()
    pipeline.load_lora(path)
    with pytest.raises(BadInput) as caught:
        act(pipeline, path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def generate(model, *words):
    return main(["generate", str(model.folder), "--steps", "3", "--size", "16x16", "--device", "cpu", *map(str, words)])


def test_the_command_records_files_and_weights_and_again_needs_the_same(model, tmp_path, capsys):
    path = style(model, tmp_path / "style.safetensors")
    save_file({"<toy>": torch.ones(1, 24)}, tmp_path / "toy.safetensors")
    words = [
        "a red <toy>",
        "--out",
        tmp_path / "out",
        "--lora",
        f"{path}:0.5",
        "--embedding",
        tmp_path / "toy.safetensors",
    ]
    assert generate(model, *words) == 0
    (made,) = (tmp_path / "out").glob("*.png")
    metadata = read_metadata(made)
    assert metadata["loras"][0]["weight"] == 0.5 and len(metadata["loras"][0]["hash"]) == 64
    assert metadata["embeddings"][0]["token"] == "<toy>"
    with Image.open(made) as image:
        assert image.info["parameters"].startswith("a red <toy> <lora:style:0.5>\n")
    again = ["generate", "--again", str(made), "--out", str(tmp_path / "again")]
    assert main(again) == 0 and "the same, pixel for pixel" in capsys.readouterr().out
    moved = path.rename(tmp_path / "moved.safetensors")
    assert main(again) == 2 and "style.safetensors, which is not there; give --lora FILE" in capsys.readouterr().err
    assert main([*again, "--lora", str(moved)]) == 0
    style(model, path, seed=9)
    assert main(again) == 2 and "which is another file now" in capsys.readouterr().err


def test_tags_load_from_a_folder(model, tmp_path, capsys):
    (tmp_path / "loras").mkdir()
    path = style(model, tmp_path / "loras" / "style.safetensors")
    by_tag = ["a red circle<lora:style:0.5>", "--prompt-syntax", "webui", "--lora-folder", path.parent]
    for words in (["a red circle", "--lora", f"{path}:0.5"], by_tag):
        assert generate(model, *words, "--out", tmp_path / "out") == 0
    first, second = (np.asarray(Image.open(each)) for each in sorted((tmp_path / "out").glob("*.png")))
    assert (first == second).all()
    wrong = ["<lora:none>", "--prompt-syntax", "webui", "--lora-folder", path.parent, "--out", tmp_path / "x"]
    assert generate(model, *wrong) == 2 and "no none.safetensors in" in capsys.readouterr().err
    assert generate(model, "a", "--lora-folder", path.parent) == 2
    assert "--prompt-syntax webui reads" in capsys.readouterr().err
    assert generate(model, "a", "--lora", "nowhere.safetensors:0.5", "--out", tmp_path / "x") == 2
    assert "nowhere.safetensors: no such file" in capsys.readouterr().err
    assert generate(model, "a", "--lora", "nowhere.safetensors:much", "--out", tmp_path / "x") == 2
    assert "give FILE or FILE:WEIGHT" in capsys.readouterr().err
