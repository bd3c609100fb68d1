import pytest
import torch

from latentsmith.diffusion import NoiseSchedule, min_snr_weight, per_sample_loss, to_denoised, training_target


def test_each_sample_has_its_own_mean():
    target = torch.zeros(2, 4, 2, 2)
    output = target.clone()
    output[1, 0] = 3.0  # a quarter of the sample
    assert per_sample_loss(output, target).tolist() == [0, 9 / 4]
    assert per_sample_loss(output, target, "l1").tolist() == [0, 3 / 4]
    assert per_sample_loss(output, target, "huber").tolist() == [0, 2.5 / 4]
    assert per_sample_loss(output, target, "huber", huber_delta=5).tolist() == [0, 4.5 / 4]


def test_half_precision_is_averaged_in_float32():
    output = torch.full((1, 4, 64, 64), 300.0).half()  # squares overflow float16
    loss = per_sample_loss(output, torch.zeros_like(output))
    assert loss.dtype == torch.float32 and loss.item() == 90_000


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_the_error_in_the_latents_alike_for_every_parameterization(prediction_type):
    schedule = NoiseSchedule.from_config()
    alphas_cumprod = schedule.alphas_cumprod[[10, 300, 600, 999]]
    scale, noise_scale, snr = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt(), schedule.snr[[10, 300, 600, 999]]
    latents, noise, error = torch.randn(3, 4, 1, 2, 2, dtype=torch.float64)
    noisy = scale.view(-1, 1, 1, 1) * latents + noise_scale.view(-1, 1, 1, 1) * noise
    target = training_target(prediction_type, latents, noise, scale, noise_scale)
    estimate = to_denoised(prediction_type, target + error, noisy, scale, noise_scale)
    weighted = min_snr_weight(prediction_type, snr, gamma=5) * per_sample_loss(target + error, target)
    torch.testing.assert_close(weighted, snr.clamp(max=5) * per_sample_loss(estimate, latents))


def test_min_snr_at_the_ends_of_the_schedule():
    ends = torch.tensor([0.0, 1e9])
    assert min_snr_weight("epsilon", ends).tolist() == pytest.approx([1, 5e-9])
    assert min_snr_weight("v", ends).tolist() == pytest.approx([0, 5e-9])
    assert min_snr_weight("sample", ends).tolist() == [0, 5]


def test_what_is_not_a_loss():
    with pytest.raises(ValueError, match="'mse' is not one of l2, l1, huber"):
        per_sample_loss(torch.zeros(1, 1), torch.zeros(1, 1), "mse")
    with pytest.raises(ValueError, match="gamma is 0"):
        min_snr_weight("epsilon", torch.ones(1), 0)
