"""Options of NeMo's inference files (`sd_infer.yaml`, `sd_fid_images.yaml`), which `latentsmith generate` reads.

Nothing has a default: what a file does not give is `generate`'s own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .option import option


@dataclass(frozen=True)
class InferConfig:
    """Images to generate, by the options of `latentsmith generate`."""

    given_only: ClassVar[bool] = True
    unconditional_guidance_scale: float | None = option(None, "generate --guidance-scale")
    num_images_per_prompt: int | None = option(None, "generate --count", at_least=1)
    batch_size: int | None = option(None, "generate --batch-size", at_least=1)
    height: int | None = option(None, "generate --height", at_least=1)
    width: int | None = option(None, "generate --width", at_least=1)
    inference_steps: int | None = option(None, "generate --steps", at_least=1, at_most=1000)
    sampler_type: str | None = option(None, "generate --sampler")
    eta: float | None = option(None, "generate --eta", at_least=0, at_most=1)
    out_path: str | None = option(None, "generate --out", path=True)
    seed: int | None = option(None, "generate --seed", at_least=0)
    prompts: str | tuple[str, ...] | None = option(None, "prompts, where the command line gives none")
    sampler_parallelism: int | None = option(None, "generate --parallelism", at_least=1)
    sampler_tolerance: float | None = option(None, "generate --tolerance", at_least=0)


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
