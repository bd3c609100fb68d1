"""An exponential moving average of weights, kept beside them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .sharding import copy_whole


class Ema:
    """Averages of a module's trained parameters: average = decay * average + (1 - decay) * weight.

    decay: reached as min(decay, (1 + n) / (10 + n)) after n updates, so that early averages follow the weights.
    every_n_steps: optimizer steps between updates. cpu_offload: keep the averages in the memory of the CPU.
    """

    def __init__(self, module: nn.Module, decay: float = 0.9999, *, every_n_steps: int = 1, cpu_offload: bool = False):
        self.decay, self.every_n_steps, self.updates = decay, every_n_steps, 0
        self.names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        device = "cpu" if cpu_offload else None
        self.averages = [p.detach().to(device=device, dtype=torch.float32, copy=True) for p in self._trained(module)]

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Fold in the weights after optimizer step number `step` (1, 2, ...)."""
        if step % self.every_n_steps:
            return
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [p.to(a.device, torch.float32) for p, a in zip(self._trained(module), self.averages, strict=True)]
        torch._foreach_lerp_(self.averages, weights, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name, float32."""
        return dict(zip(self.names, self.averages, strict=True))

    def load_state_dict(self, averages: Mapping[str, Tensor], updates: int) -> None:
        """Continue from stored averages; KeyError if a parameter has none."""
        for name, average in zip(self.names, self.averages, strict=True):
            copy_whole(average, averages[name])
        self.updates = updates

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """The averages in the place of the module's trained weights meanwhile; float32 weights are exchanged with them,
        so that nothing is held twice."""
        kept = [None if p.dtype == torch.float32 else p.detach().clone() for p in self._trained(module)]
        self._exchange(module)
        try:
            yield
        finally:
            self._exchange(module, kept)

    @torch.no_grad()
    def _exchange(self, module: nn.Module, kept: Iterable[Tensor | None] | None = None) -> None:
        """Weights and averages change places, but for those whose weight in half precision is `kept`."""
        rows = zip(self._trained(module), self.averages, kept or [None] * len(self.averages), strict=True)
        for parameter, average, stored in rows:
            if stored is not None:
                parameter.copy_(stored)
                continue
            weight = parameter.detach().to(average.device, torch.float32, copy=True)
            parameter.copy_(average)
            if parameter.dtype == torch.float32:
                average.copy_(weight)

    def _trained(self, module: nn.Module) -> Iterable[nn.Parameter]:
        parameters = dict(module.named_parameters())
        return (parameters[name] for name in self.names)
