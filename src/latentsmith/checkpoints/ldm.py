"""LDM's layout: one file, as CompVis and Stability published it and web UIs and ComfyUI take it.

Its names of U-Net and VAE are the canonical ones. Text encoders have Hugging Face's names in v1, OpenCLIP's in v2.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from latentsmith.architectures import SD_VERSIONS
from latentsmith.files.errors import BadInput
from latentsmith.files.lazy import LazyTensor
from latentsmith.files.tensors import open_tensors, save_safetensors

from . import clip
from .base import (
    BETAS_KEY,
    SCALE_FACTOR_KEY,
    SPEC_KEY,
    Checkpoint,
    Contents,
    Dialect,
    Format,
    ModelSpec,
    Parts,
    Written,
    known_prediction,
    lost_clip_skip,
    lost_padding,
    lost_sampling,
    lost_zero_snr,
    packed,
    renamed,
    require_whole,
    some,
)

BUFFERS = (
    "betas|alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod|"
    "log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod|posterior_variance|"
    "posterior_log_variance_clipped|posterior_mean_coef1|posterior_mean_coef2|logvar|scale_factor|lvlb_weights"
)
KEY_RULES = (
    ("ema", r"model_ema\."),
    ("other", r"(?=(model\.)?first_stage_model\.model_ema\.)"),  # averages of the VAE's own training
    ("unet", r"(model\.){0,2}diffusion_model\."),
    ("vae", r"(model\.)?first_stage_model\."),
    ("text_encoder", r"(model\.)?cond_stage_model\."),
    ("schedule", r"(?=(v_pred|ztsnr)$)"),  # empty tensors, which ComfyUI and web UIs obey
    ("schedule", rf"(model\.)?(?=({BUFFERS})$)"),
    ("other", r"(?=(control_model|embedding_manager|loss|discriminator)\.)"),  # extras of other trainings
    ("unet", r"(?=(input_blocks|middle_block|output_blocks|time_embed|out)\.)"),
    ("vae", r"(?=(encoder|decoder)\.(conv_in|conv_out|down|up|mid|norm_out)\.|(quant_conv|post_quant_conv)\.)"),
)
WORDS = re.compile(  # of the U-Net's keys, LDM's and NeMo's
    r"input_blocks|output_blocks|middle_block|time_embed|in_layers|emb_layers|out_layers|skip_connection|"
    r"transformer_blocks|proj_in|proj_out|proj|to_out|to_q|to_k|to_v|attn[12]|norm[123]?|ff|net|LN|conv|op|out|"
    r"weight|bias|\d+"
)
DIALECT = Dialect("ldm", "LDM", lambda names: renamed({name: name for name in names}))


def open_ldm(path: Path, weights: str) -> Contents | None:
    """Open a single file of tensors, whatever its keys."""
    return Contents({None: open_tensors(path)})


def averaged_unet(
    path: Path, averages: Mapping[str, LazyTensor], unet: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """Return the moving averages under the names of the U-Net's raw tensors.

    averages: keys without `model_ema.`. unet: {} where the file holds the averages alone, whose names are then put
    together again. Raises BadInput unless the two match one to one.
    """
    if not unet:
        return {_undotted(path, key): entry for key, entry in averages.items() if key not in ("decay", "num_updates")}
    twins = {key: ema_key(key) for key in unet}
    if missing := [key for key, twin in twins.items() if twin not in averages]:
        raise BadInput(
            f"{path}: no moving average of {len(missing)} U-Net tensors ({some(missing)}); take its raw weights"
        )
    if extra := sorted(set(averages) - set(twins.values()) - {"decay", "num_updates"}):
        raise BadInput(f"{path}: moving averages of no known tensor ({some(extra)}); take its raw weights")
    return {key: averages[twin] for key, twin in twins.items()}


def ema_key(key: str) -> str:
    """Return LDM's name of a U-Net tensor's moving average: its dots are deleted."""
    return f"diffusion_model.{key}".replace(".", "")


def _undotted(path: Path, twin: str) -> str:
    """Return the key whose `ema_key` is `twin`, by the words that a U-Net's keys are made of.

    In `input_blocks.N.M` only N can have two digits. Raises BadInput for what is no key of a U-Net.
    """
    rest = re.sub(r"^((?:in|out)put_blocks)(\d+)(\d)", r"\1 \2 \3", twin.removeprefix("diffusion_model"))
    key = ".".join(WORDS.findall(rest))
    if ema_key(key) != twin:
        raise BadInput(f"{path}: the moving average {twin} is of no known tensor; take its raw weights")
    return key


def facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what ModelSpec metadata (SAI's, 1.0.0) and the empty tensors v_pred and ztsnr state."""
    found: dict[str, Any] = {"zero_terminal_snr": True} if "ztsnr" in checkpoint.ignored else {}
    found["scale_factor"] = checkpoint.extras.get(SCALE_FACTOR_KEY)
    if not checkpoint.config:  # which has the schedule's own keys: the same in fewer numbers
        found["trained_betas"] = checkpoint.extras.get(BETAS_KEY)
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        if stated := checkpoint.metadata.get(key):
            prediction = known_prediction(stated)
            return found | {"prediction": (prediction, f"metadata {key}{'' if prediction else f' is {stated!r}'}")}
    return found | ({"prediction": ("v_prediction", "key v_pred")} if "v_pred" in checkpoint.ignored else {})


def export_ldm(
    parts: Parts, out: str | Path, spec: ModelSpec, *, dtype: torch.dtype | None = None, title: str = "",
    written: Written | None = None,
) -> None:  # fmt: skip
    """Write `out` (.safetensors): v1's key set, or v2's with an OpenCLIP text tower, by `spec.open_clip`.

    parts: "unet", "vae", "text_encoder" in canonical names, tensors or lazy ones; streamed. dtype: of every
    floating-point weight; None keeps each. What nothing uses of a v2 encoder (`unused_text`) is written where `parts`
    hold it; where they do not, the metadata says so.
    """
    require_whole(parts)
    tensors = packed(parts["unet"], DIALECT, dtype, "model.diffusion_model.")
    tensors |= packed(parts["vae"], DIALECT, dtype, "first_stage_model.")
    tensors |= clip.text_tower(parts["text_encoder"], spec.open_clip, dtype, "cond_stage_model.")
    if not spec.open_clip:
        ids = LazyTensor.of(torch.arange(clip.max_length(parts["text_encoder"])).unsqueeze(0))
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = ids
    tensors |= schedule_buffers(spec)
    metadata = model_spec(spec, title or Path(out).stem)
    if spec.open_clip and "logit_scale" not in parts["text_encoder"]:
        last = "last layer, " if spec.penultimate else ""
        metadata["latentsmith.omitted"] = f"text encoder's {last}text_projection and logit_scale, which nothing uses"
    save_safetensors(out, tensors, metadata, written=written)


def schedule_buffers(spec: ModelSpec) -> dict[str, LazyTensor]:
    """Return the twelve float32 tables that LDM and NeMo store, computed in float64 (Ho et al. 2020, eq. 4 to 7)."""
    powers = {"linear": 2, "sqrt_linear": 1}
    if spec.beta_schedule not in powers:
        raise BadInput(
            f"beta_schedule {spec.beta_schedule}: only {' and '.join(powers)} can be written to other formats"
        )
    power, steps = powers[spec.beta_schedule], spec.timesteps
    ends = spec.linear_start ** (1 / power), spec.linear_end ** (1 / power)
    betas = torch.linspace(*ends, steps, dtype=torch.float64) ** power
    if spec.trained_betas is not None:
        betas = torch.tensor(list(spec.trained_betas), dtype=torch.float64)
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    variance = betas * (1 - previous) / (1 - alphas_cumprod)
    tables = {
        "betas": betas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas_cumprod).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alphas_cumprod).log(),
        "sqrt_recip_alphas_cumprod": (1 / alphas_cumprod).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alphas_cumprod - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * previous.sqrt() / (1 - alphas_cumprod),
        "posterior_mean_coef2": (1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod),
    }
    return {name: LazyTensor.of(table.float()) for name, table in tables.items()}


def model_spec(spec: ModelSpec, title: str) -> dict[str, str]:
    """Return SAI ModelSpec 1.0.0 metadata, and our own spec beside it."""
    version = SD_VERSIONS.get(spec.unet_config.get("context_dim") or 0)
    v2 = "stable-diffusion-v2-768-v" if spec.prediction_type == "v_prediction" else "stable-diffusion-v2-512"
    architecture = {"v1": "stable-diffusion-v1", "v2": v2}.get(version or "", "stable-diffusion-custom")
    pixels = spec.image_size * 2 ** (len(spec.first_stage_config["ddconfig"]["ch_mult"]) - 1)
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.title": title,
        "modelspec.resolution": f"{pixels}x{pixels}",
        "modelspec.prediction_type": {"v_prediction": "v"}.get(spec.prediction_type, spec.prediction_type),
        SPEC_KEY: spec.to_json(),
        "format": "pt",
    }


FORMAT = Format(
    name="ldm",
    title="LDM file",
    key_rules=KEY_RULES,
    whole_keys=r"(model|first_stage_model|cond_stage_model)\.",
    dialects={"unet": lambda entries, config: DIALECT, "vae": lambda entries, config: DIALECT},
    open=open_ldm,
    facts=facts,
    write=export_ldm,
    ending=".safetensors",
    keeps_unused_text=True,
    loses=lambda spec: lost_zero_snr(spec) + lost_sampling(spec) + lost_clip_skip(spec) + lost_padding(spec),
)
