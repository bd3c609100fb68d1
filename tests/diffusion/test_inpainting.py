"""Outside the mask every sampler ends at the given latents; inside it does what it would do alone."""

import pytest
import torch

from latentsmith.diffusion import SAMPLERS, NoiseSchedule, inpainting_denoiser, sample, sampling_schedule

SCHEDULE = NoiseSchedule.from_config()


def gaussian(noisy, sigma):
    """The exact clean estimate of latents from a normal distribution of mean 0.5 and deviation 0.3, per pixel."""
    level = sigma.view(-1, 1, 1, 1).to(noisy) if isinstance(sigma, torch.Tensor) else sigma
    return 0.5 + (noisy - 0.5) * 0.09 / (0.09 + level**2)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_kept_and_what_is_drawn(sampler):
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
