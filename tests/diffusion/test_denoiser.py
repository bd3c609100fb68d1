import pytest
import torch

from latentsmith.diffusion import SAMPLERS, Denoiser, NoiseSchedule, inpainting_denoiser, sample, sampling_schedule
from latentsmith.diffusion.denoiser import to_output

SCHEDULE = NoiseSchedule.from_config(0.00085, 0.012)
LATENTS, NOISE = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))


def perfect_network(prediction_type):
    """Knows the answer; checks that it is asked what training would ask: unit variance, the right timestep."""

    def network(noisy, timesteps):
        alphas_cumprod = SCHEDULE.alphas_cumprod[timesteps.round().long()].view(-1, 1, 1, 1).float()
        torch.testing.assert_close(
            noisy, alphas_cumprod.sqrt() * LATENTS + (1 - alphas_cumprod).sqrt() * NOISE, rtol=1e-4, atol=1e-5
        )
        answers = {
            "epsilon": NOISE,
            "v_prediction": alphas_cumprod.sqrt() * NOISE - (1 - alphas_cumprod).sqrt() * LATENTS,
            "sample": LATENTS,
        }
        return answers[prediction_type]

    return network


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_a_perfect_network_gives_the_latents(prediction_type, per_sample):
    denoise = Denoiser(perfect_network(prediction_type), SCHEDULE, prediction_type)
    for timestep in (0, 500, 999):
        sigma = SCHEDULE.sigmas[timestep].item()
        asked = torch.full((3,), sigma, dtype=torch.float64) if per_sample else sigma
        denoised = denoise(LATENTS + sigma * NOISE, asked)
        assert denoised.dtype == torch.float32
        torch.testing.assert_close(denoised, LATENTS, rtol=1e-4, atol=1e-4)


def test_each_sample_may_have_its_own_sigma():
    seen = []
    denoise = Denoiser(lambda noisy, timesteps: seen.append(timesteps) or noisy, SCHEDULE)
    sigmas = SCHEDULE.sigmas[[0, 500, 999]]
    together = denoise(LATENTS, sigmas)
    assert seen[0].tolist() == pytest.approx([0, 500, 999], abs=1e-3) and seen[0].dtype == torch.float32
    alone = [denoise(LATENTS[i : i + 1], sigmas[i].item()) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))
    torch.testing.assert_close(together[:1], denoise(LATENTS[:1], sigmas[0]))


def test_between_timesteps_the_network_is_asked_in_between():
    seen = []
    denoise = Denoiser(lambda noisy, timesteps: seen.append(timesteps.item()) or noisy, SCHEDULE)
    denoise(LATENTS[:1], (SCHEDULE.sigmas[500] * SCHEDULE.sigmas[501]).sqrt().item())
    Denoiser(denoise.network, SCHEDULE, timestep_at=lambda sigma: 42)(LATENTS[:1], 1.0)
    assert seen == pytest.approx([500.5, 42])


def test_output_and_estimate_determine_each_other():
    for prediction_type in ("epsilon", "v", "x0"):
        denoise = Denoiser(lambda noisy, timesteps: noisy.cos(), SCHEDULE, prediction_type)
        output = denoise.output(LATENTS, 3.0)
        torch.testing.assert_close(output, (LATENTS / 10**0.5).cos())
        estimate = denoise.from_output(output, LATENTS, 3.0)
        torch.testing.assert_close(estimate, denoise(LATENTS, 3.0))
        torch.testing.assert_close(to_output(prediction_type, estimate, LATENTS, 3.0), output)


def test_conditioning_for_fewer_samples_is_repeated():
    seen = []

    def network(noisy, timesteps, context, size):
        seen.append((context, size))
        return noisy

    denoise = Denoiser(network, SCHEDULE)
    denoise(torch.zeros(4, 1, 2, 2), 1.0, context=torch.tensor([[1.0], [2.0]]), size=7)
    assert seen[0][0].flatten().tolist() == [1, 2, 1, 2] and seen[0][1] == 7
    with pytest.raises(ValueError, match="context is for 2 samples, which does not divide the 3 noisy ones"):
        denoise(LATENTS, 1.0, context=torch.zeros(2, 1), size=7)


def test_a_bfloat16_network_is_answered_in_float32():
    denoise = Denoiser(lambda noisy, timesteps: noisy.bfloat16(), SCHEDULE)
    assert denoise(LATENTS, 1.0).dtype == torch.float32


def test_unknown_prediction_type():
    with pytest.raises(ValueError, match="'noise' is not one of epsilon"):
        Denoiser(lambda noisy, timesteps: noisy, SCHEDULE, "noise")


def gaussian(noisy, sigma):
    """The exact clean estimate of latents from a normal distribution of mean 0.5 and deviation 0.3, per pixel."""
    level = sigma.view(-1, 1, 1, 1).to(noisy) if isinstance(sigma, torch.Tensor) else sigma
    return 0.5 + (noisy - 0.5) * 0.09 / (0.09 + level**2)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_inpainting_ends_at_the_given_latents_outside_the_mask(sampler):
    """Inside it, every sampler does what it would do alone."""
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 1, 4, 4, dtype=torch.float64), torch.randn(2, 1, 4, 4, dtype=torch.float64)
    mask = torch.zeros(2, 1, 4, 4)
    mask[:, :, 1:3, 1:3] = 1
    grid = sampling_schedule(SCHEDULE, sampler, 8)
    draws = [torch.randn_like(noise) for _ in range(8)]
    start = (clean + grid.sigmas[0].item() * noise) / grid.start_scale
    *_, masked = sample(
        sampler, inpainting_denoiser(gaussian, mask, clean), start, grid, noise_sampler=draws.__getitem__
    )
    *_, alone = sample(sampler, gaussian, start, grid, noise_sampler=draws.__getitem__)
    outside = mask.expand_as(clean) == 0
    end = grid.step_targets[-1].item()  # ends above 0: some of the noise is left
    assert (masked.latents - clean)[outside].abs().max() <= 4 * end + 1e-9
    torch.testing.assert_close(masked.latents[~outside], alone.latents[~outside], rtol=1e-6, atol=1e-9)
    assert (masked.latents - clean)[~outside].abs().max() > 0.1


def test_inpainting_keeps_the_latents_where_the_network_overflows():
    mask = torch.zeros(2, 1, 2, 2)
    mask[..., 0] = 1
    masked = inpainting_denoiser(lambda noisy, sigma: noisy * float("nan"), mask, LATENTS[:2])
    found = masked(NOISE[:2], 1.0)
    assert torch.equal(found[..., 1], LATENTS[:2, ..., 1]) and found[..., 0].isnan().all()
