"""Each algorithm of a 3x3 convolution, and its gradients, against PyTorch's in float64."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from latentsmith.cpu import convolution, products
from latentsmith.cpu.convolution import CpuConv2d, KernelThresholds, WinogradConvolution, product_convolution

LIBRARIES = ["mkl", pytest.param("onednn", marks=pytest.mark.skipif(not products.has_onednn(), reason="no oneDNN"))]
ALGORITHMS = [product_convolution, WinogradConvolution.apply]
SHAPES = [(1, 8, 12, 8, 8), (3, 6, 4, 4, 10), (2, 16, 8, 16, 6), (5, 3, 7, 2, 2)]  # batch, in, out, height, width


@pytest.fixture(params=LIBRARIES, autouse=True)
def library(request, monkeypatch):
    """Every test runs with the products of either library, however small."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param == "onednn")
    monkeypatch.setattr(products, "LEAST_WORK", 1)
    return request.param


@pytest.fixture(params=[1 << 20, 1], ids=["whole", "strips"])
def strip(request, monkeypatch):
    monkeypatch.setattr(convolution, "STRIP", request.param)


def drawn(shape, *, channels_last=False):
    batch, channels, out, height, width = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [(batch, channels, height, width), (out, channels, 3, 3), (out,), (batch, out, height, width)]
    values = [torch.randn(size, generator=generator) for size in sizes]
    if channels_last:
        values = [v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v for v in values]
    return values


def with_gradients(convolve, input, weight, bias, grad):
    leaves = [tensor.detach().requires_grad_() for tensor in (input, weight, bias)]
    out = convolve(*leaves)
    return out, *torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_values_and_gradients(algorithm, shape, channels_last, strip):
    """Relative to each tensor's norm; float32 rounds at 6e-8."""
    given = drawn(shape, channels_last=channels_last)
    found = with_gradients(algorithm, *given)
    expected = with_gradients(lambda x, w, b: F.conv2d(x, w, b, padding=1), *(tensor.double() for tensor in given))
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and (one - other).norm() < 5e-7 * other.norm()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_without_a_bias_or_a_gradient_of_the_input(algorithm):
    input, weight, _, grad = drawn(SHAPES[0])
    weight.requires_grad_()
    found = torch.autograd.grad(algorithm(input, weight, None), weight, grad)[0]
    expected = torch.autograd.grad(F.conv2d(input, weight, padding=1), weight, grad)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradients_of_weights_lie_as_the_weights_do(algorithm):
    """Or the optimizer's memory would be reordered at every step."""
    for channels_last in (False, True):
        given = drawn((2, 16, 8, 8, 8), channels_last=channels_last)
        assert with_gradients(algorithm, *given)[2].stride() == given[1].stride()


def used(monkeypatch, module, input):
    """Which algorithm a module takes for an input."""
    names = []
    for owner, name in ((convolution, "product_convolution"), (WinogradConvolution, "apply")):
        run = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, run=run, name=name: names.append(name) or run(*given))
    found = module(input)
    monkeypatch.undo()
    assert found.shape[2:] == input.shape[2:]
    return names


@pytest.mark.parametrize(
    ("channels", "size", "by_mkl", "by_onednn"),
    [
        (320, 32, ["apply"], []),  # Stable Diffusion's levels at 256 px
        (640, 32, ["apply"], ["apply"]),
        (640, 16, ["apply"], ["product_convolution"]),
        (1280, 4, ["product_convolution"], ["product_convolution"]),
        (640, 33, [], []),  # no tiles of 2 x 2
        (64, 64, [], []),  # few channels
    ],
)
def test_the_choice_follows_shape_and_processor(monkeypatch, library, channels, size, by_mkl, by_onednn):
    expected = by_mkl if library == "mkl" else by_onednn
    monkeypatch.setattr(convolution, "products", SimpleNamespace(onednn_is_faster=lambda: library == "onednn"))
    module, input = CpuConv2d(channels, channels, 3, padding=1), torch.randn(1, channels, size, size)
    assert used(monkeypatch, module, input) == expected
    assert used(monkeypatch, module.double(), input.double()) == []


@pytest.mark.parametrize(
    "options",
    [
        dict(kernel_size=1),
        dict(kernel_size=3, padding=1),
        dict(kernel_size=3, padding=1, bias=False),
        dict(kernel_size=3, stride=2, padding=1),
        dict(kernel_size=3, padding=0),
        dict(kernel_size=3, padding=1, groups=2),
        dict(kernel_size=3, padding=2, dilation=2),
        dict(kernel_size=3, padding=1, padding_mode="reflect"),
    ],
    ids=str,
)
def test_every_kind_is_pytorchs(options, monkeypatch):
    """The same module, parameters and result as nn.Conv2d, whatever the geometry; the choice itself made eager."""
    monkeypatch.setattr(convolution, "THRESHOLDS", dict.fromkeys((False, True), KernelThresholds(128, 48, 1)))
    monkeypatch.setattr(convolution, "MIN_PRODUCTS", 1)
    module = CpuConv2d(6, 8, **options)
    plain = nn.Conv2d(6, 8, **options)
    plain.load_state_dict(module.state_dict())
    input = torch.randn(2, 6, 8, 8)
    torch.testing.assert_close(module(input), plain(input), rtol=1e-5, atol=1e-6)
    assert copy.deepcopy(module).state_dict().keys() == plain.state_dict().keys()


def test_autocast_and_compilers_get_pytorchs(monkeypatch):
    module, input = CpuConv2d(256, 256, 3, padding=1), torch.randn(1, 256, 32, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=True):
        assert not module.may_choose(input)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not module.may_choose(input)
