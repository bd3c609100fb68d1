"""Faster kernels for a CPU, put into networks on request. Importing this loads nothing heavy."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def optimize_for_cpu(network: "nn.Module", *, pack_weights: bool = False) -> None:
    """Swap the plain convolutions and linear layers of a network, in place, for ones that choose faster kernels.

    Parameters, their names and the results (but for rounding) stay; on other devices, in other precisions and under
    torch.compile the layers do what PyTorch's do. pack_weights: for inference, keep a second copy of the weights of
    convolutions in the order that oneDNN wants, made at the first call without gradients.
    """
    from torch import nn

    from .convolution import CpuConv2d, PackedConv2d
    from .products import CpuLinear, has_onednn

    convolution = PackedConv2d if pack_weights and has_onednn() else CpuConv2d
    for module in network.modules():
        if type(module) in (nn.Conv2d, CpuConv2d):
            module.__class__ = convolution
        elif type(module) is nn.Linear:
            module.__class__ = CpuLinear
