"""`latentsmith inspect`: what a path is, in a few lines."""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from latentsmith.data.ingest import REPORT_FILE, read_report
from latentsmith.data.latent_cache import CACHE_FILE, LatentCache
from latentsmith.data.sample_io import caption_of
from latentsmith.data.shards import SET_FILE, UNFINISHED_FILE, ShardSet, read_set_file
from latentsmith.data.storage import MirrorCache, is_remote
from latentsmith.files.archives import is_archive, safe_members
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import hash_file
from latentsmith.progress import progress
from latentsmith.training.checkpoint import STATE_FILE, checkpoints_in
from latentsmith.training.metrics_log import read_rows
from latentsmith.training.run_folder import CHECKPOINTS

from . import Checkpoint, Description, architecture, describe, open_checkpoint
from .convert import network_shapes
from .spec import SPEC_KEY

CAPTIONS_SHOWN = 3
CONFIG_KEYS = {"unet": "unet_config", "vae": "first_stage_config", "text_encoder": "cond_stage_config"}
KINDS = {
    "ldm": "LDM file",
    "nemo": "NeMo checkpoint",
    "diffusers": "diffusers folder",
    "run": "run",
    "component": "one",
}


def inspect(path: str | Path, *, weights: str = "ema", verify: bool = False) -> list[str]:
    """Print what `path` is: a checkpoint of any kind, a set of shards, a latent cache, a run folder or a tar.

    weights: "ema" or "raw", of a checkpoint that has both.
    verify: read everything; shards are compared with the checksums of set.json, checkpoints of ours with those of
    state.json, the tensors of any other checkpoint are looked through for values that are not finite.
    Returns what verifying found damaged, a line for each, printed too. Raises BadInput if `path` is none of these, or
    the address of anything but a set or a cache.
    """
    if is_remote(path):
        if verify:
            raise BadInput(f"{path}: --verify reads everything; run it where the files lie")
        print(path)
        path = MirrorCache.default().mirror(str(path))
    path = Path(path)
    say, check = handlers(path, weights)
    for line in say(path):
        print(line)
    if not verify:
        return []
    checked, damaged = check(path)
    for line in damaged:
        print(f"damaged: {line}")
    print(f"verified: {checked}" if not damaged else f"verified: {checked}, {len(damaged)} damaged")
    return damaged


def handlers(path: Path, weights: str) -> tuple[Any, Any]:
    """The function that describes `path` and the one that verifies it."""
    if is_shards(path):
        return (say_cache if (path / CACHE_FILE).is_file() else say_shards), verify_shards
    if (path / "config.yaml").is_file():
        return say_run, verify_run
    if (path / STATE_FILE).is_file():
        return say_step, verify_run
    return partial(say_checkpoint, weights=weights), partial(verify_checkpoint, weights=weights)


def is_shards(path: Path) -> bool:
    """Whether `path` means tar shards: a folder of them, one tar that is no .nemo, or a pattern."""
    if path.is_dir():
        is_set = any((path / mark).exists() for mark in (SET_FILE, UNFINISHED_FILE)) or any(path.glob("*.tar"))
        return is_set or MirrorCache.default().mirror_at(path) is not None
    if path.is_file():
        return is_archive(path) and path.suffix == ".tar" and "model_config.yaml" not in safe_members(path, path)
    return any(mark in path.name for mark in "*{")


# ---- Shards and caches ----


def say_shards(path: Path) -> Iterator[str]:
    samples = ShardSet(path)
    yield f"{path}: {len(samples):,} samples in {len(samples.paths):,} shards, {samples.bytes / 2**20:,.1f} MiB"
    yield f"  members   {', '.join(samples.shard(0).extensions)}"
    yield from say_captions(samples)
    if (path / REPORT_FILE).is_file():
        report = read_report(path)
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(report.reasons.items()))
        yield f"  set aside {report.bad:,} at import{': ' if reasons else ''}{reasons}"


def say_captions(samples: ShardSet) -> Iterator[str]:
    """The first captions of a set, if it has any."""
    shard = samples.shard(0)
    try:
        captions = [caption_of(shard[i]) for i in range(min(CAPTIONS_SHOWN, len(shard)))]
    except BadInput:
        yield "  captions  none"
        return
    for number, caption in enumerate(captions):
        yield f"  {'captions' if number == 0 else '':8}  {caption.strip()[:100]}"


def say_cache(path: Path) -> Iterator[str]:
    cache = LatentCache(path)
    shards = f"{len(cache):,} samples in {len(cache.shards.paths):,} shards, {cache.shards.bytes / 2**20:,.1f} MiB"
    yield f"{path}: latent cache, {shards}"
    for name, member in cache.info["members"].items():
        yield f"  {name} {tuple(member['shape'])} {member['dtype']}"
    yield from say_captions(cache.shards)
    for name, value in cache.info["fingerprints"].items():
        yield f"  made with {name} {value if isinstance(value, str) else json.dumps(value)}"
    yield f"  versions  {listed(cache.info['versions'])}"


def verify_shards(path: Path) -> tuple[str, list[str]]:
    """Compare each shard with its checksum in set.json."""
    if not (path / SET_FILE).is_file():
        return f"nothing, there are no checksums without {SET_FILE}", []
    records = read_set_file(path)
    return compared(path, {record.file: record.checksum for record in records})


def compared(folder: Path, checksums: Mapping[str, str]) -> tuple[str, list[str]]:
    """Hash the named files of a folder; which are missing or differ."""
    damaged = []
    with progress("verifying", "files") as tell:
        for done, (name, checksum) in enumerate(checksums.items(), 1):
            file = folder / name
            if not file.is_file():
                damaged.append(f"{file}: missing")
            elif hash_file(file) != checksum:
                damaged.append(f"{file}: not as it was written")
            tell(done, len(checksums))
    return f"{len(checksums):,} files", damaged


# ---- Runs ----


def say_run(path: Path) -> Iterator[str]:
    config: Any = OmegaConf.load(path / "config.yaml")
    steps = checkpoints_in(path / CHECKPOINTS)
    yield f"{path}: run {OmegaConf.select(config, 'name')}, {len(steps)} checkpoints"
    if rows := read_rows(path / "metrics.csv"):
        yield f"  last row  {', '.join(f'{name} {value:g}' for name, value in rows[-1].items())}"
    if steps:
        of = OmegaConf.select(config, "trainer.max_steps")
        yield from say_state(steps[-1], f" of {of:,}" if of and of > 0 else "")
        yield from say_parts(path)


def say_step(path: Path) -> Iterator[str]:
    yield f"{path}: checkpoint of a run"
    yield from say_state(path)
    yield from say_parts(path)


def say_state(path: Path, of: str = "") -> Iterator[str]:
    state = stored_state(path)
    seen = f"{state['consumed_samples']:,} samples seen"
    averages = ", ".join(state.get("ema_updates") or []) or "none"
    yield f"  newest    {path.name}: step {state['global_step']:,}{of}, {seen}, averages of {averages}"


def stored_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads((path / STATE_FILE).read_text("utf-8"))
        if outside := [name for name in state["checksums"] if Path(name).is_absolute() or ".." in Path(name).parts]:
            raise BadInput(f"{path / STATE_FILE}: names {outside[0]!r}, which is not a file of this checkpoint")
        return {**state, "checksums": dict(state["checksums"]), "global_step": int(state["global_step"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path / STATE_FILE}: not the state of a checkpoint ({error})") from None


def verify_run(path: Path) -> tuple[str, list[str]]:
    """Compare the files of every checkpoint of a run, or of this one, with the checksums in their state.json."""
    steps = [path] if (path / STATE_FILE).is_file() else checkpoints_in(path / CHECKPOINTS)
    checksums = {
        str((step / name).relative_to(path)): checksum
        for step in steps
        for name, checksum in stored_state(step)["checksums"].items()
    }
    return compared(path, checksums)


# ---- Checkpoints ----


def say_checkpoint(path: Path, weights: str) -> Iterator[str]:
    checkpoint = open_checkpoint(path, weights)
    held = " and ".join(checkpoint.parts) or "nothing that is known"
    yield f"{path}: {KINDS.get(checkpoint.kind, held)}"
    yield from say_parts(path, weights)


def say_parts(path: Path, weights: str = "ema") -> Iterator[str]:
    """The parts of a checkpoint, what it predicts, what is left unread; keys held against the sizes it states."""
    checkpoint = open_checkpoint(path, weights)
    shapes, unchecked = expected_shapes(checkpoint)
    found = describe(path, shapes, weights)
    if "unet" in found.parts:
        prediction, source = stated_prediction(checkpoint) or (found.prediction, found.prediction_source)
        yield f"  model     {found.version or 'sizes of its own'}, prediction {prediction} ({source})"
    for name, part in found.parts.items():
        kinds = ", ".join(sorted(part.dtypes))
        yield f"  {name:12} {part.tensors:,} tensors, {part.parameters:,} parameters, {kinds}, {part.dialect} names"
    yield from say_keys(found)
    if found.unknown:
        yield f"  {len(found.unknown)} keys of no part ({', '.join(found.unknown[:3])}): nothing loads it as it is"
    if unchecked:
        yield f"  keys not checked: {unchecked}"
    if found.has_ema:
        yield "  holds a moving average of the U-Net beside its raw weights"
    if found.ignored:
        yield f"  not used  {', '.join(f'{count:,} {name}' for name, count in found.ignored.items())}"
    for note in found.notes:
        yield f"  note      {note}"
    for key, value in found.metadata.items():
        if key.startswith("modelspec.") or key == "latentsmith.omitted":
            yield f"  {key} {value[:100]}"


def say_keys(found: Description) -> Iterator[str]:
    """Keys that a part lacks, has too many, or has in another shape."""
    for name, part in found.parts.items():
        for fault, keys in (("missing", part.missing), ("unknown", part.extra), ("of another shape", part.mismatched)):
            if keys:
                yield f"  {name}: {len(keys)} keys {fault} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"


def expected_shapes(checkpoint: Checkpoint) -> tuple[dict[str, Any], str]:
    """Part -> names and shapes by the sizes that the checkpoint states or shows, and why there are none."""
    stored = stored_spec(checkpoint)
    try:
        configs = {part: stored[key] for part, key in CONFIG_KEYS.items() if part in checkpoint.parts and key in stored}
        configs = configs or architecture(checkpoint)
        return {part: network_shapes(part, config) for part, config in configs.items()}, ""
    except (BadInput, ValueError, TypeError) as error:
        return {}, str(error)


def stored_spec(checkpoint: Checkpoint) -> dict[str, Any]:
    """What our own files say in their metadata: of a whole model, or the sizes of one part; {} for any other file."""
    metadata = checkpoint.metadata
    try:
        spec = json.loads(metadata.get(SPEC_KEY, "{}"))
        parts = {
            key: json.loads(metadata[f"latentsmith.{key}"])
            for key in CONFIG_KEYS.values()
            if f"latentsmith.{key}" in metadata
        }
    except ValueError:
        return {}
    return parts | spec if isinstance(spec, dict) else {}


def stated_prediction(checkpoint: Checkpoint) -> tuple[str, str] | None:
    prediction = stored_spec(checkpoint).get("prediction_type")
    return (prediction, "its own metadata") if prediction else None


def verify_checkpoint(path: Path, weights: str) -> tuple[str, list[str]]:
    """Read every tensor; which hold values that are not finite."""
    parts = open_checkpoint(path, weights).parts
    damaged, total = [], sum(len(part.entries) for part in parts.values())
    with progress("verifying", "tensors") as tell:
        done = 0
        for part in parts.values():
            for key, entry in part.entries.items():
                if entry.dtype.is_floating_point and not entry.read().isfinite().all():
                    damaged.append(f"{part.path}: {part.keys.get(key, key)} holds values that are not finite")
                done += 1
                tell(done, total)
    return f"{total:,} tensors are finite" if not damaged else f"{total:,} tensors", damaged


def listed(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
