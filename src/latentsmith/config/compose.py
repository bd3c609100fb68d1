"""Preset or YAML file + overrides + defaults -> one checked config. Nothing heavy is imported.

Hydra parses the overrides: its grammar is what users know. It does not compose: its `compose` needs global state, fails
with several lines, and does not say which file a value came from. A defaults list takes 40 lines here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from latentsmith.architectures import CLIP_BY_WIDTH
from latentsmith.files.errors import BadInput

from . import checks, class_registry, overrides, schema
from .foreign_files import refuse_other_models
from .foreign_keys import NO_COMPONENT
from .inference_options import InferenceConfig
from .interpolation_limits import check_interpolations
from .read_yaml import read_yaml
from .run_options import Config
from .tree import from_tree, to_plain

PRESETS = Path(__file__).parent / "presets"
NEMO_LR = 1e-3  # what its optimizers take where a file says `lr: null`
INFERENCE_SECTIONS = {"infer", "fid"}
INFERENCE_KEYS = ("infer.", "fid.", "trainer.", "model.restore_from_path", "model.precision", "model.hparams_file",
                  "model.peft")  # fmt: skip
COMPONENT_KEYS = (
    "model.unet_config",
    "model.first_stage_config",
    "model.first_stage_config.lossconfig",
    "model.cond_stage_config",
)
NO_EFFECT = " has no effect here: "
UNSCALED_RATE = (
    "model.base_learning_rate is model.optim.lr as it stands; LDM multiplies it by devices, batch size and accumulated "
    "batches unless started with --scale_lr False: give that product as model.optim.lr to train alike"
)
SECRETS = "${oc.env:...} is refused: it would write the environment into config.yaml; give the value as KEY=VALUE"


@dataclass(frozen=True)
class Composed:
    """config: every option with its value; of an inference file, what it gives. origins: key -> the file or "command
    line" that gave it; else a default. notes: one line for each given key that has no effect, or has another meaning
    in LDM, with the reason.
    """

    config: Config | InferenceConfig
    origins: dict[str, str]
    notes: list[str]

    @property
    def is_inference(self) -> bool:
        """Return whether the file is one of NeMo's for generating images."""
        return isinstance(self.config, InferenceConfig)


def load_config(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Return the resolved config of a preset ("sd1") or YAML file.

    overrides: changes to it, such as "model.optim.lr=1e-5", in Hydra's grammar.

    Every option is there, with its default where nothing gave it. Raises BadInput, one line, for an unknown key, a
    wrong type or value, a missing mandatory value (???), an interpolation of nothing, or options that contradict.
    """
    return training_config(name_or_path, compose(name_or_path, overrides))


def training_config(name_or_path: str | Path, composed: Composed) -> Config:
    """Return the config of a run; BadInput for an inference file."""
    if not isinstance(composed.config, Config):
        raise BadInput(
            f"{name_or_path}: is an inference file; generate with it: latentsmith generate --config {name_or_path}"
        )
    return composed.config


def require_config(config: Any, function: str) -> None:
    """Raise BadInput for what is no config, such as the name of one."""
    if not isinstance(config, Config):
        raise BadInput(f"{function} takes a config: latentsmith.{function}(latentsmith.load_config({config!r}))")


def compose(name_or_path: str | Path, changes: Iterable[str] = ()) -> Composed:
    """Do as `load_config`, and return where each value came from."""
    if isinstance(changes, str):
        raise BadInput(f"overrides are a list: [{changes!r}]")
    source = str(name_or_path)
    tree, origins = read(find_file(name_or_path).resolve())
    refuse_other_models(overrides.leaves(tree), origins)
    for change in changes:
        origins |= dict.fromkeys(overrides.apply(tree, change), overrides.SOURCE)
    check_interpolations(tree, source)
    _copy_nodes(tree, origins)
    stated = overrides.leaves(tree)
    _refuse_unknown(stated, origins)
    is_inference = not INFERENCE_SECTIONS.isdisjoint(tree)
    values = _read_values(_resolve(_without_unset(tree) if is_inference else _fill(tree), source), origins)
    config: Config | InferenceConfig
    if is_inference:
        _refuse_training(stated, source)
        config = from_tree(InferenceConfig, values)
        checks.check_inference(config)
    else:
        _derive(values, stated)
        config = from_tree(Config, values)
        checks.check(config)
    origins = {key: origins[key] for key in stated if key in origins}
    return Composed(config, origins, _notes(stated, config))


def print_notes(config: str, composed: Composed) -> None:
    """Name the options that have no effect here on stderr, in one line, and print other notes whole."""
    idle = [note for note in composed.notes if NO_EFFECT in note]
    for note in (note for note in composed.notes if note not in idle):
        print(f"{config}: {note}", file=sys.stderr)
    if idle:
        keys = ", ".join(note.split()[0] for note in idle)
        print(f"{config}: without effect here (`latentsmith config validate` says why): {keys}", file=sys.stderr)


def presets() -> list[str]:
    """Return the names of the configs that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def find_file(name_or_path: str | Path) -> Path:
    """Return the YAML file of a preset's name or a path. Raises BadInput where there is neither."""
    preset = PRESETS / f"{name_or_path}.yaml"
    if str(name_or_path) in presets():
        return preset
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    raise BadInput(f"{name_or_path}: neither a config file nor a preset ({', '.join(presets())})")


def read(path: Path, inside: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the tree of a YAML file over those in its `defaults:` list, and which file gave each key."""
    tree = read_yaml(path)
    bases = tree.pop("defaults", [])
    if path in inside:
        raise BadInput(f"{path.name}: is among its own defaults; take it out of {inside[-1].name}")
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
    """Return what an entry of a defaults list stands for.

    It is "preset", "file" or {"optim": "adam"} (optim/adam.yaml as the node `optim`), each after "optional" if it may
    be missing.
    """
    group, name = next(iter(base.items())) if isinstance(base, dict) and len(base) == 1 else ("", base)
    parts = str(group or name).split()
    optional = len(parts) == 2 and parts[0] == "optional"
    if not isinstance(name, str) or len(parts) != 1 + optional:
        raise BadInput(f"{path.name}: {base!r} in defaults is neither a preset, a YAML file nor GROUP: FILE")
    node, name = (parts[-1], name) if group else ("", parts[-1])
    file = f"{node}/{name}" if node else name
    found = next(
        (each.resolve() for each in (path.parent / file, path.parent / f"{file}.yaml") if each.is_file()), None
    )
    if found is None and (optional or node):
        if optional:
            return {}, {}
        raise BadInput(f"{path.name}: {base!r} in defaults: there is no {path.parent / file}.yaml")
    part, source = read(found or find_file(name), inside)
    for key in reversed(node.split("/") if node else []):
        part, source = {key: part}, {f"{key}.{inner}": where for inner, where in source.items()}
    return part, source


def _copy_nodes(tree: dict[str, Any], origins: dict[str, str]) -> None:
    """Put copies in place of interpolations of whole nodes (`augmentations: ${model.data.train.augmentations}`)."""
    groups, whole = schema.groups(), OmegaConf.create(tree)
    for key, value in overrides.leaves(tree).items():
        if key in groups and isinstance(value, str) and value.startswith("${"):
            source = origins.get(key, overrides.SOURCE)
            with _resolving(source, key):
                node: Any = OmegaConf.select(whole, key, throw_on_missing=True)
                copy: Any = OmegaConf.to_container(node, resolve=False) if isinstance(node, DictConfig) else node
            *path, leaf = key.split(".")
            _get(tree, path)[leaf] = copy
            if isinstance(copy, dict):
                origins |= {f"{key}.{name}": source for name in overrides.leaves(copy)}


def _refuse_unknown(stated: dict[str, Any], origins: dict[str, str]) -> None:
    for key, value in stated.items():
        source = origins.get(key, overrides.SOURCE)
        if key in schema.groups():
            if isinstance(value, str) and value in NO_COMPONENT:
                raise BadInput(f"{source}: {key}={value} is refused: {NO_COMPONENT[value]}")
            if value not in (None, {}):
                raise BadInput(f"{source}: {key} must be a mapping of options, not {value!r}")
        elif schema.find(key) is None:
            raise schema.unknown_key(key, source)


def _refuse_training(stated: dict[str, Any], source: str) -> None:
    """Raise BadInput for an option of training in an inference file."""
    for key, value in stated.items():
        if key == "model.peft.restore_from_path" and value is not None:
            raise BadInput(f"{source}: {key}={value} is refused: give it to generate as --lora {value}")
        if value is None or key == "name" or key.startswith(INFERENCE_KEYS):
            continue
        if key == "model.unet_config.from_pretrained":
            raise BadInput(f"{source}: {key} is not read for generating; convert the parts into one file first")
        raise BadInput(f"{source}: {key} has no effect on generating; the checkpoint decides. Drop it")


def _fill(tree: dict[str, Any]) -> dict[str, Any]:
    """Return `tree` with every missing option at its default, after the given keys (their order can matter)."""
    filled = _without_unset(tree)
    for option in schema.table().values():
        if option.filled:
            *path, leaf = option.key.split(".")
            node = filled
            for name in path:
                node = node.setdefault(name, {})
            node.setdefault(leaf, to_plain(option.default))
    return filled


def _without_unset(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a copy of `tree` without the nulls that mean "not set"."""
    kept: dict[str, Any] = {}
    for name, value in tree.items():
        option = schema.table().get(f"{prefix}{name}")
        if option is None and isinstance(value, dict):
            kept[name] = _without_unset(value, f"{prefix}{name}.")
        elif value is not None or (option is not None and option.value_type.nullable):
            kept[name] = deepcopy(value)
    return kept


def _get(tree: dict[str, Any], path: Iterable[str]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def asset(name: str) -> str:
    """Return the path of a file that comes with the package: `${asset:demo/vae.safetensors}` in a config."""
    return str(Path(__file__).with_name("assets") / name)


@contextmanager
def _resolving(source: str, key: str = "an interpolation") -> Iterator[None]:
    """Give interpolations our resolver and no environment inside the context; raise BadInput for what fails."""
    OmegaConf.register_new_resolver("asset", asset, replace=True)
    OmegaConf.register_new_resolver("oc.env", _refuse_environment, replace=True)
    try:
        yield
    except OmegaConfBaseException as error:
        reason = SECRETS if SECRETS in str(error) else str(error).splitlines()[0]
        raise BadInput(f"{source}: {error.full_key or key} cannot be resolved: {reason}") from None
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _refuse_environment(*_: Any) -> str:
    raise BadInput(SECRETS)


def _resolve(tree: dict[str, Any], source: str) -> dict[str, Any]:
    config = OmegaConf.create(tree)
    with _resolving(source):
        if missing := OmegaConf.missing_keys(config):
            raise BadInput(f"{source}: {min(missing)} is mandatory (???): give it as {min(missing)}=VALUE")
        resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _read_values(tree: dict[str, Any], origins: dict[str, str], prefix: str = "") -> dict[str, Any]:
    """Return every value as its option reads it."""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        option = schema.table().get(key)
        if option is None:
            values[name] = _read_values(value, origins, f"{key}.")
        else:
            values[name] = option.read(value, origins.get(key, "default"))
    return values


def _derive(values: dict[str, Any], stated: dict[str, Any]) -> None:
    """Fill in what follows from other options, and what other people's keys and class paths imply."""
    model = values["model"]
    checks.check_classes(model)
    for key in COMPONENT_KEYS:
        *path, leaf = key.split(".")
        parent = _get(values, path)
        parent[leaf] = class_registry.canonical(parent[leaf], key)
    unet, text = model["unet_config"], model["cond_stage_config"]
    if unet["num_heads"] == unet["num_head_channels"] == -1:
        unet["num_heads"] = 8
    if unet["num_head_channels"] != -1:
        unet["num_heads"] = -1  # NeMo's rule where both are given
    if text["arch"] is None and text["width"] is None:
        text["arch"] = CLIP_BY_WIDTH.get(unet["context_dim"])
    model["peft"] |= _nemo_lora(model["peft"].get("lora_tuning"), stated)
    adapted = model["peft"]["peft_scheme"] and "text_encoder" in model["peft"]["networks"]
    if model["cond_stage_trainable"] or adapted or model["textual_inversion"]["token"]:
        text["freeze"] = False
    if model.get("base_learning_rate") is not None and stated.get("model.optim.lr") is None:
        model["optim"]["lr"] = model["base_learning_rate"]
    elif stated.get("model.optim.lr", 0) is None:
        model["optim"]["lr"] = NEMO_LR
    if stated.get("model.optim.sched.name") is None and stated.get("model.optim.sched.warmup_steps") is None:
        model["optim"]["sched"] |= _ldm_warmup(model.get("scheduler_config"))
    manager = values["exp_manager"]
    manager["resume_from_checkpoint"] = manager["resume_from_checkpoint"] or model.get("resume_from_checkpoint")
    model["ckpt_path"] = model["ckpt_path"] or model.get("restore_from_path")
    if model.get("scale_by_std"):
        if stated.get("model.scale_factor") not in (None, 1, "measured"):
            raise BadInput(
                f"model.scale_by_std=True measures the scale, but model.scale_factor={stated['model.scale_factor']} is "
                "given; drop one of them"
            )
        model["scale_factor"] = "measured"


def _ldm_warmup(node: dict[str, Any] | None) -> dict[str, Any]:
    """Return the warm-up of LDM's `LambdaLinearScheduler`, whose rate then stays: model.optim.sched under our keys.

    BadInput for one whose rate falls after it, which has another meaning in each cycle.
    """
    node = node or {}
    steps, top, bottom = node.get("warm_up_steps"), node.get("f_max", [1.0]), node.get("f_min", [1.0])
    if not isinstance(steps, list) or not steps or not isinstance(steps[0], int) or steps[0] < 0:
        return {}
    if top != bottom:
        raise BadInput(
            f"model.scheduler_config falls from f_max={top} to f_min={bottom}; write it as model.optim.sched instead "
            "(name=linear, warmup_steps, max_steps, min_lr)"
        )
    return {"name": "WarmupPolicy", "warmup_steps": steps[0]}


def _nemo_lora(tuning: dict[str, Any] | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return NeMo's `lora_tuning` in our words, for what is not given in these; its alpha of 0 or null is the rank."""
    if tuning is None:
        return {}
    stated = {"adapter_dim": tuning.get("adapter_dim", 32), "adapter_dropout": tuning.get("adapter_dropout") or 0.0,
              "alpha": tuning.get("network_alpha") or None, "targets": "nemo"}  # fmt: skip
    found = {name: value for name, value in stated.items() if given.get(f"model.peft.{name}") is None}
    return {name: schema.table()[f"model.peft.{name}"].read(v, "model.peft.lora_tuning") for name, v in found.items()}


def _notes(stated: dict[str, Any], config: Config | InferenceConfig) -> list[str]:
    found = [option for key, value in stated.items() if value is not None and (option := schema.find(key))]
    idle = {option.key: option.meaning for option in found if option.status == "no effect"}
    if isinstance(config, InferenceConfig):
        trainer = [option.key for option in found if option.key.startswith("trainer.")]
        reason = "generate takes --device, and torchrun or srun shares the images"
        idle = dict.fromkeys((key for key in trainer if key != "trainer.precision"), reason) | idle
    else:
        idle |= _overruled(stated, config)
    notes = [f"{key}{NO_EFFECT}{reason}" for key, reason in idle.items()]
    if stated.get("model.base_learning_rate") is not None and stated.get("model.optim.lr") is None:
        notes.append(UNSCALED_RATE)
    return notes


def _overruled(stated: dict[str, Any], config: Config) -> dict[str, str]:
    """Return the given options that another one leaves without effect, each with the reason."""
    found = {}
    if config.model.optim.sched.name == "constant":
        keys = (f"model.optim.sched.{name}" for name in ("warmup_steps", "hold_steps", "min_lr", "max_steps"))
        found = {key: "model.optim.sched.name=constant is one rate throughout" for key in keys if stated.get(key)}
    channels = config.model.unet_config.num_head_channels
    if channels != -1 and stated.get("model.unet_config.num_heads") not in (None, -1):
        reason = f"num_head_channels={channels} decides, as in NeMo; set that to -1 to give num_heads"
        found["model.unet_config.num_heads"] = reason
    return found
