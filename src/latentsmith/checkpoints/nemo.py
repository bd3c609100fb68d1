"""NeMo: `.nemo` archives and its Lightning checkpoints, whose U-Net names depart from LDM's in three ways.

Written in v2.0.0's dialect: norms fused and moved, a bare state dict, the model config beside it.
"""

import io
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from latentsmith.files.archives import is_archive, open_nemo
from latentsmith.files.atomic import atomic_open
from latentsmith.files.errors import BadInput
from latentsmith.files.lazy import LazyTensor
from latentsmith.files.torch_zip import write_torch_zip

from . import clip, ldm
from .base import (
    SCALE_FACTOR_KEY,
    Checkpoint,
    Contents,
    Dialect,
    Format,
    ModelSpec,
    Part,
    Parts,
    SourceKey,
    Written,
    known_prediction,
    lost_clip_skip,
    lost_sampling,
    lost_zero_snr,
    packed,
    renamed,
    require_whole,
)

TARGET = "nemo.collections.multimodal.models.text_to_image.stable_diffusion.ldm.ddpm.MegatronLatentDiffusion"
ENCODERS = "nemo.collections.multimodal.modules.stable_diffusion"
AUTOENCODER = "nemo.collections.multimodal.models.text_to_image.stable_diffusion.ldm.autoencoder.AutoencoderKL"
RESTORE_KEYS: dict[str, Any] = {  # read by NeMo's restore_from without a default; the values are those of its configs
    "optim": {"name": "fused_adam", "lr": 1e-4, "weight_decay": 0.0, "betas": [0.9, 0.999]},
    "num_timesteps_cond": 1, "scale_by_std": False, "ignore_keys": [], "clip_denoised": True, "log_every_t": 10,
    "use_positional_encodings": False, "inductor": False, "inductor_cudagraphs": False, "ckpt_path": None,
    "v_posterior": 0.0, "original_elbo_weight": 0.0, "l_simple_weight": 1.0, "loss_type": "l2",
    "learn_logvar": False, "logvar_init": 0.0, "concat_mode": True, "cond_stage_forward": None, "fused_opt": True,
}  # fmt: skip
OWN_SECTION = "latentsmith"  # of a model config that we write: what NeMo has no key for
PADDED_LENGTH = 80  # text embeddings of a caption in NeMo v2.0.0, zeros from the 78th on
SCHEDULE = ("linear_start", "linear_end", "timesteps", "beta_schedule", "cosine_s")
OWN_SCHEDULE = ("zero_terminal_snr", "timestep_spacing", "steps_offset", "set_alpha_to_one", "karras_sigmas",
                "clip_sample_range")  # fmt: skip
BLOCK = 512  # bytes of a tar header, and what members are padded to
KEY_RULES = (
    ("unet", r"(model\.)?unet\."),
    ("vae", r"(model\.)?vae\."),
    ("text_encoder", r"(model\.)?text_encoder\."),
    ("schedule", r"(model\.)?noise_scheduler\."),
)

# ---- Names of the U-Net: three departures from LDM's, which come and go independently ----

FUSED = [(r"\bin_layers\.2\.", "in_layers.1."), (r"\bout_layers\.3\.", "out_layers.2."), (r"^out\.2\.", "out.1.")]
MOVED = [
    (r"(transformer_blocks\.\d+)\.norm1\.", r"\1.attn1.norm."),
    (r"(transformer_blocks\.\d+)\.norm2\.", r"\1.attn2.norm."),
    (r"(transformer_blocks\.\d+)\.norm3\.", r"\1.ff.net.LN."),
    (r"\bff\.net\.2\.", "ff.net.3."),
    (r"\bff\.net\.0\.proj\.", "ff.net.1.proj."),
    (r"\bff\.net\.LN\.", "ff.net.0."),
]
ENGINE = [  # on top of MOVED
    (r"(\.attn[12])\.norm\.", r"\1.norm_to_q.layer_norm_"),
    (r"(\.attn[12])\.to_q\.", r"\1.norm_to_q."),
    (r"\bff\.net\.0\.", "ff.net.layer_norm_"),
    (r"\bff\.net\.1\.proj\.", "ff.net.fc1_"),
    (r"\bff\.net\.3\.", "ff.net.fc2_"),
]
DEPARTURES = {  # name -> (how its keys are recognised, what it does to LDM's)
    "fused": (r"\bin_layers\.1\.|\bout_layers\.2\.|^out\.1\.", FUSED),  # SiLU inside GroupNorm
    "moved": (r"\.attn[12]\.(norm|norm_to_q)\.|\bff\.net\.(3|1\.proj)\.|\bff\.net\.fc[12]_", MOVED),  # into the module
    "transformer_engine": (r"\.norm_to_q\.|\bff\.net\.fc[12]_", ENGINE),  # fp8: norms inside the Linears after them
}


def unet_dialect(entries: Mapping[str, Any], config: Mapping[str, Any]) -> Dialect | None:
    """Recognise NeMo's names of a U-Net; None if they are LDM's."""
    found = [name for name, (pattern, _) in DEPARTURES.items() if any(re.search(pattern, key) for key in entries)]
    return _dialect(*found) if found else None


def _dialect(*departures: str) -> Dialect:
    rules = [rule for name in departures for rule in DEPARTURES[name][1]]

    def table(names: Iterable[str]) -> dict[str, SourceKey]:
        return renamed({name: _renamed(name, rules) for name in names})

    return Dialect("nemo", f"NeMo ({', '.join(departures)})", table)


def _renamed(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


V2_UNET = _dialect("fused", "moved")

# ---- Reading ----


def open_checkpoint(path: Path, weights: str) -> Contents | None:
    """Open a `.nemo` archive or an unpacked one; its Lightning checkpoints are opened as any single file."""
    if (path / "model_config.yaml").is_file() if path.is_dir() else path.is_file() and is_archive(path):
        file, config = open_nemo(path)
        return Contents({None: file}, "nemo", config)
    return None


def own_section(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what we wrote into a model config beside NeMo's own keys."""
    return checkpoint.config.get(OWN_SECTION) or {}


def sizes(checkpoint: Checkpoint, part: Part) -> dict[str, Any] | None:
    """Return what a model config says of a part beyond the shapes of its weights."""
    config, own = checkpoint.config, own_section(checkpoint)
    if part.name == "unet":
        unet = config.get("unet_config")
        if not isinstance(unet, Mapping):
            return None
        found = {key: unet.get(key) for key in ("num_heads", "num_head_channels", "resblock_gn_groups")}
        if (unet.get("num_head_channels") or -1) != -1:  # where both are set, NeMo takes this one
            found["num_heads"] = None
        found["upcast_attention"] = (own.get("unet_config") or {}).get("upcast_attention")
        return {key: value for key, value in found.items() if value and value != -1}
    if part.name == "vae":
        groups = ((config.get("first_stage_config") or {}).get("ddconfig") or {}).get("num_groups")
        return {"num_groups": groups} if groups else None
    stated, tower = stated_text(checkpoint), clip.text_config(config)
    if stated.get("layer") not in (None, "last", "penultimate"):
        raise BadInput(f"{part.path}: cond_stage_config.layer {stated['layer']!r} is not supported (last, penultimate)")
    if float(tower.get("layernorm_epsilon") or 1e-5) != 1e-5:
        raise BadInput(f"{part.path}: its CLIP's layernorm_epsilon is {tower['layernorm_epsilon']}, only 1e-5 works")
    activation = str(tower.get("activation") or "").replace("-", "_") or None
    if activation not in (None, "gelu", "quick_gelu"):
        raise BadInput(f"{part.path}: its CLIP's activation {activation!r} is not supported (gelu, quick_gelu)")
    found = {
        "heads": stated.get("num_attention_heads") or stated.get("heads") or tower.get("num_attention_heads"),
        "activation": stated.get("hidden_act") or stated.get("activation") or activation,
        "layer": stated.get("layer") if stated.get("layer") in ("last", "penultimate") else None,
        "pad_to": PADDED_LENGTH if pads_text(stated) and clip.max_length(part.entries) == 77 else None,
    }
    return {key: value for key, value in found.items() if value}


def stated_text(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a model config says of its text encoder, and what we wrote beside it."""
    own = own_section(checkpoint).get("cond_stage_config") or {}
    return {**(checkpoint.config.get("cond_stage_config") or {}), **own}


def pads_text(stated: Mapping[str, Any]) -> bool:
    """Return whether a text encoder fills its output with zeros up to 80 vectors.

    NeMo v2.0.0's FrozenCLIPEmbedder and FrozenMegatronCLIPEmbedder do; a model exported from here says that it was not
    trained so. stated: as stated_text returns it.
    """
    embedder = str(stated.get("_target_", "")).rpartition(".")[2]
    return embedder in ("FrozenCLIPEmbedder", "FrozenMegatronCLIPEmbedder") and not stated.get("trained_unpadded")


def facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a model config states of a model."""
    config = {**checkpoint.config, **own_section(checkpoint)}
    found = {key: config[key] for key in (*SCHEDULE, *OWN_SCHEDULE) if key in config}
    if found.get("cosine_s", 0) is None:
        del found["cosine_s"]
    if config.get("given_betas"):
        found["trained_betas"] = config["given_betas"]
    found |= {key: checkpoint.config.get(key) for key in ("image_size", "scale_factor")}
    found["scale_factor"] = checkpoint.extras.get(SCALE_FACTOR_KEY, found["scale_factor"])  # scale_by_std measured it
    if config.get("text_embedding_dropout_rate"):  # NeMo trains on zeroed embeddings
        found["null_text"] = "zero"
    if stated := config.get("parameterization"):
        prediction = known_prediction(stated)
        source = f"the model config's parameterization{'' if prediction else f' is {stated!r}'}"
        found["prediction"] = prediction, source
    return found


# ---- Writing ----


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
        write_torch_zip(file, tensors, written)
        weights = tarfile.TarInfo("./model_weights.ckpt")
        weights.size = file.seek(0, io.SEEK_END) - header_at - BLOCK
        file.write(_padding(weights.size) + bytes(2 * BLOCK))
        file.seek(header_at)
        file.write(weights.tobuf(tarfile.GNU_FORMAT))


def _padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


def _state(parts: Parts, spec: ModelSpec, dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """Return the state dict, its keys without the leading `model.`."""
    state = ldm.schedule_buffers(spec)
    state |= packed(parts["unet"], V2_UNET, dtype, "model.diffusion_model.")
    state |= packed(parts["vae"], ldm.DIALECT, dtype, "first_stage_model.")
    text = clip.text_tower(parts["text_encoder"], spec.open_clip, dtype, "cond_stage_model.")
    if spec.open_clip and not _is_whole(parts):
        text |= _unused(text, clip.depth(parts["text_encoder"]) if spec.penultimate else None)
    return state | text


def _is_whole(parts: Parts) -> bool:
    """Return whether the text encoder brings along what nothing uses of it."""
    return "logit_scale" in parts["text_encoder"]


def _unused(text: Mapping[str, LazyTensor], depth: int | None) -> dict[str, LazyTensor]:
    """Return zeros for OpenCLIP's projection, temperature and, at `depth`, last layer, which NeMo loads and ignores."""
    tower = "cond_stage_model.model."
    final = text[f"{tower}ln_final.weight"]
    zeros = {
        f"{tower}text_projection": LazyTensor.zeros((*final.shape, *final.shape), final.dtype),
        f"{tower}logit_scale": LazyTensor.zeros((), final.dtype),
    }
    if depth is None:
        return zeros
    before, after = (f"{tower}transformer.resblocks.{layer}." for layer in (depth - 1, depth))
    last = {key: tensor for key, tensor in text.items() if key.startswith(before)}
    return zeros | {key.replace(before, after): LazyTensor.zeros(t.shape, t.dtype) for key, t in last.items()}


def nemo_config(parts: Parts, spec: ModelSpec) -> dict[str, Any]:
    """Return the `model:` section NeMo v2.0.0 restores from, and the sizes of ours that its encoders fix."""
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
        **RESTORE_KEYS,
        "given_betas": None if spec.trained_betas is None else list(spec.trained_betas),
        "cosine_s": spec.cosine_s,
        "text_embedding_dropout_rate": 0.1 if spec.null_text == "zero" else 0.0,
        "unet_config": _plain(unet),
        "first_stage_config": _plain(vae),
        "cond_stage_config": _plain(_embedder(spec)),
        OWN_SECTION: {
            "unet_config": {"upcast_attention": upcast},
            "cond_stage_config": _plain(_beside_embedder(parts, spec)),
            **{key: getattr(spec, key) for key in OWN_SCHEDULE},
        },
    }


def _embedder(spec: ModelSpec) -> dict[str, Any]:
    """Return the text encoder's config with NeMo's arguments alone: it calls the class with every key here."""
    length = spec.cond_stage_config.get("max_length", 77)
    if not spec.open_clip:
        return {
            "_target_": f"{ENCODERS}.encoders.modules.FrozenCLIPEmbedder",
            "version": "openai/clip-vit-large-patch14",
            "max_length": length,
            "layer": "last",
        }
    return {
        "_target_": f"{ENCODERS}.encoders.modules.FrozenOpenCLIPEmbedder",
        "arch": "ViT-H-14",
        "version": "laion2b_s32b_b79k",
        "max_length": length,
        "layer": "penultimate" if spec.penultimate else "last",
    }


def _beside_embedder(parts: Parts, spec: ModelSpec) -> dict[str, Any]:
    """Return what NeMo's embedder has no argument for: sizes, and which weights were never trained."""
    text = {key: value for key, value in spec.cond_stage_config.items() if value is not None and key[0] != "_"}
    depth = clip.depth(parts["text_encoder"])
    if not spec.open_clip:
        unpadded = {} if text.get("pad_to") else {"trained_unpadded": True}
        return text | {"layer": "last", "layers": depth} | unpadded
    if _is_whole(parts):
        return text | {"layers": depth}
    if not spec.penultimate:
        return text | {"layer": "last", "layers": depth, "unused_layer": "zeros"}
    # Layer number `depth`, text_projection and logit_scale hold no trained weights.
    return text | {"layer": "penultimate", "layers": depth + 1, "unused_layer": "zeros"}


def _plain(value: Any) -> Any:
    """Return a value in the types that YAML's safe dumper takes."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def loses(spec: ModelSpec) -> list[str]:
    """Return what other programs do not read; NeMo itself pads the text of every v1 model."""
    pads = spec.open_clip or spec.cond_stage_config.get("pad_to")
    return (
        lost_zero_snr(spec)
        + lost_sampling(replace(spec, trained_betas=None))
        + lost_clip_skip(spec)
        + ([] if pads else ["text without NeMo's three zero vectors (NeMo adds them)"])
    )


FORMAT = Format(
    name="nemo",
    title="NeMo checkpoint",
    key_rules=KEY_RULES,
    whole_keys=r"model\.(model|first_stage_model|_orig_mod|module)\.",
    dialects={"unet": unet_dialect},
    open=open_checkpoint,
    sizes=sizes,
    facts=facts,
    write=export_nemo,
    ending=".nemo",
    keeps_unused_text=True,
    loses=loses,
)
