"""Open any supported checkpoint and sort what it holds into parts, reading headers only."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from latentsmith.architectures import COMPONENTS
from latentsmith.diffusion.schedule import NoiseSchedule
from latentsmith.files.errors import BadInput
from latentsmith.files.hub import local_or_hub
from latentsmith.files.lazy import LazyTensor
from latentsmith.files.tensors import TensorFile

from . import clip, ldm
from .base import BETAS_KEY, SCALE_FACTOR_KEY, Checkpoint, Contents, Part, some
from .formats import FORMATS, classify_key

MOST_BETAS = 100_000
FOREIGN = {  # what only the keys of a model that is not supported match -> what the file is
    r"\.lora[._](A|B|up|down|linear_layer)|^lora_|\.lora_(A|B|up|down|magnitude)|_lora\.|\.hada_w|\.lokr_w|\.base_layer\.":
        "a LoRA, or weights with one left in them: give that with --lora beside its model, or merge it",
    r"\.scale_(weight|input)$|^scaled_fp8$|\.weight_scale$":
        "weights in scaled fp8, which are not supported: take those in half precision",
    r"^controlnet_|controlnet_cond_embedding|^input_hint_block|^zero_convs": "a ControlNet, which is not supported",
    r"^conditioner\.embedders\.|label_emb\.0\.|add_embedding\.": "an SDXL model, which is not supported",
    r"joint_blocks\.|(^|\.)x_embedder|context_embedder|double_blocks\.|^single_transformer_blocks\.":
        "a diffusion transformer (SD3, FLUX), which is not supported",
    r"^emb_params$|^string_to_param|^clip_[lg]$":
        "a textual inversion embedding: give it with --embedding beside its model",
}  # fmt: skip


def open_checkpoint(path: str | Path, weights: str = "ema") -> Checkpoint:
    """Open a file or folder of any supported format, or a hub name ("owner/name") of one.

    weights: "ema" takes the moving average of the U-Net where the checkpoint stores one, "raw" the training weights;
    where only one set exists, it is that one. Raises BadInput for unreadable files and those without a known key.
    """
    path = local_or_hub(path, weights)
    if weights not in ("ema", "raw"):
        raise BadInput(f'weights={weights!r}: must be "ema" or "raw"')
    opened = (format.open(path, weights) for format in FORMATS.values() if format.open)
    contents = next(found for found in opened if found)
    if None in contents.files:
        return _classified(path, contents.files[None], weights, contents)
    return _merged(path, contents, weights)


def _refuse_foreign(path: Path, keys: Iterable[str]) -> None:
    """Raise BadInput, with what the file is, for weights of a model that is not supported."""
    keys = list(keys)
    alone = all(key.startswith("control_model.") for key in keys)  # beside a U-Net it is left unread
    for key in keys:
        key = key.removeprefix("control_model.") if alone else key
        for pattern, title in FOREIGN.items():
            if re.search(pattern, key):
                raise BadInput(f"{path}: {title} ({key})")


def _merged(folder: Path, contents: Contents, weights: str) -> Checkpoint:
    """Return the checkpoint of a folder with a file for each part."""
    opened = {part: _classified(file.path, file, weights) for part, file in contents.files.items() if part}
    for part, checkpoint in opened.items():
        if part not in checkpoint.parts:
            held = some(checkpoint.parts) or "no known part"
            raise BadInput(f"{checkpoint.path}: should hold the {part}, but its keys are of {held}")
    every = list(opened.values())
    return Checkpoint(
        folder,
        str(contents.format),
        {part: checkpoint.parts[part] for part, checkpoint in opened.items()},
        tuple(key for checkpoint in every for key in checkpoint.ignored),
        metadata={key: value for checkpoint in every for key, value in checkpoint.metadata.items()},
        config=contents.config,
        unknown=tuple(key for checkpoint in every for key in checkpoint.unknown),
        files=tuple(dict.fromkeys(file for checkpoint in every for file in checkpoint.files)),
    )


def _classified(path: Path, file: TensorFile, weights: str, contents: Contents | None = None) -> Checkpoint:
    """Return the checkpoint of one file, every key of it in exactly one class."""
    _refuse_foreign(path, file.entries)
    entries: dict[str, dict[str, LazyTensor]] = {}
    keys: dict[str, dict[str, str]] = {}
    for key, entry in file.entries.items():
        cls, rest = classify_key(key)
        rest = clip.normalise(rest) if cls == "text_encoder" else rest
        if rest in entries.setdefault(cls, {}):
            raise BadInput(f"{path}: {key} and {keys[cls][rest]} are the same tensor twice; delete one")
        entries[cls][rest] = entry
        keys.setdefault(cls, {})[rest] = key
    unknown = tuple(keys.get("unknown", {}).values())
    if unknown and entries.keys() <= {"unknown", "other", "schedule"}:
        raise BadInput(f"{path}: {len(unknown)} keys of no known format ({some(unknown)})")
    # "ema-only" files carry just decay and num_updates; the averages of a VAE alone are its own.
    has_ema = len(entries.get("ema", {})) > 2 and ("unet" in entries or "vae" not in entries)
    if has_ema and "unet" not in entries:  # the averages alone are the weights
        twins = keys.pop("ema")
        entries["unet"] = ldm.averaged_unet(path, entries["ema"], {})
        keys["unet"] = {key: twins[ldm.ema_key(key)] for key in entries["unet"]}
        has_ema = False
    elif has_ema and weights == "ema":
        entries["unet"] = ldm.averaged_unet(path, entries["ema"], entries["unet"])
    extras = {**file.extras, **_buffers(path, entries.get("schedule", {}))}
    parts = {part: Part(part, path, entries[part], keys[part]) for part in COMPONENTS if part in entries}
    return Checkpoint(
        path,
        (contents and contents.format) or _format_of_keys(file, len(parts)),
        parts,
        tuple(key for cls in ("ema", "schedule", "other") for key in keys.get(cls, {}).values()),
        file.metadata,
        extras,
        (contents and contents.config) or _stored_config(file),
        has_ema,
        unknown,
        file.files or (file.path,),
    )


def _buffers(path: Path, entries: Mapping[str, LazyTensor]) -> dict[str, Any]:
    """Return the numbers in a file's buffers that say how its model is run: its scale, and unusual betas."""
    found: dict[str, Any] = {}
    if (scale := entries.get("scale_factor")) is not None:
        if scale.numel != 1:
            raise BadInput(f"{path}: its tensor scale_factor holds {scale.numel} numbers; one was expected")
        found[SCALE_FACTOR_KEY] = float(scale.read())
    if (betas := entries.get("betas")) is not None and len(betas.shape) == 1 and betas.shape[0] <= MOST_BETAS:
        stored, usual = betas.read().double(), NoiseSchedule.from_config().betas
        # Half precision moves a beta by up to 0.4 %.
        if stored.shape != usual.shape or not torch.allclose(stored, usual, rtol=0.01, atol=0):
            found[BETAS_KEY] = stored.tolist()
    return found


def _format_of_keys(file: TensorFile, parts: int) -> str:
    """Return the name of a single file's format: by the first of its keys that only one format has."""
    for format in FORMATS.values():
        if format.whole_keys and any(re.match(format.whole_keys, key) for key in file.entries):
            return format.name
    return "ldm" if parts > 1 else "component"


def _stored_config(file: TensorFile) -> Mapping[str, Any]:
    """Return the model config that Lightning keeps in `hyper_parameters`, NeMo's as an OmegaConf object."""
    parameters = _plain(file.extras.get("hyper_parameters"))
    config = parameters.get("cfg", parameters) if isinstance(parameters, dict) else {}
    return config if isinstance(config, dict) else {}


def _plain(value: Any) -> Any:
    """Return pickled OmegaConf placeholders as the plain data in their states; other placeholders as None."""
    state = getattr(value, "state", value)
    if isinstance(state, dict) and ("_content" in state or "_val" in state):
        return _plain(state["_content"] if "_content" in state else state["_val"])
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool) else None
