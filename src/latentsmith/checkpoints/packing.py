"""Key tables read backwards: canonical tensors laid out as another format wants them, still lazily."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from latentsmith.files.errors import BadInput
from latentsmith.files.pickles import LazyTensor

from . import clip
from .clip import SourceKey
from .spec import ModelSpec

AnyTensor = Tensor | LazyTensor
Parts = Mapping[str, Mapping[str, AnyTensor]]
Written = Callable[[str], None]  # told each key once its tensor is on disk: progress bars


def lazy(tensor: AnyTensor, dtype: torch.dtype | None = None) -> LazyTensor:
    """`tensor` as a LazyTensor, floating-point numbers in `dtype` if given."""
    if isinstance(tensor, Tensor):
        tensor = LazyTensor(tensor.dtype, tuple(tensor.shape), tensor.detach)
    if dtype is None or not tensor.dtype.is_floating_point or tensor.dtype == dtype:
        return tensor
    return LazyTensor(dtype, tensor.shape, lambda: tensor.read().to(dtype))


def reshaped(tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    return LazyTensor(tensor.dtype, shape, lambda: tensor.read().reshape(shape))


def pack(
    tensors: Mapping[str, AnyTensor], table: Mapping[str, SourceKey], prefix: str, dtype: torch.dtype | None
) -> dict[str, LazyTensor]:
    """File key -> tensor; q, k and v that share a key are put one after the other."""
    grouped: dict[str, dict[int, LazyTensor]] = {}
    for name, slot in table.items():
        grouped.setdefault(slot.key, {})[slot.third or 0] = lazy(tensors[name], dtype)
    return {prefix + key: group[0] if len(group) == 1 else _joined(group) for key, group in grouped.items()}


def _joined(group: Mapping[int, LazyTensor]) -> LazyTensor:
    first = group[0]
    shape = (3 * first.shape[0], *first.shape[1:])
    return LazyTensor(first.dtype, shape, lambda: torch.cat([group[i].read() for i in range(3)]))


def text_tower(tensors: Mapping[str, AnyTensor], open_clip: bool, dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """A text encoder as LDM and NeMo hold it under `cond_stage_model.`: Hugging Face's names, or OpenCLIP's."""
    if open_clip:
        return pack(tensors, clip.slots(tensors, "openclip", None), "model.", dtype)
    return {f"transformer.{name}": lazy(tensor, dtype) for name, tensor in tensors.items()}


def schedule_buffers(spec: ModelSpec) -> dict[str, LazyTensor]:
    """The twelve float32 tables that LDM and NeMo store, computed in float64 (Ho et al. 2020, equations 4 to 7)."""
    powers = {"linear": 2, "sqrt_linear": 1}
    if spec.beta_schedule not in powers:
        raise BadInput(
            f"beta_schedule {spec.beta_schedule}: only {' and '.join(powers)} can be written to other formats"
        )
    power, steps = powers[spec.beta_schedule], spec.timesteps
    ends = spec.linear_start ** (1 / power), spec.linear_end ** (1 / power)
    betas = torch.linspace(*ends, steps, dtype=torch.float64) ** power
    kept = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    variance = betas * (1 - before) / (1 - kept)
    tables = {
        "betas": betas,
        "alphas_cumprod": kept,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": kept.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - kept).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - kept).log(),
        "sqrt_recip_alphas_cumprod": (1 / kept).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / kept - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - kept),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - kept),
    }
    return {name: lazy(table.float()) for name, table in tables.items()}


def require_whole(parts: Parts) -> None:
    """BadInput unless U-Net, VAE and text encoder are all there."""
    if missing := [name for name in ("unet", "vae", "text_encoder") if name not in parts]:
        raise BadInput(f"a whole model was expected, {missing[0]} is missing")
