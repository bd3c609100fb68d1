"""Which part of a model a key belongs to: every key of every file goes into exactly one bucket.

The rules speak of whole-model prefixes first and of bare component files last; wrappers that torch.compile and Megatron
put into paths are dropped beforehand.
"""

import re

PARTS = ("unet", "vae", "text_encoder")
SCHEDULE = (
    "betas|alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod|"
    "log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod|posterior_variance|"
    "posterior_log_variance_clipped|posterior_mean_coef1|posterior_mean_coef2|logvar|scale_factor|lvlb_weights"
)
WRAPPERS = {"_orig_mod", "module"}  # torch.compile; Megatron's half-precision and data-parallel wrappers

# (bucket, pattern); the match is what is cut off. First match wins.
RULES = [
    ("ema", r"model_ema\."),
    ("unet", r"(model\.){0,2}diffusion_model\.|(model\.)?unet\."),
    ("vae", r"(model\.)?(first_stage_model|vae)\."),
    ("schedule", rf"(model\.)?(?=({SCHEDULE})$)|(model\.)?noise_scheduler\."),
    ("other", r"(?=(model\.)?(vision_encoder|vision_model|visual|visual_projection)\.)"),  # CLIP's image tower
    ("other", r"(?=(control_model|embedding_manager|loss|discriminator)\.)"),  # extras of other trainings
    ("text_encoder", r"(model\.)?(cond_stage_model|text_encoder)\."),
    ("text_encoder", r"(?=(model\.)?(logit_scale|logit_bias|text_projection(\.weight)?)$)"),
    ("unet", r"(?=(input_blocks|middle_block|output_blocks|time_embed|out)\.)"),
    ("unet", r"(?=(down_blocks|mid_block|up_blocks|time_embedding|conv_in|conv_out|conv_norm_out)\.)"),
    ("text_encoder", r"(?=encoder\.layers\.)"),
    ("vae", r"(?=(encoder|decoder)\.(conv_in|conv_out|down|up|mid|norm_out)\.)"),
    ("vae", r"(?=(encoder|decoder)\.(down_blocks|up_blocks|mid_block|conv_norm_out)\.)"),
    ("vae", r"(?=(quant_conv|post_quant_conv)\.)"),
    ("text_encoder", r"(?=(model\.)?(text|text_model|transformer|embeddings|final_layer_norm)\.)"),
    ("text_encoder", r"(?=(model\.)?((token_embedding|ln_final)\.|(positional_embedding|attn_mask|position_ids)$))"),
    ("text_encoder", r"(?=(model\.)?(language_model|embedding|decoder\.layers|final_layernorm|head)\.)"),
]  # fmt: skip
COMPILED = [(bucket, re.compile(pattern)) for bucket, pattern in RULES]


def bucket(key: str) -> tuple[str, str]:
    """(bucket, key without prefixes). Buckets: "unet", "vae", "text_encoder", "ema", "schedule", "other", "unknown"."""
    if "_extra_state" in key:  # Transformer Engine's fp8 scales
        return "other", key
    path = ".".join(step for step in key.split(".") if step not in WRAPPERS)
    for name, pattern in COMPILED:
        if match := pattern.match(path):
            return name, path[match.end() :]
    return "unknown", path


def ema_key(key: str) -> str:
    """LDM's name of a U-Net tensor's moving average, without `model_ema.`: dots deleted (never to be parsed back)."""
    return f"diffusion_model.{key}".replace(".", "")
