"""Training an autoencoder: encode, sample, decode, compare."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from latentsmith.models import AutoencoderKL

from .objectives import Objective


@dataclass(frozen=True)
class ReconstructionLoss:
    """Weighted sum of pixel differences, differences of edges, and the KL divergence of the latents.

    l1_weight, l2_weight: of the mean absolute and mean squared difference of images in [-1, 1].
    edge_weight: of the mean absolute difference of horizontal and vertical neighbours' differences, which blur raises.
    kl_weight: of the KL divergence in nats per image (Rombach et al. 2022 use 1e-6).
    """

    l1_weight: float = 1.0
    l2_weight: float = 0.0
    edge_weight: float = 0.0
    kl_weight: float = 1e-6

    def __call__(self, images: Tensor, decoded: Tensor, moments: Tensor) -> dict[str, Tensor]:
        """Return `loss` and its parts `l1`, `l2` and `kl`: scalars. images: (batch, 3, height, width) in [-1, 1]."""
        difference = decoded - images
        l1, l2, kl = difference.abs().mean(), difference.square().mean(), AutoencoderKL.kl(moments).mean()
        loss = self.l1_weight * l1 + self.l2_weight * l2 + self.kl_weight * kl
        if self.edge_weight:
            loss = loss + self.edge_weight * edge_difference(difference)
        return {"loss": loss, "l1": l1, "l2": l2, "kl": kl}


def edge_difference(difference: Tensor) -> Tensor:
    """Return the mean absolute step between neighbouring pixels of (batch, channels, height, width): a scalar."""
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def psnr(images: Tensor, decoded: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of each image, (batch,), both in [-1, 1]; `decoded` is clamped."""
    error = F.mse_loss(decoded.clamp(-1, 1), images, reduction="none").flatten(1).mean(dim=1)
    return -10 * (error / 4).clamp_min(1e-10).log10()


class VaeObjective(Objective):
    """Trains networks["vae"] to give back the `images` of a batch."""

    def __init__(self, vae: AutoencoderKL, loss: ReconstructionLoss):
        super().__init__({"vae": vae}, ("vae",))
        self.loss = loss

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        vae: Any = self.networks["vae"]
        images = batch["images"]
        moments = vae.encode(images).float()
        decoded = vae.decode(vae.sample(moments, batch["posterior_noise"])).float()
        losses = self.loss(images, decoded, moments)
        return losses["loss"], {**losses, "psnr": psnr(images, decoded.detach()).mean()}
