"""NeMo's sdlora: `...adapter_layer.parallel_linear_adapter.linear_in.weight`, in a `.nemo` archive or its .ckpt."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from latentsmith.files.errors import BadInput
from latentsmith.files.lazy import LazyTensor
from latentsmith.files.tensors import TensorFile

from .file import Found, Source
from .names import Layers, Names

MARK = ".adapter_layer.parallel_linear_adapter."
SUFFIXES = {"linear_in.weight": "lora_down", "linear_out.weight": "lora_up"}
PREFIX = re.compile(
    r"(?:model\.)?(?:(?P<unet>model\.diffusion_model|unet)|(?P<text_encoder>cond_stage_model|text_encoder))\."
    r"(?:_orig_mod\.)?(?:transformer\.)?"
)
RENAMED = [(r"\.ff\.net\.2$", ".ff.net.3"), (r"\.ff\.net\.0\.proj$", ".ff.net.1.proj")]


def recognises(file: TensorFile) -> bool:
    """Return whether keys are NeMo's."""
    return any(MARK in key for key in file.entries)


def read(source: Source, layers: Layers) -> Found:
    """Return the tensors by layer with alpha from the model config, and the keys that no layer has."""
    names: Names = {}
    for part, each in layers.items():
        for layer in each:
            theirs = layer if part == "text_encoder" else _renamed(layer)
            names[f"{part} {theirs}"] = (part, layer)
    found = Found()
    for key, tensor in source.file.entries.items():
        module, _, suffix = key.partition(MARK)
        prefix = PREFIX.match(module)
        kind = prefix and prefix.lastgroup
        name = f"{kind} {module[prefix.end() :].removesuffix('_lora')}" if prefix else ""
        if name in names and suffix in SUFFIXES:
            found.add(key, *names[name], SUFFIXES[suffix], tensor)
        elif "language_model." in key:
            raise BadInput(f"{source.path}: {key} is of Megatron's CLIP, whose adapters are not supported")
        else:
            found.unused.append(key)
    if (alpha := network_alpha(source)) is not None:
        for tensors in found.layers.values():
            tensors["alpha"] = LazyTensor.of(torch.tensor(alpha))
    return found


def network_alpha(source: Source) -> float | None:
    """Return the alpha of a model config; None, for one that is the rank, where it is missing, null or 0."""
    tuning: Any = source.config.get("peft") or {}
    tuning = tuning.get("lora_tuning") if isinstance(tuning, Mapping) else None
    alpha = tuning.get("network_alpha") if isinstance(tuning, Mapping) else None
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
        raise BadInput(f"{source.path}: its peft.lora_tuning.network_alpha is {alpha!r}, not a number")
    return float(alpha) if alpha else None


def _renamed(layer: str) -> str:
    for pattern, name in RENAMED:
        layer = re.sub(pattern, name, layer)
    return layer
