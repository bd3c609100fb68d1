"""Adapters trained by the command line: frozen base, small checkpoints, exact resume."""

import pytest
import torch

from latentsmith.adapters.names import layers_of
from latentsmith.adapters.read import read_adapter
from latentsmith.checkpoints.from_config import build_network
from latentsmith.config import load_config
from latentsmith.files.tensors import open_tensors
from latentsmith.training.checkpointing import read_state
from latentsmith.training.metrics_log import read_rows

BASE = "model.unet_config.from_pretrained=ROOT/runs/cached"
LORA = (BASE, "model.peft.peft_scheme=lora", "model.peft.adapter_dim=4", "model.optim.lr=1e-2",
        "model.optim.sched.warmup_steps=0")  # fmt: skip
TEXT = ("model.cond_stage_key=captions", "model.cond_stage_config.from_pretrained=ROOT/runs/text",
        "model.first_stage_config.from_pretrained=ROOT/runs/vae",
        "model.peft.networks=[unet,text_encoder]")  # fmt: skip
CASES = {
    "lora": ("cached", ("model.peft.adapter_dropout=0.2", "model.peft.lora_plus_ratio=4")),
    "dora": ("cached", ("model.peft.peft_scheme=dora", "model.peft.targets=conv")),
    "loha": ("cached", ("model.peft.peft_scheme=loha",)),
    "lokr": ("cached", ("model.peft.peft_scheme=lokr",)),
    "oft": ("cached", ("model.peft.peft_scheme=oft",)),
    "both networks from images": ("images", (*TEXT, "model.optim.text_encoder_lr=1e-3")),
}


@pytest.mark.parametrize("case", CASES)
def test_four_steps_are_two_and_two(world, case):
    recipe, options = CASES[case]
    name = case.replace(" ", "-")
    valid = f"model.data.validation.dataset_path=ROOT/{'cache' if recipe == 'cached' else 'shards'}"
    options = (*LORA, *options, valid, "trainer.val_check_interval=2")
    whole = world.train(recipe, f"{name}-whole", *options)
    halves = world.train(recipe, f"{name}-halves", *options, "trainer.max_steps=2")
    world.train(recipe, f"{name}-halves", *options)
    assert read_rows(halves / "metrics.csv") == read_rows(whole / "metrics.csv")
    assert read_rows(halves / "validation.csv") == read_rows(whole / "validation.csv")
    assert read_state(world.newest(halves)) == read_state(world.newest(whole))
    validated = read_rows(whole / "validation.csv")
    assert validated[0]["val_loss"] != validated[1]["val_loss"] != validated[1]["val_loss_ema"]


def test_a_checkpoint_holds_adapters_alone(world):
    run = world.train("cached", "alone", *LORA)
    files = {str(file.relative_to(world.newest(run))) for file in world.newest(run).rglob("*") if file.is_file()}
    kept = {"unet.adapter.safetensors", "ema/unet.adapter.safetensors", "optimizer.safetensors", "state.json"}
    assert files == kept
    assert {file.name for file in run.glob("*.safetensors")} == {
        "alone.safetensors",
        "pytorch_lora_weights.safetensors",
    }
    tensors = open_tensors(world.newest(run) / "unet.adapter.safetensors")
    assert {name.rpartition(".adapters.default.")[2] for name in tensors} == {"lora_up", "lora_down"}
    assert all(tensor.shape[0] == 4 for name, tensor in tensors.items() if name.endswith("down"))


def test_its_files_are_those_of_kohya_and_diffusers(world):
    """Both read back as the averages of the last checkpoint, and generate takes them."""
    run = world.train("cached", "exported", *LORA, "model.peft.alpha=2")
    averages = open_tensors(world.newest(run) / "ema" / "unet.adapter.safetensors")
    layers = layers_of({"unet": build_network(load_config(run / "config.yaml"), "unet")})
    for name in ("exported.safetensors", "pytorch_lora_weights.safetensors"):
        read = read_adapter(run / name, layers)
        assert (read.scheme, set(read.ranks), set(read.alphas)) == ("lora", {4}, {2.0})
        tensors = {key: tensor for key, tensor in read.parts["unet"].items() if not key.endswith(".alpha")}
        assert len(tensors) == len(averages)
        for key, tensor in averages.items():
            assert torch.equal(tensors[key.replace(".adapters.default", "")].reshape(tensor.shape), tensor)
        words = ("a red circle", "--steps", 2, "--lora", f"{run / name}:0.5", "--out", f"ROOT/images/{name}")
        assert world.call("generate", "--from", "ROOT/runs/cached", *words) == 0


def test_it_starts_at_the_base(world):
    """The first loss is that of full fine-tuning from the same weights, on the same samples and noise."""
    full = world.train("cached", "full", BASE, "trainer.max_steps=1")
    lora = world.train("cached", "first", *LORA, "trainer.max_steps=1")
    assert world.losses(lora) == pytest.approx(world.losses(full), rel=1e-6)


def test_it_says_what_it_trains(world, capsys):
    assert world.call(*world.command("cached", "said", *LORA), "--dry-run") == 0
    said = capsys.readouterr().out
    assert "of them trained" in said
    assert "layers, rank 4, alpha 4 (the rank, as in diffusers; kohya's default is 1), scale 1" in said
    assert world.call(*world.command("cached", "said", *LORA, "model.peft.alpha=1"), "--dry-run") == 0
    assert "alpha 1 (as model.peft.alpha says), scale 0.25" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("model.peft.peft_scheme=lora",), "model.unet_config.from_pretrained is not set: the unet is frozen"),
        ((*LORA, "model.peft.targets=[attn9]"), "model.peft: adapter targets: 'attn9' matches no linear layer"),
        ((*LORA, "model.peft.targets=most"), "model.peft.targets must be one of attention"),
        ((*LORA, "model.peft.alpha=0"), "model.peft: adapter alpha is 0"),
        ((*LORA, "model.peft.adapter_dim=0"), "model.peft.adapter_dim must be a whole number of at least 1"),
        ((*LORA, "model.peft.peft_scheme=loha", "model.peft.lora_plus_ratio=4"), "is of lora and dora"),
        ((*LORA, "model.peft.peft_scheme=loha", "model.peft.adapter_dropout=0.1"), "loha has no inner values to drop"),
        ((*LORA, "model.peft.networks=[unet,text_encoder]"), "embeddings in a cache do not follow it"),
        ((*LORA, *TEXT, "model.cond_stage_trainable=true"), "adapters of the text encoder are model.peft.networks"),
        ((*LORA, "model.peft.base_precision=bf16"), "needs trainer.precision=bf16-mixed"),
        ((*LORA, "trainer.strategy=model_parallel"), "adapters are too small to shard"),
        ((*LORA, "model.peft.peft_scheme=ia3"), "model.peft.peft_scheme must be one of lora"),
    ],
)
def test_what_cannot_be_is_one_line(world, capsys, options, expected):
    assert world.call(*world.command("cached", "wrong-lora", *options), "--dry-run") == 2
    said = capsys.readouterr().err.strip()
    assert expected in said and "\n" not in said


def test_nemos_keys(world):
    nemo = world.train("cached", "nemo", BASE, "model.peft.peft_scheme=sdlora",
                       "+model.peft.lora_tuning={adapter_dim:4,network_alpha:2,adapter_dropout:0.0}")  # fmt: skip
    ours = world.train("cached", "ours", BASE, "model.peft.peft_scheme=lora", "model.peft.adapter_dim=4",
                       "model.peft.alpha=2", "model.peft.targets=nemo")  # fmt: skip
    assert world.losses(nemo) == world.losses(ours)
    assert read_state(world.newest(nemo)) == read_state(world.newest(ours))
