"""Convert between what the network predicts and images: the training target, and back to a clean estimate.

Everywhere here noisy = sqrt_alphas_cumprod * latents + sqrt_one_minus_alphas_cumprod * noise. The two coefficients are
(batch,) tensors or plain numbers, float32 or wider; the other tensors are (batch, channels, height, width).
"""

from torch import Tensor

from .schedule import per_sample

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_ALIASES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def canonical_prediction_type(name: str) -> str:
    """Return "epsilon", "v_prediction" or "sample" for one of them or LDM's eps, v, x0; ValueError for any other."""
    canonical = _ALIASES.get(name, name)
    if canonical not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type {name!r} is not one of {', '.join((*PREDICTION_TYPES, *_ALIASES))}")
    return canonical


def training_target(
    prediction_type: str,
    latents: Tensor,
    noise: Tensor,
    sqrt_alphas_cumprod: Tensor | float,
    sqrt_one_minus_alphas_cumprod: Tensor | float,
) -> Tensor:
    """Return what the network should output for the noisy latents: the noise, the velocity or the clean latents.

    Source: Ho et al. 2020 for epsilon; Salimans & Ho 2022, section 4 and appendix D, for the velocity.
    """
    match canonical_prediction_type(prediction_type):
        case "epsilon":
            return noise
        case "v_prediction":
            a, b = per_sample(sqrt_alphas_cumprod, noise), per_sample(sqrt_one_minus_alphas_cumprod, latents)
            return a * noise - b * latents
        case _:
            return latents


def to_denoised(
    prediction_type: str,
    output: Tensor,
    noisy: Tensor,
    sqrt_alphas_cumprod: Tensor | float,
    sqrt_one_minus_alphas_cumprod: Tensor | float,
) -> Tensor:
    """Return the clean estimate that a network's output stands for; epsilon needs sqrt_alphas_cumprod > 0."""
    a, b = per_sample(sqrt_alphas_cumprod, noisy), per_sample(sqrt_one_minus_alphas_cumprod, noisy)
    match canonical_prediction_type(prediction_type):
        case "epsilon":
            return (noisy - b * output) / a
        case "v_prediction":
            return a * noisy - b * output
        case _:
            return output
