"""The public surface: cheap to import, nothing promised or documented that is not there, one file starts a run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
import yaml

import latentsmith
from latentsmith.checkpoints import ModelSpec, export_diffusers
from latentsmith.checkpoints.from_config import with_padding
from latentsmith.cli import main
from latentsmith.cli.main import app
from latentsmith.config import schema
from latentsmith.data.ingest import import_data
from latentsmith.demo.scenes import write_scenes
from latentsmith.files.errors import BadInput
from latentsmith.image_request import AXES
from latentsmith.text.tokenizer import train_vocabulary

ROOT = Path(__file__).parents[1]
SIZES = {
    "unet_config": dict(model_channels=32, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[1]),
    "first_stage_config": dict(embed_dim=4, ddconfig=dict(z_channels=4, ch=32, ch_mult=[1, 2], num_res_blocks=1)),
    "cond_stage_config": dict(width=32, layers=2, heads=2, intermediate_size=64, vocab_size=520, max_length=16),
}
SIZES["unet_config"] |= dict(num_heads=2, context_dim=32)
SIZES["cond_stage_config"] |= dict(activation="quick_gelu")


def test_importing_the_package_loads_nothing_heavy():
    script = "import sys, latentsmith; latentsmith.load_config('sd1'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("name", latentsmith.__all__)
def test_every_public_name_is_there(name):
    assert getattr(latentsmith, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = latentsmith.nothing
    assert "Pipeline" in dir(latentsmith)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: latentsmith.load_config("sd1", "a=b"), r"overrides are a list: \['a=b'\]"),
        (
            lambda: latentsmith.train("sd1"),
            r"train takes a config: latentsmith.train\(latentsmith.load_config\('sd1'\)\)",
        ),
        (lambda: latentsmith.precache("sd1", "out"), r"precache takes a config: latentsmith.precache\(.*'sd1'\)\)"),
    ],
)
def test_arguments_of_another_type_are_one_line(call, line):
    with pytest.raises(BadInput, match=line):
        call()


def test_the_models_dtype_by_diffusers_keyword(workspace):
    for keyword in ("dtype", "torch_dtype"):
        pipeline = latentsmith.Pipeline.from_pretrained(workspace / "model", device="cpu", **{keyword: torch.bfloat16})
        assert next(pipeline.unet.parameters()).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with `model`, a tiny diffusers folder, and `shards`, images to train it on."""
    folder = tmp_path_factory.mktemp("public")
    torch.manual_seed(0)
    networks = {
        "unet": latentsmith.UNetModel(**SIZES["unet_config"]),
        "vae": latentsmith.AutoencoderKL(**SIZES["first_stage_config"]),
        "text_encoder": latentsmith.ClipTextEncoder(**SIZES["cond_stage_config"]),
    }
    train_vocabulary(["a red circle"], 518, folder / "tokenizer")
    vocabulary = {file.name: file.read_bytes() for file in (folder / "tokenizer").iterdir()}
    parts = {name: dict(network.state_dict()) for name, network in networks.items()}
    export_diffusers(parts, folder / "model", ModelSpec(*SIZES.values(), "epsilon", image_size=8), tokenizer=vocabulary)
    write_scenes(folder / "images", 4, 0)
    import_data(folder / "images", folder / "shards")
    return folder


def fine_tuning(workspace, name, weights, **sizes):
    """A config of the tiny model's sizes: one step from `weights` at a learning rate of 0."""
    crop = {"resize_smallest_side": 16, "center_crop_h_w": [16, 16]}
    model = {
        **SIZES,
        "ckpt_path": str(weights),
        "first_stage_key": "images",
        "cond_stage_key": "captions",
        "micro_batch_size": 2,
        "optim": {"lr": 0.0},
        "data": {"train": {"dataset_path": str(workspace / "shards"), "augmentations": crop}},
    }
    config = {"name": name, "trainer": {"max_steps": 1}, "exp_manager": {"exp_dir": str(workspace)}, "model": model}
    (workspace / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    tokenizer = f"model.cond_stage_config.tokenizer={workspace / 'tokenizer'}"
    return latentsmith.load_config(
        workspace / f"{name}.yaml", [tokenizer, *(f"model.{k}={v}" for k, v in sizes.items())]
    )


@pytest.mark.parametrize(("to", "file"), [("diffusers", "copy"), ("ldm", "m.safetensors"), ("nemo", "m.nemo")])
def test_one_key_starts_a_run_from_any_format(workspace, to, file):
    """At a learning rate of 0 the run's weights are those of the file: nothing was left at random."""
    weights = latentsmith.convert(workspace / "model", workspace / file, to)
    run = latentsmith.train(fine_tuning(workspace, f"from_{to}", weights))
    trained, given = (latentsmith.Pipeline.from_pretrained(path) for path in (run, workspace / "model"))
    for part in ("unet", "vae", "text_encoder"):
        left, right = (getattr(pipeline, part).state_dict() for pipeline in (trained, given))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("unet_config.model_channels", 64, "its first convolution has 32 channels, the config says model_channels 64"),
        ("first_stage_config.ddconfig.ch", 64, "has 32 channels, the config says ddconfig.ch 64"),
        ("cond_stage_config.layers", 3, "a text encoder of 2 layers, the config asks for 3"),
        ("ckpt_path", "nowhere.safetensors", "nowhere.safetensors: no such file"),
    ],
)
def test_a_config_of_other_sizes_is_told_in_one_line(workspace, key, value, message):
    with pytest.raises(BadInput) as caught:
        latentsmith.train(fine_tuning(workspace, "other", workspace / "model", **{key: value}))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (workspace / "other").exists()


def test_a_start_from_nemo_keeps_its_padding(workspace, capsys):
    """FrozenCLIPEmbedder fills text up to 80 vectors; a .nemo of ours says that its model was not trained so."""
    for name, padded in (("ours.nemo", None), ("theirs.nemo", 80)):
        latentsmith.convert(workspace / "model", workspace / name, "nemo")
        if padded:
            data = (workspace / name).read_bytes()
            (workspace / name).write_bytes(data.replace(b"trained_unpadded: true", b"trained_unpadded: null"))
        config = fine_tuning(workspace, f"padding-{padded}", workspace / name)
        config = with_padding(config)
        assert config.model.cond_stage_config.pad_to == padded
        assert ("filled up to 80" in capsys.readouterr().out) == bool(padded)


def pages():
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def quoted_commands(page):
    """The `latentsmith ...` commands of a page's code blocks, continued lines joined, comments dropped."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    fenced = [line for block in text.split("```")[1::2] for line in block.splitlines()]
    indented = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [shlex.split(line, comments=True)[1:] for line in fenced + indented if line.startswith("latentsmith ")]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_quoted_commands_options_and_links_exist(page):
    for words in quoted_commands(page):
        command = typer.main.get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        command.make_context(command.name, [word for word in words if word not in ("...", "PATH")])
        for key in (word.split("=")[0] for word in words if "=" in word and " " not in word):
            known = AXES if command.name == "generate" else schema.table()
            assert key in known, f"{page.name}: {key} is no option"
    for key in re.findall(r"`((?:model|trainer|exp_manager)\.[\w.]+)", page.read_text("utf-8")):
        known = key in schema.table() or key in schema.groups()
        assert known, f"{page.name}: {key} is no option"
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / link).exists(), f"{page.name}: {link} is not there"


def test_the_page_of_options_is_the_generated_one(capsys):
    """If not: latentsmith config explain --markdown > docs/configuration.md"""
    assert main(["config", "explain", "--markdown"]) == 0
    assert capsys.readouterr().out.strip() == (ROOT / "docs" / "configuration.md").read_text("utf-8").strip()
