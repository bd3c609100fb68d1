"""One file in the LDM layout, as web UIs and ComfyUI take it."""

from pathlib import Path

import torch

from latentsmith.files.pickles import LazyTensor
from latentsmith.files.tensors import save_safetensors

from .packing import Parts, Written, lazy, require_whole, schedule_buffers, text_tower
from .spec import SPEC_KEY, ModelSpec


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
    tensors = {f"model.diffusion_model.{name}": lazy(tensor, dtype) for name, tensor in parts["unet"].items()}
    tensors |= {f"first_stage_model.{name}": lazy(tensor, dtype) for name, tensor in parts["vae"].items()}
    text = text_tower(parts["text_encoder"], spec.open_clip, dtype)
    if not spec.open_clip:
        length = parts["text_encoder"]["text_model.embeddings.position_embedding.weight"].shape[0]
        text["transformer.text_model.embeddings.position_ids"] = _position_ids(length)
    tensors |= {f"cond_stage_model.{name}": tensor for name, tensor in text.items()}
    tensors |= schedule_buffers(spec)
    metadata = model_spec(spec, title or Path(out).stem)
    if spec.open_clip and "logit_scale" not in parts["text_encoder"]:
        last = "last layer, " if spec.penultimate else ""
        metadata["latentsmith.omitted"] = f"text encoder's {last}text_projection and logit_scale, which nothing uses"
    save_safetensors(out, tensors, metadata, written=written)


def _position_ids(length: int) -> LazyTensor:
    return lazy(torch.arange(length).unsqueeze(0))


def model_spec(spec: ModelSpec, title: str) -> dict[str, str]:
    """SAI ModelSpec 1.0.0 metadata, and our own spec beside it."""
    architecture = {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2-512"}.get(
        spec.unet_config.get("context_dim") or 0
    )
    if architecture == "stable-diffusion-v2-512" and spec.prediction_type == "v_prediction":
        architecture = "stable-diffusion-v2-768-v"
    pixels = spec.image_size * 2 ** (len(spec.first_stage_config["ddconfig"]["ch_mult"]) - 1)
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture or "stable-diffusion-custom",
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.title": title,
        "modelspec.resolution": f"{pixels}x{pixels}",
        "modelspec.prediction_type": {"v_prediction": "v"}.get(spec.prediction_type, spec.prediction_type),
        SPEC_KEY: spec.to_json(),
        "format": "pt",
    }
