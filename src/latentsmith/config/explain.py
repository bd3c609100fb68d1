"""Describe the table of options: for `config explain`, the reference page, `config show`, `migrate` and `diff`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import overrides, schema
from .compose import Composed
from .run_options import Config
from .tree import dump, to_plain, to_tree


def explain(key: str = "") -> str:
    """Return one option in full, or a line for each option below `key` ("" is everything). Raises BadInput."""
    option = schema.table().get(key)
    if option is not None:
        return "\n".join(_lines(option))
    inside = schema.find(key) if key else None
    if inside is not None:
        return f"{key} lies in {inside.key}, which may have any keys\n" + "\n".join(_lines(inside))
    below = [option for option in schema.table().values() if not key or option.key.startswith(f"{key}.")]
    if not below:
        raise schema.unknown_key(key, "config explain")
    return "\n".join(_one_line(option) for option in below)


def _lines(option: schema.Option) -> Iterator[str]:
    yield option.key
    if option.status in ("used", "mapped"):
        yield f"  meaning  {option.meaning}"
        yield f"  value    {option.value_type.description}"
        yield f"  default  {_short(option.default)}"
        yield f"  status   {option.status}"
    else:
        yield f"  status   {_status(option)}"


def _one_line(option: schema.Option) -> str:
    if option.status == "used":
        return f"{option.key}={_short(option.default)}  {option.meaning}"
    return f"{option.key}  [{_status(option)}]"


def _status(option: schema.Option) -> str:
    only = f", unless {_short(option.default)}" if option.status == "refused" else ""
    return f"{option.status}{only}: {option.meaning}"


def _short(value: Any) -> str:
    """Return a value as YAML writes it on one line."""
    return dump(to_plain(value), one_line=True)


def reference_page() -> str:
    """Return the reference of all options as Markdown."""
    own = [option for option in schema.table().values() if option.status == "used"]
    foreign = [option for option in schema.table().values() if option.status != "used"]
    lines = [
        "# Options",
        "",
        "Every key that a config may have. This page is made by `latentsmith config explain --markdown`.",
        "",
        "| key | value | default | meaning |",
        "|---|---|---|---|",
        *(f"| `{o.key}` | {o.value_type.description} | `{_short(o.default)}` | {o.meaning} |" for o in own),
        "",
        "## Keys of NeMo's and LDM's files",
        "",
        "*mapped*: read as an option of ours. *no effect*: accepted, since shipped files carry it; it changes nothing.",
        "*refused*: accepted at the value shown only, since anything else would change what is trained.",
        "",
        "| key | status | reason |",
        "|---|---|---|",
        *(f"| `{o.key}` | {_status(o).removesuffix(f': {o.meaning}')} | {o.meaning} |" for o in foreign),
    ]
    return "\n".join(lines) + "\n"


def show(composed: Composed) -> str:
    """Return the composed tree as YAML, each value with where it came from."""
    return "\n".join(_show_node(to_tree(composed.config), composed.origins, "", ""))


def _show_node(node: dict[str, Any], origins: dict[str, str], prefix: str, indent: str) -> Iterator[str]:
    for name, value in node.items():
        key = f"{prefix}{name}"
        if key in schema.groups() and value:
            yield f"{indent}{name}:"
            yield from _show_node(value, origins, f"{key}.", f"{indent}  ")
        else:
            yield f"{indent}{name}: {_short(value)}  # {_origin(key, value, origins)}"


def _origin(key: str, value: Any, origins: dict[str, str]) -> str:
    if source := next((source for name, source in origins.items() if name == key or name.startswith(f"{key}.")), ""):
        return source
    option = schema.table().get(key)
    return (
        "default" if option is None or to_plain(option.default) in (value, "${name}") else "follows from other options"
    )


def migrated(composed: Composed, source: str) -> str:
    """Return a config of NeMo's or LDM's as one of ours: YAML of all that is not at its default, under our own keys."""
    tree: dict[str, Any] = {}
    for key, value in overrides.leaves(to_tree(composed.config)).items():
        option = schema.find(key)
        assert option is not None or not value, key  # an empty section
        default = composed.config.name if key == "exp_manager.name" and isinstance(composed.config, Config) else None
        if option and (not option.filled or composed.is_inference or value != (default or to_plain(option.default))):
            _put(tree, key, value)
    lines = [f"# Made from {source}; options at their defaults are left out.", dump(tree).rstrip()]
    if composed.notes:
        lines += ["# Left out, or of another meaning there:", *(f"#   {note}" for note in composed.notes)]
    return "\n".join(lines)


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, leaf = key.split(".")
    for name in path:
        tree = tree.setdefault(name, {})
    tree[leaf] = value


def diff(first: Any, second: Any) -> list[str]:
    """Return a line for each option whose value differs: `KEY: first -> second`."""
    left, right = (overrides.leaves(to_tree(config)) for config in (first, second))
    keys = dict.fromkeys([*left, *right])
    changed = [key for key in keys if left.get(key, "absent") != right.get(key, "absent")]
    return [f"{key}: {_short(left.get(key, 'absent'))} -> {_short(right.get(key, 'absent'))}" for key in changed]
