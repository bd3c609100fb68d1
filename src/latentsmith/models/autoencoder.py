"""The VAE: images to latents and back (Rombach et al. 2022, section 3.1). Parameter names are LDM's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import attention, group_norm, zero_init

FIRST_LOGVAR = -6.0  # log variance that fresh weights start with: a deviation of 0.05


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, dropout: float, groups: int):
        super().__init__()
        self.norm1 = group_norm(channels, groups, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(hidden)))
        inner = self.conv2(self.dropout(F.silu(self.norm2(inner))))
        return inner + (self.nin_shortcut(hidden) if hasattr(self, "nin_shortcut") else hidden)


class AttnBlock(nn.Module):
    """Single-head self-attention over pixels."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = group_norm(channels, groups, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        query, key, value = (
            project(normed).flatten(2).transpose(1, 2).unsqueeze(1) for project in (self.q, self.k, self.v)
        )  # each (batch, 1, height * width, channels)
        mixed = attention(query, key, value, fused=True).squeeze(1).transpose(1, 2)
        return hidden + self.proj_out(mixed.reshape(hidden.shape))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(F.pad(hidden, (0, 1, 0, 1)))  # right and bottom only, as the published weights expect


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, with attention after each if `attend`, then the change of resolution."""

    def __init__(self, blocks: list[ResnetBlock], attend: bool, groups: int, resample: tuple[str, nn.Module] | None):
        super().__init__()
        self.block = nn.ModuleList(blocks)
        widths = [block.conv2.out_channels for block in blocks]
        self.attn = nn.ModuleList(AttnBlock(width, groups) for width in widths if attend)
        self.resample = resample[0] if resample else None
        if resample:
            self.add_module(*resample)

    def forward(self, hidden: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            hidden = block(hidden)
            if len(self.attn):
                hidden = self.attn[i](hidden)
        return self.get_submodule(self.resample)(hidden) if self.resample else hidden


class Middle(nn.Module):
    def __init__(self, channels: int, dropout: float, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, dropout, groups)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(hidden)))


@dataclass(frozen=True, kw_only=True)
class VaeSizes:
    """Sizes of a VAE: its ddconfig. Attention is at the levels whose size, `resolution` halved at each, is named."""

    z_channels: int
    ch: int
    ch_mult: Sequence[int]
    num_res_blocks: int
    in_channels: int = 3
    out_ch: int = 3
    attn_resolutions: Sequence[int] = ()
    resolution: int = 256
    dropout: float = 0.0
    num_groups: int = 32
    double_z: bool = True

    def __post_init__(self) -> None:
        if not self.double_z:
            raise ValueError("ddconfig.double_z is false: a KL autoencoder needs a mean and a log variance")

    @property
    def widths(self) -> list[int]:
        """Return the channels of each level, the finest first."""
        return [self.ch * mult for mult in self.ch_mult]

    def residuals(self, level: int, channels: int, count: int) -> list[ResnetBlock]:
        """Make the residual blocks of a level, the first of which is given `channels`."""
        widths = [channels] + count * [self.widths[level]]
        return [ResnetBlock(before, after, self.dropout, self.num_groups) for before, after in pairwise(widths)]

    def attends(self, level: int) -> bool:
        return self.resolution // 2**level in self.attn_resolutions


class Encoder(nn.Module):
    """Images (batch, in_channels, height, width) to (batch, 2 * z_channels, height / f, width / f)."""

    def __init__(self, sizes: VaeSizes):
        super().__init__()
        self.conv_in = nn.Conv2d(sizes.in_channels, sizes.ch, 3, padding=1)
        self.down, channels = nn.ModuleList(), sizes.ch
        for level, width in enumerate(sizes.widths):
            blocks = sizes.residuals(level, channels, sizes.num_res_blocks)
            down = ("downsample", Downsample(width)) if level < len(sizes.widths) - 1 else None
            self.down.append(Level(blocks, sizes.attends(level), sizes.num_groups, down))
            channels = width
        self.mid = Middle(channels, sizes.dropout, sizes.num_groups)
        self.norm_out = group_norm(channels, sizes.num_groups, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, 2 * sizes.z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv_in(images)
        for level in self.down:
            hidden = level(hidden)
        return self.conv_out(F.silu(self.norm_out(self.mid(hidden))))


class Decoder(nn.Module):
    """Latents (batch, z_channels, height, width) to images (batch, out_ch, f * height, f * width)."""

    def __init__(self, sizes: VaeSizes):
        super().__init__()
        channels = sizes.widths[-1]
        self.conv_in = nn.Conv2d(sizes.z_channels, channels, 3, padding=1)
        self.mid = Middle(channels, sizes.dropout, sizes.num_groups)
        levels: list[Level] = []
        for level, width in reversed(list(enumerate(sizes.widths))):
            blocks = sizes.residuals(level, channels, sizes.num_res_blocks + 1)
            up = ("upsample", Upsample(width)) if level else None
            levels.append(Level(blocks, sizes.attends(level), sizes.num_groups, up))
            channels = width
        self.up = nn.ModuleList(reversed(levels))  # in LDM's names up.0 is the finest, which runs last
        self.norm_out = group_norm(channels, sizes.num_groups, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, sizes.out_ch, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        hidden = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            hidden = level(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class AutoencoderKL(nn.Module):
    """Images to the mean and log variance of their latents, and latents to images.

    embed_dim: channels of the latents: 4 in Stable Diffusion v1 and v2, 16 in later models. ddconfig: the fields of
    VaeSizes. scale_factor, shift_factor: (vae_latents - shift_factor) * scale_factor has about unit variance.
    Height and width must divide by `downsampling`.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 4,
        ddconfig: Mapping[str, Any],
        scale_factor: float = 0.18215,
        shift_factor: float = 0.0,
    ):
        super().__init__()
        sizes = VaeSizes(**ddconfig)
        self.encoder, self.decoder = Encoder(sizes), Decoder(sizes)
        self.quant_conv = nn.Conv2d(2 * sizes.z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, sizes.z_channels, 1)
        self.embed_dim, self.scale_factor, self.shift_factor = embed_dim, scale_factor, shift_factor
        self.downsampling = 2 ** (len(sizes.ch_mult) - 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise weights that learn from the first step.

        Every residual branch starts as the identity, so that the rest is nearly linear and finds colours at once, and
        latents have little noise.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResnetBlock | AttnBlock):
                zero_init(module.conv2 if isinstance(module, ResnetBlock) else module.proj_out)
        assert self.quant_conv.bias is not None
        nn.init.constant_(self.quant_conv.bias[self.embed_dim :], FIRST_LOGVAR)

    def encode(self, images: Tensor) -> Tensor:
        """Return moments (batch, 2 * embed_dim, height / f, width / f): mean, then log variance, of unscaled latents.

        images: (batch, 3, height, width) in [-1, 1], of any precision.
        """
        return self.quant_conv(self.encoder(images.to(self.quant_conv.weight.dtype)))

    def decode(self, latents: Tensor) -> Tensor:
        """Return images (batch, 3, f * height, f * width), about [-1, 1], of unscaled latents."""
        return self.decoder(self.post_quant_conv(latents.to(self.post_quant_conv.weight.dtype)))

    def to_latents(self, vae_latents: Tensor) -> Tensor:
        """Scale what the VAE encodes to latents of about unit variance, on which the U-Net works."""
        return to_latents(vae_latents, self.scale_factor, self.shift_factor)

    def to_vae_latents(self, latents: Tensor) -> Tensor:
        """Undo to_latents."""
        return latents / self.scale_factor + self.shift_factor

    @staticmethod
    def mode(moments: Tensor) -> Tensor:
        """Return the most likely latents: the mean, (batch, embed_dim, height, width)."""
        return moments.chunk(2, dim=1)[0]

    @staticmethod
    def sample(moments: Tensor, noise: Tensor) -> Tensor:
        """Sample latents from `moments` with standard normal `noise` (batch, embed_dim, height, width)."""
        mean, logvar = moments.chunk(2, dim=1)
        return mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise

    @staticmethod
    def kl(moments: Tensor) -> Tensor:
        """Return the KL divergence from the standard normal, (batch,), in nats (Kingma & Welling 2014, appendix B)."""
        mean, logvar = moments.chunk(2, dim=1)
        logvar = logvar.clamp(-30.0, 20.0)
        return 0.5 * (mean**2 + logvar.exp() - 1.0 - logvar).flatten(1).sum(dim=1)


def to_latents(vae_latents: Tensor, scale_factor: float, shift_factor: float = 0.0) -> Tensor:
    """Scale VAE latents to about unit variance; a function, since a run on cached latents has no VAE."""
    return (vae_latents - shift_factor) * scale_factor
