"""Describe a set of shards or a latent cache in a few lines, and check that its files are as they were written."""

import json
from collections.abc import Iterator
from pathlib import Path

from latentsmith.files.archives import is_archive, safe_members
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import changed_files
from latentsmith.progress import progress

from .ingest import REPORT_FILE, read_report
from .latent_cache import CACHE_FILE, LatentCache
from .mirrors import MirrorCache
from .sample_io import caption_of
from .shards import SET_FILE, UNFINISHED_FILE, ShardSet, read_set_file

CAPTIONS_SHOWN = 3


def is_shards(path: Path) -> bool:
    """Return whether `path` means tar shards: a folder of them, one tar that is no .nemo, or a pattern."""
    if path.is_dir():
        is_set = any((path / mark).exists() for mark in (SET_FILE, UNFINISHED_FILE)) or any(path.glob("*.tar"))
        return is_set or MirrorCache.default().mirror_at(path) is not None
    if path.is_file():
        return is_archive(path) and path.suffix == ".tar" and "model_config.yaml" not in safe_members(path, path)
    return any(mark in path.name for mark in "*{")


def inspect_shards(path: Path) -> Iterator[str]:
    """Yield lines that say what the shards, or the latent cache, at `path` hold."""
    if (path / CACHE_FILE).is_file():
        yield from inspect_cache(path)
        return
    samples = ShardSet(path)
    yield f"{path}: {len(samples):,} samples in {len(samples.paths):,} shards, {samples.bytes / 2**20:,.1f} MiB"
    yield f"  members   {', '.join(samples.shard(0).extensions)}"
    yield from _captions(samples)
    if (path / REPORT_FILE).is_file():
        report = read_report(path)
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(report.reasons.items()))
        yield f"  set aside {report.bad:,} at import{': ' if reasons else ''}{reasons}"


def inspect_cache(path: Path) -> Iterator[str]:
    """Yield lines that say what a latent cache holds and what made it."""
    cache = LatentCache(path)
    shards = f"{len(cache):,} samples in {len(cache.shards.paths):,} shards, {cache.shards.bytes / 2**20:,.1f} MiB"
    yield f"{path}: latent cache, {shards}"
    for name, member in cache.info["members"].items():
        yield f"  {name} {tuple(member['shape'])} {member['dtype']}"
    yield from _captions(cache.shards)
    for name, value in cache.info["fingerprints"].items():
        yield f"  made with {name} {value if isinstance(value, str) else json.dumps(value)}"
    versions = ", ".join(f"{name} {version}" for name, version in cache.info["versions"].items())
    yield f"  versions  {versions}"


def _captions(samples: ShardSet) -> Iterator[str]:
    """Yield the first captions of a set, if it has any."""
    shard = samples.shard(0)
    try:
        captions = [caption_of(shard[i]) for i in range(min(CAPTIONS_SHOWN, len(shard)))]
    except BadInput:
        yield "  captions  none"
        return
    for number, caption in enumerate(captions):
        yield f"  {'captions' if number == 0 else '':8}  {caption.strip()[:100]}"


def verify_shards(path: Path) -> tuple[str, list[str]]:
    """Compare each shard with its checksum in set.json. Returns what was checked, and a line for each damaged file."""
    if not (path / SET_FILE).is_file():
        return f"nothing, there are no checksums without {SET_FILE}", []
    checksums = {record.file: record.checksum for record in read_set_file(path)}
    with progress("verifying", "files") as bar:
        return f"{len(checksums):,} files", changed_files(path, checksums, bar)
