"""A token trained by the command line: its vectors alone move, resume is exact, its file works elsewhere."""

import pytest
import torch

from latentsmith.adapters.embeddings import read_embedding
from latentsmith.checkpoints.from_config import build_network, build_tokenizer
from latentsmith.config import load_config
from latentsmith.files.tensors import open_tensors
from latentsmith.training.checkpointing import read_state
from latentsmith.training.metrics_log import read_rows
from latentsmith.training.textual_inversion import add_trained_token, table_of

BASE = ("model.unet_config.from_pretrained=ROOT/runs/cached",)
TOKEN = (*BASE, "model.textual_inversion.token=<sks>", "model.textual_inversion.vectors=3", "model.optim.lr=1e-2",
         "model.textual_inversion.initializer=red circle", "model.data.train.captions.prompt=a photo of <sks>",
         "model.optim.weight_decay=0.1", "model.optim.sched.warmup_steps=0")  # fmt: skip
LORA = ("model.peft.peft_scheme=lora", "model.peft.networks=[unet,text_encoder]", "model.textual_inversion.lr=1e-1")


@pytest.mark.parametrize("more", [(), LORA], ids=["alone", "with LoRA"])
def test_four_steps_are_two_and_two(world, more):
    name = f"token-{len(more)}"
    whole = world.train("images", f"{name}-whole", *TOKEN, *more)
    halves = world.train("images", f"{name}-halves", *TOKEN, *more, "trainer.max_steps=2")
    world.train("images", f"{name}-halves", *TOKEN, *more)
    assert read_rows(halves / "metrics.csv") == read_rows(whole / "metrics.csv")
    assert read_state(world.newest(halves)) == read_state(world.newest(whole))
    saved = open_tensors(world.newest(whole) / "text_encoder.adapter.safetensors")
    assert (len(saved) == 1) == (not more)
    assert saved["text_model.embeddings.token_embedding.learned"].shape == (3, 32)
    written = read_embedding(whole / "sks.embedding.safetensors")
    averages = open_tensors(world.newest(whole) / "ema" / "text_encoder.adapter.safetensors")
    assert written.token == "<sks>"
    assert torch.equal(written.vectors, averages["text_model.embeddings.token_embedding.learned"])


def test_it_begins_as_its_initializer_and_other_rows_have_no_gradient(world):
    run = world.train("images", "token-first", *TOKEN, "trainer.max_steps=1")
    config = load_config(run / "config.yaml")
    networks = {"text_encoder": build_network(config, "text_encoder")}
    tokenizer, table = build_tokenizer(config), table_of(networks["text_encoder"])
    rows = table.weight.detach().clone()
    add_trained_token(config, networks, tokenizer)
    words = tokenizer.encode("red circle")
    assert torch.equal(table.learned, rows[[words[number % len(words)] for number in range(3)]])
    networks["text_encoder"](tokenizer(["a photo of <sks>"])).sum().backward()
    moving = {name for name, p in networks["text_encoder"].named_parameters() if p.grad is not None}
    assert moving == {"text_model.embeddings.token_embedding.learned"} and table.weight.grad is None
    assert torch.equal(table.weight, rows)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("cached", TOKEN, "embeddings in a cache do not follow it"),
        ("images", (*TOKEN, "model.textual_inversion.vectors=39"), "a prompt has 38 tokens in all"),
        ("images", (*TOKEN, "model.textual_inversion.token=two words"), "a trained token is one word"),
        ("images", (*TOKEN, "model.cond_stage_trainable=true"), "only its vectors move"),
        ("images", TOKEN[1:], "the unet is frozen and would stay random"),
    ],
)
def test_what_cannot_be_is_one_line(world, capsys, kind, options, expected):
    assert world.call(*world.command(kind, "wrong-token", *options), "--dry-run") == 2
    said = capsys.readouterr().err.strip()
    assert expected in said and "\n" not in said
