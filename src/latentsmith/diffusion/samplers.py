"""Samplers: from noise to latents with any denoiser.

One shared form. A sampler is a generator function of (denoise, latents, sigmas, ...):

    denoise: (noisy, sigma) -> clean estimate, both of noisy's shape; sigma is a number (or one per sample).
    latents: (batch, channels, height, width), noise of standard deviation sqrt(1 + sigmas[0]^2) or so.
    sigmas: (steps + 1,), decreasing, usually ending at 0: noisy = latents + sigma * noise at each.

It yields a Step after each of its steps, so the caller owns progress, previews and stopping, and the last Step's
latents are the result. Random ones take `noise_sampler`, a callable step -> unit noise of the latents' shape,
and nothing from global state. `sample` runs one by its name over a SamplingSchedule, from unit noise to finished
latents.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .denoiser import as_output, signal_and_noise_of
from .parameterization import to_denoised
from .sampler_names import canonical_sampler
from .schedule import NoiseSchedule, per_sample
from .spacing import SamplingSchedule, SpacingRule, build_sampling_schedule

Denoise = Callable[[Tensor, Tensor | float], Tensor]
NoiseAt = Callable[[int], Tensor]

# Weights of the newest, second newest, ... value in an Adams-Bashforth step of order 1, 2, 3, 4.
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@dataclass(frozen=True, eq=False)
class Step:
    """index: of the step done, from 0. latents: at sigmas[index + 1]. denoised: the clean estimate that led there."""

    index: int
    latents: Tensor
    denoised: Tensor


def ancestral_levels(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """How a step from sigma to sigma_next parts: the level it goes down to, and the noise it then adds.

    eta: 0 adds none, 1 as much as the reverse of the forward process does.
    Source: Song et al. 2021, equation 16, times sqrt(1 + sigma_next^2).
    """
    added = eta * sigma_next * max(0.0, 1 - (sigma_next / sigma) ** 2) ** 0.5
    return max(0.0, sigma_next**2 - added**2) ** 0.5, added


def sample_ddim(
    denoise: Denoise,
    latents: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 0.0,
    noise_sampler: NoiseAt | None = None,
    step_targets: Tensor | None = None,
) -> Iterator[Step]:
    """DDIM; the same formula is Euler's method (eta 0) and, with eta 1, DDPM and Euler ancestral.

    eta: in [0, 1], the share of random noise; above 0 it needs noise_sampler.
    step_targets: (steps,), as in SamplingSchedule, where not sigmas[1:].
    Source: Song et al. 2021, equation 12.
    """
    aims = (sigmas[1:] if step_targets is None else step_targets).tolist()
    for index, ((sigma, sigma_next), aim) in enumerate(zip(pairwise(sigmas.tolist()), aims, strict=True)):
        denoised = denoise(latents, sigma)
        down, added = ancestral_levels(sigma, aim, eta)
        latents = denoised + (latents - denoised) * (down / sigma)
        if added > 0:
            latents = latents + _noise(noise_sampler, index) * added
        if aim != sigma_next:
            latents = latents * ((1 + sigma_next**2) / (1 + aim**2)) ** 0.5
        yield Step(index, latents, denoised)


def sample_plms(denoise: Denoise, latents: Tensor, sigmas: Tensor, *, averaged: str = "epsilon") -> Iterator[Step]:
    """Pseudo linear multistep: DDIM steps along an Adams-Bashforth average of past network outputs; steps + 1 calls.

    averaged: the prediction_type whose outputs are averaged. "epsilon" is the method's own, whatever the network
        predicts, as in LDM and NeMo; diffusers averages what the network predicts.
    Source: Liu et al. 2022, "Pseudo numerical methods for diffusion models on manifolds", equations 11 to 14.
    """
    levels, past = sigmas.tolist(), list[Tensor]()
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        past = [as_output(averaged, denoise(latents, sigma), latents, sigma), *past[:3]]
        output = _weighted(ADAMS_BASHFORTH[len(past) - 1], past)
        signal, noise_level = signal_and_noise_of(sigma, latents)
        denoised = to_denoised(averaged, output, latents * signal, signal, noise_level)
        proposed = denoised + (latents - denoised) * (sigma_next / sigma)
        if index == 0 and len(levels) > 2:  # no past yet: Heun's average of both ends of the step
            output = (output + as_output(averaged, denoise(proposed, sigma_next), proposed, sigma_next)) / 2
            denoised = to_denoised(averaged, output, latents * signal, signal, noise_level)
            proposed = denoised + (latents - denoised) * (sigma_next / sigma)
        latents = proposed
        yield Step(index, latents, denoised)


def sample_heun(denoise: Denoise, latents: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """Heun's second-order method for d(latents) / d(sigma) = (latents - denoised) / sigma; 2 * steps - 1 calls.

    Source: Karras et al. 2022, algorithm 1, with sigma(t) = t.
    """
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(latents, sigma)
        slope = (latents - denoised) / sigma
        proposed = latents + (sigma_next - sigma) * slope
        if sigma_next > 0:
            denoised = denoise(proposed, sigma_next)
            slope = (slope + (proposed - denoised) / sigma_next) / 2
        latents = latents + (sigma_next - sigma) * slope
        yield Step(index, latents, denoised)


def sample_lms(denoise: Denoise, latents: Tensor, sigmas: Tensor, *, order: int = 4) -> Iterator[Step]:
    """Linear multistep: integrates the polynomial through the last `order` slopes (at most 4) over each step.

    Source: Adams-Bashforth on uneven steps; Karras' k-diffusion made it a sampler.
    """
    if not 1 <= order <= 4:
        raise ValueError(f"order is {order}; linear multistep takes 1 to 4")
    levels, past = sigmas.tolist(), list[Tensor]()
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(latents, sigma)
        past = [(latents - denoised) / sigma, *past[: order - 1]]
        known = levels[index::-1][: len(past)]
        latents = latents + _weighted(_lagrange_integrals(known, sigma, sigma_next), past)
        yield Step(index, latents, denoised)


def sample_dpmsolver_multistep(
    denoise: Denoise, latents: Tensor, sigmas: Tensor, *, eta: float = 0.0, noise_sampler: NoiseAt | None = None
) -> Iterator[Step]:
    """DPM-Solver++(2M), and with eta 1 its SDE form; second order, one call a step, first order at both ends.

    eta: in [0, 1], the share of random noise; above 0 it needs noise_sampler.
    Source: Lu et al. 2022, "DPM-Solver++", algorithm 2 (midpoint) and appendix on SDE-DPM-Solver++(2M).
    """
    levels, previous = sigmas.tolist(), None
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(latents, sigma)
        estimate = denoised
        if previous is not None and sigma_next > 0:
            estimate = _extrapolated(denoised, previous, levels[index - 1 : index + 2])
        ratio = sigma_next / sigma
        latents = estimate + (latents - estimate) * ratio ** (1 + eta)
        if eta > 0 and sigma_next > 0:
            latents = latents + _noise(noise_sampler, index) * (sigma_next * (1 - ratio ** (2 * eta)) ** 0.5)
        previous = denoised
        yield Step(index, latents, denoised)


def sample_dpmsolver_singlestep(denoise: Denoise, latents: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """DPM-Solver++(2S): steps in pairs, the first a plain one to the middle, the second over both; the last is plain.

    Source: Lu et al. 2022, "DPM-Solver++", algorithm 1, with the middles taken from the grid.
    """
    levels = sigmas.tolist()
    start, first = latents, latents
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(latents, sigma)
        if index % 2 == 1 and index < len(levels) - 2:
            begin = levels[index - 1]
            share = math.log(begin / sigma) / math.log(begin / sigma_next)
            estimate = first + (denoised - first) / (2 * share)
            latents = estimate + (start - estimate) * (sigma_next / begin)
        else:
            start, first = latents, denoised
            latents = denoised + (latents - denoised) * (sigma_next / sigma)
        yield Step(index, latents, denoised)


def sample_unipc(denoise: Denoise, latents: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """UniPC of order 2, variant B2 on data predictions: DPM-Solver++(2M) steps, each corrected by the next call.

    Source: Zhao et al. 2023, "UniPC", algorithms 5 and 6.
    """
    levels, past, start = sigmas.tolist(), list[Tensor](), latents
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(latents, sigma)
        if past:
            estimate = _corrected(denoised, past, levels[max(0, index - len(past)) : index + 1])
            latents = estimate + (start - estimate) * (sigma / levels[index - 1])
        estimate = denoised
        if past and sigma_next > 0:
            estimate = _extrapolated(denoised, past[0], levels[index - 1 : index + 2])
        past, start = [denoised, *past[:1]], latents
        latents = estimate + (latents - estimate) * (sigma_next / sigma)
        yield Step(index, latents, denoised)


def sample_para_ddim(
    denoise: Denoise, latents: Tensor, sigmas: Tensor, *, parallelism: int = 8, tolerance: float = 0.1
) -> Iterator[Step]:
    """DDIM (eta 0) by Picard iteration: a window of steps in one batch, repeated until it no longer changes.

    parallelism: steps in the window; one call serves parallelism * batch samples, step by step, each with its sigma.
    tolerance: a step is done when its mean squared change is at most tolerance^2 times the variance that DDPM would
        add there; 0 gives DDIM's own result, in as many rounds as steps at worst.
    Source: Shih et al. 2023, "Parallel sampling of diffusion models", algorithm 1: since d(latents) / d(sigma) is the
    slope, every state is the start plus the sum of slopes times differences of sigma.
    """
    if parallelism < 1 or not tolerance >= 0:
        raise ValueError(f"parallelism {parallelism} must be at least 1 and tolerance {tolerance} at least 0")
    levels, begin, batch = sigmas.tolist(), 0, len(latents)
    steps = len(levels) - 1
    window = latents.expand(min(parallelism, steps), *latents.shape)  # guesses of the states at levels[begin:]
    while begin < steps:
        ends = list(pairwise(levels[begin : begin + len(window) + 1]))
        repeated = torch.tensor([sigma for sigma, _ in ends], dtype=torch.float64).repeat_interleave(batch)
        denoised = denoise(window.flatten(0, 1), repeated).view_as(window)
        relative = per_sample(window.new_tensor([(after - sigma) / sigma for sigma, after in ends]), window)
        states = window[0] + ((window - denoised) * relative).cumsum(0)  # at levels[begin + 1:]
        allowed = [(tolerance * ancestral_levels(sigma, after, 1.0)[1]) ** 2 for sigma, after in ends]
        done = _settled(states[:-1], window[1:], allowed)
        for offset in range(done):
            yield Step(begin + offset, states[offset], denoised[offset])
        begin += done
        guesses, size = states[done - 1 :], min(parallelism, steps - begin)
        window = torch.cat([guesses, guesses[-1:].expand(len(window), *latents.shape)])[:size]


def _settled(states: Tensor, before: Tensor, allowed: Sequence[float]) -> int:
    """How many steps at the window's front are done: the first always is, its start being final."""
    changes = ((states - before) ** 2).flatten(1).mean(1).tolist()
    done = 1
    for change, limit in zip(changes, allowed, strict=False):
        if change > limit:
            break
        done += 1
    return done


@dataclass(frozen=True)
class Sampler:
    """solve: the generator function. rule: the noise levels it visits. random: it always draws from noise_sampler."""

    solve: Callable[..., Iterator[Step]]
    rule: SpacingRule
    random: bool = False


_EVERY_LEVEL = SpacingRule("linspace", fractional=True)
_ALL_BUT_LAST = SpacingRule("linspace", extra_point=True)

# Defaults of the grids are those of diffusers' schedulers.
SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(sample_ddim, SpacingRule("leading", fixed_stride=True, set_alpha_to_one=True)),
    "ddpm": Sampler(partial(sample_ddim, eta=1.0), SpacingRule("leading"), random=True),
    "plms": Sampler(sample_plms, SpacingRule("leading", set_alpha_to_one=False)),
    "dpmsolver++": Sampler(sample_dpmsolver_multistep, _ALL_BUT_LAST),
    "dpmsolver++_sde": Sampler(partial(sample_dpmsolver_multistep, eta=1.0), _ALL_BUT_LAST, random=True),
    "dpmsolver++_singlestep": Sampler(sample_dpmsolver_singlestep, _ALL_BUT_LAST),
    "euler": Sampler(sample_ddim, _EVERY_LEVEL),
    "euler_a": Sampler(partial(sample_ddim, eta=1.0), _EVERY_LEVEL, random=True),
    "heun": Sampler(sample_heun, _EVERY_LEVEL),
    "lms": Sampler(sample_lms, _EVERY_LEVEL),
    "unipc": Sampler(sample_unipc, _ALL_BUT_LAST),
    "para_ddim": Sampler(sample_para_ddim, SpacingRule("leading", set_alpha_to_one=True)),
}


def sampling_schedule(
    schedule: NoiseSchedule,
    sampler: str,
    steps: int,
    *,
    spacing: str | None = None,
    steps_offset: int = 0,
    set_alpha_to_one: bool | None = None,
    karras: bool = False,
) -> SamplingSchedule:
    """The noise levels and timesteps that a sampler visits, as diffusers' scheduler of the same settings has them.

    sampler: a name of SAMPLERS or an alias; one that ends in "Karras" asks for karras too.
    spacing: "leading", "trailing" or "linspace"; None takes the sampler's own.
    steps_offset: added to "leading" timesteps; published Stable Diffusion configs say 1.
    set_alpha_to_one: for ddim, plms and para_ddim, whether the grid ends at sigma 0 (True) or at that of timestep 0;
        None takes the sampler's own; published Stable Diffusion configs say False. All others end at 0.
    karras: levels of Karras et al. 2022 instead of the spaced timesteps'.
    A terminal alphas_cumprod of 0 counts as 2^-24.
    Raises ValueError for an unknown sampler or spacing and for steps that the schedule does not have.
    """
    name, named_karras = canonical_sampler(sampler, SAMPLERS)
    return build_sampling_schedule(
        schedule,
        SAMPLERS[name].rule,
        steps,
        spacing=spacing,
        steps_offset=steps_offset,
        set_alpha_to_one=set_alpha_to_one,
        karras=karras or named_karras,
    )


def sampling_sigmas(schedule: NoiseSchedule, sampler: str, steps: int, **settings: Any) -> Tensor:
    """(steps + 1,), float64, decreasing: sampling_schedule's levels alone."""
    return sampling_schedule(schedule, sampler, steps, **settings).sigmas


def sample(
    sampler: str,
    denoise: Denoise,
    latents: Tensor,
    grid: SamplingSchedule,
    *,
    noise_sampler: NoiseAt | None = None,
    **options: Any,
) -> Iterator[Step]:
    """Runs a sampler by its name; the last Step's latents are the result, ready for the VAE.

    latents: (batch, channels, height, width), unit noise; scaled here to the grid's start.
    noise_sampler: step -> unit noise, for those samplers (and ddim with eta) that draw some.
    options: the sampler's own: eta, averaged, order, parallelism, tolerance.
    """
    name, _ = canonical_sampler(sampler, SAMPLERS)
    chosen = SAMPLERS[name]
    if chosen.random or options.get("eta", 0) > 0:
        options["noise_sampler"] = noise_sampler
    if chosen.rule.fixed_stride:
        options["step_targets"] = grid.step_targets
    for step in chosen.solve(denoise, latents * grid.start_scale, grid.sigmas, **options):
        last = step.index == grid.steps - 1
        yield replace(step, latents=step.latents / grid.end_scale) if last else step


def _noise(noise_sampler: NoiseAt | None, step: int) -> Tensor:
    if noise_sampler is None:
        raise ValueError("a sampler with eta above 0 needs noise_sampler")
    return noise_sampler(step)


def _weighted(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    total = weights[0] * tensors[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total = total + weight * tensor
    return total


def _lagrange_integrals(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """The integral from start to end of each Lagrange polynomial of these nodes (at most 4 of them)."""
    points, weights = np.polynomial.legendre.leggauss(2)  # exact up to the third degree
    places = (start + end) / 2 + (end - start) / 2 * points
    others = [[node for node in nodes if node != own] for own in nodes]
    values = [
        np.prod([(places - o) / (own - o) for o in rest], axis=0) for own, rest in zip(nodes, others, strict=True)
    ]
    return [float((weights * value).sum() * (end - start) / 2) for value in values]


def _extrapolated(denoised: Tensor, previous: Tensor, levels: Sequence[float]) -> Tensor:
    """The clean estimate halfway through a step, linear in log sigma through the last two.

    levels: of the previous estimate, of this one, and the step's end.
    """
    before, sigma, sigma_next = levels
    return denoised + (denoised - previous) * (math.log(sigma / sigma_next) / math.log(before / sigma) / 2)


def _corrected(denoised: Tensor, past: Sequence[Tensor], levels: Sequence[float]) -> Tensor:
    """UniC's clean estimate for the step that ended at levels[-1], where the network now said `denoised`.

    past: the estimates at the step's start and, if there is one, before it. levels: of the same, oldest first.
    """
    width = math.log(levels[-2] / levels[-1])
    if len(past) == 1:
        return past[0] + (denoised - past[0]) / 2
    place = -math.log(levels[-3] / levels[-2]) / width
    growth = math.expm1(-width)
    first = growth / -width - 1
    second = first / -width - 1 / 2
    older, newer = np.linalg.solve(np.array([[1, 1], [place, 1]]), np.array([first, 2 * second]) / growth)
    return past[0] + (past[1] - past[0]) * (older / place) + (denoised - past[0]) * newer
