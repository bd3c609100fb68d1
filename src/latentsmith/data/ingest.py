"""Import: a source of images and captions becomes indexed shards; what is unfit is set aside with its reason."""

import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from PIL import Image

from latentsmith.files.atomic import atomic_open
from latentsmith.files.colour import is_plain
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_bytes, fingerprint_text
from latentsmith.files.images import MAX_PIXELS
from latentsmith.files.json import check_types, read_json
from latentsmith.files.regular import SizeLimit
from latentsmith.files.text import is_visible, trimmed
from latentsmith.progress import progress
from latentsmith.text.tokenizer import train_vocabulary as learn_vocabulary

from .errors import BadSample
from .filters import Filters
from .images import load_image, rgb_of
from .resumable_output import ResumableOutput, full_disk_reported, locked_output
from .sample_io import caption_of
from .shards import ShardRecord, ShardSet, ShardWriter, read_set_file
from .source_kinds import Source, SourceItem
from .sources import open_source
from .storage import Access

REPORT_FILE = "import-report.json"
MAX_CAPTION = 10_000  # characters; a text encoder reads about 300
FIRST_CAUSES = 3  # in the error of an import without a good sample
KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
PHOTO_FORMATS = ("JPEG", "MPO", "AVIF", "JPEG2000")  # lossy already: as PNG they would only grow

Progress = Callable[[int, int, int], None]  # samples seen, samples in the source, bad ones among them


@dataclass(frozen=True)
class ImportReport:
    """Result of an import: counts, the number of bad samples for each reason, and where the full list is."""

    good: int
    bad: int
    reasons: dict[str, int]
    shards: int
    path: Path
    notes: tuple[str, ...] = ()


def import_dataset(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    samples_per_shard: int = 1000,
    max_bad: int | None = None,
    filters: Filters = Filters(),  # noqa: B008, frozen
    keep_duplicates: bool = True,
    follow_links: bool = False,
    allow_outside: bool = False,
    captions: bool = True,
    progress: Progress | None = None,
) -> ImportReport:
    """Write the good samples of `source` as shards in `out`, members KEY.jpg|png|webp, KEY.txt, KEY.json.

    KEY is the sample's number in the source; KEY.json has its original name, size in pixels, other columns. JPEG, PNG
    and WebP files that any decoder shows alike keep their bytes; others are stored as PNG, or JPEG if they were lossy.

    max_bad: stop once more samples than this are bad. filters: what to leave out besides, each counted by its name.
    keep_duplicates: False drops a sample whose file and caption have both been seen.
    follow_links: read what links in the source folder lead to out of it. allow_outside: read table entries that are
    absolute paths or use `..`. Otherwise such samples are bad, "outside the source folder".
    captions: False takes the images alone, to train an autoencoder on.
    Each bad sample is listed with its reason in `import-report.json`. An import that was interrupted goes on where it
    stopped when run again. BadInput if the source is wrong, has changed since the interruption, or has no good sample.
    """
    access = Access(follow_links, allow_outside)
    listing = open_source(source, access, captions)
    options = {"samples_per_shard": samples_per_shard, "filters": asdict(filters), "keep_duplicates": keep_duplicates}
    # Only those in use: imports made before there were these options have neither.
    options |= {name: True for name, used in asdict(access).items() if used} | ({} if captions else {"captions": False})
    recipe = {"command": "data import", "source": listing.fingerprint(), "options": options}
    with locked_output(Path(out)), full_disk_reported(out):
        work = ResumableOutput(out, recipe)
        if not work.is_finished:
            _Import(listing, work, filters, max_bad, progress).run(samples_per_shard)
    return read_report(Path(out))


REPORT = SizeLimit("a report of an import", 2**30)  # it lists what was set aside, in some 100 bytes each


def read_report(folder: Path) -> ImportReport:
    """Return the report of a finished import; BadInput if there is none."""
    path, what = folder / REPORT_FILE, "a report of an import"
    content = read_json(path, what, limit=REPORT)
    check_types(content, {"good": int, "bad": int, "reasons": dict, "notes": list | None}, path, what)
    check_types(content["reasons"], dict.fromkeys(content["reasons"], int), path, what)
    notes, shards = tuple(map(str, content.get("notes") or ())), len(read_set_file(folder))
    return ImportReport(content["good"], content["bad"], content["reasons"], shards, path, notes)


class _Import:
    """An import under way: what is bad since the last completed shard, and what has been seen."""

    def __init__(
        self, source: Source, work: ResumableOutput, filters: Filters, max_bad: int | None, progress: Progress | None
    ):
        self.source, self.work, self.max_bad, self.progress = source, work, max_bad, progress
        self.filters = filters
        self.options = work.recipe["options"]
        self.shards: list[ShardRecord] = []
        self.reasons: Counter[str] = Counter()
        self.bad: list[dict[str, str]] = []
        self.seen: set[str] = set()
        self.fresh: list[str] = []  # fingerprints that the open shard adds to `seen`

    def run(self, samples_per_shard: int) -> None:
        start = self._resume()
        number = start - 1
        with ShardWriter(self.work.folder, samples_per_shard, start=len(self.shards)) as writer:
            for number, item in enumerate(self.source.items(start), start):
                if self._take(writer, number, item):
                    self._record(writer, number + 1)
                if self.progress:
                    self.progress(number + 1, len(self.source), self.reasons.total())
            if writer.finish_shard():
                self._record(writer, number + 1)
        if not self.shards:
            counts = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
            causes = "; ".join(self._first_causes())
            nothing = f"no good sample in the source ({counts}); nothing was imported"
            self._write_report()
            listed = f"; all are listed in {REPORT_FILE}" if causes else ""
            raise BadInput(f"{self.work.folder}: {nothing}{'; first causes: ' if causes else ''}{causes}{listed}")
        self._write_report()
        self.work.finish(self.shards)

    def _first_causes(self) -> list[str]:
        """Return the first bad sample of each reason since the last completed shard, at most FIRST_CAUSES of them."""
        by_reason: dict[str, str] = {}
        for entry in self.bad:
            detail = entry["detail"] if entry["name"] in entry["detail"] else f"{entry['name']}: {entry['detail']}"
            by_reason.setdefault(entry["reason"], detail)
        return list(by_reason.values())[:FIRST_CAUSES]

    def _resume(self) -> int:
        """Take up the shards that are done; returns the number of the next item."""
        start = 0
        while done := self.work.done(len(self.shards)):
            start = done["next_item"]
            self.shards.append(ShardRecord(**done["shard"]))
            self.reasons.update(entry["reason"] for entry in done["bad"])
            self.seen.update(done["seen"])
        return start

    def _take(self, writer: ShardWriter, number: int, item: SourceItem) -> bool:
        """Write one item, or set it aside; returns whether it completed a shard."""
        try:
            members = prepare(item, self.filters, self.options.get("captions", True))
            if not self.options["keep_duplicates"]:
                self._refuse_duplicate(members)
        except BadSample as error:
            self._set_aside(item.name, error)
            return False
        return writer.write(f"{number:09d}", members)

    def _refuse_duplicate(self, members: dict[str, bytes]) -> None:
        content = (fingerprint_bytes(data) for extension, data in members.items() if extension != "json")
        fingerprint = fingerprint_text(" ".join(content))
        if fingerprint in self.seen:
            raise BadSample("duplicate", "the same file and caption came earlier")
        self.seen.add(fingerprint)
        self.fresh.append(fingerprint)

    def _set_aside(self, name: str, error: BadSample) -> None:
        self.reasons[error.reason] += 1
        self.bad.append({"name": printable(name), "reason": error.reason, "detail": printable(str(error))})
        if self.max_bad is not None and self.reasons.total() > self.max_bad:
            counts = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
            last = f"{printable(name)}: {printable(str(error))}"
            raise BadInput(f"{self.work.folder}: more than max_bad={self.max_bad} bad samples ({counts}; last {last})")

    def _record(self, writer: ShardWriter, next_item: int) -> None:
        shard = writer.finished[-1]
        self.work.record(len(self.shards), shard, next_item=next_item, bad=self.bad, seen=self.fresh)
        self.shards.append(shard)
        self.bad, self.fresh = [], []

    def _write_report(self) -> None:
        counts = {"good": sum(shard.samples for shard in self.shards), "bad": self.reasons.total()}
        notes = {"notes": self.source.notes} if self.source.notes else {}
        head = json.dumps({**counts, "reasons": dict(self.reasons.most_common()), **notes}, indent=1)
        with atomic_open(self.work.folder / REPORT_FILE, "w") as file:
            file.write(head.removesuffix("\n}") + ',\n "samples": [')
            for count, entry in enumerate(self._all_bad()):
                file.write((",\n  " if count else "\n  ") + json.dumps(entry))
            file.write("\n ]\n}\n")

    def _all_bad(self) -> Iterator[dict[str, str]]:
        for number in range(len(self.shards)):
            done = self.work.done(number)
            yield from done["bad"] if done else ()
        yield from self.bad


def prepare(item: SourceItem, filters: Filters, with_caption: bool = True) -> dict[str, bytes]:
    """Return the members of one sample, checked: image, caption, JSON. Raises BadSample with the reason."""
    data = item.image()
    caption = checked_caption(item.caption()) if with_caption else None
    image = load_image(data, max_pixels=MAX_PIXELS)
    filters.check(image.size, caption, item.extra)
    if image.format in KEPT_FORMATS and is_plain(image):
        stored, extension, size = data, KEPT_FORMATS[image.format], image.size
    else:
        stored, extension, size = encoded(image, data)
    about: dict[str, Any] = {**item.extra, "original_name": item.name, "width": size[0], "height": size[1]}
    text = {} if caption is None else {"txt": caption.encode("utf-8")}
    return {extension: stored, **text, "json": json.dumps(_finite(about), allow_nan=False).encode("utf-8")}


def _finite(value: Any) -> Any:
    """Return what JSON can hold of a value: None in place of NaN and infinities, which it has no numbers for."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list) else value


def encoded(image: Image.Image, data: bytes) -> tuple[bytes, str, tuple[int, int]]:
    """Return a loaded image as the bytes of a plain RGB file, its extension, and its (width, height) upright."""
    rgb, buffer = rgb_of(image, data), io.BytesIO()
    if image.format in PHOTO_FORMATS:
        rgb.save(buffer, "JPEG", quality=95, subsampling=0)
        return buffer.getvalue(), "jpg", rgb.size
    rgb.save(buffer, "PNG")
    return buffer.getvalue(), "png", rgb.size


def checked_caption(text: str) -> str:
    """Return the caption without white space at its ends. Raises BadSample if it is empty, binary or far too long."""
    text = trimmed(text)
    if not is_visible(text):
        raise BadSample("empty caption", "the caption is empty, or shows nothing")
    if any(char < " " and char not in "\t\n" for char in text):
        raise BadSample("binary caption", "the caption has control characters, so it is no text")
    if len(text) > MAX_CAPTION:
        raise BadSample("caption too long", f"{len(text):,} characters, more than {MAX_CAPTION:,}")
    return text


def printable(text: str) -> str:
    """Return a text on one line, with what cannot be printed or encoded escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def import_data(source: str | os.PathLike[str], out: str | os.PathLike[str], **options: Any) -> ImportReport:
    """Run `import_dataset` with a progress bar, and print what came in and what was set aside, by reason."""
    with progress("importing", "samples") as bar:

        def show(done: int, total: int, bad: int) -> None:
            bar(done, total, note=f"{bad:,} set aside" if bad else "")

        report = import_dataset(source, out, progress=show, **options)
    print(f"{out}: {report.good:,} samples in {report.shards} shards, {report.bad:,} set aside")
    for reason, count in sorted(report.reasons.items()):
        print(f"  {count:,} {reason}")
    for note in report.notes:
        print(f"  {note}")
    if report.bad:
        print(f"each is listed in {report.path}")
    return report


def train_vocabulary(source: Path, out: Path, *, size: int) -> None:
    """Learn a vocabulary of `size` tokens from the captions of a set, and write it as tokenizer.json."""
    samples = ShardSet(source)
    learn_vocabulary(map(caption_of, samples), size, out)
    print(f"{out}: a vocabulary learnt from {len(samples):,} captions")
