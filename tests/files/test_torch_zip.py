"""Torch's own files read back equal; files made to run code, or to lie about sizes, are refused and run nothing."""

import io
import os
import pickle
import zipfile
from argparse import Namespace
from collections import OrderedDict

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from latentsmith.files.errors import BadInput
from latentsmith.files.lazy import LazyTensor
from latentsmith.files.torch_zip import Inert, read_torch_zip

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def saved(tmp_path, value, name="file.ckpt"):
    torch.save(value, tmp_path / name)
    return tmp_path / name


def with_pickle(tmp_path, payload, storages=None):
    """A torch zip around a hand-made pickle."""
    path = tmp_path / "made.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        for name, data in (storages or {}).items():
            archive.writestr(f"archive/data/{name}", data)
    return path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_layout_reads_back(tmp_path, dtype):
    base = torch.arange(24).reshape(2, 3, 4).to(dtype)
    views = {"whole": base, "transposed": base.transpose(0, 2), "slice": base[:, 1:, 2], "scalar": base[0, 0, 1]}
    loaded = read_torch_zip(saved(tmp_path, views))
    for name, view in views.items():
        assert (loaded[name].dtype, loaded[name].shape) == (dtype, tuple(view.shape))
        assert torch.equal(loaded[name].read(), view)


def test_parameters_channels_last_and_shared_storages(tmp_path):
    weight = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    loaded = read_torch_zip(saved(tmp_path, OrderedDict(a=weight, b=weight.data, c=torch.empty(0, 3))))
    assert torch.equal(loaded["a"].read(), weight) and torch.equal(loaded["b"].read(), weight)
    assert loaded["c"].read().shape == (0, 3)


def test_mapped_tensors_can_be_changed_without_changing_the_file(tmp_path):
    path = saved(tmp_path, {"a": torch.ones(1000)})
    read_torch_zip(path)["a"].read().zero_()
    assert torch.load(path)["a"].sum() == 1000


def test_state_dict_with_metadata_and_optimizer(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    loaded = read_torch_zip(saved(tmp_path, {"state_dict": model.state_dict(), "o": optimizer.state_dict(), "step": 7}))
    assert loaded["step"] == 7
    assert torch.equal(loaded["state_dict"]["weight"].read(), model.weight)
    assert isinstance(loaded["o"]["state"][0]["exp_avg"], LazyTensor)


def test_inert_objects_become_placeholders_that_keep_their_state(tmp_path):
    config = OmegaConf.create({"cfg": {"parameterization": "v", "sizes": [1, 2]}})
    value = {"hyper_parameters": config, "score": np.float64(0.5), "args": Namespace(a=1), "w": torch.ones(2)}
    loaded = read_torch_zip(saved(tmp_path, value))
    assert isinstance(loaded["hyper_parameters"], Inert) and "_content" in loaded["hyper_parameters"].state
    assert isinstance(loaded["score"], Inert) and isinstance(loaded["args"], Inert)
    assert torch.equal(loaded["w"].read(), torch.ones(2))


class Runs:
    """Runs a function when unpickled by a careless reader."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, os.mkdir, eval, exec], ids=lambda f: f.__name__)
def test_a_pickle_that_would_run_code_is_refused_and_did_not_run(tmp_path, function):
    marker = tmp_path / "ran"
    code = {"system": f"touch {marker}", "mkdir": str(marker)}.get(function.__name__, f"open({str(marker)!r}, 'w')")
    path = saved(tmp_path, {"w": torch.ones(2), "callbacks": Runs(function, code)})
    with pytest.raises(BadInput, match=rf"refused, its pickle names \w+\.{function.__name__},"):
        read_torch_zip(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the file does run for a careless reader
    assert marker.exists()


def test_inert_names_are_never_called(tmp_path):
    """`builtins.dict` and friends are on the list; what would call them only makes a placeholder."""
    loaded = read_torch_zip(saved(tmp_path, {"w": torch.ones(1), "x": Runs(dict, [("a", 1)])}))
    assert isinstance(loaded["x"], Inert)


@pytest.mark.parametrize("payload", [
    b"\x80\x02cos\nsystem\n.",
    b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    b"\x80\x02cbuiltins\ngetattr\n.",
    b"\x80\x02ctorch.hub\nload\n.",
    b"\x80\x02ctorch\nload\n.",
    b"(S'touch x'\nios\nsystem\n.",
], ids=["global", "stack_global", "getattr", "torch.hub", "torch.load", "inst"])  # fmt: skip
def test_hand_made_pickles_are_refused(tmp_path, payload):
    with pytest.raises(BadInput, match="refused, its pickle names"):
        read_torch_zip(with_pickle(tmp_path, payload))


@pytest.mark.parametrize("payload", [b"\x80\x02\x82\x01.", b"\x80\x02Nr\xff\xff\xff\x7f."], ids=["ext", "memo"])
def test_opcodes_that_bypass_or_exhaust_the_unpickler(tmp_path, payload):
    with pytest.raises(BadInput, match="as no file of weights or arrays does; refused"):
        read_torch_zip(with_pickle(tmp_path, payload))


@pytest.mark.parametrize("payload", [
    b"", b"\x80\x02", b"\x80\x02}", b"garbage", b"\x80\x02(X\x01\x00\x00\x00aQ.", b"\x80\x02K\x05Q.",
], ids=["empty", "start", "unfinished", "garbage", "persid", "intid"])  # fmt: skip
def test_broken_pickles_are_one_line(tmp_path, payload):
    with pytest.raises(BadInput) as error:
        read_torch_zip(with_pickle(tmp_path, payload))
    assert "\n" not in str(error.value) and "made.ckpt" in str(error.value)


class Lying(pickle.Pickler):
    def persistent_id(self, value):
        return value.pid if isinstance(value, Storage) else None


class Storage:
    def __init__(self, numel):
        self.pid = ("storage", torch.FloatStorage, "0", "cpu", numel)


@pytest.mark.parametrize(("numel", "shape", "stride", "message"), [
    (10**12, (4,), (1,), "missing or too short"),
    (4, (5,), (1,), "claims more than its data"),
    (4, (10**9,), (0,), "claims more than its data"),
    (4, (2, 2), (4, 1), "claims more than its data"),
    (4, (-1,), (1,), "bad tensor geometry"),
    (4, (2, 2), (1,), "bad tensor geometry"),
], ids=["storage", "shape", "expanded-bomb", "stride", "negative", "ranks"])  # fmt: skip
def test_tensors_that_lie_about_their_size(tmp_path, numel, shape, stride, message):
    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(numel), 0, shape, stride, False, OrderedDict())

    buffer = io.BytesIO()
    Lying(buffer, protocol=2).dump({"w": Tensor()})
    with pytest.raises(BadInput, match=message):
        read_torch_zip(with_pickle(tmp_path, buffer.getvalue(), {"0": bytes(16)}))


def test_compressed_members_are_refused(tmp_path):
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("archive/data/0", bytes(10_000_000))
    with pytest.raises(BadInput, match=r"is compressed, which torch\.save never does"):
        read_torch_zip(path)


def test_truncated_at_any_place(tmp_path):
    whole = saved(tmp_path, {"w": torch.ones(5000)}).read_bytes()
    cut = tmp_path / "cut.ckpt"
    for length in (10, 1000, len(whole) // 2, len(whole) - 30):
        cut.write_bytes(whole[:length])
        with pytest.raises(BadInput, match=r"cut\.ckpt: truncated or damaged"):
            read_torch_zip(cut)


def test_a_zip_that_is_not_torchs(tmp_path):
    path = tmp_path / "other.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(BadInput, match=r"not one written by torch\.save"):
        read_torch_zip(path)
