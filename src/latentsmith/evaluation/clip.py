"""Read a whole CLIP, Hugging Face's or OpenCLIP's, with the tokenizer that goes with it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentsmith.checkpoints.clip import OPEN_CLIP_DIALECT, THIRDS
from latentsmith.files.errors import BadInput
from latentsmith.files.hub import local_or_hub
from latentsmith.files.json import read_json
from latentsmith.models.clip import Clip, TowerSizes
from latentsmith.text.tokenizer import Tokenizer

from .weights import fill, named_file, read_weights

FILES = ("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")
CONFIGS = ("config.json", "open_clip_config.json")
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's images
HEADS_16 = (1280, 1664)  # widths of image towers with 16 heads (ViT-H-14, ViT-bigG-14); others have width / 64
UNUSED = r"(logit_scale|logit_bias|attn_mask|.*position_ids)$"
OPEN_CLIP_IMAGES = {  # beside what both towers name alike
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
}
OPEN_CLIP_TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}


def load_clip(source: str) -> tuple[Clip, Tokenizer]:
    """Return the model at a path (a file or a folder) or hub name, in float32. Raises BadInput for anything else.

    The activation is the config's beside the file; without one it is quick_gelu under Hugging Face's names, as OpenAI
    trained, and gelu under OpenCLIP's.
    """
    path = named_file(local_or_hub(source), FILES)
    tensors = read_weights(path)
    open_clip = any(name.startswith("visual.") for name in tensors)
    if not open_clip and not any(name.startswith("vision_model.") for name in tensors):
        raise BadInput(f"{path}: holds no CLIP with an image tower; name Hugging Face's CLIPModel or an OpenCLIP file")
    config = config_beside(path)
    model = Clip(**sizes_of(path, tensors, open_clip), activation=activation_of(config, open_clip))
    fill(model, hugging_face_names(tensors, model) if open_clip else tensors, path, UNUSED)
    cleaning: Any = "open_clip" if open_clip else "transformers"
    return model, Tokenizer.find(checkpoint=path.parent, max_length=model.max_length, cleaning=cleaning)


def config_beside(path: Path) -> dict[str, Any]:
    found = next((file for name in CONFIGS if (file := path.parent / name).is_file()), None)
    return read_json(found, "the config of a CLIP model") if found else {}


def activation_of(config: Mapping[str, Any], open_clip: bool) -> str:
    """Return quick_gelu or gelu: see `load_clip`."""
    stated = (config.get("vision_config") or {}).get("hidden_act")
    if "model_cfg" in config:
        stated = "quick_gelu" if config["model_cfg"].get("quick_gelu") else "gelu"
    return str(stated or ("gelu" if open_clip else "quick_gelu"))


def sizes_of(path: Path, tensors: Mapping[str, Tensor], open_clip: bool) -> dict[str, Any]:
    """Return the keywords of Clip, but for the activation, that the shapes show."""
    inner = "mlp.fc1.weight", "mlp.c_fc.weight"
    names = {
        "patch": ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
        "positions": ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
        "image_inner": (f"vision_model.encoder.layers.0.{inner[0]}", f"visual.transformer.resblocks.0.{inner[1]}"),
        "tokens": ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
        "text_positions": ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
        "text_inner": (f"text_model.encoder.layers.0.{inner[0]}", f"transformer.resblocks.0.{inner[1]}"),
        "projection": ("text_projection.weight", "text_projection"),
    }  # fmt: skip
    try:
        shapes = {part: tensors[both[open_clip]].shape for part, both in names.items()}
    except KeyError as error:
        raise BadInput(f"{path}: {error} is missing; a whole CLIP model was expected") from None
    width, text_width, patch_size = shapes["patch"][0], shapes["tokens"][1], shapes["patch"][2]
    side = round((shapes["positions"][0] - 1) ** 0.5)
    towers = ("visual.transformer.resblocks", "transformer.resblocks") if open_clip else (
        "vision_model.encoder.layers", "text_model.encoder.layers")  # fmt: skip
    image_layers, text_layers = (layers_below(tensors, tower) for tower in towers)
    heads = 16 if width in HEADS_16 else max(1, width // 64)
    return {
        "image": TowerSizes(width, image_layers, heads, shapes["image_inner"][0]),
        "text": TowerSizes(text_width, text_layers, max(1, text_width // 64), shapes["text_inner"][0]),
        "embed_dim": shapes["projection"][1 if open_clip else 0],
        "patch_size": patch_size,
        "image_size": patch_size * side,
        "vocab_size": shapes["tokens"][0],
        "max_length": shapes["text_positions"][0],
    }


def layers_below(tensors: Mapping[str, Tensor], prefix: str) -> int:
    found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in tensors)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def hugging_face_names(tensors: Mapping[str, Tensor], model: Clip) -> dict[str, Tensor]:
    """Return OpenCLIP's tensors under the model's names; what has none is kept, so that `fill` names it."""
    left, found = dict(tensors), {}
    packed = set()
    for name in model.state_dict():
        if theirs := OPEN_CLIP_TRANSPOSED.get(name):
            if theirs in left:
                found[name] = left.pop(theirs).t()
            continue
        key, third = open_clip_key(name)
        if third is not None and key in left:
            found[name] = left[key].chunk(3)[third]
            packed.add(key)
        elif key in left:
            found[name] = left.pop(key)
    return found | {key: tensor for key, tensor in left.items() if key not in packed}


def open_clip_key(name: str) -> tuple[str, int | None]:
    """Return where OpenCLIP keeps a tensor, and which third of its rows (None for all)."""
    if name in OPEN_CLIP_IMAGES:
        return OPEN_CLIP_IMAGES[name], None
    prefix = "visual." if name.startswith("vision_model.") else ""
    canonical = re.sub(r"^vision_model\.", "text_model.", name)
    source = OPEN_CLIP_DIALECT.table([canonical])[canonical]
    assert source.third is None or THIRDS[source.third] in name
    return prefix + source.key, source.third


def normalised(pixels: Tensor) -> Tensor:
    """Return images (batch, 3, height, width), 0 to 255, with CLIP's mean and deviation taken out."""
    mean, deviation = (torch.tensor(each, device=pixels.device).reshape(3, 1, 1) for each in (MEAN, DEVIATION))
    return (pixels / 255 - mean) / deviation
