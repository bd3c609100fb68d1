"""Every sampler against diffusers' scheduler of the same settings, step for step, in float64."""

import importlib

import numpy as np
import pytest
import torch

from latentsmith.diffusion import Denoiser, NoiseSchedule, sample, sampling_schedule

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NOISE = torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
SCHEDULERS = {
    "ddim": ("ddim", "DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("ddpm", "DDPMScheduler", {"clip_sample": False}),
    "plms": ("pndm", "PNDMScheduler", {"skip_prk_steps": True}),
    "dpmsolver++": ("dpmsolver_multistep", "DPMSolverMultistepScheduler", {}),
    "dpmsolver++_sde": (
        "dpmsolver_multistep",
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++"},
    ),
    "dpmsolver++_singlestep": ("dpmsolver_singlestep", "DPMSolverSinglestepScheduler", {}),
    "euler": ("euler_discrete", "EulerDiscreteScheduler", {}),
    "euler_a": ("euler_ancestral_discrete", "EulerAncestralDiscreteScheduler", {}),
    "heun": ("heun_discrete", "HeunDiscreteScheduler", {}),
    "lms": ("lms_discrete", "LMSDiscreteScheduler", {}),
    "unipc": ("unipc_multistep", "UniPCMultistepScheduler", {}),
}
RANDOM = ("ddpm", "dpmsolver++_sde", "euler_a")
KARRAS = ("dpmsolver++", "dpmsolver++_sde", "dpmsolver++_singlestep", "euler", "heun", "lms", "unipc")


class Widened:
    """A module whose float32 is float64: rounding to float32, as diffusers does, would hide small errors."""

    def __init__(self, module):
        self._module = module
        self.float32 = module.float64

    def __getattr__(self, name):
        return getattr(self._module, name)


def make_scheduler(monkeypatch, sampler, **settings):
    module_name, class_name, fixed = SCHEDULERS[sampler]
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{module_name}")
    monkeypatch.setattr(module, "torch", Widened(torch))
    monkeypatch.setattr(module, "np", Widened(np))
    scheduler = getattr(module, class_name)(**STABLE_DIFFUSION, **fixed, **settings)
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: unit_noise(), raising=False)
    return scheduler


DRAWS: list[torch.Tensor] = []


def unit_noise():
    """The next of a fixed row of noises: reset by emptying DRAWS."""
    DRAWS.append(torch.randn(NOISE.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(DRAWS))))
    return DRAWS[-1]


def network(noisy, timesteps):
    """Any smooth function of both that mixes the channels."""
    phase = timesteps.double().view(-1, 1, 1, 1) / 300
    return torch.tanh(noisy.roll(1, 1) + phase) * torch.cos(phase) + 0.3 * noisy


def theirs(scheduler, steps, eta=0.0):
    DRAWS.clear()
    scheduler.set_timesteps(steps)
    latents, states = NOISE * scheduler.init_noise_sigma, []
    for timestep in scheduler.timesteps:
        noisy = scheduler.scale_model_input(latents, timestep)
        output = network(noisy, timestep.expand(len(noisy)))
        options = {"eta": eta} if eta else {}
        if eta:
            options["variance_noise"] = unit_noise()
        latents = scheduler.step(output, timestep, latents, **options).prev_sample
        states.append(latents)
    return states


def ours(sampler, steps, prediction_type, schedule, options=None, **settings):
    grid = sampling_schedule(schedule, sampler, steps, **settings)
    denoise = Denoiser(network, schedule, prediction_type, timestep_at=grid.timestep_at)
    draws = [
        torch.randn(NOISE.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(99)
    ]
    run = sample(sampler, denoise, NOISE, grid, noise_sampler=draws.__getitem__, **(options or {}))
    return grid, [step.latents for step in run]


def assert_equal_step_for_step(sampler, grid, states, reference):
    """Their states are scaled to unit variance in some schedulers and doubled by extra calls in others.

    Networks get their timesteps in float32, which fractional ones do not survive exactly.
    """
    tolerance = 1e-9 if (grid.timesteps == grid.timesteps.round()).all() else 1e-6
    variance_preserving = sampler in ("ddim", "ddpm", "plms", "unipc") or sampler.startswith("dpmsolver")
    if sampler == "heun":
        reference = [*reference[1::2], reference[-1]]
    if sampler == "plms" and len(states) > 1:
        reference = reference[1:]
    assert len(states) == len(reference)
    for index, (state, expected) in enumerate(zip(states, reference, strict=True)):
        last = index == len(states) - 1
        scale = 1.0 if last or not variance_preserving else (1 + grid.sigmas[index + 1].item() ** 2) ** 0.5
        torch.testing.assert_close(
            state / scale, expected, rtol=tolerance, atol=tolerance, msg=lambda m, i=index: f"step {i}: {m}"
        )


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 20, 30])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_equal_to_diffusers(sampler, prediction_type, steps, monkeypatch):
    if prediction_type == "sample" and sampler in ("plms", "euler_a"):
        pytest.skip("diffusers has it not")
    scheduler = make_scheduler(monkeypatch, sampler, prediction_type=prediction_type)
    options = {"averaged": prediction_type} if sampler == "plms" else {}
    grid, states = ours(sampler, steps, prediction_type, NoiseSchedule.from_config(0.00085, 0.012), options)
    assert_equal_step_for_step(sampler, grid, states, theirs(scheduler, steps))


@pytest.mark.parametrize("steps", [1, 5, 20, 30])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler", [name for name in SCHEDULERS if name != "dpmsolver++_singlestep"])
def test_equal_to_diffusers_at_every_spacing(sampler, spacing, steps, monkeypatch):
    if sampler == "plms" and (spacing == "linspace" or (spacing, steps) == ("trailing", 30)) and steps > 1:
        pytest.skip("diffusers' PLMS takes these steps from levels it never was at")
    scheduler = make_scheduler(monkeypatch, sampler, timestep_spacing=spacing, steps_offset=1)
    schedule = NoiseSchedule.from_config(0.00085, 0.012)
    grid, states = ours(sampler, steps, "epsilon", schedule, spacing=spacing, steps_offset=1)
    assert grid.start_scale == pytest.approx(make_start(scheduler, grid), rel=1e-9)
    assert_equal_step_for_step(sampler, grid, states, theirs(scheduler, steps))


def make_start(scheduler, grid):
    """Their initial scale in our units: those that keep unit variance start at 1."""
    scheduler.set_timesteps(grid.steps)
    theirs = float(scheduler.init_noise_sigma)
    return theirs * (1 + grid.sigmas[0].item() ** 2) ** 0.5 if theirs == 1 else theirs


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("sampler", KARRAS)
def test_equal_to_diffusers_with_karras_sigmas(sampler, steps, monkeypatch):
    scheduler = make_scheduler(monkeypatch, sampler, use_karras_sigmas=True)
    grid, states = ours(f"{sampler} Karras", steps, "epsilon", NoiseSchedule.from_config(0.00085, 0.012))
    assert_equal_step_for_step(sampler, grid, states, theirs(scheduler, steps))


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("sampler", ["ddim", "plms"])
def test_the_end_of_the_grid_that_published_configs_ask_for(sampler, set_alpha_to_one, monkeypatch):
    """With set_alpha_to_one false it ends at timestep 0's level, and the result is scaled back to unit variance."""
    settings = {"set_alpha_to_one": set_alpha_to_one, "steps_offset": 1}
    scheduler = make_scheduler(monkeypatch, sampler, **settings)
    grid, states = ours(sampler, 20, "epsilon", NoiseSchedule.from_config(0.00085, 0.012), **settings)
    assert grid.sigmas[-1].item() == pytest.approx(0 if set_alpha_to_one else 0.02916716, rel=1e-6)
    assert_equal_step_for_step(sampler, grid, states, theirs(scheduler, 20))


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_noise(eta, monkeypatch):
    scheduler = make_scheduler(monkeypatch, "ddim", steps_offset=1)
    schedule = NoiseSchedule.from_config(0.00085, 0.012)
    grid, states = ours("ddim", 20, "epsilon", schedule, {"eta": eta}, steps_offset=1)
    assert_equal_step_for_step("ddim", grid, states, theirs(scheduler, 20, eta))


@pytest.mark.parametrize("sampler", ["dpmsolver++", "dpmsolver++_sde", "euler", "euler_a", "unipc", "ddim"])
def test_zero_terminal_snr(sampler, monkeypatch):
    settings = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    scheduler = make_scheduler(monkeypatch, sampler, **settings)
    if sampler == "ddim":  # alone in diffusers to keep the exact 0
        scheduler.alphas_cumprod[-1] = 2**-24
    schedule = NoiseSchedule.from_config(0.00085, 0.012).zero_terminal_snr()
    grid, states = ours(sampler, 10, "v_prediction", schedule, spacing="trailing")
    assert grid.sigmas[0].item() == pytest.approx(4096, rel=1e-6)
    assert_equal_step_for_step(sampler, grid, states, theirs(scheduler, 10))


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize("parallelism", [1, 3, 50])
def test_parallel_ddim_at_tolerance_zero_is_ddim(steps, parallelism):
    schedule = NoiseSchedule.from_config(0.00085, 0.012)
    settings = {"steps_offset": 1, "set_alpha_to_one": False}
    _, one_by_one = ours("ddim", steps, "epsilon", schedule, **settings)
    options = {"parallelism": parallelism, "tolerance": 0.0}
    _, parallel = ours("para_ddim", steps, "epsilon", schedule, options, **settings)
    assert len(parallel) == steps
    for state, expected in zip(parallel, one_by_one, strict=True):
        torch.testing.assert_close(state, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_clip_sample(monkeypatch, sampler):
    """The clean estimate is clipped; DDIM keeps the direction of the unclipped one, DDPM does not."""
    clipping = {"clip_sample": True, "clip_sample_range": 0.3}
    module, cls, _ = SCHEDULERS[sampler]
    monkeypatch.setitem(SCHEDULERS, sampler, (module, cls, clipping))
    reference = theirs(make_scheduler(monkeypatch, sampler, timestep_spacing="trailing"), 7)
    schedule = NoiseSchedule.from_config()
    grid, states = ours(sampler, 7, "epsilon", schedule, {"clip_sample_range": 0.3}, spacing="trailing")
    assert_equal_step_for_step(sampler, grid, states, reference)


def test_clipped_para_ddim_is_clipped_ddim():
    schedule = NoiseSchedule.from_config()
    options = {"parallelism": 3, "tolerance": 0.0, "clip_sample_range": 0.3}
    _, parallel = ours("para_ddim", 8, "epsilon", schedule, options)
    _, serial = ours("ddim", 8, "epsilon", schedule, {"clip_sample_range": 0.3})
    assert torch.allclose(parallel[-1], serial[-1], atol=1e-9)


def test_trained_betas():
    betas = np.linspace(1e-4, 0.03, 50).tolist()
    theirs = importlib.import_module("diffusers").DDIMScheduler(trained_betas=betas).alphas_cumprod
    assert torch.allclose(NoiseSchedule.from_betas(betas).alphas_cumprod.float(), theirs, rtol=1e-6)
