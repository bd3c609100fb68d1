"""The JSON files of a diffusers folder: what they say in our keywords, and ours in theirs."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from latentsmith.architectures import CLIP_SIZES, UNET_INPUTS
from latentsmith.diffusion.schedule import LDM_BETA_SCHEDULES
from latentsmith.files.errors import BadInput
from latentsmith.files.json import read_json
from latentsmith.files.lazy import LazyTensor

from . import clip
from .base import Checkpoint, ModelSpec, Part, Parts, known_prediction, shown, some
from .diffusers_keys import FIXED, OTHER, READ, SCHEDULERS, SOLVER, TYPES

VERSION = {"_diffusers_version": "0.31.0"}  # the oldest we are checked against; newer ones read its configs
BETA_SCHEDULES = {LDM_BETA_SCHEDULES[name]: name for name in ("linear", "sqrt_linear")}  # diffusers' names -> LDM's
SCHEDULE_KEYS = {"beta_start": "linear_start", "beta_end": "linear_end", "num_train_timesteps": "timesteps",
                 "rescale_betas_zero_snr": "zero_terminal_snr"}  # fmt: skip
PIPELINES = {0: "StableDiffusionPipeline", 4: "StableDiffusionInstructPix2PixPipeline",
             5: "StableDiffusionInpaintPipeline"}  # by the U-Net's input channels beside its latents  # fmt: skip
WEIGHTS_FILE = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model|pytorch_model|open_clip_model|open_clip_pytorch_model|model_weights)"
    r"(\.(?P<variant>\w+))??\.(?P<type>safetensors|bin|ckpt)(\.index(\.(?P<index_variant>\w+))?\.json)?"
)

# ---- Reading ----


def component_config(part: Part) -> dict[str, Any]:
    """Return the config.json beside a part's weights; {} where there is none."""
    is_component = part.path.is_dir() or WEIGHTS_FILE.fullmatch(part.path.name)
    return _config(part.path if part.path.is_dir() else part.path.parent, "config.json") if is_component else {}


def _config(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / name).is_file():
        return {}
    config = read_json(folder / name, "a config of diffusers")
    for key, (words, types) in TYPES.items():
        value = config.get(key)
        for each in value if isinstance(value, list) and "list" in words else [value]:
            if each is not None and not (type(each) in types and (isinstance(each, str | bool) or 0 < each < 2**20)):
                raise BadInput(f"{folder / name}: {key} is {shown(value)}; it must be {words}")
    return config


def sizes(checkpoint: Checkpoint, part: Part) -> dict[str, Any] | None:
    """Return what a part's config.json says beyond the shapes of its weights."""
    config = component_config(part)
    if not config:
        return None
    if fault := _unsupported(part.name, config):
        raise BadInput(f"{part.path}: its config.json says {fault}")
    if part.name == "unet":
        upcast = {"upcast_attention": True} if config.get("upcast_attention") else {}
        return {**_our_heads(part, config), **upcast, "resblock_gn_groups": config.get("norm_num_groups", 32)}
    if part.name == "vae":
        return {"num_groups": config.get("norm_num_groups", 32)}
    keys = {"heads": config.get("num_attention_heads"), "activation": config.get("hidden_act")}
    return {key: value for key, value in keys.items() if value} | _used_layers(part, config)


def _used_layers(part: Part, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return how many layers a text encoder has and where it stops: transformers builds num_hidden_layers of them."""
    held = clip.depth(part.entries)
    used = config.get("num_hidden_layers", held)
    if used not in (held, held - 1):
        raise BadInput(
            f"{part.path}: {held} layers, num_hidden_layers {used}: only {held} and {held - 1} are supported"
        )
    if used < held:
        return {"layers": held, "layer": "penultimate"}
    return {"layers": held, "layer": "last"} if held == CLIP_SIZES["ViT-H-14"].layers else {}


def _our_heads(part: Part, config: Mapping[str, Any]) -> dict[str, int]:
    """Return our keyword for diffusers' attention_head_dim, which is really the number of heads, one or one a level."""
    heads = config.get("num_attention_heads") or config.get("attention_head_dim") or 8
    if isinstance(heads, int) or len(set(heads)) == 1:
        return {"num_heads": heads if isinstance(heads, int) else heads[0]}
    widths = config.get("block_out_channels", (320, 640, 1280, 1280))
    channels = {width // count for width, count in zip(widths, heads, strict=False)}
    if len(channels) != 1:
        raise BadInput(f"{part.path}: heads {heads} at widths {widths}: neither one number of heads nor one head size")
    return {"num_head_channels": channels.pop()}


def facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what scheduler_config.json and the configs of U-Net and VAE state of a model."""
    unet, vae = (
        component_config(checkpoint.parts[part]) if part in checkpoint.parts else {} for part in ("unet", "vae")
    )
    size = unet.get("sample_size")
    found = {
        "image_size": size[0] if isinstance(size, list) and len(set(map(str, size))) == 1 else size,
        "scale_factor": vae.get("scaling_factor"),
    }
    notes = [
        f"{name}/config.json: {note}"
        for name, config in (("unet", unet), ("vae", vae))
        for note in _unknown(name, config)
    ]
    scheduler = _scheduler(checkpoint)
    if scheduler:
        stated = scheduler.get("prediction_type", "epsilon")
        prediction = known_prediction(stated)
        found["prediction"] = prediction, f"scheduler_config.json{'' if prediction else f' says {stated!r}'}"
        scheduler = SCHEDULERS.get(scheduler.get("_class_name", ""), {}) | scheduler
        found["refused"] = _refused(scheduler)
        notes += [f"scheduler_config.json: {note}" for note in _notes(scheduler)]
        found |= {ours: scheduler[theirs] for theirs, ours in SCHEDULE_KEYS.items() if theirs in scheduler}
        schedule = scheduler.get("beta_schedule", "linear")
        found["beta_schedule"] = BETA_SCHEDULES.get(schedule, schedule)
        found["timestep_spacing"] = scheduler.get("timestep_spacing")
        found["steps_offset"] = scheduler.get("steps_offset", 0)
        found["set_alpha_to_one"] = scheduler.get("set_alpha_to_one")
        found["trained_betas"] = scheduler.get("trained_betas")
        found["karras_sigmas"] = scheduler.get("use_karras_sigmas")
        found["clip_sample_range"] = scheduler.get("clip_sample_range", 1.0) if scheduler.get("clip_sample") else None
    return {key: value for key, value in found.items() if value is not None} | {"notes": notes}


def _scheduler(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return scheduler_config.json of a folder, or of that which the folder of a U-Net alone lies in."""
    path = checkpoint.path.parent if checkpoint.path.name == "unet" else checkpoint.path
    return _config(path / "scheduler", "scheduler_config.json")


def _unsupported(name: str, config: Mapping[str, Any]) -> str | None:
    """Return the first key of a config whose value changes what is computed in a way unknown here."""
    for key, values in FIXED[name].items():
        stated = config.get(key, values[0])
        if any(value not in values for value in (stated if isinstance(stated, list) else [stated])):
            return f"{key} {stated!r}; only {values[0]!r} is supported"
    return None


def _unknown(name: str, config: Mapping[str, Any]) -> list[str]:
    """Return a note on keys with a value that this version has not heard of."""
    known = FIXED[name].keys() | READ[name] | OTHER[name] | (SOLVER.keys() if name == "scheduler" else set())
    unknown = [key for key, value in config.items() if key not in known and not key.startswith("_") and value]
    return [f"{some(unknown)} not known here, and without effect"] if unknown else []


def _refused(scheduler: Mapping[str, Any]) -> str | None:
    """Return the first key of a scheduler's config, class defaults included, that samples in a way unknown here."""
    name, where = scheduler.get("_class_name"), "scheduler_config.json: "
    if name not in SCHEDULERS and (name or not {"beta_start", "beta_end", "beta_schedule"} <= scheduler.keys()):
        return f"{where}_class_name {name!r} is not one of {', '.join(SCHEDULERS)}"
    fault = _unsupported("scheduler", scheduler)
    return f"{where}{fault}" if fault else None


def _notes(scheduler: Mapping[str, Any]) -> list[str]:
    """Return what a scheduler's config, class defaults included, says of sampling that depends on the sampler here."""
    notes = _unknown("scheduler", scheduler)
    if scheduler.get("clip_sample"):
        notes.append("clip_sample true: ddim, para_ddim and ddpm clip the clean estimate, as in diffusers")
    if scheduler.get("use_karras_sigmas"):
        notes.append("use_karras_sigmas true: samplers that have them in diffusers use them, unless a spacing is given")
    left = [f"{key} {scheduler[key]!r}" for key, same in SOLVER.items() if scheduler.get(key, same[0]) not in same]
    return [*notes, *(f"{key} is left to the sampler that is asked for" for key in left)]


# ---- Writing ----


def written_configs(parts: Parts, spec: ModelSpec) -> dict[str, bytes]:
    """Return path in the folder -> content of every config but the tokenizer's."""
    configs = {
        "model_index.json": model_index(spec),
        "scheduler/scheduler_config.json": scheduler_config(spec),
        "unet/config.json": unet_config(spec),
        "vae/config.json": vae_config(spec),
        "text_encoder/config.json": text_config(parts["text_encoder"], spec),
    }
    return {name: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode() for name, config in configs.items()}


def written_tokenizer(files: Mapping[str, bytes], parts: Parts, spec: ModelSpec) -> dict[str, bytes]:
    """Return the files of `tokenizer/`: those given, and the two small configs where they are not among them.

    v2 pads with "!", id 0.
    """
    start, end = "<|startoftext|>", "<|endoftext|>"
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": "!" if spec.open_clip else end}
    length = clip.max_length(parts["text_encoder"])
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **special}
    config |= {"errors": "replace", "add_prefix_space": False}
    made = {"tokenizer_config.json": config, "special_tokens_map.json": special}
    contents = {name: json.dumps(value, indent=2).encode() for name, value in made.items()} | dict(files)
    return {f"tokenizer/{name}": content for name, content in contents.items()}


def model_index(spec: ModelSpec) -> dict[str, Any]:
    """Return model_index.json."""
    return {
        "_class_name": _pipeline_class(spec),
        **VERSION,
        "scheduler": ["diffusers", scheduler_config(spec)["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }


def _pipeline_class(spec: ModelSpec) -> str:
    """Return the pipeline for the input channels that a U-Net has beside its latents. Raises BadInput for others."""
    inputs, latents = spec.unet_config.get("in_channels", 4), spec.unet_config.get("out_channels", 4)
    if inputs - latents not in PIPELINES:
        purpose = UNET_INPUTS.get(inputs, "another model")
        raise BadInput(f"a U-Net of {inputs} input channels, {purpose}: no diffusers folder is written of it")
    return PIPELINES[inputs - latents]


def scheduler_class(checkpoint: Checkpoint) -> str | None:
    """Return the class that a folder's scheduler_config.json names; None where there is none."""
    return _scheduler(checkpoint).get("_class_name")


def scheduler_config(spec: ModelSpec) -> dict[str, Any]:
    """Return scheduler_config.json: PNDM for epsilon, DDIM for all others, as the published folders have them.

    PNDM has no key for Karras sigmas nor for clipping: DPM-Solver++ is written with the first, DDIM with the second.
    """
    schedules = {ours: theirs for theirs, ours in BETA_SCHEDULES.items()}
    if spec.beta_schedule not in schedules:
        raise BadInput(f"beta_schedule {spec.beta_schedule}: diffusers has {', '.join(schedules)}")
    ddim = spec.prediction_type != "epsilon" or spec.zero_terminal_snr or spec.clip_sample_range is not None
    name = "DPMSolverMultistepScheduler" if spec.karras_sigmas else "DDIMScheduler" if ddim else "PNDMScheduler"
    config = {
        "_class_name": name,
        **VERSION,
        "beta_start": spec.linear_start,
        "beta_end": spec.linear_end,
        "beta_schedule": schedules[spec.beta_schedule],
        "num_train_timesteps": spec.timesteps,
        "trained_betas": None if spec.trained_betas is None else list(spec.trained_betas),
        "prediction_type": spec.prediction_type,
        # PNDM has no such key, but DDIM and DDPM made from this config default to True
        "clip_sample": spec.clip_sample_range is not None,
        "steps_offset": spec.steps_offset,
    }
    spacing = spec.timestep_spacing or ("trailing" if spec.zero_terminal_snr else None)
    optional = {"set_alpha_to_one": spec.set_alpha_to_one, "timestep_spacing": spacing}
    config |= {key: value for key, value in optional.items() if value is not None}
    if spec.karras_sigmas:
        config["use_karras_sigmas"] = True
    if spec.clip_sample_range is not None:
        config["clip_sample_range"] = spec.clip_sample_range
    if name == "PNDMScheduler":
        return config | {"skip_prk_steps": True}
    return config | {"rescale_betas_zero_snr": spec.zero_terminal_snr}


def unet_config(spec: ModelSpec) -> dict[str, Any]:
    """Return config.json of UNet2DConditionModel from our U-Net's keywords."""
    ours = dict(spec.unet_config)
    groups, context = ours.get("resblock_gn_groups", 32), ours.get("context_dim")
    if groups != 32:
        raise BadInput(
            f"resblock_gn_groups {groups}: diffusers has one number of norm groups, transformers here have 32"
        )
    if context is None:
        raise BadInput("context_dim is not set: diffusers' UNet2DConditionModel needs cross-attention")
    widths = [ours.get("model_channels", 320) * factor for factor in ours.get("channel_mult", [1, 2, 4, 4])]
    attended = [2**level in ours.get("attention_resolutions", [4, 2, 1]) for level in range(len(widths))]
    channels = ours.get("num_head_channels", -1)
    return {
        "_class_name": "UNet2DConditionModel",
        **VERSION,
        "sample_size": spec.image_size,
        "in_channels": ours.get("in_channels", 4),
        "out_channels": ours.get("out_channels", 4),
        "block_out_channels": widths,
        "layers_per_block": _plain(ours.get("num_res_blocks", 2)),
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attended)],
        "cross_attention_dim": context,
        # really the number of heads
        "attention_head_dim": ours["num_heads"] if channels in (-1, None) else [width // channels for width in widths],
        "transformer_layers_per_block": _plain(ours.get("transformer_depth", 1)),
        "upcast_attention": bool(ours.get("upcast_attention", False)),
        "use_linear_projection": bool(ours.get("use_linear_in_transformer", False)),
        "norm_num_groups": groups,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "center_input_sample": False,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
    }


def vae_config(spec: ModelSpec) -> dict[str, Any]:
    """Return config.json of diffusers' AutoencoderKL from our VAE's keywords."""
    ours = spec.first_stage_config["ddconfig"]
    widths = [ours["ch"] * factor for factor in ours["ch_mult"]]
    resolution = ours.get("resolution", 256)
    attended = [resolution // 2**level in ours.get("attn_resolutions", ()) for level in range(len(widths))]
    return {
        "_class_name": "AutoencoderKL",
        **VERSION,
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["AttnDownEncoderBlock2D" if attends else "DownEncoderBlock2D" for attends in attended],
        "up_block_types": ["AttnUpDecoderBlock2D" if attends else "UpDecoderBlock2D" for attends in reversed(attended)],
        "in_channels": ours.get("in_channels", 3),
        "out_channels": ours.get("out_ch", 3),
        "latent_channels": ours["z_channels"],
        "layers_per_block": ours["num_res_blocks"],
        "norm_num_groups": ours.get("num_groups", 32),
        "sample_size": spec.image_size * 2 ** (len(widths) - 1),
        "scaling_factor": spec.scale_factor,
    }


def text_config(tensors: Mapping[str, Tensor | LazyTensor], spec: ModelSpec) -> dict[str, Any]:
    """Return config.json of transformers' CLIPTextModel; layers are those the tensors hold."""
    vocabulary, width = tensors["text_model.embeddings.token_embedding.weight"].shape
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_act": "gelu" if spec.open_clip else "quick_gelu",
        "hidden_size": width,
        "intermediate_size": tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": clip.max_length(tensors),
        "num_attention_heads": spec.cond_stage_config.get("heads") or width // 64,
        "num_hidden_layers": clip.depth(tensors),
        "projection_dim": 512 if spec.open_clip else width,
        "vocab_size": vocabulary,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, int) else list(value)
