"""Preset or YAML file + overrides + defaults -> one checked tree. Nothing heavy is imported."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from latentsmith.files.errors import BadInput
from latentsmith.files.regular import CONFIG, read_regular

from . import checks, class_registry, overrides, schema

PRESETS = Path(__file__).parent / "presets"
NEMO_LR = 1e-3  # what its optimizers take where a file says `lr: null`
DRAWING = {"infer", "fid"}  # sections of a file that draws
DRAWS_WITH = ("infer.", "fid.", "trainer.", "model.restore_from_path", "model.precision", "model.hparams_file",
              "model.peft", "model.unet_config.from_pretrained")  # fmt: skip
NODES = (
    "model.unet_config",
    "model.first_stage_config",
    "model.first_stage_config.lossconfig",
    "model.cond_stage_config",
)


@dataclass(frozen=True)
class Composed:
    """config: every option with its value. origins: key -> the file or "command line" that gave it; else a default.

    notes: one line for each given key that has no effect here, with the reason. draws: whether it is an inference
    file, which holds what is given and nothing more.
    """

    config: DictConfig
    origins: dict[str, str]
    notes: list[str]
    draws: bool = False


def load_config(name_or_path: str | Path, overrides: Iterable[str] = ()) -> DictConfig:
    """The resolved config of a preset ("sd1") or YAML file, after `overrides` ("model.optim.lr=1e-5", Hydra's grammar).

    Every option is there, with its default where nothing gave it. Raises BadInput, one line, for an unknown key, a
    wrong type or value, a missing mandatory value (???), an interpolation of nothing, or options that contradict.
    """
    composed = compose(name_or_path, overrides)
    if composed.draws:
        raise BadInput(f"{name_or_path}: is an inference file; draw with it: latentsmith generate --config FILE")
    return composed.config


def compose(name_or_path: str | Path, changes: Iterable[str] = ()) -> Composed:
    """As `load_config`, and where each value came from."""
    tree, origins = read(find_file(name_or_path).resolve())
    for change in changes:
        origins |= dict.fromkeys(overrides.apply(tree, change), overrides.PLACE)
    _copy_nodes(tree, origins)
    given = overrides.leaves(tree)
    _refuse_unknown(given, origins)
    draws = not DRAWING.isdisjoint(tree)
    values = _read_values(_resolve(_without_unset(tree) if draws else _fill(tree), str(name_or_path)), origins)
    if draws:
        _refuse_training(given, str(name_or_path))
        checks.check_drawing(values)
    else:
        _derive(values, given)
        checks.check(values)
    given_by = {key: origins[key] for key in given if key in origins}
    return Composed(OmegaConf.create(values), given_by, _notes(given, values, draws), draws)


def say_notes(config: str, composed: Composed) -> None:
    """Name the options that have no effect here on stderr, in one line."""
    if composed.notes:
        keys = ", ".join(note.split()[0] for note in composed.notes)
        print(f"{config}: without effect here (`latentsmith config validate` says why): {keys}", file=sys.stderr)


def presets() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def find_file(name_or_path: str | Path) -> Path:
    """The YAML file of a preset's name or a path. Raises BadInput where there is neither."""
    preset = PRESETS / f"{name_or_path}.yaml"
    if str(name_or_path) in presets():
        return preset
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    raise BadInput(f"{name_or_path}: neither a config file nor a preset ({', '.join(presets())})")


def read(path: Path, inside: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """The tree of a YAML file over those in its `defaults:` list, and which file gave each key."""
    tree = _read_yaml(path)
    bases = tree.pop("defaults", [])
    if path in inside:
        raise BadInput(f"{path.name}: stands in its own defaults; take it out of {inside[-1].name}")
    if not isinstance(bases, list):
        raise BadInput(f"{path.name}: defaults must be a list of presets or YAML files, not {bases!r}")
    own = bases.index("_self_") if "_self_" in bases else len(bases)
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for base in [*bases[:own], None, *bases[own + 1 :]]:
        part, source = (tree, dict.fromkeys(overrides.leaves(tree), path.name))
        if base is not None:
            part, source = _read_base(path, base, (*inside, path))
        overrides.merge(merged, part)
        origins |= source
    return merged, origins


def _read_base(path: Path, base: Any, inside: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """What an entry of a defaults list stands for: "preset", "file", {"optim": "adam"} (optim/adam.yaml as the node
    `optim`), each after "optional" if it may be missing."""
    group, name = next(iter(base.items())) if isinstance(base, dict) and len(base) == 1 else ("", base)
    words = str(group or name).split()
    optional = len(words) == 2 and words[0] == "optional"
    if not isinstance(name, str) or len(words) != 1 + optional:
        raise BadInput(f"{path.name}: {base!r} in defaults is neither a preset, a YAML file nor GROUP: FILE")
    node, name = (words[-1], name) if group else ("", words[-1])
    file = f"{node}/{name}" if node else name
    found = next((one.resolve() for one in (path.parent / file, path.parent / f"{file}.yaml") if one.is_file()), None)
    if found is None and (optional or node):
        if optional:
            return {}, {}
        raise BadInput(f"{path.name}: {base!r} in defaults: there is no {path.parent / file}.yaml")
    part, source = read(found or find_file(name), inside)
    for key in reversed(node.split("/") if node else []):
        part, source = {key: part}, {f"{key}.{inner}": where for inner, where in source.items()}
    return part, source


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = io.StringIO(read_regular(path, CONFIG).decode("utf-8-sig"))
        plain: Any = OmegaConf.to_container(OmegaConf.load(text), resolve=False)
        plain = _without_params(plain)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise BadInput(f"{path.name}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(plain, dict):
        raise BadInput(f"{path.name}: a config is a mapping of options, not a {type(plain).__name__}")
    if dotted := [key for key in _keys(plain) if "." in key]:
        raise BadInput(f"{path.name}: {dotted[0]} is one key with a dot in it; write it nested")
    model = plain.get("model")
    if isinstance(model, dict):
        params = model.pop("params", None) or {}  # LDM keeps the model's options one level down
        if not isinstance(params, dict):
            raise BadInput(f"{path.name}: model.params must be a mapping of options, not {params!r}")
        model |= params
        plain["model"] = {str(key): class_registry.flatten(value) for key, value in model.items()}
    return plain


def _without_params(node: Any) -> Any:
    """Interpolations of LDM's nested options (`${model.params.channels}`) without the level that is taken out."""
    if isinstance(node, dict):
        return {key: _without_params(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_without_params(value) for value in node]
    return re.sub(r"(?<=[\w.])\.params(?=\.[\w.]+\})", "", node) if isinstance(node, str) and "${" in node else node


def _keys(tree: Any, prefix: str = "") -> Iterator[str]:
    """Every key of a tree that lies in a place of ours, as it is spelt; free mappings have keys of their own."""
    for name, value in tree.items() if isinstance(tree, dict) else ():
        yield str(name)
        option = schema.find(f"{prefix}{name}")
        if not (option and option.kind.free):
            yield from _keys(value, f"{prefix}{name}.")


def _copy_nodes(tree: dict[str, Any], origins: dict[str, str]) -> None:
    """Put copies in place of interpolations of whole nodes (`augmentations: ${model.data.train.augmentations}`)."""
    groups, whole = schema.groups(), OmegaConf.create(tree)
    for key, value in overrides.leaves(tree).items():
        if key in groups and isinstance(value, str) and value.startswith("${"):
            try:
                node: Any = OmegaConf.select(whole, key, throw_on_missing=True)
                copy: Any = OmegaConf.to_container(node, resolve=False) if isinstance(node, DictConfig) else node
            except OmegaConfBaseException as error:
                reason = str(error).splitlines()[0]
                raise BadInput(f"{origins.get(key, overrides.PLACE)}: {key} cannot be resolved: {reason}") from None
            *path, leaf = key.split(".")
            _get(tree, ".".join(path))[leaf] = copy
            if isinstance(copy, dict):
                origins |= {f"{key}.{name}": origins.get(key, overrides.PLACE) for name in overrides.leaves(copy)}


def _refuse_unknown(given: dict[str, Any], origins: dict[str, str]) -> None:
    for key, value in given.items():
        source = origins.get(key, overrides.PLACE)
        if key in schema.groups():
            if isinstance(value, str) and value in class_registry.NO_COMPONENT:
                raise BadInput(f"{source}: {key}={value} is refused: {class_registry.NO_COMPONENT[value]}")
            if value not in (None, {}):
                raise BadInput(f"{source}: {key} must be a mapping of options, not {value!r}")
        elif schema.find(key) is None:
            raise schema.unknown_key(key, source)


def _refuse_training(given: dict[str, Any], source: str) -> None:
    for key, value in given.items():
        if value is not None and key != "name" and not key.startswith(DRAWS_WITH):
            raise BadInput(f"{source}: {key} has no effect on drawing; its checkpoint decides. Drop it")


def _fill(tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` with every missing option at its default, after the keys that are given (their order can matter)."""
    filled = _without_unset(tree)
    for option in schema.table().values():
        if option.filled:
            *path, leaf = option.key.split(".")
            node = filled
            for name in path:
                node = node.setdefault(name, {})
            node.setdefault(leaf, deepcopy(option.default))
    return filled


def _without_unset(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A copy of `tree` without the nulls that mean "not set"."""
    kept: dict[str, Any] = {}
    for name, value in tree.items():
        option = schema.table().get(f"{prefix}{name}")
        if option is None and isinstance(value, dict):
            kept[name] = _without_unset(value, f"{prefix}{name}.")
        elif value is not None or (option is not None and option.kind.nullable):
            kept[name] = deepcopy(value)
    return kept


def _get(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def asset(name: str) -> str:
    """The path of a file that comes with the package: `${asset:demo/vae.safetensors}` in a config."""
    return str(Path(__file__).with_name("assets") / name)


def _resolve(tree: dict[str, Any], source: str) -> dict[str, Any]:
    OmegaConf.register_new_resolver("asset", asset, replace=True)
    config = OmegaConf.create(tree)
    try:
        if missing := OmegaConf.missing_keys(config):
            raise BadInput(f"{source}: {min(missing)} is mandatory (???): give it as {min(missing)}=VALUE")
        resolved = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{source}: {error.full_key or 'an interpolation'} cannot be resolved: {reason}") from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _read_values(tree: dict[str, Any], origins: dict[str, str], prefix: str = "") -> dict[str, Any]:
    """Every value as its option reads it."""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        option = schema.table().get(key)
        if option is None:
            values[name] = _read_values(value, origins, f"{key}.")
        else:
            values[name] = option.read(value, origins.get(key, "default"))
    return values


def _derive(values: dict[str, Any], given: dict[str, Any]) -> None:
    """Fill in what follows from other options, and what other people's class paths imply."""
    model = values["model"]
    for key in NODES:
        *path, leaf = key.split(".")
        parent = _get(values, ".".join(path))
        parent[leaf] = class_registry.canonical(parent[leaf], key)
    unet, text, data = model["unet_config"], model["cond_stage_config"], model["data"]
    if unet["num_heads"] == unet["num_head_channels"] == -1:
        unet["num_heads"] = 8
    if text["arch"] is None and text["width"] is None:
        text["arch"] = {768: "ViT-L-14", 1024: "ViT-H-14"}.get(unet["context_dim"])
    if model["base_learning_rate"] is not None and given.get("model.optim.lr") is None:
        model["optim"]["lr"] = model["base_learning_rate"]
    elif given.get("model.optim.lr", 0) is None:
        model["optim"]["lr"] = NEMO_LR
    if given.get("model.optim.sched.name") is None and given.get("model.optim.sched.warmup_steps") is None:
        model["optim"]["sched"] |= _ldm_warmup(model.get("scheduler_config"))
    manager = values["exp_manager"]
    manager["resume_from_checkpoint"] = manager["resume_from_checkpoint"] or model["resume_from_checkpoint"]
    model["ckpt_path"] = model["ckpt_path"] or model.get("restore_from_path")
    if model["scale_by_std"]:
        if given.get("model.scale_factor") not in (None, 1, "measured"):
            raise BadInput(
                f"model.scale_by_std=True measures the scale, but model.scale_factor={given['model.scale_factor']} is "
                "given; drop one of them"
            )
        model["scale_factor"] = "measured"
    data["train"].setdefault("augmentations", {})
    if model["cond_stage_trainable"]:
        text["freeze"] = False


def _ldm_warmup(node: dict[str, Any] | None) -> dict[str, Any]:
    """The warm-up of LDM's `LambdaLinearScheduler`, whose rate then stays: model.optim.sched in our words.

    BadInput for one whose rate falls after it, which has another meaning in each cycle.
    """
    node = node or {}
    steps, top, bottom = node.get("warm_up_steps"), node.get("f_max", [1.0]), node.get("f_min", [1.0])
    if not isinstance(steps, list) or not steps or not isinstance(steps[0], int) or steps[0] < 0:
        return {}
    if top != bottom:
        raise BadInput(
            f"model.scheduler_config falls from f_max={top} to f_min={bottom}; say it as model.optim.sched instead "
            "(name=linear, warmup_steps, max_steps, min_lr)"
        )
    return {"name": "WarmupPolicy", "warmup_steps": steps[0]}


def _notes(given: dict[str, Any], values: dict[str, Any], draws: bool) -> list[str]:
    found = [option for key, value in given.items() if value is not None and (option := schema.find(key))]
    idle = {option.key: option.reason for option in found if option.fate == "no effect"}
    if draws:
        trainer = [option.key for option in found if option.key.startswith("trainer.")]
        reason = "generate takes --device, and torchrun or srun shares the pictures"
        idle = dict.fromkeys((key for key in trainer if key != "trainer.precision"), reason) | idle
    elif values["model"]["optim"]["sched"]["name"] == "constant":
        keys = (f"model.optim.sched.{name}" for name in ("warmup_steps", "hold_steps", "min_lr", "max_steps"))
        idle |= {key: "model.optim.sched.name=constant is one rate throughout" for key in keys if given.get(key)}
    return [f"{key} has no effect here: {reason}" for key, reason in idle.items()]
