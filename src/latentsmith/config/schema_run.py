"""Options of the run as a whole: its name, the trainer, what it writes and where, adapters, profiling."""

from .schema import group, mapped, no_effect, refused, used
from .value_types import anything, choice, count_or_share, either, flag, list_of, mapping, nullable, number, text, whole

PRECISION = choice(
    "32-true",
    "bf16-mixed",
    "16-mixed",
    "bf16-true",
    "16-true",
    aliases={"32": "32-true", "32.0": "32-true", "fp32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"},
)
NO_ADAPTERS = "adapters are not trained; fine-tune the U-Net itself with model.unet_config.from_pretrained"

TRAINER = group(
    "trainer",
    used("devices", either(whole(-1), list_of(whole(0)), choice("auto")), 1, "devices of each machine, -1 for all"),
    used("num_nodes", whole(1), 1, "machines", also=["nodes"]),
    used(
        "accelerator",
        choice("auto", "cpu", "gpu", "cuda", "mps"),
        "auto",
        "auto takes the first there is of cuda, mps, cpu",
    ),
    used(
        "strategy",
        text(),
        "auto",
        "ddp (auto is the same), or model_parallel: weights, averages and optimizer split over the processes",
        also=["fsdp"],
    ),
    used(
        "precision",
        PRECISION,
        "32-true",
        "arithmetic; weights and optimizer stay float32 but in bf16-true and 16-true",
        also=["mixed_precision", "dtype", "amp"],
    ),
    used(
        "max_steps",
        whole(-1),
        -1,
        "optimizer steps of the run, -1 for no limit",
        also=["max_train_steps", "steps", "num_steps", "train_steps"],
    ),
    used("max_epochs", whole(-1), -1, "passes over the data, -1 for no limit", also=["epochs", "num_train_epochs"]),
    used("max_time", nullable(text()), None, "stop after DD:HH:MM:SS of wall time"),
    used(
        "accumulate_grad_batches",
        whole(1),
        1,
        "micro batches of one optimizer step; 1 leaves it to model.global_batch_size",
        also=["gradient_accumulation_steps", "accumulation"],
    ),
    used(
        "gradient_clip_val",
        nullable(number()),
        None,
        "largest global L2 norm of the gradient; null, 0 or less for no clipping",
        also=["max_grad_norm", "grad_clip", "clip_grad"],
    ),
    used("deterministic", flag(), False, "refuse kernels whose result varies between runs (bit-exact resume on a GPU)"),
    used("benchmark", flag(), False, "let cuDNN time its convolutions and take the fastest"),
    used("log_every_n_steps", whole(1), 10, "optimizer steps between two rows of the log", also=["log_every"]),
    used(
        "val_check_interval",
        count_or_share(),
        1000,
        "optimizer steps between two validations, or a share of an epoch such as 1.0",
        also=["eval_every", "validation_steps"],
    ),
    used(
        "limit_val_batches",
        count_or_share(),
        1.0,
        "micro batches of each process in a validation, or a share of model.data.validation; 0 for no validation",
    ),
    used("enable_progress_bar", flag(), True, "loss, samples/s and time left on the terminal"),
    no_effect("logger", anything(), False, "Lightning's own logger", "exp_manager chooses the loggers"),
    no_effect(
        "enable_checkpointing", anything(), False, "Lightning's own checkpoints", "exp_manager decides on checkpoints"
    ),
    no_effect(
        "use_distributed_sampler",
        anything(),
        False,
        "Lightning's data sharding",
        "each process computes its share of the order from the sample's position",
    ),
    no_effect(
        "enable_model_summary", flag(), True, "Lightning's table of layers", "a run prints its parameter counts itself"
    ),
)

CHECKPOINTS = group(
    "exp_manager.checkpoint_callback_params",
    used(
        "every_n_train_steps",
        whole(0),
        1000,
        "optimizer steps between two checkpoints; the last step always makes one",
        also=["save_steps", "checkpointing_steps", "save_every"],
    ),
    used(
        "every_n_minutes",
        nullable(number(0)),
        None,
        "minutes after a checkpoint until the next, whichever comes first",
        also=["train_time_interval"],
    ),
    used("save_top_k", whole(-1), 3, "how many of the newest checkpoints are kept, -1 for all", also=["keep"]),
    no_effect("every_n_epochs", whole(0), 0, "epochs between two checkpoints", "checkpoints are counted in steps"),
    no_effect(
        "monitor", text(), "reduced_train_loss", "metric of the best", "a diffusion loss does not rank checkpoints"
    ),
    no_effect("filename", text(), "", "file name pattern", "a checkpoint is a folder named after its step"),
    no_effect("mode", choice("min", "max"), "min", "sense of `monitor`", "a diffusion loss does not rank checkpoints"),
    no_effect("save_last", flag(), True, "keep the newest", "the newest is always kept"),
    no_effect(
        "save_nemo_on_train_end", flag(), True, "a .nemo at the end", "`latentsmith convert --to nemo` writes one"
    ),
    no_effect("always_save_nemo", flag(), False, "a .nemo each time", "`latentsmith convert --to nemo` writes one"),
    no_effect("save_best_model", flag(), False, "keep the best", "a diffusion loss does not rank checkpoints"),
    no_effect("postfix", text(), ".nemo", "file ending", "a checkpoint is a folder named after its step"),
)

EMA = group(
    "exp_manager.ema",
    used("enable", flag(), False, "keep an exponential moving average of the trained weights", also=["use_ema"]),
    used("decay", number(0, 1), 0.9999, "share of the old average that each step keeps", also=["ema_decay"]),
    used("every_n_steps", whole(1), 1, "optimizer steps between two updates of the average"),
    no_effect("validate_original_weights", flag(), False, "which weights to validate", "validation takes both"),
    used("cpu_offload", flag(), False, "keep the average in the memory of the CPU"),
)

SAMPLES = group(
    "exp_manager.sample_images",
    used("every_n_train_steps", whole(0), 0, "optimizer steps between two rows of sample pictures; 0 for none"),
    used("prompts", list_of(text()), [], "one picture for each"),
    used("negative_prompt", nullable(text()), None, "what to steer away from; null for the model's own null text"),
    used("steps", whole(1, 1000), 25, "sampling steps", also=["num_inference_steps", "inference_steps"]),
    used("guidance_scale", number(0), 7.5, "classifier-free guidance, 1 for none", also=["cfg_scale"]),
    used("sampler", text(), "dpmsolver++", "as `latentsmith generate --sampler`"),
    used("weights", choice("ema", "raw"), "ema", "the average draws, where there is one, or the trained weights"),
    used("seed", whole(0), 0, "of the initial noise: the same pictures are drawn each time"),
)

EXP_MANAGER = [
    *group(
        "exp_manager",
        mapped("exp_dir", nullable(text()), None, "folder of run folders; null for ./runs"),
        mapped("name", text(), "${name}", "the run folder inside exp_dir"),
        used("create_tensorboard_logger", flag(), True, "write TensorBoard scalars and pictures"),
        used("create_checkpoint_callback", flag(), True, "write checkpoints"),
        used("resume_if_exists", flag(), True, "go on from the newest checkpoint in the run folder"),
        used(
            "resume_ignore_no_checkpoint",
            flag(),
            True,
            "start from step 0 where the run folder holds none; false makes that an error",
        ),
        used(
            "resume_from_checkpoint",
            nullable(text()),
            None,
            "go on from this checkpoint, whatever the run folder holds",
            also=["resume"],
        ),
        used(
            "nonfinite_limit",
            whole(1),
            10,
            "steps in a row without a finite gradient that end the run; each is skipped and described in nonfinite/",
            also=["max_skipped_steps"],
        ),
        used("create_wandb_logger", flag(), False, "also send the scalars to Weights & Biases", also=["wandb"]),
        used("wandb_logger_kwargs", mapping(), {}, "arguments of Lightning's WandbLogger: project, name, entity, ..."),
        refused(
            "explicit_log_dir", nullable(text()), None, "the run folder itself", "exp_dir and name say where it is"
        ),
    ),
    *CHECKPOINTS,
    *EMA,
    *SAMPLES,
]

_PEFT = (
    refused("peft_scheme", nullable(text()), None, "kind of adapter", NO_ADAPTERS),
    refused("restore_from_path", nullable(text()), None, "adapter to go on from", NO_ADAPTERS),
    no_effect("lora_tuning", mapping(), {}, "rank, dropout, initialisation, alpha", NO_ADAPTERS),
)
PEFT = [*group("peft", *_PEFT), *group("model.peft", *_PEFT)]

OPTIONS = [used("name", text(), "latentsmith", "name of the run"), *TRAINER, *EXP_MANAGER, *PEFT]
