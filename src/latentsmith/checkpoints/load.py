"""Filling a module from a checkpoint, strictly, or leaving it without numbers."""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from latentsmith.architectures import COMPONENTS


def load_pretrained(
    module: nn.Module, path: str | None, part: str, *, from_nemo: bool | None = None, weights: str = "ema"
) -> None:
    """Fill every parameter of `module` from the `part` of the checkpoint at `path`; nothing if `path` is None.

    part: "unet", "vae" or "text_encoder". weights: "ema" or "raw", where the checkpoint has both.
    On the meta device names and shapes are checked against the file's header and nothing is loaded. Raises BadInput
    naming the file and the first keys that do not fit.
    """
    if path is None:
        return
    from latentsmith import checkpoints

    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if next(module.parameters()).is_meta:
        checkpoints.check_component(path, part, shapes, from_nemo=from_nemo, weights=weights)
        return
    module.load_state_dict(checkpoints.load_component(path, part, shapes, from_nemo=from_nemo, weights=weights))


def new_network(part: str, arguments: Mapping[str, Any]) -> Any:
    """Return the network of a part of COMPONENTS with fresh weights."""
    module, _, name = COMPONENTS[part].class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)(**arguments)


def shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor that a checkpoint of the network holds."""
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@contextmanager
def without_weights() -> Iterator[None]:
    """Networks made meanwhile have shapes and no numbers: they are on the meta device."""
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    """Passes over `normal_`, which has nothing to fill on the meta device, and would import PyTorch's compiler there:
    a second of every start."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.normal_, nn.init.normal_):
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return function(*args, **(kwargs or {}))
