"""Names of the typed sections of a config."""

from copy import deepcopy
from typing import Any, TypeAlias

from omegaconf import DictConfig, OmegaConf

Config: TypeAlias = DictConfig
ModelConfig: TypeAlias = DictConfig
UNetConfig: TypeAlias = DictConfig
FirstStageConfig: TypeAlias = DictConfig
CondStageConfig: TypeAlias = DictConfig
OptimConfig: TypeAlias = DictConfig
SchedConfig: TypeAlias = DictConfig
DataConfig: TypeAlias = DictConfig
DatasetConfig: TypeAlias = DictConfig
TrainerConfig: TypeAlias = DictConfig
ExpManagerConfig: TypeAlias = DictConfig
CheckpointConfig: TypeAlias = DictConfig
EmaConfig: TypeAlias = DictConfig
SampleImagesConfig: TypeAlias = DictConfig


def replaced(config: Config, key: str, value: Any) -> Config:
    """Return a copy of a config with another value at a dotted key; the given one stays as it was."""
    changed = deepcopy(config)
    OmegaConf.update(changed, key, value, force_add=True)
    return changed
