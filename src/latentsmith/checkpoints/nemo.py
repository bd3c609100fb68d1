"""A `.nemo` archive in NeMo v2.0.0's dialect: norms fused and moved, a bare state dict, the model config beside it."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from latentsmith.files.atomic import atomic_open
from latentsmith.files.pickles import LazyTensor
from latentsmith.files.tensors import tensor_bytes
from latentsmith.files.torch_zip import write_torch_zip

from . import clip
from .open import OWN_SECTION
from .packing import Parts, Written, lazy, require_whole, schedule_buffers, text_tower
from .spec import OWN_SCHEDULE, ModelSpec
from .unet_keys import NEMO_V2, rename

TARGET = "nemo.collections.multimodal.models.text_to_image.stable_diffusion.ldm.ddpm.MegatronLatentDiffusion"
ENCODERS = "nemo.collections.multimodal.modules.stable_diffusion"
AUTOENCODER = "nemo.collections.multimodal.models.text_to_image.stable_diffusion.ldm.autoencoder.AutoencoderKL"
BLOCK = 512  # bytes of a tar header, and what members are padded to


def export_nemo(
    parts: Parts, out: str | Path, spec: ModelSpec, *, dtype: torch.dtype | None = None, written: Written | None = None
) -> None:
    """Write the `.nemo` archive `out`, streamed.

    v1 goes with FrozenCLIPEmbedder, v2 with FrozenOpenCLIPEmbedder, whose unused last layer and projection are zeros
    (its config says so) where `parts` lack them. dtype: of every floating-point weight; None keeps each.
    """
    require_whole(parts)
    tensors = {f"model.{name}": tensor for name, tensor in _state(parts, spec, dtype).items()}
    config = yaml.safe_dump(nemo_config(parts, spec), sort_keys=False).encode()
    with atomic_open(Path(out)) as file:
        header = tarfile.TarInfo("./model_config.yaml")
        header.size = len(config)
        file.write(header.tobuf(tarfile.GNU_FORMAT) + config + _padding(len(config)))
        header_at = file.tell()
        file.write(bytes(BLOCK))  # the header of the weights, once their size is known
        write_torch_zip(file, tensors, tensor_bytes, written)
        weights = tarfile.TarInfo("./model_weights.ckpt")
        weights.size = file.seek(0, io.SEEK_END) - header_at - BLOCK
        file.write(_padding(weights.size) + bytes(2 * BLOCK))
        file.seek(header_at)
        file.write(weights.tobuf(tarfile.GNU_FORMAT))


def _padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


def _state(parts: Parts, spec: ModelSpec, dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """Keys below the leading `model.`."""
    unet = rename(parts["unet"], NEMO_V2)
    state = schedule_buffers(spec)
    state |= {f"model.diffusion_model.{theirs}": lazy(parts["unet"][ours], dtype) for ours, theirs in unet.items()}
    state |= {f"first_stage_model.{name}": lazy(tensor, dtype) for name, tensor in parts["vae"].items()}
    text = text_tower(parts["text_encoder"], spec.open_clip, dtype)
    if spec.open_clip and not _whole(parts):
        text |= _unused(text, clip.depth(parts["text_encoder"]) if spec.penultimate else None)
    return state | {f"cond_stage_model.{name}": tensor for name, tensor in text.items()}


def _whole(parts: Parts) -> bool:
    """Whether the text encoder brings along what nothing uses of it."""
    return "logit_scale" in parts["text_encoder"]


def _unused(text: Mapping[str, LazyTensor], depth: int | None) -> dict[str, LazyTensor]:
    """OpenCLIP's projection, temperature and, at `depth`, last layer: NeMo loads them and never uses them."""
    final = text["model.ln_final.weight"]
    zeros = {
        "model.text_projection": _zeros((*final.shape, *final.shape), final.dtype),
        "model.logit_scale": _zeros((), final.dtype),
    }
    if depth is None:
        return zeros
    before, after = (f"model.transformer.resblocks.{layer}." for layer in (depth - 1, depth))
    last = {key: tensor for key, tensor in text.items() if key.startswith(before)}
    return zeros | {key.replace(before, after): _zeros(tensor.shape, tensor.dtype) for key, tensor in last.items()}


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
    return LazyTensor(dtype, tuple(shape), lambda: torch.zeros(shape, dtype=dtype))


def nemo_config(parts: Parts, spec: ModelSpec) -> dict[str, Any]:
    """The `model:` section NeMo v2.0.0 restores from, and the sizes of ours that its encoders fix."""
    unet = {
        "_target_": f"{ENCODERS}.diffusionmodules.openaimodel.UNetModel",
        "from_pretrained": None,
        "from_NeMo": True,
        "image_size": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        **spec.unet_config,
    }
    upcast = unet.pop("upcast_attention", False)
    vae = {"_target_": AUTOENCODER, "from_pretrained": None, "monitor": "val/rec_loss", **spec.first_stage_config}
    vae["lossconfig"] = {"target": "torch.nn.Identity"}
    vae["ddconfig"] = {"double_z": True, "dropout": 0.0, **vae["ddconfig"]}
    return {
        "target": TARGET,
        "nemo_version": "2.0.0",
        "precision": 32,
        "linear_start": spec.linear_start,
        "linear_end": spec.linear_end,
        "beta_schedule": spec.beta_schedule,
        "timesteps": spec.timesteps,
        "parameterization": {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}[spec.prediction_type],
        "first_stage_key": "images",
        "cond_stage_key": "captions",
        "image_size": spec.image_size,
        "channels": spec.first_stage_config["embed_dim"],
        "cond_stage_trainable": False,
        "conditioning_key": "crossattn",
        "scale_factor": spec.scale_factor,
        "text_embedding_dropout_rate": 0.1 if spec.null_text == "zero" else 0.0,
        "unet_config": _plain(unet),
        "first_stage_config": _plain(vae),
        "cond_stage_config": _plain(_encoder(parts, spec)),
        OWN_SECTION: {
            "unet_config": {"upcast_attention": upcast},
            "cond_stage_config": _plain(_beside_encoder(parts, spec)),
            **{key: getattr(spec, key) for key in OWN_SCHEDULE},
        },
    }


def _encoder(parts: Parts, spec: ModelSpec) -> dict[str, Any]:
    """The embedder, with its own arguments alone: NeMo calls it with whatever stands here."""
    if not spec.open_clip:
        return {
            "_target_": f"{ENCODERS}.encoders.modules.FrozenCLIPEmbedder",
            "version": "openai/clip-vit-large-patch14",
            "max_length": spec.cond_stage_config.get("max_length", 77),
            "layer": "last",
        }
    return {
        "_target_": f"{ENCODERS}.encoders.modules.FrozenOpenCLIPEmbedder",
        "arch": "ViT-H-14",
        "version": "laion2b_s32b_b79k",
        "max_length": spec.cond_stage_config.get("max_length", 77),
        "layer": "penultimate" if spec.penultimate else "last",
    }


def _beside_encoder(parts: Parts, spec: ModelSpec) -> dict[str, Any]:
    """What NeMo's embedder has no argument for: sizes, and which weights were never trained."""
    text = {key: value for key, value in spec.cond_stage_config.items() if value is not None and key[0] != "_"}
    depth = clip.depth(parts["text_encoder"])
    if not spec.open_clip:
        padded = {} if text.get("pad_to") else {"trained_unpadded": True}
        return text | {"layer": "last", "layers": depth} | padded
    if _whole(parts):
        return text | {"layers": depth}
    if not spec.penultimate:
        return text | {"layer": "last", "layers": depth, "unused_layer": "zeros"}
    # Layer number `depth`, text_projection and logit_scale hold no trained weights.
    return text | {"layer": "penultimate", "layers": depth + 1, "unused_layer": "zeros"}


def _plain(value: Any) -> Any:
    """Only what YAML's safe dumper knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
