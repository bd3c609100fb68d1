"""Read values as a config or a command line gives them, by types that describe themselves in messages."""

from __future__ import annotations

import math
import os
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin


@dataclass(frozen=True)
class ValueType:
    """Type of an option. description: as in "must be DESCRIPTION". read: value as given -> as used, or ValueError."""

    description: str
    read: Callable[[Any], Any]
    nullable: bool = False  # null is a value of its own; elsewhere null means "not set", so the default
    literal: bool = False  # on the command line, text outside Hydra's grammar is taken as it stands
    free: bool = False  # a mapping with keys that are not in our table


def value_type(
    annotation: Any,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    choices: tuple[str, ...] = (),
    spellings: Mapping[str, str] | None = None,
    min_length: int = 0,
    path: bool = False,
) -> ValueType:
    """Return the type of an option from the annotation of its field.

    annotation: bool, int, float, str, Literal, tuple[X, ...], tuple[X, X], Mapping[str, Any], or a union of these with
    None. Bounds apply to every number in it, choices and spellings (other -> own) to text, min_length to lists. path:
    texts are paths, whose leading ~ means the home folder, as no shell sees it in a file or behind key=.
    """

    def part(annotation: Any) -> ValueType:
        return value_type(
            annotation,
            at_least=at_least,
            at_most=at_most,
            choices=choices,
            spellings=spellings,
            min_length=min_length,
            path=path,
        )

    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        parts = [part(arg) for arg in args if arg is not type(None)]
        inner = parts[0] if len(parts) == 1 else either(*parts)
        return nullable(inner) if type(None) in args else inner
    if origin is Literal:
        return choice(*args, spellings=spellings)
    if origin is tuple:
        return list_of(part(args[0]), None if args[1] is Ellipsis else len(args), min_length=min_length)
    if annotation is bool:
        return flag()
    if annotation is int:
        return whole(at_least, at_most)
    if annotation is float:
        return number(at_least, at_most)
    if annotation is str:
        return choice(*choices, spellings=spellings) if choices else text(path=path)
    return mapping()


def _refuse() -> Any:
    raise ValueError


def _as_number(value: Any) -> float | int:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError
    return float(value) if isinstance(value, str) else value


def _range_words(noun: str, low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f"{noun} from {low:,} to {high:,}"
    return noun if low is None else f"{noun} of at least {low:,}"


def _within(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


def number(low: float | None = None, high: float | None = None) -> ValueType:
    """Return the type of a finite float between two bounds, both included."""

    def read(value: Any) -> float:
        result = float(_as_number(value))
        return result if math.isfinite(result) and _within(result, low, high) else _refuse()

    return ValueType(_range_words("a number", low, high), read)


def whole(low: float | None = None, high: float | None = None) -> ValueType:
    """Return the type of an int between two bounds; 1e5 counts as one."""

    def read(value: Any) -> int:
        parsed = _as_number(value)
        return int(parsed) if parsed == int(parsed) and _within(parsed, low, high) else _refuse()

    return ValueType(_range_words("a whole number", low, high), read)


def count_or_share() -> ValueType:
    """Return the type of an int of at least 0 or a float from 0.0 to 1.0: Lightning tells 1 (one) from 1.0 (all)."""

    def read(value: Any) -> int | float:
        if isinstance(value, float) and 0 <= value <= 1:
            return value
        parsed = _as_number(value)
        return int(parsed) if parsed == int(parsed) and parsed >= 0 else _refuse()

    return ValueType("a whole number of at least 0, or a share such as 0.5 or 1.0", read)


def text(*, path: bool = False) -> ValueType:
    """Return the type of a string; a bare YAML number (`name: 2024`) is read as its digits.

    path: a leading ~ is the home folder.
    """

    def read(value: Any) -> str:
        if not isinstance(value, (str, int, float)) or isinstance(value, bool):
            raise ValueError
        return os.path.expanduser(str(value)) if path else str(value)

    return ValueType("text", read, literal=True)


def flag() -> ValueType:
    """Return the type of True or False, and nothing that only looks like it."""
    return ValueType("true or false", lambda value: value if isinstance(value, bool) else _refuse())


def choice(*names: str, spellings: Mapping[str, str] | None = None) -> ValueType:
    """Return the type of one of `names`; spellings (other -> own) are compared as text, so 16 and "16" are the same."""
    meant = {**(spellings or {}), **{name: name for name in names}}
    return ValueType("one of " + ", ".join(names), lambda value: meant.get(str(value)) or _refuse(), literal=True)


def list_of(item: ValueType, length: int | None = None, *, min_length: int = 0) -> ValueType:
    """Return the type of a tuple of `item`s, given as a YAML list."""

    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)) or length not in (None, len(value)) or len(value) < min_length:
            raise ValueError
        return tuple(item.read(entry) for entry in value)

    count = "a list" if length is None else f"a list of {length}"
    return ValueType(f"{count}, each {item.description}", read, literal=item.literal)


def either(*options: ValueType) -> ValueType:
    """Return the type that reads a value by the first of `options` that can."""

    def read(value: Any) -> Any:
        for option in options:
            try:
                return option.read(value)
            except (ValueError, TypeError, OverflowError):
                continue
        raise ValueError

    description = " or ".join(option.description for option in options)
    return ValueType(description, read, literal=any(option.literal for option in options))


def nullable(inner: ValueType) -> ValueType:
    """Return the type of `inner`, or None."""

    def read(value: Any) -> Any:
        return None if value is None else inner.read(value)

    return ValueType(f"{inner.description}, or null", read, nullable=True, literal=inner.literal)


def size() -> ValueType:
    """Return the type of (height, width) in pixels, from 512, "512, 512" (NeMo's spelling) or [512, 512]."""

    def read(value: Any) -> tuple[int, int]:
        if isinstance(value, bool):
            raise ValueError
        parts = value.split(",") if isinstance(value, str) and "," in value else value
        numbers = [int(part) for part in parts] if isinstance(parts, (list, tuple)) else [int(parts)] * 2
        return (numbers[0], numbers[1]) if len(numbers) == 2 and min(numbers) >= 1 else _refuse()

    return ValueType('pixels as one number, [height, width] or "height, width"', read, literal=True)


def class_path() -> ValueType:
    """Return the type of the dotted path of a class."""
    path = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")

    def read(value: Any) -> str:
        return value if isinstance(value, str) and path.fullmatch(value) else _refuse()

    return ValueType("a class as package.module.Class", read, literal=True)


def mapping() -> ValueType:
    """Return the type of a mapping with any keys."""
    return ValueType("a mapping", lambda value: value if isinstance(value, dict) else _refuse(), free=True)


def anything() -> ValueType:
    """Return the type of any value, as it is."""
    return ValueType("anything", lambda value: value, nullable=True, literal=True, free=True)
