"""`latentsmith data ...`: sets of captioned pictures."""

from pathlib import Path
from typing import Any

from latentsmith.demo import scenes
from latentsmith.progress import progress
from latentsmith.text.tokenizer import train_vocabulary as learn_vocabulary

from .filters import Filters
from .ingest import ImportReport, import_dataset
from .sample_io import caption_of
from .shards import ShardSet


def import_data(
    source: str | Path,
    out: Path,
    *,
    samples_per_shard: int = 1000,
    max_bad: int | None = None,
    no_duplicates: bool = False,
    follow_links: bool = False,
    allow_outside: bool = False,
    **filters: Any,
) -> ImportReport:
    """Pictures and captions to indexed shards; prints what came in and what was set aside, by reason.

    filters: the fields of `Filters`.
    """
    with progress("importing", "samples") as bar:
        report = import_dataset(
            source,
            out,
            samples_per_shard=samples_per_shard,
            max_bad=max_bad,
            filters=Filters(**filters),
            keep_duplicates=not no_duplicates,
            follow_links=follow_links,
            allow_outside=allow_outside,
            progress=lambda done, total, bad: bar(done, total, note=f"{bad:,} set aside" if bad else ""),
        )
    print(f"{out}: {report.good:,} samples in {report.shards} shards, {report.bad:,} set aside")
    for reason, count in sorted(report.reasons.items()):
        print(f"  {count:,} {reason}")
    if report.bad:
        print(f"each is listed in {report.path}")
    return report


def write_scenes(out: Path, *, count: int, seed: int = 0, doodles: float = 0.0) -> None:
    """A folder of drawn scenes with their captions; a share of `doodles` are free drawings instead."""
    scenes.write_pictures(out, count, seed, doodles=doodles)
    print(f"{out}: {count:,} pictures with captions")


def train_vocabulary(source: Path, out: Path, *, size: int) -> None:
    """Learn a vocabulary of `size` tokens from the captions of a set, into tokenizer.json."""
    samples = ShardSet(source)
    captions = (caption_of(samples.shard(shard), sample) for shard, sample in located(samples))
    learn_vocabulary(captions, size, out)
    print(f"{out}: a vocabulary learnt from {len(samples):,} captions")


def located(samples: ShardSet):
    """(shard number, sample) for every sample of a set, in order."""
    for index in range(len(samples)):
        yield samples.locate(index)[0], samples[index]
