"""Write adapters for other programs: kohya's file, which web UIs read, and diffusers'."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from latentsmith.files.atomic import atomic_folder
from latentsmith.files.errors import BadInput
from latentsmith.files.tensors import save_safetensors

from . import diffusers, kohya
from .file import AdapterFile, Header
from .inject import grouped
from .names import Layers
from .read import model_base
from .schemes import scheme_of

FORMATS = {"kohya": "kohya's file (web UIs, LyCORIS)", "diffusers": "diffusers' file or folder"}


def save_adapter(
    path: str | Path, parts: Mapping[str, Mapping[str, Tensor]], layers: Layers, header: Header, to: str = "kohya"
) -> Path:
    """Write adapters to `path` and return the file.

    parts: part ("unet", "text_encoder") -> what `adapter_state` returns. layers: `layers_of` the networks.
    to: "kohya", a .safetensors with the ss_ metadata, ModelSpec and kohya's hashes; or "diffusers", a folder with
    pytorch_lora_weights.safetensors, or that file under a name that ends in .safetensors.
    Raises BadInput for what the format cannot hold.
    """
    path = Path(path)
    states = {part: _plain(state) for part, state in parts.items() if state}
    if to == "kohya":
        tensors = kohya.named(states, layers)
        save_safetensors(path, tensors, kohya.metadata(header, tensors))
        return path
    tensors, metadata = diffusers.named(states, layers), diffusers.metadata(states, layers)
    if path.suffix == ".safetensors":
        save_safetensors(path, tensors, metadata)
        return path
    with atomic_folder(path) as folder:
        save_safetensors(folder / diffusers.FILE_NAME, tensors, metadata)
    return path / diffusers.FILE_NAME


def check_destination(path: Path, to: str) -> None:
    """Raise BadInput for a format that is not written, a name that it does not have, or a path that exists."""
    if to not in FORMATS:
        raise BadInput(f"an adapter is written as {' or '.join(FORMATS)}, not {to!r}")
    if to == "kohya" and path.suffix != ".safetensors":
        raise BadInput(f"{path}: kohya's format is one file, and its name ends in .safetensors")
    if os.path.lexists(path):
        raise BadInput(f"{path}: exists already, and nothing is overwritten; name another or move it away")


def header_of(file: AdapterFile, name: str, layers: Layers) -> Header:
    """Return what is written about an adapter that was read: its own metadata are kept."""
    ranks, alphas = list(file.ranks), list(file.alphas)
    return Header(
        name=name,
        scheme=file.scheme,
        rank=max(ranks, key=ranks.count),
        alpha=max(alphas, key=alphas.count),
        base=file.base or base_of_layers(layers),
        v_prediction=file.metadata.get("ss_base_model_version") == "sd_v2_v",
        metadata=file.metadata,
    )


def base_of_layers(layers: Layers) -> str:
    """Return SD1 or SD2, whichever a model of any width is like: v2 projects with linear layers."""
    projections = [shape for name, shape in layers.get("unet", {}).items() if name.endswith(".proj_in")]
    return model_base(layers) or ("SD2" if projections and len(projections[0]) == 2 else "SD1")


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors, with alpha, which is the rank where it is missing."""
    found: dict[str, Tensor] = {}
    for layer, tensors in grouped(state).items():
        scheme = scheme_of(set(tensors))
        if "alpha" not in tensors and scheme.name in ("lora", "loha", "lokr", "glora"):
            tensors["alpha"] = torch.tensor(float(scheme.rank(tensors)))
        found |= {f"{layer}.{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return found
