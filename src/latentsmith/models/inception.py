"""The Inception network of FID: that of TensorFlow's file of 2015, not the later Inception v3 of other libraries.

Parameter names are those of the published PyTorch conversions (pytorch-fid, torch-fidelity).
Source: Szegedy et al. 2016, figures 5 to 7; how TensorFlow's graph differs is stated at `Branches`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

IMAGE_SIZE = 299
CLASSES = 1008  # 1,000 classes and 8 that mean nothing
TAPS = ("64", "192", "768", "2048", "logits_unbiased", "logits")


class BasicConv2d(nn.Module):
    """Convolution without bias, batch normalisation in evaluation, ReLU."""

    def __init__(self, channels: int, out: int, kernel: int | tuple[int, int], stride: int = 1, padding: bool = False):
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        around = tuple(side // 2 for side in sides) if padding else 0
        self.conv = nn.Conv2d(channels, out, sides, stride, around, bias=False)  # type: ignore[arg-type]
        self.bn: nn.Module = nn.BatchNorm2d(out, eps=0.001)

    def fold(self) -> None:
        """Take the normalisation into the convolution's weights."""
        if isinstance(self.bn, nn.BatchNorm2d):
            self.conv, self.bn = fuse_conv_bn_eval(self.conv, self.bn), nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(images)))


Layer = tuple[str, int, int | tuple[int, int]]  # name, output channels, kernel


class Branches(nn.Module):
    """Several sequences of convolutions on one input, and a pooled branch; outputs are joined along the channels.

    branches: layers of each. pool: channels of the convolution after pooling, 0 for none.
    max_pool: pool by the maximum, as TensorFlow's graph does in its last block. Averages leave out the padding, also
    as there. halve: the last convolution of each branch and the pooling have stride 2 and no padding.
    split: branches (by number) whose last two layers both read what lies before them.
    """

    def __init__(
        self,
        channels: int,
        branches: Sequence[Sequence[Layer]],
        pool: int = 0,
        *,
        max_pool: bool = False,
        halve: bool = False,
        split: Sequence[int] = (),
    ):
        super().__init__()
        self.names = [[name for name, _, _ in branch] for branch in branches]
        self.max_pool, self.halve, self.split, self.pool = max_pool, halve, split, pool
        for number, branch in enumerate(branches):
            inputs = channels
            for place, (name, out, kernel) in enumerate(branch):
                last = halve and place == len(branch) - 1
                setattr(self, name, BasicConv2d(inputs, out, kernel, 2 if last else 1, padding=not last))
                inputs = inputs if number in split and place == len(branch) - 2 else out
        if pool:
            self.branch_pool = BasicConv2d(channels, pool, 1)

    def forward(self, images: Tensor) -> Tensor:
        outputs = []
        for number, names in enumerate(self.names):
            hidden = images
            shared = names[:-2] if number in self.split else names
            for name in shared:
                hidden = getattr(self, name)(hidden)
            heads = names[len(shared) :]
            outputs += [getattr(self, name)(hidden) for name in heads] or [hidden]
        return torch.cat([*outputs, self._pooled(images)], dim=1)

    def _pooled(self, images: Tensor) -> Tensor:
        if self.halve:
            return F.max_pool2d(images, 3, stride=2)
        if self.max_pool:
            return self.branch_pool(F.max_pool2d(images, 3, stride=1, padding=1))
        return self.branch_pool(F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False))


def block_35(channels: int, pool: int) -> Branches:
    """Figure 5, at 35 x 35."""
    five: list[Layer] = [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)]
    three: list[Layer] = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
    return Branches(channels, [[("branch1x1", 64, 1)], five, three], pool)


def block_17(inner: int) -> Branches:
    """Figure 6 with n = 7, at 17 x 17."""
    across, down = (1, 7), (7, 1)
    seven: list[Layer] = [("branch7x7_1", inner, 1), ("branch7x7_2", inner, across), ("branch7x7_3", 192, down)]
    double: list[Layer] = [
        ("branch7x7dbl_1", inner, 1),
        ("branch7x7dbl_2", inner, down),
        ("branch7x7dbl_3", inner, across),
        ("branch7x7dbl_4", inner, down),
        ("branch7x7dbl_5", 192, across),
    ]
    return Branches(768, [[("branch1x1", 192, 1)], seven, double], 192)


def block_8(channels: int, max_pool: bool) -> Branches:
    """Figure 7, at 8 x 8."""
    across, down = (1, 3), (3, 1)
    three: list[Layer] = [("branch3x3_1", 384, 1), ("branch3x3_2a", 384, across), ("branch3x3_2b", 384, down)]
    double: list[Layer] = [
        ("branch3x3dbl_1", 448, 1),
        ("branch3x3dbl_2", 384, 3),
        ("branch3x3dbl_3a", 384, across),
        ("branch3x3dbl_3b", 384, down),
    ]
    return Branches(channels, [[("branch1x1", 320, 1)], three, double], 192, max_pool=max_pool, split=(1, 2))


class FidInception(nn.Module):
    """Images (batch, 3, 299, 299) in [-1, 1] to the activations that FID, KID and the Inception score read."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, padding=True)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_35(192, 32), block_35(256, 64), block_35(288, 64)
        shrunk: list[Layer] = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
        self.Mixed_6a = Branches(288, [[("branch3x3", 384, 3)], shrunk], halve=True)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (block_17(inner) for inner in (128, 160, 160, 192))
        seven: list[Layer] = [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1))]
        three: list[Layer] = [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)]
        self.Mixed_7a = Branches(768, [three, [*seven, ("branch7x7x3_4", 192, 3)]], halve=True)
        self.Mixed_7b, self.Mixed_7c = block_8(1280, max_pool=False), block_8(2048, max_pool=True)
        self.fc = nn.Linear(2048, CLASSES)
        self.requires_grad_(False).eval()

    def fold(self) -> "FidInception":
        """Return the network, faster: normalisations within convolutions, channels last. Features differ by 3e-7."""
        for module in self.modules():
            if isinstance(module, BasicConv2d):
                module.fold()
        return self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return TAPS: means over positions of four stages (batch, channels), and logits (batch, 1008)."""
        taps = {}
        hidden = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))  # (batch, 64, 147, 147)
        hidden = F.max_pool2d(hidden, 3, stride=2)
        taps["64"] = hidden.mean((2, 3))
        hidden = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(hidden)), 3, stride=2)  # (batch, 192, 35, 35)
        taps["192"] = hidden.mean((2, 3))
        for block in (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a):
            hidden = block(hidden)
        for block in (self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e):
            hidden = block(hidden)
        taps["768"] = hidden.mean((2, 3))  # (batch, 768, 17, 17)
        for block in (self.Mixed_7a, self.Mixed_7b, self.Mixed_7c):
            hidden = block(hidden)
        taps["2048"] = hidden.mean((2, 3))  # (batch, 2048, 8, 8)
        taps["logits_unbiased"] = F.linear(taps["2048"], self.fc.weight)
        taps["logits"] = taps["logits_unbiased"] + self.fc.bias
        return taps
