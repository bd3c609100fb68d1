"""Make networks and fill them from checkpoints: the only module where weights meet networks."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from latentsmith.architectures import COMPONENTS
from latentsmith.config.network_arguments import read_node
from latentsmith.files.errors import BadInput
from latentsmith.files.lazy import forget_maps

from .base import Checkpoint, Shapes, shown
from .match import match
from .open import open_checkpoint
from .run import check_sums

MOST_OF_ANY, MOST_LEVELS = 2**20, 16
MOST = {"layers": 128, "num_res_blocks": 32, "transformer_depth": 64, "max_length": 4096, "channel_mult": 64,
        "ch_mult": 64, "model_channels": 8192, "ch": 8192, "width": 16_384}  # fmt: skip
PARTS = {component.class_path: part for part, component in COMPONENTS.items()}


def build(node: Any, *, weights: str = "ema", from_pretrained: str | None = None) -> Any:
    """Return the network of a config node, filled strictly from the checkpoint that it names, else with fresh weights.

    node: `_target_` (or LDM's `target` + `params`) and the keywords of its class. weights: "ema" or "raw", where the
    checkpoint has both. from_pretrained: a checkpoint to use instead of the node's own.
    Fresh weights are a function of torch's seed. Inside `torch.device("meta")` nothing is read but the file's header:
    names and shapes are checked, and the network has no numbers.
    Raises BadInput, one line, for an unknown class or key, sizes that do not fit together, and for a checkpoint whose
    keys do not match the network one to one.
    """
    found = read_node(node)
    path = from_pretrained or found.source
    if path is None or found.class_path not in PARTS:
        return _construct(found.key, found.class_path, found.arguments)
    device, part = torch.get_default_device(), PARTS[found.class_path]
    with meta_weights():
        network = _construct(found.key, found.class_path, found.arguments)
    if device.type == "meta":
        match(open_checkpoint(path, weights), part, shapes_of(network), found.from_nemo)
        return network
    load_component(network, path, part, weights=weights, from_nemo=found.from_nemo)
    return network


def load_component(
    network: nn.Module, path: str | Path, part: str, *, weights: str = "ema", from_nemo: bool | None = None
) -> None:
    """Fill every parameter of `network` from one part of a checkpoint, strictly, one tensor at a time.

    network: where it is on the meta device, it comes to the default device, and nothing else is allocated; device,
    dtype, memory format and requires_grad of its parameters stay. path: any supported format. part: a name of
    COMPONENTS. weights: "ema" or "raw", where the checkpoint has both. from_nemo: whether the names are NeMo's or LDM's
    (True) or diffusers' (False); None recognises them.
    Raises BadInput, one line, unless every key of the network is filled once and every key of the file is used.
    """
    checkpoint = open_checkpoint(path, weights)
    found = match(checkpoint, part, shapes_of(network), from_nemo)
    check_sums(checkpoint.parts[part].path)
    if any(tensor.is_meta for tensor in network.state_dict().values()):
        network.to_empty(device=torch.get_default_device())
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            tensor.copy_(found[name].read())
    forget_maps()


def mapped_network(part: str, arguments: Mapping[str, Any], checkpoint: Checkpoint) -> Any:
    """Return a network whose parameters are the checkpoint's own tensors, mapped from the file, in its dtype.

    part: a name of COMPONENTS. arguments: keywords of its class. Raises BadInput as load_component does.
    """
    with meta_weights():
        network = new_network(part, arguments)
    found = match(checkpoint, part, shapes_of(network))
    check_sums(checkpoint.parts[part].path)
    network.load_state_dict({name: tensor.read() for name, tensor in found.items()}, assign=True)
    return network


def new_network(part: str, arguments: Mapping[str, Any]) -> Any:
    """Return the network of a part of COMPONENTS with fresh weights; BadInput for sizes that do not fit together."""
    component = COMPONENTS[part]
    check_sizes(arguments, component.config_key)
    return _construct(component.config_key, component.class_path, arguments)


def check_sizes(arguments: Mapping[str, Any], key: str) -> None:
    """Raise BadInput for keywords of a network, as foreign files state them, that no network can have."""
    for name, value in arguments.items():
        most, where = MOST.get(name, MOST_OF_ANY), f"{key}.{name}"
        if isinstance(value, Mapping):
            check_sizes(value, where)
        elif isinstance(value, list | tuple) and len(value) > MOST_LEVELS:
            raise BadInput(f"{where} has {len(value)} entries; {MOST_LEVELS} are the most supported")
        for number in value if isinstance(value, list | tuple) else [value]:
            whole = isinstance(number, int) and (isinstance(number, bool) or number == -1 or 0 < number <= most)
            if not whole and not isinstance(number, float | str | Mapping | None):
                raise BadInput(f"{where} is {shown(value)}; whole numbers from 1 to {most:,} are supported")


def network_shapes(part: str, arguments: Mapping[str, Any]) -> Shapes:
    """Return name -> shape of every tensor of the network of a part, which is built without memory for weights."""
    with meta_weights():
        return shapes_of(new_network(part, arguments))


def shapes_of(network: nn.Module) -> Shapes:
    """Return name -> shape of every tensor that a checkpoint of the network holds."""
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@contextmanager
def meta_weights() -> Iterator[None]:
    """Build networks on the meta device: with shapes, without numbers."""
    with torch.device("meta"), _SkipNormal():
        yield


class _SkipNormal(TorchFunctionMode):
    """Skips `normal_` on the meta device, where it does nothing but import PyTorch's compiler: a second."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in (torch.Tensor.normal_, nn.init.normal_):
            tensor = args[0] if args else (kwargs or {})["tensor"]
            if tensor.is_meta:
                return tensor
        return function(*args, **(kwargs or {}))


def _construct(key: str, class_path: str, arguments: Mapping[str, Any]) -> Any:
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)(**arguments)
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RuntimeError) as error:
        raise BadInput(f"{key}: {str(error).splitlines()[0][:200] if str(error) else type(error).__name__}") from error
