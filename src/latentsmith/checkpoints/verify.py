"""Is what `convert` wrote what it read? Every tensor, and what each network makes of one input."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentsmith.files.pickles import LazyTensor
from latentsmith.files.tensors import tensor_bytes
from latentsmith.models import AutoencoderKL, ClipTextEncoder, UNetModel

from . import ModelSpec, match, open_checkpoint, unused_text
from .load import without_weights
from .packing import lazy

Parts = Mapping[str, Mapping[str, LazyTensor]]
Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
NETWORKS: Mapping[str, Any] = {"unet": UNetModel, "vae": AutoencoderKL, "text_encoder": ClipTextEncoder}


def verify_conversion(parts: Parts, dst: Path, spec: ModelSpec, shapes: Shapes, dtype: torch.dtype | None) -> None:
    """Open `dst` and print, for each part, how far its tensors and its output lie from the source's.

    Both are 0 unless dtype rounds. RuntimeError for a tensor that is not, bit for bit, its source rounded to dtype.
    """
    again = open_checkpoint(dst)
    configs = {"unet": spec.unet_config, "vae": spec.first_stage_config, "text_encoder": spec.cond_stage_config}
    for part, tensors in parts.items():
        written = match(again, part, shapes[part])
        written |= unused_text(again, shapes[part]) if part == "text_encoder" else {}
        largest, at = 0.0, ""
        for name, tensor in tensors.items():
            if tensor_bytes(lazy(tensor, dtype)) != tensor_bytes(written[name]):
                raise RuntimeError(f"{dst}: {part} {name} is not what was written; check the disk and convert again")
            apart = difference(tensor, written[name])
            if apart > largest:
                largest, at = apart, f" ({name})"
        used = ({name: weights[name] for name in shapes[part]} for weights in (tensors, written))
        before, after = (probe(part, configs[part], weights) for weights in used)
        apart = (after - before).abs().max().item()
        scale = before.abs().max().item()
        print(
            f"{part}: {len(tensors):,} tensors, largest difference {largest:.3g}{at}; "
            f"of its output {apart:.3g}, where the largest value is {scale:.3g}",
            flush=True,
        )


def difference(before: LazyTensor, after: LazyTensor) -> float:
    """The largest difference of two tensors of one shape; 0 for equal dtypes, whose bits were compared."""
    if before.dtype == after.dtype or not before.numel:
        return 0.0
    return (before.read().float() - after.read().float()).abs().max().item()


@torch.no_grad()
def probe(part: str, config: Mapping[str, Any], weights: Mapping[str, LazyTensor]) -> Tensor:
    """What the network makes, in float32, of a small input that is always the same."""
    with without_weights():
        network = NETWORKS[part](**config)
    # Copies, since kernels round by where a tensor lies in memory, and mapped files lie anywhere.
    aligned = {name: tensor.read().to(torch.float32, copy=True).contiguous() for name, tensor in weights.items()}
    network.load_state_dict(aligned, assign=True)
    network.eval()
    generator = torch.Generator().manual_seed(0)
    if part == "text_encoder":
        return network(torch.randint(network.vocab_size, (1, network.max_length), generator=generator))
    if part == "vae":
        side = 4 * network.downsampling
        moments = network.encode(torch.rand(1, 3, side, side, generator=generator) * 2 - 1)
        return torch.cat([moments.flatten(), network.decode(network.mode(moments)).flatten()])
    latents = torch.randn(1, network.in_channels, 16, 16, generator=generator)
    width = network.context_dim
    context = None if width is None else torch.randn(1, 77, width, generator=generator)
    return network(latents, torch.tensor([500]), context)
