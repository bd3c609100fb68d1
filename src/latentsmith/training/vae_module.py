"""Training the autoencoder: encode, sample, decode, compare."""

from typing import Any

from torch import Tensor

from latentsmith.models import AutoencoderKL

from .losses import ReconstructionLoss, psnr
from .module import Optimisation, TrainingModule


class VaeTraining(TrainingModule):
    """Trains `vae` to give back what it was given, by `loss`."""

    def __init__(self, vae: AutoencoderKL, loss: ReconstructionLoss, optimisation: Optimisation):
        super().__init__({"vae": vae}, ("vae",), optimisation)
        self.loss = loss

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        vae: Any = self.parts["vae"]
        images = batch["images"]
        moments = vae.encode(images)
        decoded = vae.decode(vae.sample(moments, batch["posterior_noise"]))
        losses = self.loss(images, decoded, moments)
        self.record_micro(**losses, psnr=psnr(images, decoded.detach()).mean())
        return losses["loss"]
