"""Open any supported checkpoint and sort what it holds into parts, reading headers only."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentsmith.files.archives import is_archive, open_nemo
from latentsmith.files.atomic import INCOMPLETE
from latentsmith.files.errors import BadInput
from latentsmith.files.hub import local_or_hub
from latentsmith.files.pickles import LazyTensor
from latentsmith.files.regular import JSON, read_regular
from latentsmith.files.tensors import TensorFile, open_tensors

from . import clip
from .classify_keys import PARTS, bucket, ema_key

OWN_SECTION = "latentsmith"  # of a NeMo model config: what NeMo has no key for
OWN_FILES = {"unet": "unet.safetensors", "vae": "vae.safetensors", "text_encoder": "text_encoder.safetensors"}
WEIGHTS_FILE = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model|pytorch_model|open_clip_model|open_clip_pytorch_model|model_weights)"
    r"(\.(?P<variant>\w+))??\.(?P<type>safetensors|bin|ckpt)(\.index(\.(?P<index_variant>\w+))?\.json)?"
)


@dataclass(frozen=True)
class Part:
    """One component as stored. entries: keys without prefixes and wrappers. keys: those -> the file's own."""

    name: str
    path: Path
    entries: dict[str, LazyTensor]
    keys: dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """What a path holds.

    kind: "ldm", "nemo", "diffusers", "run" (a folder of ours) or "component". metadata: safetensors headers. extras:
    what a pickle held beside tensors. config: the model config that a NeMo file carries. unknown: keys that no rule
    knows, with which nothing is loaded. files: those that were opened (an unpacked .nemo: its folder).
    """

    path: Path
    kind: str
    parts: dict[str, Part]
    ignored: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    has_ema: bool = False
    unknown: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()


def open_checkpoint(path: str | Path, weights: str = "ema") -> Checkpoint:
    """Open a file or folder of any supported format, or a hub name ("owner/name") of one.

    weights: "ema" takes the moving average of the U-Net where the checkpoint stores one, "raw" the training weights;
    where only one set exists, it is that one. Raises BadInput for unreadable files and those without a known key.
    """
    path = local_or_hub(path, weights)
    if weights not in ("ema", "raw"):
        raise BadInput(f'weights={weights!r}: must be "ema" or "raw"')
    if path.is_dir():
        return _open_folder(path, weights)
    if path.is_file() and is_archive(path):
        file, config = open_nemo(path)
        return _sort(path, file, weights, kind="nemo", config=config)
    return _sort(path, open_tensors(path), weights)


def _open_folder(folder: Path, weights: str) -> Checkpoint:
    if (folder / "model_config.yaml").is_file():
        file, config = open_nemo(folder)
        return _sort(folder, file, weights, kind="nemo", config=config)
    if own := own_folder(folder, weights):
        return _merge(folder, "run", {part: _sort(file, open_tensors(file), weights) for part, file in own.items()})
    components = {part: folder / part for part in PARTS if (folder / part).is_dir()}
    if components:
        opened = {part: _sort(at, _open_component(at, weights), weights) for part, at in components.items()}
        return _merge(folder, "diffusers", opened)
    return _sort(folder, _open_component(folder, weights), weights)


def own_folder(folder: Path, weights: str) -> dict[str, Path]:
    """Part -> file, for a checkpoint folder of ours or a run folder (whose newest checkpoint counts); {} for any other.

    Averages lie in the checkpoint's `ema/`. Frozen parts are stored once per run, in the run folder itself.
    """
    steps = [at for at in (folder / "checkpoints").glob("*") if not at.name.endswith(INCOMPLETE) and _holds_own(at)]
    if steps:
        places = [max(steps, key=_step), folder]
    elif _holds_own(folder):
        places = [folder, folder.parent.parent] if folder.parent.name == "checkpoints" else [folder]
    else:
        return {}
    names = ("ema/{}", "{}") if weights == "ema" else ("{}",)
    files = {part: [at / name.format(file) for at in places for name in names] for part, file in OWN_FILES.items()}
    found = {part: next((file for file in candidates if file.is_file()), None) for part, candidates in files.items()}
    return {part: file for part, file in found.items() if file}


def _holds_own(folder: Path) -> bool:
    return any((folder / file).is_file() for file in OWN_FILES.values())


def _step(folder: Path) -> tuple[int, str]:
    numbers = re.findall(r"\d+", folder.name)
    return (int(numbers[-1]) if numbers else -1, folder.name)


def _open_component(folder: Path, weights: str) -> TensorFile:
    matches = [(match, file) for file in sorted(folder.iterdir()) if (match := WEIGHTS_FILE.fullmatch(file.name))]
    wanted = (["non_ema"] if weights == "raw" else []) + [None, "ema", "fp16", "bf16", "non_ema"]

    def rank(item: tuple[re.Match, Path]) -> tuple[int, bool, str]:
        variant = item[0]["variant"] or item[0]["index_variant"]
        return (
            wanted.index(variant) if variant in wanted else len(wanted),
            item[0]["type"] != "safetensors",
            item[1].name,
        )

    if not matches:
        raise BadInput(
            f"{folder}: holds no weights (diffusion_pytorch_model.safetensors, model.safetensors, *.bin, ...)"
        )
    return open_tensors(min(matches, key=rank)[1])


def _merge(folder: Path, kind: str, opened: Mapping[str, Checkpoint]) -> Checkpoint:
    for name, checkpoint in opened.items():
        if name not in checkpoint.parts:
            held = _list(checkpoint.parts) or "nothing known"
            raise BadInput(f"{checkpoint.path}: should hold the {name}, but its keys are of {held}")
    return Checkpoint(
        folder,
        kind,
        {name: checkpoint.parts[name] for name, checkpoint in opened.items()},
        tuple(key for checkpoint in opened.values() for key in checkpoint.ignored),
        metadata={key: value for checkpoint in opened.values() for key, value in checkpoint.metadata.items()},
        unknown=tuple(key for checkpoint in opened.values() for key in checkpoint.unknown),
        files=tuple(dict.fromkeys(file for checkpoint in opened.values() for file in checkpoint.files)),
    )


def _sort(
    path: Path, file: TensorFile, weights: str, kind: str | None = None, config: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Put every key of one file into its bucket."""
    entries: dict[str, dict[str, LazyTensor]] = {}
    keys: dict[str, dict[str, str]] = {}
    for key, entry in file.entries.items():
        name, rest = bucket(key)
        rest = clip.normalise(rest) if name == "text_encoder" else rest
        if rest in entries.setdefault(name, {}):
            raise BadInput(f"{path}: {key} and {keys[name][rest]} are the same tensor twice; delete one")
        entries[name][rest] = entry
        keys.setdefault(name, {})[rest] = key
    unknown = tuple(keys.get("unknown", {}).values())
    if unknown and entries.keys() <= {"unknown", "other", "schedule"}:
        raise BadInput(f"{path}: {len(unknown)} keys of no known format ({_list(unknown)})")
    has_ema = len(entries.get("ema", {})) > 2  # "ema-only" files carry just decay and num_updates
    if has_ema and weights == "ema":
        entries["unet"] = _averaged(path, entries)
    parts = {name: Part(name, path, entries[name], keys[name]) for name in PARTS if name in entries}
    ignored = tuple(key for name in ("ema", "schedule", "other") for key in keys.get(name, {}).values())
    whole = len(parts) > 1 or any(
        key.startswith(("model.", "first_stage_model.", "cond_stage_model.")) for key in file.entries
    )
    kind = kind or ("nemo" if _is_nemo(file) else "ldm" if whole else "component")
    config = config or _stored_config(file)
    files = file.files or (file.path,)
    return Checkpoint(path, kind, parts, ignored, file.metadata, file.extras, config, has_ema, unknown, files)


def _averaged(path: Path, entries: Mapping[str, dict[str, LazyTensor]]) -> dict[str, LazyTensor]:
    average, raw = entries["ema"], entries.get("unet", {})
    twins = {key: ema_key(key) for key in raw}
    if missing := [key for key, twin in twins.items() if twin not in average]:
        raise BadInput(
            f"{path}: no moving average of {len(missing)} U-Net tensors ({_list(missing)}); take its raw weights"
        )
    if extra := sorted(set(average) - set(twins.values()) - {"decay", "num_updates"}):
        raise BadInput(f"{path}: moving averages of no known tensor ({_list(extra)}); take its raw weights")
    return {key: average[twin] for key, twin in twins.items()}


def _is_nemo(file: TensorFile) -> bool:
    return any(
        key.startswith(("model.model.", "model.first_stage_model.", "model._orig_mod.", "model.module."))
        for key in file.entries
    )


def _stored_config(file: TensorFile) -> Mapping[str, Any]:
    """The model config Lightning keeps in `hyper_parameters`, if it is plain data (NeMo's is an OmegaConf object)."""
    parameters = plain(file.extras.get("hyper_parameters"))
    config = parameters.get("cfg", parameters) if isinstance(parameters, dict) else {}
    return config if isinstance(config, dict) else {}


def plain(value: Any) -> Any:
    """Pickled OmegaConf placeholders as the plain data in their states; other placeholders as None."""
    state = getattr(value, "state", value)
    if isinstance(state, dict) and "_content" in state:
        return plain(state["_content"])
    if isinstance(state, dict) and "_val" in state:
        return plain(state["_val"])
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool) else None


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object of a diffusers folder; {} if the file is absent."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_regular(path, JSON))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: is not JSON ({str(error)[:80]})") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: holds a {type(value).__name__}, a JSON object was expected")
    return value


def _list(names: Any, count: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
