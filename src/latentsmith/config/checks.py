"""Options that contradict each other, found before anything heavy. Judges the config alone, not this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentsmith.architectures import CLIP_SIZES
from latentsmith.files.errors import BadInput

from .class_registry import MODELS, SCHEDULERS
from .data_options import CaptionsConfig
from .inference_options import InferenceConfig
from .model_options import WITHOUT_BETAS, WITHOUT_EPS, CondStageConfig, DDConfig, ModelConfig, OptimConfig, UNetConfig
from .run_options import Config, TrainerConfig

TRANSFORMER_GROUPS = 32  # of the norm before a spatial transformer, the same in every Stable Diffusion
UNET = "model.unet_config"
VAE = "model.first_stage_config"
TEXT = "model.cond_stage_config"


def check(config: Config) -> None:
    """Raise BadInput, one line naming both options, for the first contradiction in a config."""
    model, trainer, manager = config.model, config.trainer, config.exp_manager
    _check_unet(model.unet_config)
    _check_vae(model.first_stage_config.ddconfig)
    _check_text(model.cond_stage_config)
    _check_components(model)
    if model.scale_factor == 0:
        raise BadInput("model.scale_factor=0 leaves nothing of the latents; give a number above 0, or measured")
    if trainer.devices in (0, ()):
        raise BadInput(f"trainer.devices={trainer.devices or 0}: give at least one, or -1 for all")
    _check_unconditional(model)
    _check_adapters(model, trainer)
    _check_textual_inversion(model)
    _check_captions(model)
    _check_batches(model, trainer)
    _check_schedules(model, trainer)
    _check_optimizer(model.optim)
    name = manager.name
    if not name.strip() or ".." in name.split("/") or name.startswith("/"):
        raise BadInput(f"exp_manager.name={name!r} does not name a folder inside exp_manager.exp_dir; give it a name")
    if manager.checkpoint_callback_params.save_top_k == 0:
        raise BadInput(
            "exp_manager.checkpoint_callback_params.save_top_k=0 keeps nothing to resume from; give 1 or more, -1 for "
            "all, or exp_manager.create_checkpoint_callback=false"
        )
    if 0 in (trainer.max_steps, trainer.max_epochs):
        raise BadInput("trainer.max_steps or max_epochs is 0: nothing to train; -1 is no limit")


def check_inference(config: InferenceConfig) -> None:
    """Check an inference file in the same way."""
    infer = config.infer
    if infer.eta and str(infer.sampler_type).lower() in ("plms", "pndm"):
        raise BadInput(f"infer.eta={infer.eta} with infer.sampler_type={infer.sampler_type}: PLMS has no noise; use 0")


def _check_unet(unet: UNetConfig) -> None:
    mults, heads, head_channels = unet.channel_mult, unet.num_heads, unet.num_head_channels
    if 0 in (heads, head_channels):
        raise BadInput(f"{UNET}: num_heads or num_head_channels is 0; give at least 1")
    for key in ("num_res_blocks", "transformer_depth"):
        value = getattr(unet, key)
        if isinstance(value, tuple) and len(value) != len(mults):
            raise BadInput(f"{UNET}.{key} has {len(value)} entries for the {len(mults)} levels of channel_mult")
    if (unet.context_dim is not None) != unet.use_spatial_transformer:
        raise BadInput(
            f"{UNET}: context_dim and use_spatial_transformer go together: use_spatial_transformer=false needs "
            "context_dim=null, and true needs a number"
        )
    rates = [2**level for level in range(len(mults))]
    if never := [rate for rate in unet.attention_resolutions if rate not in rates]:
        raise BadInput(f"{UNET}.attention_resolutions: {never[0]} is never reached; the levels have {rates}")
    widths = {rate: unet.model_channels * mult for rate, mult in zip(rates, mults, strict=True)}
    for width in widths.values():
        _check_groups(f"{UNET}.resblock_gn_groups", unet.resblock_gn_groups, width)
    for width in [widths[rate] for rate in unet.attention_resolutions] + [widths[rates[-1]]]:
        _check_heads(width, heads, head_channels)


def _check_groups(key: str, groups: int, width: int) -> None:
    if width % groups:
        raise BadInput(f"{key}: {groups} groups do not divide a level of {width} channels")


def _check_heads(width: int, heads: int, head_channels: int) -> None:
    if heads != -1 and width % heads:
        raise BadInput(f"{UNET}.num_heads: {heads} heads do not divide a level of {width} channels")
    if head_channels != -1 and width % head_channels:
        raise BadInput(f"{UNET}.num_head_channels: heads of {head_channels} do not divide a level of {width} channels")
    if width % TRANSFORMER_GROUPS:
        raise BadInput(
            f"{UNET}: a level with attention has {width} channels; the norm of its transformer needs a multiple of "
            f"{TRANSFORMER_GROUPS}"
        )


def _check_vae(ddconfig: DDConfig) -> None:
    for mult in ddconfig.ch_mult:
        _check_groups(f"{VAE}.ddconfig.num_groups", ddconfig.num_groups, ddconfig.ch * mult)


def _check_text(text: CondStageConfig) -> None:
    sizes = {name: getattr(text, name) for name in ("width", "layers", "heads", "intermediate_size", "activation")}
    missing = [name for name, value in sizes.items() if value is None]
    if text.arch is None and 0 < len(missing) < len(sizes):
        raise BadInput(f"{TEXT}: {', '.join(missing)} missing; give them, or an arch that sets all sizes")
    if sizes["width"] and sizes["heads"] and sizes["width"] % sizes["heads"]:
        raise BadInput(f"{TEXT}: width {sizes['width']} does not divide into {sizes['heads']} heads")


def text_width(text: CondStageConfig) -> int | None:
    """Features of the text encoder's output; None where only its checkpoint knows."""
    return text.width or (CLIP_SIZES[text.arch].width if text.arch else None)


def _check_components(model: ModelConfig) -> None:
    unet, vae = model.unet_config, model.first_stage_config
    width = text_width(model.cond_stage_config)
    if unet.context_dim is not None and width not in (None, unet.context_dim):
        raise BadInput(f"{UNET}.context_dim is {unet.context_dim}, but {TEXT} gives embeddings of {width} features")
    counts = {
        f"{VAE}.embed_dim": vae.embed_dim,
        f"{UNET}.in_channels": unet.in_channels,
        f"{UNET}.out_channels": unet.out_channels,
    }
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{key}={value}" for key, value in counts.items())
        raise BadInput(f"the channels of the latents disagree: {listed}")


def _check_unconditional(model: ModelConfig) -> None:
    if model.caption_dropout_rate > 0 and model.text_embedding_dropout_rate > 0:
        raise BadInput(
            "model.caption_dropout_rate and model.text_embedding_dropout_rate are both above 0: a model has one "
            "meaning of no text, the empty prompt or zeros; set one of them to 0"
        )
    if model.cond_stage_trainable and model.cond_stage_key.endswith("encoded"):
        raise BadInput(
            f"model.cond_stage_trainable=True needs captions, not model.cond_stage_key={model.cond_stage_key}: "
            "embeddings in a cache do not follow a text encoder that learns"
        )


def _check_textual_inversion(model: ModelConfig) -> None:
    token = model.textual_inversion.token
    if token is None:
        return
    if model.cond_stage_key.endswith("encoded"):
        raise BadInput(
            f"model.textual_inversion.token={token} with model.cond_stage_key={model.cond_stage_key}: embeddings in a "
            "cache do not follow it; set model.cond_stage_key=captions"
        )
    if model.cond_stage_trainable:
        raise BadInput(f"model.textual_inversion.token={token}: only its vectors move; drop model.cond_stage_trainable")


def _check_captions(model: ModelConfig) -> None:
    train = model.data.train
    rules = {key: value for key, value in vars(train.captions).items() if value != getattr(CaptionsConfig(), key)}
    if rules and model.cond_stage_key.endswith("encoded"):
        raise BadInput(
            f"model.data.train.captions.{next(iter(rules))} changes captions as they are read, and a cache holds their "
            "embeddings; set model.cond_stage_key=captions"
        )
    if train.repeats is not None and train.weights is not None:
        raise BadInput("model.data.train.repeats and weights both say how often sets are sampled; give one of them")


def _check_adapters(model: ModelConfig, trainer: TrainerConfig) -> None:
    peft, scheme = model.peft, f"model.peft.peft_scheme={model.peft.peft_scheme}"
    if peft.peft_scheme is None:
        return
    if model.cond_stage_trainable:
        raise BadInput(
            f"{scheme} with model.cond_stage_trainable=True: adapters of the text encoder are "
            "model.peft.networks=[unet,text_encoder]; leave the other out"
        )
    if "text_encoder" in peft.networks and model.cond_stage_key.endswith("encoded"):
        raise BadInput(
            f"model.peft.networks holds text_encoder, and model.cond_stage_key={model.cond_stage_key}: embeddings in a "
            "cache do not follow it; set model.cond_stage_key=captions"
        )
    if peft.lora_plus_ratio != 1 and peft.peft_scheme not in ("lora", "dora"):
        raise BadInput(f"model.peft.lora_plus_ratio={peft.lora_plus_ratio} is of lora and dora, not of {scheme}")
    if trainer.strategy == "model_parallel":
        raise BadInput(f"{scheme}: adapters are too small to shard; set trainer.strategy=ddp")
    mixed = {"bf16": "bf16-mixed", "fp16": "16-mixed"}.get(peft.base_precision)
    if mixed and trainer.precision != mixed:
        raise BadInput(f"model.peft.base_precision={peft.base_precision} needs trainer.precision={mixed}")


def _check_batches(model: ModelConfig, trainer: TrainerConfig) -> None:
    micro, total = model.micro_batch_size, model.global_batch_size
    if total is None:
        return
    devices = trainer.devices
    count = len(devices) if isinstance(devices, tuple) else devices
    at_once = micro * trainer.num_nodes * (count if isinstance(count, int) and count > 0 else 1)
    if total % at_once:
        raise BadInput(
            f"model.global_batch_size={total} is no multiple of the {at_once} images of one pass "
            f"(micro_batch_size {micro}, devices {devices}, num_nodes {trainer.num_nodes})"
        )
    stated = trainer.accumulate_grad_batches
    if stated > 1 and isinstance(count, int) and count > 0 and total != at_once * stated:
        raise BadInput(
            f"trainer.accumulate_grad_batches={stated} makes steps of {at_once * stated} images, but "
            f"model.global_batch_size={total}; leave one of them out"
        )


def _check_schedules(model: ModelConfig, trainer: TrainerConfig) -> None:
    start, end = model.linear_start, model.linear_end
    if not 0 < start < 1 or not 0 < end < 1:
        raise BadInput(f"model.linear_start={start} and model.linear_end={end}: betas lie above 0 and below 1")
    if start > end:
        raise BadInput(f"model.linear_start={start} is above model.linear_end={end}: betas must rise")
    if model.zero_terminal_snr and model.parameterization == "eps":
        raise BadInput(
            "model.zero_terminal_snr=True with model.parameterization=eps: noise says nothing about an image that is "
            "all noise; set parameterization to v or x0"
        )
    sched = model.optim.sched
    falls = sched.name in ("CosineAnnealing", "linear")
    if falls and sched.max_steps is None and trainer.max_steps == trainer.max_epochs == -1:
        raise BadInput(f"model.optim.sched.name={sched.name} needs an end: give trainer.max_steps or max_epochs")


def _check_optimizer(optim: OptimConfig) -> None:
    if optim.betas is not None and any(beta >= 1 for beta in optim.betas):
        raise BadInput(f"model.optim.betas={list(optim.betas)}: both lie below 1")
    takes = {"betas": optim.name not in WITHOUT_BETAS, "eps": optim.name not in WITHOUT_EPS}
    for key, taken in takes.items():
        if getattr(optim, key) is not None and not taken:
            value = getattr(optim, key)
            raise BadInput(f"model.optim.{key}={value} means nothing to model.optim.name={optim.name}; drop it")


def check_classes(model: Mapping[str, Any]) -> None:
    """Refuse classes that a file may not name, though nothing is built from them.

    model: the values of the node `model`, foreign keys among them.
    """
    named = {
        "model.target": (model.get("_target_"), MODELS),
        "model.scheduler_config.target": ((model.get("scheduler_config") or {}).get("_target_"), SCHEDULERS),
    }
    for key, (path, allowed) in named.items():
        if path is not None and path not in allowed:
            raise BadInput(f"{key}: {path!r} is not among the classes a config may name: {', '.join(allowed)}")
