"""Describe a checkpoint in a few lines, from its headers, and check that its numbers are sound."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from latentsmith.architectures import CLIP_SIZES, COMPONENTS
from latentsmith.files.errors import BadInput
from latentsmith.progress import progress

from . import clip
from .base import Checkpoint, Shapes, some
from .formats import FORMATS, dialect_of
from .load import network_shapes
from .match import audit
from .open import open_checkpoint
from .sizes import architecture, version_of
from .spec import notes_of, prediction_of, stated_spec

FAULTS = ("missing", "unknown", "of another shape")  # in the order of `audit`


def inspect_checkpoint(path: str | Path, weights: str = "ema") -> Iterator[str]:
    """Yield lines that say what the checkpoint at `path` is and holds. weights: "ema" or "raw", where it has both."""
    checkpoint = open_checkpoint(path, weights)
    held = " and ".join(checkpoint.parts) or "no known part"
    title = FORMATS[checkpoint.format].title if checkpoint.format in FORMATS else held
    yield f"{path}: {title}"
    yield from inspect_parts(checkpoint)


def inspect_parts(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield lines on each part, on what is left unread, and on keys that do not fit the sizes the checkpoint states."""
    if "unet" in checkpoint.parts:
        prediction, source = prediction_of(checkpoint)
        if stated := stated_spec(checkpoint).get("prediction_type"):
            prediction, source = stated, "its own metadata"
        version = version_of(checkpoint) or "sizes of its own"
        yield f"  model     {version}, prediction {prediction or 'unknown'} ({source})"
    for name, part in checkpoint.parts.items():
        entries, title = part.entries.values(), dialect_of(part, checkpoint.config).title
        dtypes = ", ".join(sorted({str(entry.dtype).removeprefix("torch.") for entry in entries}))
        parameters = sum(entry.numel for entry in entries if entry.dtype.is_floating_point)
        yield f"  {name:12} {len(entries):,} tensors, {parameters:,} parameters, {dtypes}, {title} names"
    shapes, unchecked = expected_shapes(checkpoint)
    for name in shapes:
        for fault, keys in zip(FAULTS, audit(checkpoint, name, shapes[name]), strict=True):
            if keys:
                yield f"  {name}: {len(keys)} keys {fault} ({some(keys)})"
    if checkpoint.unknown:
        yield f"  {len(checkpoint.unknown)} keys of no part ({some(checkpoint.unknown)}): nothing loads it as it is"
    if unchecked:
        yield f"  keys not checked: {unchecked}"
    if checkpoint.has_ema:
        yield "  holds a moving average of the U-Net beside its raw weights"
    if checkpoint.ignored:
        names = Counter(key.split(".")[0] if "." in key else "schedule and scalars" for key in checkpoint.ignored)
        yield f"  not used  {', '.join(f'{count:,} {name}' for name, count in names.items())}"
    yield from _notes(checkpoint)
    for key, value in checkpoint.metadata.items():
        if key.startswith("modelspec.") or key == "latentsmith.omitted":
            yield f"  {key} {value[:100]}"


def verify_checkpoint(path: str | Path, weights: str = "ema") -> tuple[str, list[str]]:
    """Read every tensor. Returns what was checked, and a line for each that holds values which are not finite."""
    parts = open_checkpoint(path, weights).parts
    damaged, total = [], sum(len(part.entries) for part in parts.values())
    with progress("verifying", "tensors") as bar:
        done = 0
        for part in parts.values():
            for key, entry in part.entries.items():
                if entry.dtype.is_floating_point and not entry.read().isfinite().all():
                    damaged.append(f"{part.path}: {part.keys.get(key, key)} holds values that are not finite")
                done += 1
                bar(done, total)
    return f"{total:,} tensors are finite" if not damaged else f"{total:,} tensors", damaged


def expected_shapes(checkpoint: Checkpoint) -> tuple[dict[str, Shapes], str]:
    """Return part -> names and shapes by the sizes that the checkpoint states or shows, or why there are none."""
    stated = stated_spec(checkpoint)
    keys = {part: COMPONENTS[part].config_key for part in checkpoint.parts}
    try:
        configs = {part: stated[key] for part, key in keys.items() if key in stated} or architecture(checkpoint)
        return {part: network_shapes(part, config) for part, config in configs.items()}, ""
    except (BadInput, ValueError, TypeError) as error:
        return {}, str(error)


def _notes(checkpoint: Checkpoint) -> Iterator[str]:
    text, path = checkpoint.parts.get("text_encoder"), checkpoint.path
    yield from (f"  note      {note}" for note in notes_of(checkpoint))
    if text and dialect_of(text, checkpoint.config) is clip.OPEN_CLIP_DIALECT:
        layers = CLIP_SIZES["ViT-H-14"].layers
        if clip.depth(text.entries) == layers - 1:
            yield f"  note      the text encoder lacks the unused {layers}th layer and projection (14 tensors)"
    sibling = path.with_name(f"{path.stem}-EMA{path.suffix}")
    if path.suffix == ".ckpt" and sibling.is_file():
        yield f"  note      its moving average is {sibling.name}"
