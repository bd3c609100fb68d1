"""VAE key tables: canonical (LDM) names against diffusers' old and new ones, for an autoencoder of any size."""

import re
from collections.abc import Collection, Iterable

NEW_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_ATTENTION = {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}
ATTENTION = re.compile(r"\.(mid\.attn_1|attn\.\d+)\.(norm|q|k|v|proj_out)\.")


def detect(keys: Collection[str]) -> str:
    """ "ldm", "diffusers" (today's attention names) or "diffusers-old" (query, key, value, proj_attn)."""
    if not any(".mid_block." in key or "_blocks." in key for key in keys):
        return "ldm"
    return "diffusers-old" if any(re.search(r"\.(query|proj_attn)\.", key) for key in keys) else "diffusers"


def rename(names: Iterable[str], dialect: str) -> dict[str, str]:
    """Canonical name -> the same tensor's name in `dialect`, for every name of one VAE."""
    names = list(names)
    if dialect == "ldm":
        return {name: name for name in names}
    levels = 1 + max((int(match[1]) for name in names if (match := re.match(r"decoder\.up\.(\d+)\.", name))), default=0)
    attention = OLD_ATTENTION if dialect == "diffusers-old" else NEW_ATTENTION
    return {name: _to_diffusers(name, levels, attention) for name in names}


def _to_diffusers(name: str, levels: int, attention: dict[str, str]) -> str:
    name = ATTENTION.sub(lambda match: f".{match[1]}.{attention[match[2]]}.", name)
    name = re.sub(r"^(encoder\.down|decoder\.up)\.(\d+)\.", lambda match: _level(match, levels), name)
    name = re.sub(r"\.block\.(\d+)\.", r".resnets.\1.", name)
    name = re.sub(r"_blocks\.(\d+)\.attn\.(\d+)\.", r"_blocks.\1.attentions.\2.", name)
    name = re.sub(r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv.", name)
    name = re.sub(r"\.mid\.block_([12])\.", lambda match: f".mid_block.resnets.{int(match[1]) - 1}.", name)
    name = name.replace(".mid.attn_1.", ".mid_block.attentions.0.")
    return name.replace(".nin_shortcut.", ".conv_shortcut.").replace(".norm_out.", ".conv_norm_out.")


def _level(match: re.Match, levels: int) -> str:
    """LDM counts the decoder's levels by resolution, diffusers in the order they run."""
    index = int(match[2]) if match[1] == "encoder.down" else levels - 1 - int(match[2])
    return f"{match[1]}_blocks.{index}."
