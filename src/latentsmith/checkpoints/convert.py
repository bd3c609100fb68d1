"""`latentsmith convert`: a checkpoint of any format rewritten in another, one tensor at a time."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from latentsmith.architectures import COMPONENTS
from latentsmith.diffusion import canonical_prediction_type
from latentsmith.files.atomic import remove_incomplete
from latentsmith.files.errors import BadInput
from latentsmith.files.lazy import LazyTensor
from latentsmith.files.lock import LOCK_FILE, locked_folder
from latentsmith.precision import dtype_of
from latentsmith.progress import progress
from latentsmith.text.tokenizer import Tokenizer
from latentsmith.text.vocabulary import END, START, find_vocabulary, own_vocabulary, read_vocabulary

from . import clip
from .base import Checkpoint, Format, ModelSpec
from .diffusers_config import scheduler_class
from .formats import FORMATS
from .load import network_shapes
from .match import match, unused_text
from .open import open_checkpoint
from .run import check_sums
from .spec import spec_of
from .verify import verify_conversion


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
    change: Callable[[dict[str, dict[str, LazyTensor]]], dict[str, dict[str, LazyTensor]]] | None = None,
) -> Path:
    """Write the whole model at `src` to `dst`, which must not exist, and return `dst`.

    to: "diffusers" (a folder), "ldm" (one .safetensors) or "nemo" (.nemo). weights: "ema" or "raw", where both are
    there. dtype: "fp32", "fp16", "bf16" or torch's own for every weight; None keeps each. prediction_type: overrides
    what the checkpoint says. tokenizer: file or folder of the one for a diffusers folder, where the checkpoint has none
    and CLIP's is not on this machine.
    change: what makes other tensors of the model's, such as adapters merged into them.
    verify: open the result again and compare every tensor, and what each network makes of one input, with its source's.
    Raises BadInput for a source that is not a whole model, a destination that cannot be written, or a diffusers folder
    without a tokenizer; RuntimeError if verifying finds a tensor that is not what was meant to be written.
    """
    dst = Path(dst)
    dtype = dtype_of(dtype) if isinstance(dtype, str) else dtype
    format = _writable(dst, to)
    checkpoint = open_checkpoint(src, weights)
    spec = spec_of(checkpoint, _canonical(prediction_type))
    shapes = {part: network_shapes(part, spec.config_of(part)) for part in COMPONENTS}
    parts = {part: match(checkpoint, part, shapes[part]) for part in COMPONENTS}
    for part in parts:
        check_sums(checkpoint.parts[part].path)
    parts = change(parts) if change else parts
    options = {}
    if format.needs_tokenizer:
        options["tokenizer"] = tokenizer_files(checkpoint, parts["text_encoder"], spec, tokenizer)
    if format.keeps_unused_text:
        parts["text_encoder"] |= unused_text(checkpoint, shapes["text_encoder"])
    done, total = 0, sum(len(tensors) for tensors in parts.values())
    zeroed: list[int] = []
    rounded = {
        part: {name: tensor.to(dtype, f"{src}: {part} {name}", zeroed.append) for name, tensor in tensors.items()}
        for part, tensors in parts.items()
    }
    with _alone(dst, to), progress("converting", "tensors") as bar:

        def written(key: str) -> None:
            nonlocal done
            done = min(done + 1, total)  # formats write a few tensors of their own beside the model's
            bar(done, total)

        assert format.write
        format.write(rounded, dst, spec, written=written, **options)
    print(_summary(format, rounded, dst, spec) + (f", {sum(zeroed):,} numbers became 0" if zeroed else ""))
    for fact in _unread_facts(format, spec) + _lost_facts(format, spec, checkpoint):
        print(f"note: other programs do not know of {fact}")
    if verify:
        for line in verify_conversion(parts, checkpoint.path, open_checkpoint(dst), spec, shapes, dtype):
            print(line, flush=True)
    return dst


def _writable(dst: Path, to: str) -> Format:
    """Return the format to write. Raises BadInput if it is unknown, `dst` exists or its readers would not take it."""
    formats = {name: format for name, format in FORMATS.items() if format.write}
    if to not in formats:
        raise BadInput(f"format {to!r} is not one of {', '.join(sorted(formats))}")
    ending = formats[to].ending
    if ending and dst.suffix != ending:
        raise BadInput(f"{dst}: {to} is one file, and its name ends in {ending}")
    if os.path.lexists(dst):
        raise BadInput(f"{dst}: exists already, and nothing is overwritten; name another or move it away")
    return formats[to]


@contextmanager
def _alone(dst: Path, to: str) -> Iterator[None]:
    """Lock the name `dst` inside the context, and delete what a killed conversion to it left."""
    with locked_folder(dst.parent, name=f".{dst.name}{LOCK_FILE}", subject=dst):
        _writable(dst, to)  # again: another conversion may have ended meanwhile
        remove_incomplete(dst.parent, dst.name)
        yield


def _canonical(prediction_type: str | None) -> str | None:
    try:
        return canonical_prediction_type(prediction_type) if prediction_type else None
    except ValueError as error:
        raise BadInput(str(error)) from None


def tokenizer_files(
    checkpoint: Checkpoint, text_encoder: Mapping[str, LazyTensor], spec: ModelSpec, path: str | Path | None
) -> dict[str, bytes]:
    """Return the files of a tokenizer folder: of the one at `path`, the checkpoint's own, or CLIP's.

    Raises BadInput where none is found or it has more tokens than the text encoder: diffusers opens no folder without.
    """
    tokens = text_encoder["text_model.embeddings.token_embedding.weight"].shape[0]
    found = find_vocabulary(path, checkpoint.path)
    vocabulary = read_vocabulary(found)
    if len(vocabulary.tokens) > tokens:
        raise BadInput(
            f"{found}: a tokenizer of {len(vocabulary.tokens):,} tokens, the text encoder has {tokens:,}; "
            "give the model's own (--tokenizer)"
        )
    if (found / "merges.txt").is_file():
        files = {file.name: file.read_bytes() for file in sorted(found.iterdir()) if file.suffix in (".json", ".txt")}
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": vocabulary.pad or END}
        return {"special_tokens_map.json": json.dumps(special, indent=2).encode()} | files
    pad = "!" if spec.open_clip and vocabulary.pad is None else None
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer(vocabulary, clip.max_length(text_encoder), pad=pad).save(folder)
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def _unread_facts(format: Format, spec: ModelSpec) -> list[str]:
    """Return a phrase for each fact that only latentsmith reads back, so that other programs generate otherwise."""
    null_text = ["zeros as the null text (they take the empty prompt)"] if spec.null_text == "zero" else []
    return null_text + format.loses(spec)


def _lost_facts(format: Format, spec: ModelSpec, checkpoint: Checkpoint) -> list[str]:
    """Return a phrase for each fact of a diffusers folder that the format written has no place for."""
    lost, scheduler, own = [], scheduler_class(checkpoint), own_vocabulary(checkpoint.path)
    if scheduler not in (None, "PNDMScheduler", "DDIMScheduler"):
        lost.append(f"the source's scheduler, {scheduler}, which is not written")
    if own and spec.open_clip and not format.needs_tokenizer and (pad := read_vocabulary(own).pad or END) != "!":
        lost.append(f"the pad token {pad} (they pad with !)")
    return lost


def _summary(format: Format, parts: Mapping[str, Mapping[str, LazyTensor]], dst: Path, spec: ModelSpec) -> str:
    """Return one line that says what was written."""
    tensors = [tensor for part in parts.values() for tensor in part.values()]
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
    files = [dst] if dst.is_file() else [file for file in dst.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    return (
        f"{dst}: {format.title}, {sum(tensor.numel for tensor in tensors):,} parameters, "
        f"{' and '.join(sorted(dtypes))}, {spec.prediction_type}, {size / 2**20:,.1f} MiB"
    )
