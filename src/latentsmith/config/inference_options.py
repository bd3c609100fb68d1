"""Options of NeMo's inference files (`sd_infer.yaml`, `sd_fid_images.yaml`), which `latentsmith generate` reads.

Nothing has a default: what a file does not give is `generate`'s own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from latentsmith.image_request import OPTIONS

from .option import option


def sampling(name: str) -> Any:
    """Return an option of `infer` that is one of `generate`, with its bounds."""
    each = OPTIONS[name]
    return option(None, f"generate {each.flags[0]}", at_least=each.low, at_most=each.high)


@dataclass(frozen=True)
class InferConfig:
    """Images to generate, by the options of `latentsmith generate`."""

    given_only: ClassVar[bool] = True
    unconditional_guidance_scale: float | None = sampling("guidance_scale")
    num_images_per_prompt: int | None = option(None, "generate --count", at_least=1)
    batch_size: int | None = option(None, "generate --batch-size", at_least=1)
    height: int | None = sampling("height")
    width: int | None = sampling("width")
    inference_steps: int | None = sampling("num_inference_steps")
    sampler_type: str | None = sampling("sampler")
    eta: float | None = sampling("eta")
    out_path: str | None = option(None, "generate --out", path=True)
    seed: int | None = sampling("seed")
    prompts: str | tuple[str, ...] | None = option(None, "prompts, where the command line gives none")
    sampler_parallelism: int | None = sampling("parallelism")
    sampler_tolerance: float | None = sampling("tolerance")


@dataclass(frozen=True)
class FidConfig:
    """Images for an FID, a folder for each guidance scale."""

    given_only: ClassVar[bool] = True
    classifier_free_guidance: float | tuple[float, ...] | None = option(
        None,
        "guidance scales, a folder of images for each; in a SLURM array its index takes one of them",
        min_length=1,
    )
    coco_captions_path: str | None = option(
        None,
        "folder of text files, in the order of their names; an image for each line",
        path=True,
    )
    num_images_to_eval: int | None = option(
        None, "images of each scale: the first so many lines; fewer is an error", at_least=1
    )
    save_path: str | None = option(None, "where <scale>/imageNNNNNN.png go", path=True)


@dataclass(frozen=True)
class InferenceTrainerConfig:
    """Options of the trainer that generating takes."""

    given_only: ClassVar[bool] = True
    precision: str | None = option(None, "generate --dtype")


@dataclass(frozen=True)
class InferenceModelConfig:
    """Options of the model that generating takes."""

    given_only: ClassVar[bool] = True
    restore_from_path: str | None = option(
        None, "in an inference file generate --from, in a training model.ckpt_path", path=True
    )


@dataclass(frozen=True)
class InferenceConfig:
    """A whole inference file."""

    given_only: ClassVar[bool] = True
    infer: InferConfig = InferConfig()
    fid: FidConfig = FidConfig()
    model: InferenceModelConfig = InferenceModelConfig()
    trainer: InferenceTrainerConfig = InferenceTrainerConfig()
