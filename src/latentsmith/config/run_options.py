"""Options of a run as a whole: its name, the trainer, what it writes and where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from latentsmith.precision import PRECISIONS

from .model_options import ModelConfig
from .option import option
from .value_types import choice, count_or_share, either, list_of, whole

PRECISION_SPELLINGS = {
    "32": "32-true",
    "32.0": "32-true",
    "fp32": "32-true",
    "bf16": "bf16-mixed",
    "16": "16-mixed",
    "fp16": "16-mixed",
}


@dataclass(frozen=True)
class TrainerConfig:
    """Devices, precision and length of a run; the names are Lightning's."""

    devices: int | tuple[int, ...] | Literal["auto"] = option(
        1, "devices of each machine, -1 for all", type=either(whole(-1), list_of(whole(0)), choice("auto"))
    )
    num_nodes: int = option(1, "machines", at_least=1, aliases=("nodes",))
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = option(
        "auto", "auto takes the first available of cuda, mps, cpu"
    )
    strategy: str = option(
        "auto",
        "ddp (auto is the same), or model_parallel: weights, averages and optimizer split over the processes",
        aliases=("fsdp",),
    )
    precision: str = option(
        "32-true",
        "arithmetic; weights and optimizer stay float32 except in bf16-true and 16-true",
        choices=tuple(PRECISIONS),
        spellings=PRECISION_SPELLINGS,
        aliases=("mixed_precision", "dtype", "amp"),
    )
    max_steps: int = option(
        -1,
        "optimizer steps of the run, -1 for no limit",
        at_least=-1,
        aliases=("max_train_steps", "steps", "num_steps", "train_steps"),
    )
    max_epochs: int = option(
        -1, "passes over the data, -1 for no limit", at_least=-1, aliases=("epochs", "num_train_epochs")
    )
    max_time: str | None = option(None, "stop after DD:HH:MM:SS of wall time")
    accumulate_grad_batches: int = option(
        1,
        "micro batches of one optimizer step; 1 leaves it to model.global_batch_size",
        at_least=1,
        aliases=("gradient_accumulation_steps", "accumulation"),
    )
    gradient_clip_val: float | None = option(
        None,
        "largest global L2 norm of the gradient; null, 0 or less for no clipping",
        aliases=("max_grad_norm", "grad_clip", "clip_grad"),
    )
    deterministic: bool = option(False, "refuse kernels whose result varies between runs (bit-exact resume on a GPU)")
    benchmark: bool = option(False, "let cuDNN time its convolutions and take the fastest")
    log_every_n_steps: int = option(
        10, "optimizer steps between two rows of the log", at_least=1, aliases=("log_every",)
    )
    val_check_interval: int | float = option(
        1000,
        "optimizer steps between two validations, or a share of an epoch such as 1.0",
        type=count_or_share(),
        aliases=("eval_every", "validation_steps"),
    )
    limit_val_batches: int | float = option(
        1.0,
        "micro batches of each process in a validation, or a share of model.data.validation; 0 for no validation",
        type=count_or_share(),
    )
    enable_progress_bar: bool = option(True, "loss, samples/s and time left on the terminal")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and how many are kept."""

    every_n_train_steps: int = option(
        1000,
        "optimizer steps between two checkpoints; the last step always makes one",
        at_least=0,
        aliases=("save_steps", "checkpointing_steps", "save_every"),
    )
    every_n_minutes: float | None = option(
        None,
        "minutes after a checkpoint until the next, whichever comes first",
        at_least=0,
        aliases=("train_time_interval",),
    )
    save_top_k: int = option(
        3, "how many of the newest checkpoints are kept, -1 for all", at_least=-1, aliases=("keep",)
    )


@dataclass(frozen=True)
class EmaConfig:
    """The exponential moving average of the trained weights."""

    enable: bool = option(False, "keep an exponential moving average of the trained weights", aliases=("use_ema",))
    decay: float = option(
        0.9999, "share of the old average that each step keeps", at_least=0, at_most=1, aliases=("ema_decay",)
    )
    every_n_steps: int = option(1, "optimizer steps between two updates of the average", at_least=1)
    cpu_offload: bool = option(False, "keep the average in the memory of the CPU")


@dataclass(frozen=True)
class SampleImagesConfig:
    """Images that a run generates as it trains."""

    every_n_train_steps: int = option(0, "optimizer steps between two rows of sample images; 0 for none", at_least=0)
    prompts: tuple[str, ...] = option((), "one image for each")
    negative_prompt: str | None = option(None, "what to steer away from; null for the model's own null text")
    steps: int = option(
        25, "sampling steps", at_least=1, at_most=1000, aliases=("num_inference_steps", "inference_steps")
    )
    guidance_scale: float = option(7.5, "classifier-free guidance, 1 for none", at_least=0, aliases=("cfg_scale",))
    sampler: str = option("dpmsolver++", "as `latentsmith generate --sampler`")
    weights: Literal["ema", "raw"] = option(
        "ema", "sample with the average, where there is one, or the trained weights"
    )
    seed: int = option(0, "of the initial noise: the same images are generated each time", at_least=0)


@dataclass(frozen=True)
class ExpManagerConfig:
    """The run folder, and what is written to it and read from it."""

    exp_dir: str | None = option(None, "folder of run folders; null for ./runs", path=True)
    name: str = option("${name}", "the run folder inside exp_dir")
    create_tensorboard_logger: bool = option(True, "write TensorBoard scalars and images")
    create_checkpoint_callback: bool = option(True, "write checkpoints")
    resume_if_exists: bool = option(True, "resume from the newest checkpoint in the run folder")
    resume_ignore_no_checkpoint: bool = option(
        True, "start from step 0 where the run folder holds none; false makes that an error"
    )
    resume_from_checkpoint: str | None = option(
        None,
        "resume from this checkpoint, whatever the run folder holds",
        aliases=("resume",),
        path=True,
    )
    allow_data_change: bool = option(False, "resume on another data set; asked for at each start, never kept")
    nonfinite_limit: int = option(
        10,
        "steps in a row without a finite gradient that end the run; each is skipped and described in nonfinite/",
        at_least=1,
        aliases=("max_skipped_steps",),
    )
    create_wandb_logger: bool = option(False, "also send the scalars to Weights & Biases", aliases=("wandb",))
    wandb_logger_kwargs: Mapping[str, Any] = option(
        {}, "arguments of Lightning's WandbLogger: project, name, entity, ..."
    )
    checkpoint_callback_params: CheckpointConfig = CheckpointConfig()
    ema: EmaConfig = EmaConfig()
    sample_images: SampleImagesConfig = SampleImagesConfig()


@dataclass(frozen=True)
class Config:
    """All options of a run, resolved: read by attribute, never written (`replaced` makes a changed copy)."""

    name: str = option("latentsmith", "name of the run")
    trainer: TrainerConfig = TrainerConfig()
    exp_manager: ExpManagerConfig = ExpManagerConfig()
    model: ModelConfig = ModelConfig()  # noqa: RUF009, it is frozen
