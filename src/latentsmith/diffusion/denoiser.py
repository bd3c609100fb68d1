"""A network as a denoiser: the one place that translates noise levels to timesteps.

Samplers speak of noisy = latents + sigma * noise. The network was trained on the same thing scaled to unit variance,
noisy / sqrt(1 + sigma**2) = signal * latents + noise_level * noise, at a timestep.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .parameterization import canonical_prediction_type, to_denoised, training_target
from .schedule import NoiseSchedule, per_sample


def signal_and_noise_of(sigma: Tensor | float, like: Tensor) -> tuple[Any, Any]:
    """1 / sqrt(1 + sigma^2) and sigma / sqrt(1 + sigma^2): numbers, or shaped, typed and placed to multiply `like`."""
    if isinstance(sigma, Tensor):
        signal = (1 + sigma.double().cpu() ** 2).rsqrt()
        pair = (signal, sigma.double().cpu() * signal)
        return tuple(per_sample(each.to(like.dtype), like) for each in pair)  # type: ignore[return-value]
    signal_number = 1 / math.sqrt(1 + sigma**2)
    return signal_number, sigma * signal_number


def tiled(conditioning: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """The conditioning with its tensors repeated along the batch axis until they serve `batch` samples.

    Raises ValueError where `batch` is no multiple of a tensor's own.
    """

    def tile(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or len(value) == batch:
            return value
        if batch % len(value):
            raise ValueError(f"{name} is for {len(value)} samples, which does not divide the {batch} noisy ones")
        return value.repeat(batch // len(value), *[1] * (value.dim() - 1))

    return {name: tile(name, value) for name, value in conditioning.items()}


class Denoiser:
    """The callable (noisy, sigma, **conditioning) -> denoised, the clean estimate of the latents.

    network: (noisy, timesteps, **conditioning) -> output, of the shape of noisy; timesteps are (batch,) float32, since
        a sampler may ask between two of the schedule's.
    prediction_type: what the network predicts: "epsilon", "v_prediction", "sample", or LDM's eps, v, x0.
    timestep_at: sigma -> timestep, where the schedule's own interpolation is not wanted (SamplingSchedule has one).
    Raises ValueError for an unknown prediction_type.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        schedule: NoiseSchedule,
        prediction_type: str = "epsilon",
        *,
        timestep_at: Callable[[float], float] | None = None,
    ) -> None:
        self.network = network
        self.prediction_type = canonical_prediction_type(prediction_type)
        self.timestep_at = timestep_at or schedule.timestep_at

    def __call__(self, noisy: Tensor, sigma: Tensor | float, **conditioning: Any) -> Tensor:
        """noisy: (batch, channels, height, width). sigma: a number, or one per sample, (batch,); above 0.

        conditioning: what the network takes besides (context=...); tensors for fewer samples are repeated.
        """
        return self.from_output(self.output(noisy, sigma, **conditioning), noisy, sigma)

    def output(self, noisy: Tensor, sigma: Tensor | float, **conditioning: Any) -> Tensor:
        """What the network itself says of the noisy latents, in their dtype."""
        signal, _ = signal_and_noise_of(sigma, noisy)
        timesteps = self._timesteps(sigma, len(noisy)).to(noisy.device)
        return self.network(noisy * signal, timesteps, **tiled(conditioning, len(noisy))).to(noisy.dtype)

    def from_output(self, output: Tensor, noisy: Tensor, sigma: Tensor | float) -> Tensor:
        """The clean estimate that an output for these noisy latents stands for."""
        signal, noise_level = signal_and_noise_of(sigma, noisy)
        return to_denoised(self.prediction_type, output, noisy * signal, signal, noise_level)

    def as_output(self, denoised: Tensor, noisy: Tensor, sigma: Tensor | float) -> Tensor:
        """The inverse of from_output: what the network would have to say for this clean estimate."""
        return as_output(self.prediction_type, denoised, noisy, sigma)

    def _timesteps(self, sigma: Tensor | float, batch: int) -> Tensor:
        levels = sigma.tolist() if isinstance(sigma, Tensor) else sigma
        if isinstance(levels, list):
            return torch.tensor([self.timestep_at(level) for level in levels], dtype=torch.float32)
        return torch.full((batch,), self.timestep_at(levels), dtype=torch.float32)


def as_output(prediction_type: str, denoised: Tensor, noisy: Tensor, sigma: Tensor | float) -> Tensor:
    """What a network of this kind says when its clean estimate of noisy = latents + sigma * noise is `denoised`."""
    signal, noise_level = signal_and_noise_of(sigma, noisy)
    noise = (noisy * signal - signal * denoised) / noise_level
    return training_target(prediction_type, denoised, noise, signal, noise_level)
