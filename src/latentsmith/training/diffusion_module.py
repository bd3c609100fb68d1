"""Training the U-Net: noise the latents, predict, compare (Ho et al. 2020, algorithm 1, on latents)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentsmith.diffusion import min_snr_weight, per_sample_loss, training_target
from latentsmith.models import AutoencoderKL
from latentsmith.models.autoencoder import to_latents

from .module import Optimisation, TrainingModule

BANDS = 4


@dataclass(frozen=True)
class Objective:
    """What the U-Net learns: prediction_type and loss_type as in `diffusion`; min_snr_gamma None weighs all alike."""

    prediction_type: str = "epsilon"
    loss_type: str = "l2"
    min_snr_gamma: float | None = None
    scale_factor: float = 0.18215
    timesteps: int = 1000


@dataclass(frozen=True)
class EmptyPrompt:
    """The empty prompt, for caption dropout: its token ids (length,), or its embedding (length, context_dim)."""

    token_ids: Tensor | None = None
    embedding: Tensor | None = None


class DiffusionTraining(TrainingModule):
    """Trains parts["unet"], and parts["text_encoder"] if it is among `trained`.

    A batch holds `images` (batch, 3, height, width) or cached `moments`; `token_ids` (batch, length) or a cached
    `context` (batch, length, context_dim); and what `DiffusionDraws` gave each sample.
    """

    empty_ids: Tensor
    empty_embedding: Tensor | None

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        trained: tuple[str, ...],
        optimisation: Optimisation,
        objective: Objective,
        empty: EmptyPrompt,
    ):
        super().__init__(parts, trained, optimisation)
        self.objective = objective
        for name, frozen in self.parts.items():
            if name not in trained:
                frozen.requires_grad_(False)
        self.register_buffer("empty_ids", empty.token_ids, persistent=False)
        self.register_buffer("empty_embedding", empty.embedding, persistent=False)

    def on_train_start(self) -> None:
        for name, part in self.parts.items():
            part.train(name in self.trained)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses = self.losses(batch, self.objective.loss_type)
        self.record_micro(**in_bands(losses.detach(), batch["timesteps"], self.objective.timesteps))
        if self.objective.min_snr_gamma:
            snr = (batch["signal"] / batch["noise_level"]).square()
            losses = losses * min_snr_weight(self.objective.prediction_type, snr, self.objective.min_snr_gamma)
        self.record_micro(loss=losses.mean())
        return losses.mean()

    def losses(self, batch: Mapping[str, Any], loss_type: str) -> Tensor:
        """The loss of each sample (batch,), before any weight."""
        latents, context = self.latents(batch), self.context(batch)
        signal, noise_level, noise = batch["signal"], batch["noise_level"], batch["noise"]
        seen = batch.get("input_noise", noise)
        noisy = signal[:, None, None, None] * latents + noise_level[:, None, None, None] * seen
        output = self.parts["unet"](noisy, batch["timesteps"], context)
        target = training_target(self.objective.prediction_type, latents, noise, signal, noise_level)
        return per_sample_loss(output, target, loss_type)

    @torch.no_grad()
    def latents(self, batch: Mapping[str, Any]) -> Tensor:
        """Scaled latents (batch, channels, height / f, width / f), drawn from the moments of the pictures, unless the
        batch has its `vae_latents`."""
        if "vae_latents" in batch:
            return to_latents(batch["vae_latents"].float(), self.objective.scale_factor)
        moments = batch["moments"].float() if "moments" in batch else self.parts["vae"].encode(batch["images"])  # type: ignore[operator]
        vae_latents = AutoencoderKL.sample(moments.float(), batch["posterior_noise"])
        return to_latents(vae_latents, self.objective.scale_factor)

    def context(self, batch: Mapping[str, Any]) -> Tensor:
        """Text embeddings (batch, length, context_dim): some of the empty prompt, some zero, as the draws say."""
        empty = batch["empty_caption"][:, None]
        if "context" in batch:
            context = batch["context"].float()
            if self.empty_embedding is not None:
                context = torch.where(empty[..., None], self.empty_embedding.to(context.dtype), context)
        else:
            token_ids = torch.where(empty, self.empty_ids, batch["token_ids"])
            with torch.set_grad_enabled("text_encoder" in self.trained):
                context = self.parts["text_encoder"](token_ids)
        return context * ~batch["zero_embedding"][:, None, None]


def in_bands(losses: Tensor, timesteps: Tensor, total: int) -> dict[str, Tensor]:
    """The mean loss, before any weight, in each quarter of the timesteps, by the first of them; NaN where none is."""
    bands = timesteps * BANDS // total
    inside = torch.stack([bands == band for band in range(BANDS)]).float()  # no indexing: that waits for the device
    means = (inside @ losses) / inside.sum(1)
    return {f"loss_t{band * total // BANDS}": means[band] for band in range(BANDS)}
