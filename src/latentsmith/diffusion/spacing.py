"""The sigmas a sampler visits, as diffusers' scheduler of the same name and settings has them."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from .schedule import NoiseSchedule

SAME_SIGMA = 1e-5  # relative: rounding to float32 moves a sigma by 6e-8, those of a schedule are 3e-3 apart


@dataclass(frozen=True)
class SpacingRule:
    """Rule by which one sampler chooses its sigmas.

    spacing: the timestep_spacing it takes when none is asked for.
    extra_point: it spaces steps + 1 timesteps and drops the last ("leading" and "linspace"), and its Karras sigmas
        span the whole noise schedule at rounded timesteps; otherwise those that it would visit, at fractional ones.
    fractional: "linspace" is not rounded to whole timesteps, and unless spacing is "leading" it starts from noise of
        standard deviation sigma_start rather than sqrt(1 + sigma_start^2).
    fixed_stride: the target of each step is its timestep minus timesteps // steps, wherever the next one may be.
    set_alpha_to_one: whether it ends at sigma 0 when nothing is asked for; None always ends there.
    """

    spacing: str
    extra_point: bool = False
    fractional: bool = False
    fixed_stride: bool = False
    set_alpha_to_one: bool | None = None


@dataclass(frozen=True, eq=False)
class SamplingSchedule:
    """sigmas: (steps + 1,), float64, decreasing: those visited; the last is where the result lies, mostly 0.

    timesteps: (steps,), float64: what the network is given at each of them but the last.
    step_targets: (steps,), float64: target sigma of each step. Equals sigmas[1:] except for DDIM when `steps` does not
        divide the schedule; the latents are then rescaled, as diffusers does.
    start_scale: unit-variance noise times this starts the sampler.
    noise_schedule: the schedule whose sigmas these are; it has the timesteps of sigmas between them.
    """

    sigmas: Tensor
    timesteps: Tensor
    step_targets: Tensor
    start_scale: float
    noise_schedule: NoiseSchedule

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @cached_property
    def end_scale(self) -> float:
        """Return the divisor of the sampler's result to unit variance: not 1 only where the sigmas end above 0."""
        return math.sqrt(1 + self.sigmas[-1].item() ** 2)

    @property
    def shared_timesteps(self) -> int:
        """Count the steps at a timestep whose sigmas span more than a factor of 2."""
        groups = [self.sigmas[:-1][self.timesteps == timestep] for timestep in self.timesteps.unique()]
        return sum(len(group) for group in groups if group[0] > 2 * group[-1])

    def timestep_at(self, sigma: float) -> float:
        """Return the timestep of a sigma, for Denoiser(timestep_at=...): a visited one's own, else interpolated."""
        nearest = int((self.sigmas[:-1] - sigma).abs().argmin())
        if abs(self.sigmas[nearest].item() - sigma) <= SAME_SIGMA * sigma:
            return self.timesteps[nearest].item()
        return self.noise_schedule.timestep_at(sigma)

    def from_step(self, start: int) -> Self:
        """Return the rest from step `start` on, for latents that begin as a noised image, not as pure noise."""
        if not 0 <= start < self.steps:
            raise ValueError(f"start {start} leaves no step of {self.steps}")
        scale = (1 + self.sigmas[start].item() ** 2) ** 0.5 if start else self.start_scale
        rest = (self.sigmas[start:], self.timesteps[start:], self.step_targets[start:])
        return type(self)(*rest, scale, self.noise_schedule)


def build_sampling_schedule(
    schedule: NoiseSchedule,
    rule: SpacingRule,
    steps: int,
    *,
    spacing: str | None = None,
    steps_offset: int = 0,
    set_alpha_to_one: bool | None = None,
    karras: bool = False,
) -> SamplingSchedule:
    """Build what sampling.sampling_schedule returns, by a sampler's rule."""
    schedule = schedule.for_sampling()
    table, spacing = schedule.sigmas, spacing or rule.spacing
    timesteps = _visited_timesteps(schedule, rule, steps, spacing, steps_offset)
    sigmas = _interpolated(table, timesteps)
    if karras:
        largest, smallest = (table[-1], table[0]) if rule.extra_point else (sigmas[0], sigmas[-1])
        sigmas = karras_sigmas(steps, smallest.item(), largest.item())
        timesteps = torch.tensor([schedule.timestep_at(sigma) for sigma in sigmas.tolist()], dtype=torch.float64)
        timesteps = timesteps.round() if rule.extra_point else timesteps
    end = table.new_zeros(1) if _ends_at_zero(rule, set_alpha_to_one) else table[:1]
    step_targets = torch.cat([sigmas[1:], end])
    if rule.fixed_stride and not karras:
        targets = timesteps.long() - schedule.timesteps // steps
        step_targets = torch.where(targets >= 0, table[targets.clamp(min=0)], end)
    plain_start = rule.fractional and spacing != "leading"
    start_scale = sigmas[0].item() if plain_start else (1 + sigmas[0].item() ** 2) ** 0.5
    return SamplingSchedule(torch.cat([sigmas, step_targets[-1:]]), timesteps, step_targets, start_scale, schedule)


def karras_sigmas(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Return (n,), float64: sigmas from sigma_max down to sigma_min, even in sigma^(1/rho); no 0 follows them.

    Source: Karras et al. 2022, equation 5; section 3 finds images best with rho from 5 to 10.
    """
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    sigmas: Tensor = (sigma_max ** (1 / rho) * (1 - ramp) + sigma_min ** (1 / rho) * ramp) ** rho
    return sigmas


def _visited_timesteps(
    schedule: NoiseSchedule, rule: SpacingRule, steps: int, spacing: str, steps_offset: int
) -> Tensor:
    if rule.extra_point and spacing != "trailing":
        if not 1 <= steps < schedule.timesteps:
            raise ValueError(f"steps is {steps}; this sampler and schedule allow 1 to {schedule.timesteps - 1}")
        return schedule.sampling_timesteps(steps + 1, spacing, steps_offset)[:-1].double()
    timesteps = schedule.sampling_timesteps(steps, spacing, steps_offset).double()
    return schedule.spaced_timesteps(steps, spacing, steps_offset) if rule.fractional else timesteps


def _interpolated(table: Tensor, timesteps: Tensor) -> Tensor:
    """Return the table's sigmas at fractional timesteps, linear between whole ones."""
    below = timesteps.long().clamp(max=len(table) - 1)
    above = (below + 1).clamp(max=len(table) - 1)
    return table[below] + (timesteps - below) * (table[above] - table[below])


def _ends_at_zero(rule: SpacingRule, set_alpha_to_one: bool | None) -> bool:
    if rule.set_alpha_to_one is None:
        return True
    return rule.set_alpha_to_one if set_alpha_to_one is None else set_alpha_to_one
