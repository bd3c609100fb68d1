"""A diffusion training small enough for closed forms: linear networks, random samples, no files but the run's own."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from latentsmith.data.loader import RunSamples, collated
from latentsmith.diffusion import NoiseSchedule
from latentsmith.training import setup
from latentsmith.training.checkpointing import CheckpointPlan, SaveCheckpoints, load_checkpoint, read_state
from latentsmith.training.hooks import Hook
from latentsmith.training.hooks.metrics import Metrics
from latentsmith.training.hooks.nonfinite import DescribeNonFinite
from latentsmith.training.hooks.signals import StopOnSignal
from latentsmith.training.loop import Plan, Training, train_loop
from latentsmith.training.metrics_log import read_rows
from latentsmith.training.objectives import DiffusionLoss, DiffusionObjective, EmptyPrompt
from latentsmith.training.optimizers import lr_schedule
from latentsmith.training.random_draws import DiffusionDraws

CONSTANT = lr_schedule("constant")
LENGTH, CONTEXT, TOKENS, SAMPLES, SIZE = 3, 5, 7, 10, (4, 4, 4)


class ToyUNet(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.conv, self.text, self.dropout = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(CONTEXT, 4), nn.Dropout(dropout)

    def forward(self, noisy, timesteps, context):
        hidden = self.conv(noisy) + self.text(context.sum(dim=1))[:, :, None, None]
        return self.dropout(hidden) + timesteps[:, None, None, None] / 1000


class ToyVae(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.dropout = nn.Conv2d(3, 8, 2, stride=2), nn.Dropout(0.5)

    def encode(self, images):
        return self.dropout(self.conv(images))


class ToyText(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(TOKENS, CONTEXT)

    def forward(self, token_ids):
        return self.table(token_ids)


def record(index: int, position: int) -> dict:
    """Sample `index` of the set, as a cache and as images give it."""
    generator = torch.Generator().manual_seed(index)
    return {
        "keys": str(index),
        "moments": torch.randn(8, 4, 4, generator=generator).half(),
        "context": torch.randn(LENGTH, CONTEXT, generator=generator).half(),
        "token_ids": torch.randint(1, TOKENS, (LENGTH,), generator=generator),
        "images": torch.rand(3, 8, 8, generator=generator) * 2 - 1,
    }


@dataclass
class Toy:
    """One training of the toy networks: objective() and samples() to call by hand, train() to run to max_steps."""

    folder: Path
    cached: bool = True
    trained: tuple[str, ...] = ("unet",)
    loss: DiffusionLoss = field(default_factory=lambda: DiffusionLoss(scale_factor=0.5))
    caption_dropout_rate: float = 0.0
    text_embedding_dropout_rate: float = 0.0
    unet_dropout: float = 0.0
    global_batch: int = 4
    optimizer: str = "adamw"
    options: dict = field(default_factory=lambda: {"lr": 1e-2})
    decay: float | None = None
    lr_factor: Callable[[int], float] = CONSTANT
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule.from_config)
    reverse_hooks: bool = False

    @property
    def draws(self) -> DiffusionDraws:
        return DiffusionDraws(3, SIZE, self.schedule, self.caption_dropout_rate, self.text_embedding_dropout_rate)

    def objective(self) -> DiffusionObjective:
        torch.manual_seed(0)
        networks = {"unet": ToyUNet(self.unet_dropout), "vae": ToyVae(), "text_encoder": ToyText()}
        empty = EmptyPrompt(embedding=torch.full((LENGTH, CONTEXT), 0.25))
        empty = empty if self.cached else EmptyPrompt(token_ids=torch.zeros(1, LENGTH, dtype=torch.long))
        return DiffusionObjective(networks, self.trained, self.loss, empty)

    def samples(self) -> RunSamples:
        dropped = ("images", "token_ids") if self.cached else ("moments", "context")

        def read(index: int, position: int) -> dict:
            return {name: value for name, value in record(index, position).items() if name not in dropped}

        return RunSamples(collated(read), self.draws, SAMPLES, seed=3)

    def training(self, objective=None, steps=4, *, micro_batch=None, clip=None, resume=None, plugins=()) -> Training:
        """A training that is ready for its first step."""
        fabric = Fabric(accelerator="cpu", devices=1, plugins=list(plugins))
        fabric.launch()
        plan = Plan(
            steps,
            self.global_batch,
            micro_batch or self.global_batch,
            self.optimizer,
            self.options,
            self.lr_factor,
            gradient_clip_val=clip,
        )
        ema = SimpleNamespace(decay=self.decay, every_n_steps=1, cpu_offload=False) if self.decay else None
        training = setup.start(fabric, objective or self.objective(), plan, ema)
        if resume is not None:
            load_checkpoint(resume, read_state(resume), training.state)
        return training

    def train(
        self,
        objective=None,
        steps=4,
        *,
        every=0,
        keep=-1,
        hooks=(),
        limit=10,
        minutes=None,
        clock=None,
        **options,
    ) -> Training:
        """Train to `steps` with the hooks of every run and `hooks`, which may be functions of the metrics hook."""
        training, samples = self.training(objective, steps, **options), self.samples()
        checkpoints = CheckpointPlan(self.folder / "checkpoints", every, keep, every_n_minutes=minutes)
        log = Metrics(self.folder, 1, tensorboard=False, progress_bar=False)
        saving = SaveCheckpoints(checkpoints, *([clock] if clock else []))
        given = [hook if isinstance(hook, Hook) else hook(log) for hook in hooks]
        everywhere = [StopOnSignal(), log, DescribeNonFinite(self.folder, samples, limit, 1), saving]
        hooks = [*given, *everywhere]
        train_loop(training, setup.batches_of(training, samples), hooks[::-1] if self.reverse_hooks else hooks)
        return training

    def losses(self) -> list[float]:
        return [row["loss"] for row in read_rows(self.folder / "metrics.csv")]


@pytest.fixture
def toy(tmp_path):
    """toy(**fields) -> a Toy with a folder of its own."""
    made = []

    def make(**fields) -> Toy:
        made.append(None)
        (tmp_path / f"run{len(made)}").mkdir()
        return Toy(tmp_path / f"run{len(made)}", **fields)

    return make
