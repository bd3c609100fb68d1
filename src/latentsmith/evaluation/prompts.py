"""Prompts of an evaluation: lines of a file, captions of COCO, a folder of text files, or the captions of a set."""

from pathlib import Path

from latentsmith.files.errors import BadInput
from latentsmith.files.json import parse_json
from latentsmith.files.regular import SizeLimit, read_regular
from latentsmith.files.text import decode_text, read_lines
from latentsmith.inference.coco_captions import read_captions

from .images import open_images
from .run import captions_of

CAPTIONS = SizeLimit("a file of captions", 2**30)  # COCO's 2014 training captions have 66 MB


def read_prompts(source: str | Path, count: int | None = None) -> list[str]:
    """Return the first `count` prompts of a source. Raises BadInput for fewer.

    source: a text file (a prompt on each line), COCO's captions (.json), a folder of .txt files as NeMo reads them, a
    set of shards or a folder of images with captions.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise BadInput(f"{source}: no such file or folder of prompts")
    found = _prompts(path)
    if not found:
        raise BadInput(f"{source}: holds no prompts")
    if count is not None and len(found) < count:
        raise BadInput(f"{source}: holds {len(found):,} prompts, {count:,} are asked for")
    return found[:count]


def _prompts(path: Path) -> list[str]:
    if path.is_dir() and not any(path.glob("*.tar")) and any(path.glob("*.txt")):
        return read_captions(path, None)
    if path.is_dir() or path.suffix == ".tar":
        return captions_of(open_images(path))
    try:
        if path.suffix == ".json":
            return coco_captions(decode_text(read_regular(path, CAPTIONS), path), path)
        return read_lines(path, CAPTIONS)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None


def coco_captions(text: str, path: Path) -> list[str]:
    """Return the first caption of every image, in the order of the images' numbers."""
    annotations = parse_json(text, path, "COCO's captions").get("annotations")
    try:
        rows = sorted((int(each["image_id"]), int(each["id"]), str(each["caption"])) for each in annotations or [])
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{path}: is not COCO's captions: annotations need image_id, id and caption") from None
    first: dict[int, str] = {}
    for image, _, caption in rows:
        first.setdefault(image, " ".join(caption.split()))
    return list(first.values())
