"""A small world made by the command line alone: scenes, shards, a VAE, a vocabulary, caches, trained runs."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from latentsmith.cli import main
from latentsmith.training.checkpointing import checkpoints_in
from latentsmith.training.metrics_log import read_rows

CONFIG = """
name: tiny
trainer: {max_steps: 4, accelerator: cpu, log_every_n_steps: 1, gradient_clip_val: 1.0, enable_progress_bar: false}
exp_manager:
  exp_dir: ROOT/runs
  create_tensorboard_logger: false
  checkpoint_callback_params: {every_n_train_steps: 2, save_top_k: -1}
  ema: {enable: true, decay: 0.9}
model:
  seed: 7
  micro_batch_size: 4
  scale_factor: 0.5
  parameterization: v
  caption_dropout_rate: 0.25
  optim: {lr: 1e-3, sched: {warmup_steps: 2}}
  unet_config:
    model_channels: 32
    channel_mult: [1, 2]
    attention_resolutions: [2]
    num_res_blocks: 1
    num_heads: 2
    context_dim: 32
    resblock_gn_groups: 8
  first_stage_config:
    ddconfig: {ch: 8, ch_mult: [1, 2], num_res_blocks: 1, num_groups: 4}
    lossconfig: {_target_: latentsmith.training.losses.ReconstructionLoss, l2_weight: 1.0}
  cond_stage_config:
    tokenizer: ROOT/tokenizer
    width: 32
    layers: 2
    heads: 2
    intermediate_size: 64
    activation: quick_gelu
    vocab_size: 540
    max_length: 40
  data:
    train:
      dataset_path: ROOT/shards
      augmentations: {resize_smallest_side: 16, center_crop_h_w: "16, 16"}
"""
SAMPLES = 22
LATENTS = ("model.first_stage_key=image_encoded", "model.data.train.dataset_path=ROOT/latents")
CACHE = (
    "model.first_stage_key=image_encoded",
    "model.cond_stage_key=captions_encoded",
    "model.data.train.dataset_path=ROOT/cache",
)
VAE = "model.first_stage_config.from_pretrained=ROOT/runs/vae"
TEXT = "model.cond_stage_config.from_pretrained=ROOT/runs/text"
JOINT = "model.cond_stage_trainable=true"
RECIPES = {  # the overrides of each sort of run
    "vae": (),
    "text": (*LATENTS, VAE, JOINT),
    "cached": (*CACHE, VAE, TEXT),
    "images": (VAE, TEXT),
}


@dataclass
class World:
    """A folder that holds everything. Words may say ROOT for it."""

    root: Path

    def call(self, *arguments: object) -> int:
        return main([str(word).replace("ROOT", str(self.root)) for word in arguments])

    def command(self, recipe: str, name: str, *overrides: str) -> list[str]:
        """Return the arguments that train a run of `recipe` under `name`."""
        command = "train-vae" if recipe == "vae" else "train"
        given = (f"exp_manager.name={name}", *RECIPES[recipe], *overrides)
        return [command, "--config", "ROOT/tiny.yaml", *given]

    def train(self, recipe: str, name: str, *overrides: str) -> Path:
        assert self.call(*self.command(recipe, name, *overrides)) == 0
        return self.root / "runs" / name

    def losses(self, run: Path) -> list[float]:
        return [row["loss"] for row in read_rows(run / "metrics.csv")]

    def newest(self, run: Path) -> Path:
        return checkpoints_in(run / "checkpoints")[-1]


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    """Made once: 22 scenes in shards, runs `vae`, `text` (joint) and `cached`, and the caches they are made of."""
    made = World(tmp_path_factory.mktemp("world"))
    (made.root / "tiny.yaml").write_text(CONFIG.replace("ROOT", str(made.root)))
    config = ("--config", "ROOT/tiny.yaml")
    assert made.call("data", "scenes", "ROOT/scenes", "--count", SAMPLES) == 0
    assert made.call("data", "import", "ROOT/scenes", "ROOT/shards", "--samples-per-shard", 8) == 0
    assert made.call("data", "vocabulary", "ROOT/shards", "ROOT/tokenizer", "--size", 540) == 0
    made.train("vae", "vae")
    raw_captions = ("model.first_stage_key=image_encoded", VAE)
    assert made.call("precache", *config, "--out", "ROOT/latents", *raw_captions) == 0
    made.train("text", "text")
    assert made.call("precache", *config, "--out", "ROOT/cache", VAE, TEXT) == 0
    made.train("cached", "cached")
    return made
