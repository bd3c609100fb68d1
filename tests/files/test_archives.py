"""`.nemo` archives: plain and gzipped ones open; unsafe and damaged ones are refused in one line."""

import gzip
import io
import tarfile

import pytest
import torch
import yaml

from latentsmith.files.archives import is_archive, open_nemo
from latentsmith.files.errors import BadInput

CONFIG = {"parameterization": "v", "unet_config": {"num_heads": 8}}


def nemo(path, members=None, extra=(), mode="w", config=None):
    """A .nemo at `path`. extra: TarInfos without content."""
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(6.0).reshape(2, 3)}, buffer)
    default = {
        "./model_config.yaml": config or yaml.safe_dump(CONFIG).encode(),
        "./model_weights.ckpt": buffer.getvalue(),
    }
    with tarfile.open(path, mode) as archive:
        for name, data in (default if members is None else members).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in extra:
            archive.addfile(info)
    return path


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_open(tmp_path, mode):
    path = nemo(tmp_path / "m.nemo", mode=mode)
    assert is_archive(path)
    file, config = open_nemo(path)
    assert config == CONFIG and torch.equal(file["a"], torch.arange(6.0).reshape(2, 3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.nemo"]


def test_unpacked_folder(tmp_path):
    with tarfile.open(nemo(tmp_path / "m.nemo")) as archive:
        archive.extractall(tmp_path / "folder", filter="data")
    file, config = open_nemo(tmp_path / "folder")
    assert config == CONFIG and list(file) == ["a"]


def member(name, member_type=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = member_type, link
    return info


@pytest.mark.parametrize(("info", "message"), [
    (member("/etc/passwd"), "points outside"),
    (member("../escape"), "points outside"),
    (member("a/../../escape"), "points outside"),
    (member("C:/windows"), "points outside"),
    (member("..\\escape"), "points outside"),
    (member("link", tarfile.SYMTYPE, "/etc/passwd"), "is a link, device"),
    (member("hard", tarfile.LNKTYPE, "./model_config.yaml"), "is a link, device"),
    (member("device", tarfile.CHRTYPE), "is a link, device"),
    (member("disk", tarfile.BLKTYPE), "is a link, device"),
    (member("pipe", tarfile.FIFOTYPE), "is a link, device"),
], ids=lambda value: getattr(value, "name", ""))  # fmt: skip
def test_unsafe_members_are_refused(tmp_path, info, message):
    with pytest.raises(BadInput, match=message) as error:
        open_nemo(nemo(tmp_path / "m.nemo", extra=[info]))
    assert info.name in str(error.value)


def test_pickled_code_inside_does_not_run(tmp_path):
    marker = tmp_path / "ran"

    class Runs:
        def __reduce__(self):
            return open, (str(marker), "w")

    buffer = io.BytesIO()
    torch.save({"a": Runs()}, buffer)
    path = nemo(tmp_path / "m.nemo", {"model_config.yaml": b"a: 1", "model_weights.ckpt": buffer.getvalue()})
    with pytest.raises(BadInput, match="refused, its pickle names"):
        open_nemo(path)
    assert not marker.exists()


def test_yaml_does_not_build_objects(tmp_path):
    marker = tmp_path / "ran"
    text = f"a: !!python/object/apply:os.mkdir [{marker}]".encode()
    with pytest.raises(BadInput, match="is no YAML"):
        open_nemo(nemo(tmp_path / "m.nemo", config=text))
    assert not marker.exists()


@pytest.mark.parametrize(("names", "message"), [
    (["./model_config.yaml", "./mp_rank_00/model_weights.ckpt"], "split over tensor-parallel ranks"),
    (["./model_config.yaml", "./tp_rank_00_pp_rank_000/model_weights.ckpt"], "split over tensor-parallel ranks"),
    (["./model_config.yaml", "./model_weights/metadata.json"], "distributed megatron-core checkpoint"),
    (["./model_config.yaml"], r"no model_weights\.ckpt inside"),
    (["./model_weights.ckpt"], r"no model_config\.yaml inside"),
])  # fmt: skip
def test_archives_of_other_kinds(tmp_path, names, message):
    with pytest.raises(BadInput, match=message):
        open_nemo(nemo(tmp_path / "m.nemo", {name: b"a: 1" for name in names}))


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_truncated(tmp_path, mode):
    whole = nemo(tmp_path / "m.nemo", mode=mode).read_bytes()
    content = len(whole.rstrip(b"\0"))  # tar pads with zeros
    for length in (content // 8, content // 4, content // 2, content - 20):
        (tmp_path / "cut.nemo").write_bytes(whole[:length])
        with pytest.raises(BadInput, match=r"cut\.nemo"):
            open_nemo(tmp_path / "cut.nemo")


def test_gzip_bomb(tmp_path):
    path = tmp_path / "bomb.nemo"
    with gzip.open(path, "wb") as file:
        for _ in range(400):
            file.write(bytes(2**20))
    with pytest.raises(BadInput, match="unpacks to more than"):
        open_nemo(path)


def test_yaml_alias_bomb(tmp_path):
    with pytest.raises(BadInput, match="full of aliases"):
        open_nemo(nemo(tmp_path / "m.nemo", config=b"a: &x 1\nb: [" + b"*x, " * 2000 + b"1]"))
