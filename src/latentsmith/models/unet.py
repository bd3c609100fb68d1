"""The U-Net that predicts the noise in latents from the timestep and the text (Rombach et al. 2022, section 3.3).

Parameter names are LDM's, so a Stable Diffusion file loads as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import AttentionBlock, SpatialTransformer
from .layers import group_norm, timestep_embedding, zero_init


class ResBlock(nn.Module):
    """Two convolutions with the timestep embedding added between them, beside a skip connection."""

    def __init__(self, channels: int, out_channels: int, emb_channels: int, dropout: float, groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            group_norm(channels, groups, eps=1e-5),
            nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            group_norm(out_channels, groups, eps=1e-5),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, hidden: Tensor, emb: Tensor) -> Tensor:
        inner = self.in_layers(hidden) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(hidden) + self.out_layers(inner)


class Downsample(nn.Module):
    """Half the height and width by a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.op(hidden)


class Upsample(nn.Module):
    """Nearest neighbours up to `size` (height, width), about twice its input's, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(hidden, size, mode="nearest"))


class UNetBlock(nn.Sequential):
    """Layers in a row, each given the inputs of its class: timestep embedding, text, or the size to grow to."""

    use_checkpoint = False

    def forward(  # type: ignore[override]
        self, hidden: Tensor, emb: Tensor, context: Tensor | None, size: tuple[int, int] | None = None
    ) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                hidden = self.run(layer, hidden, emb)
            elif isinstance(layer, SpatialTransformer):
                hidden = self.run(layer, hidden, context)
            elif isinstance(layer, AttentionBlock):
                hidden = self.run(layer, hidden)
            elif isinstance(layer, Upsample):
                hidden = layer(hidden, size)
            else:
                hidden = layer(hidden)
        return hidden

    def run(self, layer: nn.Module, *inputs: Any) -> Tensor:
        """Return `layer(*inputs)`, its activations recomputed in the backward pass if `use_checkpoint`."""
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


@dataclass(frozen=True, kw_only=True)
class Levels:
    """Sizes of the levels of a U-Net. Lists have an entry for each level, the finest first.

    widths: channels. num_res_blocks, transformer_depth: residual blocks, and transformer blocks in each attention.
    The rest as in UNetModel.
    """

    widths: list[int]
    num_res_blocks: list[int]
    transformer_depth: list[int]
    attention_resolutions: Sequence[int]
    emb_channels: int
    num_heads: int
    num_head_channels: int
    context_dim: int | None
    use_linear: bool
    fused: bool
    upcast: bool
    dropout: float
    groups: int

    def residual(self, channels: int, width: int) -> ResBlock:
        return ResBlock(channels, width, self.emb_channels, self.dropout, self.groups)

    def attend(self, level: int) -> nn.Module:
        width, depth = self.widths[level], self.transformer_depth[level]
        heads = head_count(width, self.num_heads, self.num_head_channels)
        if self.context_dim is None:
            return AttentionBlock(width, heads, self.fused)
        return SpatialTransformer(
            width, heads, depth, self.context_dim, self.use_linear, self.fused, self.dropout, self.upcast
        )

    def layers(self, level: int, channels: int) -> list[nn.Module]:
        """Make a residual block from `channels` to the width of `level`, and attention if the level has it."""
        layers: list[nn.Module] = [self.residual(channels, self.widths[level])]
        return [*layers, self.attend(level)] if 2**level in self.attention_resolutions else layers

    def input_blocks(self, first: nn.Module, channels: int) -> tuple[nn.ModuleList, list[int]]:
        """Make the way down behind `first`, which gives `channels`; return the channels of each skip connection too."""
        blocks, skips = [UNetBlock(first)], [channels]
        for level, width in enumerate(self.widths):
            for _ in range(self.num_res_blocks[level]):
                blocks.append(UNetBlock(*self.layers(level, skips[-1])))
                skips.append(width)
            if level < len(self.widths) - 1:
                blocks.append(UNetBlock(Downsample(width)))
                skips.append(width)
        return nn.ModuleList(blocks), skips

    def middle_block(self) -> UNetBlock:
        width = self.widths[-1]
        return UNetBlock(self.residual(width, width), self.attend(-1), self.residual(width, width))

    def output_blocks(self, skips: list[int]) -> nn.ModuleList:
        """Make the way up; each block takes the result of the one before and a skip connection, the last one first."""
        blocks, width, skips = [], self.widths[-1], list(skips)
        for level in reversed(range(len(self.widths))):
            for i in range(self.num_res_blocks[level] + 1):
                layers = self.layers(level, width + skips.pop())
                width = self.widths[level]
                if level and i == self.num_res_blocks[level]:
                    layers.append(Upsample(width))
                blocks.append(UNetBlock(*layers))
        return nn.ModuleList(blocks)


class UNetModel(nn.Module):
    """Noise (or velocity, or clean latents) predicted from noisy latents, timesteps and text embeddings.

    in_channels, out_channels: of the latents (4 and 4 for Stable Diffusion).
    model_channels, channel_mult: the width of level i is model_channels * channel_mult[i].
    num_res_blocks: residual blocks at every level, or one number for each.
    attention_resolutions: downsampling factors at which attention follows each residual block.
    num_heads or num_head_channels: heads at every level, or channels of a head; the other is -1 or absent.
    use_spatial_transformer: transformers with cross-attention to the text; else plain self-attention.
    use_linear_in_transformer: linear layers (v2) rather than 1x1 convolutions (v1) around the transformer.
    transformer_depth: transformer blocks in each spatial transformer, or one number for each level.
    context_dim: features of the text embeddings.
    use_checkpoint: recompute activations in the backward pass. use_flash_attention: fused attention kernels.
    upcast_attention: attention in float32 at any precision, as Stable Diffusion 2.1 needs it in float16.
    resblock_gn_groups: groups of the residual blocks' norms.
    Raises ValueError for sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        in_channels: int = 4,
        out_channels: int = 4,
        model_channels: int = 320,
        attention_resolutions: Sequence[int] = (4, 2, 1),
        num_res_blocks: int | Sequence[int] = 2,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_heads: int = -1,
        num_head_channels: int = -1,
        use_spatial_transformer: bool = True,
        use_linear_in_transformer: bool = False,
        transformer_depth: int | Sequence[int] = 1,
        context_dim: int | None = None,
        use_checkpoint: bool = False,
        use_flash_attention: bool = True,
        upcast_attention: bool = False,
        dropout: float = 0.0,
        resblock_gn_groups: int = 32,
    ):
        super().__init__()
        check_options(use_spatial_transformer, context_dim, num_heads, num_head_channels)
        self.in_channels, self.out_channels, self.context_dim = in_channels, out_channels, context_dim
        self.model_channels = model_channels
        emb_channels, count = 4 * model_channels, len(channel_mult)
        levels = Levels(
            widths=[mult * model_channels for mult in channel_mult],
            num_res_blocks=per_level(num_res_blocks, count), transformer_depth=per_level(transformer_depth, count),
            attention_resolutions=attention_resolutions, emb_channels=emb_channels,
            num_heads=num_heads, num_head_channels=num_head_channels, context_dim=context_dim,
            use_linear=use_linear_in_transformer, fused=use_flash_attention, upcast=upcast_attention,
            dropout=dropout, groups=resblock_gn_groups,
        )  # fmt: skip
        self.time_embed = time_embedding(model_channels, emb_channels)
        first = nn.Conv2d(in_channels, model_channels, 3, padding=1)
        self.input_blocks, skips = levels.input_blocks(first, model_channels)
        self.middle_block = levels.middle_block()
        self.output_blocks = levels.output_blocks(skips)
        self.out = output_layers(levels.widths[0], out_channels, resblock_gn_groups)
        self.set_checkpointing(use_checkpoint)

    def set_checkpointing(self, use_checkpoint: bool) -> None:
        """Recompute the activations of residual blocks and transformers in the backward pass, or keep them."""
        for module in self.modules():
            if isinstance(module, UNetBlock):
                module.use_checkpoint = use_checkpoint

    def compile_blocks(self, *, cuda_graphs: bool = False) -> None:
        """Compile each class of repeated block with TorchInductor, rather than one graph of the whole network.

        cuda_graphs: replay each block's kernels as one CUDA graph.
        """
        options = {"triton.cudagraphs": True} if cuda_graphs else None
        for block in self.repeated_blocks():
            block.compile(dynamic=False, options=options)  # one size a run; dynamic shapes fail on a CPU

    def repeated_blocks(self) -> list[nn.Module]:
        """Return the blocks that make up nearly all of the network, each used once in a pass."""
        repeated = ResBlock | SpatialTransformer | AttentionBlock
        return [module for module in self.modules() if isinstance(module, repeated)]

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the network's prediction, (batch, out_channels, height, width).

        latents: (batch, in_channels, height, width), noisy and scaled, of any size.
        timesteps: (batch,), 0..999, whole or fractional. context: (batch, length, context_dim) text embeddings.
        """
        dtype = next(self.parameters()).dtype
        # A vector condition beside the timestep (SDXL's pooled text and sizes) would be added to `emb`.
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(dtype))  # (batch, 4 * channels)
        hidden, skips = latents.to(dtype), []
        context = None if context is None else context.to(dtype)
        for block in self.input_blocks:
            hidden = block(hidden, emb, context)
            skips.append(hidden)
        hidden = self.middle_block(hidden, emb, context)
        for block in self.output_blocks:
            size = skips[-2].shape[2:] if len(skips) > 1 else None  # odd sizes are halved upwards
            hidden = block(torch.cat([hidden, skips.pop()], dim=1), emb, context, size)
        return self.out(hidden)


def time_embedding(channels: int, emb_channels: int) -> nn.Sequential:
    """Make the layers from sinusoids of the timestep (batch, channels) to (batch, emb_channels)."""
    return nn.Sequential(nn.Linear(channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels))


def output_layers(channels: int, out_channels: int, groups: int) -> nn.Sequential:
    """Make the last convolution, at zero, behind its norm: a fresh network predicts zero."""
    convolution = zero_init(nn.Conv2d(channels, out_channels, 3, padding=1))
    return nn.Sequential(group_norm(channels, groups, eps=1e-5), nn.SiLU(), convolution)


def check_options(use_spatial_transformer: bool, context_dim: int | None, num_heads: int, head_channels: int) -> None:
    """Raise ValueError for options of which one excludes the other."""
    if use_spatial_transformer != (context_dim is not None):
        raise ValueError("use_spatial_transformer and context_dim go together: give both or neither")
    if (num_heads == -1) == (head_channels == -1):
        raise ValueError("give one of num_heads and num_head_channels, and leave the other at -1")


def per_level(value: int | Sequence[int], levels: int) -> list[int]:
    """Return `value` for each level; ValueError if a list has another length."""
    values = [value] * levels if isinstance(value, int) else list(value)
    if len(values) != levels:
        raise ValueError(f"{values} has {len(values)} numbers, channel_mult has {levels}")
    return values


def head_count(width: int, num_heads: int, num_head_channels: int) -> int:
    """Return the attention heads of a layer `width` wide; ValueError if they do not divide it."""
    heads = num_heads if num_head_channels == -1 else width // num_head_channels
    if heads < 1 or width % heads or (num_head_channels != -1 and width % num_head_channels):
        raise ValueError(f"{width} channels cannot be cut into heads (num_heads or num_head_channels)")
    return heads
