"""The mathematics of diffusion: tensors in, tensors out."""

from .denoiser import Denoiser
from .guidance import GuidedDenoiser
from .inpainting import inpainting_denoiser
from .loss import LOSS_TYPES, min_snr_weight, per_sample_loss
from .parameterization import PREDICTION_TYPES, canonical_prediction_type, to_denoised, to_epsilon, training_target
from .sampler_names import canonical_sampler
from .samplers import SAMPLERS, Sampler, Step, sample, sampling_schedule, sampling_sigmas
from .schedule import BETA_SCHEDULES, TIMESTEP_SPACINGS, NoiseSchedule
from .spacing import SamplingSchedule, karras_sigmas

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
    "SamplingSchedule",
    "Step",
    "canonical_prediction_type",
    "canonical_sampler",
    "inpainting_denoiser",
    "karras_sigmas",
    "min_snr_weight",
    "per_sample_loss",
    "sample",
    "sampling_schedule",
    "sampling_sigmas",
    "to_denoised",
    "to_epsilon",
    "training_target",
]
