"""The forward process q(noisy | latents) = N(sqrt(a) * latents, 1 - a): what `a`, alphas_cumprod, is at each timestep.

Tables are float64 and stay on the CPU. Coefficients are cast where they are used, the table never: in bfloat16 the
first two of Stable Diffusion's 1,000 timesteps would get no noise at all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import torch
from torch import Tensor

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "cosine", "sqrt")
LDM_BETA_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine", "sqrt": "sqrt"}
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")

COSINE_OFFSET = 8e-3  # Nichol & Dhariwal 2021, section 3.2

# Stands for alphas_cumprod = 0 while sampling, where sigma must be finite (4096): the smallest positive float16.
SMALLEST_ALPHA_CUMPROD = 2.0**-24


def per_sample(coefficient: Tensor | float, like: Tensor) -> Tensor | float:
    """Return a (batch,) coefficient shaped to multiply `like`, (batch, ...), on its device; other numbers stay."""
    if isinstance(coefficient, Tensor) and coefficient.dim() == 1:
        return coefficient.to(like.device).view(-1, *[1] * (like.dim() - 1))
    return coefficient


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """alphas_cumprod: (timesteps,), float64 on the CPU, strictly decreasing, in [0, 1); 0 only at the very end.

    Raises ValueError for a table that is not such.
    """

    alphas_cumprod: Tensor

    def __post_init__(self) -> None:
        table = self.alphas_cumprod
        if table.dim() != 1 or len(table) == 0 or table.dtype != torch.float64 or table.device.type != "cpu":
            raise ValueError(
                f"alphas_cumprod is {table.dtype} of shape {tuple(table.shape)} on {table.device}; "
                "give one row of float64 on the CPU"
            )
        if not (table[0] < 1 and table[-1] >= 0 and (table.diff() < 0).all()):
            raise ValueError("alphas_cumprod must decrease strictly, start below 1 and not fall below 0")

    @classmethod
    def from_config(
        cls,
        linear_start: float = 0.00085,
        linear_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        timesteps: int = 1000,
        *,
        cosine_s: float = COSINE_OFFSET,
    ) -> Self:
        """Make a schedule by its betas, from linear_start to linear_end; the defaults are Stable Diffusion's.

        beta_schedule: diffusers' names: "scaled_linear" (sqrt(beta) runs linearly), "linear" (beta does), "sqrt" (beta
        squared does), "squaredcos_cap_v2" (Nichol & Dhariwal 2021, equation 17; no start and end) or "cosine" (the
        same with offset cosine_s). ldm_beta_schedule translates LDM's and NeMo's, whose "linear" is "scaled_linear".
        Raises ValueError for an unknown name or for numbers that describe no schedule.
        """
        if timesteps < 1:
            raise ValueError(f"timesteps is {timesteps}; at least 1 is needed")
        if not 0 < linear_start <= linear_end < 1:
            raise ValueError(f"linear_start {linear_start} and linear_end {linear_end} must rise within (0, 1)")
        betas = _betas(linear_start, linear_end, beta_schedule, timesteps, cosine_s)
        return cls(torch.cumprod(1 - betas, dim=0))

    @classmethod
    def from_betas(cls, betas: Sequence[float]) -> Self:
        """Make a schedule of the betas themselves. Raises ValueError unless each lies within (0, 1)."""
        table = torch.tensor(list(betas), dtype=torch.float64)
        if not len(table) or not ((table > 0) & (table < 1)).all():
            raise ValueError("betas must be numbers above 0 and below 1")
        return cls(torch.cumprod(1 - table, dim=0))

    @property
    def timesteps(self) -> int:
        """Return how many timesteps there are; they count 0 .. timesteps - 1."""
        return len(self.alphas_cumprod)

    @property
    def betas(self) -> Tensor:
        """Return (timesteps,), float64: the variance each timestep adds, 1 - a[t] / a[t - 1] with a[-1] = 1."""
        previous = torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod[:-1]])
        return 1 - self.alphas_cumprod / previous

    @property
    def snr(self) -> Tensor:
        """Return (timesteps,), float64: the signal-to-noise ratio a / (1 - a)."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    @property
    def sigmas(self) -> Tensor:
        """Return (timesteps,), float64: noise relative to signal, sqrt((1 - a) / a); infinite where a is 0."""
        return self.snr.rsqrt()

    def coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt_alphas_cumprod and sqrt_one_minus_alphas_cumprod at integer timesteps: float32, of their shape.

        Timesteps on the CPU cost no device synchronisation; the float64 arithmetic never leaves the CPU.
        """
        scale, noise_scale = self._coefficients
        device, timesteps = timesteps.device, timesteps.cpu()
        return scale[timesteps].to(device), noise_scale[timesteps].to(device)

    @cached_property
    def _coefficients(self) -> tuple[Tensor, Tensor]:
        return self.alphas_cumprod.sqrt().float(), (1 - self.alphas_cumprod).sqrt().float()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return a sample of q(noisy | latents): sqrt(a) * latents + sqrt(1 - a) * noise, float32 or wider.

        latents, noise: (batch, channels, height, width), of unit variance.
        timesteps: (batch,), integers in [0, timesteps).
        Source: Ho et al. 2020, equation 4.
        """
        scale, noise_scale = self.coefficients(timesteps)
        return per_sample(scale, latents) * latents + per_sample(noise_scale, noise) * noise

    def zero_terminal_snr(self) -> Self:
        """Return the schedule stretched until its last timestep is pure noise (a = 0), its first unchanged.

        Only "v_prediction" and "sample" have meaning there: epsilon does not determine the image where all is noise.
        Source: Lin et al. 2023, "Common diffusion noise schedules and sample steps are flawed", algorithm 1.
        """
        if self.timesteps < 2:
            raise ValueError("zero terminal SNR needs a schedule of at least 2 timesteps")
        scales = self.alphas_cumprod.sqrt()
        stretched = (scales - scales[-1]) * (scales[0] / (scales[0] - scales[-1]))
        stretched[0] = scales[0]  # exactly, not to rounding
        return type(self)(stretched**2)

    def for_sampling(self) -> Self:
        """Return this schedule with a terminal a = 0 replaced by 2^-24, so that every sigma is finite."""
        if self.alphas_cumprod[-1] > 0:
            return self
        return type(self)(torch.cat([self.alphas_cumprod[:-1], torch.tensor([SMALLEST_ALPHA_CUMPROD]).double()]))

    def sampling_timesteps(self, steps: int, spacing: str = "leading", steps_offset: int = 0) -> Tensor:
        """Return (steps,), int64, decreasing: the timesteps at which a sampler of so many steps calls the network.

        spacing: "leading" (multiples of timesteps // steps, plus steps_offset), "trailing" (ends at the last timestep
        and counts down by timesteps / steps) or "linspace" (both ends included).
        Raises ValueError for an unknown spacing and for steps or steps_offset that leave the schedule.
        Source: Lin et al. 2023, table 2; rounding as diffusers does it.
        """
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"steps is {steps}; this schedule allows 1 to {self.timesteps}")
        timesteps = self.spaced_timesteps(steps, spacing, steps_offset).round().long()
        if timesteps[0] >= self.timesteps:
            raise ValueError(
                f"steps {steps} with steps_offset {steps_offset} starts at timestep {int(timesteps[0])}, "
                f"past the last, {self.timesteps - 1}; use fewer steps or spacing trailing"
            )
        return timesteps

    def spaced_timesteps(self, steps: int, spacing: str, steps_offset: int = 0) -> Tensor:
        """Return sampling_timesteps before "linspace" is rounded to whole timesteps: (steps,), float64, decreasing."""
        match spacing:  # in NumPy, whose last bits decide which way a half is rounded: as diffusers has it
            case "leading":
                spaced = np.arange(steps, dtype=np.float64)[::-1] * (self.timesteps // steps) + steps_offset
            case "trailing":
                spaced = np.arange(self.timesteps, 0, -self.timesteps / steps)[:steps].round() - 1
            case "linspace":
                spaced = np.linspace(0, self.timesteps - 1, steps)[::-1]
            case _:
                raise ValueError(f"timestep_spacing {spacing!r} is not one of {', '.join(TIMESTEP_SPACINGS)}")
        return torch.from_numpy(spaced.copy())

    def timestep_at(self, sigma: float) -> float:
        """Return the fractional timestep of a sigma, interpolated in log sigma, within [0, timesteps - 1].

        Source: Karras et al. 2022, appendix C.3, for a schedule of discrete sigmas.
        """
        log_sigmas = self.for_sampling().sigmas.log()
        log_sigma = math.log(sigma) if sigma > 0 else -math.inf
        above = int(torch.searchsorted(log_sigmas, log_sigma))
        if above == 0 or above == self.timesteps:
            return float(min(above, self.timesteps - 1))
        low, high = log_sigmas[above - 1 : above + 1].tolist()
        return float(above - 1 + (log_sigma - low) / (high - low))


def ldm_beta_schedule(name: str) -> str:
    """Return the name of from_config for one of LDM's or NeMo's, as config files and ModelSpec have them."""
    if name not in LDM_BETA_SCHEDULES:
        raise ValueError(f"beta_schedule {name!r} is not one of {', '.join(LDM_BETA_SCHEDULES)}")
    return LDM_BETA_SCHEDULES[name]


def _cosine_betas(timesteps: int, offset: float) -> Tensor:
    angles = (torch.arange(timesteps + 1, dtype=torch.float64) / timesteps + offset) / (1 + offset)
    alphas_cumprod = (angles * math.pi / 2).cos() ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(0, 0.999)


def _betas(start: float, end: float, beta_schedule: str, timesteps: int, cosine_s: float) -> Tensor:
    match beta_schedule:
        case "scaled_linear":
            return torch.linspace(start**0.5, end**0.5, timesteps, dtype=torch.float64) ** 2
        case "linear":
            return torch.linspace(start, end, timesteps, dtype=torch.float64)
        case "sqrt":
            return torch.linspace(start, end, timesteps, dtype=torch.float64).sqrt()
        case "squaredcos_cap_v2":
            return _cosine_betas(timesteps, COSINE_OFFSET)
        case "cosine":
            return _cosine_betas(timesteps, cosine_s)
        case _:
            raise ValueError(f"beta_schedule {beta_schedule!r} is not one of {', '.join(BETA_SCHEDULES)}")
