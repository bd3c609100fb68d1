"""From the config to the pieces that the commands put together."""

import math
import re
import shutil
from importlib.util import find_spec
from typing import Any

import torch

from latentsmith.config import Config
from latentsmith.diffusion import NoiseSchedule, ldm_beta_schedule
from latentsmith.files.errors import BadInput

from .module import Optimisation
from .optimizers import BITSANDBYTES, lr_schedule
from .sharding import strategy


def noise_schedule(config: Config) -> NoiseSchedule:
    model = config.model
    betas = ldm_beta_schedule(model.beta_schedule)
    schedule = NoiseSchedule.from_config(
        model.linear_start, model.linear_end, betas, model.timesteps, cosine_s=model.cosine_s
    )
    return schedule.zero_terminal_snr() if model.zero_terminal_snr else schedule


def optimisation(config: Config, batch: int, max_steps: int) -> Optimisation:
    """The optimizer of a run of max_steps steps of `batch` samples."""
    optim, sched = config.model.optim, config.model.optim.sched
    options: dict[str, Any] = {
        key: value for key in ("lr", "weight_decay", "betas", "eps") if (value := getattr(optim, key)) is not None
    }
    hold = sched.hold_steps if sched.hold_steps is not None else math.inf
    least = sched.min_lr / optim.lr if sched.min_lr and optim.lr else 0.0
    last = sched.max_steps if sched.max_steps and sched.max_steps > 0 else max_steps
    schedule = lr_schedule(
        sched.name, warmup_steps=sched.warmup_steps or 0, hold_steps=hold, max_steps=last, min_factor=least
    )
    return Optimisation(optim.name, options, schedule, batch)


def global_batch(config: Config, processes: int) -> int:
    """Samples of one optimizer step: model.global_batch_size, or one micro batch on every process."""
    micro = config.model.micro_batch_size
    wanted = config.model.global_batch_size or micro * processes * config.trainer.accumulate_grad_batches
    if wanted % (micro * processes):
        raise BadInput(
            f"model.global_batch_size={wanted} does not divide into micro batches of {micro} on {processes} processes"
        )
    return wanted


def step_limit(config: Config, samples: int, batch: int) -> int:
    """Optimizer steps of the run, by trainer.max_steps or max_epochs, whichever ends first; BadInput without."""
    trainer = config.trainer
    ends = [trainer.max_steps] if trainer.max_steps > 0 else []
    ends += [-(-trainer.max_epochs * samples // batch)] if trainer.max_epochs > 0 else []
    if not ends:
        raise BadInput("trainer.max_steps and max_epochs are both unlimited: give one of them")
    return min(ends)


def check_device(config: Config) -> None:
    """BadInput for an accelerator that this machine lacks, and for half precision on a CPU."""
    accelerator, cuda, mps = config.trainer.accelerator, torch.cuda.is_available(), torch.backends.mps.is_available()
    if not {"cuda": cuda, "gpu": cuda or mps, "mps": mps}.get(accelerator, True):
        raise BadInput(f"trainer.accelerator={accelerator}: this machine has none; set it to auto or cpu")
    if cuda and accelerator in ("cuda", "gpu", "auto"):
        wanted = devices_of(config)
        if isinstance(wanted, int) and wanted > torch.cuda.device_count():
            raise BadInput(f"trainer.devices={wanted}: this machine has {torch.cuda.device_count()} GPUs")
        if config.trainer.precision.startswith("bf16") and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise BadInput("trainer.precision=bf16 is asked of a GPU without it; train in 16 or 32")
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
    if on_cpu(config) and (half := config.trainer.precision).startswith("16-"):
        raise BadInput(f"trainer.precision={half} needs a GPU; on a CPU train in 32-true")


def check_bitsandbytes(config: Config) -> None:
    """BadInput where an optimizer of bitsandbytes cannot work."""
    name = f"model.optim.name={config.model.optim.name}"
    if find_spec("bitsandbytes") is None:
        raise BadInput(f"{name}: bitsandbytes is not installed; pip install 'latentsmith[bitsandbytes]'")
    if "paged" in name and (on_cpu(config) or not torch.cuda.is_available()):
        raise BadInput(f"{name} moves moments between a GPU's memory and the CPU's; without CUDA take fused_adam")
    if config.model.channels_last:
        raise BadInput(f"{name}: bitsandbytes lays weights out anew as it steps; set model.channels_last=false")
    if config.trainer.strategy == "model_parallel":
        raise BadInput(f"{name}: bitsandbytes knows no sharded weights; take fused_adam, whose moments are sharded")


def on_cpu(config: Config) -> bool:
    """Whether the run trains on the CPU: asked for, or for want of anything else."""
    found = torch.cuda.is_available() or torch.backends.mps.is_available()
    return config.trainer.accelerator == "cpu" or (config.trainer.accelerator == "auto" and not found)


def check_strategy(name: str) -> None:
    """BadInput for a strategy that this engine does not train, save and resume with."""
    known = ("auto", "ddp", "model_parallel")
    if name not in known:
        reason = (
            "shards are trainer.strategy=model_parallel here"
            if name.startswith(("fsdp", "deepspeed"))
            else (f"it is one of {', '.join(known)}")
        )
        raise BadInput(f"trainer.strategy={name} is not one to save and resume with: {reason}")


def process_count(config: Config) -> int:
    """Training processes of the run, over all machines."""
    devices = devices_of(config)
    if devices in (-1, "auto"):
        devices = torch.cuda.device_count() or 1
    return (len(devices) if isinstance(devices, list) else int(devices)) * config.trainer.num_nodes


def devices_of(config: Config) -> Any:
    """trainer.devices as plain data: a number, a list of numbers or "auto"; all that there are of a CPU is one."""
    devices = config.trainer.devices
    if devices in (-1, "auto") and on_cpu(config):
        return 1
    return devices if isinstance(devices, int | str) else list(devices)


def trainer_options(config: Config, processes: int) -> dict[str, Any]:
    """The options of the config that are Lightning's own."""
    trainer = config.trainer
    micro_batches = global_batch(config, processes) // (processes * config.model.micro_batch_size)
    return dict(
        devices=devices_of(config),
        num_nodes=trainer.num_nodes,
        accelerator=trainer.accelerator,
        strategy=strategy(trainer.strategy, processes),
        precision=trainer.precision,
        gradient_clip_val=trainer.gradient_clip_val if (trainer.gradient_clip_val or 0) > 0 else None,
        accumulate_grad_batches=micro_batches,
        deterministic=trainer.deterministic,
        benchmark=trainer.benchmark,
        max_time=trainer.max_time,
    )
