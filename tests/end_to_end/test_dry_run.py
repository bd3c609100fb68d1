"""`train --dry-run`: every preset at its full size, built without memory, on files that hold only their headers."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentsmith import AutoencoderKL, ClipTextEncoder, UNetModel, load_config
from latentsmith.cli import main
from latentsmith.config.compose import presets
from latentsmith.config.network_arguments import network_arguments
from latentsmith.cpu import products
from latentsmith.training.dry_run import unet_forward


def hollow(path, network):
    """A safetensors file of a network's names and shapes whose data is a hole in the file."""
    header, at = {}, 0
    for name, tensor in network.state_dict().items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, at + 4 * tensor.numel()]}
        at += 4 * tensor.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (768, 768, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.jpg")
        (root / f"{number}.txt").write_text("noise")
    assert main(["data", "import", str(root), str(root / "shards")]) == 0
    return root / "shards"


@pytest.mark.parametrize("name", [name for name in presets() if name.startswith("sd")])
def test_presets_at_full_size(name, images, tmp_path, capsys, monkeypatch):
    config = load_config(name)
    with torch.device("meta"):
        files = {
            "first_stage_config": hollow(
                tmp_path / "vae.safetensors", AutoencoderKL(**network_arguments(config.model.first_stage_config))
            ),
            "cond_stage_config": hollow(
                tmp_path / "text.safetensors", ClipTextEncoder(**network_arguments(config.model.cond_stage_config))
            ),
        }
        if not name.endswith(("sd1", "base", "v")):
            files["unet_config"] = hollow(
                tmp_path / "unet.safetensors", UNetModel(**network_arguments(config.model.unet_config))
            )
    given = [f"model.{key}.from_pretrained={file}" for key, file in files.items()]
    given += [f"model.data.train.dataset_path={images}", "trainer.accelerator=cpu", f"exp_manager.exp_dir={tmp_path}"]
    monkeypatch.setattr("latentsmith.training.dry_run.build_tokenizer", lambda config: None)
    assert main(["train", "--config", name, "--dry-run", *given]) == 0
    lines = capsys.readouterr().out.splitlines()
    size = {"sd1": 859_520_964}.get(name.split("_")[0], 865_910_724)
    adapters = {"sd1_lora": 16 * 423_936, "sd2_lora": 16 * 432_128}.get(name, 0)
    trained = f"{adapters:,} of them trained" if adapters else "trained"
    if name.endswith("textual_inversion"):
        trained = "frozen"
        assert "text_encoder: 123,061,248 parameters, 768 of them trained" in lines
    assert f"unet: {size + adapters:,} parameters, {trained}" in lines
    assert "vae: 83,653,863 parameters, frozen" in lines
    assert any(line.startswith("memory of a process, about: ") for line in lines)
    assert not (tmp_path / name).exists()


DOCUMENTED = sorted((Path(__file__).parents[1] / "config" / "yaml").glob("*.yaml"))


@pytest.mark.parametrize("path", DOCUMENTED, ids=lambda path: path.stem)
def test_documented_files_at_full_size(path, images, tmp_path, capsys, monkeypatch):
    """NeMo's and LDM's own files, but for where things lie and the machine."""
    machine = ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.num_nodes=1", "trainer.precision=bf16"]
    machine += ["trainer.max_steps=10", "model.inductor=False"]
    machine += ["model.micro_batch_size=1", "model.global_batch_size=1"]
    if path.stem.startswith("ldm"):
        machine.append("model.data.train.augmentations={resize_smallest_side: 512, center_crop_h_w: [512, 512]}")
    config = load_config(path, machine)
    with torch.device("meta"):
        parts = {
            "first_stage_config": AutoencoderKL(**network_arguments(config.model.first_stage_config)),
            "cond_stage_config": ClipTextEncoder(**network_arguments(config.model.cond_stage_config)),
        }
    given = [
        f"model.{key}.from_pretrained={hollow(tmp_path / f'{key}.safetensors', part)}" for key, part in parts.items()
    ]
    given += [f"model.data.train.dataset_path={images}", "model.data.webdataset.local_root_path=null",
              "model.unet_config.from_pretrained=null", f"exp_manager.exp_dir={tmp_path}"]  # fmt: skip
    monkeypatch.setattr("latentsmith.training.dry_run.build_tokenizer", lambda config: None)
    assert main(["train", "--config", str(path), "--dry-run", *machine, *given]) == 0
    printed = capsys.readouterr().out
    assert any(f"unet: {size} parameters, trained" in printed for size in ("859,520,964", "865,910,724")), printed


def test_presets_of_the_demo(images, tmp_path, capsys, monkeypatch):
    given = [f"model.data.train.dataset_path={images}", "trainer.accelerator=cpu", f"exp_manager.exp_dir={tmp_path}"]
    assert main(["train-vae", "--config", "demo_vae", "--dry-run", *given]) == 0
    raw = ["model.first_stage_key=images", "model.cond_stage_key=captions"]
    assert main(["train", "--config", "demo", "--dry-run", *raw, *given]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("vae: ")] == ["vae: 681,911 parameters, trained",
                                                                    "vae: 681,911 parameters, frozen"]  # fmt: skip
    assert not (tmp_path / "demo").exists() and not (tmp_path / "demo_vae").exists()


def test_a_file_that_does_not_fit_is_found(images, tmp_path, capsys):
    config = load_config("sd1")
    with torch.device("meta"):
        vae = hollow(tmp_path / "vae.safetensors", AutoencoderKL(**network_arguments(config.model.first_stage_config)))
        text = hollow(tmp_path / "text.safetensors", ClipTextEncoder(arch="ViT-H-14", layer="penultimate"))
    given = [f"model.first_stage_config.from_pretrained={vae}", f"model.cond_stage_config.from_pretrained={text}"]
    given += [f"model.data.train.dataset_path={images}", "trainer.accelerator=cpu"]
    assert main(["train", "--config", "sd1", "--dry-run", *given]) == 2
    assert "text.safetensors: a text encoder of width 1024, the config says 768" in capsys.readouterr().err


@pytest.mark.parametrize("onednn", [False, products.has_onednn()])
def test_arithmetic_and_activations_are_counted_right(monkeypatch, onednn):
    """Against convolutions and products counted by hand, and against what autograd really keeps; by whichever library
    the processor would have them made."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: onednn)
    monkeypatch.setattr(products, "LEAST_WORK", 1)
    config = load_config("sd1", [
        "model.unet_config.model_channels=32", "model.unet_config.channel_mult=[1]", "model.micro_batch_size=2",
        "model.unet_config.num_res_blocks=1", "model.unet_config.attention_resolutions=[1]",
        "model.unet_config.num_heads=2", "trainer.precision=32",
    ])  # fmt: skip
    flops, kept = unet_forward(config, (4, 8, 8))
    unet = UNetModel(**network_arguments(config.model.unet_config))
    real = {}
    owned = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in owned:
            real[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        unet(torch.randn(2, 4, 8, 8), torch.ones(2), torch.randn(2, 77, 768))
    assert kept == pytest.approx(sum(real.values()), rel=0.05)
    hidden, pixels, batch, text = 32, 64, 2, 77
    convolution = lambda inputs, outputs: 2 * batch * pixels * 9 * inputs * outputs  # noqa: E731
    resblock = lambda inputs: (convolution(inputs, hidden) + convolution(hidden, hidden) + 2 * batch * 128 * hidden  # noqa: E731
                               + (inputs != hidden) * 2 * batch * pixels * inputs * hidden)  # fmt: skip
    linear = lambda length, inputs, outputs: 2 * batch * length * inputs * outputs  # noqa: E731
    transformer = (
        2 * linear(pixels, hidden, hidden)  # projections in and out
        + 4 * linear(pixels, hidden, hidden) + 2 * linear(pixels, pixels, hidden)  # to itself
        + 2 * linear(pixels, hidden, hidden) + 2 * linear(text, 768, hidden) + 2 * linear(pixels, text, hidden)
        + linear(pixels, hidden, 8 * hidden) + linear(pixels, 4 * hidden, hidden)
    )  # fmt: skip
    expected = (
        convolution(4, hidden) + convolution(hidden, 4) + 2 * batch * (32 * 128 + 128 * 128)
        + 3 * resblock(hidden) + 2 * resblock(2 * hidden) + 4 * transformer
    )  # fmt: skip
    assert flops == expected


def test_a_sweep_makes_runs_of_their_own(world):
    root = world.root / "runs"
    command = world.command("cached", "sweep", "trainer.max_steps=1", "model.optim.lr=1e-3,1e-4", "--multirun")
    assert world.call(*command) == 0
    assert sorted(path.name for path in root.glob("sweep*")) == ["sweep-lr0.0001", "sweep-lr0.001"]


@pytest.mark.parametrize("recipe", ["cached", "vae"])
def test_a_step_of_more_samples_than_there_are_is_said(world, capsys, recipe):
    assert world.call(*world.command(recipe, "large-step", "model.micro_batch_size=220"), "--dry-run") == 0
    assert "a step of 220 has each of the 22 samples 10.0 times: lower the batch size" in capsys.readouterr().out
