"""Training objectives: a batch -> its loss and metrics. Plain modules, so that any training loop can call them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentsmith.diffusion import min_snr_weight, per_sample_loss, training_target
from latentsmith.models import AutoencoderKL
from latentsmith.models.autoencoder import to_latents

BANDS = 4


class Objective(nn.Module):
    """Base class: holds the networks of a run by name; forward(batch) -> (loss, metrics to log).

    trained: the names of the networks whose weights move. The others have no gradients and stay in evaluation mode.
    """

    def __init__(self, networks: Mapping[str, nn.Module], trained: tuple[str, ...]):
        super().__init__()
        self.networks, self.trained = nn.ModuleDict(networks), trained
        for name, network in networks.items():
            if name not in trained:
                network.requires_grad_(False)

    def train(self, mode: bool = True) -> "Objective":
        for name, network in self.networks.items():
            network.train(mode and name in self.trained)
        self.training = mode
        return self

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError


@dataclass(frozen=True)
class DiffusionLoss:
    """Loss of the U-Net. prediction_type, loss_type: as in `diffusion`. min_snr_gamma: None weighs all alike."""

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


class DiffusionObjective(Objective):
    """Noise the latents, predict, compare (Ho et al. 2020, algorithm 1, on latents), with networks["unet"].

    A batch holds `images` (batch, 3, height, width) or cached `moments` or `vae_latents`; `token_ids` (batch, length)
    or cached `context` (batch, length, context_dim); and what `DiffusionDraws` gave each sample.
    """

    empty_ids: Tensor
    empty_embedding: Tensor | None

    def __init__(
        self, networks: Mapping[str, nn.Module], trained: tuple[str, ...], loss: DiffusionLoss, empty: EmptyPrompt
    ):
        super().__init__(networks, trained)
        self.loss = loss
        self.register_buffer("empty_ids", empty.token_ids, persistent=False)
        self.register_buffer("empty_embedding", empty.embedding, persistent=False)

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self.losses(batch, self.loss.loss_type)
        metrics = in_bands(losses.detach(), batch["timesteps"], self.loss.timesteps)
        if self.loss.min_snr_gamma:
            snr = (batch["sqrt_alphas_cumprod"] / batch["sqrt_one_minus_alphas_cumprod"]).square()
            losses = losses * min_snr_weight(self.loss.prediction_type, snr, self.loss.min_snr_gamma)
        if "loss_weight" in batch:
            losses = losses * batch["loss_weight"]
        loss = losses.mean()
        return loss, metrics | {"loss": loss}

    def losses(self, batch: Mapping[str, Any], loss_type: str) -> Tensor:
        """Return the loss of each sample, (batch,), before any weight."""
        latents, context = self.latents(batch), self.context(batch)
        names = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "noise")
        scale, noise_scale, noise = (batch[name] for name in names)
        input_noise = batch.get("input_noise", noise)
        noisy = scale[:, None, None, None] * latents + noise_scale[:, None, None, None] * input_noise
        output = self.networks["unet"](noisy, batch["timesteps"], context)
        target = training_target(self.loss.prediction_type, latents, noise, scale, noise_scale)
        return per_sample_loss(output, target, loss_type)

    @torch.no_grad()
    def latents(self, batch: Mapping[str, Any]) -> Tensor:
        """Return scaled latents (batch, channels, height / f, width / f), sampled from the moments of the images."""
        vae: Any = self.networks["vae"] if "images" in batch else None
        return to_latents(vae_latents(batch, vae), self.loss.scale_factor)

    def context(self, batch: Mapping[str, Any]) -> Tensor:
        """Return text embeddings (batch, length, context_dim): some of the empty prompt, some zero, as drawn."""
        empty = batch["empty_caption"][:, None]
        if "context" in batch:
            context = batch["context"].float()
            if self.empty_embedding is not None:
                context = torch.where(empty[..., None], self.empty_embedding.to(context.dtype), context)
        else:
            token_ids = torch.where(empty, self.empty_ids, batch["token_ids"])
            with torch.set_grad_enabled(torch.is_grad_enabled() and "text_encoder" in self.trained):
                context = self.networks["text_encoder"](token_ids)
        return torch.where(batch["zero_embedding"][:, None, None], torch.zeros_like(context), context)


def vae_latents(batch: Mapping[str, Any], vae: Any) -> Tensor:
    """Return unscaled latents, float32: the batch's own, or sampled from its moments, or from those of its images."""
    if "vae_latents" in batch:
        latents: Tensor = batch["vae_latents"]
        return latents.float()
    moments = batch["moments"] if "moments" in batch else vae.encode(batch["images"])
    return AutoencoderKL.sample(moments.float(), batch["posterior_noise"])


def in_bands(losses: Tensor, timesteps: Tensor, total: int) -> dict[str, Tensor]:
    """Return the mean of losses (batch,) in each quarter of the timesteps, named by its first; NaN where none is."""
    bands = timesteps * BANDS // total
    inside = torch.stack([bands == band for band in range(BANDS)]).float()  # no indexing: that waits for the device
    means = (inside @ losses) / inside.sum(1)
    return {f"loss_t{band * total // BANDS}": means[band] for band in range(BANDS)}
