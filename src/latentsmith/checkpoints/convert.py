"""`latentsmith convert`: a checkpoint of any format rewritten in another, one tensor at a time."""

import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from latentsmith.diffusion import canonical_prediction_type
from latentsmith.files.errors import BadInput
from latentsmith.progress import progress
from latentsmith.text.tokenizer import Tokenizer
from latentsmith.text.vocabulary import find_vocabulary, read_vocabulary

from . import (
    Checkpoint,
    ModelSpec,
    export_diffusers,
    export_ldm,
    export_nemo,
    match,
    open_checkpoint,
    spec_of,
    unused_text,
)
from .load import without_weights
from .verify import NETWORKS, Parts, Shapes, verify_conversion

EXPORTERS = {"diffusers": export_diffusers, "ldm": export_ldm, "nemo": export_nemo}
ENDINGS = {"diffusers": "", "ldm": ".safetensors", "nemo": ".nemo"}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def convert(
    src: str | Path,
    dst: str | Path,
    to: str,
    *,
    weights: str = "ema",
    dtype: str | torch.dtype | None = None,
    prediction_type: str | None = None,
    tokenizer: str | Path | None = None,
    verify: bool = False,
) -> Path:
    """Write the whole model at `src` to `dst`, which must not exist; returns it.

    to: "diffusers" (a folder), "ldm" (one .safetensors) or "nemo" (.nemo). weights: "ema" or "raw", where both are
    there. dtype: "fp32", "fp16", "bf16" or torch's own for every weight; None keeps each. prediction_type: overrides
    what the checkpoint says. tokenizer: file or folder of the one for a diffusers folder, where the checkpoint has none
    and CLIP's is not on this machine.
    verify: open the result again and compare every tensor, and what each network makes of one input, with its source's.
    Raises BadInput for a source that is not a whole model, a destination that cannot be written, or a diffusers folder
    without a tokenizer; RuntimeError if
    verifying finds a tensor that is not what was meant to be written.
    """
    dst, kind = Path(dst), named_dtype(dtype)
    check_destination(dst, to)
    checkpoint = open_checkpoint(src, weights)
    spec = spec_of(checkpoint, canonical(prediction_type))
    shapes = shapes_of(spec)
    parts = {part: match(checkpoint, part, shapes[part]) for part in NETWORKS}
    export: Any = EXPORTERS[to]
    if to == "diffusers":
        export = partial(export, tokenizer=tokenizer_files(checkpoint, parts, spec, tokenizer))
    else:
        parts["text_encoder"] |= unused_text(checkpoint, shapes["text_encoder"])
    total = sum(len(tensors) for tensors in parts.values())
    with progress("converting", "tensors") as tell:
        export(parts, dst, spec, dtype=kind, written=Tally(tell, total))
    print(summary(dst, to, parts, spec, kind), *lost(spec, to), sep="\n", flush=True)
    if verify:
        verify_conversion(parts, dst, spec, shapes, kind)
    return dst


class Tally:
    """Tells a progress bar of each tensor; formats write a few tensors of their own beside the model's."""

    def __init__(self, tell: Any, total: int):
        self.tell, self.total, self.done = tell, total, 0

    def __call__(self, name: str) -> None:
        self.done += 1
        self.tell(min(self.done, self.total), self.total)


def named_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """torch's dtype of a name; BadInput for one that weights are not kept in."""
    if dtype is None or dtype in DTYPES.values():
        return dtype  # type: ignore[return-value]
    if dtype not in DTYPES:
        raise BadInput(f"dtype {dtype} is not one of {', '.join(DTYPES)}")
    return DTYPES[dtype]  # type: ignore[index]


def canonical(prediction_type: str | None) -> str | None:
    try:
        return canonical_prediction_type(prediction_type) if prediction_type else None
    except ValueError as error:
        raise BadInput(str(error)) from None


def check_destination(dst: Path, to: str) -> None:
    """BadInput for an unknown format, a name that its readers would not take, and anything that exists."""
    if to not in EXPORTERS:
        raise BadInput(f"format {to!r} is not one of {', '.join(EXPORTERS)}")
    if ENDINGS[to] and dst.suffix != ENDINGS[to]:
        raise BadInput(f"{dst}: {to} is one file, and its name ends in {ENDINGS[to]}")
    if os.path.lexists(dst):
        raise BadInput(f"{dst}: exists already, and nothing is overwritten; name another or move it away")


def shapes_of(spec: ModelSpec) -> Shapes:
    """Part -> canonical names and shapes of the networks of `spec`, which are built without memory for weights."""
    configs = {"unet": spec.unet_config, "vae": spec.first_stage_config, "text_encoder": spec.cond_stage_config}
    return {part: network_shapes(part, config) for part, config in configs.items()}


def network_shapes(part: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    with without_weights():
        network = NETWORKS[part](**config)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def tokenizer_files(
    checkpoint: Checkpoint, parts: Parts, spec: ModelSpec, given: str | Path | None
) -> dict[str, bytes]:
    """The tokenizer for a diffusers folder: the one given, the checkpoint's own, or CLIP's.

    BadInput where none is found or it has more tokens than the text encoder: diffusers opens no folder without one.
    """
    embeddings = parts["text_encoder"]
    tokens, length = (
        embeddings[f"text_model.embeddings.{table}_embedding.weight"].shape[0] for table in ("token", "position")
    )
    found = find_vocabulary(given, checkpoint.path)
    vocabulary = read_vocabulary(found)
    if len(vocabulary.tokens) > tokens:
        raise BadInput(
            f"{found}: a tokenizer of {len(vocabulary.tokens):,} tokens, the text encoder knows {tokens:,}; "
            "give the model's own (--tokenizer)"
        )
    if (found / "merges.txt").is_file():
        return {file.name: file.read_bytes() for file in sorted(found.iterdir()) if file.suffix in (".json", ".txt")}
    pad = "!" if spec.open_clip and vocabulary.pad is None else None
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer(vocabulary, length, pad=pad).save(folder)
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def lost(spec: ModelSpec, to: str) -> list[str]:
    """A line for each fact that only latentsmith reads back from the format, so that other programs draw otherwise."""
    text = spec.cond_stage_config
    facts = {
        "zero terminal SNR (their schedule is the plain one)": spec.zero_terminal_snr and to != "diffusers",
        "zeros as the null text (they take the empty prompt)": spec.null_text == "zero",
        f"text filled up to {text.get('pad_to')} vectors": text.get("pad_to") and to != "nemo",
        "text without NeMo's three zero vectors (NeMo adds them)": to == "nemo"
        and not (spec.open_clip or text.get("pad_to")),
    }
    return [f"note: other programs do not know of {fact}" for fact, applies in facts.items() if applies]


def summary(dst: Path, to: str, parts: Parts, spec: ModelSpec, dtype: torch.dtype | None) -> str:
    """One line that says what was written."""
    tensors = [tensor for part in parts.values() for tensor in part.values()]
    kinds = {str(dtype or tensor.dtype).removeprefix("torch.") for tensor in tensors}
    files = [dst] if dst.is_file() else [file for file in dst.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    what = {"diffusers": "diffusers folder", "ldm": "LDM file", "nemo": ".nemo archive"}[to]
    return (
        f"{dst}: {what}, {sum(tensor.numel for tensor in tensors):,} parameters, {' and '.join(sorted(kinds))}, "
        f"{spec.prediction_type}, {size / 2**20:,.1f} MiB"
    )
