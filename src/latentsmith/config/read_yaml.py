"""YAML files as plain trees, within limits that no config needs and a hostile file exceeds."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from latentsmith.files.errors import BadInput
from latentsmith.files.regular import CONFIG, read_regular

from . import schema
from .foreign_keys import canonical_key, canonical_tree

# NeMo's largest config has 250 nodes, 7 levels and no alias.
MAX_NODES = 20_000  # keys and values, those of aliases counted each time
MAX_DEPTH = 50
MAX_DIGITS = 20  # Python takes time by the square of the digits of an integer
LONG_NUMBER = re.compile(rf"[-+]?\d[\da-fA-FxXoO_:]{{{MAX_DIGITS},}}")
START = (yaml.MappingStartEvent, yaml.SequenceStartEvent)
END = (yaml.MappingEndEvent, yaml.SequenceEndEvent)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the tree of a YAML file, interpolations unresolved, keys spelled our way. Raises BadInput, one line."""
    try:
        text = read_regular(path, CONFIG).decode("utf-8-sig")
        check_limits(text)
        plain: Any = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
        _keep_text(plain, yaml.compose(text, Loader=yaml.SafeLoader))
    except BadInput as error:
        message = str(error)
        raise error if message.startswith(str(path)) else BadInput(f"{path.name}: {message}") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError, RecursionError) as error:
        raise BadInput(f"{path.name}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(plain, dict):
        raise BadInput(f"{path.name}: a config is a mapping of options, not a {type(plain).__name__}")
    if dotted := [key for key in _keys(plain) if "." in key]:
        raise BadInput(f"{path.name}: {dotted[0]} is one key with a dot in it; write it nested")
    try:
        return canonical_tree(plain)
    except BadInput as error:
        raise BadInput(f"{path.name}: {error}") from None


def check_limits(text: str) -> None:
    """Raise BadInput for YAML with more nodes, levels or digits than a config can need, before it is built."""
    nodes, open_anchors, sizes = 0, list[tuple[str | None, int]](), dict[str | None, int]()
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise BadInput(f"*{event.anchor} refers to nothing before it, or to what it is inside")
            nodes += sizes[event.anchor]
        elif isinstance(event, (yaml.ScalarEvent, *START)):
            nodes += 1
            sizes |= {event.anchor: 1} if isinstance(event, yaml.ScalarEvent) else {}
        if isinstance(event, START):
            open_anchors.append((event.anchor, nodes))
        elif isinstance(event, END):
            anchor, before = open_anchors.pop()
            sizes[anchor] = nodes - before + 1
        elif isinstance(event, yaml.ScalarEvent) and event.implicit[0] and LONG_NUMBER.fullmatch(event.value):
            raise BadInput(f"{event.value[:MAX_DIGITS]}... is a number of more than {MAX_DIGITS} digits; quote text")
        if nodes > MAX_NODES:
            raise BadInput(f"more than {MAX_NODES:,} keys and values, those of aliases counted each time")
        if len(open_anchors) > MAX_DEPTH:
            raise BadInput(f"more than {MAX_DEPTH} levels of nesting")


def _keep_text(tree: Any, node: yaml.Node | None, key: str = "") -> Any:
    """Return `tree` with numbers as they are spelled where an option is text: a run named 1.10 is not 1.1.

    tree: what the YAML of `node` was read as; changed in place. key: of the option, as the file spells it.
    """
    if isinstance(tree, dict) and isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value in tree:
                tree[name.value] = _keep_text(tree[name.value], value, f"{key}.{name.value}" if key else name.value)
    elif isinstance(tree, list) and isinstance(node, yaml.SequenceNode):
        tree[:] = [_keep_text(entry, value, key) for entry, value in zip(tree, node.value, strict=False)]
    elif isinstance(tree, (int, float)) and not isinstance(tree, bool) and isinstance(node, yaml.ScalarNode):
        option = schema.find(canonical_key(key))
        if option and "text" in option.value_type.description:
            return node.value
    return tree


def _keys(tree: Any, prefix: str = "") -> Iterator[str]:
    """Yield every key of a tree in a section of ours, as it is spelled; free mappings have keys of their own."""
    for name, value in tree.items() if isinstance(tree, dict) else ():
        yield str(name)
        option = schema.find(f"{prefix}{name}")
        if not (option and option.value_type.free):
            yield from _keys(value, f"{prefix}{name}.")
