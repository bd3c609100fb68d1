"""`latentsmith convert` of adapters: from one format to another, into a model, and out of the difference of two."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentsmith.checkpoints import open_checkpoint, spec_of
from latentsmith.checkpoints.base import Checkpoint
from latentsmith.checkpoints.convert import convert
from latentsmith.checkpoints.formats import FORMATS as MODEL_FORMATS
from latentsmith.checkpoints.load import meta_weights, network_shapes, new_network
from latentsmith.checkpoints.match import match
from latentsmith.files.errors import BadInput
from latentsmith.files.lazy import LazyTensor
from latentsmith.precision import dtype_of
from latentsmith.progress import progress

from .file import AdapterFile, Header
from .inject import grouped
from .names import Layers, layers_of
from .read import adapter_format, base_of, open_source, published_layers, read_adapter
from .schemes import change_of, wide
from .spec import AdapterSpec, target_ranks
from .write import base_of_layers, check_destination, header_of, save_adapter

PARTS = ("unet", "text_encoder")
OVERSAMPLING, ITERATIONS = 16, 6  # of the randomised SVD (Halko et al. 2011): exact to rounding for what is kept
Parts = dict[str, dict[str, LazyTensor]]


def is_adapter(path: str | Path) -> bool:
    """Return whether a path holds an adapter rather than a model; False for what cannot be read."""
    try:
        return adapter_format(open_source(Path(path)).file) is not None
    except (BadInput, OSError):
        return False


def layers_for(path: str | Path, model: str | Path | None = None) -> Layers:
    """Return the layers that an adapter is for: of `model`, else of the Stable Diffusion that the file shows."""
    if model is not None:
        return model_layers(open_checkpoint(model))
    source = open_source(Path(path))
    format = adapter_format(source.file)
    found = format.read(source, published_layers("SD1")) if format else None
    base = base_of(source, found) if found else None
    return published_layers("SD2" if base == "SD2" else "SD1")


def model_layers(checkpoint: Checkpoint) -> Layers:
    """Return the layers of a checkpoint's U-Net and text encoder."""
    spec = spec_of(checkpoint)
    with meta_weights():
        return layers_of({part: new_network(part, spec.config_of(part)) for part in PARTS})


def convert_adapter(
    src: str | Path, dst: str | Path, to: str, *, dtype: str | None = None, model: str | Path | None = None
) -> Path:
    """Rewrite an adapter as "kohya" or "diffusers" and return the file.

    dtype: "fp32", "fp16" or "bf16"; None keeps each. model: whose layers it is for, where that is neither Stable
    Diffusion 1 nor 2 at their published sizes.
    """
    dst = Path(dst)
    check_destination(dst, to)
    layers = layers_for(src, model)
    file = read_adapter(src, layers)
    if file.embeddings:
        print(f"note: the words bundled with it ({', '.join(file.embeddings)}) are not written")
    parts = file.parts if dtype is None else {part: _cast(state, dtype) for part, state in file.parts.items()}
    written = save_adapter(dst, parts, layers, header_of(file, dst.stem, layers), to)
    print(
        f"{written}: {to}, {file.scheme}, {sum(file.layers.values())} layers, {written.stat().st_size / 2**20:.1f} MiB"
    )
    return written


def _cast(state: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    return {key: LazyTensor.of(tensor).to(dtype_of(dtype), key).read() for key, tensor in state.items()}


# ---- Into a model ----


def merge(
    src: str | Path, dst: str | Path, loras: Sequence[tuple[Path, float]], to: str | None = None, **options: Any
) -> Path:
    """Write the model at `src` with adapters merged into its weights, and return `dst`.

    loras: files and weights. to: a model's format; None: the source's. options: those of checkpoints.convert.
    Sums are float32 and written in the model's dtype, so what a narrow dtype rounds away cannot be taken out again.
    """
    checkpoint = open_checkpoint(src, options.get("weights", "ema"))
    if to is None:
        to = checkpoint.format
        if to not in MODEL_FORMATS or not MODEL_FORMATS[to].write:
            raise BadInput(f"{src}: give the format to write with --to; that of the source ({to}) is not written")
    layers = model_layers(checkpoint)
    files = [(read_adapter(path, layers), weight) for path, weight in loras]
    for file, _ in files:
        if file.embeddings:
            print(f"note: {file.path}: the words bundled with it ({', '.join(file.embeddings)}) are not merged")
    result = convert(src, dst, to, change=partial(merged_parts, files=files), **options)
    for file, weight in files:
        print(f"merged {file.path} at {weight:g}: {file.scheme}, {sum(file.layers.values())} layers")
    return result


def merged_parts(parts: Parts, *, files: Sequence[tuple[AdapterFile, float]]) -> Parts:
    """Return a model's tensors with the changes of adapters added when they are read."""
    changed: Parts = {part: dict(tensors) for part, tensors in parts.items()}
    for part in PARTS:
        changes: dict[str, list[Callable[[Tensor], Tensor]]] = {}
        for file, strength in files:
            for layer, tensors in grouped(file.parts.get(part, {})).items():
                alpha = tensors.pop("alpha", None)
                change = partial(_change, tensors=tensors, alpha=None if alpha is None else float(alpha))
                changes.setdefault(f"{layer}.weight", []).append(partial(_scaled, change=change, strength=strength))
        for name, every in changes.items():
            lazy = changed[part][name]
            changed[part][name] = lazy.changed(lazy.shape, partial(_added, changes=every))
    return changed


def _change(weight: Tensor, *, tensors: Mapping[str, Tensor], alpha: float | None) -> Tensor:
    return change_of(weight, tensors, alpha)


def _scaled(weight: Tensor, *, change: Callable[[Tensor], Tensor], strength: float) -> Tensor:
    return strength * change(weight)


def _added(weight: Tensor, *, changes: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    base = wide(weight)
    return sum((change(weight) for change in changes), base).to(weight.dtype)


# ---- Out of the difference of two models ----


def extract(
    src: str | Path, base: str | Path, dst: str | Path, *, rank: int = 32, to: str = "kohya", targets: str = "conv"
) -> Path:
    """Write the LoRA of a rank that turns `base` into `src` best, by singular values, and print what is left out.

    targets: a preset of TARGETS. Alpha is the rank.
    """
    dst = Path(dst)
    check_destination(dst, to)
    if rank < 1:
        raise BadInput(f"--rank {rank}: a rank is at least 1")
    tuned, plain = (open_checkpoint(path) for path in (src, base))
    spec = spec_of(plain)
    with meta_weights():
        networks = {part: new_network(part, spec.config_of(part)) for part in PARTS}
    layers, shapes = layers_of(networks), {part: network_shapes(part, spec.config_of(part)) for part in PARTS}
    states: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    outside = inside = residual = 0.0
    with progress("extracting", "tensors") as bar:
        total, done = sum(map(len, shapes.values())), 0
        for part, network in networks.items():
            ranks = target_ranks(network, AdapterSpec(rank=rank, targets=targets))
            ours, theirs = (match(each, part, shapes[part]) for each in (tuned, plain))
            for name, tensor in ours.items():
                done += 1
                bar(done, total)
                difference = wide(tensor.read()) - wide(theirs[name].read())
                size = float(difference.square().sum())
                layer = name.removesuffix(".weight")
                if not size or layer not in ranks or layer == name:
                    outside += size
                    continue
                up, down = factors(difference.flatten(1), rank)
                inside += size
                residual += float((difference.flatten(1) - up @ down).square().sum())
                states[part] |= {
                    f"{layer}.lora_up": up.reshape(*up.shape, *[1] * (difference.dim() - 2)),
                    f"{layer}.lora_down": down.reshape(len(down), *difference.shape[1:]),
                    f"{layer}.alpha": torch.tensor(float(len(down))),
                }
    if not inside:
        raise BadInput(f"{src}: does not differ from {base} in any layer of {targets}")
    header = Header(
        name=dst.stem, scheme="lora", rank=rank, alpha=float(rank), base=base_of_layers(layers),
        v_prediction=spec.prediction_type == "v_prediction",
    )  # fmt: skip
    written = save_adapter(dst, states, layers, header, to)
    count = sum(len(state) for state in states.values()) // 3
    print(
        f"{written}: rank {rank}, {count} layers; {(residual / inside) ** 0.5:.2%} of their change is left out (norm)"
    )
    if outside:
        share = (outside / (inside + outside)) ** 0.5
        print(f"note: {share:.2%} of the whole change (norm) lies in weights that it does not hold")
    return written


def factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return up (out, rank) and down (rank, in) whose product is nearest to a matrix, both of the same size."""
    kept = min(rank, *matrix.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if min(matrix.shape) > 4 * (kept + OVERSAMPLING):
            u, s, v = torch.svd_lowrank(matrix, kept + OVERSAMPLING, niter=ITERATIONS)
        else:
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            v = vh.t()
    root = s[:kept].sqrt()
    return (u[:, :kept] * root).contiguous(), (v[:, :kept] * root).t().contiguous()
