"""Read NeMo's `.nemo` archives (tar, plain or gzip) without unpacking them and without trusting a member's name."""

import gzip
import re
import shutil
import tarfile
import tempfile
import zlib
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from .errors import BadInput
from .regular import CONFIG, open_regular, read_regular
from .tensors import TensorFile, tensors_of
from .torch_zip import read_torch_zip

MAX_MEMBERS = 10_000
MAX_BYTES = 64 * 2**30  # unpacked; the largest full NeMo checkpoint of an SD model is below 20 GiB
MAX_RATIO = 200  # gzip of real weights gains 10 %; a bomb gains 1000-fold
CHUNK = 2**20


def is_archive(path: Path) -> bool:
    """Return whether a file is a tar or a gzipped one, by content."""
    with open_regular(path) as file:
        start = file.read(512)
    return start[257:262] == b"ustar" or start[:2] == b"\x1f\x8b"


def open_nemo(path: Path) -> tuple[TensorFile, dict[str, Any]]:
    """Open the weights and the model config of a `.nemo` file or an unpacked one; a plain tar is mapped in place.

    Raises BadInput for unsafe members (absolute, `..`, links, devices), too many or too large ones, damaged archives
    and sharded or distributed weights.
    """
    if path.is_dir():
        config = _parse_config(path, read_regular(path / "model_config.yaml", CONFIG))
        _refuse_shards(path, [file.relative_to(path).as_posix() for file in path.rglob("*.ckpt")])
        return tensors_of(path, read_torch_zip(path / "model_weights.ckpt")), config
    plain = _decompressed(path)
    members = safe_members(path, plain)
    _refuse_shards(path, list(members))
    config = _parse_config(path, _config_bytes(path, plain, members))
    weights = members["model_weights.ckpt"]
    return tensors_of(path, read_torch_zip(plain, weights.offset_data, weights.size)), config


def safe_members(path: Path, plain: Path) -> dict[str, tarfile.TarInfo]:
    """Return the regular members of the tar `plain` by name (without `./`), once every member proved harmless.

    path: what to call the archive in errors.
    """
    members: dict[str, tarfile.TarInfo] = {}
    size = plain.stat().st_size
    try:
        with open_regular(plain) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for count, member in enumerate(archive):
                _check_member(path, member, count, size)
                members[str(PurePosixPath(member.name))] = member
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        raise BadInput(f"{path}: truncated or damaged archive ({error}); fetch or copy it again") from None
    return {name: member for name, member in members.items() if member.isreg()}


def _check_member(path: Path, member: tarfile.TarInfo, count: int, size: int) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\\" in member.name or re.match(r"[A-Za-z]:", member.name):
        raise BadInput(f'{path}: refused, member "{member.name}" points outside the archive')
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise BadInput(f'{path}: refused, member "{member.name}" is a link, device or sparse file')
    if count >= MAX_MEMBERS:
        raise BadInput(f"{path}: refused, more than {MAX_MEMBERS:,} members")
    if member.offset_data + member.size > size:
        raise BadInput(f'{path}: truncated: member "{member.name}" ends after the file does; fetch or copy it again')


def _config_bytes(path: Path, plain: Path, members: dict[str, tarfile.TarInfo]) -> bytes:
    for name in ("model_config.yaml", "model_weights.ckpt"):
        if name not in members:
            raise BadInput(f"{path}: no {name} inside; not a .nemo archive")
    config = members["model_config.yaml"]
    if config.size > CONFIG.size:
        raise BadInput(f"{path}: refused, its model_config.yaml has {config.size:,} bytes")
    with open_regular(plain) as file:
        file.seek(config.offset_data)
        return file.read(config.size)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with OmegaConf's rule of what is a number: 1e-5 and 1e0 are, not only 1.0e-5."""


EXPONENT = re.compile(r"[-+]?\d[\d_]*[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789"))


def _parse_config(path: Path, text: bytes) -> dict[str, Any]:
    # safe_load expands aliases by reference, but they are all that can nest a small file into a large one.
    if text.count(b"*") > 1000:
        raise BadInput(f"{path}: refused, its model_config.yaml is full of aliases")
    try:
        config = yaml.load(text, _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"{path}: its model_config.yaml is no YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(config, dict):
        raise BadInput(f"{path}: its model_config.yaml holds no mapping")
    return config


def _refuse_shards(path: Path, names: list[str]) -> None:
    if any(re.match(r"(mp_rank_|tp_rank_)\d+", name) for name in names):
        raise BadInput(f"{path}: weights are split over tensor-parallel ranks; merge them in NeMo first")
    if any(name.startswith("model_weights/") for name in names):
        raise BadInput(f"{path}: a distributed megatron-core checkpoint; save it as one file in NeMo first")


def _decompressed(path: Path) -> Path:
    with open_regular(path) as file:
        if file.read(2) != b"\x1f\x8b":
            return path
    stat = path.stat()
    return Path(_unpacked(path, stat.st_size, stat.st_mtime_ns).name)


@lru_cache(maxsize=2)
def _unpacked(path: Path, size: int, _modified: int) -> Any:
    """Unpack a gzipped archive into a temporary file that goes with the process."""
    limit = min(MAX_BYTES, MAX_RATIO * size + 64 * CHUNK)
    unpacked = tempfile.NamedTemporaryFile(suffix=".tar")  # noqa: SIM115  (lives as long as tensors may be read)
    try:
        with open_regular(path) as file, gzip.open(file) as packed:
            while chunk := packed.read(CHUNK):
                unpacked.write(chunk)
                if unpacked.tell() > limit:
                    raise BadInput(f"{path}: refused, unpacks to more than {limit:,} bytes from {size:,}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadInput(f"{path}: truncated or damaged archive ({error}); fetch or copy it again") from None
    except OSError as error:
        free = shutil.disk_usage(tempfile.gettempdir()).free
        raise BadInput(
            f"{path}: cannot be unpacked into {tempfile.gettempdir()}, {free:,} bytes free ({error})"
        ) from None
    unpacked.flush()
    return unpacked
