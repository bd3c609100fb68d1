"""A node of the config as a class and its keywords."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentsmith.architectures import COMPONENTS

from . import class_registry, schema
from .foreign_keys import canonical_node
from .tree import to_tree

CONFIG_KEYS = {
    **{component.class_path: f"model.{component.config_key}" for component in COMPONENTS.values()},
    class_registry.LOSS: "model.first_stage_config.lossconfig",
}
SOURCES = ("from_pretrained", "restore_from_path", "from_NeMo")
NO_ARGUMENTS = ("lossconfig", "tokenizer", "version")  # of train-vae, the tokenizer, the weights to look for


@dataclass(frozen=True)
class Node:
    """A network that a node of the config describes.

    key: of the node in the config, for messages. class_path: dotted path of the class. arguments: keywords of
    its constructor. source: the checkpoint to fill it from. from_nemo: NeMo's `from_NeMo` key.
    """

    key: str
    class_path: str
    arguments: dict[str, Any]
    source: str | None = None
    from_nemo: bool | None = None


def read_node(node: Any) -> Node:
    """Read a typed section, or a mapping with `_target_` (or LDM's `target` + `params`).

    Keys at null take the class's default; keys that have no effect are left out. Raises BadInput naming the node for an
    unknown class or key.
    """
    plain = dict(node) if isinstance(node, Mapping) else to_tree(node)
    plain = class_registry.canonical(canonical_node(plain), "config")
    class_path = plain.pop("_target_")
    key = CONFIG_KEYS.get(class_path, class_path)
    for name in plain:
        if key != class_path and f"{key}.{name}" not in schema.groups() and not schema.find(f"{key}.{name}"):
            raise schema.unknown_key(f"{key}.{name}", "config")
    used = _used(plain, key)
    source = used.get("from_pretrained") or used.get("restore_from_path")
    arguments = {name: value for name, value in used.items() if name not in (*SOURCES, *NO_ARGUMENTS)}
    return Node(key, class_path, arguments, source, used.get("from_NeMo"))


def network_arguments(node: Any) -> dict[str, Any]:
    """Return the constructor keywords that shape the network of a node."""
    return read_node(node).arguments


def _used(node: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a node without nulls and without options that have no effect."""
    found = {}
    for name, value in node.items():
        option = schema.find(f"{key}.{name}")
        if value is not None and (option is None or option.filled):
            found[name] = _used(value, f"{key}.{name}") if isinstance(value, dict) else value
    return found
