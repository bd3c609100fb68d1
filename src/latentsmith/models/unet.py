"""The U-Net that predicts the noise in latents from the timestep and the text (Rombach et al. 2022, section 3.3).

Parameter names are LDM's, so a Stable Diffusion file loads as it is.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentsmith.checkpoints.load import load_pretrained
from latentsmith.cpu.convolution import Conv2d
from latentsmith.cpu.products import Linear

from .attention import AttentionBlock, SpatialTransformer
from .layers import group_norm, timestep_embedding, zero_init


class ResBlock(nn.Module):
    """Two convolutions with the timestep embedding added between them, beside a skip connection."""

    def __init__(self, channels: int, out_channels: int, emb_channels: int, dropout: float, groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            group_norm(channels, groups, eps=1e-5),
            nn.SiLU(),
            Conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            group_norm(out_channels, groups, eps=1e-5),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_init(Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else Conv2d(channels, out_channels, 1)

    def forward(self, hidden: Tensor, emb: Tensor) -> Tensor:
        inner = self.in_layers(hidden) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(hidden) + self.out_layers(inner)


class Downsample(nn.Module):
    """Half the height and width by a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.op(hidden)


class Upsample(nn.Module):
    """Nearest neighbours up to `size` (height, width), about twice its input's, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(hidden, size, mode="nearest"))


class UNetBlock(nn.Sequential):
    """Layers in a row, each given the inputs of its kind: timestep embedding, text, or the size to grow to."""

    use_checkpoint = False

    def forward(  # type: ignore[override]
        self, hidden: Tensor, emb: Tensor, context: Tensor | None, size: tuple[int, int] | None = None
    ) -> Tensor:
        inputs = ((ResBlock, emb), (SpatialTransformer, context), (Upsample, size))
        for layer in self:
            hidden = self.run(layer, hidden, *(given for kind, given in inputs if isinstance(layer, kind)))
        return hidden

    def run(self, layer: nn.Module, *inputs: Any) -> Tensor:
        """`layer(*inputs)`, its activations recomputed in the backward pass if `use_checkpoint`."""
        recompute = self.use_checkpoint and torch.is_grad_enabled()
        if recompute and isinstance(layer, ResBlock | SpatialTransformer | AttentionBlock):
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


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
    legacy: has no effect with spatial transformers; else kept for files of old models.
    resblock_gn_groups: groups of the residual blocks' norms. image_size: unused, accepted for old files.
    from_pretrained: a checkpoint to fill every parameter from, strictly. from_NeMo: true if its names are NeMo's or
    LDM's, false if they are diffusers'; unset, the names themselves decide. weights: "ema" or "raw", where it has both.
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
        legacy: bool = False,
        dropout: float = 0.0,
        resblock_gn_groups: int = 32,
        image_size: int | None = None,
        from_pretrained: str | None = None,
        from_NeMo: bool | None = None,
        weights: str = "ema",
    ):
        super().__init__()
        levels = len(channel_mult)
        if use_spatial_transformer != (context_dim is not None):
            raise ValueError("use_spatial_transformer and context_dim go together: give both or neither")
        if (num_heads == -1) == (num_head_channels == -1):
            raise ValueError("give one of num_heads and num_head_channels, and leave the other at -1")
        self.in_channels, self.out_channels, self.context_dim = in_channels, out_channels, context_dim
        self.model_channels = model_channels
        res_blocks, depths = per_level(num_res_blocks, levels), per_level(transformer_depth, levels)
        emb_channels = 4 * model_channels

        def residual(channels: int, width: int) -> ResBlock:
            return ResBlock(channels, width, emb_channels, dropout, resblock_gn_groups)

        def attend(width: int, depth: int) -> nn.Module:
            heads = head_count(width, num_heads, num_head_channels)
            if context_dim is None:
                return AttentionBlock(width, heads, fused=use_flash_attention)
            return SpatialTransformer(
                width, heads, depth, context_dim, use_linear_in_transformer, use_flash_attention, dropout,
                upcast_attention,
            )  # fmt: skip

        self.time_embed = nn.Sequential(
            Linear(model_channels, emb_channels), nn.SiLU(), Linear(emb_channels, emb_channels)
        )
        self.input_blocks = nn.ModuleList([UNetBlock(Conv2d(in_channels, model_channels, 3, padding=1))])
        skips, width = [model_channels], model_channels
        for level, mult in enumerate(channel_mult):
            for _ in range(res_blocks[level]):
                layers: list[nn.Module] = [residual(width, mult * model_channels)]
                width = mult * model_channels
                if 2**level in attention_resolutions:
                    layers.append(attend(width, depths[level]))
                self.input_blocks.append(UNetBlock(*layers))
                skips.append(width)
            if level < levels - 1:
                self.input_blocks.append(UNetBlock(Downsample(width)))
                skips.append(width)
        self.middle_block = UNetBlock(residual(width, width), attend(width, depths[-1]), residual(width, width))
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            for i in range(res_blocks[level] + 1):
                layers = [residual(width + skips.pop(), channel_mult[level] * model_channels)]
                width = channel_mult[level] * model_channels
                if 2**level in attention_resolutions:
                    layers.append(attend(width, depths[level]))
                if level and i == res_blocks[level]:
                    layers.append(Upsample(width))
                self.output_blocks.append(UNetBlock(*layers))
        self.out = nn.Sequential(
            group_norm(width, resblock_gn_groups, eps=1e-5),
            nn.SiLU(),
            zero_init(Conv2d(width, out_channels, 3, padding=1)),
        )
        self.set_checkpointing(use_checkpoint)
        load_pretrained(self, from_pretrained, "unet", from_nemo=from_NeMo, weights=weights)

    def set_checkpointing(self, use_checkpoint: bool) -> None:
        """Recompute the activations of residual blocks and transformers in the backward pass, or keep them."""
        for module in self.modules():
            if isinstance(module, UNetBlock):
                module.use_checkpoint = use_checkpoint

    def compile_blocks(self, *, cuda_graphs: bool = False) -> None:
        """Compile each kind of repeated block with TorchInductor, rather than one graph of the whole network.

        cuda_graphs: replay each block's kernels as one CUDA graph.
        """
        options = {"triton.cudagraphs": True} if cuda_graphs else None
        for block in self.repeated_blocks():
            block.compile(dynamic=False, options=options)  # one size a run; dynamic shapes fail on a CPU

    def repeated_blocks(self) -> list[nn.Module]:
        """The blocks that make up nearly all of the network, each used once in a pass."""
        kinds = ResBlock | SpatialTransformer | AttentionBlock
        return [module for module in self.modules() if isinstance(module, kinds)]

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        """The network's prediction, (batch, out_channels, height, width).

        latents: (batch, in_channels, height, width), noisy and scaled, of any size.
        timesteps: (batch,), 0..999, whole or fractional. context: (batch, length, context_dim) text embeddings.
        """
        dtype = next(self.parameters()).dtype
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


def per_level(value: int | Sequence[int], levels: int) -> list[int]:
    """`value` for each level; ValueError if a list has another length."""
    values = [value] * levels if isinstance(value, int) else list(value)
    if len(values) != levels:
        raise ValueError(f"{values} has {len(values)} numbers, channel_mult has {levels}")
    return values


def head_count(width: int, num_heads: int, num_head_channels: int) -> int:
    """Attention heads of a layer `width` wide; ValueError if they do not divide it."""
    heads = num_heads if num_head_channels == -1 else width // num_head_channels
    if heads < 1 or width % heads or (num_head_channels != -1 and width % num_head_channels):
        raise ValueError(f"{width} channels cannot be cut into heads (num_heads or num_head_channels)")
    return heads
