"""The mathematics of diffusion: tensors in, tensors out."""

from . import samplers
from .denoiser import Denoiser, inpainting_denoiser
from .guidance import GuidedDenoiser
from .loss import LOSS_TYPES, min_snr_weight, per_sample_loss
from .parameterization import PREDICTION_TYPES, canonical_prediction_type, to_denoised, training_target
from .samplers import *  # noqa: F403
from .sampling import canonical_sampler, sample, sampling_schedule
from .schedule import BETA_SCHEDULES, TIMESTEP_SPACINGS, NoiseSchedule, ldm_beta_schedule
from .spacing import SamplingSchedule, karras_sigmas

__all__ = [
    "BETA_SCHEDULES",
    "LOSS_TYPES",
    "PREDICTION_TYPES",
    "TIMESTEP_SPACINGS",
    "Denoiser",
    "GuidedDenoiser",
    "NoiseSchedule",
    "SamplingSchedule",
    "canonical_prediction_type",
    "canonical_sampler",
    "inpainting_denoiser",
    "karras_sigmas",
    "ldm_beta_schedule",
    "min_snr_weight",
    "per_sample_loss",
    "sample",
    "sampling_schedule",
    "to_denoised",
    "training_target",
]
__all__ += samplers.__all__
