"""Collections of images to measure: folders, sets of shards, and images in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from latentsmith.data.images import decode_image
from latentsmith.data.sample_io import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS, blaming_sample, caption_of, image_member
from latentsmith.data.shards import SET_FILE, ShardSet
from latentsmith.files.colour import to_srgb
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_bytes, fingerprint_text, hash_file
from latentsmith.files.regular import IMAGE, read_regular

ENDINGS = tuple(f".{name}" for name in IMAGE_EXTENSIONS)


@dataclass(frozen=True)
class Images:
    """Images in a fixed order.

    names: of each, for messages and sheets. read(i): image i as 8-bit RGB, alpha over white. fingerprint(): of the
    bytes of all images, in order. caption(i): the text that belongs to image i, None where it has none.
    """

    title: str
    names: Sequence[str]
    read: Callable[[int], Image.Image]
    fingerprint: Callable[[], str]
    caption: Callable[[int], str | None] = lambda number: None

    def __len__(self) -> int:
        return len(self.names)

    def first(self, count: int | None) -> Images:
        """Return the first `count` images. Raises BadInput for fewer."""
        if count is None or count == len(self):
            return self
        if count > len(self):
            raise BadInput(f"{self.title}: holds {len(self)} images, {count} are asked for")
        whole = self.fingerprint
        return replace(self, names=self.names[:count], fingerprint=lambda: fingerprint_text(f"{count} of {whole()}"))


def open_images(source: Any) -> Images:
    """Return the images of a folder, of a set of shards, or of a list of PIL images, arrays or a tensor.

    Raises BadInput for a folder without images, or with both images and shards.
    """
    if isinstance(source, Images):
        return source
    if not isinstance(source, str | Path):
        return images_in_memory(source)
    path = Path(source).expanduser()
    if not path.exists():
        raise BadInput(f"{source}: no such folder of images or set of shards")
    if path.is_file():
        return images_of_set(path) if path.suffix == ".tar" else images_of_files(str(path), path.parent, [path])
    tars = (path / SET_FILE).exists() or any(path.glob("*.tar"))
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file())
    if tars and files:
        raise BadInput(f"{path}: holds both shards and image files ({files[0].name}); name a folder of one kind")
    if tars:
        return images_of_set(path)
    if not files:
        raise BadInput(f"{path}: holds no images ({', '.join(ENDINGS)}) and no shards")
    return images_of_files(str(path), path, files)


def images_of_files(title: str, folder: Path, files: Sequence[Path]) -> Images:
    def read(number: int) -> Image.Image:
        try:
            return decode_image(read_regular(files[number], IMAGE))
        except OSError as error:
            raise BadInput(f"{files[number]}: cannot be read ({error.strerror})") from None
        except BadInput as error:
            raise BadInput(f"{files[number]}: cannot be read as an image ({error})") from None

    def caption(number: int) -> str | None:
        beside = files[number].with_suffix(".txt")
        return beside.read_text("utf-8").strip() if beside.is_file() else None

    def fingerprint() -> str:
        return fingerprint_text("\n".join(map(hash_file, files)))

    return Images(title, [file.relative_to(folder).as_posix() for file in files], read, fingerprint, caption)


def images_of_set(path: Path) -> Images:
    shards = ShardSet(path)

    def read(number: int) -> Image.Image:
        sample = shards[number]
        with blaming_sample(sample):
            return decode_image(image_member(sample)[1])

    def caption(number: int) -> str | None:
        sample = shards[number]
        return caption_of(sample) if any(name in sample.members for name in CAPTION_EXTENSIONS) else None

    names = [f"{path.name}-{number}" for number in range(len(shards))]
    return Images(str(path), names, read, lambda: fingerprint_text(shards.fingerprint()), caption)


def images_in_memory(source: Any) -> Images:
    """source: PIL images, arrays (height, width, 3) uint8, or a tensor (n, 3, height, width): uint8 or in [-1, 1]."""
    listed = [as_pil(each) for each in source]
    if not listed:
        raise BadInput("no images were given")

    def fingerprint() -> str:
        arrays = [np.ascontiguousarray(np.asarray(image)) for image in listed]
        return fingerprint_text("\n".join(f"{array.shape} {fingerprint_bytes(array.data)}" for array in arrays))

    names = [f"image {number}" for number in range(len(listed))]
    return Images("images in memory", names, listed.__getitem__, fingerprint)


def as_pil(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return to_srgb(image)
    if isinstance(image, Tensor):
        pixels = image.detach().cpu()
        if pixels.is_floating_point():
            pixels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()
        image = pixels.permute(1, 2, 0).numpy()
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise BadInput(f"an image of {array.dtype} {array.shape}; uint8 (height, width, 3) was expected")
    return Image.fromarray(array)
