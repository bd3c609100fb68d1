"""The state of a training: all that a checkpoint keeps."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .clipping import parameters_of
from .ema import Ema
from .optimizers import is_schedule_free


@dataclass
class TrainingState:
    """Hold all that a checkpoint keeps and a resumed run is put back to.

    networks: all of the run's, by name. trained: the names of those whose weights move; ema: averages of these.
    optimizer_name: as model.optim.name. scaler: the GradScaler of float16. sharded: whether every process holds a
    share of the trained weights. global_step: optimizer steps done, skipped ones included. consumed_samples: position
    of the next sample in the run. skipped_steps: scalar on the device, steps without a finite gradient.
    """

    networks: Mapping[str, nn.Module]
    trained: tuple[str, ...]
    optimizer: torch.optim.Optimizer
    optimizer_name: str
    ema: dict[str, Ema] = field(default_factory=dict)
    scaler: Any = None
    sharded: bool = False
    global_step: int = 0
    consumed_samples: int = 0
    skipped_steps: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averages, where there are any, in place of the trained weights inside the context."""
        with ExitStack() as stack:
            for name, average in self.ema.items():
                stack.enter_context(average.applied(self.networks[name]))
            yield

    @contextmanager
    def for_evaluation(self) -> Iterator[list[Tensor] | None]:
        """Put a schedule-free optimizer's evaluation weights in place of those it trains, inside the context.

        Yields copies of those it trains; None with any other optimizer, whose weights stay.
        """
        if not is_schedule_free(self.optimizer):
            yield None
            return
        optimizer: Any = self.optimizer
        parameters = parameters_of(optimizer)
        trained = [parameter.detach().clone() for parameter in parameters]
        optimizer.eval()
        try:
            yield trained
        finally:
            optimizer.train()  # which rounds: what was trained comes back from the copies
            with torch.no_grad():
                for parameter, value in zip(parameters, trained, strict=True):
                    parameter.copy_(value)


def trained_parameters(networks: Mapping[str, nn.Module], trained: tuple[str, ...]) -> list[nn.Parameter]:
    """Return the parameters that the optimizer moves, in the order in which checkpoints number them."""
    return [parameter for name in trained for parameter in networks[name].parameters() if parameter.requires_grad]


def parameter_groups(
    networks: Mapping[str, nn.Module], trained: tuple[str, ...], factor: Callable[[str], float]
) -> list[dict[str, Any]]:
    """Return the trained parameters in groups of one learning rate. factor: full name -> rate over that of the run."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name in trained:
        for key, parameter in networks[name].named_parameters():
            if parameter.requires_grad:
                groups.setdefault(factor(f"{name}.{key}"), []).append(parameter)
    return [{"params": parameters, "lr_factor": value} for value, parameters in groups.items()]


def trained_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a network that a checkpoint keeps: all but frozen parameters."""
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in network.state_dict().items() if name not in frozen}


def file_name(name: str, network: nn.Module) -> str:
    """Return the name of a trained network's file in a checkpoint: another one where it holds a part of it alone."""
    whole = all(parameter.requires_grad for parameter in network.parameters())
    return f"{name}.safetensors" if whole else f"{name}.adapter.safetensors"
