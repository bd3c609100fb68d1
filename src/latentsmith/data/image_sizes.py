"""The size of every picture of a set, read from the headers of its files once and kept beside each tar."""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from latentsmith.files.atomic import atomic_open
from latentsmith.files.errors import BadInput
from latentsmith.files.images import open_image

from .images import UPRIGHT, orientation_of
from .sample_io import image_member
from .shards import Shard, ShardSet

SIDEWAYS = {value for value in UPRIGHT if value >= 5}  # orientations that swap height and width


def image_sizes(shards: ShardSet, progress: Callable[[int, int], None] | None = None) -> np.ndarray:
    """(samples, 2) uint32, height and width of each upright picture. BadInput, naming tar and key, if one has none."""
    sizes = np.empty((len(shards), 2), np.uint32)
    done = 0
    for number, count in enumerate(shards.counts):
        sizes[done : done + count] = sizes_of(shards.shard(number), shards.records[number] is not None)
        done += count
        if progress:
            progress(done, len(shards))
    return sizes


def sizes_path(tar: Path) -> Path:
    """Where the sizes of the pictures in `shard-000000.tar` lie: `shard-000000.sizes.npy`."""
    return tar.with_suffix(".sizes.npy")


def sizes_of(shard: Shard, imported: bool) -> np.ndarray:
    """The sizes of one shard. The file's first row is a digest of the tar's index, by which a stale one is known."""
    mark = np.frombuffer(hashlib.blake2b(shard.index.tobytes(), digest_size=8).digest(), np.uint32)[None]
    with suppress(OSError, ValueError, EOFError):
        stored = np.load(sizes_path(shard.path), allow_pickle=False)
        if stored.shape == (len(shard) + 1, 2) and (stored[:1] == mark).all():
            return stored[1:]
    sizes = np.array([_size(shard, number, imported) for number in range(len(shard))], np.uint32)
    with suppress(OSError), atomic_open(sizes_path(shard.path)) as file:  # a read-only folder: read again next time
        np.save(file, np.concatenate([mark, sizes]))
    return sizes


def _size(shard: Shard, number: int, imported: bool) -> tuple[int, int]:
    sample = shard[number]
    if imported and "json" in sample.members:  # which our own import wrote
        known = json.loads(bytes(sample.members["json"]))
        if "height" in known:
            return known["height"], known["width"]
    try:
        with open_image(image_member(sample)[1]) as image:
            width, height = image.size
            return (width, height) if orientation_of(image) in SIDEWAYS else (height, width)
    except BadInput as error:  # BadSample if there is none, BadImage if it cannot be opened
        raise BadInput(f"{sample}: no image ({error}); import the set first") from None
