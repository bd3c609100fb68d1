"""Check that `convert` wrote what it read: every tensor, and what each network makes of one input.

Each check is a function of a Conversion that yields lines to print and raises RuntimeError for a fault. To check more
of a model (its tokenizer, its schedule), write another and list it in CHECKS.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from latentsmith.files.lazy import LazyTensor

from .base import Checkpoint, ModelSpec, Shapes
from .load import meta_weights, new_network
from .match import match, unused_text


@dataclass(frozen=True)
class Conversion:
    """Source and result of a conversion, in canonical names. written: `path`, opened again. dtype: None keeps each."""

    path: Path
    spec: ModelSpec
    dtype: torch.dtype | None
    shapes: Mapping[str, Shapes]
    source: Mapping[str, Mapping[str, LazyTensor]]
    written: Mapping[str, Mapping[str, LazyTensor]]


def verify_conversion(
    source: Mapping[str, Mapping[str, LazyTensor]],
    checkpoint: Checkpoint,
    spec: ModelSpec,
    shapes: Mapping[str, Shapes],
    dtype: torch.dtype | None,
) -> Iterator[str]:
    """Run every check on a conversion. checkpoint: the result, opened again. Yields lines, raises RuntimeError."""
    written = {part: match(checkpoint, part, shapes[part]) for part in source}
    written["text_encoder"] |= unused_text(checkpoint, shapes["text_encoder"])
    conversion = Conversion(checkpoint.path, spec, dtype, shapes, source, written)
    for check in CHECKS:
        yield from check(conversion)


def check_tensors(conversion: Conversion) -> Iterator[str]:
    """Require every tensor to be, bit for bit, its source rounded to the dtype; say how far that moved it."""
    for part, tensors in conversion.source.items():
        largest, at = 0.0, ""
        for name, tensor in tensors.items():
            written = conversion.written[part][name]
            if tensor.to(conversion.dtype).to_bytes() != written.to_bytes():
                path = conversion.path
                raise RuntimeError(f"{path}: {part} {name} is not what was written; check the disk and convert again")
            apart = _difference(tensor, written)
            if apart > largest:
                largest, at = apart, f" ({name})"
        yield f"{part}: {len(tensors):,} tensors, largest difference {largest:.3g}{at}"


def _difference(source: LazyTensor, written: LazyTensor) -> float:
    """Return the largest difference of two tensors of one shape; 0 for equal dtypes, whose bits were compared."""
    if source.dtype == written.dtype or not source.numel:
        return 0.0
    return (source.read().float() - written.read().float()).abs().max().item()


def check_outputs(conversion: Conversion) -> Iterator[str]:
    """Run each network with both sets of weights, in float32, and say how far the outputs lie apart."""
    for part, shapes in conversion.shapes.items():
        before, after = (
            _output(part, conversion.spec, {name: weights[part][name] for name in shapes})
            for weights in (conversion.source, conversion.written)
        )
        apart, scale = (after - before).abs().max().item(), before.abs().max().item()
        yield f"{part}: largest difference of its output {apart:.3g}, where the largest value is {scale:.3g}"


@torch.no_grad()
def _output(part: str, spec: ModelSpec, weights: Mapping[str, LazyTensor]) -> Tensor:
    """Return what the network makes of a small input that is always the same."""
    with meta_weights():
        network = new_network(part, spec.config_of(part))
    # Copies, since kernels round by where a tensor lies in memory, and mapped files lie anywhere.
    aligned = {name: tensor.read().to(torch.float32, copy=True).contiguous() for name, tensor in weights.items()}
    network.load_state_dict(aligned, assign=True)
    network.eval()
    generator = torch.Generator().manual_seed(0)
    if part == "text_encoder":
        output: Tensor = network(torch.randint(network.vocab_size, (1, network.max_length), generator=generator))
        return output
    if part == "vae":
        side = 4 * network.downsampling
        moments = network.encode(torch.rand(1, 3, side, side, generator=generator) * 2 - 1)
        return torch.cat([moments.flatten(), network.decode(network.mode(moments)).flatten()])
    latents = torch.randn(1, network.in_channels, 16, 16, generator=generator)
    width = network.context_dim
    context = None if width is None else torch.randn(1, 77, width, generator=generator)
    output = network(latents, torch.tensor([500]), context)
    return output


CHECKS: tuple[Callable[[Conversion], Iterator[str]], ...] = (check_tensors, check_outputs)
