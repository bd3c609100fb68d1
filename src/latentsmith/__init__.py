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
    from latentsmith.diffusion import (
        SAMPLERS,
        Denoiser,
        GuidedDenoiser,
        NoiseSchedule,
        karras_sigmas,
        sample_ddim,
        sample_ddpm,
        sample_dpmsolver_multistep,
        sample_dpmsolver_sde,
        sample_dpmsolver_singlestep,
        sample_euler,
        sample_euler_ancestral,
        sample_heun,
        sample_lms,
        sample_para_ddim,
        sample_plms,
        sample_unipc,
    )  # fmt: skip
    from latentsmith.inference import Pipeline
    from latentsmith.models import AutoencoderKL, ClipTextEncoder, UNetModel
    from latentsmith.training.train import train

__version__ = "0.1.0"

__all__ = [
    "SAMPLERS", "AutoencoderKL", "ClipTextEncoder", "Denoiser", "GuidedDenoiser", "NoiseSchedule", "Pipeline",
    "UNetModel", "build", "convert", "karras_sigmas", "load_config", "precache", "sample_ddim", "sample_ddpm",
    "sample_dpmsolver_multistep", "sample_dpmsolver_sde", "sample_dpmsolver_singlestep", "sample_euler",
    "sample_euler_ancestral", "sample_heun", "sample_lms", "sample_para_ddim", "sample_plms", "sample_unipc", "train",
]  # fmt: skip

_MODULES = {
    "AutoencoderKL": "models",
    "ClipTextEncoder": "models",
    "Pipeline": "inference",
    "UNetModel": "models",
    "build": "checkpoints.load",
    "convert": "checkpoints.convert",
    "load_config": "config",
    "precache": "data.precache",
    "train": "training.train",
}  # every other name is of `diffusion`


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'latentsmith' has no attribute {name!r}")
    return getattr(import_module(f"latentsmith.{_MODULES.get(name, 'diffusion')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
