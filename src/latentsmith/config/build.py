"""A node of the config to the object it describes."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from latentsmith.files.errors import BadInput

from . import class_registry, schema

PLACES = {
    class_registry.UNET: "model.unet_config",
    class_registry.VAE: "model.first_stage_config",
    class_registry.TEXT: "model.cond_stage_config",
    class_registry.LOSS: "model.first_stage_config.lossconfig",
}


def build(node: DictConfig | Mapping[str, Any], **more: Any) -> Any:
    """The object of `node`: its `_target_` (or LDM's `target` + `params`) called with the other keys as keywords.

    Keys at null take the class's default; keys that have no effect here are left out. more: keywords that are no keys
    of the node. Only the classes in
    `config.targets` can be built. Raises BadInput naming the node for an unknown class, key or impossible size.
    """
    plain = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else dict(node)
    plain = class_registry.canonical(class_registry.flatten(plain), "config")
    target = plain.pop("_target_")
    place = PLACES.get(target, target)
    for key in plain:
        if place != target and f"{place}.{key}" not in schema.groups() and not schema.find(f"{place}.{key}"):
            raise schema.unknown_key(f"{place}.{key}", "config")
    try:
        return _find_class(target)(**_reaching(plain, place), **more)
    except (ValueError, TypeError) as error:
        raise BadInput(f"{place}: {error}") from error


def arguments(node: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The keywords that `build` would call the class of a node with."""
    plain = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else dict(node)
    plain = class_registry.canonical(class_registry.flatten(plain), "config")
    target = plain.pop("_target_")
    return _reaching(plain, PLACES.get(target, target))


def _reaching(node: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A node without nulls and without what has no effect here: the class sees only what it uses."""
    found = {}
    for key, value in node.items():
        option = schema.find(f"{place}.{key}")
        if value is not None and (option is None or option.filled):
            found[key] = _reaching(value, f"{place}.{key}") if isinstance(value, dict) else value
    return found


def _find_class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
