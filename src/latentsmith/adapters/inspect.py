"""Describe an adapter file in a few lines."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from latentsmith.files.errors import BadInput

from .convert import layers_for
from .file import BASE_TITLES
from .inject import grouped
from .read import FORMATS, read_adapter


def inspect_adapter(path: str | Path, model: str | Path | None = None) -> Iterator[str]:
    """Yield lines on scheme, rank, alpha, targets, base model, words and metadata. model: as in convert_adapter."""
    file = read_adapter(path, layers_for(path, model))
    title = next(each.title for each in FORMATS if each.name == file.format)
    yield f"{path}: an adapter, {title} names"
    yield f"  scheme    {file.scheme}, rank {_counted(file.ranks)}, alpha {_counted(file.alphas)}"
    yield f"  base      {BASE_TITLES[file.base] if file.base else 'the file does not say'}"
    for part, count in file.layers.items():
        tensors = file.parts[part]
        kinds = Counter(map(_kind, grouped(tensors)))
        dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for k, t in tensors.items() if t.dim()}))
        numbers = sum(tensor.numel() for tensor in tensors.values() if tensor.dim())
        listed = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
        yield f"  {part:12} {count} layers ({listed}), {numbers:,} parameters, {dtypes}"
    if file.embeddings:
        yield f"  words     {', '.join(f'{token} ({len(rows)} vectors)' for token, rows in file.embeddings.items())}"
    if file.trigger_words:
        yield f"  trigger   {', '.join(file.trigger_words)}"
    for key, value in sorted(file.metadata.items()):
        shown = " ".join(value.split())
        yield f"  {key}: {shown if len(shown) <= 100 else shown[:97] + '...'}"


def verify_adapter(path: str | Path, model: str | Path | None = None) -> tuple[str, list[str]]:
    """Read every tensor; return what was checked, and a line for a fault."""
    try:
        file = read_adapter(path, layers_for(path, model))
    except BadInput as error:
        return "every tensor", [str(error)]
    return f"{sum(file.layers.values())} layers, all numbers finite", []


def _counted(values: tuple[float, ...]) -> str:
    """Return distinct values, the commonest first, with how often each is where there are several."""
    counts = Counter(values)
    if len(counts) == 1:
        return f"{values[0]:g}"
    return ", ".join(f"{value:g} ({count})" for value, count in counts.most_common(4)) + (
        ", ..." if len(counts) > 4 else ""
    )


def _kind(layer: str) -> str:
    """Return what sort of layer a name is of."""
    if "attn" in layer:
        return "attention"
    return (
        "feed-forward" if ".ff." in layer or ".mlp." in layer else "projection" if ".proj_" in layer else "convolution"
    )
