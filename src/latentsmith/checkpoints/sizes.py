"""The sizes of networks: from the shapes of tensors in any dialect, and from the configs that lie beside them."""

import re
from typing import Any

from latentsmith.architectures import SD_VERSIONS
from latentsmith.files.errors import BadInput

from . import clip, diffusers
from .base import PAD_KEY, Checkpoint, Part, Shapes
from .formats import FORMATS, dialect_of

V21_STEP = 110_000  # global_step of the published 2.1, whose attention overflows in half precision
PUBLISHED_HEADS = {"v1": {"num_heads": 8}, "v2": {"num_head_channels": 64}}


def architecture(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Return part -> keywords of its network, from tensor shapes and the folder's or archive's own config.

    Head counts and norm groups are not in the weights: they come from that config, else from Stable Diffusion's values
    where the sizes are Stable Diffusion's. Raises BadInput where neither tells.
    """
    functions = {"unet": _unet, "vae": _vae, "text_encoder": _text}
    return {name: functions[name](part, checkpoint) for name, part in checkpoint.parts.items()}


def context_width(checkpoint: Checkpoint) -> int | None:
    """Return the features of the text embeddings that the U-Net attends to: 768 in v1, 1024 in v2."""
    part = checkpoint.parts.get("unet")
    shapes = _shapes_by_level(part, checkpoint) if part else {}
    return next((shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), None)


def version_of(checkpoint: Checkpoint) -> str | None:
    """Return "v1" or "v2" by the width of the text embeddings; None for any other model."""
    return SD_VERSIONS.get(context_width(checkpoint) or 0)


def _stated(part: Part, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return what configs of any format state of a part; None if there are none."""
    found = [format.sizes(checkpoint, part) for format in FORMATS.values() if format.sizes]
    stated: dict[str, Any] = {}
    for sizes in reversed(found):  # the first format counts most
        stated |= sizes or {}
    return None if all(sizes is None for sizes in found) else stated


def _shapes_by_level(part: Part, checkpoint: Checkpoint) -> Shapes:
    """Return a part's shapes under diffusers' names, whose numbers count levels."""
    from_ldm = {"unet": diffusers.unet_names, "vae": diffusers.vae_names}[part.name]
    names = (dialect_of(part, checkpoint.config).level_names or from_ldm)(part.entries)
    return {name: part.entries[key].shape for key, name in names.items()}


def _counted(shapes: Shapes, pattern: str) -> list[int]:
    """Return for each level how many names match `pattern`, whose groups are level and index; levels rise from 0."""
    counts: dict[int, int] = {}
    for name in shapes:
        if match := re.fullmatch(pattern, name):
            counts[int(match[1])] = max(counts.get(int(match[1]), 0), int(match[2]) + 1)
    return [counts.get(level, 0) for level in range(max(counts, default=-1) + 1)]


def _unet(part: Part, checkpoint: Checkpoint) -> dict[str, Any]:
    shapes = _shapes_by_level(part, checkpoint)
    try:
        resnets = _counted(shapes, r"down_blocks\.(\d+)\.resnets\.(\d+)\.time_emb_proj\.weight")
        depths = _counted(shapes, r"down_blocks\.(\d+)\.attentions\.0\.transformer_blocks\.(\d+)\.attn2\.to_k\.weight")
        middle = _counted(shapes, r"mid_block\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn2\.to_k\.weight")
        deep = [depth or middle[0] for depth in depths + [0] * (len(resnets) - len(depths))]
        widths = [shapes[f"down_blocks.{level}.resnets.0.time_emb_proj.weight"][0] for level in range(len(resnets))]
        channels, inputs = shapes["conv_in.weight"][:2]
        projection = next(shape for name, shape in shapes.items() if name.endswith("proj_in.weight"))
        config: dict[str, Any] = {
            "in_channels": inputs,
            "out_channels": (shapes.get("conv_out.weight") or shapes["out.1.weight"])[0],  # out.1: NeMo's fused name
            "model_channels": channels,
            "channel_mult": [width // channels for width in widths],
            "num_res_blocks": resnets[0] if len(set(resnets)) == 1 else resnets,
            "attention_resolutions": [2**level for level, depth in reversed(list(enumerate(depths))) if depth],
            "transformer_depth": deep[0] if len(set(deep)) == 1 else deep,
            "context_dim": context_width(checkpoint),
            "use_linear_in_transformer": len(projection) == 2,
        }
    except (KeyError, IndexError, ValueError, StopIteration) as error:
        raise BadInput(f"{part.path}: its U-Net lacks the tensors that tell its size ({error})") from None
    stated = _stated(part, checkpoint)
    if stated is not None:
        return config | stated
    version = version_of(checkpoint)
    if config["model_channels"] != 320 or version is None:
        raise BadInput(f"{part.path}: head counts are not in the weights of a U-Net of this size; give its config")
    upcast = version == "v2" and checkpoint.extras.get("global_step") == V21_STEP
    return config | PUBLISHED_HEADS[version] | ({"upcast_attention": True} if upcast else {})


def _vae(part: Part, checkpoint: Checkpoint) -> dict[str, Any]:
    shapes = _shapes_by_level(part, checkpoint)
    try:
        blocks = _counted(shapes, r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.conv2\.weight")
        widths = [shapes[f"encoder.down_blocks.{level}.resnets.0.conv2.weight"][0] for level in range(len(blocks))]
        first = shapes["encoder.conv_in.weight"]
        attended = _counted(shapes, r"encoder\.down_blocks\.(\d+)\.attentions\.(\d+)\.group_norm\.weight")
        config = {
            "z_channels": shapes["decoder.conv_in.weight"][1],
            "in_channels": first[1],
            "out_ch": shapes["decoder.conv_out.weight"][0],
            "ch": first[0],
            "ch_mult": [width // first[0] for width in widths],
            "num_res_blocks": blocks[0],
            "attn_resolutions": [256 // 2**level for level, count in enumerate(attended) if count],
            "resolution": 256,
        }
        embed_dim = shapes["post_quant_conv.weight"][1]
    except (KeyError, IndexError) as error:
        raise BadInput(f"{part.path}: its VAE lacks the tensors that tell its size ({error})") from None
    return {"embed_dim": embed_dim, "ddconfig": {**config, "num_groups": 32, **(_stated(part, checkpoint) or {})}}


def _text(part: Part, checkpoint: Checkpoint) -> dict[str, Any]:
    config = clip.sizes_of_weights(part, dialect_of(part, checkpoint.config))
    config |= {"pad_to": int(checkpoint.metadata[PAD_KEY])} if PAD_KEY in checkpoint.metadata else {}
    config |= _stated(part, checkpoint) or {}
    if not {"heads", "activation"} <= config.keys():
        raise BadInput(f"{part.path}: heads and activation are not in a text encoder's weights; give its config")
    return config
