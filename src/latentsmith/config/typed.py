"""The typed sections of a config; their fields are the options."""

from .data_options import AugmentationsConfig, DataConfig, DatasetConfig, ValidationDatasetConfig
from .inference_options import FidConfig, InferConfig, InferenceConfig
from .model_options import (
    CondStageConfig,
    DDConfig,
    FirstStageConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    SchedConfig,
    UNetConfig,
)
from .run_options import CheckpointConfig, Config, EmaConfig, ExpManagerConfig, SampleImagesConfig, TrainerConfig
from .tree import replaced

__all__ = [
    "AugmentationsConfig",
    "CheckpointConfig",
    "CondStageConfig",
    "Config",
    "DDConfig",
    "DataConfig",
    "DatasetConfig",
    "EmaConfig",
    "ExpManagerConfig",
    "FidConfig",
    "FirstStageConfig",
    "InferConfig",
    "InferenceConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "SampleImagesConfig",
    "SchedConfig",
    "TrainerConfig",
    "UNetConfig",
    "ValidationDatasetConfig",
    "replaced",
]
