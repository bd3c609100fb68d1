"""Preset or YAML file + overrides + defaults -> one checked tree. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from latentsmith.config import checks, overrides, schema, targets
from latentsmith.files.errors import BadInput

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
    else:
        _derive(values, given)
        checks.check(values)
    given_by = {key: origins[key] for key in given if key in origins}
    return Composed(OmegaConf.create(values), given_by, _notes(given), draws)


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
    if path in inside or not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise BadInput(f"{path.name}: defaults must be a list of presets or YAML files, none of them above itself")
    own = bases.index("_self_") if "_self_" in bases else len(bases)
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for base in [*bases[:own], None, *bases[own + 1 :]]:
        part, source = (tree, dict.fromkeys(overrides.leaves(tree), path.name))
        if base is not None:
            beside = [path.parent / base, path.parent / f"{base}.yaml"]
            found = next((file.resolve() for file in beside if file.is_file()), None)
            part, source = read(found or find_file(base), (*inside, path))
        overrides.merge(merged, part)
        origins |= source
    return merged, origins


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        plain: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
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
        plain["model"] = {str(key): targets.flatten(value) for key, value in model.items()}
    return plain


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
            if value in targets.NO_COMPONENT:
                raise BadInput(f"{source}: {key}={value} is refused: {targets.NO_COMPONENT[value]}")
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
        parent[leaf] = targets.canonical(parent[leaf], key)
    unet, text, data = model["unet_config"], model["cond_stage_config"], model["data"]
    if unet["num_heads"] == unet["num_head_channels"] == -1:
        unet["num_heads"] = 8
    if text["arch"] is None and text["width"] is None:
        text["arch"] = {768: "ViT-L-14", 1024: "ViT-H-14"}.get(unet["context_dim"])
    if model["base_learning_rate"] is not None and given.get("model.optim.lr") is None:
        model["optim"]["lr"] = model["base_learning_rate"]
    elif given.get("model.optim.lr", 0) is None:
        model["optim"]["lr"] = NEMO_LR
    manager = values["exp_manager"]
    manager["resume_from_checkpoint"] = manager["resume_from_checkpoint"] or model["resume_from_checkpoint"]
    model["ckpt_path"] = model["ckpt_path"] or model.get("restore_from_path")
    if model["scale_by_std"]:
        model["scale_factor"] = "measured"
    data["train"].setdefault("augmentations", {})
    if model["cond_stage_trainable"]:
        text["freeze"] = False


def _notes(given: dict[str, Any]) -> list[str]:
    found = (schema.find(key) for key, value in given.items() if value is not None)
    idle = {option.key: option.reason for option in found if option and option.fate == "no effect"}
    return [f"{key} has no effect here: {reason}" for key, reason in idle.items()]
