"""Check that `convert` wrote what it read: every tensor, every setting, token ids, and what each network computes.

Each side is read with its own spec and tokenizer, so that a setting which is lost on the way shows.

Each check is a function of a Conversion that yields lines to print and raises RuntimeError for a fault. To check more
of a model (its tokenizer, its schedule), write another and list it in CHECKS.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from latentsmith.diffusion import sampling_schedule
from latentsmith.files.lazy import LazyTensor
from latentsmith.text.tokenizer import Tokenizer
from latentsmith.text.vocabulary import own_vocabulary

from . import clip
from .base import Checkpoint, ModelSpec, Shapes, shown
from .load import meta_weights, new_network
from .match import match, unused_text
from .spec import spec_of

CAPTION = "A red circle, above (a blue) square!"


@dataclass(frozen=True)
class Conversion:
    """What was read and what was written, in canonical names. written: `path`, opened again. dtype: None keeps each.

    source_path: what was read. spec, written_spec: what each side says of itself.
    """

    path: Path
    source_path: Path
    spec: ModelSpec
    written_spec: ModelSpec
    dtype: torch.dtype | None
    shapes: Mapping[str, Shapes]
    source: Mapping[str, Mapping[str, LazyTensor]]
    written: Mapping[str, Mapping[str, LazyTensor]]


def verify_conversion(
    source: Mapping[str, Mapping[str, LazyTensor]],
    source_path: Path,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    shapes: Mapping[str, Shapes],
    dtype: torch.dtype | None,
) -> Iterator[str]:
    """Run every check on a conversion. checkpoint: the result, opened again. Yields lines, raises RuntimeError."""
    written = {part: match(checkpoint, part, shapes[part]) for part in source}
    written["text_encoder"] |= unused_text(checkpoint, shapes["text_encoder"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the source, said already
        written_spec = spec_of(checkpoint)
    conversion = Conversion(checkpoint.path, source_path, spec, written_spec, dtype, shapes, source, written)
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


def check_settings(conversion: Conversion) -> Iterator[str]:
    """Compare what both sides say of how they are run, and the sigmas and timesteps that follow; name what differs."""
    before, after = (json.loads(spec.to_json()) for spec in (conversion.spec, conversion.written_spec))
    differing = [key for key in before if not key.endswith("_config") and before[key] != after[key]]
    for key in differing:
        yield f"{key}: {shown(before[key])} became {shown(after[key])}"
    grids = [_sampling(spec) for spec in (conversion.spec, conversion.written_spec)]
    same = all(torch.equal(one, other) for one, other in zip(*grids, strict=True))
    yield f"schedule: {'the same' if same else 'other'} sigmas and timesteps at 4 steps"


def _sampling(spec: ModelSpec) -> tuple[Tensor, Tensor]:
    steps = min(4, spec.noise_schedule().timesteps)
    schedule = sampling_schedule(
        spec.noise_schedule(), "ddim", steps, spacing=spec.timestep_spacing, steps_offset=spec.steps_offset,
        set_alpha_to_one=spec.set_alpha_to_one, karras=spec.karras_sigmas,
    )  # fmt: skip
    return schedule.sigmas, schedule.timesteps


def check_tokens(conversion: Conversion) -> Iterator[str]:
    """Compare the token ids of a caption, padding included, where both sides have a tokenizer of their own."""
    paths = (conversion.source_path, conversion.path)
    if not all(map(own_vocabulary, paths)):
        return
    length = clip.max_length(conversion.source["text_encoder"])
    before, after = (Tokenizer.find(None, path, length)([CAPTION]) for path in paths)
    same = torch.equal(torch.as_tensor(before), torch.as_tensor(after))
    yield f"tokenizer: {'the same' if same else 'other'} ids of {CAPTION!r}"


def check_outputs(conversion: Conversion) -> Iterator[str]:
    """Run each network with both sets of weights, in float32, and say how far the outputs lie apart."""
    for part, shapes in conversion.shapes.items():
        before, after = (
            _output(part, spec, {name: weights[part][name] for name in shapes})
            for spec, weights in (
                (conversion.spec, conversion.source),
                (conversion.written_spec, conversion.written),
            )
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


CHECKS: tuple[Callable[[Conversion], Iterator[str]], ...] = (
    check_tensors,
    check_settings,
    check_tokens,
    check_outputs,
)
