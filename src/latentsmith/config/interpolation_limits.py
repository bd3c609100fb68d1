"""Interpolations that would take exponential time or memory to resolve, found before OmegaConf resolves any."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from latentsmith.files.errors import BadInput

from .read_yaml import MAX_DEPTH, MAX_NODES

LONG_TEXT = 1000  # characters of a text that count as one more value
Path = tuple[str, ...]
BODY = re.compile(r"\$\{([^{}]*)\}")
NESTED = re.compile(r"\$\{[^}]*\$\{")
BETWEEN_KEYS = re.compile(r"[\s:,'\"]+")  # also the arguments of a resolver, such as oc.select


def check_interpolations(tree: dict[str, Any], source: str) -> None:
    """Raise BadInput for a tree whose interpolations, written out, exceed the limits of a config file.

    Each use of a node counts everything inside it again. An interpolation with another inside it counts as a use of
    every interpolated value, since what it names is known only when it is resolved.
    """
    _Counter(tree, source).count(())


class _Counter:
    """Counts values as they are after resolving, each node once."""

    def __init__(self, tree: dict[str, Any], source: str) -> None:
        self.nodes, self.source = dict(_walk(tree, ())), source
        self.counts: dict[Path, int] = {}
        self.interpolated = [path for path, value in self.nodes.items() if isinstance(value, str) and "${" in value]

    def count(self, path: Path, uses: int = 0) -> int:
        """Return how many values the node at `path` stands for; a circle counts once (OmegaConf names it).

        uses: interpolations followed to get here.
        """
        if path in self.counts:
            return self.counts[path]
        if uses > MAX_DEPTH:
            raise BadInput(f"{self.source}: {'.'.join(path)}: more than {MAX_DEPTH} interpolations refer to each other")
        self.counts[path] = 1
        value = self.nodes[path]
        total = 1 + len(value) // LONG_TEXT if isinstance(value, str) else 1
        total += sum(self.count((*path, name), uses) for name in _children(value))
        if isinstance(value, str):
            total += sum(self.count(target, uses + 1) for target in self._targets(path, value))
        if total > MAX_NODES:
            raise BadInput(
                f"{self.source}: {'.'.join(path) or 'the file'}: its interpolations stand for more than {MAX_NODES:,} "
                "values; write out what it needs"
            )
        self.counts[path] = total
        return total

    def _targets(self, path: Path, text: str) -> list[Path]:
        """Return the nodes that a text's interpolations use, one entry for each use."""
        if NESTED.search(text):
            return self.interpolated * text.count("${")
        bodies = [body for body in BODY.findall(text) if ":" not in body or body.lstrip().startswith("oc.")]
        words = [word for body in bodies for word in BETWEEN_KEYS.split(body)]
        return [target for word in words if (target := self._existing(_absolute(word, path)))]

    def _existing(self, path: Path) -> Path:
        """Return `path`, or the interpolated text on the way to it; () if there is neither."""
        found = path
        while found not in self.nodes:
            found = found[:-1]
        return found if found == path or isinstance(self.nodes[found], str) else ()


def _absolute(word: str, path: Path) -> Path:
    """Return the path of a key in an interpolation at `path`: `a.b[0]`, or `.b` beside it and `..b` one node above."""
    name = word.lstrip(".")
    levels = len(word) - len(name)
    above = path[: max(0, len(path) - levels)] if levels else ()
    return (*above, *(part for part in re.split(r"[.\[\]]", name) if part))


def _children(node: Any) -> dict[str, Any]:
    """Return what lies in a node by name, or by index in a list; nothing for a value."""
    if isinstance(node, dict):
        return {str(name): value for name, value in node.items()}
    return {str(index): value for index, value in enumerate(node)} if isinstance(node, list) else {}


def _walk(node: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """Yield `node` and every node inside it, each with its path."""
    yield path, node
    for name, inner in _children(node).items():
        yield from _walk(inner, (*path, name))
