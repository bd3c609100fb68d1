"""The CLIP text transformer (Radford et al. 2021, section 2.4) of Stable Diffusion v1 and v2.

Parameter names are those of Hugging Face's CLIPTextModel, for both.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentsmith.architectures import CLIP_SIZES

from .layers import attention, join_heads, split_heads, zero_init


def quick_gelu(hidden: Tensor) -> Tensor:
    """Return x * sigmoid(1.702 x), OpenAI CLIP's activation."""
    return hidden * torch.sigmoid(1.702 * hidden)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class SelfAttention(nn.Module):
    """Multi-head attention, causal in text; padding is not masked."""

    def __init__(self, width: int, heads: int, causal: bool = True):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            split_heads(project(tokens), self.heads) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(join_heads(attention(query, key, value, fused=True, causal=self.causal)))


class MLP(nn.Module):
    def __init__(self, width: int, intermediate_size: int, activation: str):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, intermediate_size), nn.Linear(intermediate_size, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(tokens)))


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, intermediate_size: int, activation: str, causal: bool = True):
        super().__init__()
        self.self_attn = SelfAttention(width, heads, causal)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = MLP(width, intermediate_size, activation)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.self_attn(self.layer_norm1(tokens))
        return tokens + self.mlp(self.layer_norm2(tokens))


class Embeddings(nn.Module):
    def __init__(self, width: int, vocab_size: int, max_length: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(max_length, width)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.token_embedding(token_ids) + self.position_embedding.weight[: token_ids.shape[1]]


class Layers(nn.Module):
    def __init__(self, layers: list[EncoderLayer]):
        super().__init__()
        self.layers = nn.ModuleList(layers)


class TextTransformer(nn.Module):
    def __init__(self, embeddings: Embeddings, encoder: Layers, width: int):
        super().__init__()
        self.embeddings, self.encoder, self.final_layer_norm = embeddings, encoder, nn.LayerNorm(width)

    def forward(self, token_ids: Tensor, skip: int = 0) -> Tensor:
        tokens = self.embeddings(token_ids)
        for layer in list(self.encoder.layers)[: len(self.encoder.layers) - skip]:
            tokens = layer(tokens)
        return self.final_layer_norm(tokens)


class ClipTextEncoder(nn.Module):
    """Token ids to text embeddings: one transformer for v1 (quick_gelu, last layer) and v2 (gelu, penultimate).

    arch: "ViT-L-14" or "ViT-H-14" sets width, layers, heads, intermediate_size and activation; each can also be
    set by itself. layer: "last", or "penultimate", which leaves out the last of `layers` (the final norm follows
    either way); the module holds only the layers that it runs.
    pad_to: output is filled up with zero vectors to this length, which attention then sees: NeMo v2.0.0 trains v1 so,
    with 80. vocab_size, max_length: of the tokenizer. freeze: no gradients and always in evaluation mode.
    """

    def __init__(
        self,
        *,
        arch: str | None = None,
        width: int | None = None,
        layers: int | None = None,
        heads: int | None = None,
        intermediate_size: int | None = None,
        activation: str | None = None,
        vocab_size: int = 49408,
        max_length: int = 77,
        layer: str = "last",
        pad_to: int | None = None,
        freeze: bool = True,
    ):
        super().__init__()
        overrides = dict(
            width=width, layers=layers, heads=heads, intermediate_size=intermediate_size, activation=activation
        )
        sizes = text_sizes(arch, overrides)
        if layer not in ("last", "penultimate"):
            raise ValueError(f'layer is {layer!r}; it can be "last" or "penultimate"')
        if pad_to is not None and pad_to < max_length:
            raise ValueError(f"pad_to is {pad_to}, less than max_length {max_length}")
        depth = sizes.pop("layers") - (layer == "penultimate")
        self.width, self.max_length, self.vocab_size = sizes["width"], max_length, vocab_size
        self.layer, self.pad_to, self.frozen = layer, pad_to, freeze
        self.text_model = TextTransformer(
            Embeddings(self.width, vocab_size, max_length),
            Layers([EncoderLayer(**sizes) for _ in range(depth)]),
            self.width,
        )
        self.reset_parameters()
        if freeze:
            self.requires_grad_(False).eval()

    def reset_parameters(self) -> None:
        """Initialise weights whose output is each token's own embedding.

        Every residual branch starts as the identity, so that a U-Net that learns beside them can tell tokens apart from
        its first step. The rest is CLIP's initialisation (Radford et al. 2021).
        """
        model, layers = self.text_model, cast(list[EncoderLayer], list(self.text_model.encoder.layers))
        nn.init.normal_(model.embeddings.token_embedding.weight)
        nn.init.normal_(model.embeddings.position_embedding.weight, std=0.1)
        for layer in layers:
            for project in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                nn.init.normal_(project.weight, std=self.width**-0.5)
            nn.init.normal_(layer.mlp.fc1.weight, std=(2 * self.width) ** -0.5)
            zero_init(layer.self_attn.out_proj)
            zero_init(layer.mlp.fc2)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def train(self, mode: bool = True) -> "ClipTextEncoder":
        """Set training mode, unless the encoder is frozen."""
        return super().train(mode and not self.frozen)

    def forward(self, token_ids: Tensor, skip: int = 0) -> Tensor:
        """Return text embeddings (batch, length or pad_to, width) of `token_ids` (batch, length), integers.

        skip: layers left out at the end, before the final norm ("clip skip").
        """
        embedded = self.text_model(token_ids, skip)
        return F.pad(embedded, (0, 0, 0, self.pad_to - embedded.shape[1])) if self.pad_to else embedded


def text_sizes(arch: str | None, overrides: dict[str, int | str | None]) -> dict[str, Any]:
    """Return the five sizes of a text transformer; ValueError names what is missing, unknown or does not divide."""
    if arch is not None and arch not in CLIP_SIZES:
        raise ValueError(f"text encoder arch {arch!r} is unknown; choose from {', '.join(CLIP_SIZES)}")
    sizes: dict[str, Any] = asdict(CLIP_SIZES[arch]) if arch else {}
    sizes |= {name: value for name, value in overrides.items() if value is not None}
    if missing := [name for name in overrides if name not in sizes]:
        raise ValueError(f"the text encoder needs {', '.join(missing)}, or an arch ({', '.join(CLIP_SIZES)})")
    if sizes["activation"] not in ACTIVATIONS:
        raise ValueError(f"text encoder activation {sizes['activation']!r} is not one of {', '.join(ACTIVATIONS)}")
    if sizes["width"] % sizes["heads"]:
        raise ValueError(f"text encoder width {sizes['width']} does not divide into {sizes['heads']} heads")
    return sizes
