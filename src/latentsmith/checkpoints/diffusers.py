"""diffusers' layout: a folder for each part with a config.json, which `StableDiffusionPipeline.from_pretrained` opens.

Key tables are computed forwards from the canonical names that a network has, so block counts, depths and widths are
whatever they are, and the same tables serve to read and to write.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentsmith.architectures import COMPONENTS
from latentsmith.diffusion.schedule import LDM_BETA_SCHEDULES
from latentsmith.files.atomic import atomic_folder
from latentsmith.files.errors import BadInput
from latentsmith.files.json import read_json
from latentsmith.files.lazy import LazyTensor
from latentsmith.files.tensors import TensorFile, open_tensors, save_safetensors

from . import clip
from .base import (
    NULL_TEXT_KEY,
    PAD_KEY,
    PREDICTIONS,
    Checkpoint,
    Contents,
    Dialect,
    Format,
    ModelSpec,
    Part,
    Parts,
    Written,
    lost_padding,
    packed,
    renamed,
    require_whole,
)

VERSION = {"_diffusers_version": "0.31.0"}  # the oldest we are checked against; newer ones read its configs
BETA_SCHEDULES = {LDM_BETA_SCHEDULES[name]: name for name in ("linear", "sqrt_linear")}  # diffusers' names -> LDM's
SCHEDULE_KEYS = {"beta_start": "linear_start", "beta_end": "linear_end", "num_train_timesteps": "timesteps",
                 "rescale_betas_zero_snr": "zero_terminal_snr"}  # fmt: skip
WEIGHTS_FILE = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model|pytorch_model|open_clip_model|open_clip_pytorch_model|model_weights)"
    r"(\.(?P<variant>\w+))??\.(?P<type>safetensors|bin|ckpt)(\.index(\.(?P<index_variant>\w+))?\.json)?"
)
KEY_RULES = (
    ("unet", r"(?=(down_blocks|mid_block|up_blocks|time_embedding|conv_in|conv_out|conv_norm_out)\.)"),
    ("vae", r"(?=(encoder|decoder)\.(down_blocks|up_blocks|mid_block|conv_norm_out)\.)"),
)

# ---- Names of the U-Net ----

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
OUTER = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
MODULE = re.compile(r"(input_blocks\.(?!0\.)\d+\.\d+|output_blocks\.\d+\.\d+|middle_block\.\d+)\.")
SIDES = {"input_blocks": ("down_blocks", "downsamplers.0.conv"), "output_blocks": ("up_blocks", "upsamplers.0.conv")}


def unet_names(names: Iterable[str]) -> dict[str, str]:
    """Return canonical name -> diffusers' for every name of one U-Net."""
    names = list(names)
    modules = dict(_modules(_kinds(names)))
    table = {}
    for name in names:
        if module := MODULE.match(name):
            path, _, tensor = name.removeprefix(module[0]).rpartition(".")
            inner = "" if path in ("op", "conv") else f".{RESNET.get(path, path)}"  # a resampler has one convolution
            table[name] = f"{modules[module[1]]}{inner}.{tensor}"
        else:
            outer, _, tensor = name.rpartition(".")
            table[name] = f"{OUTER.get(outer, outer)}.{tensor}"
    return table


def _kinds(names: Iterable[str]) -> dict[str, str]:
    """Return module ("input_blocks.4.0") -> "resnets", "attentions" or "sampler", by block and index within it."""
    inners = {"op": "sampler", "conv": "sampler"} | dict.fromkeys((path.split(".")[0] for path in RESNET), "resnets")
    kinds = {}
    for name in names:
        if module := MODULE.match(name):
            kinds[module[1]] = inners.get(name.removeprefix(module[0]).split(".")[0], "attentions")
    return dict(sorted(kinds.items(), key=lambda item: [int(number) for number in re.findall(r"\d+", item[0])]))


def _modules(kinds: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield module -> diffusers' name. On each side, a resampler closes its level, and resnets count within theirs."""
    for side, (theirs, sampler) in SIDES.items():
        level, resnet = 0, -1
        for module, kind in kinds.items():
            if module.startswith(f"{side}."):
                resnet += kind == "resnets"
                yield module, f"{theirs}.{level}.{sampler if kind == 'sampler' else f'{kind}.{resnet}'}"
                if kind == "sampler":
                    level, resnet = level + 1, -1
    counts = {"resnets": 0, "attentions": 0}
    for module, kind in kinds.items():
        if module.startswith("middle_block."):
            yield module, f"mid_block.{kind}.{counts[kind]}"
            counts[kind] += 1


# ---- Names of the VAE ----

ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_ATTENTION = {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}
VAE_ATTENTION = re.compile(r"\.(mid\.attn_1|attn\.\d+)\.(norm|q|k|v|proj_out)\.")


def vae_names(names: Iterable[str], attention: Mapping[str, str] = ATTENTION) -> dict[str, str]:
    """Return canonical name -> diffusers' for every name of one VAE. attention: names inside attention blocks."""
    names = list(names)
    levels = 1 + max((int(match[1]) for name in names if (match := re.match(r"decoder\.up\.(\d+)\.", name))), default=0)
    return {name: _vae_name(name, levels, attention) for name in names}


def _vae_name(name: str, levels: int, attention: Mapping[str, str]) -> str:
    name = VAE_ATTENTION.sub(lambda match: f".{match[1]}.{attention[match[2]]}.", name)
    name = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1.", name)
    # LDM counts the decoder's levels by resolution, diffusers in the order they run.
    name = re.sub(r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.up_blocks.{levels - 1 - int(match[1])}.", name)
    name = re.sub(r"\.block\.(\d+)\.", r".resnets.\1.", name)
    name = re.sub(r"_blocks\.(\d+)\.attn\.(\d+)\.", r"_blocks.\1.attentions.\2.", name)
    name = re.sub(r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv.", name)
    name = re.sub(r"\.mid\.block_([12])\.", lambda match: f".mid_block.resnets.{int(match[1]) - 1}.", name)
    name = name.replace(".mid.attn_1.", ".mid_block.attentions.0.")
    return name.replace(".nin_shortcut.", ".conv_shortcut.").replace(".norm_out.", ".conv_norm_out.")


def _dialect(title: str, names: Any) -> Dialect:
    return Dialect("diffusers", title, lambda ours: renamed(names(ours)), by_level=True)


UNET = _dialect("diffusers", unet_names)
VAE = _dialect("diffusers", vae_names)
OLD_VAE = _dialect("diffusers-old", partial(vae_names, attention=OLD_ATTENTION))


def unet_dialect(entries: Mapping[str, Any], config: Mapping[str, Any]) -> Dialect | None:
    """Recognise diffusers' names of a U-Net."""
    pattern = re.compile(r"(down_blocks|up_blocks|mid_block|conv_in|time_embedding)\.")
    return UNET if any(pattern.match(key) for key in entries) else None


def vae_dialect(entries: Mapping[str, Any], config: Mapping[str, Any]) -> Dialect | None:
    """Recognise diffusers' names of a VAE, with today's attention names or the old ones (query, key, proj_attn)."""
    if not any(".mid_block." in key or "_blocks." in key for key in entries):
        return None
    return OLD_VAE if any(re.search(r"\.(query|proj_attn)\.", key) for key in entries) else VAE


# ---- Reading ----


def open_folder(path: Path, weights: str) -> Contents | None:
    """Open a folder of parts, or the folder of one part."""
    if not path.is_dir():
        return None
    parts = [part for part in COMPONENTS if (path / COMPONENTS[part].folder).is_dir()]
    if not parts:
        return Contents({None: _open_component(path, weights)})
    return Contents({part: _open_component(path / COMPONENTS[part].folder, weights) for part in parts}, "diffusers")


def _open_component(folder: Path, weights: str) -> TensorFile:
    """Open the weights of one part: safetensors before pickles, full precision before half."""
    matches = [(match, file) for file in sorted(folder.iterdir()) if (match := WEIGHTS_FILE.fullmatch(file.name))]
    wanted = (["non_ema"] if weights == "raw" else []) + [None, "ema", "fp16", "bf16", "non_ema"]

    def rank(item: tuple[re.Match, Path]) -> tuple[int, bool, str]:
        match, file = item
        variant = match["variant"] or match["index_variant"]
        place = wanted.index(variant) if variant in wanted else len(wanted)
        return place, match["type"] != "safetensors", file.name

    if not matches:
        raise BadInput(
            f"{folder}: holds no weights (diffusion_pytorch_model.safetensors, model.safetensors, *.bin, ...)"
        )
    return open_tensors(min(matches, key=rank)[1])


def component_config(part: Part) -> dict[str, Any]:
    """Return the config.json beside a part's weights; {} where there is none."""
    is_component = part.path.is_dir() or WEIGHTS_FILE.fullmatch(part.path.name)
    return _config(part.path if part.path.is_dir() else part.path.parent, "config.json") if is_component else {}


def _config(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder / name, "a config of diffusers") if (folder / name).is_file() else {}


def sizes(checkpoint: Checkpoint, part: Part) -> dict[str, Any] | None:
    """Return what a part's config.json says beyond the shapes of its weights."""
    config = component_config(part)
    if not config:
        return None
    if part.name == "unet":
        upcast = {"upcast_attention": True} if config.get("upcast_attention") else {}
        return {**_our_heads(part, config), **upcast, "resblock_gn_groups": config.get("norm_num_groups", 32)}
    if part.name == "vae":
        return {"num_groups": config.get("norm_num_groups", 32)}
    keys = {"heads": config.get("num_attention_heads"), "activation": config.get("hidden_act")}
    return {key: value for key, value in keys.items() if value}


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
    found = {"image_size": unet.get("sample_size"), "scale_factor": vae.get("scaling_factor")}
    scheduler = _config(checkpoint.path / "scheduler", "scheduler_config.json")
    if scheduler:
        prediction = PREDICTIONS.get(scheduler.get("prediction_type", "epsilon"))
        found["prediction"] = prediction, "scheduler_config.json"
        found |= {ours: scheduler[theirs] for theirs, ours in SCHEDULE_KEYS.items() if theirs in scheduler}
        schedule = scheduler.get("beta_schedule", "scaled_linear")
        found["beta_schedule"] = BETA_SCHEDULES.get(schedule, schedule)
        found["timestep_spacing"] = scheduler.get("timestep_spacing")
        found["steps_offset"] = scheduler.get("steps_offset", 0)
        found["set_alpha_to_one"] = scheduler.get("set_alpha_to_one")
    return found


# ---- Writing ----


def export_diffusers(
    parts: Parts, out: str | Path, spec: ModelSpec, *, tokenizer: Mapping[str, bytes],
    dtype: torch.dtype | None = None, written: Written | None = None,
) -> None:  # fmt: skip
    """Write the folder `out`, streamed; it takes its name once it is complete.

    tokenizer: file name -> content for `tokenizer/` (vocab.json and merges.txt at least).
    dtype: of every floating-point weight; None keeps each.
    Raises BadInput if `out` exists and is not an empty folder, or the model is one diffusers' classes cannot express.
    """
    require_whole(parts)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out}: exists already; name another folder or move it away")
    configs = {
        "model_index.json": model_index(spec),
        "scheduler/scheduler_config.json": scheduler_config(spec),
        "unet/config.json": unet_config(spec),
        "vae/config.json": vae_config(spec),
        "text_encoder/config.json": text_config(parts["text_encoder"], spec),
    }
    contents = {
        name: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode() for name, config in configs.items()
    }
    contents |= {f"tokenizer/{name}": data for name, data in _tokenizer_files(tokenizer, parts, spec).items()}
    # diffusers' configs have no key for what "unconditional" means, nor for padded text.
    own = {NULL_TEXT_KEY: spec.null_text} if spec.null_text != "empty" else {}
    own |= {PAD_KEY: str(pad)} if (pad := spec.cond_stage_config.get("pad_to")) else {}
    with atomic_folder(out) as folder:
        for name, data in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        text = {name: LazyTensor.of(tensor).to(dtype) for name, tensor in parts["text_encoder"].items()}
        for name, tensors, metadata in (
            ("unet/diffusion_pytorch_model", packed(parts["unet"], UNET, dtype), own),
            ("vae/diffusion_pytorch_model", _vae(parts["vae"], dtype), {}),
            ("text_encoder/model", text, {}),
        ):
            save_safetensors(folder / f"{name}.safetensors", tensors, {"format": "pt"} | metadata, written=written)


def _vae(tensors: Mapping[str, Tensor | LazyTensor], dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """Return the VAE in diffusers' names; its attention is Linear, LDM's a 1x1 convolution with two dimensions more."""
    flat = {
        name: LazyTensor.of(tensor).reshape(tuple(tensor.shape[:2]))
        for name, tensor in tensors.items()
        if VAE_ATTENTION.search(name) and len(tensor.shape) == 4
    }
    return packed({**tensors, **flat}, VAE, dtype)


def model_index(spec: ModelSpec) -> dict[str, Any]:
    """Return model_index.json."""
    return {
        "_class_name": "StableDiffusionPipeline",
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


def scheduler_config(spec: ModelSpec) -> dict[str, Any]:
    """Return scheduler_config.json: PNDM for epsilon, DDIM for all others, as the published folders have them."""
    schedules = {ours: theirs for theirs, ours in BETA_SCHEDULES.items()}
    if spec.beta_schedule not in schedules:
        raise BadInput(f"beta_schedule {spec.beta_schedule}: diffusers has {', '.join(schedules)}")
    ddim = spec.prediction_type != "epsilon" or spec.zero_terminal_snr
    config = {
        "_class_name": "DDIMScheduler" if ddim else "PNDMScheduler",
        **VERSION,
        "beta_start": spec.linear_start,
        "beta_end": spec.linear_end,
        "beta_schedule": schedules[spec.beta_schedule],
        "num_train_timesteps": spec.timesteps,
        "trained_betas": None,
        "prediction_type": spec.prediction_type,
        "steps_offset": spec.steps_offset,
    }
    spacing = spec.timestep_spacing or ("trailing" if spec.zero_terminal_snr else None)
    optional = {"set_alpha_to_one": spec.set_alpha_to_one, "timestep_spacing": spacing}
    config |= {key: value for key, value in optional.items() if value is not None}
    if not ddim:
        return config | {"skip_prk_steps": True}
    return config | {"clip_sample": False, "rescale_betas_zero_snr": spec.zero_terminal_snr}


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


def _tokenizer_files(files: Mapping[str, bytes], parts: Parts, spec: ModelSpec) -> dict[str, bytes]:
    """Return the given files, and the two small configs where they are not among them; v2 pads with "!", id 0."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": "!" if spec.open_clip else end}
    length = clip.max_length(parts["text_encoder"])
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **special}
    config |= {"errors": "replace", "add_prefix_space": False}
    made = {"tokenizer_config.json": config, "special_tokens_map.json": special}
    return {name: json.dumps(value, indent=2).encode() for name, value in made.items()} | dict(files)


def _plain(value: Any) -> Any:
    return value if isinstance(value, int) else list(value)


FORMAT = Format(
    name="diffusers",
    title="diffusers folder",
    key_rules=KEY_RULES,
    dialects={"unet": unet_dialect, "vae": vae_dialect},
    open=open_folder,
    sizes=sizes,
    facts=facts,
    write=export_diffusers,
    needs_tokenizer=True,
    loses=lost_padding,
)
