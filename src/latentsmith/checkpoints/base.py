"""Define an open checkpoint, and what a format has to provide (see the package's docstring)."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentsmith.architectures import COMPONENTS, is_open_clip
from latentsmith.diffusion.schedule import NoiseSchedule, ldm_beta_schedule
from latentsmith.files.errors import BadInput
from latentsmith.files.lazy import LazyTensor
from latentsmith.files.tensors import TensorFile

Shapes = Mapping[str, tuple[int, ...]]  # canonical name -> shape
Parts = Mapping[str, Mapping[str, Tensor | LazyTensor]]  # part -> canonical name -> tensor
Written = Callable[[str], None]  # called with each key once its tensor is on disk

SPEC_KEY = "latentsmith.spec"  # entries of ours in the metadata of safetensors files
NULL_TEXT_KEY = "latentsmith.null_text"
PAD_KEY = "latentsmith.pad_to"
SCALE_FACTOR_KEY = "buffer scale_factor"  # of a checkpoint's extras: the number in a tensor of that name
BETAS_KEY = "buffer trained_betas"  # the numbers in a tensor `betas`, where they are not Stable Diffusion's
PREDICTIONS = {"eps": "epsilon", "epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction",
               "v_pred": "v_prediction", "x0": "sample", "sample": "sample"}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One component as stored. entries: keys without prefixes and wrappers. keys: those -> the file's own."""

    name: str
    path: Path
    entries: dict[str, LazyTensor]
    keys: dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: the content of a path.

    format: name of a Format, or "component" for a bare file of one part. metadata: safetensors headers. extras: what a
    pickle held beside tensors. config: the model config that a NeMo file carries. unknown: keys that no format knows,
    with which nothing is loaded. files: those that were opened (an unpacked .nemo: its folder).
    """

    path: Path
    format: str
    parts: dict[str, Part]
    ignored: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    has_ema: bool = False
    unknown: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class ModelSpec:
    """A whole model but its weights, in the keywords of `UNetModel`, `AutoencoderKL` and `ClipTextEncoder`.

    prediction_type: "epsilon", "v_prediction" or "sample". image_size: side of the latents. The schedule is
    `beta_schedule` (LDM's names) from linear_start to linear_end; zero_terminal_snr rescales it (Lin et al. 2023).
    timestep_spacing, steps_offset, set_alpha_to_one: which timesteps samplers visit, as `diffusion.sampling_schedule`
    takes them; None leaves it to each sampler. trained_betas: the schedule itself, in place of the others' keys.
    karras_sigmas: of samplers that have them in diffusers. clip_sample_range: where ddim and ddpm clip the clean
    estimate; None: nowhere. Defaults are those that Stable Diffusion is published with.
    """

    unet_config: Mapping[str, Any]
    first_stage_config: Mapping[str, Any]
    cond_stage_config: Mapping[str, Any]
    prediction_type: str
    image_size: int = 64
    scale_factor: float = 0.18215
    linear_start: float = 0.00085
    linear_end: float = 0.012
    timesteps: int = 1000
    zero_terminal_snr: bool = False
    beta_schedule: str = "linear"
    cosine_s: float = 8e-3
    timestep_spacing: str | None = None
    steps_offset: int = 1
    set_alpha_to_one: bool | None = False
    trained_betas: Sequence[float] | None = None
    karras_sigmas: bool = False
    clip_sample_range: float | None = None
    null_text: str = "empty"  # "empty": the empty prompt's embedding; "zero": zeros (text_embedding_dropout_rate)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, default=list)

    def noise_schedule(self) -> NoiseSchedule:
        """Return the noise schedule. Raises ValueError for numbers that describe none."""
        if self.trained_betas is not None:
            schedule = NoiseSchedule.from_betas(self.trained_betas)
        else:
            schedule = NoiseSchedule.from_config(
                self.linear_start,
                self.linear_end,
                ldm_beta_schedule(self.beta_schedule),
                self.timesteps,
                cosine_s=self.cosine_s,
            )
        return schedule.zero_terminal_snr() if self.zero_terminal_snr else schedule

    def config_of(self, part: str) -> Mapping[str, Any]:
        """Return the keywords of one part's network."""
        config: Mapping[str, Any] = getattr(self, COMPONENTS[part].config_key)
        return config

    @property
    def open_clip(self) -> bool:
        """Return whether the text encoder is one of OpenCLIP's (exact GELU), as in v2."""
        return is_open_clip(self.cond_stage_config.get("arch"), self.cond_stage_config.get("activation"))

    @property
    def penultimate(self) -> bool:
        """Return whether the text encoder stops one layer before its architecture's last."""
        return self.cond_stage_config.get("layer") == "penultimate"


@dataclass(frozen=True)
class SourceKey:
    """Key and part of a file's tensor that a canonical one is read from.

    third: rows of q, k or v (0, 1, 2) of a fused tensor.
    heads: rows of the fused tensor run [heads, 3, head_dim] if given, [3, heads, head_dim] if None.
    """

    key: str
    third: int | None = None
    heads: int | None = None


@dataclass(frozen=True)
class Dialect:
    """One way of naming a part's tensors.

    format: the Format it belongs to. title: what `inspect` calls it. table: from a network's canonical names to where
    each tensor lies. level_names: from the keys of a U-Net or VAE to diffusers' names, from which sizes are read as
    their numbers count levels of resolution; None where names differ from LDM's only inside modules. The layers of a
    text encoder are counted in any dialect by `layers.N.` or `resblocks.N.` in its keys.
    """

    format: str
    title: str
    table: Callable[[Iterable[str]], dict[str, SourceKey]]
    level_names: Callable[[Iterable[str]], dict[str, str]] | None = None


@dataclass(frozen=True)
class Contents:
    """The tensor files at a path, their keys not yet looked at.

    files: part -> file; the file at None holds any parts, told apart by its keys. format: the Format's name, None if
    the keys have to tell it. config: the model config stored with the weights.
    """

    files: Mapping[str | None, TensorFile]
    format: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """All that the rest of the package asks of a format. What a format has not stays at its default.

    title: for messages. key_rules: (class of key, regular expression); what it matches at the start of a key is cut
    off. Classes: the parts, "ema" (averages under LDM's names), "schedule" and "other" (both ignored).
    whole_keys: matches the start of some key of every single file in this format, and of no other.
    dialects: part -> function of (a part's entries, the checkpoint's config) that recognises a dialect, or None.
    open: reads the headers at a path ("ema" or "raw" weights); None if the path is of another format.
    sizes: keywords of a part's network that its config states and its weights do not show; None if there is no config.
    facts: what the config states of the other fields of ModelSpec, and "prediction": (type or None, where it stands).
    write: writes a whole model: (parts, path, spec, *, dtype, written), with `tokenizer` where needs_tokenizer.
    ending: of the file that it writes; "" for a folder. keeps_unused_text: it stores what nothing uses of an OpenCLIP
    text tower. loses: a phrase for each fact of a spec that other programs do not read from this format.
    """

    name: str
    title: str
    key_rules: Sequence[tuple[str, str]] = ()
    whole_keys: str | None = None
    dialects: Mapping[str, Callable[[Mapping[str, LazyTensor], Mapping[str, Any]], Dialect | None]] = field(
        default_factory=dict
    )
    open: Callable[[Path, str], Contents | None] | None = None
    sizes: Callable[[Checkpoint, Part], dict[str, Any] | None] | None = None
    facts: Callable[[Checkpoint], dict[str, Any]] | None = None
    write: Callable[..., None] | None = None
    ending: str = ""
    needs_tokenizer: bool = False
    keeps_unused_text: bool = False
    loses: Callable[[ModelSpec], list[str]] = lambda spec: []


def known_prediction(stated: Any) -> str | None:
    """Return diffusers' name of a prediction type in any spelling ("V-prediction"); None for an unknown one."""
    return PREDICTIONS.get(re.sub(r"[\s-]+", "_", str(stated).strip().lower()))


def renamed(table: Mapping[str, str]) -> dict[str, SourceKey]:
    """Return a table whose tensors are stored whole, each under one key."""
    return {name: SourceKey(key) for name, key in table.items()}


def require_whole(parts: Parts) -> None:
    """Raise BadInput unless U-Net, VAE and text encoder are all there."""
    if missing := [name for name in COMPONENTS if name not in parts]:
        raise BadInput(f"a whole model was expected, {missing[0]} is missing")


def packed(
    tensors: Mapping[str, Tensor | LazyTensor], dialect: Dialect, dtype: torch.dtype | None, prefix: str = ""
) -> dict[str, LazyTensor]:
    """Return file key -> tensor in a dialect, still lazy; q, k and v that share a key are put one after the other.

    dtype: of every floating-point weight; None keeps each.
    """
    grouped: dict[str, dict[int, LazyTensor]] = {}
    for name, source in dialect.table(tensors).items():
        grouped.setdefault(source.key, {})[source.third or 0] = LazyTensor.of(tensors[name]).to(dtype, name)
    return {prefix + key: group[0] if len(group) == 1 else _joined(group) for key, group in grouped.items()}


def _joined(thirds: Mapping[int, LazyTensor]) -> LazyTensor:
    first = thirds[0]
    shape = (3 * first.shape[0], *first.shape[1:])
    return LazyTensor(first.dtype, shape, lambda: torch.cat([thirds[i].read() for i in range(3)]))


def lost_zero_snr(spec: ModelSpec) -> list[str]:
    """Return what `Format.loses` says where there is no key for a schedule with zero terminal SNR."""
    return ["zero terminal SNR (their schedule is the plain one)"] if spec.zero_terminal_snr else []


def lost_sampling(spec: ModelSpec) -> list[str]:
    """Return what `Format.loses` says where there are no keys for how a model's scheduler samples."""
    facts = {
        "betas of its own (they use the plain schedule)": spec.trained_betas is not None,
        "Karras sigmas, which its scheduler uses": spec.karras_sigmas,
        "clip_sample, which its scheduler does": spec.clip_sample_range is not None,
    }
    return [fact for fact, holds in facts.items() if holds]


def lost_clip_skip(spec: ModelSpec) -> list[str]:
    """Return what `Format.loses` says where a text encoder that is not OpenCLIP's always runs to its last layer."""
    skips = spec.penultimate and not spec.open_clip
    return ["a text encoder that stops before its last layer, which is left out (clip skip)"] if skips else []


def lost_padding(spec: ModelSpec) -> list[str]:
    """Return what `Format.loses` says where there is no key for padded text embeddings."""
    pad_to = spec.cond_stage_config.get("pad_to")
    return [f"text filled up to {pad_to} vectors"] if pad_to else []


def some(names: Iterable[str]) -> str:
    """Return the first three names for a message."""
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def shown(value: Any) -> str:
    """Return a value of a foreign file for a message: on one line of at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
