"""Samplers: from noise to latents with any denoiser.

One shared form. A sampler is a generator function of (denoise, latents, sigmas, ...):

    denoise: (noisy, sigma) -> clean estimate, both of noisy's shape; sigma is a number (or one per sample).
    latents: (batch, channels, height, width), noise of standard deviation sqrt(1 + sigmas[0]^2) or so.
    sigmas: (steps + 1,), decreasing, usually ending at 0: noisy = latents + sigma * noise at each.

It yields a Step after each of its steps, so the caller owns progress, previews and stopping, and the last Step's
latents are the result. Random ones take `noise_sampler`, a callable step -> unit noise of the latents' shape, and
nothing from global state. `register` gives a sampler its names, from which the command line, NeMo's keys and the
metadata of images follow; `sampling.sample` runs one by its name.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .denoiser import scales_of, to_output
from .parameterization import to_denoised
from .schedule import per_sample
from .spacing import SpacingRule

__all__ = [
    "SAMPLERS", "Sampler", "Step", "sample_ddim", "sample_ddpm", "sample_dpmsolver_multistep", "sample_dpmsolver_sde",
    "sample_dpmsolver_singlestep", "sample_euler", "sample_euler_ancestral", "sample_heun", "sample_lms",
    "sample_para_ddim", "sample_plms", "sample_unipc",
]  # fmt: skip

Denoise = Callable[[Tensor, Tensor | float], Tensor]
NoiseSampler = Callable[[int], Tensor]
Solver = Callable[..., Iterator["Step"]]

# Weights of the newest, second newest, ... value in an Adams-Bashforth step of order 1, 2, 3, 4.
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))

# Spacings are the defaults of diffusers' schedulers.
LEADING = SpacingRule("leading")
EVERY_SIGMA = SpacingRule("linspace", fractional=True)
ALL_BUT_LAST = SpacingRule("linspace", extra_point=True)


@dataclass(frozen=True, eq=False)
class Step:
    """index: of the step done, from 0. latents: at sigmas[index + 1]. denoised: the clean estimate that led there."""

    index: int
    latents: Tensor
    denoised: Tensor


@dataclass(frozen=True)
class Sampler:
    """solve: the generator function. rule: which sigmas it visits. title: its name in web UIs and in image metadata.

    aliases: what other programs call it, in lower case with underscores. random: it always uses noise_sampler.
    karras, clips: whether diffusers' scheduler obeys use_karras_sigmas, and clip_sample.
    """

    solve: Solver
    rule: SpacingRule
    title: str
    aliases: tuple[str, ...] = ()
    random: bool = False
    karras: bool = False
    clips: bool = False


SAMPLERS: dict[str, Sampler] = {}


def register(
    name: str, rule: SpacingRule, title: str, aliases: Sequence[str] = (), **traits: bool
) -> Callable[[Solver], Solver]:
    """Add the decorated function to SAMPLERS under `name`. traits: random, karras and clips of Sampler."""

    def add(solve: Solver) -> Solver:
        SAMPLERS[name] = Sampler(solve, rule, title, tuple(aliases), **traits)
        return solve

    return add


def ancestral_step(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Return the two parts of a step to sigma_next: the sigma it goes down to, and that of the noise it then adds.

    eta: 0 adds none, 1 as much as the reverse of the forward process does.
    Source: Song et al. 2021, equation 16, times sqrt(1 + sigma_next^2).
    """
    added = eta * sigma_next * max(0.0, 1 - (sigma_next / sigma) ** 2) ** 0.5
    return max(0.0, sigma_next**2 - added**2) ** 0.5, added


@register("ddim", SpacingRule("leading", fixed_stride=True, set_alpha_to_one=True), "DDIM", clips=True)
def sample_ddim(
    denoise: Denoise,
    latents: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 0.0,
    noise_sampler: NoiseSampler | None = None,
    step_targets: Tensor | None = None,
    clip_sample_range: float | None = None,
) -> Iterator[Step]:
    """DDIM; the same formula is Euler's method (eta 0) and, with eta 1, DDPM and Euler ancestral.

    eta: in [0, 1], the share of random noise; above 0 it needs noise_sampler.
    step_targets: (steps,), as in SamplingSchedule; sigmas[1:] by default.
    clip_sample_range: clips the clean estimate, not the direction from it, as diffusers does.
    Source: Song et al. 2021, equation 12.
    """
    targets = (sigmas[1:] if step_targets is None else step_targets).tolist()
    for index, ((sigma, sigma_next), target) in enumerate(zip(pairwise(sigmas.tolist()), targets, strict=True)):
        denoised = denoise(latents, sigma)
        down, added = ancestral_step(sigma, target, eta)
        away = latents - denoised
        denoised = _clipped(denoised, clip_sample_range)
        latents = denoised + away * (down / sigma)
        if added > 0:
            latents = latents + _noise(noise_sampler, index) * added
        if target != sigma_next:
            latents = latents * ((1 + sigma_next**2) / (1 + target**2)) ** 0.5
        yield Step(index, latents, denoised)


@register("ddpm", LEADING, "DDPM", random=True, clips=True)
def sample_ddpm(
    denoise: Denoise, latents: Tensor, sigmas: Tensor, *, eta: float = 1.0, noise_sampler: NoiseSampler | None = None,
    clip_sample_range: float | None = None,
) -> Iterator[Step]:  # fmt: skip
    """DDPM: DDIM's formula with eta 1 (Ho et al. 2020, algorithm 2), the direction taken from the clipped estimate."""

    def clipped(noisy: Tensor, sigma: Tensor | float) -> Tensor:
        return _clipped(denoise(noisy, sigma), clip_sample_range)

    return sample_ddim(clipped, latents, sigmas, eta=eta, noise_sampler=noise_sampler)


@register("euler", EVERY_SIGMA, "Euler", ["k_euler", "eulerdiscrete"], karras=True)
def sample_euler(
    denoise: Denoise, latents: Tensor, sigmas: Tensor, *, eta: float = 0.0, noise_sampler: NoiseSampler | None = None
) -> Iterator[Step]:
    """Euler's method for d(latents) / d(sigma) = (latents - denoised) / sigma: DDIM's formula on other sigmas."""
    return sample_ddim(denoise, latents, sigmas, eta=eta, noise_sampler=noise_sampler)


@register("euler_a", EVERY_SIGMA, "Euler a", [
    "euler_ancestral", "k_euler_a", "k_euler_ancestral", "eulerancestraldiscrete",
], random=True)  # fmt: skip
def sample_euler_ancestral(
    denoise: Denoise, latents: Tensor, sigmas: Tensor, *, eta: float = 1.0, noise_sampler: NoiseSampler | None = None
) -> Iterator[Step]:
    """Euler's method with the noise of DDPM: DDIM's formula with eta 1 on other sigmas."""
    return sample_ddim(denoise, latents, sigmas, eta=eta, noise_sampler=noise_sampler)


@register("plms", SpacingRule("leading", set_alpha_to_one=False), "PLMS", ["pndm"])
def sample_plms(denoise: Denoise, latents: Tensor, sigmas: Tensor, *, averaged: str = "epsilon") -> Iterator[Step]:
    """Pseudo linear multistep: DDIM steps along an Adams-Bashforth average of past network outputs; steps + 1 calls.

    averaged: the prediction_type whose outputs are averaged. "epsilon" is the method's own, whatever the network
        predicts, as in LDM; diffusers averages what the network predicts. NeMo does the same for epsilon, but with v
        takes the clean estimate from the last output alone and averages only the direction.
    Source: Liu et al. 2022, "Pseudo numerical methods for diffusion models on manifolds", equations 11 to 14.
    """
    sigma_list, past = sigmas.tolist(), list[Tensor]()
    for index, (sigma, sigma_next) in enumerate(pairwise(sigma_list)):
        past = [to_output(averaged, denoise(latents, sigma), latents, sigma), *past[:3]]
        output = _weighted(ADAMS_BASHFORTH[len(past) - 1], past)
        scales = scales_of(sigma, latents)
        denoised = to_denoised(averaged, output, latents * scales[0], *scales)
        proposed = denoised + (latents - denoised) * (sigma_next / sigma)
        if index == 0 and len(sigma_list) > 2:  # no past yet: Heun's average of both ends of the step
            output = (output + to_output(averaged, denoise(proposed, sigma_next), proposed, sigma_next)) / 2
            denoised = to_denoised(averaged, output, latents * scales[0], *scales)
            proposed = denoised + (latents - denoised) * (sigma_next / sigma)
        latents = proposed
        yield Step(index, latents, denoised)


@register("heun", EVERY_SIGMA, "Heun", ["k_heun", "heundiscrete"], karras=True)
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


@register("lms", EVERY_SIGMA, "LMS", ["k_lms", "lmsdiscrete"], karras=True)
def sample_lms(denoise: Denoise, latents: Tensor, sigmas: Tensor, *, order: int = 4) -> Iterator[Step]:
    """Linear multistep: integrates the polynomial through the last `order` slopes (at most 4) over each step.

    Source: Adams-Bashforth on uneven steps; Karras' k-diffusion made it a sampler.
    """
    if not 1 <= order <= 4:
        raise ValueError(f"order is {order}; linear multistep takes 1 to 4")
    sigma_list, past = sigmas.tolist(), list[Tensor]()
    for index, (sigma, sigma_next) in enumerate(pairwise(sigma_list)):
        denoised = denoise(latents, sigma)
        past = [(latents - denoised) / sigma, *past[: order - 1]]
        weights = _lagrange_integrals(sigma_list[index::-1][: len(past)], sigma, sigma_next)
        latents = latents + _weighted(weights, past)
        yield Step(index, latents, denoised)


@register("dpmsolver++", ALL_BUT_LAST, "DPM++ 2M", [
    "dpm", "dpmsolver", "dpm++", "dpm++_2m", "dpmpp_2m", "dpmsolver++_2m", "dpmsolvermultistep",
], karras=True)  # fmt: skip
def sample_dpmsolver_multistep(
    denoise: Denoise, latents: Tensor, sigmas: Tensor, *, eta: float = 0.0, noise_sampler: NoiseSampler | None = None
) -> Iterator[Step]:
    """DPM-Solver++(2M), and with eta 1 its SDE form; second order, one call a step, first order at both ends.

    eta: in [0, 1], the share of random noise; above 0 it needs noise_sampler.
    Source: Lu et al. 2022, "DPM-Solver++", algorithm 2 (midpoint) and appendix on SDE-DPM-Solver++(2M).
    """
    sigma_list, previous = sigmas.tolist(), None
    for index, (sigma, sigma_next) in enumerate(pairwise(sigma_list)):
        denoised = denoise(latents, sigma)
        estimate = denoised
        if previous is not None and sigma_next > 0:
            estimate = _extrapolated(denoised, previous, sigma_list[index - 1 : index + 2])
        ratio = sigma_next / sigma
        latents = estimate + (latents - estimate) * ratio ** (1 + eta)
        if eta > 0 and sigma_next > 0:
            latents = latents + _noise(noise_sampler, index) * (sigma_next * (1 - ratio ** (2 * eta)) ** 0.5)
        previous = denoised
        yield Step(index, latents, denoised)


@register("dpmsolver++_sde", ALL_BUT_LAST, "DPM++ 2M SDE", [
    "dpm++_2m_sde", "dpmpp_2m_sde", "dpmsolver++_2m_sde",
], random=True, karras=True)  # fmt: skip
def sample_dpmsolver_sde(
    denoise: Denoise, latents: Tensor, sigmas: Tensor, *, eta: float = 1.0, noise_sampler: NoiseSampler | None = None
) -> Iterator[Step]:
    """DPM-Solver++(2M) with noise: its SDE form."""
    return sample_dpmsolver_multistep(denoise, latents, sigmas, eta=eta, noise_sampler=noise_sampler)


@register("dpmsolver++_singlestep", ALL_BUT_LAST, "DPM++ 2S", [
    "dpm++_2s", "dpmpp_2s", "dpmsolver++_2s", "dpmsolversinglestep",
], karras=True)  # fmt: skip
def sample_dpmsolver_singlestep(denoise: Denoise, latents: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """DPM-Solver++(2S): steps in pairs, the first a plain one to the middle, the second over both; the last is plain.

    Source: Lu et al. 2022, "DPM-Solver++", algorithm 1, with the middles taken from sigmas.
    """
    sigma_list = sigmas.tolist()
    start, first = latents, latents
    for index, (sigma, sigma_next) in enumerate(pairwise(sigma_list)):
        denoised = denoise(latents, sigma)
        if index % 2 == 1 and index < len(sigma_list) - 2:
            begin = sigma_list[index - 1]
            share = math.log(begin / sigma) / math.log(begin / sigma_next)
            estimate = first + (denoised - first) / (2 * share)
            latents = estimate + (start - estimate) * (sigma_next / begin)
        else:
            start, first = latents, denoised
            latents = denoised + (latents - denoised) * (sigma_next / sigma)
        yield Step(index, latents, denoised)


@register("unipc", ALL_BUT_LAST, "UniPC", ["uni_pc", "unipcmultistep"], karras=True)
def sample_unipc(denoise: Denoise, latents: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """UniPC of order 2, variant B2 on data predictions: DPM-Solver++(2M) steps, each corrected by the next call.

    Source: Zhao et al. 2023, "UniPC", algorithms 5 and 6.
    """
    sigma_list, past, start = sigmas.tolist(), list[Tensor](), latents
    for index, (sigma, sigma_next) in enumerate(pairwise(sigma_list)):
        denoised = denoise(latents, sigma)
        if past:
            estimate = _corrected(denoised, past, sigma_list[max(0, index - len(past)) : index + 1])
            latents = estimate + (start - estimate) * (sigma / sigma_list[index - 1])
        estimate = denoised
        if past and sigma_next > 0:
            estimate = _extrapolated(denoised, past[0], sigma_list[index - 1 : index + 2])
        past, start = [denoised, *past[:1]], latents
        latents = estimate + (latents - estimate) * (sigma_next / sigma)
        yield Step(index, latents, denoised)


@register("para_ddim", SpacingRule("leading", set_alpha_to_one=True), "DDIM", ["paraddim", "ddimparallel"], clips=True)
def sample_para_ddim(
    denoise: Denoise, latents: Tensor, sigmas: Tensor, *, parallelism: int = 8, tolerance: float = 0.1,
    clip_sample_range: float | None = None,
) -> Iterator[Step]:  # fmt: skip
    """DDIM (eta 0) by Picard iteration: a window of steps in one batch, repeated until it no longer changes.

    parallelism: steps in the window; one call serves parallelism * batch samples, step by step, each with its sigma.
    tolerance: a step is done when its mean squared change is at most tolerance^2 times the variance that DDPM would
        add there; 0 gives DDIM's own result, in as many rounds as steps at worst.
    Source: Shih et al. 2023, "Parallel sampling of diffusion models", algorithm 1: since d(latents) / d(sigma) is the
    slope, every state is the start plus the sum of slopes times differences of sigma.
    """
    if parallelism < 1 or not tolerance >= 0:
        raise ValueError(f"parallelism {parallelism} must be at least 1 and tolerance {tolerance} at least 0")
    sigma_list, begin, batch = sigmas.tolist(), 0, len(latents)
    steps = len(sigma_list) - 1
    window = latents.expand(min(parallelism, steps), *latents.shape)  # guesses of the states at sigma_list[begin:]
    while begin < steps:
        ends = list(pairwise(sigma_list[begin : begin + len(window) + 1]))
        repeated = torch.tensor([sigma for sigma, _ in ends], dtype=torch.float64).repeat_interleave(batch)
        denoised = denoise(window.flatten(0, 1), repeated).view_as(window)
        relative = per_sample(window.new_tensor([(after - sigma) / sigma for sigma, after in ends]), window)
        clipped = _clipped(denoised, clip_sample_range)
        changes = (window - denoised) * relative + (clipped - denoised)
        states = window[0] + changes.cumsum(0)  # at sigma_list[begin + 1:]
        allowed = [(tolerance * ancestral_step(sigma, after, 1.0)[1]) ** 2 for sigma, after in ends]
        done = _converged(states[:-1], window[1:], allowed)
        for offset in range(done):
            yield Step(begin + offset, states[offset], clipped[offset])
        begin += done
        guesses, size = states[done - 1 :], min(parallelism, steps - begin)
        window = torch.cat([guesses, guesses[-1:].expand(len(window), *latents.shape)])[:size]


def _converged(states: Tensor, before: Tensor, allowed: Sequence[float]) -> int:
    """Count the steps at the window's front that are done: the first always is, its start being final."""
    changes = ((states - before) ** 2).flatten(1).mean(1).tolist()
    done = 1
    for change, limit in zip(changes, allowed, strict=False):
        if change > limit:
            break
        done += 1
    return done


def _clipped(denoised: Tensor, limit: float | None) -> Tensor:
    return denoised if limit is None else denoised.clamp(-limit, limit)


def _noise(noise_sampler: NoiseSampler | None, step: int) -> Tensor:
    if noise_sampler is None:
        raise ValueError("a sampler with eta above 0 needs noise_sampler")
    return noise_sampler(step)


def _weighted(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    total = weights[0] * tensors[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total = total + weight * tensor
    return total


def _lagrange_integrals(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Return the integral from start to end of each Lagrange polynomial of these nodes (at most 4 of them)."""
    points, weights = np.polynomial.legendre.leggauss(2)  # exact up to the third degree
    points = (start + end) / 2 + (end - start) / 2 * points
    integrals = []
    for own in nodes:
        polynomial = np.prod([(points - node) / (own - node) for node in nodes if node != own], axis=0)
        integrals.append(float((weights * polynomial).sum() * (end - start) / 2))
    return integrals


def _extrapolated(denoised: Tensor, previous: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Return the clean estimate halfway through a step, linear in log sigma through the last two.

    sigmas: of the previous estimate, of this one, and the step's end.
    """
    before, sigma, sigma_next = sigmas
    return denoised + (denoised - previous) * (math.log(sigma / sigma_next) / math.log(before / sigma) / 2)


def _corrected(denoised: Tensor, past: Sequence[Tensor], sigmas: Sequence[float]) -> Tensor:
    """Return UniC's clean estimate for the step that ended at sigmas[-1], where the network's estimate is `denoised`.

    past: the estimates at the step's start and, if there is one, before it. sigmas: of the same, oldest first.
    """
    width = math.log(sigmas[-2] / sigmas[-1])
    if len(past) == 1:
        return past[0] + (denoised - past[0]) / 2
    older_at = -math.log(sigmas[-3] / sigmas[-2]) / width  # in units of the step, from its start
    growth = math.expm1(-width)
    first = growth / -width - 1
    second = first / -width - 1 / 2
    solved = np.linalg.solve(np.array([[1, 1], [older_at, 1]]), np.array([first, 2 * second]) / growth)
    older, newer = map(float, solved)
    return past[0] + (past[1] - past[0]) * (older / older_at) + (denoised - past[0]) * newer
