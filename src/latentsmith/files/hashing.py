"""Hash weights, files and texts: equal content gives equal fingerprints, whatever file it came from."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from threading import Event

    from torch import Tensor

DIGEST_BYTES = 16  # blake2b: 128 bits tell any two files apart by accident; they guard against mistakes, not attackers


def fingerprint_tensors(tensors: Mapping[str, "Tensor"]) -> str:
    """Return the hex fingerprint of named tensors: names in sorted order, shapes and values as little-endian float32.

    Order, memory layout, device, file format, and a dtype that float32 holds exactly make no difference.
    One tensor at a time is in memory as float32.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name in sorted(tensors):
        values = tensors[name].detach().float().cpu().contiguous().numpy().astype("<f4", copy=False)
        digest.update(f"{name} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).data)
    return digest.hexdigest()


def fingerprint_text(text: str) -> str:
    """Return the hex fingerprint of a text."""
    return fingerprint_bytes(text.encode("utf-8", "surrogatepass"))


def fingerprint_bytes(data: bytes | memoryview) -> str:
    """Return the hex fingerprint of bytes, which is that of a file that holds them."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).hexdigest()


def sha256_files(paths: Iterable[str | os.PathLike[str]], stop: "Event | None" = None) -> str:
    """Return the SHA-256 in hex of one file, as model sites list it, or of several files' bytes in a row.

    stop: ends it early, with no meaning, once it is set.
    """
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while (piece := file.read(1 << 20)) and not (stop and stop.is_set()):
                digest.update(piece)
    return digest.hexdigest()


def hash_file(path: str | os.PathLike[str]) -> str:
    """Return the hex fingerprint of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hash_stream(file)


def changed_files(folder: Path, checksums: Mapping[str, str], report: Callable[[int, int], None]) -> list[str]:
    """Hash the named files of a folder and return a line for each that is missing or differs from its checksum.

    report: called with how many files are done, of how many.
    """
    changed = []
    for done, (name, checksum) in enumerate(checksums.items(), 1):
        file = folder / name
        if not file.is_file():
            changed.append(f"{file}: missing")
        elif hash_file(file) != checksum:
            changed.append(f"{file}: not as it was written")
        report(done, len(checksums))
    return changed


def hash_stream(file: BinaryIO) -> str:
    """Return the hex fingerprint of what is left of an open file."""
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).hexdigest()  # type: ignore
