"""Classifier-free guidance: combine the conditional and unconditional predictions (Ho & Salimans 2022)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoiser, tiled
from .schedule import per_sample


class GuidedDenoiser:
    """The callable (noisy, sigma) -> uncond + guidance_scale * (cond - uncond).

    conditioning, null_conditioning: other inputs of the network (context=...) for the prompts, and for the null text or
        the negative prompts; null_conditioning may be None where guidance_scale is 1.
    guidance_scale: a number or one per sample, (batch,). 1 is off: the denoiser is called with the prompts alone.
    rescale: in [0, 1], how far the standard deviation of the guided output is moved back to that of the conditional
        one, which keeps strong guidance from overexposing (Lin et al. 2023, equations 14 to 16, on network outputs).
    one_batch: both predictions in one call of twice the batch; False makes two calls, slower but with half the memory.
    Raises ValueError for a guidance_scale or rescale that is no such number and for missing null conditioning.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        conditioning: Mapping[str, Any],
        null_conditioning: Mapping[str, Any] | None,
        guidance_scale: Tensor | float,
        *,
        rescale: float = 0.0,
        one_batch: bool = True,
    ) -> None:
        scales = guidance_scale.tolist() if isinstance(guidance_scale, Tensor) else [guidance_scale]
        if not all(math.isfinite(scale) for scale in scales):
            raise ValueError(f"guidance_scale is {guidance_scale}; it must be a finite number")
        if not 0 <= rescale <= 1:
            raise ValueError(f"guidance rescale is {rescale}; it must be between 0 and 1")
        self.off = all(scale == 1 for scale in scales)
        if null_conditioning is None and not self.off:
            raise ValueError("guidance_scale other than 1 needs null_conditioning")
        self.denoiser, self.guidance_scale, self.rescale = denoiser, guidance_scale, rescale
        self.conditioning, self.null_conditioning = conditioning, null_conditioning or {}
        self.one_batch = one_batch

    def __call__(self, noisy: Tensor, sigma: Tensor | float) -> Tensor:
        """Return the guided estimate. noisy: (batch, channels, height, width). sigma: a number or one per sample."""
        if self.off:
            return self.denoiser(noisy, sigma, **self.conditioning)
        cond, uncond = self._outputs(noisy, sigma)
        scale = self._scale(noisy)
        guided = uncond + scale * (cond - uncond)
        if self.rescale > 0:
            guided = self._rescaled(guided, cond)
        if isinstance(scale, Tensor):
            guided = torch.where(scale == 1, cond, guided)  # exactly, and whatever the null text gives
        return self.denoiser.from_output(guided, noisy, sigma)

    def _outputs(self, noisy: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return the network's outputs (cond, uncond): for the prompts, and for the null text."""
        if not self.one_batch:
            cond = self.denoiser.output(noisy, sigma, **self.conditioning)
            return cond, self.denoiser.output(noisy, sigma, **self.null_conditioning)
        both_sigmas = torch.cat([sigma, sigma]) if isinstance(sigma, Tensor) and sigma.dim() else sigma
        both = _joined(tiled(self.conditioning, len(noisy)), tiled(self.null_conditioning, len(noisy)))
        cond, uncond = self.denoiser.output(torch.cat([noisy, noisy]), both_sigmas, **both).chunk(2)
        return cond, uncond

    def _scale(self, noisy: Tensor) -> Tensor | float:
        if not isinstance(self.guidance_scale, Tensor):
            return self.guidance_scale
        scales = tiled({"guidance_scale": self.guidance_scale.flatten()}, len(noisy))["guidance_scale"]
        return per_sample(scales.to(noisy.dtype), noisy)

    def _rescaled(self, guided: Tensor, cond: Tensor) -> Tensor:
        axes = tuple(range(1, guided.dim()))
        matched = guided * (cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True))
        return self.rescale * matched + (1 - self.rescale) * guided


def _joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Join two conditionings into one of twice the batch."""
    if first.keys() != second.keys():
        raise ValueError(f"conditioning has {sorted(first)}, null_conditioning {sorted(second)}; give both the same")
    joined = {}
    for name, value in first.items():
        if isinstance(value, Tensor) and value.shape[1:] != second[name].shape[1:]:
            raise ValueError(
                f"{name} is {tuple(value.shape)} with prompts and {tuple(second[name].shape)} without; "
                "make them equally long or set one_batch to False"
            )
        joined[name] = torch.cat([value, second[name]]) if isinstance(value, Tensor) else value
    return joined
