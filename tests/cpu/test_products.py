"""Linear layers by oneDNN against PyTorch's in float64, and when they are taken."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from latentsmith.cpu import optimize_for_cpu, products
from latentsmith.cpu.products import CpuLinear, LinearProduct, linear
from latentsmith.models import UNetModel

needs_onednn = pytest.mark.skipif(not products.has_onednn(), reason="this PyTorch has no oneDNN")


@pytest.fixture
def onednn(monkeypatch):
    """As on a processor where it is the faster library, for products of any size."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "LEAST_WORK", 1)


def drawn(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for size in sizes]


@needs_onednn
@pytest.mark.parametrize("rows", [(5,), (3, 7), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_values_and_gradients(onednn, rows, strided):
    """Relative to each tensor's norm; float32 rounds at 6e-8."""
    input, weight, bias, grad = drawn((*rows, 24), (40, 24), (40,), (*rows, 40))
    if strided:
        input, grad = (tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in (input, grad))
        weight = weight.t().contiguous().t()
    found, expected = [], []
    for results, convert in ((found, torch.Tensor.float), (expected, torch.Tensor.double)):
        leaves = [convert(tensor).detach().requires_grad_() for tensor in (input, weight, bias)]
        out = linear(*leaves) if results is found else F.linear(*leaves)
        results += [out, *torch.autograd.grad(out, leaves, convert(grad))]
    assert type(found[0].grad_fn.next_functions[0][0]).__name__ == "LinearProductBackward"
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and (one - other).norm() < 5e-7 * other.norm()


@needs_onednn
@pytest.mark.parametrize("bias", [None, torch.ones(40)], ids=["no bias", "bias"])
def test_any_layout_in_memory(onednn, bias):
    """Repeated rows, columns of a wider matrix, one row alone, no gradient of the input."""
    weight = drawn((40, 24))[0].requires_grad_()
    wide, row = drawn((6, 48), (1, 1, 24))
    for input in (wide[:, :24], wide[::2, 24:], row.expand(5, 3, -1), row[0, 0], wide[:, :24].t().contiguous().t()):
        found, expected = (
            linear(input, weight, bias),
            F.linear(input.double(), weight.double(), None if bias is None else bias.double()),
        )
        assert found.shape == expected.shape and (found - expected).norm() < 5e-7 * expected.norm()
        gradients = [torch.autograd.grad(out.sum(), weight)[0] for out in (found, expected)]
        assert (gradients[0] - gradients[1]).norm() < 5e-7 * gradients[1].norm()
    with torch.inference_mode():
        assert torch.equal(linear(wide[:, :24], weight, bias), linear(wide[:, :24], weight.detach(), bias))


@needs_onednn
def test_outputs_may_be_changed_in_place(onednn):
    weight, input = (tensor.requires_grad_() for tensor in drawn((40, 24), (3, 5, 24)))
    linear(input, weight, None).mul_(2).sum().backward()
    torch.testing.assert_close(weight.grad, 2 * input.detach().sum((0, 1)).expand(40, -1), rtol=1e-5, atol=1e-5)


@needs_onednn
def test_frozen_weights_get_no_gradient(onednn):
    module, input = CpuLinear(24, 40).requires_grad_(False), torch.randn(3, 24, requires_grad=True)
    module(input).sum().backward()
    assert module.weight.grad is None and input.grad is not None
    assert not module(input.detach()).requires_grad


@needs_onednn
def test_it_is_nn_linear_otherwise(onednn, monkeypatch):
    """Small products, other precisions, autocast and compilers take PyTorch's own."""
    calls = []
    monkeypatch.setattr(LinearProduct, "apply", lambda *given: calls.append(1) or F.linear(*given))
    module, input = CpuLinear(24, 40), torch.randn(3, 24)
    module(input)
    assert len(calls) == 1
    module.double()(input.double())
    module.float()
    with torch.autocast("cpu", torch.bfloat16):
        module(input)
    with monkeypatch.context() as patched:
        patched.setattr(torch.compiler, "is_compiling", lambda: True)
        module(input)
    monkeypatch.setattr(products, "LEAST_WORK", 3 * 24 * 40 + 1)
    module(input)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    module(input)
    assert len(calls) == 1 and isinstance(module, nn.Linear)


@needs_onednn
@pytest.mark.parametrize(
    ("capability", "cpuinfo", "faster"),
    [
        ("AVX512", "vendor_id: AuthenticAMD", True),
        ("AVX2", "vendor_id: AuthenticAMD", False),
        ("AVX512", "GenuineIntel", False),
    ],
)
def test_the_processor_decides(monkeypatch, capability, cpuinfo, faster):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products.Path, "is_file", lambda path: True)
    monkeypatch.setattr(products.Path, "read_text", lambda path: cpuinfo)
    assert products.onednn_is_faster.__wrapped__() is faster


@needs_onednn
def test_a_whole_network_by_either_library(monkeypatch, randomise):
    """Output and gradients of a small U-Net, relative, to rounding over its depth."""
    net = randomise(UNetModel(model_channels=64, channel_mult=[1, 2], num_heads=2, context_dim=32))
    optimize_for_cpu(net)
    given = [*drawn((2, 4, 16, 16)), torch.tensor([3, 700]), *drawn((2, 9, 32))]
    found = []
    for faster in (False, True):
        monkeypatch.setattr(products, "onednn_is_faster", lambda faster=faster: faster)
        monkeypatch.setattr(products, "LEAST_WORK", 1)
        net.zero_grad()
        out = net(*given)
        out.square().mean().backward()
        found.append([out.detach(), *(p.grad.clone() for p in net.parameters())])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 2e-5 * other.norm() + 1e-9
