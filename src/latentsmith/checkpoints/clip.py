"""Text encoders: canonical (Hugging Face) names against OpenCLIP's and both of Megatron's.

OpenCLIP and Megatron keep queries, keys and values in one tensor, so a table's right side is a `SourceKey`: a key, and
which third of its rows.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from latentsmith.architectures import CLIP_BY_WIDTH, CLIP_SIZES
from latentsmith.files.errors import BadInput
from latentsmith.files.lazy import LazyTensor

from .base import Dialect, Format, Part, SourceKey, packed

KEY_RULES = (
    ("other", r"(?=(model\.)?(vision_encoder|vision_model|visual|visual_projection)\.)"),  # the image tower
    ("text_encoder", r"(?=(model\.)?(logit_scale|logit_bias|text_projection(\.weight)?)$)"),
    ("text_encoder", r"(?=encoder\.layers\.)"),
    ("text_encoder", r"(?=(model\.)?(text|text_model|transformer|embeddings|final_layer_norm)\.)"),
    ("text_encoder", r"(?=(model\.)?((token_embedding|ln_final)\.|(positional_embedding|attn_mask|position_ids)$))"),
    ("text_encoder", r"(?=(model\.)?(language_model|embedding|decoder\.layers|final_layernorm|head)\.)"),
)
THIRDS = ("q_proj", "k_proj", "v_proj")
POSITIONS = "embeddings.position_embedding.weight"

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
# Stored beside a text tower and not needed by it, with the reason. `ignorable` adds the unused last layer.
IGNORABLE = {
    r"embeddings\.position_ids$": "0..76, always the same",
    r"text_projection(\.weight)?$": "projection to the image space, not used by diffusion",
    r"logit_scale$": "temperature of the contrastive loss",
    r"logit_bias$": "offset of the contrastive loss",
    r"head\.weight$": "Megatron's projection to the image space",
    r"attn_mask$": "the causal mask, always the same",
}  # fmt: skip


def normalise(key: str) -> str:
    """Return a text tower's key without the wrappers in front of its own names (a text encoder's prefix is gone)."""
    key = key.removeprefix("model.")
    key = re.sub(r"^transformer\.(?=text_model\.|embeddings\.|encoder\.|final_layer_norm\.)", "", key)
    key = re.sub(r"^text\.(?=transformer\.|token_embedding|positional_embedding|ln_final|text_projection)", "", key)
    return key.removeprefix("text_model.")


def dialect_of(entries: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> Dialect:
    """Recognise the dialect of normalised keys. config: the checkpoint's, which says how Megatron's q, k, v lie."""
    keys = entries.keys()
    if any(key.startswith("language_model.") for key in keys):
        return _megatron("megatron", MEGATRON, entries, config)
    if any(key.startswith("decoder.layers.") or ".linear_qkv." in key for key in keys):
        return _megatron("megatron-core", MEGATRON_CORE, entries, config)
    return OPEN_CLIP_DIALECT if any(key.startswith("transformer.resblocks.") for key in keys) else HUGGING_FACE


def _megatron(
    title: str, table: Mapping[str, str], entries: Mapping[str, LazyTensor], config: Mapping[str, Any]
) -> Dialect:
    """Return Megatron's dialect for a file, whose bare position table may or may not be spelt with `.weight`."""
    bare = table[POSITIONS].removesuffix(".weight")
    spelling = next((key for key in (bare + ".weight", bare) if key in entries), table[POSITIONS])
    heads = _interleaved_heads(title, entries, config)
    return Dialect("clip", title, partial(_table, {**table, POSITIONS: spelling}, heads))


def _interleaved_heads(title: str, entries: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> int | None:
    """Return the number of heads if fused q, k, v rows are interleaved per head, None if they lie one after the other.

    megatron-core always interleaves; Megatron does where the file's CLIP config says megatron_legacy: false, or says
    nothing, as that is NeMo's default. A file without a CLIP config is taken as NeMo's two shipped configs make it,
    which say true, with a warning. Heads: from that config, else width / 64 as in every CLIP text tower.
    """
    text = text_config(config)
    if title == "megatron" and not text:
        note = "a Megatron CLIP without its config: its q, k, v are read in the layout of megatron_legacy: true"
        warnings.warn(note, stacklevel=2)
    if title == "megatron" and (not text or text.get("megatron_legacy", False)):
        return None
    width = next((entry.shape[-1] for key, entry in entries.items() if key.endswith("word_embeddings.weight")), 0)
    return int(text.get("num_attention_heads") or width // 64)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a CLIP config's `text` section: at the top of a CLIP .nemo, else in cond_stage_config.cfg."""
    for inner in (config, (config.get("cond_stage_config") or {}).get("cfg") or {}):
        if isinstance(text := inner.get("text"), Mapping):
            return text
    return {}


def _table(table: Mapping[str, str], heads: int | None, names: Iterable[str]) -> dict[str, SourceKey]:
    """Return canonical name -> where it lies. heads: as _interleaved_heads returns them."""
    return {name: _source(name.removeprefix("text_model."), table, heads) for name in names}


def _source(name: str, table: Mapping[str, str], heads: int | None) -> SourceKey:
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


def _tail(name: str, table: Mapping[str, str]) -> str:
    module, _, tensor = name.rpartition(".")
    return table.get(name) or f"{table.get(module, module)}.{tensor}"


HUGGING_FACE = Dialect(
    "clip", "hf", lambda names: {name: SourceKey(name.removeprefix("text_model.")) for name in names}
)
OPEN_CLIP_DIALECT = Dialect("clip", "openclip", partial(_table, OPEN_CLIP, None))


def depth(names: Iterable[str]) -> int:
    """Return how many layers the names (canonical or of any dialect) speak of."""
    layers = (re.search(r"(?:layers|resblocks)\.(\d+)\.", name) for name in names)
    return 1 + max((int(match[1]) for match in layers if match), default=-1)


def max_length(tensors: Mapping[str, Tensor | LazyTensor]) -> int:
    """Return how many positions a text encoder has, from its table of them in any dialect; 0 without one."""
    table = re.compile(r"(position_embeddings?|positional_embedding)(\.weight)?$")
    return next((tensor.shape[0] for name, tensor in tensors.items() if table.search(name)), 0)


def ignorable(model_depth: int, file_depth: int) -> Callable[[str], str | None]:
    """Return a function that says why a key of a text tower may be left unread, or None.

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


def sizes_of_weights(part: Part, dialect: Dialect) -> dict[str, Any]:
    """Return the keywords of ClipTextEncoder that the shapes show; heads and activation only for published widths."""
    names = ("embeddings.token_embedding", "embeddings.position_embedding", "encoder.layers.0.mlp.fc1")
    table = dialect.table(f"text_model.{name}.weight" for name in names)
    try:
        tokens, positions, inner = (part.entries[source.key].shape for source in table.values())
    except KeyError as error:
        raise BadInput(f"{part.path}: its text encoder lacks {error}") from None
    layers, width = depth(part.entries), tokens[1]
    sizes: dict[str, Any] = {
        "width": width,
        "layers": layers,
        "intermediate_size": inner[0],
        "vocab_size": tokens[0],
        "max_length": positions[0],
    }
    if published := CLIP_SIZES.get(CLIP_BY_WIDTH.get(width, "")):
        sizes |= {"heads": published.heads, "activation": published.activation}
    if (width, layers) in ((1024, 23), (1024, 24)):  # SD2 reads the last but one of 24 layers
        sizes |= {"layers": 24, "layer": "penultimate"}
    return sizes


def text_tower(
    tensors: Mapping[str, Tensor | LazyTensor], open_clip: bool, dtype: torch.dtype | None, prefix: str
) -> dict[str, LazyTensor]:
    """Return a text encoder as LDM and NeMo hold it below `prefix`: Hugging Face's names, or OpenCLIP's."""
    if open_clip:
        return packed(tensors, OPEN_CLIP_DIALECT, dtype, f"{prefix}model.")
    return {f"{prefix}transformer.{name}": LazyTensor.of(tensor).to(dtype, name) for name, tensor in tensors.items()}


FORMAT = Format(name="clip", title="text encoder", key_rules=KEY_RULES, dialects={"text_encoder": dialect_of})
