"""What a checkpoint is and holds, in a few lines, from its headers; and whether its numbers are sound."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from latentsmith.architectures import CLIP_SIZES, COMPONENTS
from latentsmith.files.errors import BadInput
from latentsmith.progress import progress

from . import clip
from .base import Checkpoint, Part, Shapes
from .formats import FORMATS, dialect_of
from .load import network_shapes
from .match import audit
from .open import open_checkpoint
from .sizes import architecture, version_of
from .spec import prediction_of, stated_spec


@dataclass(frozen=True)
class PartSummary:
    """dialect: whose names it uses. dtypes: how many tensors of each. missing, extra: keys against the given shapes."""

    dialect: str
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()


@dataclass(frozen=True)
class Summary:
    """What a checkpoint holds. version: "v1", "v2" or "". prediction: type, or "unknown", and where it was read.

    ignored: how many keys of each sort nothing uses. unknown: keys that belong to no part.
    """

    version: str
    prediction: tuple[str, str]
    parts: dict[str, PartSummary]
    ignored: dict[str, int]
    unknown: tuple[str, ...]
    notes: tuple[str, ...]


def inspect_checkpoint(path: str | Path, weights: str = "ema") -> Iterator[str]:
    """Yield lines that say what the checkpoint at `path` is and holds. weights: "ema" or "raw", where it has both."""
    checkpoint = open_checkpoint(path, weights)
    held = " and ".join(checkpoint.parts) or "no known part"
    title = FORMATS[checkpoint.format].title if checkpoint.format in FORMATS else held
    yield f"{path}: {title}"
    yield from inspect_parts(checkpoint)


def inspect_parts(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield lines on each part, on what is left unread, and on keys that do not fit the sizes the checkpoint states."""
    shapes, unchecked = expected_shapes(checkpoint)
    found = summary(checkpoint, shapes)
    if "unet" in found.parts:
        prediction, source = found.prediction
        yield f"  model     {found.version or 'sizes of its own'}, prediction {prediction} ({source})"
    for name, part in found.parts.items():
        dtypes = ", ".join(sorted(part.dtypes))
        yield f"  {name:12} {part.tensors:,} tensors, {part.parameters:,} parameters, {dtypes}, {part.dialect} names"
    for name, part in found.parts.items():
        for fault, keys in (("missing", part.missing), ("unknown", part.extra), ("of another shape", part.mismatched)):
            if keys:
                yield f"  {name}: {len(keys)} keys {fault} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
    if found.unknown:
        yield f"  {len(found.unknown)} keys of no part ({', '.join(found.unknown[:3])}): nothing loads it as it is"
    if unchecked:
        yield f"  keys not checked: {unchecked}"
    if checkpoint.has_ema:
        yield "  holds a moving average of the U-Net beside its raw weights"
    if found.ignored:
        yield f"  not used  {', '.join(f'{count:,} {name}' for name, count in found.ignored.items())}"
    for note in found.notes:
        yield f"  note      {note}"
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


def summary(checkpoint: Checkpoint, shapes: Mapping[str, Shapes] | None = None) -> Summary:
    """Summarise what was read of a checkpoint's headers. shapes: part -> names and shapes to check it with."""
    expected = shapes or {}
    parts = {
        name: _summary_of(part, checkpoint, audit(checkpoint, name, expected[name]) if name in expected else ())
        for name, part in checkpoint.parts.items()
    }
    prediction, source = prediction_of(checkpoint)
    if own := stated_spec(checkpoint).get("prediction_type"):
        prediction, source = own, "its own metadata"
    ignored = Counter(key.split(".")[0] if "." in key else "schedule and scalars" for key in checkpoint.ignored)
    return Summary(
        version_of(checkpoint) or "", (prediction or "unknown", source), parts, dict(ignored), checkpoint.unknown,
        _notes(checkpoint),
    )  # fmt: skip


def _summary_of(part: Part, checkpoint: Checkpoint, faults: tuple[list[str], ...]) -> PartSummary:
    entries = part.entries.values()
    dtypes = Counter(str(entry.dtype).removeprefix("torch.") for entry in entries)
    parameters = sum(entry.numel for entry in entries if entry.dtype.is_floating_point)
    title = dialect_of(part, checkpoint.config).title
    return PartSummary(title, len(entries), parameters, dict(dtypes), *map(tuple, faults))


def _notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    notes = []
    text, path = checkpoint.parts.get("text_encoder"), checkpoint.path
    if text and dialect_of(text, checkpoint.config) is clip.OPEN_CLIP_DIALECT:
        layers = CLIP_SIZES["ViT-H-14"].layers
        if clip.depth(text.entries) == layers - 1:
            notes.append(f"the text encoder lacks the unused {layers}th layer and projection (14 tensors)")
    sibling = path.with_name(f"{path.stem}-EMA{path.suffix}")
    if path.suffix == ".ckpt" and sibling.is_file():
        notes.append(f"its moving average is {sibling.name}")
    return tuple(notes)
