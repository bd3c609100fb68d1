"""Every model key filled exactly once, every file key used or named as ignorable: or one line says what is wrong."""

import re
from collections.abc import Mapping
from functools import partial

from torch import Tensor

from latentsmith.architectures import CLIP_SIZES, COMPONENTS, SD_VERSIONS, UNET_INPUTS
from latentsmith.files.errors import BadInput
from latentsmith.files.lazy import LazyTensor

from . import clip, nemo
from .base import Checkpoint, Part, Shapes, SourceKey, some
from .formats import dialect_of

Found = Mapping[str, LazyTensor | None]  # canonical name -> what the file has under it
UNIT_DIMS = re.compile(r"\.(proj_in|proj_out)\.weight$|\.(attn_1|attn\.\d+)\.(q|k|v)\.weight$")  # 1x1 conv or Linear
TITLES = {part: component.title.removeprefix("the ") for part, component in COMPONENTS.items()}
SIZES = {  # (ending of a name, axis, what to say if the file has {0} there and the config {1})
    "unet": [
        ("input_blocks.0.0.weight", 0, "its first convolution has {} channels, the config says model_channels {}"),
        ("attn2.to_k.weight", 1, "{version}its context width is {}, the config says context_dim {}"),
        ("input_blocks.0.0.weight", 1, "{purpose}it takes {} input channels, the config says in_channels {}"),
    ],
    "vae": [
        ("encoder.conv_in.weight", 0, "its first convolution has {} channels, the config says ddconfig.ch {}"),
        ("decoder.conv_in.weight", 1, "its latents have {} channels, the config says z_channels {}"),
    ],
    "text_encoder": [
        ("final_layer_norm.weight", 0, "a text encoder of width {}, the config says {}"),
        ("token_embedding.weight", 0, "a vocabulary of {:,} tokens, the config says {:,}"),
    ],
}
BLOCKS = {  # keys of a config that decide how many blocks there are
    "unet": "channel_mult, num_res_blocks, attention_resolutions and transformer_depth",
    "vae": "ddconfig's ch_mult, num_res_blocks and attn_resolutions",
}


def match(checkpoint: Checkpoint, name: str, shapes: Shapes, from_nemo: bool | None = None) -> dict[str, LazyTensor]:
    """Return canonical name -> tensor on disk, in the shape that the network wants, for one part of a checkpoint.

    name: the part. shapes: the network's. from_nemo: NeMo's `from_NeMo` key; None recognises the dialect.
    Raises BadInput unless every name is filled once and every key of the part is used or ignorable.
    """
    if checkpoint.unknown:
        listed = f"{len(checkpoint.unknown)} keys of no known format ({some(checkpoint.unknown)})"
        raise BadInput(f"{checkpoint.path}: {listed}; delete them from the file")
    if name not in checkpoint.parts:
        held = ", ".join(TITLES[part] for part in checkpoint.parts) or "no known part"
        raise BadInput(f"{checkpoint.path}: no {TITLES[name]} inside; it holds {held}")
    part = checkpoint.parts[name]
    if name != "text_encoder":
        _check_from_nemo(checkpoint, part, from_nemo)
    found, unread = _fill(checkpoint, part, shapes)
    missing, mismatched = _faults(found, shapes)
    if missing or mismatched or unread:
        raise BadInput(_complaint(part, shapes, found, missing, mismatched, unread))
    return {ours: tensor for ours, tensor in found.items() if tensor is not None}


def audit(checkpoint: Checkpoint, name: str, shapes: Shapes) -> tuple[list[str], list[str], list[str]]:
    """Return the missing, extra and mismatched keys of one part against `shapes`; extra as the file spells them."""
    part = checkpoint.parts[name]
    found, unread = _fill(checkpoint, part, shapes)
    missing, mismatched = _faults(found, shapes)
    return missing, [part.keys.get(key, key) for key in unread], mismatched


def unused_text(checkpoint: Checkpoint, shapes: Shapes) -> dict[str, LazyTensor]:
    """Return what an OpenCLIP text tower holds beyond the network of `shapes`, which uses none of it.

    That is the last layer where the network stops before it, text_projection and logit_scale; {} unless the file has
    all of them, trained.
    """
    part = checkpoint.parts["text_encoder"]
    stated = nemo.own_section(checkpoint).get("cond_stage_config") or {}
    dialect = dialect_of(part, checkpoint.config)
    if dialect is not clip.OPEN_CLIP_DIALECT or stated.get("unused_layer") == "zeros":
        return {}
    found = {name: part.entries.get(name) for name in ("text_projection", "logit_scale")}
    used, held = clip.depth(shapes), clip.depth(part.entries)
    if held == used + 1:
        before, after = f".layers.{used - 1}.", f".layers.{used}."
        last = {name.replace(before, after): shape for name, shape in shapes.items() if before in name}
        found |= {ours: _at(part, key, last[ours], ours) for ours, key in dialect.table(last).items()}
    return {} if None in found.values() else found  # type: ignore[return-value]


def _fill(checkpoint: Checkpoint, part: Part, shapes: Shapes) -> tuple[Found, list[str]]:
    """Return what the file has under each canonical name, and the keys that nothing reads and no rule excuses."""
    table = dialect_of(part, checkpoint.config).table(shapes)
    found = {ours: _at(part, source, shapes[ours], ours) for ours, source in table.items()}
    used = {source.key for source in table.values()}
    unread = [key for key in part.entries if key not in used]
    if part.name == "text_encoder":
        excuse = clip.ignorable(clip.depth(shapes), clip.depth(part.entries))
        unread = [key for key in unread if not excuse(key)]
    return found, unread


def _faults(found: Found, shapes: Shapes) -> tuple[list[str], list[str]]:
    missing = [ours for ours, tensor in found.items() if tensor is None]
    wrong = [ours for ours, tensor in found.items() if tensor is not None and tensor.shape != tuple(shapes[ours])]
    return missing, wrong


def _check_from_nemo(checkpoint: Checkpoint, part: Part, from_nemo: bool | None) -> None:
    """Refuse diffusers names with from_NeMo true, NeMo's with false; LDM's are read with either."""
    dialect = dialect_of(part, checkpoint.config)
    refused = {True: ("diffusers", "diffusers'", "false"), False: ("nemo", "NeMo's", "true")}
    if from_nemo is not None and refused[from_nemo][0] == dialect.format:
        _, whose, value = refused[from_nemo]
        first = next(iter(part.keys.values()))
        raise BadInput(f'{part.path}: its {TITLES[part.name]} names ("{first}") are {whose}: set from_NeMo to {value}')


def _at(part: Part, source: SourceKey, shape: tuple[int, ...], ours: str) -> LazyTensor | None:
    """Return the tensor at a key of the file in the shape wanted, where the format tells how; None if it is absent."""
    entry, shape = part.entries.get(source.key), tuple(shape)
    if entry is None:
        return None
    if source.third is not None:
        rows = entry.shape[0] // 3
        entry = entry.changed((rows, *entry.shape[1:]), partial(_third, third=source.third, heads=source.heads))
    if entry.shape != shape and UNIT_DIMS.search(ours) and _squeezed(entry.shape) == _squeezed(shape):
        return entry.reshape(shape)
    if source.key.endswith("word_embeddings.weight") and len(entry.shape) == 2 and entry.shape[1:] == shape[1:]:
        return _cropped(entry, shape[0])
    return entry


def _third(fused: Tensor, third: int, heads: int | None) -> Tensor:
    """Return the rows of q, k or v of a tensor (3 * width, ...); heads: as in SourceKey."""
    if heads is None:
        return fused.chunk(3)[third]
    per_head: Tensor = fused.unflatten(0, (heads, 3, -1))
    return per_head[:, third].flatten(0, 1)


def _cropped(entry: LazyTensor, rows: int) -> LazyTensor:
    """Drop what Megatron pads the vocabulary with: rows of no token, to a multiple of 128 x tensor-parallel size."""
    if entry.shape[0] <= rows or entry.shape[0] % 128 or entry.shape[0] - rows >= 1024:
        return entry
    return entry.changed((rows, *entry.shape[1:]), lambda tensor: tensor[:rows])


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _complaint(
    part: Part,
    shapes: Shapes,
    found: Found,
    missing: list[str],
    mismatched: list[str],
    unread: list[str],
) -> str:
    facts = []
    if missing:
        facts.append(f"{len(missing)} of {len(shapes)} {TITLES[part.name]} tensors missing ({some(missing)})")
    if unread:
        facts.append(f"{len(unread)} unknown ({some([part.keys.get(key, key) for key in unread])})")
    if mismatched:
        name = mismatched[0]
        theirs = found[name].shape  # type: ignore[union-attr]
        facts.append(
            f"{len(mismatched)} of another shape ({name} is {theirs}, the config makes it {tuple(shapes[name])})"
        )
    reason = _likely_reason(part, shapes, found)
    if not reason and part.name in BLOCKS and (missing or unread):
        reason = f"its blocks differ: compare {BLOCKS[part.name]}"
    return f"{part.path}: {'; '.join([reason, *facts] if reason else facts)}"


def _likely_reason(part: Part, shapes: Shapes, found: Found) -> str:
    """Return what explains most faults at once, from the first size in SIZES that differs; "" if there is none."""
    for ending, axis, sentence in SIZES[part.name]:
        for name, shape in shapes.items():
            entry = found.get(name)
            if not name.endswith(ending) or entry is None or len(entry.shape) <= axis:
                continue
            theirs, ours = entry.shape[axis], shape[axis]
            if theirs != ours:
                version = f"a {SD_VERSIONS[theirs]} checkpoint: " if theirs in SD_VERSIONS else ""
                purpose = f"{UNET_INPUTS[theirs]}: " if theirs in UNET_INPUTS else ""
                return sentence.format(theirs, ours, version=version, purpose=purpose)
    if part.name != "text_encoder":
        return ""
    layers, wanted, full = clip.depth(part.entries), clip.depth(shapes), CLIP_SIZES["ViT-H-14"].layers
    if (layers, wanted) == (full - 1, full):
        return f"a {layers}-layer SD2 text encoder already stops at the penultimate layer: set layer to penultimate"
    return f"a text encoder of {layers} layers, the config asks for {wanted}" if layers != wanted else ""
