"""What weights do not show, and what can be told from them: sizes, heads, prediction type."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from latentsmith.files.errors import BadInput

from . import clip, unet_keys, vae_keys
from .open import OWN_SECTION, WEIGHTS_FILE, Checkpoint, Part, read_json

SPEC_KEY = "latentsmith.spec"  # our own entry in safetensors metadata
PREDICTIONS = {"eps": "epsilon", "epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction",
               "x0": "sample", "sample": "sample"}  # fmt: skip
NULL_TEXT_KEY = "latentsmith.null_text"
BETA_SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear"}  # diffusers' names -> LDM's, which are ours
NEMO_LENGTH = 80  # text embeddings of a caption in NeMo v2.0.0, zeros from the 78th on
V21_STEP = 110_000
V2_STEPS = {875_000: "epsilon", V21_STEP: "v_prediction"}  # global_step of published v2 files: 2-base, 2.1
PAD_KEY = "latentsmith.pad_to"
NEMO_SCHEDULE = ("linear_start", "linear_end", "timesteps", "beta_schedule")
OWN_SCHEDULE = ("zero_terminal_snr", "timestep_spacing", "steps_offset", "set_alpha_to_one")


@dataclass(frozen=True)
class ModelSpec:
    """A whole model but its weights, in the keywords of `UNetModel`, `AutoencoderKL` and `ClipTextEncoder`.

    prediction_type: "epsilon", "v_prediction" or "sample". image_size: side of the latents. The schedule is
    `beta_schedule` (LDM's names) from linear_start to linear_end; zero_terminal_snr rescales it (Lin et al. 2023).
    timestep_spacing, steps_offset, set_alpha_to_one: which timesteps samplers visit, as `diffusion.sampling_schedule`
    takes them; None leaves it to each sampler. Defaults are those that Stable Diffusion is published with.
    """

    unet_config: Mapping[str, Any]
    first_stage_config: Mapping[str, Any]
    cond_stage_config: Mapping[str, Any]
    prediction_type: str
    image_size: int = 64
    scale_factor: float = 0.18215
    linear_start: float = 0.00085
    linear_end: float = 0.012
    timesteps: int = 1000
    zero_terminal_snr: bool = False
    beta_schedule: str = "linear"
    cosine_s: float = 8e-3
    timestep_spacing: str | None = None
    steps_offset: int = 1
    set_alpha_to_one: bool | None = False
    null_text: str = "empty"  # "empty": the empty prompt's embedding; "zero": zeros (text_embedding_dropout_rate)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, default=list)

    @property
    def open_clip(self) -> bool:
        """Whether the text encoder is of OpenCLIP's kind (exact GELU), as in v2."""
        text = self.cond_stage_config
        return (text.get("activation") or {"ViT-H-14": "gelu"}.get(str(text.get("arch")))) == "gelu"

    @property
    def penultimate(self) -> bool:
        """Whether the text encoder stops one layer before its architecture's last."""
        return self.cond_stage_config.get("layer") == "penultimate"


def spec_of(checkpoint: Checkpoint, prediction_type: str | None = None) -> ModelSpec:
    """The spec of a whole model. prediction_type, if given, overrides what the checkpoint says.

    Raises BadInput where the checkpoint lacks a part, or nobody tells its prediction type or head counts.
    """
    if missing := [part for part in ("unet", "vae", "text_encoder") if part not in checkpoint.parts]:
        raise BadInput(f"{checkpoint.path}: no {missing[0]} inside; a whole model was expected")
    if SPEC_KEY in checkpoint.metadata:
        stored = _stored(checkpoint)
        return replace(stored, prediction_type=prediction_type) if prediction_type else stored
    found, source = prediction_of(checkpoint)
    prediction = prediction_type or found
    if prediction is None:
        raise BadInput(
            f"{checkpoint.path}: its weights do not show their prediction type ({source}); "
            "give prediction_type epsilon (as v2-base has) or v_prediction (v2 at 768)"
        )
    configs = architecture(checkpoint)
    extra = _schedule(checkpoint) | _latents(checkpoint, prediction)
    return ModelSpec(configs["unet"], configs["vae"], configs["text_encoder"], prediction, **extra)


def _stored(checkpoint: Checkpoint) -> ModelSpec:
    try:
        return ModelSpec(**json.loads(checkpoint.metadata[SPEC_KEY]))
    except (ValueError, TypeError) as error:
        raise BadInput(
            f"{checkpoint.path}: its metadata {SPEC_KEY} is damaged or newer than this version ({error})"
        ) from None


def architecture(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Part -> constructor keywords, from tensor shapes in any dialect and the folder's or archive's own config.

    Head counts and norm groups are not in the weights: they come from that config, else from Stable Diffusion's values
    where the sizes are Stable Diffusion's. Raises BadInput where neither tells.
    """
    makers = {"unet": _unet, "vae": _vae, "text_encoder": _text}
    return {name: makers[name](part, checkpoint) for name, part in checkpoint.parts.items()}


def prediction_of(checkpoint: Checkpoint) -> tuple[str | None, str]:
    """(prediction type or None, where it was read)."""
    scheduler = read_json(checkpoint.path / "scheduler" / "scheduler_config.json") if checkpoint.path.is_dir() else {}
    if scheduler:
        return PREDICTIONS.get(scheduler.get("prediction_type", "epsilon")), "scheduler_config.json"
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        if checkpoint.metadata.get(key) in PREDICTIONS:
            return PREDICTIONS[checkpoint.metadata[key]], f"metadata {key}"
    if checkpoint.config.get("parameterization") in PREDICTIONS:
        return PREDICTIONS[checkpoint.config["parameterization"]], "the model config's parameterization"
    width = context_width(checkpoint)
    if width == 768:
        return "epsilon", "v1 weights"
    step = checkpoint.extras.get("global_step")
    if width == 1024 and isinstance(step, int) and checkpoint.kind == "ldm":
        return V2_STEPS.get(step), f"global_step {step:,}" + ", which no published file has" * (step not in V2_STEPS)
    return None, "nothing in the file tells"


def context_width(checkpoint: Checkpoint) -> int | None:
    """Features of the text embeddings that the U-Net attends to: 768 in v1, 1024 in v2."""
    part = checkpoint.parts.get("unet")
    keys = [key for key in part.entries if key.endswith("attn2.to_k.weight")] if part else []
    return part.entries[keys[0]].shape[1] if part and keys else None


def _shapes(part: Part, renamed: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    return {theirs: part.entries[ours].shape for ours, theirs in renamed.items()}


def _unet(part: Part, checkpoint: Checkpoint) -> dict[str, Any]:
    # Read in diffusers' names, whose indices speak of levels; NeMo's differ from LDM's only inside modules.
    dialect = unet_keys.detect(part.entries)
    names = (
        {key: key for key in part.entries} if dialect.diffusers else unet_keys.rename(part.entries, unet_keys.DIFFUSERS)
    )
    shapes = _shapes(part, names)
    try:
        resnets = _counted(shapes, r"down_blocks\.(\d+)\.resnets\.(\d+)\.time_emb_proj\.weight")
        depths = _counted(shapes, r"down_blocks\.(\d+)\.attentions\.0\.transformer_blocks\.(\d+)\.attn2\.to_k\.weight")
        widths = [shapes[f"down_blocks.{level}.resnets.0.time_emb_proj.weight"][0] for level in sorted(resnets)]
        channels, inputs = shapes["conv_in.weight"][:2]
        projections = [shape for name, shape in shapes.items() if name.endswith("proj_in.weight")]
        config: dict[str, Any] = {
            "in_channels": inputs,
            "out_channels": (shapes.get("conv_out.weight") or shapes["out.1.weight"])[0],
            "model_channels": channels,
            "channel_mult": [width // channels for width in widths],
            "num_res_blocks": _one_or_list([resnets[level] for level in sorted(resnets)]),
            "attention_resolutions": [2**level for level in sorted(depths, reverse=True)],
            "transformer_depth": max(depths.values()),
            "context_dim": context_width(checkpoint),
            "use_linear_in_transformer": len(projections[0]) == 2,
        }
    except (KeyError, IndexError, ValueError) as error:
        raise BadInput(f"{part.path}: its U-Net lacks the tensors that tell its size ({error})") from None
    return config | _unet_hints(part, checkpoint, config, widths)


def _counted(shapes: Mapping[str, Any], pattern: str) -> dict[int, int]:
    """Level -> how many names match `pattern`, whose groups are level and index."""
    counts: dict[int, int] = {}
    for name in shapes:
        if match := re.fullmatch(pattern, name):
            counts[int(match[1])] = max(counts.get(int(match[1]), 0), int(match[2]) + 1)
    return counts


def _one_or_list(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def _unet_hints(part: Part, checkpoint: Checkpoint, config: Mapping[str, Any], widths: list[int]) -> dict[str, Any]:
    """Heads and norm groups: not in the weights."""
    ours = checkpoint.config.get("unet_config")
    theirs = component_config(part)
    if isinstance(ours, Mapping):
        kept = {key: ours[key] for key in ("num_heads", "num_head_channels", "resblock_gn_groups") if ours.get(key)}
        upcast = ((checkpoint.config.get(OWN_SECTION) or {}).get("unet_config") or {}).get("upcast_attention")
        return {key: value for key, value in kept.items() if value != -1} | _upcast(upcast)
    if theirs:
        heads = _diffusers_heads(part, theirs, widths) | _upcast(theirs.get("upcast_attention"))
        return heads | {"resblock_gn_groups": theirs.get("norm_num_groups", 32)}
    if config["model_channels"] == 320 and config["context_dim"] == 768:
        return {"num_heads": 8}
    if config["model_channels"] == 320 and config["context_dim"] == 1024:
        return {"num_head_channels": 64} | _upcast(checkpoint.extras.get("global_step") == V21_STEP)
    raise BadInput(f"{part.path}: head counts are not in the weights of a U-Net of this size; give its config")


def _upcast(upcast: Any) -> dict[str, bool]:
    return {"upcast_attention": True} if upcast else {}


def _diffusers_heads(part: Part, config: Mapping[str, Any], widths: list[int]) -> dict[str, int]:
    """diffusers' attention_head_dim is really the number of heads, one for all levels or one each."""
    heads = config.get("num_attention_heads") or config.get("attention_head_dim") or 8
    if isinstance(heads, int) or len(set(heads)) == 1:
        return {"num_heads": heads if isinstance(heads, int) else heads[0]}
    channels = {width // count for width, count in zip(widths, heads, strict=False)}
    if len(channels) != 1:
        raise BadInput(f"{part.path}: heads {heads} at widths {widths}: neither one number of heads nor one head size")
    return {"num_head_channels": channels.pop()}


def component_config(part: Part) -> dict[str, Any]:
    """The config.json beside a diffusers component's weights; {} elsewhere."""
    if part.path.is_dir():
        return read_json(part.path / "config.json")
    return read_json(part.path.parent / "config.json") if WEIGHTS_FILE.fullmatch(part.path.name) else {}


def _vae(part: Part, checkpoint: Checkpoint) -> dict[str, Any]:
    diffusers = vae_keys.detect(part.entries) != "ldm"
    names = {key: key for key in part.entries} if diffusers else vae_keys.rename(part.entries, "diffusers")
    shapes = _shapes(part, names)
    try:
        blocks = _counted(shapes, r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.conv2\.weight")
        widths = [shapes[f"encoder.down_blocks.{level}.resnets.0.conv2.weight"][0] for level in sorted(blocks)]
        first = shapes["encoder.conv_in.weight"]
        config = {
            "z_channels": shapes["decoder.conv_in.weight"][1],
            "in_channels": first[1],
            "out_ch": shapes["decoder.conv_out.weight"][0],
            "ch": first[0],
            "ch_mult": [width // first[0] for width in widths],
            "num_res_blocks": blocks[0],
            "attn_resolutions": [],
            "resolution": 256,
        }
        embed_dim = shapes["post_quant_conv.weight"][1]
    except (KeyError, IndexError) as error:
        raise BadInput(f"{part.path}: its VAE lacks the tensors that tell its size ({error})") from None
    attended = sorted(_counted(shapes, r"encoder\.down_blocks\.(\d+)\.attentions\.(\d+)\.group_norm\.weight"))
    config["attn_resolutions"] = [config["resolution"] // 2**level for level in attended]
    ours = (checkpoint.config.get("first_stage_config") or {}).get("ddconfig") or {}
    groups = ours.get("num_groups") or component_config(part).get("norm_num_groups", 32)
    return {"embed_dim": embed_dim, "ddconfig": config | {"num_groups": groups}}


def _text(part: Part, checkpoint: Checkpoint) -> dict[str, Any]:
    entries, dialect = part.entries, clip.detect(part.entries)
    table = clip.slots(
        (f"text_model.{name}.weight" for name in (
            "embeddings.token_embedding", "embeddings.position_embedding", "encoder.layers.0.mlp.fc1")),
        dialect, None, entries,
    )  # fmt: skip
    try:
        tokens, positions, inner = (entries[slot.key].shape for slot in table.values())
    except KeyError as error:
        raise BadInput(f"{part.path}: its text encoder lacks {error}") from None
    layers, width = clip.depth(entries), tokens[1]
    config: dict[str, Any] = {
        "width": width,
        "layers": layers,
        "intermediate_size": inner[0],
        "vocab_size": tokens[0],
        "max_length": positions[0],
    }
    if (width, layers) in ((1024, 23), (1024, 24)):  # SD2 reads the last but one of 24 layers
        config |= {"layers": 24, "layer": "penultimate"}
    stated = stated_text(checkpoint)
    config |= {"pad_to": NEMO_LENGTH} if pads_text(stated) and positions[0] == 77 else {}
    config |= {"pad_to": int(checkpoint.metadata[PAD_KEY])} if PAD_KEY in checkpoint.metadata else {}
    if stated.get("layer") in ("last", "penultimate"):
        config["layer"] = stated["layer"]
    return config | _text_hints(part, width, {**component_config(part), **stated})


def stated_text(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a NeMo model config says of its text encoder, and what we wrote beside it."""
    own = checkpoint.config.get(OWN_SECTION) or {}
    return {**(checkpoint.config.get("cond_stage_config") or {}), **(own.get("cond_stage_config") or {})}


def pads_text(stated: Mapping[str, Any]) -> bool:
    """Whether a NeMo model config's text encoder fills its output with zeros up to 80 vectors, as NeMo v2.0.0's
    FrozenCLIPEmbedder and FrozenMegatronCLIPEmbedder do; a model exported from here says that it was not trained so."""
    embedder = str(stated.get("_target_", "")).rpartition(".")[2]
    return embedder in ("FrozenCLIPEmbedder", "FrozenMegatronCLIPEmbedder") and not stated.get("trained_unpadded")


def reads_as_open_clip(checkpoint: Checkpoint, spec: ModelSpec) -> bool:
    """Whether the model's captions were cleaned and padded as open_clip does: v2 in LDM's or NeMo's own training."""
    if checkpoint.kind == "nemo":
        return str(stated_text(checkpoint).get("_target_", "")).endswith(".FrozenOpenCLIPEmbedder")
    return checkpoint.kind == "ldm" and spec.open_clip


def _text_hints(part: Part, width: int, stated: Mapping[str, Any]) -> dict[str, Any]:
    heads = stated.get("num_attention_heads") or stated.get("heads")
    activation = stated.get("hidden_act") or stated.get("activation")
    heads = heads or {768: 12, 1024: 16}.get(width)
    activation = activation or {768: "quick_gelu", 1024: "gelu"}.get(width)
    if heads is None or activation is None:
        raise BadInput(f"{part.path}: heads and activation are not in a text encoder's weights; give its config")
    return {"heads": heads, "activation": activation}


def _schedule(checkpoint: Checkpoint) -> dict[str, Any]:
    """Noise schedule and null text, from a scheduler config or a NeMo model config."""
    scheduler = read_json(checkpoint.path / "scheduler" / "scheduler_config.json") if checkpoint.path.is_dir() else {}
    renamed = {"beta_start": "linear_start", "beta_end": "linear_end", "num_train_timesteps": "timesteps",
               "rescale_betas_zero_snr": "zero_terminal_snr"}  # fmt: skip
    found = {ours: scheduler[theirs] for theirs, ours in renamed.items() if theirs in scheduler}
    if scheduler:
        theirs = scheduler.get("beta_schedule", "scaled_linear")
        if theirs not in BETA_SCHEDULES:
            raise BadInput(f"{checkpoint.path}: beta_schedule {theirs} in scheduler_config.json is not supported")
        found["beta_schedule"] = BETA_SCHEDULES[theirs]
        found["timestep_spacing"] = scheduler.get("timestep_spacing")
        found["steps_offset"] = scheduler.get("steps_offset", 0)
        found["set_alpha_to_one"] = scheduler.get("set_alpha_to_one")
    if null_text := checkpoint.metadata.get(NULL_TEXT_KEY):
        found["null_text"] = null_text
    config = checkpoint.config
    if config.get("text_embedding_dropout_rate"):  # NeMo trains on zeroed embeddings
        found["null_text"] = "zero"
    stated = {**config, **(config.get(OWN_SECTION) or {})}
    return found | {key: stated[key] for key in (*NEMO_SCHEDULE, *OWN_SCHEDULE) if key in stated}


def _latents(checkpoint: Checkpoint, prediction: str) -> dict[str, Any]:
    """Side and scale of the latents: configs say, else 96 for v2 at 768 and 64 for all others."""
    unet, vae = (component_config(checkpoint.parts[name]) for name in ("unet", "vae"))
    v768 = prediction == "v_prediction" and context_width(checkpoint) == 1024
    size = checkpoint.config.get("image_size") or unet.get("sample_size") or (96 if v768 else 64)
    scale = checkpoint.config.get("scale_factor") or vae.get("scaling_factor") or 0.18215
    return {"image_size": size, "scale_factor": scale}
