"""The size of every image of a set, read from the headers of its files once and kept beside each tar."""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from latentsmith.files.colour import UPRIGHT, orientation_of
from latentsmith.files.errors import BadInput
from latentsmith.files.images import open_image

from .sample_io import image_member
from .shards import Shard, ShardSet
from .tar_index import load_beside, write_beside

SIDEWAYS = {value for value in UPRIGHT if value >= 5}  # orientations that swap height and width


SIZE = np.dtype([("height", "<u4"), ("width", "<u4")])


def image_sizes(shards: ShardSet, progress: Callable[[int, int], None] | None = None) -> np.ndarray:
    """Return (samples, 2) uint32, height and width of each upright image. Raises BadInput if one has none."""
    sizes = np.empty((len(shards), 2), np.uint32)
    done = 0
    for number, count in enumerate(shards.counts):
        sizes[done : done + count] = sizes_of(shards.shard(number), shards.records[number] is not None)
        done += count
        if progress:
            progress(done, len(shards))
    return sizes


def sizes_path(tar: Path) -> Path:
    """Return where the sizes of the images in `shard-000000.tar` lie: `shard-000000.sizes.npy`."""
    return tar.with_suffix(".sizes.npy")


def sizes_of(shard: Shard, imported: bool) -> np.ndarray:
    """Return (samples, 2) uint32, the sizes of one shard. imported: whether our import wrote the set.

    The file beside the tar has a first row that is a digest of the tar's index and checksum, or of its index and time
    of change, by which a stale one is found out.
    """
    state = shard.checksum or (shard.path.stat().st_mtime_ns if shard.path.exists() else "")
    digest = hashlib.blake2b(shard.index.tobytes() + str(state).encode(), digest_size=8).digest()
    stored = load_beside(sizes_path(shard.path), is_sizes)
    if stored is not None and len(stored) == len(shard) + 1 and stored[0].tobytes() == digest:
        return stored[1:].view(np.uint32).reshape(-1, 2)
    sizes = np.array([_size(shard, number, imported) for number in range(len(shard))], np.uint32)
    rows = np.concatenate([np.frombuffer(digest, SIZE), sizes.reshape(-1).view(SIZE)])
    with suppress(OSError):  # in a read-only folder they are read again next time
        write_beside(sizes_path(shard.path), rows, is_sizes)
    return sizes


def is_sizes(array: np.ndarray) -> bool:
    """Return whether an array beside a tar is ours."""
    return array.dtype == SIZE and array.ndim == 1


def _size(shard: Shard, number: int, imported: bool) -> tuple[int, int]:
    sample = shard[number]
    if imported and "json" in sample.members:  # which our own import wrote
        info = json.loads(bytes(sample.members["json"]))
        if "height" in info:
            return info["height"], info["width"]
    try:
        with open_image(image_member(sample)[1]) as image:
            width, height = image.size
            return (width, height) if orientation_of(image) in SIDEWAYS else (height, width)
    except BadInput as error:  # BadSample if there is none, BadImage if it cannot be opened
        raise BadInput(f"{sample}: no image ({error}); import the set first") from None
