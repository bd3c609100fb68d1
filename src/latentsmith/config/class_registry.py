"""The one table of `_target_` paths: NeMo's, LDM's and ours. A path that is not in it is never imported."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from latentsmith.architectures import COMPONENTS
from latentsmith.files.errors import BadInput

UNET, VAE, TEXT = (COMPONENTS[part].class_path for part in ("unet", "vae", "text_encoder"))
LOSS = "latentsmith.training.losses.ReconstructionLoss"
IDENTITY = "torch.nn.Identity"

_NEMO = "nemo.collections.multimodal."
_NEMO_VAE = _NEMO + "models.text_to_image.stable_diffusion.ldm.autoencoder."
_NEMO_TEXT = _NEMO + "modules.stable_diffusion.encoders.modules."
_LDM_TEXT = "ldm.modules.encoders.modules."
_CLIP_L = {"arch": "ViT-L-14", "version": "openai/clip-vit-large-patch14"}
_CLIP_H = {"arch": "ViT-H-14", "version": "laion2b_s32b_b79k"}

# path -> (our class, what the path implies where the config says nothing)
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{path: (path, {}) for path in (UNET, VAE, TEXT, LOSS, IDENTITY)},
    "latentsmith.UNetModel": (UNET, {}),
    "latentsmith.AutoencoderKL": (VAE, {}),
    "latentsmith.ClipTextEncoder": (TEXT, {}),
    _NEMO + "modules.stable_diffusion.diffusionmodules.openaimodel.UNetModel": (UNET, {}),
    "ldm.modules.diffusionmodules.openaimodel.UNetModel": (UNET, {}),
    _NEMO_VAE + "AutoencoderKL": (VAE, {}),
    _NEMO_VAE + "AutoencoderKLInferenceWrapper": (VAE, {}),
    "ldm.models.autoencoder.AutoencoderKL": (VAE, {}),
    _NEMO_TEXT + "FrozenCLIPEmbedder": (TEXT, _CLIP_L),
    _LDM_TEXT + "FrozenCLIPEmbedder": (TEXT, _CLIP_L),
    _NEMO_TEXT + "FrozenOpenCLIPEmbedder": (TEXT, _CLIP_H),
    _LDM_TEXT + "FrozenOpenCLIPEmbedder": (TEXT, _CLIP_H),
    _NEMO_TEXT + "FrozenMegatronCLIPEmbedder": (TEXT, {}),  # its .nemo decides; here, as wide as context_dim
}


MODELS = ("ldm.models.diffusion.ddpm.LatentDiffusion",
          _NEMO + "models.text_to_image.stable_diffusion.ldm.ddpm.MegatronLatentDiffusion",
          _NEMO + "models.text_to_image.stable_diffusion.ldm.ddpm.LatentDiffusion")  # fmt: skip
SCHEDULERS = tuple(
    f"ldm.lr_scheduler.{name}"
    for name in ("LambdaLinearScheduler", "LambdaWarmUpCosineScheduler", "LambdaWarmUpCosineScheduler2")
)


EXPECTED = {
    "model.unet_config": (UNET,),
    "model.first_stage_config": (VAE,),
    "model.first_stage_config.lossconfig": (LOSS, IDENTITY),
    "model.cond_stage_config": (TEXT,),
}


def canonical(node: dict[str, Any], key: str) -> dict[str, Any]:
    """Return `node` with our class in `_target_`, and what its old path implies filled in.

    key: of the node, for messages. Raises BadInput for a path outside the table.
    """
    path = node.get("_target_")
    if str(path).endswith("IdentityFirstStage"):
        raise BadInput(f"{key}._target_: {path!r} means diffusion on pixels; here it is on the latents of a VAE")
    if path not in ALIASES:
        allowed = ", ".join((UNET, VAE, TEXT, LOSS, IDENTITY))
        near = get_close_matches(str(path), ALIASES, 1, 0.8)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BadInput(
            f"{key}._target_: {path!r} is not among the classes a config may name: {allowed}, and their names in "
            f"NeMo and LDM{hint}"
        )
    target, implied = ALIASES[path]
    if key in EXPECTED and target not in EXPECTED[key]:
        raise BadInput(f"{key}._target_: {path!r} belongs elsewhere; here it is {' or '.join(EXPECTED[key])}")
    missing = {name: value for name, value in implied.items() if node.get(name) is None}
    return {**node, **missing, "_target_": target}
