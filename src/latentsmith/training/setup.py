"""From the config to the parts of a training: devices, processes, optimizer, hooks."""

import logging
import math
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision, Precision
from lightning.fabric.plugins.precision.half import HalfPrecision

from latentsmith.config.model_options import BITSANDBYTES, LIBRARY_OPTIMIZERS, WITH_BETAS, ModelConfig, OptimConfig
from latentsmith.config.run_options import Config, EmaConfig, TrainerConfig
from latentsmith.data.loader import RunPositions, RunSamples, run_loader
from latentsmith.diffusion import NoiseSchedule, ldm_beta_schedule
from latentsmith.files.errors import BadInput
from latentsmith.precision import autocast_dtype, half_precision, weights_dtype

from .adapters import rate_factor
from .checkpointing import CheckpointPlan, SaveCheckpoints, load_checkpoint
from .ema import Ema
from .hooks import Hook
from .hooks.metrics import Metrics
from .hooks.nonfinite import DescribeNonFinite
from .hooks.signals import StopOnSignal
from .loop import Plan, Training, train_loop
from .objectives import Objective
from .optimizers import build_optimizer, is_schedule_free, lr_schedule, optimizer_options, share_rounded_away
from .report import RunReport
from .run_folder import CHECKPOINTS, Resume
from .sharding import leave_group, strategy
from .state import TrainingState, parameter_groups, trained_parameters

ROUNDED_SHARE = 0.1  # of the weights, from which on it is reported that steps are lost to rounding


def noise_schedule(model: ModelConfig) -> NoiseSchedule:
    betas = ldm_beta_schedule(model.beta_schedule)
    schedule = NoiseSchedule.from_config(
        model.linear_start, model.linear_end, betas, model.timesteps, cosine_s=model.cosine_s
    )
    return schedule.zero_terminal_snr() if model.zero_terminal_snr else schedule


def training_plan(config: Config, samples: int) -> Plan:
    """Return the plan of a run over a set of `samples`."""
    optim, sched, batch = config.model.optim, config.model.optim.sched, global_batch(config)
    max_steps = step_limit(config.trainer, samples, batch)
    options = options_of(optim)
    schedule = lr_schedule(
        sched.name,
        warmup_steps=sched.warmup_steps or 0,
        hold_steps=sched.hold_steps if sched.hold_steps is not None else math.inf,
        max_steps=sched.max_steps if sched.max_steps and sched.max_steps > 0 else max_steps,
        min_factor=sched.min_lr / optim.lr if sched.min_lr and optim.lr else 0.0,
    )
    clip = config.trainer.gradient_clip_val
    limit = clip if clip is not None and clip > 0 else None
    return Plan(
        max_steps, batch, config.model.micro_batch_size, optim.name, options, schedule, limit, rate_factor(config)
    )


def options_of(optim: OptimConfig) -> dict[str, Any]:
    """Return the keywords of the config's optimizer, checked."""
    stated = {"lr": optim.lr, "weight_decay": optim.weight_decay, "betas": optim.betas, "eps": optim.eps}
    return optimizer_options(optim.name, stated, optim.options)


def global_batch(config: Config) -> int:
    """Return the samples of one optimizer step: model.global_batch_size, or one micro batch on every process."""
    micro, processes = config.model.micro_batch_size, process_count(config)
    wanted = config.model.global_batch_size or micro * processes * config.trainer.accumulate_grad_batches
    if wanted % (micro * processes):
        raise BadInput(
            f"model.global_batch_size={wanted} does not divide into micro batches of {micro} on {processes} processes"
        )
    return wanted


def step_limit(trainer: TrainerConfig, samples: int, batch: int) -> int:
    """Return the optimizer steps of a run, by max_steps or max_epochs, whichever ends first."""
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    limits += [-(-trainer.max_epochs * samples // batch)] if trainer.max_epochs > 0 else []
    if not limits:
        raise BadInput("trainer.max_steps and max_epochs are both unlimited: give one of them")
    return min(limits)


# ---- Devices and processes ----


def check_device(config: Config) -> None:
    """Raise BadInput for what this machine cannot train with, such as an accelerator that it lacks."""
    accelerator, cuda, mps = config.trainer.accelerator, torch.cuda.is_available(), torch.backends.mps.is_available()
    if not {"cuda": cuda, "gpu": cuda or mps, "mps": mps}.get(accelerator, True):
        raise BadInput(f"trainer.accelerator={accelerator}: this machine has none; set it to auto or cpu")
    if cuda and accelerator in ("cuda", "gpu", "auto"):
        wanted = devices_of(config)
        if isinstance(wanted, int) and wanted > torch.cuda.device_count():
            raise BadInput(f"trainer.devices={wanted}: this machine has {torch.cuda.device_count()} GPUs")
        if config.trainer.precision.startswith("bf16") and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise BadInput("trainer.precision=bf16 is asked of a GPU without it; train in 16 or 32")
    check_optimizer(config)
    if config.model.optim.name in BITSANDBYTES:
        check_bitsandbytes(config)
    if config.trainer.max_time is not None and not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", config.trainer.max_time):
        raise BadInput(f"trainer.max_time={config.trainer.max_time} is not a time as DD:HH:MM:SS")
    check_strategy(config.trainer.strategy)
    if config.model.inductor_cudagraphs and (not config.model.inductor or not cuda or accelerator in ("cpu", "mps")):
        raise BadInput("model.inductor_cudagraphs=True works with model.inductor=True, on a CUDA GPU; leave it out")
    if on_cpu(config) and config.model.inductor and not (shutil.which("g++") or shutil.which("clang++")):
        raise BadInput(
            "model.inductor=True: TorchInductor needs a C++ compiler on a CPU, and there is none; install g++"
        )
    if on_cpu(config) and config.trainer.precision.startswith("bf16"):
        print("trainer.precision=bf16 on a CPU: emulated, and far slower than 32, where it has no units for bfloat16")
    if config.trainer.precision == "16-mixed" and config.trainer.strategy == "model_parallel":
        raise BadInput("trainer.precision=16-mixed: a scaled loss is not for model_parallel; train in bf16-mixed")
    if on_cpu(config) and (half := config.trainer.precision).startswith("16-"):
        raise BadInput(f"trainer.precision={half} needs a GPU; on a CPU train in 32-true")


def check_bitsandbytes(config: Config) -> None:
    """Raise BadInput where an optimizer of bitsandbytes cannot work."""
    name = f"model.optim.name={config.model.optim.name}"
    if "paged" in name and (on_cpu(config) or not torch.cuda.is_available()):
        raise BadInput(f"{name} moves moments between a GPU's memory and the CPU's; without CUDA take fused_adam")
    if config.model.channels_last:
        raise BadInput(f"{name}: bitsandbytes lays weights out anew as it steps; set model.channels_last=false")
    if config.trainer.strategy == "model_parallel":
        raise BadInput(f"{name}: bitsandbytes knows no sharded weights; take fused_adam, whose moments are sharded")


def check_optimizer(config: Config) -> None:
    """Raise BadInput for an optimizer that is not installed, does not take its options, or cannot work here."""
    optim, name = config.model.optim, f"model.optim.name={config.model.optim.name}"
    options = options_of(optim)
    untried = optim.name in (*LIBRARY_OPTIMIZERS, "Muon") or "." in optim.name
    if untried and optim.name not in BITSANDBYTES and config.trainer.strategy == "model_parallel":
        raise BadInput(f"{name}: not tried on sharded weights; with trainer.strategy=model_parallel take fused_adam")
    probe = build_optimizer(optim.name, [torch.nn.Parameter(torch.zeros(2, 2))], fused=False, **options)
    if is_schedule_free(probe) and config.exp_manager.ema.enable:
        raise BadInput(f"{name}: its weights are an average already; set exp_manager.ema.enable=false")


def on_cpu(config: Config) -> bool:
    """Return whether the run trains on the CPU: asked for, or because there is nothing else."""
    found = torch.cuda.is_available() or torch.backends.mps.is_available()
    return config.trainer.accelerator == "cpu" or (config.trainer.accelerator == "auto" and not found)


def check_strategy(name: str) -> None:
    """Raise BadInput for a strategy that runs cannot train, save and resume with."""
    supported = ("auto", "ddp", "model_parallel")
    if name not in supported:
        reason = (
            "shards are trainer.strategy=model_parallel here"
            if name.startswith(("fsdp", "deepspeed"))
            else (f"it is one of {', '.join(supported)}")
        )
        raise BadInput(f"trainer.strategy={name} is not one to save and resume with: {reason}")


def process_count(config: Config) -> int:
    """Return the number of training processes of the run, over all machines."""
    devices = devices_of(config)
    if devices in (-1, "auto"):
        devices = torch.cuda.device_count() or 1
    return (len(devices) if isinstance(devices, list) else int(devices)) * config.trainer.num_nodes


def devices_of(config: Config) -> Any:
    """Return trainer.devices: a number, a list of numbers or "auto"; all devices of a CPU are one."""
    devices = config.trainer.devices
    if devices in (-1, "auto") and on_cpu(config):
        return 1
    return devices if isinstance(devices, int | str) else list(devices)


class Autocast(MixedPrecision):
    """Autocast alone. Fabric's own plugin also rounds the inputs: noise, targets and moments stay float32 here."""

    def convert_input(self, data: Any) -> Any:
        return data


class HalfWeights(HalfPrecision):
    """Weights in half precision; inputs stay float32 as in Autocast, and each network rounds what it is given.

    In bfloat16 the signal of the first dozens of timesteps would be 1, and a noise one of 256 values an octave.
    """

    def convert_input(self, data: Any) -> Any:
        return data


def precision_plugin(precision: str, device: str) -> Precision | None:
    """Return what computes in trainer.precision on a device; None for float32."""
    if autocast_dtype(precision) is not None:
        return Autocast(precision, device)  # type: ignore[arg-type]
    return HalfWeights(precision) if half_precision(precision) else None  # type: ignore[arg-type]


def launch(config: Config) -> Fabric:
    """Start the processes of a run, or join those that torchrun or srun started; return Fabric for this one."""
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)  # no hints; errors still come through
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    trainer = config.trainer
    torch.backends.cudnn.benchmark = trainer.benchmark
    torch.use_deterministic_algorithms(trainer.deterministic)
    if trainer.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    device = "cpu" if on_cpu(config) else "cuda" if torch.cuda.is_available() else "mps"
    fabric = Fabric(
        accelerator=trainer.accelerator,
        strategy=strategy(trainer.strategy, process_count(config)),
        devices=devices_of(config),
        num_nodes=trainer.num_nodes,
        plugins=precision_plugin(trainer.precision, device),
    )
    fabric.launch()
    return fabric


# ---- The training ----


def rounded_steps(config: Config, networks: Mapping[str, torch.nn.Module], trained: tuple[str, ...]) -> list[str]:
    """Return lines on weights and moments in half precision that are rounded back to what they were at every step."""
    precision, optim = config.trainer.precision, config.model.optim
    dtype = weights_dtype(precision)
    if dtype == torch.float32:
        return []
    lines = []
    share = share_rounded_away(trained_parameters(networks, trained), optim.lr, dtype)
    if share >= ROUNDED_SHARE:
        lines.append(f"a step of model.optim.lr={optim.lr:g} is lost to rounding in {share:.0%} of the weights")
    beta = (optim.betas or (0.9, 0.999))[1]
    if optim.name in WITH_BETAS and torch.tensor(beta, dtype=dtype) == 1:
        lines.append(f"model.optim.betas: {beta} is rounded to 1, so that second moments grow and never fall")
    mixed = precision.replace("true", "mixed")
    return [f"trainer.precision={precision}: {line}; {mixed} keeps float32" for line in lines]


def start(fabric: Fabric, objective: Objective, plan: Plan, ema: EmaConfig | None = None) -> Training:
    """Return a training at step 0: networks on their device or split over the processes, optimizer, averages."""
    model = fabric.setup_module(objective)
    networks = dict(objective.networks.items())
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    parameters = trained_parameters(networks, objective.trained)
    state = TrainingState(
        networks,
        objective.trained,
        build_optimizer(
            plan.optimizer,
            parameter_groups(networks, objective.trained, plan.rate_factor),
            fused=scaler is None,
            **plan.options,
        ),
        plan.optimizer,
        scaler=scaler,
        sharded=any(hasattr(parameter, "device_mesh") for parameter in parameters),
        skipped_steps=torch.zeros((), dtype=torch.int64, device=fabric.device),
    )
    if ema is not None:
        every, offload = ema.every_n_steps, ema.cpu_offload
        state.ema = {
            name: Ema(networks[name], ema.decay, every_n_steps=every, cpu_offload=offload) for name in objective.trained
        }
    return Training(fabric, objective, model, state, plan)


def metrics_of(config: Config, folder: Path) -> Metrics:
    manager = config.exp_manager
    return Metrics(
        folder,
        config.trainer.log_every_n_steps,
        tensorboard=manager.create_tensorboard_logger,
        wandb=dict(manager.wandb_logger_kwargs) if manager.create_wandb_logger else None,
        progress_bar=config.trainer.enable_progress_bar,
    )


def run(
    config: Config,
    fabric: Fabric,
    objective: Objective,
    samples: RunSamples,
    plan: Plan,
    folder: Path,
    resume: Resume | None,
    hooks: Sequence[Hook],
    *,
    metadata: Mapping[str, str],
    head: Sequence[str],
) -> None:
    """Train to plan.max_steps in the run folder, from `resume` if given, with the hooks of every run and `hooks`.

    metadata: of the files of weights. head: lines that say what is trained, for the report.
    """
    manager, trainer = config.exp_manager, config.trainer
    done = resume.counters["global_step"] if resume else 0
    if done >= plan.max_steps:
        if fabric.is_global_zero:
            print(f"{folder}: already at step {done:,} of {plan.max_steps:,}; nothing to do")
        leave_group()
        return
    training = start(fabric, objective, plan, manager.ema if manager.ema.enable else None)
    if resume is not None:
        load_checkpoint(resume.path, resume.counters, training.state)
    params = manager.checkpoint_callback_params
    checkpoints = CheckpointPlan(
        folder / CHECKPOINTS, params.every_n_train_steps, params.save_top_k, metadata, params.every_n_minutes
    )
    everywhere = [
        StopOnSignal(seconds_of(trainer.max_time)),
        DescribeNonFinite(folder, samples, manager.nonfinite_limit, trainer.log_every_n_steps),
        RunReport(folder, head),
        *([SaveCheckpoints(checkpoints)] if manager.create_checkpoint_callback else []),
    ]
    train_loop(training, batches_of(training, samples, config.model.data.num_workers), [*everywhere, *hooks])


def batches_of(training: Training, samples: RunSamples, num_workers: int = 0) -> Any:
    """Return the micro batches of this process, from the state's consumed_samples on."""
    fabric, plan = training.fabric, training.plan
    positions = RunPositions(
        training.state.consumed_samples, plan.global_batch, plan.micro_batch, fabric.global_rank, fabric.world_size
    )
    return run_loader(samples, positions, num_workers=num_workers)


def seconds_of(max_time: str | None) -> float | None:
    """Return the seconds of DD:HH:MM:SS."""
    if max_time is None:
        return None
    days, hours, minutes, seconds = map(int, max_time.split(":"))
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
