"""Train, fine-tune, run and evaluate Stable Diffusion v1 and v2.

The public surface are the names of `_MODULES` and every sampler; each is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentsmith.checkpoints.convert import convert as convert
    from latentsmith.checkpoints.load import build as build
    from latentsmith.config import load_config as load_config
    from latentsmith.data.precache import precache as precache
    from latentsmith.diffusion import Denoiser as Denoiser
    from latentsmith.diffusion import GuidedDenoiser as GuidedDenoiser
    from latentsmith.diffusion import NoiseSchedule as NoiseSchedule
    from latentsmith.diffusion import karras_sigmas as karras_sigmas
    from latentsmith.diffusion.samplers import *  # noqa: F403
    from latentsmith.inference import Pipeline as Pipeline
    from latentsmith.models import AutoencoderKL as AutoencoderKL
    from latentsmith.models import ClipTextEncoder as ClipTextEncoder
    from latentsmith.models import UNetModel as UNetModel
    from latentsmith.training.train import train as train

__version__ = "0.1.0"

_MODULES = {
    "AutoencoderKL": "models",
    "ClipTextEncoder": "models",
    "Denoiser": "diffusion",
    "GuidedDenoiser": "diffusion",
    "NoiseSchedule": "diffusion",
    "Pipeline": "inference",
    "UNetModel": "models",
    "build": "checkpoints.load",
    "convert": "checkpoints.convert",
    "karras_sigmas": "diffusion",
    "load_config": "config",
    "precache": "data.precache",
    "train": "training.train",
}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted([*_MODULES, *filter(_is_sampler, import_module("latentsmith.diffusion.samplers").__all__)])
    if name not in _MODULES and not _is_sampler(name):
        raise AttributeError(f"module 'latentsmith' has no attribute {name!r}")
    return getattr(import_module(f"latentsmith.{_MODULES.get(name, 'diffusion.samplers')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__getattr__("__all__")])


def _is_sampler(name: str) -> bool:
    return name == "SAMPLERS" or name.startswith("sample_")
