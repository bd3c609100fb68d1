"""`key=value` on the command line: Hydra's grammar (bare, +, ++, ~), applied to a plain tree."""

from __future__ import annotations

import re
from typing import Any

from latentsmith.files.errors import BadInput

from . import schema
from .foreign_keys import canonical_key
from .read_yaml import LONG_NUMBER, MAX_DIGITS

SOURCE = "command line"
SHAPE = re.compile(r"(?P<mark>\+\+|\+|~)?(?P<key>[^=~+\s][^=]*?)(?P<equals>=(?P<text>.*))?", re.DOTALL)


def parse(override: str, *, sweeps: bool = False) -> tuple[bool, str, Any]:
    """Return (delete, key, value) of one override.

    For text options the value is the text itself wherever Hydra would read something else: a path such as ~/data or
    shard-{000..010}.tar, a name such as 2024, a size such as 512,512.
    Raises BadInput for what has neither form, for a sweep, and for a key that is not an option.
    """
    shape = SHAPE.fullmatch(override)
    if shape is None or (shape["equals"] is None and shape["mark"] != "~"):
        raise BadInput(f"{SOURCE}: {override!r} is not an override; write key=value (or ~key to drop a key)")
    key = canonical_key(shape["key"])
    option = schema.find(key)
    if option is None and key not in schema.groups():
        raise schema.unknown_key(key, SOURCE)
    literal = option is not None and option.value_type.literal
    return shape["mark"] == "~", key, _value(shape["text"], key, literal, sweeps)


def is_override(word: str) -> bool:
    """Return whether a word of a command line changes an option, and is no text that happens to hold an equals sign."""
    shape = SHAPE.fullmatch(word)
    if shape is None or (shape["equals"] is None and shape["mark"] != "~"):
        return False
    key = canonical_key(shape["key"])
    return schema.find(key) is not None or key in schema.groups()


def _value(text: str | None, key: str, literal: bool, sweeps: bool) -> Any:
    if text is None:
        return None
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if not literal and LONG_NUMBER.fullmatch(text):
        raise BadInput(f"{SOURCE}: {key} is a number of more than {MAX_DIGITS} digits")
    try:
        parsed = OverridesParser.create().parse_override(f"key={text}")
    except HydraException:
        if literal:
            return text
        raise BadInput(f"{SOURCE}: {key}={text} is outside Hydra's grammar; quote the value: '{key}=\"...\"'") from None
    if parsed.is_sweep_override():
        if literal or sweeps:
            return text
        raise BadInput(f"{SOURCE}: {key}={text} is a sweep: write lists as [1,2], or ask for one run each (--multirun)")
    value: Any = parsed.value()
    return text if literal and isinstance(value, (int, float)) and not isinstance(value, bool) else value


def sweep(overrides: list[str]) -> list[list[str]]:
    """Return the overrides of every run of a sweep: one for each combination of key=a,b, choice(...) and range(...).

    The last key varies fastest. Text options such as paths, where a comma may be meant, only sweep as choice(a,b).
    Raises BadInput for what is no override.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    runs: list[list[str]] = [[]]
    for override in overrides:
        _, key, _ = parse(override, sweeps=True)
        option, text = schema.find(key), override.partition("=")[2]
        values = [override]
        meant = option is None or not option.value_type.literal or option.value_type.description.startswith("one of")
        if text and (meant or text.startswith(("choice(", "range("))):
            try:
                parsed = OverridesParser.create().parse_override(f"key={text}")
                swept = list(parsed.sweep_string_iterator()) if parsed.is_sweep_override() else []
            except HydraException as error:
                raise BadInput(f"{SOURCE}: {override}: {str(error).splitlines()[0]}") from None
            values = [f"{override.partition('=')[0]}={value}" for value in swept] or values
        runs = [[*run, value] for run in runs for value in values]
    return runs


def apply(tree: dict[str, Any], override: str) -> list[str]:
    """Change `tree` as one override says; returns the keys that it set."""
    delete, key, value = parse(override)
    *path, leaf = key.split(".")
    node = tree
    for name in path:
        if isinstance(node.get(name), str) and node[name].startswith("${"):
            raise BadInput(
                f"{SOURCE}: {key}={value}: {name} is {node[name]} as a whole; change that, or give all of it"
            )
        if not isinstance(node.get(name), dict):
            node[name] = {}
        node = node[name]
    if delete:
        if leaf not in node:
            raise BadInput(f"{SOURCE}: {override}: nothing in the config sets {key}; remove the override")
        if value is not None and node[leaf] != value:
            raise BadInput(f"{SOURCE}: {override}: {key} is {node[leaf]!r}, so it is not dropped")
        del node[leaf]
        return []
    if isinstance(value, dict) and isinstance(node.get(leaf), dict):
        merge(node[leaf], value)
    else:
        node[leaf] = value
    return [f"{key}.{name}" for name in leaves(value)] if isinstance(value, dict) else [key]


def merge(base: dict[str, Any], over: dict[str, Any]) -> None:
    """Write `over` into `base`; mappings are merged, anything else is replaced."""
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = value


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"model.optim.lr": 1e-4, ...}; a free mapping and an empty one count as one leaf."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        option = schema.table().get(key)
        if isinstance(value, dict) and value and not (option and option.value_type.free):
            found |= leaves(value, f"{key}.")
        else:
            found[key] = value
    return found
