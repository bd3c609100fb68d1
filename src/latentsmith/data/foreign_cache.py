"""Tars of encodings that NeMo's and MLPerf's precaching made, without a word of what made them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latentsmith.files.errors import BadInput
from latentsmith.files.pickles import load_arrays

from .latent_cache import CAPTION_KEY, IMAGE_KEY, LatentCache
from .sample_io import array_of
from .shards import Sample, ShardSet

NAMES = {  # of the encodings, by their ends, in a .pickle of precaching or a .pyd
    IMAGE_KEY: ("_image", "image_embed"),
    CAPTION_KEY: ("_text", "captions_embed"),
}


class ForeignCache(LatentCache):
    """Encodings in tars of NeMo's precaching (`.pickle`), NeMo's embeddings (`.pyd`) or MLPerf's moments (`.npy`).

    Read as `LatentCache` is, one sample at a time; float16 or float32 as they were stored. `info["members"]` is what
    the first sample holds. Nothing says which networks and transforms made them.
    """

    def __init__(self, shards: ShardSet):
        self.shards = shards
        self.folder = shards.paths[0].parent
        self.empty_prompt = None
        self.info: dict[str, Any] = {"members": {}}
        first = _encodings(shards[0])
        members = {name: _described(array) for name, array in first.items()}
        self.info = {"members": members, "samples": len(shards), "fingerprints": {}}

    @staticmethod
    def reads(shards: ShardSet) -> bool:
        """Return whether the first sample of a set is one of these."""
        members = shards[0].members
        return bool(members.keys() & {"pickle", "pyd"}) or ("npy" in members and "txt" in members)

    def encodings(self, sample: Sample, names: Sequence[str], variant: int = 0) -> dict[str, np.ndarray]:
        found = _encodings(sample)
        for name, member in self.info["members"].items():
            now = _described(found[name]) if name in found else {"shape": "none", "dtype": ""}
            if now != member:
                first = f"{member['shape']} {member['dtype']} in the first sample of the set"
                raise BadInput(f"{sample}: {name} is {now['shape']} {now['dtype']}, but {first}")
        return {name: found[name] for name in names}


def _described(array: np.ndarray) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": str(array.dtype)}


def _encodings(sample: Sample) -> dict[str, np.ndarray]:
    """Return the arrays of one sample under our names, moments as (2 * z, height, width), text as (length, width)."""
    extension = next((name for name in ("pickle", "pyd", "npy") if name in sample.members), None)
    if extension is None:
        raise BadInput(f"{sample}: has members {', '.join(sample.members)}, none of them encodings")
    data = sample.members[extension]
    if extension == "npy":
        return {IMAGE_KEY: _without_batch(array_of(sample, extension), 3)}
    held = load_arrays(data, str(sample))
    if not isinstance(held, Mapping):
        raise BadInput(f"{sample}: its .{extension} holds no dict of arrays")
    found = {}
    for name, ends in NAMES.items():
        if (key := next((key for key in held if str(key).endswith(ends)), None)) is not None:
            if not isinstance(held[key], np.ndarray):
                raise BadInput(f"{sample}: {key} is no array")
            found[name] = _without_batch(held[key], 3 if name == IMAGE_KEY else 2)
    if not found:
        names = ", ".join(map(str, list(held)[:4]))
        raise BadInput(f"{sample}: holds {names}; encodings have names that end in _image or _text")
    return found


def _without_batch(array: np.ndarray, dimensions: int) -> np.ndarray:
    return array[0] if array.ndim == dimensions + 1 and len(array) == 1 else array
