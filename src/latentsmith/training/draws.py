"""Everything random in training, as pure functions of (seed, position of the sample in the run)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from latentsmith.data.order import index_at, sample_seed
from latentsmith.diffusion import NoiseSchedule

DRAWS, CROPS, DROPOUT = 1, 2, 3  # streams of one position's seed: what is added to its sample; transforms; dropout
Shape = tuple[int, int, int]
VALIDATION = 20230501  # the seed of every validation loss, so that runs can be compared


@dataclass(frozen=True)
class DiffusionDraws:
    """What the diffusion loss draws for one sample.

    latent_shape: (channels, height, width). schedule: its timesteps are drawn uniformly.
    caption_dropout_rate: chance of the empty prompt. text_embedding_dropout_rate: chance of a zeroed embedding.
    offset_noise: deviation of a noise that is the same all over a channel, added to the noise, so that pictures can
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

    def __call__(self, position: int, latent_shape: Shape | None = None) -> dict[str, Tensor]:
        """Draws for the sample at `position`, without a batch axis: `noise` and `posterior_noise` of latent_shape (the
        sample's own, where it has one), `timesteps` with its `signal` and `noise_level`, the flags `empty_caption` and
        `zero_embedding`, and, with input_perturbation, the `input_noise` that the U-Net sees in place of the noise it
        is to find."""
        shape = latent_shape or self.latent_shape
        generator = generator_at(self.seed, position)
        chances = torch.rand(2, generator=generator)
        timesteps = torch.randint(self.schedule.timesteps, (), generator=generator)
        signal, noise_level = self.schedule.signal_and_noise(timesteps)
        drawn = {
            "timesteps": timesteps,
            "signal": signal,
            "noise_level": noise_level,
            "noise": torch.randn(shape, generator=generator),
            "posterior_noise": torch.randn(shape, generator=generator),
            "empty_caption": chances[0] < self.caption_dropout_rate,
            "zero_embedding": chances[1] < self.text_embedding_dropout_rate,
        }
        if self.offset_noise or self.input_perturbation:  # drawn last, so that an option changes only what it adds
            offset = torch.randn(shape[0], 1, 1, generator=generator)
            drawn["noise"] = drawn["noise"] + self.offset_noise * offset
        if self.input_perturbation:
            perturbation = torch.randn(shape, generator=generator)
            drawn["input_noise"] = drawn["noise"] + self.input_perturbation * perturbation
        return drawn


@dataclass(frozen=True)
class ValidationDraws:
    """What the validation loss takes for sample `number` of `count`: the same in every run, whatever its seed.

    The timesteps are stratified: each `count`-th part of the schedule has one sample, in a shuffled order. Nothing is
    dropped or perturbed. latent_shape, schedule: as of `DiffusionDraws`.
    """

    latent_shape: tuple[int, int, int]
    schedule: NoiseSchedule
    count: int

    def __call__(self, number: int, latent_shape: Shape | None = None) -> dict[str, Tensor]:
        stratum = index_at(VALIDATION, number, self.count)
        timesteps = torch.tensor((2 * stratum + 1) * self.schedule.timesteps // (2 * self.count))
        drawn = DiffusionDraws(VALIDATION, self.latent_shape, self.schedule)(number, latent_shape)
        signal, noise_level = self.schedule.signal_and_noise(timesteps)
        return drawn | {"timesteps": timesteps, "signal": signal, "noise_level": noise_level}


@dataclass(frozen=True)
class PosteriorDraws:
    """What training an autoencoder draws for one sample: the noise that its latents are sampled with."""

    seed: int
    latent_shape: tuple[int, int, int]

    def __call__(self, position: int, latent_shape: Shape | None = None) -> dict[str, Tensor]:
        generator = generator_at(self.seed, position)
        return {"posterior_noise": torch.randn(latent_shape or self.latent_shape, generator=generator)}


def generator_at(seed: int, position: int) -> torch.Generator:
    """A CPU generator that depends on nothing but the seed and the position."""
    return torch.Generator("cpu").manual_seed(sample_seed(seed, position, DRAWS))
