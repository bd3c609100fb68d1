"""The loss of each sample and its weight by timestep."""

import torch
from torch import Tensor
from torch.nn import functional

from .parameterization import canonical_prediction_type

LOSS_TYPES = ("l2", "l1", "huber")


def per_sample_loss(output: Tensor, target: Tensor, loss_type: str = "l2", *, huber_delta: float = 1.0) -> Tensor:
    """Return the distance of each sample from its target: (batch,), float32 (float64 if an argument is so).

    output, target: (batch, channels, height, width); the mean runs over all axes but the first.
    loss_type: "l2", "l1" or "huber" (quadratic below huber_delta, linear with that slope above it).
    Raises ValueError for any other.
    """
    wide = torch.promote_types(torch.promote_types(output.dtype, target.dtype), torch.float32)
    output, target = output.to(wide), target.to(wide)
    match loss_type:
        case "l2":
            distance = (output - target) ** 2
        case "l1":
            distance = (output - target).abs()
        case "huber":
            distance = functional.huber_loss(output, target, reduction="none", delta=huber_delta)
        case _:
            raise ValueError(f"loss_type {loss_type!r} is not one of {', '.join(LOSS_TYPES)}")
    return distance.flatten(1).mean(1)


def min_snr_weight(prediction_type: str, snr: Tensor, gamma: float = 5.0) -> Tensor:
    """Return the weight min(snr, gamma) of the error in the clean latents, as a factor for a prediction type's loss.

    snr: signal-to-noise ratio a / (1 - a) of each sample, any shape, in [0, inf). gamma: above 0; 5 in the paper.
    Since |error in latents|^2 is |error in epsilon|^2 / snr and |error in v|^2 / (snr + 1), the loss is multiplied by
    min(snr, gamma) over these. Raises ValueError for a gamma that is not positive.
    Source: Hang et al. 2023, "Efficient diffusion training via min-SNR weighting strategy", section 3.4.
    """
    if not gamma > 0:
        raise ValueError(f"min-SNR gamma is {gamma}; it must be above 0 (5 is the paper's)")
    match canonical_prediction_type(prediction_type):
        case "epsilon":
            return (gamma / snr).clamp(max=1)  # not min(snr, gamma) / snr: that is 0 / 0 at zero terminal SNR
        case "v_prediction":
            return snr.clamp(max=gamma) / (snr + 1)
        case _:
            return snr.clamp(max=gamma)
