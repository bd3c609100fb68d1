"""Samplers against what is known exactly: for Gaussian data the best denoiser and its trajectories."""

import pytest
import torch

from latentsmith.diffusion import SAMPLERS, Denoiser, GuidedDenoiser, NoiseSchedule, sample, sampling_schedule
from latentsmith.diffusion.samplers import (
    sample_ddim,
    sample_dpmsolver_multistep,
    sample_dpmsolver_singlestep,
    sample_heun,
    sample_lms,
    sample_plms,
    sample_unipc,
)

SCHEDULE = NoiseSchedule.from_config(0.00085, 0.012)
SPREAD = 0.5  # standard deviation of the data
MEAN = 0.25


def denoise(noisy, sigma):
    """E[latents | noisy] for latents from N(MEAN, SPREAD^2); sigma a number or one per sample."""
    variance = torch.as_tensor(sigma, dtype=noisy.dtype).view(-1, 1, 1, 1) ** 2
    return MEAN + (noisy - MEAN) * SPREAD**2 / (SPREAD**2 + variance)


def exact(start, sigma_from, sigma_to):
    """Where the probability-flow trajectory through `start` arrives."""
    return MEAN + (start - MEAN) * ((SPREAD**2 + sigma_to**2) / (SPREAD**2 + sigma_from**2)) ** 0.5


def last(run):
    return [step.latents for step in run][-1]


def even(steps):
    return torch.linspace(10, 1, steps + 1, dtype=torch.float64)


def even_in_log(steps):
    return torch.logspace(1, 0, steps + 1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("solve", "grid", "order"),
    [
        (sample_ddim, even_in_log, 1),
        (sample_heun, even_in_log, 2),
        (sample_dpmsolver_multistep, even_in_log, 2),
        (sample_dpmsolver_singlestep, even_in_log, 2),
        (sample_lms, even_in_log, 2),  # its first steps are of lower order
        (sample_plms, even, 3),  # of equal weights for unequal steps it would be less
        (sample_unipc, even_in_log, 3),
    ],
)
def test_order_of_convergence(solve, grid, order):
    """Doubling the steps divides the error by 2^order."""
    start = torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def error(steps):
        return (last(solve(denoise, start, grid(steps))) - exact(start, 10, 1)).abs().item()

    # An odd number of singlestep steps: pairs, and a plain one at the end, whose error is of the second order too.
    ratio = error(81) / error(161)
    assert 2**order * 0.75 < ratio < 2**order * 1.5, ratio


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if not SAMPLERS[name].random])
def test_many_steps_follow_the_exact_trajectory(sampler):
    grid = sampling_schedule(SCHEDULE, sampler, 500, set_alpha_to_one=True)
    noise = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    options = {"tolerance": 0.0} if sampler == "para_ddim" else {}
    result = last(sample(sampler, denoise, noise, grid, **options))
    torch.testing.assert_close(result, exact(noise * grid.start_scale, grid.sigmas[0].item(), 0), rtol=0, atol=0.01)


def result_distribution(sampler, steps):
    """Exact mean and standard deviation of what a sampler makes of unit noise.

    With a linear denoiser the result is linear in the starting noise and in each noise drawn: one batch finds every
    coefficient, sample 0 for none of them, sample 1 for the start, sample 2 + i for what step i draws.
    """

    def one_hot(index):
        return torch.eye(steps + 2, dtype=torch.float64)[index].view(-1, 1, 1, 1)

    grid = sampling_schedule(SCHEDULE, sampler, steps)
    result = last(sample(sampler, denoise, one_hot(1), grid, noise_sampler=lambda step: one_hot(2 + step))).flatten()
    return result[0].item(), (result[1:] - result[0]).norm().item()


@pytest.mark.parametrize(("sampler", "within"), [("ddpm", 0.04), ("euler_a", 0.04), ("dpmsolver++_sde", 0.01)])
def test_random_samplers_draw_from_the_data(sampler, within):
    """Mean and spread approach those of the data, in proportion to the number of steps."""
    mean, spread = result_distribution(sampler, 200)
    assert (mean, spread) == (pytest.approx(MEAN, rel=0.01), pytest.approx(SPREAD, rel=within))
    _, coarse = result_distribution(sampler, 100)
    assert abs(coarse - SPREAD) > 1.6 * abs(spread - SPREAD)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_is_the_clean_estimate_of_one_sample_in_its_own_dtype(sampler, dtype):
    noise = torch.randn(1, 4, 2, 2).to(dtype)
    grid = sampling_schedule(SCHEDULE, sampler, 1, set_alpha_to_one=True)
    steps = list(sample(sampler, denoise, noise, grid, noise_sampler=lambda step: torch.zeros_like(noise)))
    assert [step.index for step in steps] == [0] and steps[0].latents.dtype == dtype
    expected = denoise(noise * grid.start_scale, grid.sigmas[0].item())
    torch.testing.assert_close(steps[0].latents, expected)
    torch.testing.assert_close(steps[0].denoised, expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_caller_owns_progress_and_may_stop(sampler):
    noise, calls = torch.randn(2, 4, 2, 2), []

    def counted(noisy, sigma):
        calls.append(1)
        return denoise(noisy, sigma)

    grid = sampling_schedule(SCHEDULE, sampler, 12)
    untouched = noise.clone()
    run = sample(sampler, counted, noise, grid, noise_sampler=lambda step: torch.zeros_like(noise))
    assert next(run).index == 0
    started = len(calls)
    assert started <= 2
    run.close()
    assert len(calls) == started and torch.equal(noise, untouched)


def test_parallel_ddim_needs_fewer_rounds_than_steps_and_stays_close():
    rounds = []

    def counted(noisy, sigma):
        rounds.append(len(noisy))
        return denoise(noisy, sigma)

    noise = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grid = sampling_schedule(SCHEDULE, "para_ddim", 100, steps_offset=1)
    parallel = last(sample("para_ddim", counted, noise, grid, parallelism=20, tolerance=0.1))
    one_by_one = last(sample("ddim", denoise, noise, sampling_schedule(SCHEDULE, "ddim", 100, steps_offset=1)))
    assert len(rounds) < 50 and max(rounds) == 40
    torch.testing.assert_close(parallel, one_by_one, rtol=0, atol=0.02)


def test_parallel_ddim_with_guidance_gives_each_state_its_own_text():
    def network(noisy, timesteps, context):
        return noisy * 0.5 + context.view(-1, 1, 1, 1)

    context = torch.tensor([[0.1], [0.7]])
    results = []
    for sampler, options in (("ddim", {}), ("para_ddim", {"parallelism": 5, "tolerance": 0.0})):
        grid = sampling_schedule(SCHEDULE, sampler, 10, steps_offset=1)
        denoiser = Denoiser(network, SCHEDULE, "sample", timestep_at=grid.timestep_at)
        guided = GuidedDenoiser(denoiser, {"context": context}, {"context": context[:1] * 0}, torch.tensor([3.0, 7.0]))
        noise = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
        results.append(last(sample(sampler, guided, noise, grid, **options)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_settings_that_no_sampler_takes():
    grid, noise = sampling_schedule(SCHEDULE, "ddim", 4), torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="eta above 0 needs noise_sampler"):
        list(sample("ddim", denoise, noise, grid, eta=0.5))
    with pytest.raises(ValueError, match="eta above 0 needs noise_sampler"):
        list(sample("dpm++ 2m sde", denoise, noise, grid))
    with pytest.raises(ValueError, match="parallelism 0 must be at least 1"):
        list(sample("para_ddim", denoise, noise, grid, parallelism=0))
    with pytest.raises(ValueError, match="order is 5; linear multistep takes 1 to 4"):
        list(sample("lms", denoise, noise, grid, order=5))
    with pytest.raises(ValueError, match="'ddin' is not a sampler; did you mean ddim"):
        list(sample("ddin", denoise, noise, grid))
