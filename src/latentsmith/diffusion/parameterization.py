"""What the network predicts: the training target, and the way back from its output to a clean estimate.

Everywhere here noisy = signal * latents + noise_level * noise with signal**2 + noise_level**2 = 1. `signal` and
`noise_level` are (batch,) tensors or plain numbers, float32 or wider; the tensors are (batch, channels, height, width).
"""

from torch import Tensor

from .schedule import per_sample

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_ALIASES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def canonical_prediction_type(name: str) -> str:
    """ "epsilon", "v_prediction" or "sample" for any of them or for LDM's eps, v, x0; ValueError for another word."""
    known = _ALIASES.get(name, name)
    if known not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type {name!r} is not one of {', '.join((*PREDICTION_TYPES, *_ALIASES))}")
    return known


def training_target(
    prediction_type: str, latents: Tensor, noise: Tensor, signal: Tensor | float, noise_level: Tensor | float
) -> Tensor:
    """What the network should output for the noisy latents: the noise, the velocity or the clean latents.

    Source: Ho et al. 2020 for epsilon; Salimans & Ho 2022, section 4 and appendix D, for v = signal * noise -
    noise_level * latents.
    """
    match canonical_prediction_type(prediction_type):
        case "epsilon":
            return noise
        case "v_prediction":
            return per_sample(signal, noise) * noise - per_sample(noise_level, latents) * latents
        case _:
            return latents


def to_denoised(
    prediction_type: str, output: Tensor, noisy: Tensor, signal: Tensor | float, noise_level: Tensor | float
) -> Tensor:
    """The clean estimate that a network's output stands for; epsilon needs signal > 0."""
    signal, noise_level = per_sample(signal, noisy), per_sample(noise_level, noisy)
    match canonical_prediction_type(prediction_type):
        case "epsilon":
            return (noisy - noise_level * output) / signal
        case "v_prediction":
            return signal * noisy - noise_level * output
        case _:
            return output


def to_epsilon(
    prediction_type: str, output: Tensor, noisy: Tensor, signal: Tensor | float, noise_level: Tensor | float
) -> Tensor:
    """The noise estimate that a network's output stands for; "sample" needs noise_level > 0."""
    signal, noise_level = per_sample(signal, noisy), per_sample(noise_level, noisy)
    match canonical_prediction_type(prediction_type):
        case "epsilon":
            return output
        case "v_prediction":
            return signal * output + noise_level * noisy
        case _:
            return (noisy - signal * output) / noise_level
