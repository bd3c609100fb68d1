"""The kinds of sources: folders, tables, tars. Each lists images and captions in a fixed order, undecoded.

A BadSample is raised when an item is read: this one sample is wrong.
"""

import json
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_text
from latentsmith.files.regular import CAPTION
from latentsmith.files.text import NotText, checked_text, decode_text

from .errors import BadSample
from .sample_io import CAPTION_EXTENSIONS, image_member
from .shards import Sample, ShardSet
from .storage import (
    PREFETCH,
    Storage,
)
from .tables import Table, image_bytes

IMAGE_COLUMNS = ("file_name", "image", "image_path", "path", "filename", "file", "image_bytes", "jpg", "png", "bytes")
URL_COLUMNS = {"url", "image_url", "URL"}
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
NOT_TEXT = "caption not UTF-8"
SHOWN = 3  # names in a note


@dataclass(frozen=True)
class SourceItem:
    """One image and its caption, unread. `image()` and `caption()` raise BadSample; a caption may be empty."""

    name: str
    image: Callable[[], bytes]
    caption: Callable[[], str]
    extra: Mapping[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """A listing of items in a fixed order. notes: what a user should know of it, such as files that were not read."""

    notes: list[str]

    def __len__(self) -> int: ...

    def items(self, start: int = 0) -> Iterator[SourceItem]:
        """Return the items from number `start` on."""

    def fingerprint(self) -> str:
        """Name the listing: another order, number or size of items gives another fingerprint."""


class RefusedFiles:
    """A source, and after its items one for each file or linked folder that it leaves out: reading it raises."""

    def __init__(self, source: Source, causes: Mapping[str, BadSample]):
        self.source, self.causes, self.names, self.notes = source, causes, tuple(causes), source.notes

    def __len__(self) -> int:
        return len(self.source) + len(self.names)

    def items(self, start: int = 0) -> Iterator[SourceItem]:
        yield from self.source.items(start)
        for name in self.names[max(0, start - len(self.source)) :]:
            yield SourceItem(name, partial(self._refuse, name), lambda: "")

    def fingerprint(self) -> str:
        return fingerprint_text("\n".join([self.source.fingerprint(), *self.names]))

    def _refuse(self, name: str) -> bytes:
        raise self.causes[name]


class FolderSource:
    """Images anywhere below a folder, by name, each with its caption in `NAME.txt` or `NAME.caption` beside it.

    NAME is the image's, with or without its extension.
    """

    def __init__(self, storage: Storage, sizes: Mapping[str, int], images: Sequence[str]):
        self.storage = storage
        captions = sorted((name for name in sizes if extension_of(name) in CAPTION_EXTENSIONS), key=PurePosixPath)
        # of two captions the .txt
        by_stem = {_stem(name): name for name in sorted(captions, key=extension_of)}
        by_lower = {stem.lower(): name for stem, name in by_stem.items()}  # for what comes from Windows
        found = {image: _first(by_stem, image) or _first(by_lower, image.lower()) for image in images}
        self.captions = {image: name for image, name in found.items() if name}
        self.images, used = set(images), {_stem(name) for name in self.captions.values()}
        self.names = [*images, *(name for name in captions if _stem(name) not in used)]
        self.notes = self._notes(sizes, captions)

    def _notes(self, names: Iterable[str], captions: Sequence[str]) -> list[str]:
        others = sorted(set(names).difference(self.images, captions))
        counts = Counter(self.captions.values())
        shared = [name for name, count in counts.items() if count > 1]
        notes = [f"files that were not read: {len(others):,} ({some_of(others)})"] if others else []
        return notes + (
            [f"captions that go with several images: {len(shared):,} ({some_of(shared)})"] if shared else []
        )

    def __len__(self) -> int:
        return len(self.names)

    def items(self, start: int = 0) -> Iterator[SourceItem]:
        for at in range(start, len(self), PREFETCH):
            names = self.names[at : at + PREFETCH]
            captions = [self.captions[name] for name in names if name in self.captions]
            self.storage.prefetch(list(dict.fromkeys([*names, *captions])))
            for name in names:
                if name not in self.images:
                    yield SourceItem(name, _no_image_for(name), lambda: "")
                else:
                    yield SourceItem(name, partial(self.storage.read, name), partial(self._caption, name))

    def _caption(self, image: str) -> str:
        name = self.captions.get(image)
        if name is None:
            stem, image = (PurePosixPath(one).name for one in (_stem(image), image))
            raise BadSample("missing caption", f"no {stem}.txt or {stem}.caption beside {image}")
        try:
            return _caption_text(self.storage.read(name, CAPTION), name)
        except BadSample as error:
            reason = "missing caption" if error.reason in ("missing image", "unreadable file") else error.reason
            raise BadSample(reason, str(error)) from None

    def fingerprint(self) -> str:
        used = [*self.names, *self.captions.values()]
        return fingerprint_text("\n".join(f"{name} {self.storage.states.get(name, '')}" for name in used))


class TableSource:
    """A table with a column for the image (a path beside the table, or bytes) and one for the caption; others are kept.

    captions: whether the second is needed. images: those in the table's folder, where it is the folder's own.
    Raises BadInput for a table without these columns.
    """

    def __init__(self, storage: Storage, table: Table, captions: bool = True, images: Sequence[str] = ()):
        self.storage, self.table, self.images = storage, table, images
        if not any(name in IMAGE_COLUMNS for name in table.columns) and URL_COLUMNS & set(table.columns):
            raise BadInput(f"{table.address}: holds addresses of images, not images; fetch them with img2dataset")
        self.image_column = self._column(IMAGE_COLUMNS, "the image (bytes or a path)")
        self.caption_column = self._column(CAPTION_COLUMNS, "the caption") if captions else None
        self.notes: list[str] = []

    def unlisted(self) -> dict[str, BadSample]:
        """Return the images of the folder that no row names, each with its cause; note rows that name one again."""
        listed = Counter(_plain_name(row.get(self.image_column)) for _, row in self.table.rows()) if self.images else {}
        again = [name for name in self.images if listed.get(name, 0) > 1]
        if again:
            self.notes.append(f"images that several rows name: {len(again):,} ({some_of(again)})")
        missing = [name for name in self.images if name not in listed]
        return {
            name: BadSample("not in the table", f"{name}: {self.table.address} has no row for it") for name in missing
        }

    def __len__(self) -> int:
        return len(self.table)

    def items(self, start: int = 0) -> Iterator[SourceItem]:
        rows = self.table.rows(start)
        while some := list(islice(rows, PREFETCH)):
            images = [row.get(self.image_column) for _, row in some]
            self.storage.prefetch([image for image in images if isinstance(image, str) and image])
            for (where, row), image in zip(some, images, strict=True):
                extra = {
                    key: value
                    for key, value in row.items()
                    if key not in (self.image_column, self.caption_column) and self.table.keeps(value)
                }
                name = image if isinstance(image, str) and image else where
                caption = partial(_cell_text, row.get(self.caption_column or ""), where)
                yield SourceItem(name, partial(image_bytes, image, self.storage, where), caption, extra)

    def fingerprint(self) -> str:
        states = [f"{name} {self.storage.states.get(name, '')}" for name in self.images]
        return fingerprint_text("\n".join([self.table.fingerprint(), *states])) if states else self.table.fingerprint()

    def _column(self, names: Iterable[str], what: str) -> str:
        by_name = {column.lower(): column for column in self.table.columns}
        for name in names:
            if name in by_name:
                return by_name[name]
        columns = ", ".join(self.table.columns[:8]) or "(none)"
        raise BadInput(f"{self.table.address}: no column for {what} among {columns}; name it one of {', '.join(names)}")


class TarSource:
    """WebDataset tars: in each sample an image, and a caption as .txt, .caption or an entry of the .json."""

    def __init__(self, tars: str | os.PathLike[str] | list[Path]):
        self.shards = ShardSet(tars)
        self.notes: list[str] = []

    def __len__(self) -> int:
        return len(self.shards)

    def items(self, start: int = 0) -> Iterator[SourceItem]:
        for number in range(start, len(self)):
            yield _tar_item(self.shards[number])

    def fingerprint(self) -> str:
        return self.shards.fingerprint()


def _tar_item(sample: Sample) -> SourceItem:
    extra, fault = _json_member(sample)
    held = next((extension for extension in CAPTION_EXTENSIONS if extension in sample.members), None)
    if held:
        caption = partial(_caption_text, bytes(sample.members[held]), f"{sample.key}.{held}")
    else:
        value = next((extra[name] for name in CAPTION_COLUMNS if name in extra), None)
        caption = partial(_cell_text, value, sample.key, fault or "there is no caption")
    try:
        extension, data = image_member(sample)
    except BadSample as error:
        return SourceItem(sample.key, _raiser(error.reason, f"{sample.key}: {error}"), caption, extra)
    return SourceItem(f"{sample.key}.{extension}", partial(bytes, data), caption, extra)


def _json_member(sample: Sample) -> tuple[dict[str, Any], str]:
    """Return the sample's .json as an object, and why it is empty if it cannot be read."""
    try:
        content = json.loads(bytes(sample.members.get("json", b"{}")))
    except (ValueError, RecursionError) as error:
        return {}, f"there is no .txt, and the .json cannot be read ({error})"
    return (content, "") if isinstance(content, dict) else ({}, "there is no .txt, and the .json is no object")


def _caption_text(data: bytes, name: str) -> str:
    """Return a caption from the bytes of its file. Raises BadSample if they are no text."""
    try:
        return decode_text(data, name)
    except NotText as error:
        raise BadSample(NOT_TEXT, str(error)) from None


def _cell_text(value: Any, where: str, absent: str = "there is no caption") -> str:
    """Return a caption from a cell of a table or an entry of JSON. Raises BadSample if it is no text."""
    if value is None:
        raise BadSample("missing caption", f"{where}: {absent}")
    if not isinstance(value, str):
        raise BadSample("missing caption", f"{where}: the caption is {type(value).__name__}, not a text")
    try:
        return checked_text(value, where)
    except NotText as error:
        raise BadSample(NOT_TEXT, str(error)) from None


def _first(captions: Mapping[str, str], image: str) -> str | None:
    """Return the caption file named after an image, without or with the image's extension."""
    return captions.get(_stem(image)) or captions.get(image)


def _plain_name(image: Any) -> str:
    """Return the name of a file in a cell of a table as the folder's listing has it."""
    image = image.get("path") if isinstance(image, Mapping) else image
    return posixpath.normpath(image.replace("\\", "/")) if isinstance(image, str) else ""


def some_of(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def extension_of(name: str) -> str:
    return PurePosixPath(name).suffix[1:].lower()


def _stem(name: str) -> str:
    """Return a name without its extension."""
    return str(PurePosixPath(name).with_suffix(""))


def _no_image_for(caption: str) -> Callable[[], bytes]:
    return _raiser("missing image", f"{PurePosixPath(caption).name} is a caption without an image of the same name")


def _raiser(reason: str, detail: str) -> Callable[[], bytes]:
    def read() -> bytes:
        raise BadSample(reason, detail)

    return read
