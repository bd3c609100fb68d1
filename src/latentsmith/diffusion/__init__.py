"""The mathematics of diffusion: tensors in, tensors out."""

from latentsmith.diffusion.denoiser import Denoiser
from latentsmith.diffusion.grid import SamplingGrid, karras_sigmas
from latentsmith.diffusion.guidance import GuidedDenoiser
from latentsmith.diffusion.inpainting import keep_outside
from latentsmith.diffusion.loss import LOSS_TYPES, min_snr_weight, per_sample_loss
from latentsmith.diffusion.parameterization import (
    PREDICTION_TYPES,
    canonical_prediction_type,
    to_denoised,
    to_epsilon,
    training_target,
)
from latentsmith.diffusion.sampler_names import canonical_sampler
from latentsmith.diffusion.samplers import SAMPLERS, Sampler, Step, sample, sampling_grid, sampling_sigmas
from latentsmith.diffusion.schedule import BETA_SCHEDULES, TIMESTEP_SPACINGS, NoiseSchedule

__all__ = [
    "BETA_SCHEDULES",
    "LOSS_TYPES",
    "PREDICTION_TYPES",
    "SAMPLERS",
    "TIMESTEP_SPACINGS",
    "Denoiser",
    "GuidedDenoiser",
    "NoiseSchedule",
    "Sampler",
    "SamplingGrid",
    "Step",
    "canonical_prediction_type",
    "canonical_sampler",
    "karras_sigmas",
    "keep_outside",
    "min_snr_weight",
    "per_sample_loss",
    "sample",
    "sampling_grid",
    "sampling_sigmas",
    "to_denoised",
    "to_epsilon",
    "training_target",
]
