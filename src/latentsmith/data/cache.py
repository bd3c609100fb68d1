"""The latent cache: what frozen encoders make of a set, computed once, in shards that training reads without copying.

Members of each sample: `image_encoded.npy`, the VAE's moments `(2 * z, height / f, width / f)`, unscaled float16;
`captions_encoded.npy`, the text embedding `(length, width)`, float16; `txt` and `json` as in the source. A part that is
not encoded keeps the source's own member. `cache.json` says what made it, `empty_prompt.npy` is the embedding of "".
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from latentsmith.data.errors import BadSample
from latentsmith.data.images import Transforms
from latentsmith.data.order import sample_seed
from latentsmith.data.shards import Sample, Shard, ShardRecord, ShardSet, ShardWriter
from latentsmith.data.sources import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS
from latentsmith.data.work_folder import WorkFolder, first_difference, full_disk_reported
from latentsmith.files.atomic import atomic_open, write_text
from latentsmith.files.errors import BadInput

CACHE_FILE = "cache.json"
EMPTY_PROMPT_FILE = "empty_prompt.npy"
IMAGE_KEY = "image_encoded"
CAPTION_KEY = "captions_encoded"
MAGIC = b"\x93NUMPY\x01\x00"

EncodeImages = Callable[
    [np.ndarray], np.ndarray
]  # (batch, 3, height, width) in [-1, 1] -> moments (batch, 2 * z, h, w)
EncodeCaptions = Callable[[list[str]], np.ndarray]  # captions -> (batch, length, width)
Progress = Callable[[int, int], None]  # samples done, samples in the set


@dataclass(frozen=True)
class Encoders:
    """The frozen networks as plain functions, and what names them.

    images: (batch, 3, height, width), float32 in [-1, 1] -> moments (batch, 2 * z, height / f, width / f); None leaves
    the pictures as they are. captions: a list of texts -> (batch, length, width); None leaves the texts.
    fingerprints: recorded and compared, e.g. "vae", "text_encoder", "layer", "tokenizer". versions: recorded only.
    """

    images: EncodeImages | None
    captions: EncodeCaptions | None
    fingerprints: Mapping[str, Any]
    versions: Mapping[str, str]


def write_cache(
    source: ShardSet,
    out: str | os.PathLike,
    transforms: Transforms,
    encoders: Encoders,
    *,
    batch_size: int = 8,
    seed: int = 0,
    rank: int = 0,
    processes: int = 1,
    progress: Progress | None = None,
) -> "LatentCache | None":
    """Encode every sample of `source` into the folder `out`, one shard for each of the source's.

    Each shard is renamed into place when complete; run again after an interruption, the shards that are done stay.
    seed: for random transforms, addressed by the sample's index in the source. Of several processes each encodes every
    `processes`-th shard, from number `rank` on, and waits for none: the one that finds all shards done finishes the
    folder; the others return None, as all do if one was lost, until they are run again. BadInput if `out` holds another
    cache, a source sample can no longer be decoded (shard and key named), or an encoding is not finite in float16.
    """
    recipe = {
        "command": "precache",
        "fingerprints": {
            **encoders.fingerprints,
            "transforms": transforms.describe(),
            "source": source.fingerprint(),
        },
        "encoded": [key for key, encode in ((IMAGE_KEY, encoders.images), (CAPTION_KEY, encoders.captions)) if encode],
        "seed": seed if transforms.is_random else None,
    }
    work = WorkFolder(out, recipe, shared=processes > 1)
    if not work.is_finished:
        with full_disk_reported(out):
            writer = _CacheWriter(source, work, transforms, encoders, batch_size, seed)
            writer.fill(rank, processes, progress)
            if not writer.finish():
                return None
    return LatentCache(out)


class LatentCache:
    """A finished cache, opened for reading; BadInput if `folder` is none.

    `info` is the content of cache.json. `empty_prompt`: (length, width), None if captions were not encoded.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.shards = ShardSet(self.folder)  # first, since it refuses an unfinished folder
        self.info = _read_info(self.folder)
        self.empty_prompt = _read_empty_prompt(self.folder) if CAPTION_KEY in self.encoded else None

    @property
    def encoded(self) -> list[str]:
        """The names of the encoded members: "image_encoded", "captions_encoded" or both."""
        return list(self.info["members"])

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The encoded members of one sample by name, float16 views of the mapped file, read-only."""
        shard, number = self.shards.locate(index)
        return {name: read_array(self.shards.shard(shard), number, name) for name in self.encoded}

    def read_batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """The encoded members of several samples, stacked: `(batch, ...)` float16 for each name. ValueError if the
        samples' shapes differ."""
        samples = [self[index] for index in np.asarray(indices).tolist()]
        return {name: np.stack([sample[name] for sample in samples]) for name in self.encoded}

    def caption(self, index: int) -> str:
        """The caption's text."""
        shard, number = self.shards.locate(index)
        return caption_of(self.shards.shard(shard), self.shards.shard(shard)[number])

    def check(self, expected: Mapping[str, Any]) -> None:
        """Refuse the cache, with BadInput naming the difference, if something stated in `expected` did not make it.

        expected: fingerprints by the names that `write_cache` was given, and "transforms", "source"; None means not
        stated, not compared.
        """
        stated = {name: value for name, value in json.loads(json.dumps(expected)).items() if value is not None}
        recorded = {name: self.info["fingerprints"].get(name) for name in stated}
        difference = first_difference(recorded, stated)
        if difference:
            name, made_with, wanted = difference
            fix = "run precache again with this config, or use the config that made the cache"
            raise BadInput(f"{self.folder}: made with {name} {made_with!r}, but this run has {wanted!r}; {fix}")

    def check_shapes(self, latent_channels: int | None = None, context_dim: int | None = None) -> None:
        """Refuse the cache, with BadInput, if its shapes do not fit a U-Net with these in_channels and context_dim."""
        for name, axis, wanted, key in (
            (IMAGE_KEY, 0, latent_channels and 2 * latent_channels, "in_channels"),
            (CAPTION_KEY, 1, context_dim, "context_dim"),
        ):
            shape = self.info["members"].get(name, {}).get("shape")
            if shape and wanted is not None and shape[axis] != wanted:
                what = f"{name} has shape {tuple(shape)}, and unet_config.{key} wants {wanted} at axis {axis}"
                raise BadInput(f"{self.folder}: {what}; change the U-Net, or precache with its VAE and text encoder")


class _CacheWriter:
    """A cache being written."""

    def __init__(
        self, source, work: WorkFolder, transforms: Transforms, encoders: Encoders, batch_size: int, seed: int
    ):
        self.source, self.work, self.transforms, self.encoders = source, work, transforms, encoders
        self.batch_size, self.seed = batch_size, seed

    def fill(self, rank: int, processes: int, progress: Progress | None) -> None:
        """Encode the shards of one process that are not done yet. Progress is told over all processes, as far as their
        shards are done."""
        if self.encoders.captions and rank == 0:
            self._write_empty_prompt(self.encoders.captions)
        counts = self.source.counts
        firsts = [0, *accumulate(counts)]
        mine = range(rank, len(counts), processes)
        for number in mine:
            if self.work.is_whole:  # another process has just finished it
                return
            done = self.work.done_numbers()
            told = sum(counts[other] for other in done - {number})
            if number not in done:
                self._write_shard(number, firsts[number], told, progress)
            if progress:
                progress(told + counts[number], len(self.source))

    def finish(self) -> bool:
        """Make the folder a cache, if all shards are done and no other process does so; returns whether it did."""
        every = [self.work.done(number) for number in range(len(self.source.counts))]
        if not all(every) or not self.work.claim_finish():
            return False
        if self.encoders.captions:
            self._write_empty_prompt(self.encoders.captions)
        shapes: dict[str, list[int | None]] = {}
        for done in every:
            shapes = merged_shapes(shapes, done["shapes"])  # type: ignore[index]
        self._write_info(shapes, len(self.source))
        self.work.finish([ShardRecord(**done["shard"]) for done in every])  # type: ignore[index]
        return True

    def _write_shard(self, number: int, first: int, told: int, progress: Progress | None) -> None:
        """Encode one shard, whose first sample is number `first` of the set; `told`: samples done before, of all."""
        shapes: dict[str, list[int | None]] = {}
        shard = self.source.shard(number)
        written = told
        with ShardWriter(self.work.folder, len(shard) + 1, start=number) as writer:
            for batch in self._batches(shard, first):
                for sample, arrays in self._encode(shard, batch):
                    writer.write(sample.key.replace(".", "_"), self._members(sample, arrays))
                    shapes = merged_shapes(shapes, {name: list(array.shape) for name, array in arrays.items()})
                written += len(batch)
                if progress:
                    progress(written, len(self.source))
        self.work.record(number, writer.finished[0], shapes=shapes)

    def _batches(self, shard: Shard, first: int) -> Iterator[list[tuple[Sample, np.ndarray | None]]]:
        """Samples with their transformed pictures, in batches of one shape."""
        loaded = ((shard[i], self._picture(shard, i, first + i)) for i in range(len(shard)))
        for _, run in groupby(loaded, key=lambda pair: pair[1].shape if pair[1] is not None else None):
            while batch := list(islice(run, self.batch_size)):
                yield batch

    def _picture(self, shard: Shard, number: int, index: int) -> np.ndarray | None:
        if not self.encoders.images:
            return None
        try:
            return self.transforms.decode(image_member(shard[number])[1], sample_seed(self.seed, index))
        except BadSample as error:
            raise BadInput(f"{shard.path}: sample {shard.key(number)!r}: {error}; import the set again") from None

    def _encode(self, shard: Shard, batch) -> Iterator[tuple[Sample, dict[str, np.ndarray]]]:
        samples = [sample for sample, _ in batch]
        encoded = {}
        if self.encoders.images:
            encoded[IMAGE_KEY] = self.encoders.images(np.stack([picture for _, picture in batch]))
        if self.encoders.captions:
            encoded[CAPTION_KEY] = self.encoders.captions([caption_of(shard, sample) for sample in samples])
        for number, sample in enumerate(samples):
            yield (
                sample,
                {name: to_float16(rows[number], f"{shard.path}: {sample.key}") for name, rows in encoded.items()},
            )

    def _members(self, sample: Sample, arrays: Mapping[str, np.ndarray]) -> dict[str, bytes]:
        members = {f"{name}.npy": npy_bytes(array) for name, array in arrays.items()}
        if not self.encoders.images:
            extension, data = image_member(sample)
            members[extension] = bytes(data)
        kept = (name for name in (*CAPTION_EXTENSIONS, "json") if name in sample.members)
        return members | {name: bytes(sample.members[name]) for name in kept}

    def _write_empty_prompt(self, encode: EncodeCaptions) -> None:
        with atomic_open(self.work.folder / EMPTY_PROMPT_FILE) as file:
            file.write(npy_bytes(to_float16(encode([""])[0], "the empty prompt")))

    def _write_info(self, shapes: Mapping[str, list[int | None]], samples: int) -> None:
        info = {
            "format": "latentsmith-cache-1",
            "samples": samples,
            "latents": "unscaled moments: mean, then log variance",
            "members": {name: {"shape": shape, "dtype": "float16"} for name, shape in shapes.items()},
            "fingerprints": self.work.recipe["fingerprints"],
            "seed": self.work.recipe["seed"],
            "versions": {**self.encoders.versions, "numpy": np.__version__},
        }
        write_text(self.work.folder / CACHE_FILE, json.dumps(info, indent=1) + "\n")


def read_array(shard: Shard, number: int, name: str) -> np.ndarray:
    """The member `NAME.npy` of a sample as a read-only view of the mapped tar; BadInput if it is not such an array."""
    offset, _ = shard.span(number, f"{name}.npy")
    head = shard.bytes[offset : offset + 10]
    data_at = offset + 10 + int.from_bytes(head[8:], "little")
    try:
        dtype, shape = parsed_header(shard.bytes[offset:data_at])
        return np.frombuffer(shard.bytes, dtype, int(np.prod(shape)), data_at).reshape(shape)
    except ValueError as error:
        raise BadInput(f"{shard.path}: {shard.key(number)}.{name}.npy is not a plain array ({error})") from None


def parsed_header(header: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    """dtype and shape from the header of a .npy file; ValueError if it is none, or of Fortran order or objects."""
    if header not in _HEADERS:
        if header[:8] != MAGIC:
            raise ValueError("no .npy header of version 1")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(BytesIO(header[8:]))
        if fortran or dtype.hasobject:
            raise ValueError("Fortran order or Python objects")
        _HEADERS[header] = dtype, shape
    return _HEADERS[header]


_HEADERS: dict[bytes, tuple[np.dtype, tuple[int, ...]]] = {}  # a cache has one header per shape: each is parsed once


def npy_bytes(array: np.ndarray) -> bytes:
    """An array as the bytes of a .npy file."""
    buffer = BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def to_float16(values: Any, what: str) -> np.ndarray:
    """Values as float16; BadInput, naming `what`, if one is not finite or over 65,504."""
    with np.errstate(over="ignore"):
        array = np.asarray(values, dtype=np.float16)
    if not np.isfinite(array).all():
        raise BadInput(f"{what}: its encoding is not finite in float16; check the encoder's weights and precision")
    return array


def merged_shapes(
    known: Mapping[str, Sequence[int | None]], new: Mapping[str, Sequence[int | None]]
) -> dict[str, list[int | None]]:
    """The shape of each member over all samples, None at an axis where they differ."""
    merged = {name: list(shape) for name, shape in known.items()}
    for name, shape in new.items():
        before = merged.get(name, shape)
        merged[name] = [old if old == now else None for old, now in zip(before, shape, strict=True)]
    return merged


def image_member(sample: Sample) -> tuple[str, memoryview]:
    """Extension and bytes of a sample's picture. Raises BadSample if it has none."""
    for extension in IMAGE_EXTENSIONS:
        if extension in sample.members:
            return extension, sample.members[extension]
    raise BadSample("missing image", f"members {', '.join(sample.members)}, none an image")


def caption_of(shard: Shard, sample: Sample) -> str:
    """A sample's caption; BadInput, naming shard and key, if it has none."""
    for extension in CAPTION_EXTENSIONS:
        if extension in sample.members:
            return sample.text(extension)
    raise BadInput(f"{shard.path}: sample {sample.key!r} has no .txt caption; import the set first")


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / CACHE_FILE
    try:
        info = json.loads(path.read_text("utf-8"))
        is_ours = {"members", "fingerprints", "samples"} <= info.keys()
    except FileNotFoundError:
        raise BadInput(
            f"{folder}: no {CACHE_FILE} here, so this is not a latent cache; make one with precache"
        ) from None
    except (ValueError, AttributeError):
        is_ours = False
    if not is_ours:
        raise BadInput(f"{path}: not the JSON that precache writes; delete the cache and make it again")
    return info


def _read_empty_prompt(folder: Path) -> np.ndarray:
    path = folder / EMPTY_PROMPT_FILE
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"{path}: the empty prompt's embedding cannot be read ({error}); precache again") from None
