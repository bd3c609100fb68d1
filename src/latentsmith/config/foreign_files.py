"""Config files of models and tasks beside Stable Diffusion v1 and v2, known by keys that only they have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentsmith.files.errors import BadInput

# What a file is -> keys (or `key=value`) of which any one proves it. The first kind that matches is named.
KINDS = {
    "a file for export, quantization or TensorRT, which is not supported; `latentsmith convert` writes diffusers and "
    "single files, which exporters read": (
        "trt", "trt_export", "onnx_export", "quantize", "unet_xl", "num_warmup_runs",
    ),
    "an SDXL file, which is not supported; Stable Diffusion v1 and v2 are": (
        "sampling", "use_refiner", "base_model_config", "refiner_config", "model.conditioner_config", "model.is_legacy",
        "model.denoiser_config", "model.network_config", "model.loss_fn_config", "model.disable_first_stage_autocast",
        "model.precache_mode", "model.unet_config.num_classes=sequential",
    ),
    "a ControlNet file, which is not supported; img2img and inpainting take an image": (
        "model.control_stage_config", "model.control_key", "model.only_mid_control", "model.sd_locked",
        "model.guess_mode", "infer.control", "infer.hint_image_size", "infer.control_image_preprocess",
    ),
    "an instruct-pix2pix file, which is not supported; `latentsmith generate --image` changes an image by img2img": (
        "edit", "model.first_stage_key=edited", "model.cond_stage_key=edit", "model.data.validation_drop_last",
        "model.data.dataloader_type",
    ),
    "a file of NeMo's DreamBooth, whose keys are not read; DreamBooth is: start from `train --config sd1_dreambooth` "
    "(docs/finetuning.md)": (
        "model.with_prior_preservation", "model.prior_loss_weight", "model.use_cached_latents",
        "model.train_text_encoder", "model.noise_scheduler", "model.data.instance_dir", "model.data.regularization_dir",
    ),
    "a depth2img file, which is not supported": ("model.depth_stage_config",),
    "an upscaler's file, which is not supported": ("model.low_scale_config", "model.low_scale_key"),
    "an unCLIP file, which is not supported": ("model.embedder_config", "model.noise_aug_config"),
    "an inpainting model's file, which is not supported; `generate --mask` inpaints with any model": (
        "model.finetune_keys", "model.masked_image_key",
    ),
}  # fmt: skip


def refuse_other_models(stated: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """Raise BadInput for a config of another model or task, naming it and the key that tells.

    stated: every given key with its value. origins: the file that gave it.
    """
    given: dict[str, str] = {}
    for key, value in stated.items():
        parts = key.split(".")
        nodes = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        given |= dict.fromkeys([*nodes, f"{key}={value}"], origins.get(key, "config"))
    for kind, tells in KINDS.items():
        if tell := next((tell for tell in tells if tell in given), None):
            raise BadInput(f"{given[tell]}: is {kind} (it has {tell})")
