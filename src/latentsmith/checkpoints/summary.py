"""What a checkpoint is and holds, for `latentsmith inspect`."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import clip, unet_keys, vae_keys
from .match import Shapes, audit
from .open import Part, open_checkpoint
from .spec import context_width, prediction_of


@dataclass(frozen=True)
class PartDescription:
    """dialect: whose names it uses. dtypes: how many tensors of each. missing, extra: keys against the given shapes."""

    dialect: str
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()


@dataclass(frozen=True)
class Description:
    """kind: as `Checkpoint.kind`. version: "SD1" or "SD2" by context width, else "". prediction: type or "unknown".
    unknown: keys that belong to no part."""

    path: Path
    kind: str
    version: str
    prediction: str
    prediction_source: str
    parts: dict[str, PartDescription]
    ignored: dict[str, int]
    has_ema: bool
    metadata: dict[str, str]
    unknown: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())


def describe(path: str | Path, shapes: Mapping[str, Shapes] | None = None, weights: str = "ema") -> Description:
    """Read the headers at `path`. shapes: part -> canonical names and shapes to hold it against."""
    checkpoint = open_checkpoint(path, weights)
    expected = shapes or {}
    parts = {
        name: _describe_part(part, audit(checkpoint, name, expected[name]) if name in expected else ([], [], []))
        for name, part in checkpoint.parts.items()
    }
    prediction, source = prediction_of(checkpoint)
    version = {768: "SD1", 1024: "SD2"}.get(context_width(checkpoint) or 0, "")
    ignored = dict(Counter(key.split(".")[0] if "." in key else "schedule and scalars" for key in checkpoint.ignored))
    return Description(
        Path(path), checkpoint.kind, version, prediction or "unknown", source, parts, ignored,
        checkpoint.has_ema, dict(checkpoint.metadata), checkpoint.unknown, _notes(checkpoint.parts, checkpoint.path),
    )  # fmt: skip


def _describe_part(part: Part, found: tuple[list[str], list[str], list[str]]) -> PartDescription:
    dialect = {"unet": unet_keys.detect, "vae": vae_keys.detect, "text_encoder": clip.detect}[part.name]
    entries = part.entries.values()
    dtypes = Counter(str(entry.dtype).removeprefix("torch.") for entry in entries)
    parameters = sum(entry.numel for entry in entries if entry.dtype.is_floating_point)
    missing, extra, mismatched = map(tuple, found)
    return PartDescription(
        str(dialect(part.entries)), len(entries), parameters, dict(dtypes), missing, extra, mismatched
    )


def _notes(parts: Mapping[str, Part], path: Path) -> tuple[str, ...]:
    notes = []
    text = parts.get("text_encoder")
    if text and clip.depth(text.entries) == 23 and clip.detect(text.entries) == "openclip":
        notes.append("the text encoder lacks the unused 24th layer and projection (14 tensors)")
    sibling = path.with_name(f"{path.stem}-EMA{path.suffix}")
    if path.suffix == ".ckpt" and sibling.is_file():
        notes.append(f"its moving average is {sibling.name}")
    return tuple(notes)
