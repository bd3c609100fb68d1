import pytest
import torch
from diffusers import DDPMScheduler

from latentsmith.diffusion import NoiseSchedule, canonical_prediction_type, to_denoised, training_target

LATENTS, NOISE = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TIMESTEPS = torch.tensor([0, 500, 999])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "eps", "v", "x0"])
def test_the_right_output_leads_back_to_the_latents(prediction_type):
    scale, noise_scale = (c.double() for c in NoiseSchedule.from_config().coefficients(TIMESTEPS))
    scale = (1 - noise_scale**2).sqrt()
    noisy = scale.view(-1, 1, 1, 1) * LATENTS + noise_scale.view(-1, 1, 1, 1) * NOISE
    output = training_target(prediction_type, LATENTS, NOISE, scale, noise_scale)
    torch.testing.assert_close(to_denoised(prediction_type, output, noisy, scale, noise_scale), LATENTS)


def test_plain_numbers_serve_a_whole_batch():
    output = training_target("v_prediction", LATENTS, NOISE, 0.6, 0.8)
    torch.testing.assert_close(output, 0.6 * NOISE - 0.8 * LATENTS)
    noisy = 0.6 * LATENTS + 0.8 * NOISE
    torch.testing.assert_close(to_denoised("v_prediction", output, noisy, 0.6, 0.8), LATENTS)


def test_velocity_equals_diffusers():
    schedule = NoiseSchedule.from_config(0.00085, 0.012)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    theirs = scheduler.get_velocity(LATENTS.float(), NOISE.float(), TIMESTEPS)
    ours = training_target("v", LATENTS.float(), NOISE.float(), *schedule.coefficients(TIMESTEPS))
    torch.testing.assert_close(ours, theirs)


def test_at_zero_terminal_snr_the_velocity_is_minus_the_latents():
    coefficients = NoiseSchedule.from_config().zero_terminal_snr().coefficients(torch.tensor([999]))
    assert torch.equal(training_target("v", LATENTS[:1], NOISE[:1], *coefficients), -LATENTS[:1])
    assert torch.equal(to_denoised("v", -LATENTS[:1], NOISE[:1], *coefficients), LATENTS[:1])


def test_unknown_prediction_type():
    with pytest.raises(ValueError, match="'velocity' is not one of epsilon, v_prediction, sample, eps, v, x0"):
        canonical_prediction_type("velocity")
