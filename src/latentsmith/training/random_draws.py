"""Everything random in training, as pure functions of (seed, position of the sample in the run)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentsmith.data.loader import Shape
from latentsmith.data.shuffle import DRAWS, sample_seed
from latentsmith.diffusion import NoiseSchedule


@dataclass(frozen=True)
class DiffusionDraws:
    """Draw the random inputs of the diffusion loss for a batch, each sample's by its own position.

    latent_shape: (channels, height, width). schedule: its timesteps are drawn uniformly.
    caption_dropout_rate: chance of the empty prompt. text_embedding_dropout_rate: chance of a zeroed embedding.
    offset_noise: deviation of a noise that is the same all over a channel, added to the noise, so that images can
        become very dark or light (Guttenberg 2023). input_perturbation: deviation of the noise added to the U-Net's
        input but not to its target (Ning et al. 2023, "Input perturbation reduces exposure bias in diffusion models").
    """

    seed: int
    latent_shape: tuple[int, int, int]
    schedule: NoiseSchedule
    caption_dropout_rate: float = 0.0
    text_embedding_dropout_rate: float = 0.0
    offset_noise: float = 0.0
    input_perturbation: float = 0.0

    def __call__(self, positions: Sequence[int], latent_shape: Shape | None = None) -> dict[str, Tensor]:
        """Return the draws for the samples at `positions`, stacked.

        `noise`, `posterior_noise`: of latent_shape (the samples' own, where they have one). `timesteps`, with their
        `sqrt_alphas_cumprod`, `sqrt_one_minus_alphas_cumprod`. `empty_caption`, `zero_embedding`: flags. `input_noise`,
        with input_perturbation: what the U-Net sees in place of the noise that it is to find.
        """
        count, shape = len(positions), latent_shape or self.latent_shape
        chances, timesteps = torch.empty(count, 2), torch.empty(count, dtype=torch.long)
        noise, posterior_noise = torch.empty(count, *shape), torch.empty(count, *shape)
        offset, perturbation = torch.empty(count, shape[0], 1, 1), torch.empty(count, *shape)
        wanted = 4 if self.input_perturbation else 3 if self.offset_noise else 2  # an option changes only what it adds
        generator = torch.Generator("cpu")
        normals = (noise, posterior_noise, offset, perturbation)[:wanted]
        rows = [tensor.unbind() for tensor in (chances, timesteps, *normals)]
        for position, chance, timestep, *normal in zip(positions, *rows, strict=True):
            seeded(generator, self.seed, position)
            chance.uniform_(generator=generator)
            timestep.random_(self.schedule.timesteps, generator=generator)
            for row in normal:
                row.normal_(generator=generator)
        scale, noise_scale = self.schedule.coefficients(timesteps)
        drawn = {
            "timesteps": timesteps,
            "sqrt_alphas_cumprod": scale,
            "sqrt_one_minus_alphas_cumprod": noise_scale,
            "noise": noise + self.offset_noise * offset if self.offset_noise else noise,
            "posterior_noise": posterior_noise,
            "empty_caption": chances[:, 0] < self.caption_dropout_rate,
            "zero_embedding": chances[:, 1] < self.text_embedding_dropout_rate,
        }
        if self.input_perturbation:
            drawn["input_noise"] = drawn["noise"] + self.input_perturbation * perturbation
        return drawn


@dataclass(frozen=True)
class PosteriorDraws:
    """Draw the noise that the latents of an autoencoder in training are sampled with."""

    seed: int
    latent_shape: tuple[int, int, int]

    def __call__(self, positions: Sequence[int], latent_shape: Shape | None = None) -> dict[str, Tensor]:
        noise, generator = torch.empty(len(positions), *(latent_shape or self.latent_shape)), torch.Generator("cpu")
        for row, position in enumerate(positions):
            noise[row].normal_(generator=seeded(generator, self.seed, position))
        return {"posterior_noise": noise}


def seeded(generator: torch.Generator, seed: int, position: int) -> torch.Generator:
    """Put a generator into a state that depends on nothing but the seed and the position."""
    return generator.manual_seed(sample_seed(seed, position, DRAWS))
