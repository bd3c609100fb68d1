"""The mathematics of diffusion: tensors in, tensors out."""

from latentsmith.diffusion.loss import LOSS_TYPES, min_snr_weight, per_sample_loss
from latentsmith.diffusion.parameterization import (
    PREDICTION_TYPES,
    canonical_prediction_type,
    to_denoised,
    to_epsilon,
    training_target,
)
from latentsmith.diffusion.schedule import BETA_SCHEDULES, TIMESTEP_SPACINGS, NoiseSchedule

__all__ = [
    "BETA_SCHEDULES",
    "LOSS_TYPES",
    "PREDICTION_TYPES",
    "TIMESTEP_SPACINGS",
    "NoiseSchedule",
    "canonical_prediction_type",
    "min_snr_weight",
    "per_sample_loss",
    "to_denoised",
    "to_epsilon",
    "training_target",
]
