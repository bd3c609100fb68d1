import pytest
import torch

from latentsmith.diffusion import SAMPLERS, NoiseSchedule, karras_sigmas, sampling_schedule

SCHEDULE = NoiseSchedule.from_config(0.00085, 0.012)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", [None, "leading", "trailing", "linspace"])
def test_every_grid_falls_to_zero_and_knows_its_timesteps(sampler, spacing):
    for steps in (1, 2, 25):
        for karras in (False, True):
            grid = sampling_schedule(SCHEDULE, sampler, steps, spacing=spacing, set_alpha_to_one=True, karras=karras)
            assert grid.steps == steps and grid.sigmas.shape == (steps + 1,) and grid.sigmas.dtype == torch.float64
            assert (grid.sigmas.diff() < 0).all() and grid.sigmas[-1] == 0 and grid.end_scale == 1
            looked_up = [grid.timestep_at(sigma) for sigma in grid.sigmas[:-1].tolist()]
            assert looked_up == grid.timesteps.tolist()


def test_a_sigma_between_visited_ones_has_the_timestep_of_its_own():
    """A sampler may evaluate between them (a midpoint): the nearest visited timestep would be far off."""
    grid = sampling_schedule(SCHEDULE, "euler", 4)
    between = (grid.sigmas[0] * grid.sigmas[1]).sqrt().item()
    assert grid.timestep_at(between) == pytest.approx(SCHEDULE.timestep_at(between), abs=1e-9)
    assert grid.timesteps[1] < grid.timestep_at(between) < grid.timesteps[0]
    assert grid.from_step(1).timestep_at(between) == grid.timestep_at(between)


def test_published_timesteps():
    """Reference values for Stable Diffusion's scheduler configs, 20 steps."""
    assert sampling_schedule(SCHEDULE, "ddim", 20, steps_offset=1).timesteps[[0, -2, -1]].tolist() == [951, 51, 1]
    grid = sampling_schedule(SCHEDULE, "dpmsolver++", 20, spacing="leading", steps_offset=1)
    assert grid.timesteps[[0, 1, -2, -1]].tolist() == [941, 894, 95, 48]
    assert sampling_schedule(SCHEDULE, "dpmsolver++", 20).timesteps[[0, 1, -2, -1]].tolist() == [999, 949, 100, 50]
    assert sampling_schedule(SCHEDULE, "dpmsolver++", 20).sigmas[0].item() == pytest.approx(14.614641, rel=1e-7)


def test_where_the_grid_ends():
    assert sampling_schedule(SCHEDULE, "ddim", 10).sigmas[-1] == 0
    assert sampling_schedule(SCHEDULE, "plms", 10).sigmas[-1].item() == pytest.approx(0.02916716, rel=1e-6)
    assert sampling_schedule(SCHEDULE, "euler", 10, set_alpha_to_one=False).sigmas[-1] == 0
    grid = sampling_schedule(SCHEDULE, "ddim", 10, set_alpha_to_one=False)
    assert grid.end_scale == pytest.approx((1 + 0.02916716**2) ** 0.5)


def test_noise_starts_at_unit_variance_of_the_noisy_latents():
    assert sampling_schedule(SCHEDULE, "dpmsolver++", 10).start_scale == pytest.approx((1 + 14.614641**2) ** 0.5)
    assert sampling_schedule(SCHEDULE, "euler", 10).start_scale == pytest.approx(14.614641)
    leading = sampling_schedule(SCHEDULE, "euler", 10, spacing="leading")
    assert leading.start_scale == pytest.approx((1 + SCHEDULE.sigmas[900].item() ** 2) ** 0.5)


def test_the_rest_of_a_grid():
    grid = sampling_schedule(SCHEDULE, "euler", 10)
    rest = grid.from_step(4)
    assert rest.steps == 6 and torch.equal(rest.sigmas, grid.sigmas[4:])
    assert rest.start_scale == pytest.approx((1 + grid.sigmas[4].item() ** 2) ** 0.5)
    assert grid.from_step(0).start_scale == grid.start_scale
    with pytest.raises(ValueError, match="start 10 leaves no step of 10"):
        grid.from_step(10)


def test_karras_sigmas_of_the_paper():
    sigmas = karras_sigmas(3, 0.002, 80.0)
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert sigmas.tolist() == pytest.approx([80, middle, 0.002])


@pytest.mark.parametrize(
    ("sampler", "steps", "message"),
    [
        ("ddim", 0, "steps is 0; this schedule allows 1 to 1000"),
        ("dpmsolver++", 0, "steps is 0; this sampler and schedule allow 1 to 999"),
        ("unipc", 1000, "steps is 1000; this sampler and schedule allow 1 to 999"),
        ("dpmpp", 10, "'dpmpp' is not a sampler; did you mean dpmsolver"),
    ],
)
def test_grids_that_do_not_exist(sampler, steps, message):
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        sampling_schedule(SCHEDULE, sampler, steps)


@pytest.mark.parametrize(
    ("spacing", "steps", "end", "differ"),
    [
        ("leading", 13, 0, 0), ("trailing", 25, 0, 0), ("trailing", 13, 0.0292, 11), ("trailing", 7, 0.0292, 5),
        ("linspace", 7, 0, 6), ("linspace", 13, 0, 12), ("linspace", 20, 0, 19), ("linspace", 30, 0, 29),
    ],
)  # fmt: skip
def test_ddims_targets_are_as_docs_sampling_says(spacing, steps, end, differ):
    schedule = sampling_schedule(NoiseSchedule.from_config(), "ddim", steps, spacing=spacing, set_alpha_to_one=True)
    assert schedule.sigmas[-1].item() == pytest.approx(end, abs=1e-4)
    assert (schedule.step_targets[:-1] != schedule.sigmas[1:-1]).sum() == differ
