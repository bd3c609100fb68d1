"""Put adapters on the layers of a network, train them, set their strength and take them off again.

A layer with adapters keeps its parameters and their names; its class is one derived from its own, and the adapters are
its children: `MODULE.adapters.NAME.lora_down` and the like are plain parameters of the network.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .schemes import SCHEMES, Scheme, Sizes, change_of, dora_factor, scale_of, scheme_of, wide
from .spec import AdapterSpec, adaptable, has_kernel, target_ranks

Layer = nn.Linear | nn.Conv2d


class Adapter(nn.Module):
    """The adapter of one layer: its tensors as parameters, under the names of SCHEMES.

    alpha: None where a file has none. strength: what its change is multiplied by; 0: off. dropout: as in AdapterSpec.
    Raises ValueError for tensors that do not fit a weight of the shape `shape`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], alpha: float | None, shape: torch.Size, dropout: float = 0.0):
        super().__init__()
        self.alpha, self.strength, self.dropout = alpha, 1.0, dropout
        with torch.device("meta"):
            on_input = tensors.get("on_input")  # read as a number
            checked = {name: torch.empty(tensor.shape) for name, tensor in tensors.items()}
            checked |= {} if on_input is None else {"on_input": on_input}
            change_of(torch.empty(shape), checked, alpha)
        for name, tensor in tensors.items():
            trained = tensor.is_floating_point()
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=trained))

    @property
    def tensors(self) -> dict[str, Tensor]:
        return dict(self._parameters)  # type: ignore[arg-type]

    @property
    def scheme(self) -> Scheme:
        return scheme_of(set(self._parameters))

    @property
    def rank(self) -> int:
        return self.scheme.rank(self.tensors)

    def change(self, weight: Tensor) -> Tensor:
        """Return what is added to `weight` at strength 1, at least in float32."""
        return change_of(weight, self.tensors, self.alpha)

    @property
    def is_low_rank(self) -> bool:
        """Whether two small layers beside the adapted one do the same, without a changed weight."""
        scale = self._parameters.get("dora_scale")
        of_outputs = scale is None or scale.shape[0] != 1
        return "lora_down" in self._parameters and "lora_mid" not in self._parameters and of_outputs

    def beside(self, layer: Layer, input: Tensor, output: Tensor) -> Tensor:
        """Return what a low-rank adapter adds to `output`, the layer's own, at its strength."""
        if "dora_scale" not in self._parameters:
            return self._low_rank(layer, input, self.strength)
        with torch.no_grad():
            tensors = {name: tensor for name, tensor in self.tensors.items() if name != "dora_scale"}
            changed = wide(layer.weight) + change_of(layer.weight, tensors, self.alpha)
        trailing = [1] * (output.dim() - 2) if isinstance(layer, nn.Conv2d) else []
        factor = dora_factor(changed, wide(self.tensors["dora_scale"])).to(output.dtype).reshape(-1, *trailing)
        plain = output if layer.bias is None else output - layer.bias.to(output.dtype).reshape(-1, *trailing)
        return self.strength * (factor - 1) * plain + factor * self._low_rank(layer, input, self.strength)

    def _low_rank(self, layer: Layer, input: Tensor, strength: float) -> Tensor:
        """Return strength * alpha / rank * up(down(input))."""
        down, up = (self.tensors[name].to(input.dtype) for name in ("lora_down", "lora_up"))
        up = up * (strength * scale_of(self.alpha, len(down)))
        if not isinstance(layer, nn.Conv2d):
            inner = F.linear(input, down.flatten(1))
            return F.linear(F.dropout(inner, self.dropout, self.training), up.flatten(1))
        kernel = down.reshape(len(down), *layer.weight.shape[1:])
        inner = F.conv2d(input, kernel, None, layer.stride, cast(Any, layer.padding), layer.dilation)
        return F.conv2d(F.dropout(inner, self.dropout, self.training), up.reshape(*up.shape[:2], 1, 1))

    def extra_repr(self) -> str:
        return f"{self.scheme.name}, rank={self.rank}, alpha={self.alpha}, strength={self.strength}"


class Adapted(nn.Module):
    """What a layer with adapters is besides: all changes are of its own weight, and add up."""

    adapters: nn.ModuleDict

    def forward(self, input: Tensor) -> Tensor:
        layer = cast(Layer, self)
        active = [each for each in cast(list[Adapter], list(self.adapters.values())) if each.strength]
        if all(each.is_low_rank for each in active):
            output: Tensor = super().forward(input)
            plain = output
            for adapter in active:
                output = output + adapter.beside(layer, input, plain)
            return output
        weight = changed_weight(layer, active).to(layer.weight.dtype)
        if isinstance(layer, nn.Conv2d):
            return cast(Tensor, layer._conv_forward(input, weight, layer.bias))
        return F.linear(input, weight, layer.bias)


@cache
def adapted_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a layer of class `cls` with adapters."""
    return type(f"Adapted{cls.__name__}", (Adapted, cls), {})


def changed_weight(layer: Layer, adapters: list[Adapter]) -> Tensor:
    """Return a layer's weight with the changes of adapters added at their strengths, at least in float32."""
    weight = wide(layer.weight)
    return weight + sum((each.strength * each.change(weight) for each in adapters), torch.zeros_like(weight))


# ---- Networks ----


def inject(network: nn.Module, spec: AdapterSpec, name: str = "default", *, seed: int = 0) -> list[str]:
    """Put fresh adapters on the layers that `spec` targets, freeze all else, and return the names of these layers.

    A network with fresh adapters computes what it did before. Their parameters are float32 whatever the network is in,
    on the device of each layer. seed: of their first values, which are a function of it alone.
    Raises ValueError where nothing is targeted or the name is taken.
    """
    ranks, modules = target_ranks(network, spec), adaptable(network)
    _check_name(network, name)
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        for path, rank in ranks.items():
            layer = modules[path]
            alpha = spec.alpha_of(rank, has_kernel(layer))
            adapter = Adapter(_fresh(layer, spec, rank, alpha), alpha, layer.weight.shape, spec.dropout)
            _attach(layer, name, adapter.to(layer.weight.device).train(network.training))
    return list(ranks)


def adapter_state(network: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Return the tensors of an adapter as LAYER.TENSOR, alpha among them (float32, no dimensions) where it has one.

    The parameters are the network's own, not copies.
    """
    state: dict[str, Tensor] = {}
    for path, adapter in adapters_of(network, name):
        state |= {f"{path}.{key}": tensor.detach() for key, tensor in adapter.tensors.items()}
        if adapter.alpha is not None:
            state[f"{path}.alpha"] = torch.tensor(adapter.alpha, dtype=torch.float32)
    return state


def load_adapter_state(
    network: nn.Module, state: Mapping[str, Tensor], name: str = "default", *, strength: float = 1.0
) -> None:
    """Fill the adapters `name` from what `adapter_state` returned, or make them if the network has none of that name.

    Made ones do not train, have the device and dtype of their layers, and strength `strength`.
    Raises ValueError, before anything is changed, for tensors that do not fit the network or the adapters there.
    """
    if dict(adapters_of(network, name)):
        _refill(network, state, name)
        return
    _check_name(network, name)
    modules, made = adaptable(network), {}
    for path, tensors in grouped(state).items():
        if path not in modules:
            raise ValueError(f"{path}: no linear layer or convolution of this network")
        layer, alpha = modules[path], tensors.pop("alpha", None)
        try:
            adapter = Adapter(tensors, None if alpha is None else float(alpha), layer.weight.shape)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        adapter.strength = strength
        made[path] = adapter.to(layer.weight.device, layer.weight.dtype).requires_grad_(False).train(network.training)
    for path, adapter in made.items():
        _attach(modules[path], name, adapter)


def remove(network: nn.Module, name: str = "default") -> None:
    """Take the adapters of a name off; without any a layer is what it was. Raises ValueError if there are none."""
    if not (found := [path for path, _ in adapters_of(network, name)]):
        raise ValueError(f"there is no adapter {name!r} in this network")
    for path in found:
        layer = cast(Adapted, network.get_submodule(path))
        del layer.adapters[name]
        if not layer.adapters:
            del layer.adapters
            layer.__class__ = type(layer).__mro__[2]


def set_weight(network: nn.Module, name: str, weight: float) -> None:
    """Multiply the changes of the adapters of a name by `weight`; 0 turns them off: the output is the base's."""
    for _, adapter in adapters_of(network, name):
        adapter.strength = weight


def adapters_of(network: nn.Module, name: str = "default") -> Iterator[tuple[str, Adapter]]:
    """Yield (layer's name, adapter) for every adapter of a name."""
    for path, module in list(network.named_modules()):
        if isinstance(module, Adapted) and name in module.adapters:
            yield path, cast(Adapter, module.adapters[name])


def base_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a network without adapters."""
    own = {f"{path}.adapters." for path, module in network.named_modules() if isinstance(module, Adapted)}
    state: dict[str, Tensor] = network.state_dict()
    return {key: tensor for key, tensor in state.items() if key[: key.find("adapters.") + 9] not in own}


def grouped(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return layer -> tensor's name -> tensor of what `adapter_state` returns."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        path, _, name = key.rpartition(".")
        groups.setdefault(path, {})[name] = tensor
    return groups


def _fresh(layer: Layer, spec: AdapterSpec, rank: int, alpha: float) -> dict[str, Tensor]:
    scheme = SCHEMES["lora" if spec.scheme == "dora" else spec.scheme]
    assert scheme.fresh
    weight = layer.weight.detach()
    if spec.scheme == "dora" and not weight.is_meta:
        weight = weight.to("cpu", torch.float32)
    tensors = scheme.fresh(weight, Sizes(rank=rank, alpha=alpha, factor=spec.factor))
    if spec.scheme == "dora":
        axes = list(range(1, weight.dim()))
        tensors["dora_scale"] = torch.linalg.vector_norm(weight, dim=axes, keepdim=True)
    return tensors


def _attach(layer: Layer, name: str, adapter: Adapter) -> None:
    if not isinstance(layer, Adapted):
        cast(Any, layer).__class__ = adapted_class(cast(Any, type(layer)))
        layer.add_module("adapters", nn.ModuleDict())
    cast(Adapted, layer).adapters[name] = adapter


def _check_name(network: nn.Module, name: str) -> None:
    if not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise ValueError(f"an adapter's name is letters, digits and underscores, not {name!r}")
    if dict(adapters_of(network, name)):
        raise ValueError(f"there is an adapter {name!r} in this network already")


def _refill(network: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    present = adapter_state(network, name)
    if differs := sorted(present.keys() ^ state.keys()):
        where = "is not in the state" if differs[0] in present else "is of no adapter in this network"
        raise ValueError(f"{differs[0]} {where}")
    for key, tensor in present.items():
        if tensor.shape != state[key].shape:
            raise ValueError(f"{key} has the shape {tuple(state[key].shape)}, not {tuple(tensor.shape)}")
        if key.endswith(".alpha") and float(tensor) != float(state[key]):
            raise ValueError(f"{key} is {float(state[key])}, not {float(tensor)}")
    with torch.no_grad():
        for key, tensor in present.items():
            tensor.copy_(state[key])
