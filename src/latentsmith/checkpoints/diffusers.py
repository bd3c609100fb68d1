"""A diffusers folder that `StableDiffusionPipeline.from_pretrained` opens as its own."""

import json
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from latentsmith.files.atomic import INCOMPLETE
from latentsmith.files.errors import BadInput
from latentsmith.files.pickles import LazyTensor
from latentsmith.files.tensors import save_safetensors

from . import clip, unet_keys, vae_keys
from .packing import AnyTensor, Parts, Written, lazy, require_whole, reshaped
from .spec import BETA_SCHEDULES, NULL_TEXT_KEY, PAD_KEY, ModelSpec

DIFFUSERS_VERSION = "0.31.0"  # the oldest we are checked against; newer ones read its configs
METADATA = {"format": "pt"}


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
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{secrets.token_hex(4)}{INCOMPLETE}")
    try:
        _write_folder(aside, parts, spec, tokenizer, dtype, written)
        aside.replace(out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _write_folder(
    folder: Path, parts: Parts, spec: ModelSpec, tokenizer: Mapping[str, bytes], dtype: torch.dtype | None,
    written: Written | None,
) -> None:  # fmt: skip
    configs = {
        "model_index.json": model_index(spec),
        "scheduler/scheduler_config.json": scheduler_config(spec),
        "unet/config.json": unet_config(spec),
        "vae/config.json": vae_config(spec),
        "text_encoder/config.json": text_config(parts["text_encoder"], spec),
    }
    for name, config in configs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    for name, content in _tokenizer_files(tokenizer, parts, spec).items():
        (folder / "tokenizer").mkdir(exist_ok=True)
        (folder / "tokenizer" / name).write_bytes(content)
    weights = "diffusion_pytorch_model.safetensors"
    # diffusers' configs have no place for what "unconditional" means, nor for padded text.
    own = {NULL_TEXT_KEY: spec.null_text} if spec.null_text != "empty" else {}
    own |= {PAD_KEY: str(pad)} if (pad := spec.cond_stage_config.get("pad_to")) else {}
    save_safetensors(folder / "unet" / weights, _unet(parts["unet"], dtype), METADATA | own, written=written)
    save_safetensors(folder / "vae" / weights, _vae(parts["vae"], dtype), METADATA, written=written)
    text = {name: lazy(tensor, dtype) for name, tensor in parts["text_encoder"].items()}
    save_safetensors(folder / "text_encoder" / "model.safetensors", text, METADATA, written=written)


def _unet(tensors: Mapping[str, AnyTensor], dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    return {
        theirs: lazy(tensors[ours], dtype) for ours, theirs in unet_keys.rename(tensors, unet_keys.DIFFUSERS).items()
    }


def _vae(tensors: Mapping[str, AnyTensor], dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """diffusers' attention is Linear, LDM's a 1x1 convolution: two unit dimensions less."""
    named = {}
    for ours, theirs in vae_keys.rename(tensors, "diffusers").items():
        tensor = lazy(tensors[ours], dtype)
        attention = vae_keys.ATTENTION.search(ours) and len(tensor.shape) == 4
        named[theirs] = reshaped(tensor, tensor.shape[:2]) if attention else tensor
    return named


def model_index(spec: ModelSpec) -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
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
    """PNDM for epsilon, DDIM for v-prediction and rescaled schedules, as the published folders have them."""
    if spec.beta_schedule not in BETA_SCHEDULES.values():
        raise BadInput(f"beta_schedule {spec.beta_schedule}: diffusers has {', '.join(BETA_SCHEDULES.values())}")
    schedules = {ours: theirs for theirs, ours in BETA_SCHEDULES.items()}
    ddim = spec.prediction_type != "epsilon" or spec.zero_terminal_snr
    config = {
        "_class_name": "DDIMScheduler" if ddim else "PNDMScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
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
    """config.json of UNet2DConditionModel from our U-Net's keywords."""
    ours = dict(spec.unet_config)
    groups, context = ours.get("resblock_gn_groups", 32), ours.get("context_dim")
    if groups != 32:
        raise BadInput(
            f"resblock_gn_groups {groups}: diffusers has one number of norm groups, transformers here have 32"
        )
    if context is None:
        raise BadInput("context_dim is not set: diffusers' UNet2DConditionModel needs cross-attention")
    mult = ours.get("channel_mult", [1, 2, 4, 4])
    widths = [ours.get("model_channels", 320) * factor for factor in mult]
    attended = [2**level in ours.get("attention_resolutions", [4, 2, 1]) for level in range(len(widths))]
    depth = ours.get("transformer_depth", 1)
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "sample_size": spec.image_size,
        "in_channels": ours.get("in_channels", 4),
        "out_channels": ours.get("out_channels", 4),
        "block_out_channels": widths,
        "layers_per_block": _plain(ours.get("num_res_blocks", 2)),
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attended)],
        "cross_attention_dim": context,
        "attention_head_dim": _heads(ours, widths),
        "transformer_layers_per_block": _plain(depth),
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


def _heads(ours: Mapping[str, Any], widths: list[int]) -> int | list[int]:
    """diffusers' `attention_head_dim` is really the number of heads."""
    channels = ours.get("num_head_channels", -1)
    return ours["num_heads"] if channels in (-1, None) else [width // channels for width in widths]


def vae_config(spec: ModelSpec) -> dict[str, Any]:
    """config.json of diffusers' AutoencoderKL from our VAE's keywords."""
    ours = spec.first_stage_config["ddconfig"]
    widths = [ours["ch"] * factor for factor in ours["ch_mult"]]
    resolution = ours.get("resolution", 256)
    attended = [resolution // 2**level in ours.get("attn_resolutions", ()) for level in range(len(widths))]
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": [f"{'Attn' * attends}DownEncoderBlock2D" for attends in attended],
        "up_block_types": [f"{'Attn' * attends}UpDecoderBlock2D" for attends in reversed(attended)],
        "in_channels": ours.get("in_channels", 3),
        "out_channels": ours.get("out_ch", 3),
        "latent_channels": ours["z_channels"],
        "layers_per_block": ours["num_res_blocks"],
        "norm_num_groups": ours.get("num_groups", 32),
        "sample_size": spec.image_size * 2 ** (len(widths) - 1),
        "scaling_factor": spec.scale_factor,
    }


def text_config(tensors: Mapping[str, AnyTensor], spec: ModelSpec) -> dict[str, Any]:
    """config.json of transformers' CLIPTextModel; layers are those the tensors hold."""
    vocabulary, width = tensors["text_model.embeddings.token_embedding.weight"].shape
    positions = tensors["text_model.embeddings.position_embedding.weight"].shape[0]
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_act": "gelu" if spec.open_clip else "quick_gelu",
        "hidden_size": width,
        "intermediate_size": tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": positions,
        "num_attention_heads": spec.cond_stage_config.get("heads") or width // 64,
        "num_hidden_layers": clip.depth(tensors),
        "projection_dim": 512 if spec.open_clip else width,
        "vocab_size": vocabulary,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _tokenizer_files(given: Mapping[str, bytes], parts: Parts, spec: ModelSpec) -> dict[str, bytes]:
    """The given files, and the two small configs where they are not among them; v2 pads with "!", id 0."""
    length = parts["text_encoder"]["text_model.embeddings.position_embedding.weight"].shape[0]
    start, end = "<|startoftext|>", "<|endoftext|>"
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": "!" if spec.open_clip else end}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **special}
    config |= {"errors": "replace", "add_prefix_space": False}
    made = {"tokenizer_config.json": config, "special_tokens_map.json": special}
    return {name: json.dumps(value, indent=2).encode() for name, value in made.items()} | dict(given)


def _plain(value: Any) -> Any:
    return value if isinstance(value, int) else list(value)
