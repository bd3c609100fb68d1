"""Every model key filled exactly once, every file key used or named as ignorable: or one line says what is wrong."""

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from latentsmith.files.errors import BadInput
from latentsmith.files.pickles import LazyTensor

from . import clip, unet_keys, vae_keys
from .clip import SourceKey
from .open import OWN_SECTION, Checkpoint, Part

Shapes = Mapping[str, tuple[int, ...]]
UNIT_DIMS = re.compile(r"\.(proj_in|proj_out)\.weight$|\.(attn_1|attn\.\d+)\.(q|k|v)\.weight$")  # 1x1 conv or Linear
TITLES = {"unet": "U-Net", "vae": "VAE", "text_encoder": "text encoder"}


def match(checkpoint: Checkpoint, name: str, shapes: Shapes, from_nemo: bool | None = None) -> dict[str, LazyTensor]:
    """Canonical name -> tensor on disk, in the shape the model wants, for one part of a checkpoint.

    Raises BadInput unless the part's keys and `shapes` match one to one (reasons under `_likely_reason`).
    """
    if checkpoint.unknown:
        count, some = len(checkpoint.unknown), _some(list(checkpoint.unknown))
        raise BadInput(f"{checkpoint.path}: {count} keys of no known format ({some}); delete them from the file")
    if name not in checkpoint.parts:
        held = ", ".join(TITLES[part] for part in checkpoint.parts) or "nothing we know"
        raise BadInput(f"{checkpoint.path}: no {TITLES[name]} inside; it holds {held}")
    part = checkpoint.parts[name]
    if name != "text_encoder":
        check_from_nemo(part, from_nemo)
    found, unread = _fill(checkpoint, part, shapes)
    missing, mismatched = _faults(found, shapes)
    if missing or mismatched or unread:
        raise BadInput(_complaint(part, shapes, found, missing, mismatched, unread))
    return {ours: tensor for ours, tensor in found.items() if tensor is not None}


def audit(checkpoint: Checkpoint, name: str, shapes: Shapes) -> tuple[list[str], list[str], list[str]]:
    """(missing, extra, mismatched) keys of one part against `shapes`; extra as the file spells them."""
    part = checkpoint.parts[name]
    found, unread = _fill(checkpoint, part, shapes)
    missing, mismatched = _faults(found, shapes)
    return missing, [part.keys.get(key, key) for key in unread], mismatched


def unused_text(checkpoint: Checkpoint, shapes: Shapes) -> dict[str, LazyTensor]:
    """What an OpenCLIP text tower holds beyond the model of `shapes`, which uses none of it: the last layer where that
    stops before it, text_projection and logit_scale. {} unless the file has all of them, trained."""
    part, stated = checkpoint.parts["text_encoder"], checkpoint.config.get(OWN_SECTION) or {}
    zeros = (stated.get("cond_stage_config") or {}).get("unused_layer") == "zeros"
    if clip.detect(part.entries) != "openclip" or zeros:
        return {}
    found = {name: part.entries.get(name) for name in ("text_projection", "logit_scale")}
    used, held = clip.depth(shapes), clip.depth(part.entries)
    if held == used + 1:
        before, after = f".layers.{used - 1}.", f".layers.{used}."
        last = {name.replace(before, after): shape for name, shape in shapes.items() if before in name}
        table = table_for(part, last, checkpoint.config)
        found |= {ours: _at_slot(part, table[ours], shape, ours) for ours, shape in last.items()}
    return {} if None in found.values() else found  # type: ignore[return-value]


def _fill(checkpoint: Checkpoint, part: Part, shapes: Shapes) -> tuple[dict[str, LazyTensor | None], list[str]]:
    """What lies at each canonical name, and the keys nothing reads."""
    table = table_for(part, shapes, checkpoint.config)
    found = {ours: _at_slot(part, slot, shapes[ours], ours) for ours, slot in table.items()}
    return found, unread_keys(part, table, shapes)


def _faults(found: Mapping[str, LazyTensor | None], shapes: Shapes) -> tuple[list[str], list[str]]:
    missing = [ours for ours, tensor in found.items() if tensor is None]
    wrong = [ours for ours, tensor in found.items() if tensor is not None and tensor.shape != tuple(shapes[ours])]
    return missing, wrong


def table_for(part: Part, shapes: Shapes, config: Mapping[str, Any]) -> dict[str, SourceKey]:
    """Canonical name -> slot, in the dialect the part's own keys speak."""
    if part.name == "text_encoder":
        dialect = clip.detect(part.entries)
        return clip.slots(shapes, dialect, interleaved_heads(dialect, shapes, config), part.entries)
    renamed = (
        unet_keys.rename(shapes, unet_keys.detect(part.entries))
        if part.name == "unet"
        else vae_keys.rename(shapes, vae_keys.detect(part.entries))
    )
    return {ours: SourceKey(theirs) for ours, theirs in renamed.items()}


def interleaved_heads(dialect: str, shapes: Shapes, config: Mapping[str, Any]) -> int | None:
    """Number of heads if fused q, k, v rows are interleaved per head, None if they lie one after the other.

    megatron-core always interleaves; Megatron does where the file's CLIP config says megatron_legacy: false, or says
    nothing, as that is NeMo's default. A file without a CLIP config is taken as NeMo's two shipped configs make it,
    which say true, with a warning. Heads: from that config, else width / 64 as in every CLIP text tower.
    """
    text = _text_config(config)
    if dialect == "megatron" and not text:
        note = "a Megatron CLIP without its config: its q, k, v are read in the layout of megatron_legacy: true"
        warnings.warn(note, stacklevel=2)
    if dialect == "megatron-core" or (dialect == "megatron" and text and not text.get("megatron_legacy", False)):
        width = next(shape[-1] for name, shape in shapes.items() if name.endswith("token_embedding.weight"))
        return int(text.get("num_attention_heads") or width // 64)
    return None


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `text` section of a CLIP config: at the top of a CLIP .nemo, in a diffusion one's cond_stage_config.cfg."""
    for inner in (config, (config.get("cond_stage_config") or {}).get("cfg") or {}):
        if isinstance(inner.get("text"), Mapping):
            return inner["text"]
    return {}


def unread_keys(part: Part, table: Mapping[str, SourceKey], shapes: Shapes) -> list[str]:
    """The file's keys that nothing reads and no rule excuses."""
    used = {slot.key for slot in table.values()}
    left = [key for key in part.entries if key not in used]
    if part.name != "text_encoder":
        return left
    excuse = clip.ignorable(clip.depth(shapes), clip.depth(part.entries))
    return [key for key in left if not excuse(key)]


def check_from_nemo(part: Part, from_nemo: bool | None) -> None:
    """LDM names load whatever `from_NeMo` says; diffusers names with true, or NeMo names with false, are refused."""
    dialect = unet_keys.detect(part.entries) if part.name == "unet" else vae_keys.detect(part.entries)
    first = next(iter(part.keys.values()))
    if from_nemo and str(dialect).startswith("diffusers"):
        raise BadInput(
            f'{part.path}: its {TITLES[part.name]} names ("{first}") are diffusers\': set from_NeMo to false'
        )
    if from_nemo is False and isinstance(dialect, unet_keys.UNetDialect) and dialect.nemo:
        raise BadInput(f'{part.path}: its {TITLES[part.name]} names ("{first}") are NeMo\'s: set from_NeMo to true')


def _at_slot(part: Part, slot: SourceKey, shape: tuple[int, ...], ours: str) -> LazyTensor | None:
    entry = part.entries.get(slot.key)
    if entry is None:
        return None
    if slot.third is not None:
        entry = _third(entry, slot.third, slot.heads)
    if entry.shape != tuple(shape) and UNIT_DIMS.search(ours) and _squeezed(entry.shape) == _squeezed(tuple(shape)):
        return _view(entry, tuple(shape))
    if slot.key.endswith("word_embeddings.weight") and len(entry.shape) == 2 and entry.shape[1:] == tuple(shape[1:]):
        return _cropped(entry, shape[0])
    return entry


def _third(entry: LazyTensor, third: int, heads: int | None) -> LazyTensor:
    """Rows of q, k or v; entry: (3 * width, ...)."""
    rows = entry.shape[0] // 3
    shape = (rows, *entry.shape[1:])

    def read() -> torch.Tensor:
        if heads is None:
            return entry.read()[third * rows : (third + 1) * rows]
        return entry.read().unflatten(0, (heads, 3, rows // heads))[:, third].reshape(shape)

    return LazyTensor(entry.dtype, shape, read)


def _view(entry: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    return LazyTensor(entry.dtype, shape, lambda: entry.read().reshape(shape))


def _cropped(entry: LazyTensor, rows: int) -> LazyTensor:
    """Megatron pads the vocabulary to a multiple of 128 x tensor-parallel size with rows no token uses."""
    if entry.shape[0] <= rows or entry.shape[0] % 128 or entry.shape[0] - rows >= 1024:
        return entry
    return LazyTensor(entry.dtype, (rows, *entry.shape[1:]), lambda: entry.read()[:rows])


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _complaint(
    part: Part,
    shapes: Shapes,
    found: Mapping[str, LazyTensor | None],
    missing: list[str],
    mismatched: list[str],
    unread: list[str],
) -> str:
    facts = []
    if missing:
        facts.append(f"{len(missing)} of {len(shapes)} {TITLES[part.name]} tensors missing ({_some(missing)})")
    if unread:
        facts.append(f"{len(unread)} unknown ({_some([part.keys.get(key, key) for key in unread])})")
    if mismatched:
        name = mismatched[0]
        theirs = found[name].shape  # type: ignore[union-attr]
        facts.append(
            f"{len(mismatched)} of another shape ({name} is {theirs}, the config makes it {tuple(shapes[name])})"
        )
    reason = _likely_reason(part, shapes, found, bool(missing or unread))
    return f"{part.path}: {reason}{'; ' if reason else ''}{'; '.join(facts)}"


def _likely_reason(part: Part, shapes: Shapes, found: Mapping[str, LazyTensor | None], depths_differ: bool) -> str:
    explain = {"unet": _unet_reason, "vae": _vae_reason, "text_encoder": _text_reason}[part.name]
    return explain(part, shapes, found, depths_differ)


def _sizes(shapes: Shapes, found: Mapping[str, LazyTensor | None], ending: str, axis: int) -> tuple[int, int] | None:
    """(file's, model's) extent along `axis` of the first tensor of that name ending, if they differ."""
    for name, shape in shapes.items():
        entry = found.get(name)
        if name.endswith(ending) and entry is not None and len(entry.shape) > axis and entry.shape[axis] != shape[axis]:
            return entry.shape[axis], shape[axis]
    return None


def _unet_reason(part: Part, shapes: Shapes, found: Mapping[str, LazyTensor | None], depths_differ: bool) -> str:
    if sizes := _sizes(shapes, found, "input_blocks.0.0.weight", 0):
        return f"its first convolution has {sizes[0]} channels, the config says model_channels {sizes[1]}"
    if sizes := _sizes(shapes, found, "attn2.to_k.weight", 1):
        version = {768: "a v1 checkpoint: ", 1024: "a v2 checkpoint: "}.get(sizes[0], "")
        return f"{version}its context width is {sizes[0]}, the config says context_dim {sizes[1]}"
    if sizes := _sizes(shapes, found, "input_blocks.0.0.weight", 1):
        kind = {9: "an inpainting model: ", 8: "an instruct-pix2pix model: ", 5: "a depth model: "}.get(sizes[0], "")
        return f"{kind}it takes {sizes[0]} input channels, the config says in_channels {sizes[1]}"
    return (
        "its blocks differ: compare channel_mult, num_res_blocks, attention_resolutions and transformer_depth"
        * depths_differ
    )


def _vae_reason(part: Part, shapes: Shapes, found: Mapping[str, LazyTensor | None], depths_differ: bool) -> str:
    if sizes := _sizes(shapes, found, "encoder.conv_in.weight", 0):
        return f"its first convolution has {sizes[0]} channels, the config says ddconfig.ch {sizes[1]}"
    if sizes := _sizes(shapes, found, "decoder.conv_in.weight", 1):
        return f"its latents have {sizes[0]} channels, the config says z_channels {sizes[1]}"
    return "its blocks differ: compare ddconfig's ch_mult, num_res_blocks and attn_resolutions" * depths_differ


def _text_reason(part: Part, shapes: Shapes, found: Mapping[str, LazyTensor | None], depths_differ: bool) -> str:
    if sizes := _sizes(shapes, found, "final_layer_norm.weight", 0):
        return f"a text encoder of width {sizes[0]}, the config says {sizes[1]}"
    if sizes := _sizes(shapes, found, "token_embedding.weight", 0):
        return f"a vocabulary of {sizes[0]:,} tokens, the config says {sizes[1]:,}"
    layers, wanted = clip.depth(part.entries), clip.depth(shapes)
    if layers == 23 and wanted == 24:
        return "a 23-layer SD2 text encoder already stops at the penultimate layer: set layer to penultimate"
    return f"a text encoder of {layers} layers, the config asks for {wanted}" * (layers != wanted)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
