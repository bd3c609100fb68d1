"""CLIP whole: an image tower beside the text tower, both projected into one space (Radford et al. 2021, section 2.4).

Parameter names are those of Hugging Face's CLIPModel. The image tower is a vision transformer (Dosovitskiy et al. 2021)
with a normalisation before its first layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .text_encoder import Embeddings, EncoderLayer, Layers, TextTransformer


@dataclass(frozen=True)
class TowerSizes:
    """Sizes of one transformer of CLIP."""

    width: int
    layers: int
    heads: int
    intermediate_size: int

    def encoder(self, activation: str, causal: bool) -> Layers:
        return Layers(
            [EncoderLayer(self.width, self.heads, self.intermediate_size, activation, causal)
             for _ in range(self.layers)]
        )  # fmt: skip


class ImageEmbeddings(nn.Module):
    """Cut an image into patches and put the class token in front."""

    def __init__(self, width: int, patch_size: int, image_size: int):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.patch_embedding = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.position_embedding = nn.Embedding((image_size // patch_size) ** 2 + 1, width)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)  # (batch, patches, width)
        first = self.class_embedding.expand(len(images), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class ImageTransformer(nn.Module):
    def __init__(self, sizes: TowerSizes, activation: str, patch_size: int, image_size: int):
        super().__init__()
        self.embeddings = ImageEmbeddings(sizes.width, patch_size, image_size)
        self.pre_layrnorm = nn.LayerNorm(sizes.width)  # spelt so in every published file
        self.encoder = sizes.encoder(activation, causal=False)
        self.post_layernorm = nn.LayerNorm(sizes.width)

    def forward(self, images: Tensor) -> Tensor:
        """Return the class token's output (batch, width) of images (batch, 3, image_size, image_size)."""
        tokens = self.pre_layrnorm(self.embeddings(images))
        for layer in self.encoder.layers:
            tokens = layer(tokens)
        return self.post_layernorm(tokens[:, 0])


class Clip(nn.Module):
    """Images and texts to embeddings of one space.

    image, text: sizes of the towers. embed_dim: of the embeddings. activation: "quick_gelu" or "gelu", of both towers.
    """

    def __init__(
        self,
        image: TowerSizes,
        text: TowerSizes,
        *,
        embed_dim: int,
        activation: str,
        patch_size: int,
        image_size: int,
        vocab_size: int = 49408,
        max_length: int = 77,
    ):
        super().__init__()
        self.image_size, self.activation, self.max_length = image_size, activation, max_length
        self.vision_model = ImageTransformer(image, activation, patch_size, image_size)
        embeddings = Embeddings(text.width, vocab_size, max_length)
        self.text_model = TextTransformer(embeddings, text.encoder(activation, causal=True), text.width)
        self.visual_projection = nn.Linear(image.width, embed_dim, bias=False)
        self.text_projection = nn.Linear(text.width, embed_dim, bias=False)
        self.requires_grad_(False).eval()

    def encode_images(self, images: Tensor) -> Tensor:
        """Return embeddings of length 1, (batch, embed_dim), of images normalised with CLIP's mean and deviation."""
        return F.normalize(self.visual_projection(self.vision_model(images)), dim=-1)

    def encode_texts(self, token_ids: Tensor, end_id: int) -> Tensor:
        """Return embeddings of length 1, (batch, embed_dim), read at the first end token of each row of token ids."""
        ends = (token_ids == end_id).int().argmax(dim=1)
        tokens = self.text_model(token_ids)
        return F.normalize(self.text_projection(tokens[torch.arange(len(tokens)), ends]), dim=-1)
