"""Features of many images: in chunks of fixed bounds, each a file, so that any process may make any of them.

A chunk's features depend on nothing but its images and the extractor. So a killed run continues from the chunks that
are there, and one process or several give the same numbers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latentsmith.files.atomic import write_text
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_text
from latentsmith.files.json import read_json
from latentsmith.files.tensors import open_tensors, save_safetensors
from latentsmith.processes import process_of
from latentsmith.progress import progress

from .extractors import Extractor
from .features import Array
from .images import Images
from .resize import RULES

CHUNK = 64  # images of one file of features, and of one call of the network
AHEAD = 3  # chunks whose images are decoded while the network works
THREADS = 2  # that decode
IDENTITY = "features.json"
POLL_SECONDS = 0.2


class Features:
    """Features of images in a folder of chunks. names: of what the extractor gives, such as "features"."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count

    def chunks(self, name: str = "features") -> Iterator[Array]:
        """Yield arrays (CHUNK or fewer, d), in the order of the images."""
        for number in range(chunk_count(self.count)):
            yield open_tensors(chunk_file(self.folder, number))[name].numpy().astype(np.float64)

    def all(self, name: str = "features") -> Array:
        """Return (n, d)."""
        return np.concatenate(list(self.chunks(name)))

    def has(self, name: str) -> bool:
        return name in open_tensors(chunk_file(self.folder, 0))


def chunk_count(count: int) -> int:
    return -(-count // CHUNK)


def chunk_file(folder: Path, number: int) -> Path:
    return folder / f"chunk-{number:06d}.safetensors"


def collect(images: Images, extractor: Extractor, cache: Path) -> Features:
    """Return the features of all images, made where they are not in `cache` yet.

    Under torchrun or srun each process makes its share, then waits for the others'. Raises BadInput for an image that
    cannot be read.
    """
    identity = {"images": images.fingerprint(), "count": len(images), **extractor.identity}
    folder = cache / fingerprint_text(json.dumps(identity, sort_keys=True))
    if not (folder / IDENTITY).exists():
        write_text(folder / IDENTITY, json.dumps({**identity, "of": images.title}, indent=1) + "\n")
    read_json(folder / IDENTITY, "the identity of features")
    rank, processes = process_of()
    numbers = list(range(chunk_count(len(images))))
    missing = [number for number in numbers[rank::processes] if not chunk_file(folder, number).exists()]
    make_chunks(images, extractor, folder, missing)
    wait_for([chunk_file(folder, number) for number in numbers], f"features of {images.title}")
    return Features(folder, len(images))


def make_chunks(images: Images, extractor: Extractor, folder: Path, numbers: Sequence[int]) -> None:
    """Write the features of some chunks; the next ones are decoded meanwhile."""
    done = 0
    with progress(f"features of {images.title}", "images") as bar:
        for number, pixels in decoded_ahead(images, extractor, numbers):
            save_safetensors(chunk_file(folder, number), outputs(extractor, pixels))
            done += len(pixels)
            bar(done, len(numbers) * CHUNK if done < len(numbers) * CHUNK - CHUNK else done)


def outputs(extractor: Extractor, pixels: Tensor) -> dict[str, Tensor]:
    """Return the extractor's outputs (batch, d) in float32. Raises BadInput for another shape or what is not finite."""
    with torch.inference_mode():
        made = {
            name: each.float().cpu().contiguous()
            for name, each in extractor.network(pixels.to(extractor.device)).items()
        }
    for name, each in made.items():
        if each.ndim != 2 or len(each) != len(pixels):
            raise BadInput(f"{extractor.name}: {name} have the shape {tuple(each.shape)}, ({len(pixels)}, d) is needed")
        if not each.isfinite().all():
            raise BadInput(f"{extractor.name}: {name} are not finite; its weights or images are damaged")
    return made


def decoded_ahead(images: Images, extractor: Extractor, numbers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Yield (chunk, pixels (batch, 3, side, side)); threads read the next chunks."""
    rule: Callable[..., Tensor] = RULES[extractor.resize]

    def prepared(image: int) -> Tensor:
        try:
            return rule(images.read(image), extractor.side)
        except BadInput as error:
            text = str(error)
            raise BadInput(text if images.names[image] in text else f"{images.names[image]}: {text}") from None

    with ThreadPoolExecutor(THREADS) as pool:
        waiting = []
        try:
            for number in [*numbers, *[None] * AHEAD]:
                if number is not None:
                    members = range(number * CHUNK, min(len(images), (number + 1) * CHUNK))
                    waiting.append((number, [pool.submit(prepared, member) for member in members]))
                if len(waiting) > AHEAD or (number is None and waiting):
                    first, futures = waiting.pop(0)
                    yield first, torch.stack([future.result() for future in futures])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def wait_for(files: Sequence[Path], what: str) -> None:
    """Wait for files that other processes write, showing how many there are."""
    with progress(f"waiting for {what}", "files") as bar:
        while there := sum(not file.exists() for file in files):
            bar(len(files) - there, len(files))
            time.sleep(POLL_SECONDS)
