"""Everything random in training, as pure functions of (seed, position of the sample in the run)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from latentsmith.data.order import sample_seed

DRAWS, CROPS = 1, 2  # streams of the seed of one position: what training adds to a sample; its transforms


@dataclass(frozen=True)
class DiffusionDraws:
    """What the diffusion loss draws for one sample.

    latent_shape: (channels, height, width). timesteps: 0..timesteps-1, uniform. caption_dropout_rate: chance of the
    empty prompt; text_embedding_dropout_rate: chance of zeros in place of the embedding.
    """

    seed: int
    latent_shape: tuple[int, int, int]
    timesteps: int
    caption_dropout_rate: float = 0.0
    text_embedding_dropout_rate: float = 0.0

    def __call__(self, position: int) -> dict[str, Tensor]:
        """Draws for the sample at `position`: `noise` and `posterior_noise` of latent_shape, `timesteps` and the
        two flags `empty_caption` and `zero_embedding`, without a batch axis."""
        generator = generator_at(self.seed, position)
        chances = torch.rand(2, generator=generator)
        return {
            "timesteps": torch.randint(self.timesteps, (), generator=generator),
            "noise": torch.randn(self.latent_shape, generator=generator),
            "posterior_noise": torch.randn(self.latent_shape, generator=generator),
            "empty_caption": chances[0] < self.caption_dropout_rate,
            "zero_embedding": chances[1] < self.text_embedding_dropout_rate,
        }


@dataclass(frozen=True)
class PosteriorDraws:
    """What training an autoencoder draws for one sample: the noise that its latents are sampled with."""

    seed: int
    latent_shape: tuple[int, int, int]

    def __call__(self, position: int) -> dict[str, Tensor]:
        generator = generator_at(self.seed, position)
        return {"posterior_noise": torch.randn(self.latent_shape, generator=generator)}


def generator_at(seed: int, position: int) -> torch.Generator:
    """A CPU generator that depends on nothing but the seed and the position."""
    return torch.Generator("cpu").manual_seed(sample_seed(seed, position, DRAWS))
