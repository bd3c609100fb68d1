"""The latent cache: what frozen encoders make of a set, computed once, in shards that training reads without copying.

Members of each sample: `image_encoded.npy`, the VAE's moments `(2 * z, height / f, width / f)`, unscaled float16;
`captions_encoded.npy`, the text embedding `(length, width)`, float16; `txt` and `json` as in the source. A part that is
not encoded keeps the source's own member. `cache.json` says what made it, `empty_prompt.npy` is the embedding of "".
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_bytes
from latentsmith.files.json import check_types, read_json

from .resumable_output import first_difference
from .sample_io import array_of
from .shards import Sample, ShardSet

CACHE_FILE = "cache.json"
EMPTY_PROMPT_FILE = "empty_prompt.npy"
IMAGE_KEY = "image_encoded"
CAPTION_KEY = "captions_encoded"
BUCKETS_FILE = "buckets.npy"
MADE_BY = {  # fingerprints
    IMAGE_KEY: ("vae", "transforms", "precision"),
    CAPTION_KEY: ("text_encoder", "layer", "tokenizer", "precision"),
}


class LatentCache:
    """A finished cache, opened for reading; BadInput if `folder` is none.

    `info` is the content of cache.json. `empty_prompt`: (length, width), None if captions were not encoded.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.shards = ShardSet(self.folder)  # first, since it refuses an unfinished folder
        self.info = _read_info(self.folder)
        self.empty_prompt = _read_empty_prompt(self.folder) if CAPTION_KEY in self.encoded else None

    @property
    def encoded(self) -> list[str]:
        """Return the names of the encoded members: "image_encoded", "captions_encoded" or both."""
        return list(self.info["members"])

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Return the encoded members of one sample by name: float16 views of the mapped file, read-only."""
        return self.encodings(self.shards[index], self.encoded)

    def encodings(self, sample: Sample, names: Sequence[str], variant: int = 0) -> dict[str, np.ndarray]:
        """Return some encoded members of a sample. variant: which of the encodings of its image."""
        return {name: array_of(sample, _member(name, variant)) for name in names}

    @property
    def variants(self) -> int:
        """Return encodings of each image: of other crops, or mirrored."""
        return int(self.info.get("variants", 1))

    @property
    def holds_means(self) -> bool:
        """Return whether image_encoded is the mean alone, not mean and log variance."""
        return str(self.info.get("latents", "")).endswith("means")

    def common(self, names: Sequence[str]) -> dict[str, Any]:
        """Return what caches have to agree on to be trained on together: all but the sizes that buckets leave open."""
        members = {name: dict(self.info["members"].get(name, {})) for name in names}
        if "buckets" in self.info and members.get(IMAGE_KEY):
            members[IMAGE_KEY]["shape"] = members[IMAGE_KEY]["shape"][:1]
        made_by = {name: value for key in names for name, value in self.info["fingerprints"].items()
                   if name in MADE_BY[key]}  # fmt: skip
        kept = (self.variants, self.holds_means, self.info.get("buckets")) if IMAGE_KEY in names else ()
        return {"members": members, "fingerprints": made_by, "variants": list(kept)}

    def buckets(self) -> tuple[np.ndarray, list[tuple[int, int]]] | None:
        """Return the bucket of each sample, (samples,) uint8, and the buckets' sizes in pixels (height, width).

        None where all images have one size."""
        if not self.info.get("buckets"):
            return None
        path = self.folder / BUCKETS_FILE
        try:
            numbers = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        except (OSError, ValueError, EOFError) as error:
            raise BadInput(f"{path}: the samples' buckets cannot be read ({error}); precache again") from None
        recorded = self.info.get("buckets_checksum")
        checksum = buckets_checksum(numbers, [record.checksum for record in self.shards.records if record])
        if recorded not in (None, checksum):  # caches made before there was one have none
            raise BadInput(f"{path}: not of the tars beside it, as {CACHE_FILE} says; precache again")
        if numbers.shape != (len(self),) or numbers.dtype != np.uint8:
            raise BadInput(f"{path}: not the buckets of {len(self):,} samples; precache again")
        return numbers, [(height, width) for height, width in self.info["buckets"]]

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
            (IMAGE_KEY, 0, latent_channels and (1 if self.holds_means else 2) * latent_channels, "in_channels"),
            (CAPTION_KEY, 1, context_dim, "context_dim"),
        ):
            shape = self.info["members"].get(name, {}).get("shape")
            if shape and wanted is not None and shape[axis] != wanted:
                what = f"{name} has shape {tuple(shape)}, and unet_config.{key} wants {wanted} at axis {axis}"
                raise BadInput(f"{self.folder}: {what}; change the U-Net, or precache with its VAE and text encoder")


class JoinedCaches(LatentCache):
    """Caches made alike, as one: their samples one after the other. shards: all theirs. names: the members that are
    read. BadInput for caches whose members, transforms or encoders of these are others.

    `info` is the first one's, whose source and counts say nothing of the others.
    """

    def __init__(self, caches: Sequence[LatentCache], shards: ShardSet, names: Sequence[str]):
        self.caches, self.shards = caches, shards
        first = caches[0]
        self.folder, self.empty_prompt = first.folder, first.empty_prompt
        self.info = {**first.info, "members": {name: first.info["members"][name] for name in names}}
        for other in caches[1:]:
            if difference := first_difference(first.common(names), other.common(names)):
                name, here, there = difference
                raise BadInput(
                    f"{other.folder}: {name} is {there!r}, and {here!r} in {first.folder}: precache both alike"
                )

    def buckets(self) -> tuple[np.ndarray, list[tuple[int, int]]] | None:
        found = [each for cache in self.caches if (each := cache.buckets())]
        return (np.concatenate([numbers for numbers, _ in found]), found[0][1]) if found else None


def buckets_checksum(numbers: np.ndarray, shards: Sequence[str]) -> str:
    """Return what binds the buckets of samples to their tars. shards: the checksums of the tars."""
    return fingerprint_bytes(numbers.tobytes() + "\n".join(shards).encode())


def variant_name(number: int) -> str:
    """Return the member of a sample that holds encoding `number` of its image: image_encoded, image_encoded.v1, ..."""
    return f"{IMAGE_KEY}.v{number}" if number else IMAGE_KEY


def _member(name: str, variant: int) -> str:
    """Return the extension of an encoded member."""
    return f"{variant_name(variant) if variant and name == IMAGE_KEY else name}.npy"


def _is_side(value: Any) -> bool:
    """Return whether a value of cache.json is a side of a shape; None is one that differs between samples."""
    return value is None or (type(value) is int and 0 < value < 2**31)


def _read_info(folder: Path) -> dict[str, Any]:
    path, what = folder / CACHE_FILE, "what precache writes (delete the cache and make it again)"
    if not path.is_file():
        raise BadInput(f"{folder}: no {CACHE_FILE} here, so this is not a latent cache; make one with precache")
    info = read_json(path, what)
    known = {"members": dict, "fingerprints": dict, "samples": int, "versions": dict | None, "variants": int | None,
             "latents": str | None, "buckets": list | None}  # fmt: skip
    check_types(info, known, path, what)
    for member in info["members"].values():
        check_types(member, {"shape": list, "dtype": str}, path, what)
    for shape in [member["shape"] for member in info["members"].values()] + (info.get("buckets") or []):
        if not isinstance(shape, list) or len(shape) < 2 or not all(map(_is_side, shape)):
            raise BadInput(f"{path}: is not {what}: {str(shape)[:40]} is no size")
    return info


def _read_empty_prompt(folder: Path) -> np.ndarray:
    path = folder / EMPTY_PROMPT_FILE
    try:
        embedding: np.ndarray = np.load(path, allow_pickle=False)
        return embedding
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"{path}: the empty prompt's embedding cannot be read ({error}); precache again") from None
