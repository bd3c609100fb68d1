"""What defines a run: recorded in its folder at the start, compared whenever the run is resumed.

`identity.json` holds every option of the config, and fingerprints of what options only name: frozen networks,
tokenizer, data set, the weights that the run began with. A difference that would make another run of it is refused;
what may change is reported. Folders without the file are compared by their config.yaml and frozen networks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from latentsmith.architectures import COMPONENTS
from latentsmith.config import Config, schema, to_tree
from latentsmith.config.overrides import leaves
from latentsmith.config.read_yaml import read_yaml
from latentsmith.data.buckets import BucketOrder
from latentsmith.data.dataset import TrainingSet
from latentsmith.files.atomic import write_text
from latentsmith.files.errors import BadInput
from latentsmith.files.hashing import fingerprint_tensors
from latentsmith.files.json import read_json
from latentsmith.files.tensors import open_tensors
from latentsmith.text.tokenizer import Tokenizer

IDENTITY_FILE = "identity.json"
MAY_CHANGE = (  # options, and sections of them; all others of the model define the run
    "name",
    "trainer",
    "exp_manager",
    "model.micro_batch_size",
    "model.global_batch_size",
    "model.optim",
    "model.inductor",
    "model.inductor_cudagraphs",
    "model.channels_last",
    "model.save_frozen",
    "model.unet_config.use_checkpoint",
    "model.unet_config.use_flash_attention",
    "model.unet_config.upcast_attention",
    "model.unet_config.from_NeMo",
    "model.data.num_workers",
    "model.data.validation",
    "model.data.cache",
    "model.data.remote",
    "model.data.accept_unfingerprinted",
)
DATA = ("model.data", "model.first_stage_key", "model.cond_stage_key", "model.image_size")  # may change on request
UNREPORTED = ("name", "exp_manager.exp_dir", "exp_manager.name", "exp_manager.resume_if_exists",
              "exp_manager.resume_ignore_no_checkpoint", "exp_manager.resume_from_checkpoint",
              "exp_manager.allow_data_change")  # fmt: skip
NAMED = 4  # differences that a message names

Content = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Identity:
    """What a run is. options: every option by key. content: fingerprints, None where there is nothing to name.

    has_content: whether the content was recorded when the run began.
    """

    options: Mapping[str, Any]
    content: Mapping[str, Any]
    has_content: bool = True

    def write(self, folder: Path) -> None:
        record = {"format": "latentsmith-run-1", "options": self.options, "content": self.content}
        write_text(folder / IDENTITY_FILE, json.dumps(record, indent=1) + "\n")


@dataclass
class Changes:
    """Differences between what a run is and what it is asked to be, as text: "KEY=OLD (now NEW)"."""

    defining: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    allowed: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # other paths, of what was not recorded


def options_of(config: Config) -> dict[str, Any]:
    """Return every option of a config by its key, as JSON has it."""
    options: dict[str, Any] = json.loads(json.dumps(leaves(to_tree(config))))
    return options


def read_identity(folder: Path) -> Identity | None:
    """Return what defines the run in a folder; None for a folder without a run."""
    if (folder / IDENTITY_FILE).is_file():
        record = read_json(folder / IDENTITY_FILE, "the record of a run")
        options, content = record.get("options"), record.get("content")
        if not isinstance(options, dict) or not isinstance(content, dict):
            raise BadInput(f"{folder / IDENTITY_FILE}: not the record of a run; delete it to go by config.yaml")
        return Identity(options, content)
    if not (folder / "config.yaml").is_file():
        return None
    options = json.loads(json.dumps(leaves(read_yaml(folder / "config.yaml"))))
    files = {part: folder / f"{part}.safetensors" for part in COMPONENTS}
    content = {
        part: fingerprint_tensors({f"{part}.{name}": value for name, value in open_tensors(file).items()})
        for part, file in files.items()
        if file.is_file()
    }
    return Identity(options, content, has_content=False)


def content_of(
    networks: Mapping[str, nn.Module],
    trained: tuple[str, ...],
    tokenizer: Tokenizer | None,
    samples: TrainingSet,
    global_batch: int,
) -> Content:
    """Return functions that return what defines a run beside its options.

    networks: as the run begins, with those that are trained. global_batch: samples of a step.
    """
    frozen = {name: network for name, network in networks.items() if name not in trained}
    return {
        **{name: partial(_fingerprint, {name: network}) for name, network in frozen.items()},
        "init": partial(_fingerprint, {name: networks[name] for name in trained}),
        "base": partial(_fingerprint_base, networks, trained),
        "tokenizer": lambda: tokenizer.fingerprint() if tokenizer else None,
        "data": samples.fingerprint,
        "global_batch": lambda: global_batch,
        "ordered_by_batch": lambda: isinstance(samples.order, BucketOrder),
    }


def _fingerprint(networks: Mapping[str, nn.Module]) -> str:
    return fingerprint_tensors(nn.ModuleDict(networks).state_dict())


def _fingerprint_base(networks: Mapping[str, nn.Module], trained: tuple[str, ...]) -> str | None:
    """Return what adapters are trained beside: the frozen weights of trained networks; None where all are trained."""
    frozen = {
        f"{part}.{name}": parameter
        for part in trained
        for name, parameter in networks[part].named_parameters()
        if not parameter.requires_grad
    }
    return fingerprint_tensors(frozen) if frozen else None


def identity_of(config: Config, trained: tuple[str, ...], content: Content, before: Identity | None) -> Identity:
    """Return what defines a run that is to start or resume.

    content: functions that return fingerprints. That of the weights to begin with is not computed where the options
    name the same as `before`: a run that has begun no longer reads them.
    """
    options = options_of(config)
    same_start = before is not None and all(
        before.options.get(key) == options.get(key) for key in keys_of(trained)["init"]
    )
    known = {"init": before.content.get("init")} if before is not None and same_start else {}
    if all(options.get(key) is None for key in keys_of(trained)["init"]):
        known["init"] = None
    return Identity(options, {name: known[name] if name in known else of() for name, of in content.items()})


def keys_of(trained: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the options that name each content, whose text may differ where the content is the same."""
    weights = {part: f"model.{component.config_key}.from_pretrained" for part, component in COMPONENTS.items()}
    keys = {part: [key] for part, key in weights.items() if part not in trained}
    if "text_encoder" in keys:
        keys["text_encoder"].append("model.cond_stage_config.version")
    return keys | {
        "init": ["model.ckpt_path", *(weights[part] for part in trained), "model.peft.restore_from_path"],
        "base": ["model.ckpt_path", *(weights[part] for part in trained)],
        "tokenizer": ["model.cond_stage_config.tokenizer"],
        "data": ["model.data.train.dataset_path", "model.data.webdataset.local_root_path"],
    }


def changes_between(before: Identity, now: Identity, trained: tuple[str, ...]) -> Changes:
    """Return how two identities differ."""
    found, keys = Changes(), keys_of(trained)
    named = {key for names in keys.values() for key in names}
    for key in schema.table():
        old, new = _value(before, key), _value(now, key)
        if old != new and key not in named:
            _list_of(found, key).append(f"{key}={_short(old)} (now {_short(new)})")
    for name, options in keys.items():
        if name in now.content:
            _compare_content(found, name, options, before, now)
    _compare_batch(found, before, now)
    return found


def _list_of(found: Changes, key: str) -> list[str]:
    """Return the list for a difference of an option."""
    if _within(key, MAY_CHANGE):
        return [] if _within(key, UNREPORTED) else found.allowed
    return found.data if _within(key, DATA) else found.defining


def _compare_content(found: Changes, name: str, keys: list[str], before: Identity, now: Identity) -> None:
    texts = [(key, _value(before, key), _value(now, key)) for key in keys]
    changed = [f"{key}={_short(old)} (now {_short(new)})" for key, old, new in texts if old != new]
    old, new = before.content.get(name), now.content[name]
    if name not in before.content and not before.has_content:
        (found.data if name == "data" else found.unknown).extend(changed)
    elif old != new and (name == "init" or None not in (old, new)):
        same = next((f"{key}={_short(text)}" for key, text, _ in texts if text is not None), name)
        target = found.data if name == "data" else found.defining
        target.extend(changed or [f"{same} (now with other content)"])


def _compare_batch(found: Changes, before: Identity, now: Identity) -> None:
    """Compare the samples of a step, which decide the order of a set with aspect buckets or filterings."""
    old, new = before.content.get("global_batch"), now.content.get("global_batch")
    if None in (old, new) or old == new:
        return
    if now.content.get("ordered_by_batch"):
        found.defining.append(
            f"samples of a step, by which aspect buckets and filterings are ordered, {old} (now {new})"
        )
    else:
        found.allowed.append(f"samples of a step: {old} (now {new})")


def check_identity(
    folder: Path, before: Identity, now: Identity, trained: tuple[str, ...], allow_data: bool
) -> list[str]:
    """Return lines on what changes in a run that is resumed. Raises BadInput, one line, for what would make it another.

    allow_data: whether the data may be others.
    """
    found = changes_between(before, now, trained)
    if found.defining:
        raise BadInput(
            f"{folder}: this run has {_listed(found.defining)}; set it back, or name a new run (exp_manager.name), "
            f"which may start from these weights with --init {folder}"
        )
    if found.data and not allow_data:
        raise BadInput(
            f"{folder}: this run's data have {_listed(found.data)}; set it back, or set "
            "exp_manager.allow_data_change=true to resume with other data"
        )
    lines = [f"{folder}: resumes with {_listed([*found.data, *found.allowed])}"] if found.data + found.allowed else []
    if not before.has_content and now.content:
        also = f"; taken as the same: {_listed(found.unknown)}" if found.unknown else ""
        lines.append(f"{folder}: has no {IDENTITY_FILE}, so it was compared by config.yaml and its networks{also}")
    return lines


def branch_lines(source: Path, before: Identity, now: Identity, trained: tuple[str, ...]) -> list[str]:
    """Return lines on how a run that begins at a checkpoint of another run differs from that run."""
    found = changes_between(before, now, trained)
    every = [*found.defining, *found.data, *found.allowed, *found.unknown]
    return [f"begins at a checkpoint of {source}, which has {_listed(every)}"] if every else []


def _value(identity: Identity, key: str) -> Any:
    """Return an option, at its default where the config is older than the option."""
    option = schema.table().get(key)
    default = json.loads(json.dumps(option.default)) if option and option.filled else None
    return identity.options.get(key, default)


def _within(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _listed(changes: list[str]) -> str:
    more = f" and {len(changes) - NAMED} more" if len(changes) > NAMED else ""
    return ", ".join(changes[:NAMED]) + more
