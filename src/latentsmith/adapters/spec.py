"""Which layers get adapters, of which scheme and rank."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from .names import diffusers_names
from .schemes import TRAINED

_ATTENTION = r"\.attn[12]\.(to_[qkv]|to_out\.0)|\.self_attn\.[qkv]_proj|\.self_attn\.out_proj"
_MLP = r"\.ff\.net\.(0\.proj|2)|\.mlp\.fc[12]"
_PROJECTIONS = r"\.\d+\.proj_(in|out)"
_RESIDUAL = r"\.(in_layers\.2|out_layers\.3|emb_layers\.1|skip_connection|op|conv)"
TARGETS = {  # preset -> regular expression of the ends of module names; beside each, modules of SD1's U-Net and text
    "attention": f"({_ATTENTION})",  # 128, 48: diffusers' example scripts
    "nemo": f"({_ATTENTION}|{_MLP})",  # 160, 72: NeMo's sdlora
    "transformer": f"({_ATTENTION}|{_MLP}|{_PROJECTIONS})",  # 192, 72: kohya without conv_dim
    "conv": f"({_ATTENTION}|{_MLP}|{_PROJECTIONS}|{_RESIDUAL})",  # 278, 72: kohya with conv_dim (LoCon)
    "full": "",  # 282, 72: every linear layer and convolution
}


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """Adapters to train.

    scheme: lora, dora, loha, lokr or oft. rank: of the factors; of oft the largest block of outputs.
    alpha: the change is scaled by alpha / rank; None: alpha = rank, as diffusers has it (kohya's default is 1). Of oft:
    the limit of its rotation, None or 0 for no limit.
    conv_rank, conv_alpha: of kernels larger than 1x1; None: as rank and alpha.
    dropout: share of the inner values dropped while training, of lora and dora.
    targets: a preset of TARGETS, or patterns of module names: a name, its end ("attn2.to_k"), or a glob ("*.attn2.*"),
    in LDM's, diffusers' or Hugging Face's spelling. exclude: patterns of modules to leave out.
    ranks: pattern -> rank where it is not `rank`, 0 to leave a module out; the last match counts.
    factor: of lokr, as LyCORIS': the most that the smaller factor has of rows and columns; -1: as square as can be.
    Raises ValueError for values that cannot be.
    """

    scheme: str = "lora"
    rank: int = 16
    alpha: float | None = None
    conv_rank: int | None = None
    conv_alpha: float | None = None
    dropout: float = 0.0
    targets: str | Sequence[str] = "transformer"
    exclude: Sequence[str] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    factor: int = -1

    def __post_init__(self) -> None:
        if self.scheme not in TRAINED:
            raise ValueError(f"adapter scheme {self.scheme!r} is not one of {', '.join(TRAINED)}")
        for name, rank in {"rank": self.rank, "conv_rank": self.conv_rank}.items():
            if rank is not None and rank < 1:
                raise ValueError(f"adapter {name} is {rank}; it must be at least 1")
        for name, alpha in {"alpha": self.alpha, "conv_alpha": self.conv_alpha}.items():
            if alpha is not None and not (alpha > 0 or (alpha == 0 and self.scheme == "oft")):
                raise ValueError(f"adapter {name} is {alpha}; it must be above 0")
        if min(self.ranks.values(), default=0) < 0:
            raise ValueError(f"adapter ranks hold {min(self.ranks.values())}; a rank is at least 0 (0: no adapter)")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter dropout is {self.dropout}; it must be from 0 to below 1")
        if self.dropout and self.scheme not in ("lora", "dora"):
            raise ValueError(f"adapter dropout is for lora and dora; {self.scheme} has no inner values to drop")

    def alpha_of(self, rank: int, kernel: bool) -> float:
        """Return alpha of a module. rank: that it has. kernel: whether its kernel is larger than 1x1."""
        given = self.conv_alpha if kernel and self.conv_alpha is not None else self.alpha
        if given is not None:
            return given
        return 0.0 if self.scheme == "oft" else float(rank)


def adaptable(network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the modules of a network that can have adapters, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def target_ranks(network: nn.Module, spec: AdapterSpec) -> dict[str, int]:
    """Return the rank of every module that `spec` targets, by name. Raises ValueError where it targets none."""
    modules = adaptable(network)
    spellings = diffusers_names(modules)
    if isinstance(spec.targets, str):
        if spec.targets not in TARGETS:
            raise ValueError(f"adapter targets {spec.targets!r} is not one of {', '.join(TARGETS)} or a list of names")
        preset = re.compile(f"{TARGETS[spec.targets]}$")
        chosen = [name for name in modules if preset.search(f".{name}")]
    else:
        _check_patterns(spec.targets, "targets", spellings)
        chosen = [name for name in modules if _matches(spellings, name, spec.targets)]
    _check_patterns([*spec.ranks], "ranks", spellings)
    _check_patterns(spec.exclude, "exclude", spellings)
    found = {}
    for name in chosen:
        rank = spec.conv_rank or spec.rank if has_kernel(modules[name]) else spec.rank
        for pattern, own in spec.ranks.items():
            rank = own if _matches(spellings, name, [pattern]) else rank
        if rank and not _matches(spellings, name, spec.exclude):
            found[name] = rank
    if not found:
        raise ValueError("the adapters target no module of this network")
    return found


def has_kernel(module: nn.Linear | nn.Conv2d) -> bool:
    """Return whether a module is a convolution with a kernel larger than 1x1."""
    return isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)


def _matches(spellings: Mapping[str, str], name: str, patterns: Sequence[str]) -> bool:
    names = (name, spellings[name])
    return any(each == p or each.endswith(f".{p}") or fnmatchcase(each, p) for each in names for p in patterns)


def _check_patterns(patterns: Sequence[str], option: str, spellings: Mapping[str, str]) -> None:
    for pattern in patterns:
        if not any(_matches(spellings, name, [pattern]) for name in spellings):
            raise ValueError(f"adapter {option}: {pattern!r} matches no linear layer or convolution of this network")
