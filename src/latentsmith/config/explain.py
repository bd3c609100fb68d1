"""The table of options in words: for `config explain`, the reference page, `config show` and `config diff`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from . import overrides, schema
from .compose import Composed


def explain(key: str = "") -> str:
    """One option in full, or a line for each option below `key` ("" is everything). Raises BadInput."""
    option = schema.table().get(key)
    if option is not None:
        return "\n".join(_lines(option))
    inside = schema.find(key) if key else None
    if inside is not None:
        return f"{key} lies in {inside.key}, whose keys are not ours to name\n" + "\n".join(_lines(inside))
    below = [option for option in schema.table().values() if not key or option.key.startswith(f"{key}.")]
    if not below:
        raise schema.unknown_key(key, "config explain")
    return "\n".join(f"{option.key}={_short(option.default)}  {option.meaning}{_fate(option)}" for option in below)


def _lines(option: schema.Option) -> Iterator[str]:
    yield option.key
    yield f"  meaning  {option.meaning}"
    yield f"  value    {option.kind.words}"
    yield f"  default  {_short(option.default)}"
    yield f"  fate     {option.fate}" + (f": {option.reason}" if option.reason else "")


def _fate(option: schema.Option) -> str:
    return f" [{option.fate}: {option.reason}]" if option.reason else ""


def _short(value: Any) -> str:
    """A value as YAML writes it on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).strip().removesuffix("\n...")


def reference_page() -> str:
    """The reference of all options as Markdown."""
    rows = [
        f"| `{option.key}` | {option.kind.words} | `{_short(option.default)}` | {option.meaning} | "
        f"{option.fate}{': ' + option.reason if option.reason else ''} |"
        for option in schema.table().values()
    ]
    head = ["# Options", "", (schema.__doc__ or "").strip(), "", "| key | value | default | meaning | fate |"]
    return "\n".join([*head, "|---|---|---|---|---|", *rows]) + "\n"


def show(composed: Composed) -> str:
    """The composed tree as YAML, each value with where it came from."""
    plain = OmegaConf.to_container(composed.config)
    assert isinstance(plain, dict)
    return "\n".join(_show_node(plain, composed.origins, "", ""))


def _show_node(node: dict[Any, Any], origins: dict[str, str], prefix: str, indent: str) -> Iterator[str]:
    for name, value in node.items():
        key = f"{prefix}{name}"
        if key in schema.groups() and value:
            yield f"{indent}{name}:"
            yield from _show_node(value, origins, f"{key}.", f"{indent}  ")
        else:
            yield f"{indent}{name}: {_short(value)}  # {_origin(key, value, origins)}"


def _origin(key: str, value: Any, origins: dict[str, str]) -> str:
    if source := next((source for given, source in origins.items() if given == key or given.startswith(f"{key}.")), ""):
        return source
    option = schema.table().get(key)
    return "default" if option is None or option.default in (value, "${name}") else "follows from other options"


MOVED = (  # read as keys of ours
    "model.scheduler_config",
    "model.base_learning_rate",
    "model.restore_from_path",
    "model.scale_by_std",
    "model.resume_from_checkpoint",
)


def migrated(composed: Composed, source: str) -> str:
    """A config of NeMo's or LDM's as one of ours: YAML of all that is not at its default, under our own keys."""
    tree: dict[str, Any] = {}
    moved = DEVICES if composed.draws else MOVED
    for key, value in overrides.leaves(_plain(composed.config)).items():
        option = schema.find(key)
        if option is None or option.fate not in ("used", "mapped") or option.key in moved:
            continue
        default = composed.config.get("name") if option.default == "${name}" else option.default
        if option.optional or option.key != key or value != default:
            _put(tree, key, value)
    lines = [f"# Made from {source}; options at their defaults are left out.", _yaml(tree)]
    if composed.notes:
        lines += ["# Left out, since they have no effect here:", *(f"#   {note}" for note in composed.notes)]
    return "\n".join(lines)


DEVICES = tuple(key for key in schema.table() if key.startswith("trainer.") and key != "trainer.precision")


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, leaf = key.split(".")
    for name in path:
        tree = tree.setdefault(name, {})
    tree[leaf] = value


def _yaml(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120).rstrip()


def diff(first: DictConfig, second: DictConfig) -> list[str]:
    """A line for each option whose value differs: `KEY: first -> second`."""
    left, right = (overrides.leaves(_plain(config)) for config in (first, second))
    keys = dict.fromkeys([*left, *right])
    changed = [key for key in keys if left.get(key, "absent") != right.get(key, "absent")]
    return [f"{key}: {_short(left.get(key, 'absent'))} -> {_short(right.get(key, 'absent'))}" for key in changed]


def _plain(config: DictConfig) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(config)
    return plain
