"""The schemes of adapters: how a few small tensors change the weight of a linear layer or convolution.

Tensors carry the names that kohya's and LyCORIS' files give them, so that a file is used as it is. `SCHEMES` is the one
table. Every scheme is a function of (weight, tensors, alpha) that returns the change at strength 1.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Tensors = Mapping[str, Tensor]
Change = Callable[[Tensor, Tensors, float | None], Tensor]

EPS = 1e-8  # keeps the quotient of two norms finite


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a fresh adapter. rank: of its factors; of OFT the largest block. alpha: as in AdapterSpec.

    factor: of LoKr: the largest size of the smaller Kronecker factor; -1: the most square one.
    """

    rank: int
    alpha: float
    factor: int = -1


@dataclass(frozen=True)
class Scheme:
    """One way of changing a weight.

    any_of: sets of tensors, one of which an adapter has. optional: tensors that it may have besides.
    change: (weight, tensors, alpha) -> what is added to the weight at strength 1.
    rank: of given tensors. fresh: (weight, sizes) -> tensors whose change is zero; None: it is only read.
    """

    name: str
    any_of: tuple[frozenset[str], ...]
    change: Change
    rank: Callable[[Tensors], int]
    optional: frozenset[str] = frozenset()
    fresh: Callable[[Tensor, Sizes], dict[str, Tensor]] | None = None


def scheme_of(names: set[str]) -> Scheme:
    """Return the scheme of an adapter's tensors. Raises ValueError if they are of none, or not all there."""
    names = names - {"alpha", "dora_scale"}
    for scheme in SCHEMES.values():
        for needed in scheme.any_of:
            if needed <= names <= needed | scheme.optional:
                return scheme
    raise ValueError(f"{', '.join(sorted(names)) or 'nothing'}: not the tensors of any scheme ({', '.join(SCHEMES)})")


def change_of(weight: Tensor, tensors: Tensors, alpha: float | None) -> Tensor:
    """Return what an adapter adds to `weight` at strength 1, in the weight's shape and at least float32.

    tensors: without alpha. With dora_scale the sum of both is scaled to these norms (Liu et al. 2024, equation 5).
    Raises ValueError for tensors that do not fit the weight.
    """
    weight, tensors = wide(weight), {name: wide(tensor) for name, tensor in tensors.items()}
    try:
        change = scheme_of(set(tensors)).change(weight, tensors, alpha)
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"its tensors do not fit each other ({str(error).splitlines()[0]})") from None
    if change.flatten(1).shape != weight.flatten(1).shape:
        raise ValueError(f"it changes a weight of {tuple(change.shape)}, the model's has {tuple(weight.shape)}")
    change = change.reshape(weight.shape)
    if "dora_scale" not in tensors:
        return change
    return (weight + change) * dora_factor(weight + change, tensors["dora_scale"]) - weight


def dora_factor(weight: Tensor, scale: Tensor) -> Tensor:
    """Return the norms `scale` divided by those of `weight`, which are constants for the gradient (section 4.3).

    Norms are of each output's weights, or of each input's, as the shape of `scale` says: (out, 1, ...), (1, in, ...).
    """
    rows = (len(weight), *[1] * (weight.dim() - 1))
    columns = (1, weight.shape[1], *[1] * (weight.dim() - 2))
    if scale.shape == rows:
        kept = 0
    elif scale.shape == columns:
        kept = 1
    else:
        raise ValueError(f"its dora_scale has the shape {tuple(scale.shape)}, not {rows} or {columns}")
    axes = [axis for axis in range(weight.dim()) if axis != kept]
    norms: Tensor = torch.linalg.vector_norm(weight.detach(), dim=axes, keepdim=True)
    return scale / norms


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or float64 if it has that."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def scale_of(alpha: float | None, rank: int) -> float:
    """Return alpha / rank; 1 where alpha is missing or 0, as kohya's loader has it."""
    return alpha / rank if alpha else 1.0


# ---- LoRA and LoCon ----


def lora(weight: Tensor, t: Tensors, alpha: float | None) -> Tensor:
    """up @ down, with a core between them on kernels if it has one (Hu et al. 2021; Tucker's form for convolutions)."""
    scale = scale_of(alpha, len(t["lora_down"]))
    if "lora_mid" in t:
        up, down = t["lora_up"].flatten(1), t["lora_down"].flatten(1)
        return scale * torch.einsum("om,mnxy,ni->oixy", up, t["lora_mid"], down)
    return scale * (t["lora_up"].flatten(1) @ t["lora_down"].flatten(1))


def fresh_lora(weight: Tensor, sizes: Sizes) -> dict[str, Tensor]:
    down = torch.empty(sizes.rank, *weight.shape[1:])
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    return {"lora_down": down, "lora_up": torch.zeros(len(weight), sizes.rank, *[1] * (weight.dim() - 2))}


# ---- LoHa: the element-wise product of two low-rank matrices (Hyeon-Woo et al. 2021) ----


def loha(weight: Tensor, t: Tensors, alpha: float | None) -> Tensor:
    scale = scale_of(alpha, len(t["hada_w1_b"]))
    if "hada_t1" in t:
        cores = [torch.einsum("po,pqxy,qi->oixy", t[f"hada_w{j}_a"], t[f"hada_t{j}"], t[f"hada_w{j}_b"]) for j in "12"]
        return scale * cores[0] * cores[1]
    return scale * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])


def fresh_loha(weight: Tensor, sizes: Sizes) -> dict[str, Tensor]:
    out, columns = weight.flatten(1).shape
    return {
        "hada_w1_a": torch.randn(out, sizes.rank) * 0.1,
        "hada_w1_b": torch.randn(sizes.rank, columns),
        "hada_w2_a": torch.zeros(out, sizes.rank),
        "hada_w2_b": torch.randn(sizes.rank, columns),
    }


# ---- LoKr: a Kronecker product, its factors whole or of low rank (Yeh et al. 2023) ----


def lokr(weight: Tensor, t: Tensors, alpha: float | None) -> Tensor:
    first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_t2" in t:
        second = torch.einsum("po,pqxy,qi->oixy", t["lokr_w2_a"], t["lokr_t2"], t["lokr_w2_b"])
    else:
        second = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    if weight.dim() == 4:
        second = second.reshape(len(second), -1, *weight.shape[2:])
        first = first[:, :, None, None]
    change = torch.kron(first.contiguous(), second.contiguous())
    return change if {"lokr_w1", "lokr_w2"} <= t.keys() else scale_of(alpha, lokr_rank(t)) * change


def lokr_rank(t: Tensors) -> int:
    """Return the rank that alpha is divided by; that of whole factors is nobody's, and 1 here."""
    factored = [t[name] for name in ("lokr_w2_b", "lokr_w1_b") if name in t]
    return len(factored[0]) if factored else 1


def fresh_lokr(weight: Tensor, sizes: Sizes) -> dict[str, Tensor]:
    (out_small, out_large), (in_small, in_large) = (factor_pair(n, sizes.factor) for n in weight.shape[:2])
    first = torch.empty(out_small, in_small)
    nn.init.kaiming_uniform_(first, a=math.sqrt(5))
    kernel = list(weight.shape[2:])
    if sizes.rank >= max(out_large, in_large) / 2:
        return {"lokr_w1": first, "lokr_w2": torch.zeros(out_large, in_large, *kernel)}
    left = torch.empty(out_large, sizes.rank)
    nn.init.kaiming_uniform_(left, a=math.sqrt(5))
    return {"lokr_w1": first, "lokr_w2_a": left, "lokr_w2_b": torch.zeros(sizes.rank, in_large * math.prod(kernel))}


def factor_pair(size: int, factor: int) -> tuple[int, int]:
    """Return two factors of `size`, the smaller one first: `factor` itself if it divides, else the most square pair
    whose smaller one is at most `factor` (-1: any), as LyCORIS splits them."""
    if factor > 0 and size % factor == 0:
        small, large = sorted((factor, size // factor))
        return small, large
    limit = math.isqrt(size) if factor <= 0 else min(factor, math.isqrt(size))
    small = max(each for each in range(1, limit + 1) if size % each == 0)
    return small, size // small


# ---- OFT: rotations of blocks of outputs (Qiu et al. 2023). BOFT: several, in a butterfly (Liu et al. 2023) ----


def oft(weight: Tensor, t: Tensors, alpha: float | None) -> Tensor:
    """R^T W for each block of rows. alpha: limits the norm of what turns them to alpha * outputs; 0: no limit."""
    turns = rotations(t["oft_blocks"], len(weight), alpha)
    rows = weight.reshape(*turns.shape[:2], -1)
    turned = (turns.transpose(1, 2) @ rows).reshape(weight.shape)
    return rescaled(turned, t) - weight


def boft(weight: Tensor, t: Tensors, alpha: float | None) -> Tensor:
    turned, half = weight.flatten(1), t["oft_blocks"].shape[2] // 2
    for stage, blocks in enumerate(t["oft_blocks"]):
        turns, stride = rotations(blocks, len(weight), alpha), 2**stage * half
        rows = turned.reshape(-1, 2, stride, turned.shape[1]).transpose(1, 2).reshape(*turns.shape[:2], -1)
        turned = (turns @ rows).reshape(-1, stride, 2, turned.shape[1]).transpose(1, 2).reshape(turned.shape)
    return rescaled(turned.reshape(weight.shape), t) - weight


def oft_or_boft(weight: Tensor, t: Tensors, alpha: float | None) -> Tensor:
    return (boft if t["oft_blocks"].dim() == 4 else oft)(weight, t, alpha)


def rotations(blocks: Tensor, outputs: int, alpha: float | None) -> Tensor:
    """Return Cayley's (I + Q)(I - Q)^-1, Q = B - B^T, of every block (n, b, b)."""
    skew = blocks - blocks.transpose(1, 2)
    if alpha:
        norm = torch.linalg.vector_norm(skew)
        skew = skew * ((norm.clamp(max=alpha * outputs) + EPS) / (norm + EPS))
    one = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    turns: Tensor = torch.linalg.solve(one - skew, one + skew, left=False)
    return turns


def rescaled(weight: Tensor, t: Tensors) -> Tensor:
    return weight * t["rescale"].reshape(-1, *[1] * (weight.dim() - 1)) if "rescale" in t else weight


def fresh_oft(weight: Tensor, sizes: Sizes) -> dict[str, Tensor]:
    small, large = factor_pair(len(weight), sizes.rank)
    size = small if small == sizes.rank or large > sizes.rank else large
    return {"oft_blocks": torch.zeros(len(weight) // size, size, size)}


# ---- Those that are read only ----


def glora(weight: Tensor, t: Tensors, alpha: float | None) -> Tensor:
    """b1 b2 + W a1 a2, over input channels (Chavan et al. 2023)."""
    scale = scale_of(alpha, len(t["b2"]))
    prompt = torch.einsum("oi...,ir,rj->oj...", weight, t["a1"].flatten(1), t["a2"].flatten(1))
    return scale * ((t["b1"].flatten(1) @ t["b2"].flatten(1)).reshape(weight.shape) + prompt)


def ia3(weight: Tensor, t: Tensors, alpha: float | None) -> Tensor:
    """A factor for each output, or each input if on_input (Liu et al. 2022)."""
    factor = t["weight"].flatten()
    axis = 1 if t["on_input"].item() else 0
    shape = [1] * weight.dim()
    shape[axis] = -1
    return weight * factor.reshape(shape)


def full(weight: Tensor, t: Tensors, alpha: float | None) -> Tensor:
    return t["diff"]


def _sets(*options: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(option.split()) for option in options)


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "lora", _sets("lora_up lora_down"), lora, lambda t: len(t["lora_down"]), frozenset({"lora_mid"}), fresh_lora
        ),
        Scheme(
            "loha",
            _sets("hada_w1_a hada_w1_b hada_w2_a hada_w2_b",
                  "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2"),
            loha,
            lambda t: len(t["hada_w1_b"]),
            fresh=fresh_loha,
        ),
        Scheme(
            "lokr",
            _sets("lokr_w1 lokr_w2", "lokr_w1 lokr_w2_a lokr_w2_b", "lokr_w1_a lokr_w1_b lokr_w2",
                  "lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b", "lokr_w1 lokr_w2_a lokr_w2_b lokr_t2",
                  "lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b lokr_t2"),
            lokr,
            lokr_rank,
            fresh=fresh_lokr,
        ),
        Scheme(
            "oft", _sets("oft_blocks"), oft_or_boft, lambda t: t["oft_blocks"].shape[-1], frozenset({"rescale"}),
            fresh_oft,
        ),
        Scheme("glora", _sets("a1 a2 b1 b2"), glora, lambda t: len(t["b2"])),
        Scheme("ia3", _sets("weight on_input"), ia3, lambda t: 1),
        Scheme("full", _sets("diff"), full, lambda t: min(t["diff"].flatten(1).shape)),
    )
}  # fmt: skip
TRAINED = (*(name for name, scheme in SCHEMES.items() if scheme.fresh), "dora")  # schemes of AdapterSpec
