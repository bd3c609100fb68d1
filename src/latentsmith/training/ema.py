"""An exponential moving average of weights, kept beside them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .sharding import copy_whole, local_shard


class Ema:
    """Averages of a network's trained parameters: average = decay * average + (1 - decay) * weight.

    decay: reached as min(decay, (1 + n) / (10 + n)) after n updates, so that early averages follow the weights.
    every_n_steps: optimizer steps between updates. cpu_offload: keep the averages in the memory of the CPU.
    """

    def __init__(self, network: nn.Module, decay: float = 0.9999, *, every_n_steps: int = 1, cpu_offload: bool = False):
        self.decay, self.every_n_steps = decay, every_n_steps
        self.names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        device = "cpu" if cpu_offload else None
        self.averages = [p.detach().to(device=device, dtype=torch.float32, copy=True) for p in self._trained(network)]
        self.updates = torch.zeros((), dtype=torch.int64, device=self.averages[0].device)

    @torch.no_grad()
    def update(self, network: nn.Module, step: int, finite: Tensor) -> None:
        """Fold in the weights after optimizer step number `step` (1, 2, ...).

        finite: bool scalar, False for a step that was skipped, which leaves the averages as they are. It is not read
        where averages are on a GPU, since that would wait for the step.
        """
        if step % self.every_n_steps:
            return
        weights = [p.to(a.device, torch.float32) for p, a in zip(self._trained(network), self.averages, strict=True)]
        if self.updates.device.type == "cpu":
            if finite:
                self.updates += 1
                decay = min(self.decay, (1 + int(self.updates)) / (10 + int(self.updates)))
                torch._foreach_lerp_(self.averages, weights, 1 - decay)
            return
        self.updates += finite
        share = finite * (9 / (10 + self.updates)).clamp(min=1 - self.decay)
        for average, weight in zip(self.averages, weights, strict=True):
            local_shard(average).lerp_(local_shard(weight), share)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name, float32."""
        return dict(zip(self.names, self.averages, strict=True))

    def load_state_dict(self, averages: Mapping[str, Tensor], updates: int) -> None:
        """Continue from stored averages. Raises KeyError if a parameter has none."""
        for name, average in zip(self.names, self.averages, strict=True):
            copy_whole(average, averages[name])
        self.updates.fill_(updates)

    @contextmanager
    def applied(self, network: nn.Module) -> Iterator[None]:
        """Put the averages in place of the network's trained weights inside the context.

        float32 weights are exchanged with them, so that nothing is held twice.
        """
        saved = [None if p.dtype == torch.float32 else p.detach().clone() for p in self._trained(network)]
        self._exchange(network)
        try:
            yield
        finally:
            self._exchange(network, saved)

    @torch.no_grad()
    def _exchange(self, network: nn.Module, saved: Iterable[Tensor | None] | None = None) -> None:
        """Exchange weights and averages; a weight in half precision is put back from `saved`."""
        rows = zip(self._trained(network), self.averages, saved or [None] * len(self.averages), strict=True)
        for parameter, average, stored in rows:
            if stored is not None:
                parameter.copy_(stored)
                continue
            weight = parameter.detach().to(average.device, torch.float32, copy=True)
            parameter.copy_(average)
            if parameter.dtype == torch.float32:
                average.copy_(weight)

    def _trained(self, network: nn.Module) -> Iterable[nn.Parameter]:
        parameters = dict(network.named_parameters())
        return (parameters[name] for name in self.names)
