"""`open_tensors` and `save_safetensors` against torch's and safetensors' own readers and writers."""

import json
import struct

import pytest
import safetensors.torch
import torch

from latentsmith.files.errors import BadInput
from latentsmith.files.lazy import LazyTensor
from latentsmith.files.tensors import open_tensors, save_safetensors


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "b": torch.randn(3, 5), "a": torch.randn(7).half(), "c": torch.randn(2, 2).bfloat16(),
        "d": torch.randn(3).double(), "e": torch.arange(5), "f": torch.ones(3, dtype=torch.bool),
        "g": torch.tensor(2.5), "h": torch.empty(0, 4), "i": torch.arange(3, dtype=torch.uint8),
        "j": torch.arange(3, dtype=torch.int32), "k": torch.arange(5, dtype=torch.int16),
        "l": torch.randn(3).to(torch.float8_e4m3fn),
    }  # fmt: skip


def same(left, right):
    as_bytes = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*as_bytes)


def test_written_bytes_are_the_librarys(tmp_path, tensors):
    """Of tensors of equal width, which the library puts in an order of its own, only one dtype."""
    tensors = {name: tensors[name] for name in "abdfghkc" if tensors[name].dtype != torch.bfloat16}
    save_safetensors(tmp_path / "ours.safetensors", tensors, {"format": "pt"})
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.parametrize("container", ["safetensors", "ckpt", "flat.bin"])
def test_read_back(tmp_path, tensors, container):
    path = tmp_path / f"file.{container}"
    if container == "safetensors":
        safetensors.torch.save_file(tensors, path, {"note": "x"})
    else:
        torch.save({"state_dict": tensors, "global_step": 9} if container == "ckpt" else tensors, path)
    file = open_tensors(path)
    assert set(file) == set(tensors) and len(file) == len(tensors)
    assert all(same(file[name], tensor) for name, tensor in tensors.items())
    assert all(file.entries[name].shape == tuple(tensor.shape) for name, tensor in tensors.items())
    assert file.metadata == ({"note": "x"} if container == "safetensors" else {})
    assert file.extras == ({"global_step": 9} if container == "ckpt" else {})


def test_channels_last_lazy_and_aliased_tensors_are_written(tmp_path):
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    lazy = LazyTensor(torch.float16, (4, 3, 2, 2), lambda: weight.half())
    names = []
    save_safetensors(tmp_path / "x.safetensors", {"a": weight, "b": lazy, "c": weight}, written=names.append)
    back = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert torch.equal(back["a"], weight) and torch.equal(back["b"], weight.half()) and torch.equal(back["c"], weight)
    assert sorted(names) == ["a", "b", "c"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_safetensors(path, {"a": torch.ones(3)})

    def fails():
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        save_safetensors(path, {"a": torch.zeros(3), "b": LazyTensor(torch.float32, (3,), fails)})
    assert torch.equal(open_tensors(path)["a"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_sharded(tmp_path, tensors):
    names = sorted(tensors)
    halves = {"s-1.safetensors": names[:6], "s-2.safetensors": names[6:]}
    for shard, held in halves.items():
        safetensors.torch.save_file({name: tensors[name] for name in held}, tmp_path / shard)
    index = tmp_path / "s.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: shard for shard, held in halves.items() for name in held}}))
    file = open_tensors(index)
    assert set(file) == set(tensors) and all(same(file[name], tensors[name]) for name in tensors)
    (tmp_path / "s-2.safetensors").unlink()
    with pytest.raises(BadInput, match=r"s-2\.safetensors: no such file"):
        open_tensors(index)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", 3])
def test_shards_stay_beside_the_index(tmp_path, shard):
    index = tmp_path / "s.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(BadInput, match="must be a plain file name"):
        open_tensors(index)


def header(table, data=b""):
    text = json.dumps(table).encode() if isinstance(table, dict) else table
    return struct.pack("<Q", len(text)) + text + data


ROW = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(("content", "message"), [
    (b"", r"is empty \(0 bytes\)"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    (b"<!DOCTYPE html><html></html>", "is a web page"),
    (b"\x80\x02}q\x00.", "from before version 1.6"),
    (b"\x1f\x8b" + bytes(100), "is an archive"),
    (b"hello, world, this is no tensor", "is neither safetensors nor a torch file"),
    (struct.pack("<Q", 10**15) + b"{", "damaged or truncated safetensors file of"),
    (struct.pack("<Q", 50) + b"{}", "damaged or truncated safetensors file of"),
    (header(b"{nonsense"), "damaged or truncated safetensors file of"),
    (header(b"{" * 20_000), "damaged or truncated safetensors file of"),
    (header({"a": ROW | {"dtype": "F7"}}, bytes(8)), "damaged or truncated safetensors file of"),
    (header({"a": ROW, "b": ROW}, bytes(8)), "damaged or truncated safetensors file of"),
    (header({"a": ROW | {"shape": [10**9, 10**9]}}, bytes(8)), "damaged or truncated safetensors file of"),
    (header({"a": ROW | {"shape": [-2]}}, bytes(8)), "damaged or truncated safetensors file of"),
    (header({"a": ROW}, bytes(4)), "damaged or truncated safetensors file of"),
    (header({"a": ROW}, bytes(12)), "damaged or truncated safetensors file of"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_bad_files_are_one_line(tmp_path, content, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message) as error:
        open_tensors(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_missing_folder_and_foreign_objects(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        open_tensors(tmp_path / "none.safetensors")
    with pytest.raises(BadInput, match="is a folder"):
        open_tensors(tmp_path)
    torch.save([1, 2], tmp_path / "list.bin")
    with pytest.raises(BadInput, match="holds a list, not a dictionary"):
        open_tensors(tmp_path / "list.bin")
    torch.save({"state_dict": {"a": 1}}, tmp_path / "none.bin")
    with pytest.raises(BadInput, match="holds no tensors"):
        open_tensors(tmp_path / "none.bin")


def test_safetensors_refuses_what_it_cannot_hold(tmp_path):
    with pytest.raises(BadInput, match="which safetensors cannot hold"):
        save_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(2, dtype=torch.complex128)})
