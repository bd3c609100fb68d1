import math

import pytest
import torch
from diffusers import DDIMScheduler

from latentsmith.diffusion import NoiseSchedule, ldm_beta_schedule

STABLE_DIFFUSION = NoiseSchedule.from_config(0.00085, 0.012)


def test_stable_diffusion_constants():
    alphas_cumprod = STABLE_DIFFUSION.alphas_cumprod
    assert alphas_cumprod.dtype == torch.float64 and STABLE_DIFFUSION.timesteps == 1000
    assert alphas_cumprod[0].item() == pytest.approx(0.99915, abs=1e-12)
    assert alphas_cumprod[[499, 999]].tolist() == pytest.approx([0.27766965, 0.0046600985], rel=2e-8)
    assert STABLE_DIFFUSION.sigmas[[0, 499, 999]].tolist() == pytest.approx([0.02916716, 1.61289, 14.614641], rel=5e-6)


def test_betas_return_what_the_name_says():
    def betas(name):
        return NoiseSchedule.from_config(0.01, 0.09, name, timesteps=3).betas.tolist()

    assert betas("scaled_linear") == pytest.approx([0.01, 0.04, 0.09])
    assert betas("linear") == pytest.approx([0.01, 0.05, 0.09])
    assert betas("sqrt") == pytest.approx([0.1, 0.05**0.5, 0.3])


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_tables_equal_diffusers_of_the_same_name_to_float32(name):
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=name)
    ours = NoiseSchedule.from_config(0.00085, 0.012, name)
    rtol = 2e-3 if name == "squaredcos_cap_v2" else 2e-6  # its last values are tiny, and theirs rounded at every step
    torch.testing.assert_close(ours.alphas_cumprod, scheduler.alphas_cumprod.double(), rtol=rtol, atol=0)


def test_names_of_ldm_keep_their_meaning():
    """LDM's "linear" is linear in the root of beta: betas as its make_beta_schedule computes them."""
    root = NoiseSchedule.from_config(0.01, 0.09, ldm_beta_schedule("linear"), timesteps=3)
    plain = NoiseSchedule.from_config(0.01, 0.09, ldm_beta_schedule("sqrt_linear"), timesteps=3)
    assert root.betas.tolist() == pytest.approx([0.01, 0.04, 0.09])
    assert plain.betas.tolist() == pytest.approx([0.01, 0.05, 0.09])
    with pytest.raises(ValueError, match="'scaled_linear' is not one of linear, sqrt_linear, cosine, sqrt"):
        ldm_beta_schedule("scaled_linear")


def test_cosine_equals_diffusers():
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    ours = NoiseSchedule.from_config(beta_schedule="cosine")
    torch.testing.assert_close(ours.betas, scheduler.betas.double(), rtol=0, atol=1e-6)


def test_add_noise_keeps_unit_variance_and_the_first_timestep_gets_noise_even_in_bfloat16():
    latents, noise = torch.ones(2, 4, 2, 2).bfloat16(), torch.full((2, 4, 2, 2), 3.0).bfloat16()
    noisy = STABLE_DIFFUSION.add_noise(latents, noise, torch.tensor([0, 999]))
    assert noisy.dtype == torch.float32
    expected = 0.99915**0.5 + 3 * 0.00085**0.5
    torch.testing.assert_close(noisy[0], torch.full((4, 2, 2), expected))
    scale, noise_scale = STABLE_DIFFUSION.coefficients(torch.arange(1000))
    assert scale.dtype == noise_scale.dtype == torch.float32
    torch.testing.assert_close(scale**2 + noise_scale**2, torch.ones(1000))


def test_zero_terminal_snr():
    stretched = STABLE_DIFFUSION.zero_terminal_snr()
    alphas_cumprod = stretched.alphas_cumprod
    assert alphas_cumprod[0] == pytest.approx(0.99915) and alphas_cumprod[999] == 0 and stretched.betas[999] == 1
    assert alphas_cumprod[998].item() == pytest.approx(1.97e-7, rel=5e-3)
    scale, noise_scale = stretched.coefficients(torch.tensor([999]))
    assert (scale, noise_scale) == (0, 1)
    assert stretched.for_sampling().sigmas[-1].item() == pytest.approx(4096, rel=1e-6)
    assert STABLE_DIFFUSION.for_sampling() is STABLE_DIFFUSION


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_sampling_timesteps_equal_diffusers_for_every_number_of_steps(spacing):
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        # By rounding, NumPy's arange gives some of diffusers' trailing grids one element too many, timestep -1.
        theirs = scheduler.timesteps[:steps]
        assert STABLE_DIFFUSION.sampling_timesteps(steps, spacing).tolist() == theirs.tolist(), steps


def test_sampling_timesteps_of_published_settings():
    assert STABLE_DIFFUSION.sampling_timesteps(20, "leading", 1)[[0, -2, -1]].tolist() == [951, 51, 1]
    assert STABLE_DIFFUSION.sampling_timesteps(30, "trailing")[[0, 1, 2, -1]].tolist() == [999, 966, 932, 32]
    assert STABLE_DIFFUSION.sampling_timesteps(50, "linspace")[[0, 1, 2, -1]].tolist() == [999, 979, 958, 0]


def test_sigma_and_timestep_are_inverse():
    for timestep in (0.0, 0.25, 17.0, 499.5, 998.75, 999.0):
        below, above = STABLE_DIFFUSION.sigmas.log()[[int(timestep), min(int(timestep) + 1, 999)]].tolist()
        sigma = math.exp(below + (timestep - int(timestep)) * (above - below))
        assert STABLE_DIFFUSION.timestep_at(sigma) == pytest.approx(timestep, abs=1e-9)
    for timestep in (0, 500, 999):
        assert STABLE_DIFFUSION.timestep_at(STABLE_DIFFUSION.sigmas[timestep].item()) == pytest.approx(timestep)
    assert STABLE_DIFFUSION.timestep_at(0) == 0 and STABLE_DIFFUSION.timestep_at(1e9) == 999
    midway = (STABLE_DIFFUSION.sigmas[0] * STABLE_DIFFUSION.sigmas[1]).sqrt().item()
    assert STABLE_DIFFUSION.timestep_at(midway) == pytest.approx(0.5)


def test_a_schedule_of_one_timestep():
    schedule = NoiseSchedule.from_config(0.5, 0.5, timesteps=1)
    assert schedule.timestep_at(1.0) == 0
    with pytest.raises(ValueError, match="at least 2 timesteps"):
        schedule.zero_terminal_snr()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"beta_schedule": "sqrt_linear"},
            "'sqrt_linear' is not one of linear, scaled_linear",
        ),
        ({"linear_start": 0.02}, "linear_start 0.02 and linear_end 0.012"),
        ({"linear_start": float("nan")}, "linear_start nan"),
        ({"timesteps": 0}, "timesteps is 0"),
    ],
)
def test_configs_that_describe_no_schedule(settings, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_config(**settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, "leading"), "steps is 0; this schedule allows 1 to 1000"),
        ((1001, "leading"), "steps is 1001"),
        ((10, "karras"), "'karras' is not one of leading, trailing, linspace"),
        ((1000, "leading", 1), "starts at timestep 1000, past the last, 999"),
    ],
)
def test_sampling_timesteps_that_do_not_exist(arguments, message):
    with pytest.raises(ValueError, match=message):
        STABLE_DIFFUSION.sampling_timesteps(*arguments)


def test_tables_that_are_no_schedule():
    for table in (torch.tensor([0.9, 0.5]), torch.tensor([[0.9, 0.5]]).double(), torch.tensor([]).double()):
        with pytest.raises(ValueError, match="one row of float64"):
            NoiseSchedule(table)
    for values in ([1.0, 0.5], [0.5, 0.9], [0.9, 0.9], [0.5, -0.1], [0.9, float("nan")]):
        with pytest.raises(ValueError, match="decrease strictly"):
            NoiseSchedule(torch.tensor(values).double())
