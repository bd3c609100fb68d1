"""Write a latent cache: frozen encoders run once over every sample of a set, shard by shard."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentsmith.files.atomic import atomic_open, write_text
from latentsmith.files.errors import BadInput

from .image_sizes import sizes_of
from .images import decode_image
from .latent_cache import (
    BUCKETS_FILE,
    CACHE_FILE,
    CAPTION_KEY,
    EMPTY_PROMPT_FILE,
    IMAGE_KEY,
    LatentCache,
    buckets_checksum,
    variant_name,
)
from .loader import no_worker_left, read_ahead
from .resumable_output import ResumableOutput, full_disk_reported, locked_output
from .sample_io import CAPTION_EXTENSIONS, blaming_sample, caption_of, image_member, npy_bytes, to_float16
from .shards import Sample, ShardRecord, ShardSet, ShardWriter
from .shuffle import sample_seed
from .transforms import Transforms

EncodeImages = Callable[
    [np.ndarray], np.ndarray
]  # (batch, 3, height, width) in [-1, 1] -> moments (batch, 2 * z, h, w)
EncodeCaptions = Callable[[list[str]], np.ndarray]  # captions -> (batch, length, width)
Progress = Callable[[int, int], None]  # samples done, samples in the set
Arrays = dict[str, np.ndarray]
WINDOW = 512  # samples that are sorted by their aspect buckets, so that batches of one size are full


@dataclass(frozen=True)
class Encoders:
    """The frozen networks as plain functions, and what names them.

    images: (batch, 3, height, width), float32 in [-1, 1] -> moments (batch, 2 * z, height / f, width / f); None leaves
    the images as they are. captions: a list of texts -> (batch, length, width); None leaves the texts.
    fingerprints: recorded and compared, e.g. "vae", "text_encoder", "layer", "tokenizer". versions: recorded only.
    """

    images: EncodeImages | None
    captions: EncodeCaptions | None
    fingerprints: Mapping[str, Any]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class CacheOptions:
    """Choice of what is kept of each sample.

    latents: "moments", from which training draws a fresh latent each time, or "mean", half as large. crops: random
    crops of each image, of which training takes one each time. flipped: each of them mirrored as well.
    share_captions: equal captions of a shard are encoded and stored once; another WebDataset reader then finds the
    embedding with the first of them only. BadInput for what the transforms cannot give.
    """

    latents: str = "moments"
    crops: int = 1
    flipped: bool = False
    share_captions: bool = False

    def check(self, transforms: Transforms, encoders: Encoders) -> None:
        if not encoders.images and (self.latents == "mean" or self.variants > 1):
            raise BadInput("model.data.cache.latents, crops and flipped are of images, and only captions are encoded")
        if not encoders.captions and self.share_captions:
            raise BadInput("model.data.cache.share_captions is of embeddings, and only images are encoded")
        keys = [key for key, *_ in transforms.describe()]
        if self.crops > 1 and "random_crop_h_w" not in keys:
            raise BadInput(f"model.data.cache.crops={self.crops}: all alike without augmentations.random_crop_h_w")
        if self.flipped and "horizontal_flip" not in keys:
            raise BadInput("model.data.cache.flipped=True: set model.data.train.augmentations.horizontal_flip=true")

    @property
    def variants(self) -> int:
        """Return encodings of each image: those of every crop, each followed by its mirror image's."""
        return self.crops * (2 if self.flipped else 1)


def write_cache(
    source: ShardSet,
    out: str | os.PathLike[str],
    transforms: Transforms,
    encoders: Encoders,
    *,
    options: CacheOptions | None = None,
    batch_size: int = 8,
    seed: int = 0,
    rank: int = 0,
    processes: int = 1,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> LatentCache | None:
    """Encode every sample of `source` into the folder `out`, one shard for each of the source's.

    Each shard is renamed into place when complete; run again after an interruption, the shards that are done stay.
    seed: for random transforms, addressed by the sample's index in the source. num_workers: processes that decode, so
    that the encoders do not wait. Of several processes each encodes every
    `processes`-th shard, from number `rank` on, and waits for none: the one that finds all shards done finishes the
    folder; the others return None, as all do if one was lost, until they are run again. BadInput if `out` holds another
    cache, a source sample can no longer be decoded (shard and key named), or an encoding is not finite in float16.
    """
    options = options or CacheOptions()
    options.check(transforms, encoders)
    recipe = {
        "command": "precache",
        "fingerprints": {
            **encoders.fingerprints,
            "transforms": transforms.describe(),
            "source": source.fingerprint(),
        },
        "encoded": [key for key, encode in ((IMAGE_KEY, encoders.images), (CAPTION_KEY, encoders.captions)) if encode],
        "options": asdict(options),
        "seed": seed if transforms.is_random else None,
    }
    with locked_output(Path(out), rank, processes), full_disk_reported(out):
        work = ResumableOutput(out, recipe, shared=processes > 1)
        if not work.is_finished:
            writer = _CacheWriter(source, work, transforms, encoders, options, batch_size, seed)
            writer.fill(rank, processes, num_workers, progress)
            if not writer.finish():
                return None
    return LatentCache(out)


class _CacheWriter:
    """A cache being written: images are read and decoded by workers, encoded here, and written shard by shard."""

    def __init__(
        self,
        source: ShardSet,
        work: ResumableOutput,
        transforms: Transforms,
        encoders: Encoders,
        options: CacheOptions,
        batch_size: int,
        seed: int,
    ):
        self.source, self.work, self.encoders, self.options = source, work, encoders, options
        self.transforms = transforms.unflipped() if options.flipped else transforms
        self.batch_size, self.seed = batch_size, seed
        self.buckets = transforms.buckets if encoders.images else None
        self.embedded: dict[str, np.ndarray] = {}  # by caption, of the shard in hand, where equal ones are shared

    def fill(self, rank: int, processes: int, num_workers: int, progress: Progress | None) -> None:
        """Encode the shards of one process that are not done yet. Progress counts the finished shards of all."""
        if self.encoders.captions and rank == 0:
            self._write_empty_prompt(self.encoders.captions)
        done = self.work.done_numbers()
        todo = [number for number in range(rank, len(self.source.counts), processes) if number not in done]
        with no_worker_left():
            batches = read_ahead(self._read, self._batches(todo), num_workers=num_workers)
            for number, batches_of_shard in groupby(batches, key=lambda batch: batch.shard):
                self._write_shard(number, batches_of_shard, progress)
        if progress and not todo:
            progress(self._samples_in(done), len(self.source))

    def finish(self) -> bool:
        """Make the folder a cache, if all shards are done and no other process does so; returns whether it did."""
        every = [done for number in range(len(self.source.counts)) if (done := self.work.done(number))]
        if len(every) < len(self.source.counts):
            return False
        with self.work.finishing() as is_mine:
            if is_mine and not self.work.is_whole:
                self._finish(every)
                return True
        return False

    def _finish(self, every: list[dict[str, Any]]) -> None:
        """Write what a cache has beside its shards. every: the records of all shards."""
        if self.encoders.captions:
            self._write_empty_prompt(self.encoders.captions)
        shapes: dict[str, list[int | None]] = {}
        for done in every:
            shapes = merged_shapes(shapes, done["shapes"])
        self._write_info(shapes, self._write_buckets(every) if self.buckets else {})
        self.work.finish([ShardRecord(**done["shard"]) for done in every])

    def _batches(self, shards: Iterable[int]) -> Iterator[tuple[int, list[int]]]:
        """Yield (shard, numbers of samples in it), each batch from one bucket; stop if another process has finished."""
        for shard in shards:
            if self.work.is_whole:
                return
            buckets = self._bucket_numbers(shard) or [0] * self.source.counts[shard]
            for start in range(0, len(buckets), WINDOW):
                window = range(start, min(start + WINDOW, len(buckets)))
                for _, alike in groupby(sorted(window, key=buckets.__getitem__), key=buckets.__getitem__):
                    yield from ((shard, batch) for batch in batched(alike, self.batch_size))

    def _bucket_numbers(self, shard: int) -> list[int] | None:
        if self.buckets is None:
            return None
        sizes = sizes_of(self.source.shard(shard), self.source.records[shard] is not None)
        return [int(number) for number in self.buckets.numbers_of(sizes)]

    def _read(self, batch: tuple[int, list[int]]) -> "_Decoded":
        """Read and decode a batch of samples; runs in the workers."""
        shard, numbers = self.source.shard(batch[0]), batch[1]
        first = sum(self.source.counts[: batch[0]])
        images: list[torch.Tensor] = []
        captions: list[str] = []
        for number in numbers:
            sample = shard[number]
            if self.encoders.images:
                images += self._variants(sample, first + number)
            if self.encoders.captions:
                captions.append(caption_of(sample))
        return _Decoded(batch[0], numbers, images, captions)

    def _variants(self, sample: Sample, index: int) -> Iterator[torch.Tensor]:
        """Yield the variants of a sample's image, transformed, each (3, height, width)."""
        with blaming_sample(sample):
            image = decode_image(image_member(sample)[1], smallest_side=self.transforms.smallest_side)
            for crop in range(self.options.crops):
                pixels = torch.from_numpy(self.transforms(image, sample_seed(self.seed, index, crop)))
                yield pixels
                if self.options.flipped:
                    yield pixels.flip(2)

    def _write_shard(self, number: int, batches: Iterable["_Decoded"], progress: Progress | None) -> None:
        """Encode the batches of one shard, and write its samples in their order."""
        shard, before = self.source.shard(number), self._samples_in(self.work.done_numbers() - {number})
        shared = (f"{CAPTION_KEY}.npy",) if self.options.share_captions else ()
        shapes: dict[str, list[int | None]] = {}
        self.embedded = {}
        encoded: dict[int, Arrays] = {}  # those that wait for samples before them
        written = 0
        with ShardWriter(self.work.folder, len(shard) + 1, start=number, shared=shared) as writer:
            for batch in batches:
                for inside, arrays in zip(batch.numbers, self._encode(batch), strict=True):
                    name = f"{shard.path}: {shard.key(inside)}"
                    encoded[inside] = {key: to_float16(array, name) for key, array in arrays.items()}
                while arrays := encoded.pop(written, {}):
                    sample = shard[written]
                    writer.write(sample.key.replace(".", "_"), self._members(sample, arrays))
                    shapes = merged_shapes(shapes, {name: list(array.shape) for name, array in arrays.items()})
                    written += 1
                if progress:
                    progress(before + written + len(encoded), len(self.source))
        self.work.record(number, writer.finished[0], shapes=shapes, buckets=self._bucket_numbers(number))

    def _encode(self, batch: "_Decoded") -> list[Arrays]:
        """Return the encoded arrays of each sample of a batch."""
        made: list[Arrays] = [{} for _ in batch.numbers]
        if self.encoders.images:
            variants = self._encode_images(self.encoders.images, batch.images)
            for number, row in enumerate(variants):
                sample, variant = divmod(number, self.options.variants)
                made[sample][variant_name(variant)] = row
        if self.encoders.captions:
            for arrays, embedding in zip(made, self._encode_captions(batch.captions), strict=True):
                arrays[CAPTION_KEY] = embedding
        return made

    def _encode_images(self, encode: EncodeImages, images: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """Return moments of each image, or their means; the images of one call have one size."""
        made: dict[int, np.ndarray] = {}
        by_shape = sorted(range(len(images)), key=lambda number: images[number].shape)
        for _, alike in groupby(by_shape, key=lambda number: images[number].shape):
            for numbers in batched(alike, self.batch_size):
                rows = encode(torch.stack([images[number] for number in numbers]).numpy())
                made |= dict(zip(numbers, rows, strict=True))
        kept = slice(None, len(made[0]) // 2 if self.options.latents == "mean" else None)
        return [made[number][kept] for number in range(len(images))]

    def _encode_captions(self, captions: list[str]) -> list[np.ndarray]:
        assert self.encoders.captions is not None
        if not self.options.share_captions:
            return list(self.encoders.captions(captions))
        if new := [caption for caption in dict.fromkeys(captions) if caption not in self.embedded]:
            self.embedded |= dict(zip(new, self.encoders.captions(new), strict=True))
        return [self.embedded[caption] for caption in captions]

    def _members(self, sample: Sample, arrays: Mapping[str, np.ndarray]) -> dict[str, bytes]:
        members = {f"{name}.npy": npy_bytes(array) for name, array in arrays.items()}
        if not self.encoders.images:
            extension, data = image_member(sample)
            members[extension] = bytes(data)
        kept = (name for name in (*CAPTION_EXTENSIONS, "json") if name in sample.members)
        return members | {name: bytes(sample.members[name]) for name in kept}

    def _samples_in(self, shards: Iterable[int]) -> int:
        return sum(self.source.counts[number] for number in shards)

    def _write_empty_prompt(self, encode: EncodeCaptions) -> None:
        with atomic_open(self.work.folder / EMPTY_PROMPT_FILE) as file:
            file.write(npy_bytes(to_float16(encode([""])[0], "the empty prompt")))

    def _write_buckets(self, every: list[dict[str, Any]]) -> dict[str, Any]:
        """Write the bucket of each sample; return what cache.json says of them."""
        assert self.buckets is not None
        numbers = np.array([number for done in every for number in done["buckets"]], np.uint8)
        with atomic_open(self.work.folder / BUCKETS_FILE) as file:
            np.save(file, numbers)
        checksum = buckets_checksum(numbers, [done["shard"]["checksum"] for done in every])
        return {"buckets": self.buckets.sizes, "buckets_checksum": checksum}

    def _write_info(self, shapes: Mapping[str, list[int | None]], buckets: Mapping[str, Any]) -> None:
        extra = {variant_name(i) for i in range(1, self.options.variants)}
        members = {name: {"shape": shape, "dtype": "float16"} for name, shape in shapes.items() if name not in extra}
        info = {
            "format": "latentsmith-cache-1",
            "samples": len(self.source),
            "latents": "unscaled means" if self.options.latents == "mean" else "unscaled moments: mean, log variance",
            "members": members,
            **({"variants": self.options.variants} if self.encoders.images else {}),
            **buckets,
            "fingerprints": self.work.recipe["fingerprints"],
            "seed": self.work.recipe["seed"],
            "versions": {**self.encoders.versions, "numpy": np.__version__},
        }
        write_text(self.work.folder / CACHE_FILE, json.dumps(info, indent=1) + "\n")


@dataclass(frozen=True)
class _Decoded:
    """A batch of samples of one shard, ready to be encoded. images: the variants of each sample one after the other."""

    shard: int
    numbers: list[int]
    images: list[torch.Tensor]
    captions: list[str]


def batched(items: Iterable[int], size: int) -> Iterator[list[int]]:
    """Yield the items in lists of `size`, the last of which may be shorter."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def merged_shapes(
    before: Mapping[str, Sequence[int | None]], new: Mapping[str, Sequence[int | None]]
) -> dict[str, list[int | None]]:
    """Return the shape of each member over all samples, None at an axis where they differ."""
    merged = {name: list(shape) for name, shape in before.items()}
    for name, shape in new.items():
        old_shape = merged.get(name, shape)
        merged[name] = [old if old == now else None for old, now in zip(old_shape, shape, strict=True)]
    return merged
