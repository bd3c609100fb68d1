"""Optimizers and learning rates, under NeMo's names."""

import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import nn

from latentsmith.config.model_options import LIBRARY_OPTIMIZERS
from latentsmith.files.errors import BadInput

STATE_VALUES = {  # values in float32 that an optimizer keeps for a weight, where not two
    "SGD": 0, "Adafactor": 0, "RMSprop": 1, "Adagrad": 1, "Muon": 1, "lion": 1, "prodigy": 4,
    "adamw_schedulefree": 3, "radam_schedulefree": 3,
    "adamw8bit": 0.5, "adam8bit": 0.5, "paged_adamw8bit": 0.5, "lion8bit": 0.25,
}  # fmt: skip
UNFIT = ("LBFGS", "SparseAdam")  # one wants to evaluate the loss several times a step, one sparse gradients
Schedule = Callable[[int], float]  # optimizer steps done so far -> factor of the learning rate
Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


def build_optimizer(name: str, parameters: Parameters, *, fused: bool = True, **options: Any) -> torch.optim.Optimizer:
    """Return the optimizer of a name in model.optim.name, ready to train.

    name: `fused_adam` or `adamw` (AdamW in one kernel), one of LIBRARY_OPTIMIZERS, the name of a class of torch.optim,
    or any optimizer's path.
    fused: False where a GradScaler scales gradients: a fused optimizer unscales them itself, after clipping.
    """
    if name in ("fused_adam", "adamw"):
        return torch.optim.AdamW(parameters, fused=fused, **options)
    made = optimizer_class(name)(parameters, **options)
    if is_schedule_free(made):
        made.train()
    return cast(torch.optim.Optimizer, made)


def optimizer_class(name: str) -> Any:
    """Return the class of a name in model.optim.name. Raises BadInput, one line, where there is none."""
    if name in ("fused_adam", "adamw"):
        return torch.optim.AdamW
    if name == "Muon":
        return MuonWithAdamW
    path, package = LIBRARY_OPTIMIZERS.get(name, (name if "." in name else f"torch.optim.{name}", None))
    module, _, cls = path.rpartition(".")
    if find_spec(module.partition(".")[0]) is None:
        install = "pip install 'latentsmith[optimizers]'" if package else f"pip install {module.partition('.')[0]}"
        raise BadInput(f"model.optim.name={name}: {module.partition('.')[0]} is not installed; {install}")
    try:
        found = getattr(importlib.import_module(module), cls, None)
    except ImportError as error:
        raise BadInput(f"model.optim.name={name}: {module} cannot be imported ({error})") from None
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise BadInput(f"model.optim.name={name}: {path} is no class of an optimizer")
    if cls in UNFIT:
        raise BadInput(f"model.optim.name={name}: does not work with one dense gradient a step; take another")
    return found


def optimizer_options(name: str, stated: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of an optimizer, tried on a small one.

    stated: options that every optimizer may have (lr, weight_decay, betas, eps), None where nothing is said. options:
    model.optim.options. Raises BadInput, one line, for one that the class does not take.
    """
    given = {key: value for key, value in stated.items() if value is not None}
    if twice := [key for key in options if key in stated]:
        raise BadInput(f"model.optim.options.{twice[0]}: give it as model.optim.{twice[0]}")
    taken = keywords_of(optimizer_class(name))
    if "weight_decay" not in taken and not given.get("weight_decay"):
        given.pop("weight_decay", None)
    merged = {**given, **{key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}}
    for key in merged:
        if key not in taken:
            full = f"model.optim.{'' if key in stated else 'options.'}{key}"
            raise BadInput(f"{full} means nothing to model.optim.name={name}, which takes {', '.join(taken)}")
    try:
        build_optimizer(name, [nn.Parameter(torch.zeros(2, 2))], fused=False, **merged)
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise BadInput(f"model.optim: {name} does not take these options ({reason})") from None
    return merged


def keywords_of(cls: Any) -> list[str]:
    """Return the names of the options of an optimizer's class."""
    return [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "params", "fused")]


def is_schedule_free(optimizer: Any) -> bool:
    """Return whether an optimizer has other weights for evaluation than it trains (Defazio et al. 2024)."""
    return hasattr(optimizer, "train") and hasattr(optimizer, "eval")


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for matrices, AdamW for all other parameters: norms, biases, convolutions.

    lr, weight_decay: of both. adjust_lr_fn: "match_rms_adamw" gives both steps of one size.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
    ):
        rows = list(params)
        groups = rows if isinstance(rows[0], dict) else [{"params": rows}]
        parts = [
            {**group, "params": found, "matrices": matrices}
            for group in groups
            for matrices in (True, False)
            if (found := [p for p in group["params"] if (p.dim() == 2) == matrices])
        ]
        self.muon = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        super().__init__(parts, {"lr": lr, "weight_decay": weight_decay})
        self._make_parts()

    def _make_parts(self) -> None:
        """Make the two optimizers, of these groups and with this state."""
        self.parts: list[tuple[dict[str, Any], torch.optim.Optimizer]] = []
        for group in self.param_groups:
            own = {"params": group["params"], "lr": group["lr"], "weight_decay": group["weight_decay"]}
            part: Any = torch.optim.Muon([own], **self.muon) if group["matrices"] else torch.optim.AdamW([own])  # type: ignore[arg-type]
            part.state = self.state
            self.parts.append((group, part))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._make_parts()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, part in self.parts:
            part.param_groups[0]["lr"] = group["lr"]
            part.step()


def group_numbers(optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """Return what an optimizer has counted or estimated for each of its groups, such as prodigy's step size.

    Empty for one that keeps all in its parameters' state.
    """
    kept = [
        {
            key: value
            for key, value in group.items()
            if isinstance(value, int | float) and key not in GIVEN and value != optimizer.defaults.get(key)
        }
        for group in optimizer.param_groups
    ]
    return kept if any(kept) else []


GIVEN = ("lr", "lr_factor", "matrices")  # of a group, by the config


@torch.no_grad()
def share_rounded_away(parameters: Iterable[nn.Parameter], step: float, dtype: torch.dtype) -> float:
    """Return the share of weights that a step of this size, up or down, leaves as they are when kept in `dtype`."""
    lost = total = 0
    for parameter in parameters:
        weight = parameter.to(dtype).float()
        moved = [(weight + change).to(dtype) != weight for change in (step, -step)]
        lost += int((~(moved[0] | moved[1])).sum())
        total += weight.numel()
    return lost / max(1, total)


def lr_schedule(
    name: str, *, warmup_steps: int = 0, hold_steps: float = math.inf, max_steps: int = -1, min_factor: float = 0.0
) -> Schedule:
    """Return the factor of the learning rate as a function of the optimizer steps done.

    constant; WarmupPolicy and WarmupHoldPolicy, which rise linearly as (step + 1) / (warmup_steps + 1) and stay at 1,
    beyond max_steps at min_factor, as NeMo's; linear and CosineAnnealing, which after the same rise and `hold_steps`
    fall to min_factor at max_steps. Raises ValueError for another name, or a falling one without max_steps.
    """
    falls: dict[str, Callable[[float], float]] = {
        "linear": lambda share: 1 - share,
        "CosineAnnealing": lambda share: (1 + math.cos(math.pi * share)) / 2,
    }
    if name not in ("constant", "WarmupPolicy", "WarmupHoldPolicy", *falls):
        raise ValueError(f"optim.sched.name {name!r} is not a schedule")
    if name in falls and max_steps <= 0:
        raise ValueError(f"optim.sched.name {name} needs max_steps")

    def factor(step: int) -> float:
        if name != "constant" and step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if name not in falls:
            return min_factor if name != "constant" and 0 < max_steps < step else 1.0
        start = warmup_steps + (hold_steps if math.isfinite(hold_steps) else 0)
        share = min(1.0, max(0.0, (step - start) / max(1, max_steps - start)))
        return min_factor + (1 - min_factor) * falls[name](share)

    return factor
