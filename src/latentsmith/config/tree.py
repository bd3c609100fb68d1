"""A typed config as plain data and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, get_type_hints

import yaml

from latentsmith.files.errors import BadInput

from .data_options import AugmentationsConfig
from .run_options import Config
from .schema import find, section_of, unknown_key

Section = TypeVar("Section")


def from_tree(section: type[Section], tree: Mapping[str, Any]) -> Section:
    """Return a section of values already read, or of defaults; keys that are no fields are left out."""
    hints, values = get_type_hints(section), {}
    for field in fields(section):  # type: ignore[arg-type]
        if field.name in tree:
            inside, value = section_of(hints[field.name]), tree[field.name]
            values[field.name] = from_tree(inside, value or {}) if inside else value
    if section is AugmentationsConfig:
        values["order"] = tuple(tree)
    return section(**values)


def to_tree(section: Any) -> dict[str, Any]:
    """Return a config, or a section of one, as nested dicts and lists; sections without defaults hold what is set."""
    if isinstance(section, AugmentationsConfig):
        return {name: to_plain(value) for name, value in section.steps().items()}
    tree = {}
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            inner = to_tree(value)
            if inner or not getattr(section, "given_only", False):
                tree[field.name] = inner
        elif value is not None or not getattr(section, "given_only", False):
            tree[field.name] = to_plain(value)
    return tree


def to_plain(value: Any) -> Any:
    """Return a value with lists for its tuples, as YAML and JSON have them."""
    if isinstance(value, Mapping):
        return {key: to_plain(entry) for key, entry in value.items()}
    return [to_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def to_yaml(config: Config) -> str:
    """Return the YAML of a run's config.yaml: every option; `load_config` of it gives an equal config."""
    return dump(to_tree(config))


def dump(value: Any, *, one_line: bool = False) -> str:
    """Return plain data as YAML that reads back as the same data."""
    width = 10**6 if one_line else 120
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width, default_flow_style=one_line
    )
    return text.strip().removesuffix("\n...") if one_line else text


class _Dumper(yaml.SafeDumper):
    """PyYAML leaves the text 1e3 bare, which is a number in YAML 1.2 and for OmegaConf."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "'" if re.fullmatch(r"[-+]?[\d._]+[eE][-+]?\d+", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _quoted)


def replaced(config: Config, key: str, value: Any) -> Config:
    """Return a copy of a config with another value at a dotted key, read as a config file's would be."""
    option = find(key)
    if option is not None and option.key == key:
        if option.status != "used":
            raise BadInput(f"config: {key} has status {option.status}: {option.meaning}")
        value = option.read(value, "config")

    def within(section: Any, path: list[str]) -> Any:
        name, *rest = path
        if not is_dataclass(section) or not hasattr(section, name):
            raise unknown_key(key, "config")
        inner = within(getattr(section, name), rest) if rest else value
        return replace(section, **{name: inner})  # type: ignore[type-var]

    changed = within(config, key.split("."))
    assert isinstance(changed, Config)
    return changed
