"""Text-encoder key tables: canonical (Hugging Face) names against OpenCLIP's and both of Megatron's.

OpenCLIP and Megatron keep queries, keys and values in one tensor, so a table's right side is a `SourceKey`: a key, and
which third of its rows.
"""

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

THIRDS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class SourceKey:
    """Where a canonical tensor lies in a file. third: rows of q, k or v (0, 1, 2) of a fused tensor.

    heads: rows of the fused tensor run [heads, 3, head_dim] if given, [3, heads, head_dim] if None.
    """

    key: str
    third: int | None = None
    heads: int | None = None


OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "qkv.weight": "attn.in_proj_weight",
    "qkv.bias": "attn.in_proj_bias",
    "text_projection": "text_projection",
    "logit_scale": "logit_scale",
}
MEGATRON = {
    "embeddings.token_embedding.weight": "language_model.embedding.word_embeddings.weight",
    "embeddings.position_embedding.weight": "language_model.embedding.position_embeddings",
    "final_layer_norm": "language_model.encoder.final_layernorm",
    "layers": "language_model.encoder.layers",
    "layer_norm1": "input_layernorm",
    "layer_norm2": "post_attention_layernorm",
    "self_attn.out_proj": "self_attention.dense",
    "mlp.fc1": "mlp.dense_h_to_4h",
    "mlp.fc2": "mlp.dense_4h_to_h",
    "qkv.weight": "self_attention.query_key_value.weight",
    "qkv.bias": "self_attention.query_key_value.bias",
}
MEGATRON_CORE = {
    "embeddings.token_embedding.weight": "embedding.word_embeddings.weight",
    "embeddings.position_embedding.weight": "embedding.position_embeddings.weight",
    "final_layer_norm": "final_layernorm",
    "layers": "decoder.layers",
    "layer_norm1.weight": "self_attention.linear_qkv.layer_norm_weight",
    "layer_norm1.bias": "self_attention.linear_qkv.layer_norm_bias",
    "layer_norm2.weight": "mlp.linear_fc1.layer_norm_weight",
    "layer_norm2.bias": "mlp.linear_fc1.layer_norm_bias",
    "self_attn.out_proj": "self_attention.linear_proj",
    "mlp.fc1": "mlp.linear_fc1",
    "mlp.fc2": "mlp.linear_fc2",
    "qkv.weight": "self_attention.linear_qkv.weight",
    "qkv.bias": "self_attention.linear_qkv.bias",
}
TABLES = {"openclip": OPEN_CLIP, "megatron": MEGATRON, "megatron-core": MEGATRON_CORE}

# Stored beside a text tower and not needed by it, with the reason. The deeper layer rule is `is_ignorable`'s.
IGNORABLE = {
    r"embeddings\.position_ids$": "0..76, always the same",
    r"text_projection(\.weight)?$": "projection to the image space, not used by diffusion",
    r"logit_scale$": "temperature of the contrastive loss",
    r"logit_bias$": "offset of the contrastive loss",
    r"head\.weight$": "Megatron's projection to the image space",
    r"attn_mask$": "the causal mask, always the same",
}  # fmt: skip


def normalise(key: str) -> str:
    """A text tower's key without the wrappers in front of its own names (a text encoder's prefixes already gone)."""
    key = key.removeprefix("model.")
    key = re.sub(r"^transformer\.(?=text_model\.|embeddings\.|encoder\.|final_layer_norm\.)", "", key)
    key = re.sub(r"^text\.(?=transformer\.|token_embedding|positional_embedding|ln_final|text_projection)", "", key)
    return key.removeprefix("text_model.")


def detect(keys: Collection[str]) -> str:
    """ "hf", "openclip", "megatron" or "megatron-core", from normalised keys."""
    if any(key.startswith("language_model.") for key in keys):
        return "megatron"
    if any(key.startswith("decoder.layers.") or ".linear_qkv." in key for key in keys):
        return "megatron-core"
    return "openclip" if any(key.startswith("transformer.resblocks.") for key in keys) else "hf"


def slots(names: Iterable[str], dialect: str, heads: int | None, keys: Collection[str] = ()) -> dict[str, SourceKey]:
    """Canonical name -> its slot. heads: number of attention heads if fused rows are interleaved per head, else None.

    keys: the file's keys, which settle whether Megatron's bare position table is spelt with `.weight`.
    """
    if dialect == "hf":
        return {name: SourceKey(name.removeprefix("text_model.")) for name in names}
    table = dict(TABLES[dialect])
    position = "embeddings.position_embedding.weight"
    for spelling in (table[position].removesuffix(".weight"), table[position].removesuffix(".weight") + ".weight"):
        table[position] = spelling if spelling in keys else table[position]
    return {name: _slot(name.removeprefix("text_model."), table, heads) for name in names}


def _slot(name: str, table: dict[str, str], heads: int | None) -> SourceKey:
    if name in table:
        return SourceKey(table[name])
    layer = re.match(r"encoder\.layers\.(\d+)\.(.+)", name)
    if layer is None:
        return SourceKey(_tail(name, table))
    prefix = f"{table['layers']}.{layer[1]}."
    third = re.match(r"self_attn\.(q_proj|k_proj|v_proj)\.(weight|bias)$", layer[2])
    if third:
        return SourceKey(prefix + table[f"qkv.{third[2]}"], THIRDS.index(third[1]), heads)
    return SourceKey(prefix + _tail(layer[2], table))


def _tail(name: str, table: dict[str, str]) -> str:
    module, _, tensor = name.rpartition(".")
    return table.get(name) or f"{table.get(module, module)}.{tensor}"


def depth(names: Iterable[str]) -> int:
    """How many layers the names (canonical or of any dialect) speak of."""
    layers = (re.search(r"(?:layers|resblocks)\.(\d+)\.", name) for name in names)
    return 1 + max((int(match[1]) for match in layers if match), default=-1)


def ignorable(model_depth: int, file_depth: int) -> Callable[[str], str | None]:
    """Why a key of a text tower may be left unread, or None.

    A tower with exactly one layer more than the model is the full one of a model that stops at the penultimate layer.
    """

    def reason(key: str) -> str | None:
        for pattern, why in IGNORABLE.items():
            if re.match(pattern, key):
                return why
        last = re.search(r"(?:layers|resblocks)\.(\d+)\.", key)
        if last and file_depth == model_depth + 1 and int(last[1]) == model_depth:
            return "the last layer, unused by a penultimate encoder"
        return None

    return reason
