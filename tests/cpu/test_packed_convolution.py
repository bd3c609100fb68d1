"""Packed convolutions are the plain ones but for rounding, whatever happens to them."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from latentsmith.cpu import optimize_for_cpu
from latentsmith.cpu.allocator import drop_pages
from latentsmith.cpu.convolution import PackedConv2d
from latentsmith.models import UNetModel


def pair(**options):
    torch.manual_seed(0)
    plain = nn.Conv2d(16, 24, **options).eval()
    packed = nn.Sequential(copy.deepcopy(plain))
    optimize_for_cpu(packed, pack_weights=True)
    return plain, packed[0]


def same(plain, packed, *shape):
    images = torch.randn(*shape)
    with torch.no_grad():
        torch.testing.assert_close(packed(images), plain(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [dict(kernel_size=3, padding=1), dict(kernel_size=3, stride=2), dict(kernel_size=1),
                                     dict(kernel_size=3, padding=1, bias=False)])  # fmt: skip
def test_the_same_at_every_size(options):
    plain, packed = pair(**options)
    for shape in ((1, 16, 8, 8), (3, 16, 9, 13), (1, 16, 32, 32)):
        same(plain, packed, *shape)
    assert type(packed) is PackedConv2d and packed.packed is not None
    assert packed.state_dict().keys() == plain.state_dict().keys()


def test_a_changed_weight_is_packed_again():
    plain, packed = pair(kernel_size=3, padding=1)
    same(plain, packed, 1, 16, 8, 8)
    with torch.no_grad():
        for conv in (plain, packed):
            conv.weight.mul_(2)
    same(plain, packed, 1, 16, 8, 8)
    other = {name: torch.randn_like(tensor) for name, tensor in plain.state_dict().items()}
    plain.load_state_dict(other)
    packed.load_state_dict(other, assign=True)
    same(plain, packed, 1, 16, 8, 8)
    same(plain, copy.deepcopy(packed), 1, 16, 8, 8)


def test_gradients_and_other_precisions_go_the_plain_way():
    plain, packed = pair(kernel_size=3, padding=1)
    images = torch.randn(1, 16, 8, 8)
    for conv in (plain, packed):
        conv(images).square().sum().backward()
    torch.testing.assert_close(packed.weight.grad, plain.weight.grad)
    same(plain.bfloat16().float(), packed.bfloat16().float(), 1, 16, 8, 8)
    with torch.no_grad():
        assert packed.bfloat16()(images.bfloat16()).dtype == torch.bfloat16


def test_dropped_pages_are_read_again(tmp_path):
    torch.save({"w": torch.arange(1_000_000.0)}, tmp_path / "w.pt")
    mapped = torch.load(tmp_path / "w.pt", mmap=True)["w"]
    owned = torch.arange(1_000_000.0)
    for tensor in (mapped, owned):
        drop_pages(tensor.data_ptr(), tensor.nbytes)
        assert torch.equal(tensor, torch.arange(1_000_000.0))


def test_large_images_are_not_packed(monkeypatch):
    """Winograd's algorithm takes the weight as it is, and a small image packs it after all."""
    plain = nn.Conv2d(512, 512, 3, padding=1)
    packed = nn.Sequential(copy.deepcopy(plain))
    optimize_for_cpu(packed, pack_weights=True)
    same(plain, packed[0], 1, 512, 32, 32)
    assert packed[0].packed is None
    same(plain, packed[0], 1, 512, 4, 4)
    assert packed[0].packed is not None


def test_swapped_networks_keep_names_copy_and_pickle(randomise):
    network = randomise(UNetModel(model_channels=32, channel_mult=[1, 2], num_heads=2, context_dim=16)).eval()
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([3.0]), torch.randn(1, 5, 16))
    names, expected = list(network.state_dict()), network(*inputs)
    optimize_for_cpu(network, pack_weights=True)
    with torch.no_grad():
        found = [each(*inputs) for each in (network, copy.deepcopy(network), pickle.loads(pickle.dumps(network)))]
    for output in found:
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    plain = [module for module in network.modules() if type(module) in (nn.Conv2d, nn.Linear)]
    assert list(network.state_dict()) == names and not plain


def test_importing_under_the_meta_device_makes_no_meta_constants():
    """The first import may come while a network is built without weights."""
    code = (
        "import torch\n"
        "with torch.device('meta'):\n"
        "    from latentsmith.cpu.convolution import WinogradConvolution, kernel_transform\n"
        "    assert kernel_transform().device.type == 'cpu'\n"
        "out = WinogradConvolution.apply(torch.ones(1, 2, 4, 4), torch.ones(3, 2, 3, 3), None)\n"
        "assert out[0, 0, 1, 1] == 18"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
