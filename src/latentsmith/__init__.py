"""Train, fine-tune, run and evaluate Stable Diffusion v1 and v2.

The names below are the whole public surface; each is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentsmith.checkpoints.convert import convert
    from latentsmith.checkpoints.load import build
    from latentsmith.config import load_config
    from latentsmith.data.precache import precache
    from latentsmith.diffusion import NoiseSchedule
    from latentsmith.inference import Pipeline
    from latentsmith.models import AutoencoderKL, ClipTextEncoder, UNetModel
    from latentsmith.training.train import train

__version__ = "0.1.0"

__all__ = [
    "AutoencoderKL",
    "ClipTextEncoder",
    "NoiseSchedule",
    "Pipeline",
    "UNetModel",
    "build",
    "convert",
    "load_config",
    "precache",
    "train",
]

_MODULES = {
    "AutoencoderKL": "models",
    "ClipTextEncoder": "models",
    "NoiseSchedule": "diffusion",
    "Pipeline": "inference",
    "UNetModel": "models",
    "build": "checkpoints.load",
    "convert": "checkpoints.convert",
    "load_config": "config",
    "precache": "data.precache",
    "train": "training.train",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'latentsmith' has no attribute {name!r}")
    return getattr(import_module(f"latentsmith.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
