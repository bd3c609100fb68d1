"""Find and run a sampler by its name."""

import re
from collections.abc import Iterator
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from .samplers import SAMPLERS, Denoise, NoiseSampler, Step
from .schedule import NoiseSchedule
from .spacing import SamplingSchedule, build_sampling_schedule


def canonical_sampler(name: str) -> tuple[str, bool]:
    """Return the key of SAMPLERS that `name` means, and whether it asks for Karras sigmas ("DPM++ 2M Karras").

    Case, and the choice between space, hyphen and underscore, do not matter; aliases and diffusers' class names are
    understood. Raises ValueError, with the nearest names, for what is no sampler.
    """
    names = {alias: key for key, sampler in SAMPLERS.items() for alias in (*sampler.aliases, key)}
    plain = re.sub(r"[\s_-]+", "_", name.strip().lower()).removesuffix("scheduler")
    base = plain.removesuffix("_karras")
    if base in names:
        return names[base], base != plain
    near = dict.fromkeys(names[word] for word in get_close_matches(base, names, n=5))
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(SAMPLERS)}"
    raise ValueError(f"{name!r} is not a sampler; {hint}")


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
    """Return the sigmas and timesteps that a sampler visits, as diffusers' scheduler of the same settings has them.

    sampler: a name of SAMPLERS or an alias; one that ends in "Karras" asks for karras too.
    spacing: "leading", "trailing" or "linspace"; None takes the sampler's own.
    steps_offset: added to "leading" timesteps; published Stable Diffusion configs say 1.
    set_alpha_to_one: for ddim, plms and para_ddim, whether it ends at sigma 0 (True) or at that of timestep 0;
        None takes the sampler's own; published Stable Diffusion configs say False. All others end at 0.
    karras: sigmas of Karras et al. 2022 instead of the spaced timesteps'.
    A terminal alphas_cumprod of 0 counts as 2^-24.
    Raises ValueError for an unknown sampler or spacing and for steps that the schedule does not have.
    """
    name, named_karras = canonical_sampler(sampler)
    return build_sampling_schedule(
        schedule,
        SAMPLERS[name].rule,
        steps,
        spacing=spacing,
        steps_offset=steps_offset,
        set_alpha_to_one=set_alpha_to_one,
        karras=karras or named_karras,
    )


def sample(
    sampler: str,
    denoise: Denoise,
    latents: Tensor,
    schedule: SamplingSchedule,
    *,
    noise_sampler: NoiseSampler | None = None,
    clip_sample_range: float | None = None,
    **options: Any,
) -> Iterator[Step]:
    """Run a sampler by its name; the last Step's latents are the result, ready for the VAE.

    latents: (batch, channels, height, width), unit noise; scaled here to the schedule's start.
    noise_sampler: step -> unit noise, for those samplers (and ddim with eta) that use it.
    clip_sample_range: where ddim, para_ddim and ddpm clip the clean estimate, as in diffusers; others never do.
    options: the sampler's own: eta, averaged, order, parallelism, tolerance.
    """
    chosen = SAMPLERS[canonical_sampler(sampler)[0]]
    if chosen.random or options.get("eta", 0) > 0:
        options["noise_sampler"] = noise_sampler
    if chosen.clips:
        options["clip_sample_range"] = clip_sample_range
    if chosen.rule.fixed_stride:
        options["step_targets"] = schedule.step_targets
    for step in chosen.solve(denoise, latents * schedule.start_scale, schedule.sigmas, **options):
        last = step.index == schedule.steps - 1
        yield replace(step, latents=step.latents / schedule.end_scale) if last else step
