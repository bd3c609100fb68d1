"""Facts of the published models that several packages need, each stated once. Imports nothing heavy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ClipSizes:
    """Sizes of a CLIP text transformer, as cond_stage_config names them."""

    width: int
    layers: int
    heads: int
    intermediate_size: int
    activation: str


CLIP_SIZES = {
    "ViT-L-14": ClipSizes(768, 12, 12, 3072, "quick_gelu"),  # OpenAI's, in Stable Diffusion v1
    "ViT-H-14": ClipSizes(1024, 24, 16, 4096, "gelu"),  # OpenCLIP's, in v2
}
CLIP_BY_WIDTH = {sizes.width: arch for arch, sizes in CLIP_SIZES.items()}  # features of a text embedding -> arch


def is_open_clip(arch: str | None, activation: str | None) -> bool:
    """Return whether a text encoder is one of OpenCLIP's (exact GELU), as in v2. activation: overrides arch's."""
    published = CLIP_SIZES.get(arch or "")
    return (activation or (published.activation if published else None)) == "gelu"


SD_VERSIONS = {768: "v1", 1024: "v2"}  # by the U-Net's context_dim
UNET_INPUTS = {  # purpose of a U-Net, by its input channels where they are not 4
    9: "an inpainting model",
    8: "an instruct-pix2pix model",
    5: "a depth model",
    7: "an upscaler",
}


@dataclass(frozen=True)
class Component:
    """One of the networks that a model is made of.

    config_key: its node below `model`. class_path: its class. folder: its folder in a diffusers checkpoint.
    title: what messages call it.
    """

    config_key: str
    class_path: str
    folder: str
    title: str


COMPONENTS = {
    "unet": Component("unet_config", "latentsmith.models.UNetModel", "unet", "the U-Net"),
    "vae": Component("first_stage_config", "latentsmith.models.AutoencoderKL", "vae", "the VAE"),
    "text_encoder": Component(
        "cond_stage_config", "latentsmith.models.ClipTextEncoder", "text_encoder", "the text encoder"
    ),
}
